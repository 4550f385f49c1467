"""Monotone splines, rational-quadratic and linear, in the notation of their papers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_float, check_positive_int
from pyro_nfvi.engine.record import is_recording
from pyro_nfvi.flows.transformers import Transformer, soft_clamp

MIN_BIN = 1e-3  # smallest bin, as a fraction of the box: the paper's implementation
MIN_SLOPE = 1e-3  # smallest derivative at a knot, likewise
MAX_BOUND = 1e12
ZERO_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))  # makes zero parameters give derivative 1


class RationalQuadraticSpline(Transformer):
    r"""Monotone rational-quadratic spline with linear tails and a learned output box.

    Knots :math:`(x^{(k)}, y^{(k)})` with derivatives :math:`\delta^{(k)}` cut
    :math:`[-B, B]` into :math:`K` bins. With :math:`\xi = (u - x^{(k)}) / w^{(k)}` and
    :math:`s^{(k)} = h^{(k)} / w^{(k)}`,

    .. math::
        g(u) = y^{(k)} + \frac{h^{(k)} [s^{(k)} \xi^2 + \delta^{(k)} \xi (1 - \xi)]}
        {s^{(k)} + [\delta^{(k+1)} + \delta^{(k)} - 2 s^{(k)}] \xi (1 - \xi)},
        \qquad z = t + e^{a} g(u).

    Unlike the paper's, the box is no wall: outside it the spline goes on as the straight line
    of its end derivative, and its image :math:`[t - e^a B, t + e^a B]` is learned, so that mass
    far from the start is within reach.

    Args:
        num_bins: Number of bins :math:`K`.
        bound: Half-width :math:`B` of the box.

    Shape:
        u: ``(*batch, n)``; params: ``(*batch, n, 3 * num_bins + 3)``.

    Example:
        >>> spline = RationalQuadraticSpline(num_bins=4)
        >>> u = torch.randn(7, 3, dtype=torch.double)
        >>> params = torch.randn(7, 3, spline.params_per_dim, dtype=torch.double)
        >>> z, log_slope = spline.forward(u, params)
        >>> torch.allclose(spline.inverse(z, params)[0], u)
        True

    References:
        Durkan, Bekasov, Murray & Papamakarios (2019), Neural Spline Flows, arXiv:1906.04032,
        eq. 4-8 and section 3.1.
    """

    def __init__(self, num_bins: int = 8, bound: float = 5.0) -> None:
        owner = "RationalQuadraticSpline"
        self.num_bins = check_num_bins(owner, num_bins)
        self.bound = _checked_bound(owner, bound)
        self.params_per_dim = 3 * self.num_bins + 3

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Spline, then the affine map of the output box."""
        return self._pass(u, params, inverse=False)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map undone, then the root of the bin's quadratic."""
        return self._pass(z, params, inverse=True)

    def _pass(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if is_recording():  # one operation of the graph instead of a hundred
            from pyro_nfvi.flows.fused import spline_pass
            return spline_pass(x, params, self.num_bins, self.bound, inverse=inverse)
        return (self._plain_inverse if inverse else self._plain_forward)(x, params)

    def _plain_forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        bins, slopes, shift, log_scale = self._split(params)
        inside = u.clamp(-self.bound, self.bound)
        x, y, w, h, d0, d1 = self._bin(inside, bins, slopes, axis=0)
        xi = ((u - x) / w).clamp(0, 1)  # exactly 0 and 1 in the tails: theirs is the end slope
        value, slope = self._spline(xi, y, w, h, d0, d1)
        value = torch.addcmul(value, slope, u - inside)  # linear tails
        return torch.addcmul(shift, value, log_scale.exp()), slope.log() + log_scale

    def _plain_inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        bins, slopes, shift, log_scale = self._split(params)
        value = (z - shift) * (-log_scale).exp()
        inside = value.clamp(-self.bound, self.bound)
        x, y, w, h, d0, d1 = self._bin(inside, bins, slopes, axis=1)
        xi = _quadratic_root(inside - y, h, h / w, d0, d1)
        _, slope = self._spline(xi, y, w, h, d0, d1)
        slope = torch.where(value == inside, slope, torch.where(value > 0, d1, d0))
        u = torch.addcmul(x, w, xi) + (value - inside) / slope
        return u, -slope.log() - log_scale

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bin sizes ``(*batch, n, 2, K)``, raw derivatives, and the output box."""
        count = self.num_bins
        raw_bins, slopes, shift, raw_scale = params.mT.split([2 * count, count + 1, 1, 1], -2)
        bins = bin_sizes(raw_bins.unflatten(-2, (2, count)), self.bound)
        return bins, slopes, shift.squeeze(-2), soft_clamp(raw_scale.squeeze(-2))

    def _bin(self, value: Tensor, bins: Tensor, slopes: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Left knot, size and end derivatives of the bin that holds ``value``."""
        found, x, y, w, h = find_bin(value, bins, self.bound, axis)
        ends = slopes.gather(-2, torch.cat([found, found + 1], -2))
        d0, d1 = (F.softplus(ends + ZERO_SLOPE) + MIN_SLOPE).unbind(-2)
        return x, y, w, h, d0, d1

    @staticmethod
    def _spline(xi: Tensor, y: Tensor, w: Tensor, h: Tensor, d0: Tensor, d1: Tensor
                ) -> tuple[Tensor, Tensor]:
        """Value and derivative inside a bin (eq. 4 and 5)."""
        s, rest = h / w, 1 - xi
        mixed = xi * rest
        denominator = s + (d1 + d0 - 2 * s) * mixed
        value = y + h * (s * xi * xi + d0 * mixed) / denominator
        numerator = d1 * xi * xi + 2 * s * mixed + d0 * rest * rest
        return value, (s / denominator).square() * numerator


class LinearSpline(Transformer):
    r"""Monotone linear interpolation between learned knots, with a learned output box.

    Knots :math:`(x^{(k)}, y^{(k)})` cut :math:`[-B, B]` into :math:`K` bins of widths
    :math:`w^{(k)}` and heights :math:`h^{(k)}`,

    .. math:: g(u) = y^{(k)} + \frac{h^{(k)}}{w^{(k)}} (u - x^{(k)}), \qquad z = t + e^{a} g(u).

    The first and the last piece go on outside the box. The density of a flow jumps at the knots,
    as does every derivative beyond the first: where smoothness counts, as in a model that is
    differentiated through, take :class:`RationalQuadraticSpline`.

    Args:
        num_bins: Number of bins :math:`K`.
        bound: Half-width :math:`B` of the box.

    Shape:
        u: ``(*batch, n)``; params: ``(*batch, n, 2 * num_bins + 2)``.

    Raises:
        ValueError: If there are fewer than 2 bins, or 1000.

    Example:
        >>> spline = LinearSpline(num_bins=4)
        >>> z, log_slope = spline.forward(torch.tensor([0.5]), torch.zeros(1, 10))
        >>> torch.allclose(z, torch.tensor([0.5]))
        True

    References:
        Müller, McWilliams, Rousselle, Gross & Novák (2019), Neural Importance Sampling,
        arXiv:1808.03856, section 4 (whose bins are equally wide, and whose box is a wall).
    """

    def __init__(self, num_bins: int = 8, bound: float = 5.0) -> None:
        self.num_bins = check_num_bins("LinearSpline", num_bins)
        self.bound = _checked_bound("LinearSpline", bound)
        self.params_per_dim = 2 * self.num_bins + 2

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate, then the affine map of the output box."""
        bins, shift, log_scale = self._split(params)
        _, x, y, w, h = find_bin(u, bins, self.bound, axis=0)
        value = torch.addcmul(y, h / w, u - x)
        return torch.addcmul(shift, value, log_scale.exp()), (h / w).log() + log_scale

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map undone, then interpolation the other way."""
        bins, shift, log_scale = self._split(params)
        value = (z - shift) * (-log_scale).exp()
        _, x, y, w, h = find_bin(value, bins, self.bound, axis=1)
        return torch.addcmul(x, w / h, value - y), (w / h).log() - log_scale

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bin sizes ``(*batch, n, 2, K)`` and the output box."""
        raw_bins, shift, raw_scale = params.mT.split([2 * self.num_bins, 1, 1], -2)
        bins = bin_sizes(raw_bins.unflatten(-2, (2, self.num_bins)), self.bound)
        return bins, shift.squeeze(-2), soft_clamp(raw_scale.squeeze(-2))


def check_num_bins(owner: str, num_bins: Any) -> int:
    """Return ``num_bins`` if the smallest bins leave room for it.

    Raises:
        ValueError: If it is no such number.
    """
    check_positive_int(owner, "num_bins", num_bins, minimum=2)
    if num_bins * MIN_BIN >= 1:
        raise ValueError(f"{owner} expected `num_bins` below {1 / MIN_BIN:.0f}, got {num_bins}.")
    return int(num_bins)


def _checked_bound(owner: str, bound: float) -> float:
    """Return ``bound`` if its square, which a spline takes, is a number in single precision."""
    if check_positive_float(owner, "bound", bound) > MAX_BOUND:
        raise ValueError(f"{owner} expected `bound` of at most {MAX_BOUND:.0e}, got {bound!r}. The "
                         "spline acts inside the box, and its tails are linear.")
    return float(bound)


def bin_sizes(raw: Tensor, bound: float) -> Tensor:
    """Sizes along dimension -2 that add up to the box, each of ``MIN_BIN`` of it at least."""
    share = 1 - MIN_BIN * raw.shape[-2]
    return torch.softmax(raw, -2) * (2 * bound * share) + 2 * bound * MIN_BIN


def find_bin(value: Tensor, bins: Tensor, bound: float, axis: int) -> tuple[Tensor, ...]:
    """Index of the bin that holds ``value``, its left knot, and its size.

    Args:
        value: Points on one axis, ``(*batch, n)``; one outside is in the first or last bin.
        bins: Widths and heights, ``(*batch, 2, K, n)``.
        bound: Half-width of the box.
        axis: 0 for points of the input, 1 for points of the output.
    """
    knots = torch.cumsum(bins, -2) - bound
    found = (knots[..., axis, :-1, :] <= value.unsqueeze(-2)).sum(-2, keepdim=True)
    index = found.unsqueeze(-3).expand(*bins.shape[:-2], 1, bins.shape[-1])
    w, h = (size := bins.gather(-2, index).squeeze(-2)).unbind(-2)
    x, y = (knots.gather(-2, index).squeeze(-2) - size).unbind(-2)
    return found, x, y, w, h


def _quadratic_root(height: Tensor, h: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    r"""Solve eq. 6 for :math:`\xi`, by the form of the root that never cancels (A.3)."""
    curve = height * (d1 + d0 - 2 * s)
    a = h * (s - d0) + curve
    b = h * d0 - curve
    c = -s * height
    # The discriminant is positive for exact arithmetic; rounding may say otherwise.
    root = (b * b - 4 * a * c).clamp(min=torch.finfo(c.dtype).tiny).sqrt()
    return (2 * c / (-b - root)).clamp(0, 1)
