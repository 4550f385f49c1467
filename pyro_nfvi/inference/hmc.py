"""Short chains of Hamiltonian Monte Carlo, many at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi.inference.score import Score

TARGET = 0.8  # acceptance rate that the step size is adapted to


@dataclass(frozen=True)
class Moved:
    """Where short chains ended.

    Attributes:
        start: Points ``(C, D)`` where they started.
        end: Points where they ended.
        acceptance: Mean acceptance rate.
    """

    start: Tensor
    end: Tensor
    acceptance: float


@torch.no_grad()
def short_chains(score: Score, start: Tensor, factor: Tensor, num_transitions: int,
                 num_leapfrogs: int = 8) -> Moved:
    r"""Run a chain from every point, in coordinates in which their covariance is one.

    .. math:: z' = z + \epsilon L p, \qquad p' = p + \epsilon L^\top \nabla \log p(z')

    The step size of all chains is adapted during the first half of the transitions.

    Args:
        score: The log joint and its gradient.
        start: Points ``(C, D)``, all of finite density.
        factor: :math:`L`, ``(D, D)``, with :math:`LL^\top` about the covariance; or scales
            ``(D,)``, its diagonal.
        num_transitions: Transitions of every chain.
        num_leapfrogs: Leapfrog steps of each, on average.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901, section 5.2-5.4.
    """
    z = start
    log_p, gradient = score(z)
    step, accepted = min(0.5, z.shape[-1] ** -0.25), []
    for i in range(num_transitions):
        length = max(1, round(num_leapfrogs * (0.5 + torch.rand(()).item())))
        momentum = torch.randn_like(z)
        new = _leapfrog(score, z, gradient, momentum, factor, step, length)
        energy = 0.5 * (momentum.square() - new[3].square()).sum(-1)
        chance = (new[1] - log_p + energy).nan_to_num(-torch.inf).exp().clamp(max=1)
        taken = torch.rand_like(chance) < chance
        z, gradient = (a.where(taken.unsqueeze(-1), b) for a, b in
                       ((new[0], z), (new[2], gradient)))
        log_p = new[1].where(taken, log_p)
        accepted.append(chance.mean().item())
        if i < num_transitions // 2:
            step *= 1.3 if accepted[-1] > TARGET else 0.6
    return Moved(start, z, sum(accepted) / len(accepted))


def _leapfrog(score: Score, z: Tensor, gradient: Tensor, momentum: Tensor, factor: Tensor,
              step: float, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    momentum = momentum + 0.5 * step * _times(gradient, factor)
    for i in range(length):
        z = z + step * _times(momentum, factor.mT if factor.dim() > 1 else factor)
        log_p, gradient = score(z)
        part = step if i < length - 1 else 0.5 * step
        momentum = momentum + part * _times(gradient, factor)
    return z, log_p, gradient, momentum


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    return rows @ factor if factor.dim() > 1 else rows * factor
