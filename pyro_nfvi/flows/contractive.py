"""Residual flows: identity plus a contraction, which a fixed point inverts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_int, type_name
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.jacobian import power_series_log_det, rademacher
from pyro_nfvi.flows.linearized import Perceptron, scaled, value_and_slope
from pyro_nfvi.flows.nets import MLP, OutputLinear, check_network
from pyro_nfvi.flows.roots import NotConverged, any_of

# How much faster its output trains than that of other conditioners: a contraction cannot bolt.
GAIN = 20.0
NUM_STEPS = 8  # of the search for an inverse inside a graph, which cannot look at its residuals
NUM_REFINEMENTS = 2  # steps by a constant Jacobian, each of which adds an exact derivative
SLOPE_GRID = 20.0, 4001  # half-width and number of points at which a slope is looked at


class LipSwish(nn.Module):
    r"""Swish of slope at most one: :math:`x\, \sigma(\beta x) / 1.1`, with a learned sharpness.

    Smooth and unbounded: its slope does not vanish for large inputs, and so neither does what a
    contraction of many layers can do.

    Shape:
        ``(*batch,) -> (*batch,)``.

    Example:
        >>> x = torch.linspace(-5, 5, 100)
        >>> bool((LipSwish().value_and_slope(x)[1].abs() <= 1).all())
        True

    References:
        Chen et al. (2019), Residual Flows for Invertible Generative Modeling, arXiv:1906.02735,
        eq. 9.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The swish of ``x``."""
        return x * torch.sigmoid(F.softplus(self.raw_beta) * x) / 1.1

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The swish of ``x``, and its derivative."""
        scaled = F.softplus(self.raw_beta) * x
        gate = torch.sigmoid(scaled)
        return x * gate / 1.1, gate * (1 + scaled * (1 - gate)) / 1.1


class ContractiveMLP(nn.Module):
    r"""Multilayer perceptron of Lipschitz constant below one, whose output starts at zero.

    .. math:: g(u) = W_K \phi(\cdots \phi(W_1 u + b_1(\text{context}))) + b_K(\text{context}),
              \qquad \lVert W_k \rVert_2 \le L^{1/K}, \quad |\phi'| \le 1

    A matrix :math:`W` whose norm may be above :math:`c = L^{1/K}` is scaled down, by
    :func:`contracted`: a function of the weights alone, so that copies agree and no buffer is
    updated behind the user's back. The context moves biases only, of which :math:`L` is
    independent.

    Args:
        input_dim: Number of inputs and outputs :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        lipschitz: The bound :math:`L` below one.
        hidden_dims: Sizes of the hidden layers.
        activation: Constructor of the nonlinearity :math:`\phi`.

    Shape:
        ``(*batch, D), (*batch, context_dim) -> (*batch, D)``.
    """

    def __init__(self, input_dim: int, context_dim: int, lipschitz: float,
                 hidden_dims: Sequence[int], activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        dims = [input_dim, *hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:],
                                                                   strict=True))
        self.activations = nn.ModuleList(activation() for _ in hidden_dims)
        self.output = OutputLinear(dims[-1], input_dim)
        self.moved = [dims[1], input_dim] if hidden_dims else [input_dim]  # by the context
        self.steer = MLP(context_dim, sum(self.moved)) if context_dim else None
        self.bound = lipschitz ** (1 / len(dims))

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """The image of ``u``."""
        return self.given(context)(u)

    def given(self, context: Tensor | None) -> Perceptron:
        """The network for a context, with its matrices scaled."""
        last, bias = scaled(self.output)
        weights = [*[layer.weight for layer in self.hidden], GAIN * last]
        biases = [*[layer.bias for layer in self.hidden], GAIN * bias]
        if self.steer is not None:
            shifts = self.steer(context).split(self.moved, -1)
            biases[-1] = biases[-1] + shifts[-1]
            if len(shifts) == 2:
                biases[0] = biases[0] + shifts[0]
        weights = [contracted(w, self.bound) for w in weights]
        return Perceptron(weights, biases, list(self.activations))


def contracted(weight: Tensor, bound: float) -> Tensor:
    r"""The matrix, scaled down where its spectral norm is above the bound :math:`c`.

    .. math:: W \frac{c}{n(W)}, \qquad
              n(W) = \left(c^{2p} + \textstyle\sum_i \sigma_i^{2p}\right)^{1/2p}
              \ge \max(c, \sigma_1), \qquad p = 2^5

    This norm is never too small, as that of a power iteration is before it has converged; it is
    smooth, also where singular values meet and at zero, as :math:`\sigma_1` is not; and it takes
    five products of a matrix as small as the smaller side. It is too large by a factor of at most
    :math:`(1 + \mathrm{rank})^{1/2p}`.

    Args:
        weight: Matrix :math:`W`.
        bound: Largest spectral norm :math:`c` of the result.

    Example:
        >>> w = contracted(torch.randn(64, 3), bound=0.9)
        >>> bool(torch.linalg.matrix_norm(w, 2) < 0.9001)
        True

    References:
        Gouk et al. (2021), Regularisation of Neural Networks by Enforcing Lipschitz Continuity,
        arXiv:1804.04368 (the scaling); Miyato et al. (2018), arXiv:1802.05957 (by power
        iteration). The power sum is that of a Schatten norm.
    """
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    power = torch.block_diag(gram, gram.new_full((1, 1), bound * bound))
    first = power.trace()
    power = torch.linalg.matrix_power(power / first, 8)  # scaled, or it would overflow
    second = power.trace()
    power = torch.linalg.matrix_power(power / second, 2)  # or underflow
    third = power.square().sum()  # the trace of the square
    norm = first.sqrt() * second ** (1 / 16) * third ** (1 / 64)
    return weight * (bound / norm)


class Residual(Bijection):
    r"""Residual layer: the identity plus a contraction.

    .. math:: z = u + g(u), \qquad \lVert g(u) - g(v) \rVert \le L \lVert u - v \rVert, \quad L < 1

    The log-determinant is exact unless a series is asked for: it is that of a matrix as small as
    the narrowest layer of :math:`g`, :math:`\det(I_D + A B) = \det(I_m + B A)`, so that it costs
    about :math:`m` passes through :math:`g` and :math:`O(m^3)`, in any dimension. The series

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k

    costs a pass a term and probe, which pays for very wide networks. It is random: a new estimate
    at every call (see ``log_det_is_random``), which an ELBO takes, but importance weights and
    Pareto k-hat mistake for a poor fit; and a random number of terms keeps a fit from compiling.

    The inverse is the fixed point of :math:`u = z - g(u)`. Of a Newton step and a step of this
    iteration each point takes the better one, and so the residual falls at least by :math:`L` a
    step, in practice to rounding within six. Derivatives of the inverse are implicit.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        lipschitz: The bound :math:`L`, between 0 and 1. A layer stretches by at most
            :math:`1 + L`, and squeezes by at most :math:`1 - L`.
        num_terms: Number of terms of the series: its bias is at most ``log_det_bias``. Default:
            no series.
        roulette: Probability of each further term, above :math:`L^2`, which makes the series
            unbiased.
        num_probes: Number of random vectors a trace is estimated with.
        hidden_dims: Sizes of the hidden layers of :math:`g`.
        activation: Constructor of its nonlinearity, of slope at most one.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If :math:`L` is not between 0 and 1, the activation is steeper than one, or the
            options of the series do not fit; at a call, if an inverse is not found, because the
            activation became too steep.

    Example:
        >>> layer = Residual(2)
        >>> u = torch.randn(5, 2)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u)
        True

    References:
        Behrmann et al. (2019), Invertible Residual Networks, arXiv:1811.00995, theorem 1 and
        eq. 4; Chen et al. (2019), Residual Flows for Invertible Generative Modeling,
        arXiv:1906.02735, theorem 1.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, lipschitz: float = 0.9,
                 num_terms: int | None = None, roulette: float | None = None,
                 num_probes: int = 1, hidden_dims: Sequence[int] = (64,),
                 activation: Callable[[], nn.Module] = LipSwish) -> None:
        super().__init__(input_dim, context_dim)
        self.lipschitz = _checked_lipschitz(lipschitz)
        self.num_terms, self.roulette = num_terms, roulette
        self.num_probes = check_positive_int("Residual", "num_probes", num_probes)
        _check_series(num_terms, roulette, self.lipschitz)
        check_network("Residual", hidden_dims, activation)
        _check_slope(activation)
        self.network = ContractiveMLP(self.input_dim, self.context_dim, self.lipschitz,
                                      hidden_dims, activation)

    @property
    def log_det_is_random(self) -> bool:
        """Whether log-determinants are estimates, which differ between calls."""
        return self.num_terms is not None

    @property
    def log_det_bias(self) -> float:
        r"""Bound on the bias of the log-determinant: :math:`D \sum_{k > n} L^k / k`."""
        if self.num_terms is None or self.roulette is not None:
            return 0.0
        kept = sum(self.lipschitz ** k / k for k in range(1, self.num_terms + 1))
        return self.input_dim * max(-math.log1p(-self.lipschitz) - kept, 0.0)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        g = self.network.given(context)
        if self.num_terms is not None:
            value, log_det = self._series(g, u)
            return u + value, log_det
        at = g.at(u)
        return u + at.value, at.log_det()

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        g = self.network.given(context)
        return self._refined(g, self._fixed_point(g, z), z)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._refined(self.network.given(context), u, z)

    def _refined(self, g: Perceptron, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Attach implicit gradients to a known preimage."""
        u = u.detach()
        with torch.no_grad():
            solve = g.at(u).solver()
        for _ in range(NUM_REFINEMENTS):
            u = u + solve(z - u - g(u))
        log_det = g.at(u).log_det() if self.num_terms is None else self._series(g, u)[1]
        return u, -log_det

    def _series(self, g: Perceptron, u: Tensor) -> tuple[Tensor, Tensor]:
        assert self.num_terms is not None
        return power_series_log_det(g, u, noise=rademacher(u, self.num_probes),
                                    num_terms=self.num_terms, roulette=self.roulette)

    @torch.no_grad()
    def _fixed_point(self, g: Perceptron, z: Tensor) -> Tensor:
        r"""The point :math:`u = z - g(u)`, to three quarters of the digits."""
        tolerance = torch.finfo(z.dtype).eps ** 0.75 * (1 + _norm(z))
        u, at = z, g.at(z)
        for step in range(self._max_steps(z.dtype) + 1):
            gap = z - u - at.value
            wrong = _norm(gap) > tolerance  # false for nan, which no step would mend
            lost = any_of(wrong)
            if lost is False:
                return u
            if lost is None and step == NUM_STEPS:  # who cannot raise: a fit rolls back from nan
                return u.masked_fill(wrong.unsqueeze(-1), math.nan)
            u = self._better(g, z, u + at.solver()(gap), u + gap)
            at = g.at(u)
        raise NotConverged(
            f"Residual found no inverse of {int(wrong.sum())} points in {step} steps, so its "
            "network is no contraction: use an `activation` whose slope stays at most 1, such as "
            "LipSwish, nn.Tanh or nn.ELU.")

    @staticmethod
    def _better(g: Perceptron, z: Tensor, newton: Tensor, picard: Tensor) -> Tensor:
        """Whichever point is nearer to a preimage; of a contraction the second always is."""
        both = torch.stack([newton, picard])
        first, second = _norm(z - both - g(both))
        return torch.where((first <= second).unsqueeze(-1), newton, picard)

    def _max_steps(self, dtype: torch.dtype) -> int:
        r"""Steps after which :math:`L^n` is below the tolerance, whatever the Newton steps do."""
        steps = math.log(torch.finfo(dtype).eps ** 0.75) / math.log(self.lipschitz)
        return NUM_STEPS + math.ceil(steps)

    def extra_repr(self) -> str:
        """Dimensions, Lipschitz constant, and the options of a series."""
        shown = f"{super().extra_repr()}, lipschitz={self.lipschitz}"
        for name in ("num_terms", "roulette"):
            shown += "" if getattr(self, name) is None else f", {name}={getattr(self, name)}"
        return shown


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _checked_lipschitz(lipschitz: Any) -> float:
    ok = isinstance(lipschitz, (int, float)) and not isinstance(lipschitz, bool)
    if not ok or not 0 < lipschitz < 1:
        raise ValueError("Residual expected `lipschitz` to be a number between 0 and 1, beyond "
                         "which the layer need not be invertible and the series of its log-det "
                         f"not converge, got {lipschitz!r}.")
    return float(lipschitz)


def _check_series(num_terms: Any, roulette: Any, lipschitz: float) -> None:
    if num_terms is not None:
        check_positive_int("Residual", "num_terms", num_terms)
    if roulette is None:
        return
    if num_terms is None:
        raise ValueError("Residual expected `num_terms` beside `roulette`, got None. Say how many "
                         "terms are always there: num_terms=5.")
    if not isinstance(roulette, float) or not lipschitz ** 2 < roulette < 1:
        raise ValueError(f"Residual expected `roulette` to be a probability above lipschitz**2 = "
                         f"{lipschitz ** 2:.3g}, for a variance that is finite, got {roulette!r}.")


def _check_slope(activation: Callable[[], nn.Module]) -> None:
    """Check on a grid that an activation is no steeper than one."""
    instance, (width, count) = activation(), SLOPE_GRID
    grid = torch.linspace(-width, width, count)
    _, slope = value_and_slope(instance, grid)
    steepest = float(slope.detach().abs().max())
    if not steepest <= 1 + 1e-5:
        raise ValueError("Residual expected `activation` to have a slope of at most 1, got "
                         f"{type_name(instance)}, whose slope reaches {steepest:.3g}: use "
                         "LipSwish, nn.Tanh or nn.ELU.")
