"""A fixed mixture of flows, as the noise of another flow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.base import Base, Gaussian, MultivariateStudentT, StudentT
from pyro_nfvi.flows.fixed import FixedMap
from pyro_nfvi.flows.flow import Flow
from pyro_nfvi.flows.linear import LinearMap

NUM_MOMENT_DRAWS = 10_000  # for a component whose moments have no closed form


class MixtureOfFlows(Base):
    r"""Fixed mixture of flows: the noise has several modes, and nothing in it is learned.

    .. math:: p(u) = \sum_k w_k\, q_k(u)

    It holds copies of the flows, whose parameters are buffers: a flow on this base trains its
    own bijection only. A draw, or a density, costs one of every component.

    Args:
        flows: Flows :math:`q_k` of one ``input_dim``, without context.
        weights: Positive weights :math:`w_k`, which are scaled to sum to one.

    Raises:
        ValueError: If there is no flow, they do not fit together, or the weights are not one
            positive number a flow.

    Example:
        >>> from pyro_nfvi.flows import Diagonal, Triangular
        >>> parts = [Flow(Triangular(2)), Flow(Diagonal(2))]
        >>> flow = Flow(Diagonal(2), base=MixtureOfFlows(parts, weights=[0.7, 0.3]))
        >>> flow.rsample_and_log_prob((5,))[0].shape
        torch.Size([5, 2])
        >>> [name for name, _ in flow.named_parameters()]
        ['bijection.shift.value', 'bijection.log_scale.value']

    References:
        Guo et al. (2016), Boosting Variational Inference, arXiv:1611.05559; Miller, Foti & Adams
        (2017), Variational Boosting, arXiv:1611.06585 (mixtures built one component at a time).
    """

    symmetric = False
    weights: Tensor

    def __init__(self, flows: Sequence[Flow], weights: Sequence[float] | Tensor) -> None:
        flows = _checked_flows(flows)
        super().__init__(flows[0].input_dim)
        self.register_buffer("weights", _checked_weights(weights, len(flows)).to(self.zeros))
        self.flows = nn.ModuleList(_frozen_copy(flow) for flow in flows)

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws of a component each, chosen by the weights."""
        chance = torch.rand(*sample_shape, 1, dtype=self.zeros.dtype, device=self.zeros.device)
        draws = [flow.bijection(flow.base.rsample(sample_shape))[0] for flow in self.flows]
        u = draws[0]
        for start, draw in zip(self.weights.cumsum(0), draws[1:], strict=False):
            u = torch.where(chance < start, u, draw)
        return u

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of the mixture density."""
        log_components = torch.stack([flow.log_prob(u) for flow in self.flows], -1)
        return torch.logsumexp(self.weights.log() + log_components, -1)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the components, estimated where a component has no closed form."""
        means = torch.stack([_moments(flow)[0] for flow in self.flows])
        return self.weights @ means

    @property
    def variance(self) -> Tensor:
        """Within plus between components, estimated where a component has no closed form."""
        moments = [_moments(flow) for flow in self.flows]
        means, variances = (torch.stack(part) for part in zip(*moments, strict=True))
        return self.weights @ (variances + (means - self.weights @ means).square())

    def extra_repr(self) -> str:
        """Dimension and weights."""
        shown = ", ".join(f"{weight:.3g}" for weight in self.weights.tolist())
        return f"{self.input_dim}, weights=[{shown}]"


@torch.no_grad()
def _moments(flow: Flow) -> tuple[Tensor, Tensor]:
    """Mean and variance of each coordinate, the same at every call."""
    base, bijection = flow.base, flow.bijection
    if isinstance(bijection, LinearMap | FixedMap) and isinstance(
            base, (Gaussian, StudentT, MultivariateStudentT)):  # of uncorrelated coordinates
        factor = bijection.factor()
        terms = torch.where(factor == 0, 0, factor.square() * base.variance)  # 0 * inf is no nan
        return bijection(base.mean)[0], terms.sum(-1)
    with forked_rng(0):
        z, _ = bijection(base.rsample((NUM_MOMENT_DRAWS,)))
    return z.mean(0), z.var(0)


def _frozen_copy(flow: Flow) -> Flow:
    """A copy whose parameters are buffers: no optimiser finds them, no gradient is kept."""
    flow = copy.deepcopy(flow)
    for module in flow.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.detach())
    return flow


def _checked_flows(flows: Any) -> list[Flow]:
    flows = list(flows) if isinstance(flows, (Sequence, nn.ModuleList)) else [flows]
    for flow in flows:
        if not isinstance(flow, Flow):
            raise ValueError("MixtureOfFlows expected `flows` to be a sequence of flows, got "
                             f"{type_name(flow)}. Wrap a bijection: Flow(bijection).")
        if flow.context_dim:
            raise ValueError("MixtureOfFlows expected `flows` without context, got one of "
                             f"context_dim={flow.context_dim}. Build it with context_dim=0.")
    dims = [flow.input_dim for flow in flows]
    if not dims:
        raise ValueError("MixtureOfFlows expected `flows` to hold at least one flow, got none.")
    if len(set(dims)) > 1:
        raise ValueError(f"MixtureOfFlows expected `flows` of one input_dim, got {dims}.")
    return flows


def _checked_weights(weights: Any, count: int) -> Tensor:
    try:
        values = torch.as_tensor(weights, dtype=torch.float64).detach()
        fits = values.shape == (count,) and bool(((values > 0) & values.isfinite()).all())
    except (TypeError, ValueError, RuntimeError):  # of no use as numbers
        fits = False
    if not fits:
        raise ValueError(f"MixtureOfFlows expected `weights` to be {count} positive numbers, one a "
                         f"flow, got {weights!r}. Leave out a flow of no weight.")
    return values / values.sum()
