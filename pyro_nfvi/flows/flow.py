"""A flow: noise plus bijection, which together are a distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution
from torch.func import functional_call

from pyro_nfvi._shapes import (
    check_context,
    check_positive_int,
    check_sample_shape,
    type_name,
)
from pyro_nfvi.flows.base import Base, Gaussian
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.transform import BijectionTransform


class Flow(nn.Module):
    r"""Normalizing flow: ``flow(context)`` is a distribution.

    .. math:: u \sim p, \quad z = f(u), \quad \log q(z) = \log p(u) - \log|\det dz/du|

    Args:
        bijection: The map :math:`f`.
        base: Distribution of the noise. Default: :class:`Gaussian`.

    Shape:
        z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log_prob: ``(*batch,)``.

    Raises:
        ValueError: If bijection and base are not that, or do not fit together.

    Example:
        >>> from pyro_nfvi.flows import nsf
        >>> flow = Flow(nsf(3, context_dim=2))
        >>> flow(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])

    References:
        Papamakarios et al. (2021), Normalizing Flows for Probabilistic Modeling and Inference,
        arXiv:1912.02762, eq. 5-6.
    """

    def __init__(self, bijection: Bijection, base: Base | None = None) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise ValueError(f"Flow expected `bijection` to be a Bijection, got "
                             f"{type_name(bijection)}. Wrap a transform: FromTransform(t, dim).")
        base = Gaussian(bijection.input_dim) if base is None else base
        if not isinstance(base, Base) or base.input_dim != bijection.input_dim:
            raise ValueError(f"Flow expected `base` to be a Base over {bijection.input_dim} "
                             f"coordinates, got {base!r}.")
        self.bijection = bijection
        self.base = base

    @property
    def input_dim(self) -> int:
        """Number of coordinates."""
        return self.bijection.input_dim

    @property
    def context_dim(self) -> int:
        """Number of context coordinates."""
        return self.bijection.context_dim

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution for this context."""
        return FlowDistribution(self, check_context("Flow", context, self.context_dim))

    def log_prob(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density at any point, by the inverse."""
        u, log_det = self.bijection.inverse(z, context)
        return self.base.log_prob(u) + log_det

    @torch.no_grad()
    def initialize(self, samples: Tensor, context: Tensor | None = None) -> None:
        """Start the layers that have a data-dependent start from samples of the target.

        Each such layer, :class:`Diagonal` by itself or as the actnorm of an image flow, is set so
        that these samples reach it, on their way to the noise, with mean zero and variance one.
        Other layers, and those inside :class:`Inverse`, stay as they are. No pass of the flow
        calls this.

        Args:
            samples: Points of the density to be fitted, ``(*batch, input_dim)``, at least two.
            context: Their contexts, ``(*batch, context_dim)``.

        Raises:
            ValueError: If there are fewer than two samples, or one is not finite.

        Example:
            >>> from pyro_nfvi.flows import nice
            >>> flow, samples = Flow(nice(3)), 5 + 2 * torch.randn(1000, 3)
            >>> flow.initialize(samples)
            >>> flow.bijection.inverse(samples)[0].mean().abs() < 1e-5
            tensor(True)
        """
        z, context = self.bijection._checked("samples", samples, context)
        z = z.reshape(-1, self.input_dim)
        if len(z) < 2:
            raise ValueError("Flow.initialize expected `samples` to hold two points or more, "
                             f"got {len(z)}.")
        if not bool(z.isfinite().all()):
            raise ValueError("Flow.initialize expected `samples` to be finite, "
                             f"got {z[~z.isfinite()][0].item()}.")
        self.bijection._initialize(
            z, None if context is None else context.reshape(-1, self.context_dim))

    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = (),
                             context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass, of shape ``(*sample_shape, *batch)``."""
        u = self._noise(sample_shape, context)
        z, log_det = self.bijection(u, context)
        return z, self.base.log_prob(u) - log_det

    def rsample_and_path_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = (),
                                  context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Draws and log-densities whose gradient follows only the path through the draw.

        The score term of :math:`\nabla \log q_\phi(z_\phi(u))` has mean zero but not variance
        zero; leaving it out makes the ELBO's gradient vanish at an exact fit. The value is the
        same as that of :meth:`rsample_and_log_prob`.

        References:
            Roeder, Wu & Duvenaud (2017), Sticking the Landing, arXiv:1703.09194, eq. 5-7.
        """
        u = self._noise(sample_shape, context)
        z, _ = self.bijection(u, context)
        return z, self._frozen(_LogProbAt(self), u.detach(), z, _detached(context))

    def _noise(self, sample_shape: torch.Size | tuple[int, ...], context: Tensor | None
               ) -> Tensor:
        context = check_context("Flow", context, self.context_dim)
        return self.base.rsample(check_sample_shape("Flow", sample_shape) + _batch_shape(context))

    @staticmethod
    def _frozen(module: nn.Module, *args: Any) -> Tensor:
        """Call a module with its parameters held constant."""
        state = {name: p.detach() for name, p in module.named_parameters()}
        result: Tensor = functional_call(module, state, args)
        return result


class PartOfNoise(Flow):
    """The same flow, whose draws are one part of what it would draw by itself.

    The noise of all parts is drawn, and that of one kept: from the same random state, the draws of
    all parts together are those of the flow.

    Args:
        flow: The flow, with which bijection and base are shared.
        part: Which part, from 0.
        num_parts: How many there are.

    Raises:
        ValueError: If ``flow`` is none, or there is no such part.

    Shape:
        z: ``(*sample, *batch, input_dim)``, of ``num_parts * sample[0]`` rows in all.

    Example:
        >>> from pyro_nfvi.flows import nsf
        >>> flow = Flow(nsf(3))
        >>> PartOfNoise(flow, 1, 4).rsample_and_log_prob((5,))[0].shape
        torch.Size([5, 3])
    """

    def __init__(self, flow: Flow, part: int, num_parts: int) -> None:
        if not isinstance(flow, Flow):
            raise ValueError(f"PartOfNoise expected `flow` to be a Flow, got {type_name(flow)}.")
        super().__init__(flow.bijection, flow.base)
        self.num_parts = check_positive_int("PartOfNoise", "num_parts", num_parts)
        self.part = check_positive_int("PartOfNoise", "part", part, minimum=0)
        if part >= num_parts:
            raise ValueError(f"PartOfNoise expected `part` below `num_parts`, got {part} of "
                             f"{num_parts}.")

    def _noise(self, sample_shape: torch.Size | tuple[int, ...], context: Tensor | None
               ) -> Tensor:
        count, *rest = check_sample_shape("Flow", sample_shape) or (1,)
        u = super()._noise((count * self.num_parts, *rest), context)
        u = u[count * self.part:count * (self.part + 1)]
        return u if len(sample_shape) else u.squeeze(0)

    def extra_repr(self) -> str:
        """Which part, as ``repr`` shows it."""
        return f"part {self.part} of {self.num_parts}"


class _LogProbAt(nn.Module):
    """Log-density of a flow at ``z`` whose noise ``u`` is known."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, u: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        z, context = self.flow.bijection._checked("z", z, context)
        noise, log_det = self.flow.bijection._inverse_at(u, z, context)
        return self.flow.base.log_prob(noise) + log_det


class FlowDistribution(TransformedDistribution):
    """A flow given its context, as a ``torch.distributions`` object.

    Args:
        flow: The flow.
        context: Context, or None.
        base: Distribution of the noise. Default: the flow's.

    Example:
        >>> from pyro_nfvi.flows import planar
        >>> q = Flow(planar(2, context_dim=3))(torch.randn(5, 3))
        >>> type(q).__name__, q.batch_shape, q.event_shape
        ('FlowDistribution', torch.Size([5]), torch.Size([2]))
    """

    def __init__(self, flow: Flow, context: Tensor | None = None,
                 base: Distribution | None = None) -> None:
        if not isinstance(flow, Flow):
            raise ValueError(f"FlowDistribution expected `flow` to be a Flow, got "
                             f"{type_name(flow)}.")
        if base is not None and not isinstance(base, Distribution):
            raise ValueError(f"FlowDistribution expected `base` to be a Distribution or None, got "
                             f"{type_name(base)}.")
        self.flow = flow
        self.context = context = check_context("FlowDistribution", context, flow.context_dim)
        base = flow.base().expand(_batch_shape(context)) if base is None else base
        super().__init__(base, [BijectionTransform(flow.bijection, context)])

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same flow over another batch shape."""
        base = self.base_dist.expand(torch.Size(batch_shape))
        return type(self)(self.flow, self.context, base)

    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()
                             ) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass."""
        z = self.rsample(torch.Size(sample_shape))
        return z, self.log_prob(z)


def _batch_shape(context: Tensor | None) -> torch.Size:
    return torch.Size() if context is None else context.shape[:-1]


def _detached(context: Tensor | None) -> Tensor | None:
    return None if context is None else context.detach()
