"""What Markov chains return: draws of the flat latent, chain by chain, and their statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_int, check_seed


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    """Markov chains whose limit is the posterior.

    Attributes:
        z: Draws ``(num_chains, num_draws, D)`` of the flat latent, warm-up left out, on the CPU.
        stats: Statistics ``(num_chains, num_draws)`` of the draws under ArviZ's names: ``lp``
            (log joint of the flat latent) and ``acceptance_rate`` for all; ``log_q`` and
            ``accepted`` for Metropolis-Hastings; ``energy``, ``diverging``, ``step_size``,
            ``n_steps`` and ``tree_depth`` for NUTS.

    Example:
        >>> Chains(torch.randn(4, 100, 3), {"acceptance_rate": torch.full((4, 100), 0.8)})
        Chains(4 chains of 100 draws of 3 latents, acceptance rate 0.80)
    """

    z: Tensor
    stats: dict[str, Tensor]

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return self.z.shape[0]

    @property
    def num_draws(self) -> int:
        """Number of draws of each."""
        return self.z.shape[1]

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance rate over all draws."""
        return self.stats["acceptance_rate"].mean().item()

    @property
    def num_divergences(self) -> int:
        """Number of draws whose trajectory diverged."""
        return int(self.stats["diverging"].sum()) if "diverging" in self.stats else 0

    def __repr__(self) -> str:
        chains = "1 chain" if self.num_chains == 1 else f"{self.num_chains} chains"
        diverged = f", {self.num_divergences} divergences" if "diverging" in self.stats else ""
        return (f"Chains({chains} of {self.num_draws:,} draws of {self.z.shape[-1]} latents, "
                f"acceptance rate {self.acceptance_rate:.2f}{diverged})")


def check_options(owner: str, seed: Any, **counts: Any) -> None:
    """Check what all samplers of chains take.

    Raises:
        ValueError: If a count is no positive integer, or the seed no integer.
    """
    for name, count in counts.items():
        check_positive_int(owner, name, count)
    check_seed(owner, seed)


@torch.no_grad()
def is_noisy(function: Callable[[Tensor], Tensor], z: Tensor) -> bool:
    """Whether a density differs between two calls at the same place, as that of a minibatch."""
    first, again = function(z), function(z)
    rounding = 1000 * torch.finfo(first.dtype).eps  # a GPU adds up in any order
    return not torch.allclose(first, again, rtol=rounding, atol=0, equal_nan=True)


def check_not_noisy(owner: str, function: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Refuse a density that has no one value: no chain has it as its limit.

    Raises:
        ValueError: If it differs between two calls.
    """
    if is_noisy(function, z):
        raise ValueError(f"{owner} needs one density to sample from, but the model draws random "
                         "numbers of its own, a minibatch say, and gave two values at one place. "
                         "Give it all data: no subsample_size.")
