r"""Flows of angles: what a flow over circles, or circles and lines, is made of.

An angle is a real number of which only the place on the circle counts. The maps of angles here
are those of the circle, written on the reals,

.. math:: f(u + 2 \pi) = f(u) + 2 \pi,

so they are bijections of either, and compose with all other layers. The noise is uniform on the
circle; the density of an angle is the same at all its numbers, and integrates to one over any
turn. Draws lie within one turn, but where it is cut is left to chance: sum angles up by circular
statistics, such as those of ArviZ.

    Flow(ncsf(2), UniformAngles(2))
    Flow(ncsf(2, angles=[True, False]), UniformAngles(2, angles=[True, False]))

As a guide of sites that are angles, such as those of ``VonMises``, whose densities have a period
where Pyro sees a support of all reals:

    AutoFlow(model, ncsf, base=UniformAngles, affine=AngularDiagonal)

A guide that does not know of the period is ill-posed there: the wider it gets, over ever more
turns, the greater its ELBO. ``NFVI`` trains a guide over angles from where it starts, since no
Gaussian fits a circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi.flows.base import Base
from pyro_nfvi.flows.linear import Diagonal
from pyro_nfvi.flows.nets import (
    HIDDEN_DIMS,
    MLP,
    AngleFeatures,
    ContextParameter,
    check_angles,
    check_network,
)
from pyro_nfvi.flows.spline import (
    RationalQuadraticSpline,
    _quadratic_root,
    bin_sizes,
    check_num_bins,
)
from pyro_nfvi.flows.transformers import Transformer

TURN = 2 * math.pi
LOG_TURN = math.log(TURN)


class CircularSpline(Transformer):
    r"""Monotone rational-quadratic spline of the circle, and a rotation.

    .. math:: z = \phi + g(u), \qquad g(u + 2 \pi) = g(u) + 2 \pi

    On :math:`[-\pi, \pi]`, :math:`g` is the spline of :class:`RationalQuadraticSpline` from end
    to end, with one derivative for both ends; the phase :math:`\phi` lets the ends move.

    The map is one of the circle if its parameters are, so let the conditioner see angles by
    cosine and sine: ``Coupling(..., conditioner=partial(PeriodicMLP, angles))`` or
    ``Autoregressive(..., conditioner=partial(MaskedMLP, angles=angles))``.

    Args:
        num_bins: Number of bins :math:`K`.

    Shape:
        u: ``(*batch, n)``; params: ``(*batch, n, 3 * num_bins + 1)``.

    Raises:
        ValueError: If there are fewer than 2 bins, or 1000.

    Example:
        >>> spline, params = CircularSpline(num_bins=4), torch.randn(1, 13)
        >>> z, log_slope = spline.forward(torch.tensor([1.0]), params)
        >>> turned, log_slope_turned = spline.forward(torch.tensor([1.0 + 2 * math.pi]), params)
        >>> torch.allclose(turned - z, torch.tensor(2 * math.pi))
        True

    References:
        Rezende et al. (2020), Normalizing Flows on Tori and Spheres, arXiv:2002.02428, section
        2.1; Durkan, Bekasov, Murray & Papamakarios (2019), Neural Spline Flows,
        arXiv:1906.04032, eq. 4-8.
    """

    def __init__(self, num_bins: int = 8) -> None:
        self.num_bins = check_num_bins("CircularSpline", num_bins)
        self.params_per_dim = 3 * self.num_bins + 1
        self._spline = RationalQuadraticSpline(self.num_bins, bound=math.pi)

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Spline within the turn, then the rotation."""
        bins, slopes, phase = self._split(params)
        inside, turns = _in_turn(u)
        x, y, w, h, d0, d1 = self._spline._bin(inside, bins, slopes, axis=0)
        value, slope = self._spline._spline((inside - x) / w, y, w, h, d0, d1)
        return value + turns + phase, slope.log()

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The rotation undone, then the root of the bin's quadratic."""
        bins, slopes, phase = self._split(params)
        inside, turns = _in_turn(z - phase)
        x, y, w, h, d0, d1 = self._spline._bin(inside, bins, slopes, axis=1)
        xi = _quadratic_root(inside - y, h, h / w, d0, d1)
        _, slope = self._spline._spline(xi, y, w, h, d0, d1)
        return torch.addcmul(x, w, xi) + turns, -slope.log()

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bin sizes, raw derivatives at all knots, and the phase."""
        count = self.num_bins
        raw_bins, slopes, phase = params.mT.split([2 * count, count, 1], -2)
        bins = bin_sizes(raw_bins.unflatten(-2, (2, count)), math.pi)
        return bins, torch.cat([slopes, slopes[..., :1, :]], -2), phase.squeeze(-2)


class PeriodicMLP(nn.Module):
    """The conditioner of a coupling layer some of whose coordinates are angles.

    It is an :class:`MLP` that sees an angle by its cosine and its sine.

    Args:
        angles: True for the coordinates that are angles, ``(D,)``.
        mask: True for the coordinates that move, ``(D,)``.
        context_dim: Number of context coordinates; 0 for none.
        num_params: Outputs for each coordinate that moves.
        hidden_dims: Sizes of the hidden layers.
        activation: Constructor of the nonlinearity.

    Shape:
        ``(*batch, kept + context_dim) -> (*batch, num_params * moved)``.

    Raises:
        ValueError: If ``angles`` does not hold one boolean a coordinate.

    Example:
        >>> from functools import partial
        >>> from pyro_nfvi.flows import Coupling
        >>> layer = Coupling(2, transformer=CircularSpline(),
        ...                  conditioner=partial(PeriodicMLP, [True, True]))
        >>> layer(torch.randn(7, 2))[0].shape
        torch.Size([7, 2])
    """

    def __init__(self, angles: Sequence[bool] | Tensor, mask: Tensor, context_dim: int,
                 num_params: int, hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        check_network("PeriodicMLP", hidden_dims, activation)
        kept = check_angles("PeriodicMLP", angles, len(mask))[~mask]
        context = torch.zeros(context_dim, dtype=torch.bool)
        self.features = AngleFeatures(torch.cat([kept, context]))
        self.net = MLP(len(self.features.columns), num_params * int(mask.sum()), hidden_dims,
                       activation)

    def forward(self, x: Tensor) -> Tensor:
        """Parameters of the coordinates that move, given those that stay and the context."""
        params: Tensor = self.net(self.features(x))
        return params


class UniformAngles(Base):
    r"""Uniform noise on the circle for angles, standard normal noise for the other coordinates.

    .. math:: \log p(u) = -A \log 2 \pi - \tfrac12 \textstyle\sum_{i\ \text{real}}
              (u_i^2 + \log 2 \pi)

    Draws of the :math:`A` angles are in :math:`[-\pi, \pi)`; their density is the same at every
    number, as each stands for a place on the circle.

    Args:
        input_dim: Number of coordinates :math:`D`.
        angles: True for the coordinates that are angles. Default: all.

    Raises:
        ValueError: If ``angles`` does not hold one boolean a coordinate.

    Example:
        >>> UniformAngles(2, angles=[True, False]).variance
        tensor([3.2899, 1.0000])
    """

    angles: Tensor

    def __init__(self, input_dim: int, *, angles: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__(input_dim)
        which = check_angles("UniformAngles", angles, self.input_dim)
        self.register_buffer("angles", which, persistent=False)
        self.periodic = bool(which.any())

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Uniform angles and standard normal reals."""
        shape, like = (*sample_shape, self.input_dim), self.zeros
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
        normal = torch.randn(shape, dtype=like.dtype, device=like.device)
        return torch.where(self.angles, TURN * (uniform - 0.5), normal)

    def log_prob(self, u: Tensor) -> Tensor:
        """Of the places on circles and lines."""
        normal = -0.5 * (u.square() + LOG_TURN)
        return torch.where(self.angles, -LOG_TURN, normal).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Zero, the centre of the turn."""
        return self.zeros

    @property
    def variance(self) -> Tensor:
        """Of draws, which are within one turn."""
        return torch.where(self.angles, math.pi ** 2 / 3, 1.0).to(self.zeros)


class AngularDiagonal(Diagonal):
    r"""Rotation of angles, shift and scale of the other coordinates.

    .. math:: z_i = t_i + u_i \ \text{(angles)}, \qquad z_i = t_i + e^{s_i} u_i \ \text{(reals)}

    The affine map of a guide over angles: see :mod:`pyro_nfvi.flows.circular`.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        angles: True for the coordinates that are angles. Default: all.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If ``angles`` does not hold one boolean a coordinate.

    Example:
        >>> AngularDiagonal(2)(torch.zeros(2))[1]
        tensor(0., grad_fn=...)
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *,
                 angles: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__(input_dim, context_dim)
        angles = check_angles("AngularDiagonal", angles, self.input_dim)
        self.log_scale = _OfReals(angles, self.context_dim)


class _OfReals(ContextParameter):
    """A learned vector that is zero at angles."""

    real: Tensor

    def __init__(self, angles: Tensor, context_dim: int) -> None:
        super().__init__(torch.zeros(len(angles)), context_dim)
        self.register_buffer("real", (~angles).to(self.value.dtype), persistent=False)

    def forward(self, context: Tensor | None = None) -> Tensor:
        return self.real * super().forward(context)


def _in_turn(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""An angle within :math:`[-\pi, \pi)`, and the whole turns that were taken from it."""
    turns = TURN * torch.floor((x + math.pi) / TURN)
    return x - turns, turns
