"""The amortization gap: what a shared encoder loses against one posterior for each datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_float, check_positive_int, check_seed, type_name
from pyro_nfvi.guides import AutoAmortizedFlow
from pyro_nfvi.guides.prototype import is_subsampled
from pyro_nfvi.inference.stopping import OneCycle

NUM_COMPARED = 256  # draws, or a few more, that compare the ELBO before and after


@dataclass(frozen=True)
class AmortizationGap:
    """ELBO of each datum by the encoder, and by features optimised for it alone, in nats.

    Attributes:
        amortized: By the encoder.
        optimized: By the datum's own features.

    Example:
        >>> AmortizationGap(torch.tensor([-2.0, -3.0]), torch.tensor([-1.5, -2.5]))
        AmortizationGap(0.500 +- 0.000 nats a datum, 2 data)
    """

    amortized: Tensor
    optimized: Tensor

    @property
    def gaps(self) -> Tensor:
        """Difference for each datum."""
        return self.optimized - self.amortized

    @property
    def mean(self) -> float:
        """Mean difference."""
        return self.gaps.mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of the mean difference, over the data."""
        return (self.gaps.std() / len(self.gaps) ** 0.5).item() if len(self.gaps) > 1 else 0.0

    def __repr__(self) -> str:
        return (f"AmortizationGap({self.mean:.3f} +- {self.standard_error:.3f} nats a datum, "
                f"{len(self.gaps)} data)")


def amortization_gap(guide: AutoAmortizedFlow, *args: Any, num_steps: int = 200,
                     lr: float = 0.02, num_particles: int = 16, seed: int | None = None,
                     **kwargs: Any) -> AmortizationGap:
    """How much of the ELBO a guide loses because one encoder serves all elements of the plate.

    The features of every element are optimised for it alone, from the encoder's on; the globals'
    flow stays as it is.

    Args:
        guide: The guide, trained.
        *args: Arguments of the model, whose local plate is full.
        num_steps: Steps of the optimisation.
        lr: Its learning rate.
        num_particles: Draws of each step.
        seed: Makes it reproducible, and leaves the global random state as it was.
        **kwargs: Further arguments of the model.

    Raises:
        ValueError: If the guide is another, or the model draws minibatches.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(5)
        >>> guide = AutoAmortizedFlow(model, encoder=torch.nn.Linear(1, 4),
        ...                           inputs=lambda x: x.unsqueeze(-1))
        >>> gap = amortization_gap(guide, x, num_steps=20, seed=0)
        >>> gap.gaps.shape
        torch.Size([5])

    References:
        Cremer, Li & Duvenaud (2018), Inference Suboptimality in Variational Autoencoders,
        arXiv:1801.03558, section 3.
    """
    if not isinstance(guide, AutoAmortizedFlow):
        raise ValueError("amortization_gap expected `guide` to be an AutoAmortizedFlow, got "
                         f"{type_name(guide)}.")
    guide.setup(*args, **kwargs)
    elements = _Elements(guide, args, kwargs)
    return reoptimize(elements.elbo, guide.features(*args, **kwargs), num_steps=num_steps, lr=lr,
                      num_particles=num_particles, seed=seed)


class _Elements:
    """The ELBO's terms of each element of a guide's local plate."""

    def __init__(self, guide: AutoAmortizedFlow, args: tuple, kwargs: dict) -> None:
        self.guide, self.args, self.kwargs, self.vectorized = guide, args, kwargs, True
        frames = guide._look_up(args, kwargs).frames
        if is_subsampled(frames[guide.plate]):
            raise ValueError(f"amortization_gap expected a model with all of plate "
                             f"{guide.plate!r}, got one that draws minibatches. Set its "
                             "subsample_size to its size.")
        self.outside = min(frame.dim for frame in frames.values() if frame.dim is not None) - 1

    def elbo(self, features: Tensor, count: int) -> Tensor:
        """ELBO of each element by these features, the mean of so many draws.

        All draws at once, in a plate of their own, if the model is written for that.
        """
        self.guide.given_features = features
        try:
            if self.vectorized:
                try:
                    return self._sum(pyro.plate("particles", count, dim=self.outside)) / count
                except (RuntimeError, ValueError):
                    self.vectorized = False
            return torch.stack([self._sum(nullcontext()) for _ in range(count)]).mean(0)
        finally:
            self.guide.given_features = None

    def _sum(self, particles: AbstractContextManager) -> Tensor:
        with poutine.block(), pyro.validation_enabled(False), particles:
            q = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            model = poutine.replay(self.guide.model, trace=q)
            p = poutine.trace(model).get_trace(*self.args, **self.kwargs)
            p.compute_log_prob()
            q.compute_log_prob()
        return self._terms(p) - self._terms(q)

    def _terms(self, trace: poutine.Trace) -> Tensor:
        """Log-densities of each element's sites, summed over all draws."""
        return sum(self._by_element(node["log_prob"]) for node in trace.nodes.values()
                   if node["type"] == "sample" and any(
                       frame.name == self.guide.plate for frame in node["cond_indep_stack"]))

    def _by_element(self, log_prob: Tensor) -> Tensor:
        place = log_prob.dim() + self.guide.local.dim
        first = log_prob.movedim(place, 0)
        return first.reshape(len(first), -1).sum(1)


def reoptimize(elbo: Callable[[Tensor, int], Tensor], features: Tensor, *, num_steps: int,
               lr: float, num_particles: int, seed: int | None = None) -> AmortizationGap:
    """Optimise the features of each datum by itself, from those of the encoder on.

    A datum whose ELBO did not rise keeps the encoder's.

    Args:
        elbo: Function of features ``(num_data, feature_dim)`` and a number of draws that gives
            the ELBO of each datum.
        features: The encoder's.
        num_steps: Steps of Adam.
        lr: Largest learning rate, in units of the features' standard deviation.
        num_particles: Draws of each step.
        seed: Makes it reproducible, and leaves the global random state as it was.

    Raises:
        ValueError: If an option is of another kind.
    """
    owner = "amortization_gap"
    check_positive_int(owner, "num_steps", num_steps)
    check_positive_int(owner, "num_particles", num_particles)
    check_positive_float(owner, "lr", lr)
    check_seed(owner, seed)
    with forked_rng(seed) if seed is not None else nullcontext():
        own = _optimized(elbo, features.detach(), num_steps, lr, num_particles)
        with torch.no_grad():
            with forked_rng():  # the same noise for both
                before = _mean_elbo(elbo, features, num_particles)
            after = _mean_elbo(elbo, own, num_particles)
    return AmortizationGap(before, torch.maximum(before, after))


def _optimized(elbo: Callable[[Tensor, int], Tensor], start: Tensor, num_steps: int, lr: float,
               num_particles: int) -> Tensor:
    spread = start.std(correction=0)
    unit = torch.where(spread > 0, spread, 1.0)  # an encoder may be of one mind about all data
    moved = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([moved], lr)
    for rate in OneCycle(num_steps).rates(0, num_steps):
        optimizer.param_groups[0]["lr"] = lr * rate
        value = elbo(start + unit * moved, num_particles).sum()
        moved.grad, = torch.autograd.grad(-value, moved)
        optimizer.step()
    return (start + unit * moved).detach()


def _mean_elbo(elbo: Callable[[Tensor, int], Tensor], features: Tensor, num_particles: int
               ) -> Tensor:
    """ELBO of each datum by many draws, no more at once than a step takes."""
    rounds = math.ceil(NUM_COMPARED / num_particles)
    return torch.stack([elbo(features, num_particles) for _ in range(rounds)]).mean(0)
