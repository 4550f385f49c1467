"""Monotone maps as integrals of positive networks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_float, check_positive_int
from pyro_nfvi.flows.transformers import NumericallyInverted, soft_clamp

# Together these keep the quadrature exact whatever the parameters: see MonotoneIntegral.
NUM_NODES = 32
MAX_LOG_SLOPE = 6.0  # of all hidden units together
MAX_STEEPNESS = 5.0  # of one hidden unit, per half-width of the box


class MonotoneIntegral(NumericallyInverted):
    r"""The integral of a positive network, whose weights the conditioner outputs.

    .. math:: z = t + \int_0^u f(x)\, dx, \qquad \log\frac{dz}{du} = \log f(u) = c +
              \sum_{k=1}^K a_k \tanh\left(\frac{s_k}{B} (u - m_k)\right)

    with :math:`\sum_k |a_k| < 6`, :math:`|c| < 3`, :math:`5 e^{-1} < s_k < 5` and centres
    :math:`m_k` that start evenly over the box :math:`[-B, B]`. Beyond the box :math:`f` stays as
    it is at its ends, so the tails are linear and the map is onto.

    The integral is a Gauss-Legendre sum over 32 nodes, the log-derivative the exact integrand: they
    belong together as far as the sum is exact. The bounds see to that: the sum is within
    :math:`10^{-11}` of the integral, relative to it, and its log-derivative within
    :math:`2 \cdot 10^{-6}` of :math:`\log f` for the worst parameters there are and within
    :math:`10^{-10}` for all but a few. The inverse is a scalar root.

    Args:
        num_units: Number of hidden units :math:`K`.
        bound: Half-width :math:`B` of the box.

    Shape:
        u: ``(*batch, n)``; params: ``(*batch, n, 3 * num_units + 2)``.

    Raises:
        ValueError: If an option is not positive.

    Example:
        >>> integral = MonotoneIntegral(num_units=4)
        >>> z, log_slope = integral.forward(torch.tensor([30.0]), torch.zeros(1, 14))
        >>> torch.allclose(z, torch.tensor([30.0]))
        True

    References:
        Wehenkel & Louppe (2019), Unconstrained Monotonic Neural Networks, arXiv:1908.05164,
        eq. 1 and section 3. There the conditioner outputs an embedding that one network, shared by
        all coordinates, takes besides :math:`x`; here it outputs the whole of a smaller network.
    """

    def __init__(self, num_units: int = 8, bound: float = 5.0) -> None:
        self.num_units = check_positive_int("MonotoneIntegral", "num_units", num_units)
        self.bound = check_positive_float("MonotoneIntegral", "bound", bound)
        self.params_per_dim = 3 * self.num_units + 2
        self._nodes, self._weights = _gauss_legendre(NUM_NODES)
        place = (torch.arange(self.num_units, dtype=torch.float64) + 0.5) / self.num_units
        self._centre = self.bound * (2 * place - 1)

    def _map(self, u: Tensor, shift: Tensor, *network: Tensor) -> tuple[Tensor, Tensor]:
        """The quadrature inside the box, the end slope beyond it."""
        inside = u.clamp(-self.bound, self.bound)
        log_f = _network(inside.unsqueeze(-1) * self._nodes.to(u), *network)
        f, log_slope = log_f.exp(), log_f[..., -1]  # the last node is the end of the integral
        area = inside * (f @ self._weights.to(u))
        return shift + torch.addcmul(area, f[..., -1], u - inside), log_slope

    def _bracket(self, z: Tensor, shift: Tensor, c: Tensor, a: Tensor, *_: Tensor
                 ) -> tuple[Tensor, Tensor]:
        """Between the straight lines of the least and the greatest slope the network can have."""
        reach = a.abs().sum(-1)
        slopes = (c + torch.stack([-reach, reach], -1)).exp()
        ends = (z - shift).unsqueeze(-1) / slopes
        return ends.amin(-1), ends.amax(-1)

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        """Shift, and the network's c, a, steepness and m."""
        count = self.num_units
        shift, c, a, raw, m = params.split([1, 1, count, count, count], -1)
        a = a / (1 + a.abs().sum(-1, keepdim=True) / MAX_LOG_SLOPE)
        steepness = MAX_STEEPNESS / self.bound * (soft_clamp(raw, 0.5) - 0.5).exp()
        return shift.squeeze(-1), soft_clamp(c), a, steepness, m + self._centre.to(params)


def _network(x: Tensor, c: Tensor, a: Tensor, steepness: Tensor, m: Tensor) -> Tensor:
    """The log-integrand at several points of every coordinate, ``(*batch, n, points)``."""
    hidden = torch.tanh((x.unsqueeze(-1) - m.unsqueeze(-2)) * steepness.unsqueeze(-2))
    return c + (hidden @ a.unsqueeze(-1)).squeeze(-1)


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], with the end as one more node of no weight."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (torch.from_numpy(np.append((nodes + 1) / 2, 1.0)),
            torch.from_numpy(np.append(weights / 2, 0.0)))
