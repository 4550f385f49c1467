"""Drift: do short exact chains stay where the fit says the posterior is?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi.flows import Flow
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference.hmc import short_chains
from pyro_nfvi.inference.importance import ImportanceSample
from pyro_nfvi.inference.score import Score

FALSE_ALARM = 1e-3  # probability of one, over all coordinates
FEWEST_CHAINS, MOST_CHAINS = 50, 2000
FEWEST_TRANSITIONS, MOST_TRANSITIONS = 5, 100
MOST_LEAPFROGS = 8
MANY = 10_000  # gradients, above which the most leapfrog steps are made
RARE = (0.01, 0.05)  # fractions of the draws that are extreme
LEAST_CHANGED = 10  # chains that must change sides for an indicator to tell
CHUNK = 1000


@dataclass(frozen=True)
class Drift:
    """How far short chains move the moments of a fit.

    Attributes:
        site: Name of the site that moves most.
        z_score: Its mean move, in standard errors.
        limit: What chance alone explains.
        size: Its move, in standard deviations.
    """

    site: str
    z_score: float
    limit: float
    size: float

    @property
    def found(self) -> bool:
        """Whether chance does not explain it."""
        return self.z_score > self.limit

    def __str__(self) -> str:
        return (f"short Hamiltonian chains drift away from it, most at site {self.site!r} (by "
                f"{self.size:.2f} sd, {self.z_score:.1f} standard errors)")


@torch.no_grad()
def drift(score: Score, flow: Flow, sample: ImportanceSample, layout: LatentLayout,
          budget: float) -> Drift:
    r"""Start short chains at draws of a fit, and test whether they stay, in distribution.

    Draws of the posterior are where Hamiltonian Monte Carlo leaves them, in distribution; mass
    that the guide never reached, but that hangs together with what it did, draws the chains
    away. Weights cannot see it, as no draw is there. With :math:`f` each of
    :math:`x_d, x_d^2` in standardized coordinates, and the indicators of the largest weights
    and of the smallest densities of the guide,

    .. math:: \left|\overline{f(z'_c) - f(z_c)}\right|
              \le q\ \mathrm{se}\left[f(z'_c) - f(z_c)\right]

    with :math:`q` such that an exact fit fails once in a thousand times.

    Args:
        score: The log joint and its gradient.
        flow: The fit.
        sample: Draws of the fit with their weights.
        layout: Which coordinates are whose.
        budget: Roughly how many numbers may be computed.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Yes, but Did It Work?, arXiv:1802.02538 (what
        weights can tell); Gorham & Mackey (2015), arXiv:1506.03039 (tests by the score).
    """
    z = sample.z.to(flow.base.zeros)
    weights = sample.log_weights.exp().to(z)
    num_chains, num_transitions, num_leapfrogs = _affordable(budget / score.work)
    chosen = sample.resample(num_chains)
    start = z[chosen]
    mean = weights @ z
    centred = z - mean
    covariance = (weights.unsqueeze(-1) * centred).mT @ centred
    factor, info = torch.linalg.cholesky_ex(covariance)
    if info:
        factor = covariance.diagonal().clamp(min=1e-300).sqrt().diag()
    moved = short_chains(score, start, factor, num_transitions, num_leapfrogs)
    deviation = covariance.diagonal().sqrt()
    rare = [_rare(score, flow, sample, z) for z in (moved.start, moved.end)]
    return _largest((moved.start - mean) / deviation, (moved.end - mean) / deviation,
                    (rare[1] - rare[0]), layout)


def _rare(score: Score, flow: Flow, sample: ImportanceSample, z: Tensor) -> Tensor:
    """Which points have a weight, or a density of the guide, that few draws have."""
    log_q = torch.cat([flow.log_prob(part) for part in z.split(CHUNK)]).double().cpu()
    log_w = score.value(z).double().cpu() - log_q
    weights = sample.log_weights.exp()
    return torch.stack([
        *(log_w > _quantile(sample.log_p - sample.log_q, weights, 1 - rare) for rare in RARE),
        *(log_q < _quantile(sample.log_q, weights, rare) for rare in RARE)], -1).double()


def _quantile(values: Tensor, weights: Tensor, level: float) -> Tensor:
    ordered, order = values.nan_to_num(-torch.inf).sort()
    place = torch.searchsorted(weights[order].cumsum(0), level)
    return ordered[place.clamp(max=len(values) - 1)]


def _affordable(num_gradients: float) -> tuple[int, int, int]:
    """Numbers of chains, of transitions, and of leapfrog steps in each."""
    leapfrogs = MOST_LEAPFROGS if num_gradients > MANY else MOST_LEAPFROGS // 2
    transitions = min(max(num_gradients / (FEWEST_CHAINS * leapfrogs), FEWEST_TRANSITIONS),
                      MOST_TRANSITIONS)
    chains = min(max(num_gradients / (transitions * leapfrogs), FEWEST_CHAINS), MOST_CHAINS)
    return int(chains), int(transitions), leapfrogs


def _largest(before: Tensor, after: Tensor, rare: Tensor, layout: LatentLayout) -> Drift:
    moves = torch.cat([after - before, after.square() - before.square(), rare.to(after)], -1)
    error = moves.std(0) / len(moves) ** 0.5
    error[-rare.shape[-1]:].clamp_(min=LEAST_CHANGED ** 0.5 / len(moves))
    z_scores = (moves.mean(0) / error.clamp(min=1e-12)).abs()
    worst = int(z_scores.argmax())
    limit = torch.special.ndtri(torch.tensor(
        1 - FALSE_ALARM / 2 / len(z_scores), dtype=torch.float64)).item()
    moved = (after.mean(0) - before.mean(0)).abs(), (after.std(0) - before.std(0)).abs()
    place = int(torch.maximum(*moved).argmax())
    site = layout.at(place).name
    return Drift(site, z_scores[worst].item(), limit, torch.maximum(*moved)[place].item())
