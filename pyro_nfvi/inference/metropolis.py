"""Independence Metropolis-Hastings: a fitted flow proposes, the model decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import type_name
from pyro_nfvi.inference.chains import Chains, check_not_noisy, check_options
from pyro_nfvi.inference.importance import scored

FEW_ACCEPTED = 0.05  # acceptance rate below which chains hardly move
HELD, FEWEST_HELD = 0.1, 10  # fraction of a chain, and draws, for which one draw may be held
NUM_COMPARED = 2  # points at which the log joint is computed twice


@torch.no_grad()
def metropolis(flow: Any, log_joint: Callable[[Tensor], Tensor], *, num_chains: int = 4,
               num_draws: int = 1000, warmup: int = 200, seed: int | None = None) -> Chains:
    r"""Chains that move to an independent draw of a flow, or stay.

    .. math:: z' \sim q, \qquad
              \Pr(\text{move}) = \min\left\{1,\ \frac{p(x, z')\, q(z)}{q(z')\, p(x, z)}\right\}

    The limit of the chains is the posterior wherever the flow reaches. All proposals are drawn
    and weighed at once. Each chain starts at a draw of the flow of its own, not at one chosen by
    its weight: chains that are all held by the few draws of largest weight would agree with one
    another, and R-hat would not tell. Such a start is left at the first draw of larger weight.

    Args:
        flow: A fitted :class:`~pyro_nfvi.flows.Flow`, or whatever has ``rsample_and_log_prob``.
        log_joint: Log joint density of a batch of latents ``(n, D)``.
        num_chains: Number of chains.
        num_draws: Draws of each.
        warmup: Draws of each before, which are dropped.
        seed: Makes the chains reproducible, and leaves the global random state as it was.
            Default: the global random state.

    Returns:
        The chains, with statistics ``lp``, ``log_q``, ``acceptance_rate`` and ``accepted``.

    Raises:
        ValueError: If ``flow`` is none, a count is no positive integer, or the log joint is finite
            at no proposal of some chain, or differs from call to call.

    Example:
        >>> from pyro_nfvi.flows import Diagonal, Flow
        >>> target = torch.distributions.Normal(0.5, 0.8)
        >>> chains = metropolis(Flow(Diagonal(1)), lambda z: target.log_prob(z).sum(-1), seed=0)
        >>> chains.z.shape, chains.acceptance_rate > 0.5
        (torch.Size([4, 1000, 1]), True)

    References:
        Tierney (1994), Markov chains for exploring posterior distributions, Annals of Statistics
        22(4), section 2.3.3; Mengersen & Tweedie (1996), Annals of Statistics 24(1), theorem 2.1
        (geometric if and only if :math:`p / q` is bounded).
    """
    check_options("metropolis", seed, num_chains=num_chains, num_draws=num_draws, warmup=warmup)
    if not hasattr(flow, "rsample_and_log_prob"):
        raise ValueError(f"metropolis expected `flow` to be a Flow, got {type_name(flow)}. Take a "
                         "posterior's: posterior.density.")
    with nullcontext() if seed is None else forked_rng(seed):
        shape = (num_chains, warmup + num_draws)
        z, log_q = flow.rsample_and_log_prob((shape[0] * shape[1],))
        check_not_noisy("metropolis", lambda z: scored(log_joint, z), z[:NUM_COMPARED])
        log_p = scored(log_joint, z)
        log_u = torch.rand(shape, dtype=torch.float64).log()
    z, log_p, log_q = (t.detach().cpu().reshape(*shape, *t.shape[1:]) for t in (z, log_p, log_q))
    path = _scan((log_p.double() - log_q.double()).numpy(), log_u.numpy()).after(warmup)
    _warn(path)
    held = torch.from_numpy(path.held)
    stats = {"lp": log_p.double().gather(1, held), "log_q": log_q.double().gather(1, held),
             "acceptance_rate": torch.from_numpy(path.chance),
             "accepted": torch.from_numpy(path.accepted)}
    return Chains(z.gather(1, held.unsqueeze(-1).expand(-1, -1, z.shape[-1])), stats)


@dataclass(frozen=True)
class _Path:
    """Which proposal each chain holds at each step, whether it is new, and the chance of that."""

    held: np.ndarray
    accepted: np.ndarray
    chance: np.ndarray

    def after(self, warmup: int) -> _Path:
        return _Path(*(part[:, warmup:].copy() for part in
                       (self.held, self.accepted, self.chance)))


def _scan(log_weights: np.ndarray, log_u: np.ndarray) -> _Path:
    """Accept or hold, all chains at once; a weight that is not finite is never accepted."""
    finite = np.isfinite(log_weights)
    if not finite.any(1).all():
        raise ValueError("metropolis expected the log joint to be finite at some draws of the "
                         f"flow, got none at {log_weights.shape[1]} of a chain. Fit the flow "
                         "first, or give the chains more draws.")
    log_weights = np.where(finite, log_weights, -np.inf)
    chains, held = np.arange(len(log_weights)), finite.argmax(1)  # each at its first that is
    path = _Path(*(np.empty(log_weights.shape, kind) for kind in (np.int64, bool, np.float64)))
    for step in range(log_weights.shape[1]):
        ratio = np.minimum(log_weights[:, step] - log_weights[chains, held], 0.0)
        taken = log_u[:, step] < ratio
        held = np.where(taken, step, held)
        path.held[:, step], path.accepted[:, step] = held, taken
        path.chance[:, step] = np.exp(ratio)
    return path


def _warn(path: _Path) -> None:
    rate = path.chance.mean()
    longest = max(np.unique(chain, return_counts=True)[1].max() for chain in path.held)
    num_draws = path.held.shape[1]
    what = []
    if rate < FEW_ACCEPTED:
        what.append(f"{rate:.1%} of the proposals were accepted (should be at least "
                    f"{FEW_ACCEPTED:.0%})")
    if longest > max(HELD * num_draws, FEWEST_HELD):
        what.append(f"one draw was held for {longest / num_draws:.0%} of a chain (should be at "
                    f"most {HELD:.0%})")
    if what:
        warnings.warn(f"metropolis: {' and '.join(what)}: the flow is far from the posterior, and "
                      "these chains are not to be trusted. Run NeuTra instead.", stacklevel=4)
