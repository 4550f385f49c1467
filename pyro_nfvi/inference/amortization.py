"""The amortization gap: what a shared encoder loses against one posterior for each datum."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_float, check_positive_int
from pyro_nfvi.inference.stopping import OneCycle

NUM_COMPARED = 256  # draws that compare the ELBO before and after


@dataclass(frozen=True)
class AmortizationGap:
    """ELBO of each datum by the encoder, and by features optimised for it alone, in nats.

    Attributes:
        amortized: By the encoder.
        optimized: By the datum's own features.
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
    with forked_rng(seed) if seed is not None else nullcontext():
        own = _optimized(elbo, features.detach(), num_steps, lr, num_particles)
        with torch.no_grad():
            before, after = _compared(elbo, features, own)
    return AmortizationGap(before, torch.maximum(before, after))


def _optimized(elbo: Callable[[Tensor, int], Tensor], start: Tensor, num_steps: int, lr: float,
               num_particles: int) -> Tensor:
    unit = start.std().clamp(min=1e-6)
    moved = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([moved], lr)
    for rate in OneCycle(num_steps).rates(0, num_steps):
        optimizer.param_groups[0]["lr"] = lr * rate
        value = elbo(start + unit * moved, num_particles).sum()
        moved.grad, = torch.autograd.grad(-value, moved)
        optimizer.step()
    return (start + unit * moved).detach()


def _compared(elbo: Callable[[Tensor, int], Tensor], *candidates: Tensor) -> list[Tensor]:
    """ELBO of each datum for each set of features, on the same noise."""
    state = torch.get_rng_state()
    values = []
    for features in candidates:
        torch.set_rng_state(state)
        values.append(elbo(features, NUM_COMPARED))
    return values
