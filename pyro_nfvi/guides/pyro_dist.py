"""The distributions a guide hands to Pyro, each with the fix Pyro's own lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Transform, register_kl

from pyro_nfvi.flows import BijectionTransform, Flow
from pyro_nfvi.flows.base import Base, BaseDistribution

LogDet = Callable[[Tensor], Tensor]
Moments = Callable[[], tuple[Tensor, Tensor]]


class LatentDelta(dist.Delta):
    """A guide's value at a site, carrying the log-Jacobian of its constraint.

    Pyro's KL divergence from a ``Delta`` drops its log-density, so that ``TraceMeanField_ELBO``
    optimises the wrong objective on constrained sites; the one registered here keeps it.
    """


@register_kl(LatentDelta, dist.Distribution)  # Pyro's, not torch's: the class (Delta, ...) has
def _kl_latent_delta(q: LatentDelta, p: dist.Distribution) -> Tensor:
    return q.log_density - p.log_prob(q.v)


def sample_value(name: str, value: Tensor, log_det: Tensor, event_dim: int,
                 plates: Iterable[pyro.plate]) -> Tensor:
    """Sample a guide's site: a value it already has, with the log-Jacobian of its constraint.

    Args:
        name: Name of the site.
        value: Its value.
        log_det: Log-Jacobian of the map from the unconstrained value.
        event_dim: Number of rightmost dimensions that are one draw.
        plates: The plates it is in.
    """
    log_density = 0.0 if poutine.get_mask() is False else -log_det
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        return pyro.sample(name, LatentDelta(value, log_density, event_dim))


class NoiseDistribution(BaseDistribution, TorchDistributionMixin):
    """A flow's noise as a Pyro distribution.

    Args:
        base: The noise.
        batch_shape: Shape of the batch of independent copies.
        log_det: Log-determinant of the guide's transform, for NeuTra.
        surplus: How often NeuTra counts that log-determinant beyond once, for want of a plate to
            put it in.
    """

    def __init__(self, base: Base, batch_shape: Any = (), validate_args: bool | None = None, *,
                 log_det: LogDet | None = None, surplus: float = 0.0) -> None:
        super().__init__(base, batch_shape, validate_args=validate_args)
        self.log_det = log_det
        self.surplus = surplus

    def mask(self, mask: bool | Tensor) -> dist.MaskedDistribution:
        """This noise with its log-probability masked."""
        if mask is False and self.log_det is not None and self.surplus:
            return _NeuTraNoise(self)
        return dist.MaskedDistribution(self, mask)


class _NeuTraNoise(dist.MaskedDistribution):
    """Masked noise that takes back what ``NeuTraReparam`` counts too often.

    NeuTraReparam adds the log-determinant, one number, to the log-density of the first latent
    site. If that site is in a plate it is added once an element; this noise, which Pyro samples
    at the same time, returns the surplus.
    """

    def __init__(self, noise: NoiseDistribution) -> None:
        super().__init__(noise, False)

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.base_dist.surplus * self.base_dist.log_det(value)


class LatentDistribution(dist.TransformedDistribution):
    """Distribution of the flat latent that knows its moments, which a flow's alone does not.

    Args:
        base: The noise.
        transform: The flow.
        moments: Function that estimates mean and standard deviation.
    """

    def __init__(self, base: NoiseDistribution, transform: Transform, moments: Moments) -> None:
        self.moments = moments
        super().__init__(base, [transform])

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentDistribution:
        """The same distribution over another batch shape."""
        base = self.base_dist.expand(batch_shape)
        return type(self)(base, self.transforms[0], self.moments)

    @property
    def mean(self) -> Tensor:
        """Estimated mean of each coordinate."""
        return self.moments()[0].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Estimated variance of each coordinate."""
        return self.moments()[1].square().expand(self.batch_shape + self.event_shape)


def conditional(flow: Flow, context: Tensor) -> dist.TransformedDistribution:
    """A flow given its context, one a batch element, as a Pyro distribution.

    A draw of it is scored in the pass that made it.
    """
    noise = NoiseDistribution(flow.base, context.shape[:-1])
    return dist.TransformedDistribution(noise, [BijectionTransform(flow.bijection, context)])
