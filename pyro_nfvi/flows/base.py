"""Base distributions: where the noise of a flow comes from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_float, check_positive_int


class Base(nn.Module, ABC):
    """Noise of a flow: a reparametrized distribution over ``input_dim`` coordinates.

    Calling it gives the same thing as a ``torch.distributions`` object.

    Args:
        input_dim: Number of coordinates :math:`D`.

    Shape:
        u: ``(*sample, input_dim)``; log-probability: ``(*sample,)``.

    Example:
        >>> class Uniform(Base):  # on the unit cube
        ...     symmetric = False
        ...     def rsample(self, sample_shape=()):
        ...         return torch.rand(*sample_shape, self.input_dim).to(self.zeros)
        ...     def log_prob(self, u):
        ...         return torch.where((u >= 0) & (u <= 1), 0.0, -torch.inf).sum(-1)
        ...     @property
        ...     def mean(self):
        ...         return self.zeros + 1 / 2
        ...     @property
        ...     def variance(self):
        ...         return self.zeros + 1 / 12
        >>> noise = Uniform(3)()
        >>> noise.log_prob(noise.sample((2,)))
        tensor([0., 0.])
    """

    symmetric = True  # whether -u is as likely as u
    periodic = False  # whether some coordinates are angles

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.input_dim = check_positive_int(type(self).__name__, "input_dim", input_dim)
        self.register_buffer("zeros", torch.zeros(self.input_dim))  # carries dtype and device

    zeros: Tensor

    @abstractmethod
    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, differentiable in the base's parameters."""

    @abstractmethod
    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density at ``u``."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of each coordinate."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Variance of each coordinate."""

    def forward(self) -> BaseDistribution:
        """This base as a distribution object."""
        return BaseDistribution(self)

    def extra_repr(self) -> str:
        """Dimension, as ``repr`` shows it."""
        return str(self.input_dim)


class BaseDistribution(Distribution):
    """A :class:`Base` as a ``torch.distributions`` object.

    Args:
        base: The base it stands for.
        batch_shape: Shape of the batch of independent copies.

    Example:
        >>> noise = BaseDistribution(Gaussian(3), (2,))
        >>> noise.sample((5,)).shape, noise.event_shape
        (torch.Size([5, 2, 3]), torch.Size([3]))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Base, batch_shape: torch.Size | tuple[int, ...] = (),
                 validate_args: bool | None = None) -> None:
        self.base = base
        super().__init__(torch.Size(batch_shape), torch.Size([base.input_dim]),
                         validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BaseDistribution:
        """The same noise over another batch shape."""
        return type(self)(self.base, torch.Size(batch_shape), validate_args=self._validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Reparametrized draws of shape ``(*sample_shape, *batch_shape, input_dim)``."""
        return self.base.rsample(torch.Size(sample_shape) + self._batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``, of shape ``(*sample_shape, *batch_shape)``."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.base.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self._batch_shape))

    @property
    def mean(self) -> Tensor:
        """Mean of each coordinate."""
        return self.base.mean.expand(self._batch_shape + self._event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate."""
        return self.base.variance.expand(self._batch_shape + self._event_shape)


class Gaussian(Base):
    r"""Standard normal noise: :math:`\log p(u) = -\tfrac12 (u^\top u + D \log 2\pi)`.

    Args:
        input_dim: Number of coordinates :math:`D`.

    Example:
        >>> torch.allclose(Gaussian(2).log_prob(torch.zeros(2)), -torch.tensor(2 * math.pi).log())
        True
    """

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Standard normal draws."""
        return torch.randn(*sample_shape, self.input_dim, dtype=self.zeros.dtype,
                           device=self.zeros.device)

    def log_prob(self, u: Tensor) -> Tensor:
        """Standard normal log-density."""
        return -0.5 * (u.square().sum(-1) + self.input_dim * math.log(2 * math.pi))

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.zeros

    @property
    def variance(self) -> Tensor:
        """One."""
        return torch.ones_like(self.zeros)


class StudentT(Base):
    r"""Independent Student-t noise, with set or learned degrees of freedom.

    .. math:: p(u) = \prod_i t_{\nu_i}(u_i), \qquad \nu_i = \nu_{\min} + \mathrm{softplus}(\rho_i)

    Args:
        input_dim: Number of coordinates :math:`D`.
        df: Degrees of freedom :math:`\nu` at the start, above ``MIN_DF``: a number, or one a
            coordinate.
        learn: Whether each coordinate learns its own.

    Raises:
        ValueError: If ``df`` is not a number above ``MIN_DF``, or :math:`D` of them.

    Example:
        >>> StudentT(2, df=[3.0, 6.0]).variance
        tensor([3.0000, 1.5000])

    References:
        Jaini, Kobyzev, Yu & Brubaker (2020), Tails of Lipschitz Triangular Flows,
        arXiv:1907.04481 (why the tails must be in the base).
    """

    MIN_DF = 1.0

    def __init__(self, input_dim: int, df: float | Sequence[float] | Tensor = 5.0, *,
                 learn: bool = False) -> None:
        super().__init__(input_dim)
        excess = self._checked_df(df) - self.MIN_DF
        raw = excess.expm1().log()
        raw = torch.where(raw.isfinite(), raw, excess).to(self.zeros)  # softplus(x) = x far out
        if learn:
            self.raw_df = nn.Parameter(raw)
        else:
            self.register_buffer("raw_df", raw)

    raw_df: Tensor

    def _checked_df(self, df: Any) -> Tensor:
        """Degrees of freedom of each coordinate, in double precision."""
        if isinstance(df, str) or not hasattr(df, "__len__"):
            number = _check_above("StudentT", "df", df, self.MIN_DF)
            return torch.full((self.input_dim,), number, dtype=torch.float64)
        try:
            values = torch.as_tensor(df, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):  # of no use as numbers
            values = torch.empty(0)
        if values.shape != (self.input_dim,) or not (values > self.MIN_DF).all() \
                or not values.isfinite().all():
            raise ValueError(f"StudentT expected `df` to be a number above {self.MIN_DF}, or "
                             f"{self.input_dim} of them, got {df!r}.")
        return values

    @property
    def df(self) -> Tensor:
        """Degrees of freedom of each coordinate."""
        return self.MIN_DF + F.softplus(self.raw_df)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Normal draws over the root of chi-squared draws, differentiable in ``df``."""
        return self._distribution().rsample(torch.Size(sample_shape))

    def log_prob(self, u: Tensor) -> Tensor:
        """Sum of Student-t log-densities."""
        return self._distribution().log_prob(u).sum(-1)

    def _distribution(self) -> torch.distributions.StudentT:
        return torch.distributions.StudentT(self.df, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Zero, the centre."""
        return self.zeros

    @property
    def variance(self) -> Tensor:
        """Infinite where ``df`` is 2 or less."""
        return self._distribution().variance


class MultivariateStudentT(Base):
    r"""Elliptical Student-t noise: all coordinates share one heavy tail.

    .. math:: u = \frac{e}{\sqrt{s / \nu}}, \quad e \sim \mathcal N(0, I), \
              s \sim \chi^2_\nu, \qquad
              p(u) = \frac{\Gamma(\frac{\nu + D}{2})}{\Gamma(\frac{\nu}{2}) (\nu \pi)^{D/2}}
              \left(1 + \frac{u^\top u}{\nu}\right)^{-(\nu + D)/2}

    Args:
        input_dim: Number of coordinates :math:`D`.
        df: Degrees of freedom :math:`\nu`, above ``MIN_DF``; they are set, not learned.

    Raises:
        ValueError: If ``df`` is not a number above ``MIN_DF``.

    Example:
        >>> base = MultivariateStudentT(3, df=4.0)
        >>> base.rsample((5,)).shape, base.variance
        (torch.Size([5, 3]), tensor([2., 2., 2.]))

    References:
        Domke & Sheldon (2018), Importance Weighting and Variational Inference,
        arXiv:1808.09034, section 5 (elliptical distributions as approximations).
    """

    MIN_DF = 1.0
    df: Tensor

    def __init__(self, input_dim: int, df: float = 5.0) -> None:
        super().__init__(input_dim)
        number = _check_above("MultivariateStudentT", "df", df, self.MIN_DF)
        self.register_buffer("df", torch.tensor(number))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Normal draws over the root of one chi-squared draw each."""
        noise = torch.randn(*sample_shape, self.input_dim, dtype=self.zeros.dtype,
                            device=self.zeros.device)
        chi2 = torch.distributions.Chi2(self.df, validate_args=False)
        return noise * (self.df / chi2.sample(torch.Size(sample_shape))).sqrt().unsqueeze(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density of the elliptical Student-t."""
        half, more = self.df / 2, (self.df + self.input_dim) / 2
        constant = more.lgamma() - half.lgamma() - self.input_dim / 2 * (self.df * math.pi).log()
        return constant - more * (u.square().sum(-1) / self.df).log1p()

    @property
    def mean(self) -> Tensor:
        """Zero, the centre."""
        return self.zeros

    @property
    def variance(self) -> Tensor:
        """Infinite where ``df`` is 2 or less."""
        excess = (self.df - 2).clamp(min=0)
        return (self.df / excess).expand(self.input_dim)

    def extra_repr(self) -> str:
        """Dimension and degrees of freedom."""
        return f"{self.input_dim}, df={self.df.item():g}"


class Mixture(Base):
    r"""Mixture of diagonal Gaussians with learned weights, locations and scales.

    .. math:: p(u) = \sum_k \pi_k \prod_i \mathcal N(u_i; \mu_{ki}, \sigma_{ki}^2)

    Draws are reparametrized implicitly: with :math:`F_i` the distribution function of
    coordinate :math:`i` given those before it, :math:`du = -J^{-1} \partial F`, where
    :math:`J = \partial F / \partial u` is lower triangular. Weights get gradients too.

    Args:
        input_dim: Number of coordinates :math:`D`.
        num_components: Number of components :math:`K`.
        spread: Standard deviation of the random locations at the start.

    Example:
        >>> Mixture(2, num_components=3).rsample((5,)).shape
        torch.Size([5, 2])

    References:
        Figurnov, Mohamed & Mnih (2018), Implicit Reparameterization Gradients,
        arXiv:1805.08498, section 4 (mixtures).
    """

    symmetric = False

    def __init__(self, input_dim: int, num_components: int = 4, *, spread: float = 2.0) -> None:
        super().__init__(input_dim)
        count = check_positive_int("Mixture", "num_components", num_components)
        check_positive_float("Mixture", "spread", spread)
        self.logits = nn.Parameter(torch.zeros(count))
        self.locs = nn.Parameter(spread * torch.randn(count, self.input_dim))
        self.log_scales = nn.Parameter(torch.zeros(count, self.input_dim))

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, differentiable in weights, locations and scales."""
        u = self._sample(sample_shape)
        if not torch.is_grad_enabled():
            return u
        quantile, jacobian = self._conditional_cdf(u)
        change = (quantile - quantile.detach()).unsqueeze(-1)
        step = torch.linalg.solve_triangular(jacobian.detach(), change, upper=False)
        return u - step.squeeze(-1)

    @torch.no_grad()
    def _sample(self, sample_shape: torch.Size | tuple[int, ...]) -> Tensor:
        count = math.prod(sample_shape)
        weights = self.logits.softmax(-1)  # multinomial refuses to draw none: draw one, keep none
        which = torch.multinomial(weights, max(count, 1), replacement=True)[:count]
        noise = torch.randn(count, self.input_dim, dtype=self.locs.dtype, device=self.locs.device)
        u = self.locs[which] + self.log_scales[which].exp() * noise
        return u.reshape(*sample_shape, self.input_dim)

    def _standardized(self, u: Tensor) -> Tensor:
        return (u.unsqueeze(-2) - self.locs) * (-self.log_scales).exp()

    def _log_components(self, standardized: Tensor) -> Tensor:
        """Log-densities of each coordinate under each component, ``(*sample, K, D)``."""
        return -0.5 * standardized.square() - self.log_scales - 0.5 * math.log(2 * math.pi)

    def _conditional_cdf(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r""":math:`F_i(u_i \mid u_{<i})` and its lower-triangular Jacobian in ``u``."""
        standardized = self._standardized(u)
        log_density = self._log_components(standardized)
        before = log_density.cumsum(-1) - log_density
        weight = (self.logits.unsqueeze(-1) + before).softmax(-2)
        cdf = torch.special.ndtr(standardized)
        diagonal = (weight * log_density.exp()).sum(-2)
        slope = -standardized * (-self.log_scales).exp()  # d log density / du
        weighted = weight * cdf
        # d F_i / d u_j = sum_k w_ki cdf_ki (slope_kj - mean slope_j), for j < i
        cross = torch.einsum("...ki,...kj->...ij", weighted, slope)
        mean_slope = torch.einsum("...ki,...kj->...ij", weight, slope)
        cross = cross - weighted.sum(-2).unsqueeze(-1) * mean_slope
        return weighted.sum(-2), cross.tril(-1) + torch.diag_embed(diagonal)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of the mixture density."""
        log_density = self._log_components(self._standardized(u)).sum(-1)
        return torch.logsumexp(self.logits.log_softmax(-1) + log_density, -1)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the locations."""
        return self.logits.softmax(-1) @ self.locs

    @property
    def variance(self) -> Tensor:
        """Within plus between components."""
        second = (2 * self.log_scales).exp() + self.locs.square()
        return self.logits.softmax(-1) @ second - self.mean.square()


def _check_above(owner: str, argument: str, value: Any, minimum: float) -> float:
    """Return ``value`` as a float if it is a finite number above ``minimum``.

    Raises:
        ValueError: If it is anything else.
    """
    number = check_positive_float(owner, argument, value)
    if number <= minimum:
        raise ValueError(f"{owner} expected `{argument}` above {minimum}, got {value!r}.")
    return number
