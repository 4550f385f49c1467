"""Likelihoods: the output of a decoder as a Pyro distribution over the data, element by element."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_float, check_positive_int, type_name
from pyro_nfvi.vae.distributions import (
    ContinuousBernoulliDistribution,
    DiscretizedLogisticDistribution,
    PixelBernoulli,
    StableNegativeBinomial,
)
from pyro_nfvi.vae.layers import check_event_shape

# Bounds of learned logarithms: wide enough for any data worth a fit, and in float32 the square of
# a ratio of two such numbers still is one.
MAX_LOG = 20.0
MAX_LOG_PIXEL_SCALE = 7.0


class Likelihood(nn.Module, ABC):
    r"""What a decoder's output says about the data: one distribution for each of its elements.

    .. math:: p(x \mid \theta) = \prod_i p(x_i \mid \theta_{1i}, \dots, \theta_{Pi})

    A subclass sets ``num_params`` (the :math:`P`) and ``discrete``, and writes
    ``_distribution``, which may assume checked parameters, their dimension moved to the front.
    Data of special values also have ``_expected``, ``_way_out`` and ``_in_support``.

    Args:
        event_shape: Shape of one data point, such as ``(28, 28)``.

    Shape:
        params: ``(*batch, num_params, *event_shape)``; the distribution: batch shape
        ``(*batch, *event_shape)``, event shape ``()``. With ``num_params=1`` the dimension of
        size 1 may be left away; parameters that end in ``(1, *event_shape)`` are taken to have it.

    Raises:
        ValueError: If ``event_shape`` is no tuple of positive integers.

    Example:
        >>> class Laplace(Likelihood):
        ...     num_params, discrete = 1, False
        ...     def _distribution(self, params):
        ...         return dist.Laplace(params[0], 1.0)
        >>> Laplace((2, 2))(torch.zeros(5, 1, 2, 2)).batch_shape
        torch.Size([5, 2, 2])
    """

    num_params: int = 1
    discrete: bool  # log-probabilities are of probabilities, not of a density
    unbounded = False  # whether data may be of any size
    _expected = "finite data"
    _way_out = ""

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = torch.Size(check_event_shape(type(self).__name__, event_shape))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Distribution of every element of the data.

        Raises:
            ValueError: If the parameters have another shape.
        """
        return self._distribution(self._params_first(params))

    def mean(self, params: Tensor) -> Tensor:
        """What a reconstruction shows, shape ``(*batch, *event_shape)``: the mean."""
        return self(params).mean

    def as_input(self, x: Tensor) -> Tensor:
        """The data as an encoder takes them: floats, whole numbers in torch's default dtype."""
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())

    def input_shape(self, event_shape: Sequence[int]) -> torch.Size:
        """Shape of ``as_input`` of one data point."""
        return torch.Size(event_shape)

    def check(self, owner: str, x: Tensor, mask: Tensor | None = None) -> None:
        """Check that the data are finite and in the support, where ``mask`` is true.

        It reads every value, so it is for the start of a fit, not for its steps.

        Raises:
            ValueError: If a seen value is neither, or the mask is not one of the data.
        """
        seen = _seen(owner, x, mask)
        _check_finite(owner, seen)
        bad = seen[~self._in_support(seen)]
        if bad.numel():
            raise ValueError(f"{owner} expected {self._expected} for {type(self).__name__}, "
                             f"got {_shown(bad)}. {self._way_out}")

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return str(tuple(self.event_shape))

    @abstractmethod
    def _distribution(self, params: Tensor) -> TorchDistribution:
        """Distribution for parameters of shape ``(num_params, *batch, *event_shape)``."""

    def _in_support(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool)

    def _params_first(self, params: Tensor) -> Tensor:
        """A view of shape ``(num_params, *batch, *event_shape)``."""
        expected = (self.num_params, *self.event_shape)
        if _ends_with(params, expected):
            return params.movedim(-len(expected), 0)
        if self.num_params == 1 and _ends_with(params, self.event_shape):
            return params.unsqueeze(0)
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"{type(self).__name__} expected `params` of shape (*batch, {sizes}), got "
            f"{tuple(params.shape)}. A decoder must output (*batch, num_params, *event_shape), "
            f"here num_params={self.num_params} and event_shape={tuple(self.event_shape)}.")


class Bernoulli(Likelihood):
    r"""Binary data: the decoder outputs the log-odds.

    .. math:: p(x = 1 \mid \theta) = \sigma(\theta)

    Args:
        event_shape: Shape of one data point.

    Shape:
        params: ``(*batch, 1, *event_shape)`` or ``(*batch, *event_shape)``.

    Example:
        >>> likelihood = Bernoulli((28, 28))
        >>> likelihood(torch.zeros(7, 1, 28, 28)).batch_shape
        torch.Size([7, 28, 28])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix C.1.
    """

    discrete = True
    _expected = "binary data (0 or 1)"
    _way_out = "For data between 0 and 1: ContinuousBernoulli(event_shape)."

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return PixelBernoulli(logits=params.squeeze(0))

    def _in_support(self, x: Tensor) -> Tensor:
        return (x == 0) | (x == 1)


class ContinuousBernoulli(Likelihood):
    r"""Data between 0 and 1: the Bernoulli's formula as a density, normalized.

    .. math:: p(x \mid \theta) = \frac{\theta}{e^\theta - 1}\, e^{\theta x}, \qquad x \in [0, 1]

    Args:
        event_shape: Shape of one data point.

    Shape:
        params: ``(*batch, 1, *event_shape)`` or ``(*batch, *event_shape)``.

    Example:
        >>> likelihood = ContinuousBernoulli((3,))
        >>> likelihood.mean(torch.zeros(7, 3)).unique()
        tensor([0.5000])

    References:
        Loaiza-Ganem & Cunningham (2019), The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders, arXiv:1907.06845.
    """

    discrete = False
    _expected = "data between 0 and 1"
    _way_out = "Rescale them (8-bit images: x / 255), or use Gaussian(event_shape)."

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return ContinuousBernoulliDistribution(params.squeeze(0))

    def _in_support(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)


class Gaussian(Likelihood):
    r"""Real data with noise of one fixed scale: the decoder outputs the mean.

    .. math:: p(x \mid \theta) = \mathcal N(x;\, \theta, \sigma^2)

    Args:
        event_shape: Shape of one data point.
        scale: The standard deviation :math:`\sigma`.

    Shape:
        params: ``(*batch, 1, *event_shape)`` or ``(*batch, *event_shape)``.

    Raises:
        ValueError: If ``scale`` is no positive number.

    Example:
        >>> Gaussian((5,), scale=0.1)(torch.zeros(7, 5)).stddev.unique()
        tensor([0.1000])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix C.2.
    """

    discrete = False
    unbounded = True

    def __init__(self, event_shape: Sequence[int], scale: float = 1.0) -> None:
        super().__init__(event_shape)
        self.scale = check_positive_float("Gaussian", "scale", scale)

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"{super().extra_repr()}, scale={self.scale}"

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Normal(params[0], torch.full_like(params[0], self.scale))


class LearnedGaussian(Likelihood):
    r"""Real data with noise of a learned scale, the same for all data points.

    .. math:: p(x_i \mid \theta_i) = \mathcal N(x_i;\, \theta_i, \sigma_i^2)

    The scale weighs reconstruction against the latents; learned, nobody has to tune that weight.
    Its logarithm is softly clamped to :math:`(-20, 20)`.

    Args:
        event_shape: Shape of one data point.
        scale: Initial standard deviation.
        per_dimension: One scale for each dimension of the data instead of one for all.

    Shape:
        params: ``(*batch, 1, *event_shape)`` or ``(*batch, *event_shape)``; ``scale``: ``()``,
        or ``event_shape`` with ``per_dimension``.

    Raises:
        ValueError: If ``scale`` is no positive number, or outside of the clamp.

    Example:
        >>> likelihood = LearnedGaussian((5,), scale=0.1, per_dimension=True)
        >>> likelihood.scale.shape, likelihood(torch.zeros(7, 5)).batch_shape
        (torch.Size([5]), torch.Size([7, 5]))

    References:
        Rybkin, Daniilidis & Levine (2021), Simple and effective VAE training with calibrated
        decoders, arXiv:2006.13202.
    """

    discrete = False
    unbounded = True

    def __init__(self, event_shape: Sequence[int], scale: float = 1.0, *,
                 per_dimension: bool = False) -> None:
        super().__init__(event_shape)
        self.per_dimension = _checked_bool("LearnedGaussian", "per_dimension", per_dimension)
        shape = self.event_shape if per_dimension else torch.Size()
        self.raw_scale = nn.Parameter(torch.full(shape, _raw_scale("LearnedGaussian", scale)))

    @property
    def scale(self) -> Tensor:
        """The standard deviation as it is now."""
        return _bounded_exp(self.raw_scale)

    def extra_repr(self) -> str:
        """The options that a fit does not change."""
        return f"{super().extra_repr()}, per_dimension={self.per_dimension}"

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Normal(params[0], self.scale.expand_as(params[0]))


class HeteroscedasticGaussian(Likelihood):
    r"""Real data with noise whose scale the decoder outputs as well.

    .. math:: p(x \mid \theta) = \mathcal N(x;\, \theta_1, \sigma^2), \qquad
        \sigma = \sigma_{\min} + \log(1 + e^{\theta_2})

    The likelihood grows without bound where a scale shrinks onto a data point: the floor
    prevents that, so choose it below the noise, in the units of the data.

    Args:
        event_shape: Shape of one data point.
        min_scale: The floor :math:`\sigma_{\min}`.

    Shape:
        params: ``(*batch, 2, *event_shape)``: mean, raw scale.

    Raises:
        ValueError: If ``min_scale`` is no positive number.

    Example:
        >>> HeteroscedasticGaussian((5,))(torch.zeros(7, 2, 5)).batch_shape
        torch.Size([7, 5])

    References:
        Nix & Weigend (1994), Estimating the mean and variance of the target probability
        distribution; Mattei & Frellsen (2018), Leveraging the exact likelihood of deep latent
        variable models, arXiv:1802.04826 (why a floor).
    """

    num_params = 2
    discrete = False
    unbounded = True

    def __init__(self, event_shape: Sequence[int], *, min_scale: float = 1e-3) -> None:
        super().__init__(event_shape)
        self.min_scale = check_positive_float("HeteroscedasticGaussian", "min_scale", min_scale)

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"{super().extra_repr()}, min_scale={self.min_scale}"

    def _distribution(self, params: Tensor) -> TorchDistribution:
        loc, raw_scale = params
        return dist.Normal(loc, F.softplus(raw_scale) + self.min_scale)


class Categorical(Likelihood):
    r"""A class for each element of the data: the decoder outputs one logit for each class.

    .. math:: p(x = c \mid \theta) = \frac{e^{\theta_c}}{\sum_k e^{\theta_k}}

    Values are the integers :math:`0, \dots, C - 1`, in any dtype. A reconstruction shows the
    most probable class; an encoder sees them one-hot, all zero where a value is no class.

    Args:
        event_shape: Shape of one data point.
        num_classes: Number of classes :math:`C`, at least 2.

    Shape:
        params and ``as_input``: ``(*batch, num_classes, *event_shape)``.

    Raises:
        ValueError: If ``num_classes`` is no integer of at least 2.

    Example:
        >>> likelihood = Categorical((5,), num_classes=3)
        >>> likelihood(torch.zeros(7, 3, 5)).batch_shape, likelihood.input_shape((5,))
        (torch.Size([7, 5]), torch.Size([3, 5]))

    References:
        Nazabal et al. (2020), Handling incomplete heterogeneous data using VAEs,
        arXiv:1807.03653.
    """

    discrete = True
    _way_out = "Build it with more classes; for real data: Gaussian(event_shape)."

    def __init__(self, event_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(event_shape)
        self.num_params = check_positive_int("Categorical", "num_classes", num_classes, 2)
        self._expected = f"classes (integers 0 to {num_classes - 1})"

    def mean(self, params: Tensor) -> Tensor:
        """The most probable class."""
        return self._params_first(params).argmax(0)

    def as_input(self, x: Tensor) -> Tensor:
        """One-hot vectors, their dimension in front of those of the data."""
        ones = (1,) * len(self.event_shape)
        classes = torch.arange(self.num_params, device=x.device).reshape(-1, *ones)
        x = super().as_input(x)
        return (x.unsqueeze(-1 - len(ones)) == classes).to(x.dtype)

    def input_shape(self, event_shape: Sequence[int]) -> torch.Size:
        """The classes, then the data."""
        return torch.Size((self.num_params, *event_shape))

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"{super().extra_repr()}, num_classes={self.num_params}"

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=params.movedim(0, -1))

    def _in_support(self, x: Tensor) -> Tensor:
        return (x == x.floor()) & (x >= 0) & (x < self.num_params)


class DiscretizedLogistic(Likelihood):
    r"""Images of 8 bits: a logistic density on :math:`[-1, 1]`, cut into one bin for each level.

    .. math:: p(x \mid \theta) = \sigma\!\left(\frac{y + h - \mu}{s}\right)
        - \sigma\!\left(\frac{y - h - \mu}{s}\right), \qquad
        y = \frac{2x}{L - 1} - 1, \quad h = \frac{1}{L - 1}

    The bins of the first and the last level are open to the outside. The log-scale is softly
    clamped to :math:`(-7, 7)`.

    Args:
        event_shape: Shape of one data point.
        num_levels: Number of levels :math:`L`, at least 2; values are the integers below.

    Shape:
        params: ``(*batch, 2, *event_shape)``: location :math:`\mu` and raw log-scale, both on
        the scale :math:`[-1, 1]`, which is also that of ``as_input``.

    Raises:
        ValueError: If ``num_levels`` is no integer of at least 2.

    Example:
        >>> likelihood = DiscretizedLogistic((3, 32, 32))
        >>> likelihood(torch.zeros(7, 2, 3, 32, 32)).batch_shape
        torch.Size([7, 3, 32, 32])
        >>> likelihood.as_input(torch.tensor([0, 255]))
        tensor([-1.,  1.])

    References:
        Kingma et al. (2016), Improved variational inference with inverse autoregressive flow,
        arXiv:1606.04934; Salimans et al. (2017), PixelCNN++, arXiv:1701.05517, section 2.1.
    """

    num_params = 2
    discrete = True

    def __init__(self, event_shape: Sequence[int], num_levels: int = 256) -> None:
        super().__init__(event_shape)
        self.num_levels = check_positive_int("DiscretizedLogistic", "num_levels", num_levels, 2)
        self._expected = f"levels (integers 0 to {num_levels - 1})"
        self._way_out = (f"Data between 0 and 1: (x * {num_levels - 1}).round(), "
                         f"or ContinuousBernoulli(event_shape).")

    def as_input(self, x: Tensor) -> Tensor:
        """The data scaled to :math:`[-1, 1]`."""
        return super().as_input(x) * (2 / (self.num_levels - 1)) - 1

    def extra_repr(self) -> str:
        """The options, as they were passed."""
        return f"{super().extra_repr()}, num_levels={self.num_levels}"

    def _distribution(self, params: Tensor) -> TorchDistribution:
        loc, raw = params
        scale = _bounded_exp(raw, MAX_LOG_PIXEL_SCALE)
        return DiscretizedLogisticDistribution(loc, scale, self.num_levels)

    def _in_support(self, x: Tensor) -> Tensor:
        return (x == x.floor()) & (x >= 0) & (x < self.num_levels)


class Counts(Likelihood):
    """Integers from 0 up, whose logarithm an encoder sees.

    Args:
        event_shape: Shape of one data point.
    """

    discrete = True
    _expected = "counts (integers >= 0)"
    _way_out = "For continuous data: Gaussian(event_shape)."

    def as_input(self, x: Tensor) -> Tensor:
        """The logarithm of one plus the count."""
        return super().as_input(x).clamp(min=0).log1p()  # pseudo-inputs may be negative

    def _in_support(self, x: Tensor) -> Tensor:
        return (x == x.floor()) & (x >= 0)


class Poisson(Counts):
    r"""Counts: the decoder outputs the logarithm of the rate, softly clamped to (-20, 20).

    .. math:: p(x \mid \theta) = \frac{\lambda^x e^{-\lambda}}{x!}, \qquad
        \lambda = e^{20 \tanh(\theta / 20)}

    Args:
        event_shape: Shape of one data point.

    Shape:
        params: ``(*batch, 1, *event_shape)`` or ``(*batch, *event_shape)``; an encoder sees
        :math:`\log(1 + x)`.

    Example:
        >>> Poisson((5,)).mean(torch.zeros(7, 5)).unique()
        tensor([1.])

    References:
        Nazabal et al. (2020), Handling incomplete heterogeneous data using VAEs,
        arXiv:1807.03653.
    """

    def _distribution(self, params: Tensor) -> TorchDistribution:
        return dist.Poisson(_bounded_exp(params.squeeze(0)))


class NegativeBinomial(Counts):
    r"""Counts that scatter more than Poisson's: the decoder outputs mean and concentration.

    .. math:: p(x \mid \theta) = \frac{\Gamma(r + x)}{\Gamma(r)\, x!}
        \left(\frac{r}{r + \mu}\right)^{r} \left(\frac{\mu}{r + \mu}\right)^{x}, \qquad
        \operatorname{var} x = \mu + \frac{\mu^2}{r}

    A large concentration is Poisson's distribution. Both logarithms are softly clamped to
    :math:`(-20, 20)`.

    Args:
        event_shape: Shape of one data point.

    Shape:
        params: ``(*batch, 2, *event_shape)``: raw :math:`\log \mu`, raw :math:`\log r`; an
        encoder sees :math:`\log(1 + x)`.

    Example:
        >>> likelihood = NegativeBinomial((5,))
        >>> likelihood.mean(torch.zeros(7, 2, 5)).unique()
        tensor([1.])

    References:
        Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, Nature
        Methods 15; Zhao et al. (2020), Variational autoencoders for sparse and overdispersed
        discrete data, arXiv:1905.00616.
    """

    num_params = 2

    def _distribution(self, params: Tensor) -> TorchDistribution:
        log_mean, log_concentration = _soft_clamp(params, MAX_LOG)
        return StableNegativeBinomial(log_concentration.exp(), logits=log_mean - log_concentration)


def _soft_clamp(raw: Tensor, bound: float) -> Tensor:
    return bound * torch.tanh(raw / bound)


def _bounded_exp(raw: Tensor, bound: float = MAX_LOG) -> Tensor:
    return _soft_clamp(raw, bound).exp()


def _raw_scale(owner: str, scale: Any) -> float:
    """The number that ``_bounded_exp`` maps to ``scale``."""
    ratio = math.log(check_positive_float(owner, "scale", scale)) / MAX_LOG
    if abs(ratio) >= 1:
        raise ValueError(f"{owner} expected `scale` between {math.exp(-MAX_LOG):.1e} and "
                         f"{math.exp(MAX_LOG):.1e}, got {scale!r}. Rescale the data.")
    return MAX_LOG * math.atanh(ratio)


def _checked_bool(owner: str, argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{owner} expected `{argument}` to be True or False, got {value!r}.")
    return value


def _ends_with(params: Tensor, sizes: Sequence[int]) -> bool:
    return params.shape[max(params.dim() - len(sizes), 0):] == torch.Size(sizes)


def _seen(owner: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The values under the mask as a vector of floats."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if mask is None:
        return x.reshape(-1)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type_name(mask)
        raise ValueError(f"{owner} expected `mask` to be a boolean tensor, true where the data "
                         f"are seen, got {kind}. Pass mask=~x.isnan().")
    try:
        return x[mask.expand_as(x)]
    except RuntimeError:
        raise ValueError(f"{owner} expected a `mask` that broadcasts to the data, of shape "
                         f"{tuple(x.shape)}, got {tuple(mask.shape)}.") from None


def _check_finite(owner: str, seen: Tensor) -> None:
    bad = seen[~torch.isfinite(seen)]
    if bad.numel():
        mask = "~x.isnan()" if bad[0].isnan() else "x.isfinite()"
        raise ValueError(f"{owner} expected finite data, got {_shown(bad)}. "
                         f"Missing entries: pass mask={mask}.")


def _shown(values: Tensor) -> str:
    """The first value in as few digits as tell it apart: 2.5, but also 1.0000001."""
    value = values[0].detach().cpu()
    value = value if value.dtype == torch.float64 else value.float()
    return np.format_float_positional(value.numpy()[()], trim="-")
