"""Distributions that Pyro lacks, or computes with less care than pixels and counts need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn import functional as F

FLAT_SOFTPLUS = 40.0  # beyond, softplus is the identity to the last digit
SMALL_LOGIT = 0.1  # below, the series of the continuous Bernoulli is exact in float64
LARGE_CONCENTRATION = 64.0  # above, three terms of Stirling's series are exact in float64


class ContinuousBernoulliDistribution(TorchDistribution):
    r"""Continuous Bernoulli distribution, computed from its logits alone.

    .. math:: p(x) = \frac{\theta}{e^\theta - 1}\, e^{\theta x}, \qquad
        \mathbb E\, x = \frac{1}{1 - e^{-\theta}} - \frac{1}{\theta}

    Pyro's own goes through a clamped probability: in float32 its density does not integrate to
    one for logits beyond 16, and its gradient is off by up to 3e-4 near 0.

    Args:
        logits: The logits :math:`\theta`.

    Shape:
        logits: ``(*batch,)``.

    Example:
        >>> d = ContinuousBernoulliDistribution(torch.tensor([0.0, 100.0]))
        >>> d.mean
        tensor([0.5000, 0.9900])

    References:
        Loaiza-Ganem & Cunningham (2019), arXiv:1907.06845.
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TorchDistribution:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(ContinuousBernoulliDistribution, _instance)
        new.logits = self.logits.expand(batch_shape)
        super(ContinuousBernoulliDistribution, new).__init__(torch.Size(batch_shape),
                                                             validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density."""
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) + self._log_norm()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, by the inverse of the distribution function."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draw = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
            rate = -self.logits.abs().clamp(min=torch.finfo(draw.dtype).eps)
            x = (draw * rate.expm1()).log1p() / rate  # of a falling density; a rising one mirrors
            return torch.where(self.logits > 0, 1 - x, x).clamp(0, 1)

    @property
    def mean(self) -> Tensor:
        """Mean."""
        small, t = self._small()
        square = self.logits.square()
        series = self.logits * (1 - square / 60 * (1 - square / 42)) / 12
        exact = self.logits.sign() * (-0.5 - 1 / t - 1 / (-t).expm1())
        return 0.5 + torch.where(small, series, exact)

    def _log_norm(self) -> Tensor:
        """Log of ``(t / 2) / sinh(t / 2)``, where t is the magnitude of the logits."""
        small, t = self._small()
        square = self.logits.square()
        series = -square / 24 * (1 - square / 120 * (1 - square / 63))
        return torch.where(small, series, t.log() - t / 2 - (-(-t).expm1()).log())

    def _small(self) -> tuple[Tensor, Tensor]:
        """Where a series is used, and a magnitude of the logits that is safe elsewhere."""
        magnitude = self.logits.abs()
        small = magnitude < SMALL_LOGIT
        return small, torch.where(small, torch.ones_like(magnitude), magnitude)


class DiscretizedLogisticDistribution(TorchDistribution):
    r"""Logistic distribution on :math:`[-1, 1]`, cut into equal bins, the outer ones open.

    .. math:: \log p(x) = \log \sigma(b) + \log \sigma(-a) + \log(1 - e^{a - b}), \qquad
        a, b = (y \mp h - \mu) / s

    The formula is that of :class:`~pyro_nfvi.vae.DiscretizedLogistic`, without a difference of
    nearly equal numbers: exact in the far tails too.

    Args:
        loc: Location :math:`\mu`.
        scale: Scale :math:`s`.
        num_levels: Number of levels :math:`L`; values are the integers below.

    Shape:
        loc, scale: broadcast to ``(*batch,)``.

    Example:
        >>> d = DiscretizedLogisticDistribution(torch.zeros(()), torch.ones(()))
        >>> d.log_prob(torch.arange(256.0)).exp().sum()
        tensor(1.0000)

    References:
        Salimans et al. (2017), PixelCNN++, arXiv:1701.05517, section 2.1.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, num_levels: int = 256, *,
                 validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The levels."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TorchDistribution:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(DiscretizedLogisticDistribution, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.num_levels = self.num_levels
        super(DiscretizedLogisticDistribution, new).__init__(torch.Size(batch_shape),
                                                             validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability."""
        if self._validate_args:
            self._validate_sample(value)
        half = 1 / (self.num_levels - 1)
        offset = self._centre(value) - self.loc
        below = F.logsigmoid((offset + half) / self.scale)
        above = F.logsigmoid((half - offset) / self.scale)
        log_width = (-2 * half / self.scale).expm1().neg().log()
        first, last = value <= 0, value >= self.num_levels - 1
        inside = torch.where(first, below, below + above + log_width)
        return torch.where(last, above, inside)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws: those of the logistic distribution, rounded to the nearest level."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            draw = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            y = self.loc + self.scale * draw.logit(torch.finfo(draw.dtype).eps)
            top = self.num_levels - 1
            return ((y + 1) * (top / 2)).round().clamp(0, top)

    @property
    def mean(self) -> Tensor:
        """Mean level: the sum of the probabilities to be above a level."""
        # One level at a time: all at once would take their number times the memory.
        half, mean = 1 / (self.num_levels - 1), torch.zeros_like(self.loc)
        for level in range(self.num_levels - 1):
            mean = mean + torch.sigmoid((self.loc - (2 * level + 1) * half + 1) / self.scale)
        return mean

    def _centre(self, value: Tensor) -> Tensor:
        """Centre of the bin of a level, on the scale [-1, 1]."""
        return value.to(self.loc.dtype) * (2 / (self.num_levels - 1)) - 1


class PixelBernoulli(dist.Bernoulli):
    """Pyro's, with a log-probability in half as many passes over the pixels."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability."""
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - F.softplus(self.logits, threshold=FLAT_SOFTPLUS)


class StableNegativeBinomial(dist.NegativeBinomial):
    """Negative binomial distribution whose log-probability is exact at large concentrations."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.to(torch.promote_types(value.dtype, self.logits.dtype))
        log_odds = (self.total_count * F.logsigmoid(-self.logits)
                    + value * F.logsigmoid(self.logits))
        return log_odds + _log_rising(self.total_count, value) - torch.lgamma(value + 1)


def _log_rising(r: Tensor, x: Tensor) -> Tensor:
    r""":math:`\log \Gamma(r + x) - \log \Gamma(r)`, where two large numbers would cancel."""
    large = r.clamp(min=LARGE_CONCENTRATION)
    ratio = (large + x - 0.5) * (x / large).log1p() + x * large.log() - x
    stirling = ratio + _stirling(large + x) - _stirling(large)
    small = r.clamp(max=LARGE_CONCENTRATION)
    return torch.where(r > LARGE_CONCENTRATION, stirling, torch.lgamma(small + x)
                       - torch.lgamma(small))


def _stirling(z: Tensor) -> Tensor:
    """What Stirling's formula lacks, to the order at which it is exact for large ``z``."""
    square = z.square()
    return (1 - (1 - 2 / 7 / square) / 30 / square) / 12 / z
