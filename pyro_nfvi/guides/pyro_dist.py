"""The distributions a guide hands to Pyro, each with the fix Pyro's own lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Transform, register_kl
from torch.func import functional_call

from pyro_nfvi._shapes import check_sample_shape, check_tensor, type_name
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


class ConstantFlow(dist.TransformedDistribution):
    r"""A flow whose parameters are set, as a Pyro distribution: a prior, or a likelihood.

    .. math:: \log q(z \mid c) = \log p(f^{-1}(z; c)) + \log|\det df^{-1}/dz|

    Gradients go to values and contexts, not to the flow. Like a tensor it meets another type half
    way: in single precision, it scores values of double precision in double precision.

    Args:
        flow: The flow; its parameters are frozen.
        context: Contexts ``(*batch, context_dim)`` of a conditional flow, which without them can
            only be given some: :meth:`condition`.
        batch_shape: Shape of the batch of independent copies. Default: that of the contexts.

    Shape:
        z: ``(*batch, input_dim)``; log_prob: ``(*batch,)``.
    """

    def __init__(self, flow: Flow, context: Tensor | None = None, batch_shape: Any = None,
                 validate_args: bool | None = None) -> None:
        if any(p.requires_grad for p in flow.parameters()):  # asking is allowed inside vmap
            flow.requires_grad_(False)
        self.flow, self.context = flow, context
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        # Without a memory of the last draw: this object lives long, and its flow may move.
        transform = BijectionTransform(flow.bijection, context, cache_size=0)
        super().__init__(NoiseDistribution(flow.base, batch_shape), [transform], validate_args)

    def condition(self, context: Tensor) -> ConstantFlow:
        """The distribution for these contexts, one a batch element.

        Raises:
            ValueError: If the flow takes none, or they are of another shape.
        """
        owner = type(self).__name__
        if not self.flow.context_dim:
            raise ValueError(f"{owner} takes no context: it was fitted without.")
        return self._like(self.flow, check_tensor(owner, "context", context,
                                                  self.flow.context_dim), None)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConstantFlow:
        """The same distribution over another batch shape."""
        shape = check_sample_shape(type(self).__name__, batch_shape, "batch_shape")
        return self._like(self.flow, self.context, shape)

    def to(self, *args: Any, **kwargs: Any) -> ConstantFlow:
        """A copy of another type or in another place; arguments are those of ``Tensor.to``."""
        context = None if self.context is None else self.context.to(*args, **kwargs)
        return self._like(copy.deepcopy(self.flow).to(*args, **kwargs), context, self.batch_shape)

    def _like(self, flow: Flow, context: Tensor | None, batch_shape: Any) -> ConstantFlow:
        return type(self)(flow, context, batch_shape, self._validate_args)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, differentiable in the context."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass."""
        shape = check_sample_shape(type(self).__name__, sample_shape) + self.batch_shape
        context = self._context(self.flow.base.zeros.dtype)
        return self._run("draw", shape, context, like=context)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at ``value``."""
        value = check_tensor(type_name(self), "value", value, self.flow.input_dim)
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(value.dtype, self.flow.base.zeros.dtype)
        context = self._context(dtype)
        value = value.to(dtype if context is None else context.dtype)
        log_prob: Tensor = self._run("log_prob", value, context, like=value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _context(self, dtype: torch.dtype) -> Tensor | None:
        """The context, in the wider of its type and another."""
        if self.context is None:
            if self.flow.context_dim:
                raise ValueError(f"{type(self).__name__} expected a context, got none. Give it "
                                 f"one of shape (*batch, {self.flow.context_dim}): "
                                 "fitted.condition(context).")
            return None
        return self.context.to(torch.promote_types(self.context.dtype, dtype))

    def _run(self, method: str, *args: Any, like: Tensor | None) -> Any:
        """Call the flow, with its parameters in the type of ``like``."""
        call = _Call(self.flow)
        if like is None or like.dtype == self.flow.base.zeros.dtype:
            return call(method, *args)
        state = {name: value.to(like.dtype) if value.is_floating_point() else value
                 for name, value in (*call.named_parameters(), *call.named_buffers())}
        return functional_call(call, state, (method, *args))


class _Call(nn.Module):
    """What a distribution asks of its flow, as one module that can be called on other numbers."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def log_prob(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(z, context)

    def draw(self, shape: torch.Size, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u = self.flow.base.rsample(shape)
        z, log_det = self.flow.bijection(u, context)
        return z, self.flow.base.log_prob(u) - log_det
