"""Drift: do short exact chains stay where the fit says the posterior is?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi.flows import Flow
from pyro_nfvi.guides import GuideDraws, LatentLayout
from pyro_nfvi.inference.factors import factor_or_scales
from pyro_nfvi.inference.hmc import short_chains
from pyro_nfvi.inference.importance import ImportanceSample
from pyro_nfvi.inference.score import Score

FALSE_ALARM = 1e-3  # probability of one, over all coordinates
FEWEST_CHAINS, MOST_CHAINS = 50, 4000
FEWEST_TRANSITIONS, MOST_TRANSITIONS = 5, 100
MOST_LEAPFROGS = 8
MANY = 10_000  # gradients, above which the most leapfrog steps are made
RARE = (0.01, 0.05)  # fractions of the draws that are extreme
LEAST_ACCEPTED = 0.2  # acceptance rate below which chains say nothing
LEAST_CHANGED = 10  # chains that must change sides for an indicator to tell
CHUNK = 1000  # draws at a time
MAX_FULL = 400  # latents up to which chains run in coordinates that the covariance decorrelates


@dataclass(frozen=True)
class Drift:
    """How far short chains move the moments of a fit.

    Attributes:
        site: Name of the site whose moments move most surely.
        z_score: The largest move of all, in standard errors.
        limit: What chance alone explains.
        size: The move of the site, in standard deviations.
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
        return (f"short Hamiltonian chains drift away from it ({self.z_score:.1f} standard "
                f"errors), most at site {self.site!r} (by {self.size:.2f} sd)")


@torch.no_grad()
def drift(score: Score, flow: Flow | GuideDraws, sample: ImportanceSample, layout: LatentLayout,
          budget: float) -> Drift:
    r"""Start short chains at draws of a fit, and test whether they stay, in distribution.

    Draws of the posterior are where Hamiltonian Monte Carlo leaves them, in distribution; mass
    that the guide never reached, but that hangs together with what it did, draws the chains
    away. Weights cannot see it, as no draw is there. With :math:`f` each of
    :math:`x_d, x_d^2` in standardized coordinates, and the indicators of the largest weights
    and of the smallest densities of the guide,

    .. math:: \left|\overline{f(z'_c) - f(z_c)}\right|
              \le q\ \mathrm{se}\left[f(z'_c) - f(z_c)\right]

    with :math:`q` such that an exact fit fails once in a thousand times; the standard error
    counts the chains and the effective draws that they start from.

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
    z = sample.z.to(flow.base.zeros) if isinstance(flow, Flow) else sample.z
    weights = sample.log_weights.exp().to(z)
    num_chains, num_transitions, num_leapfrogs = _affordable(budget / score.work)
    chosen = sample.resample(min(num_chains, max(int(2 * sample.ess), FEWEST_CHAINS)))
    start = z[chosen]
    mean, deviation, factor = _moments(z, weights)
    moved = short_chains(score, start, factor, num_transitions, num_leapfrogs)
    if moved.acceptance < LEAST_ACCEPTED:  # the covariance is not that of any one place
        moved = short_chains(score, start, 0.1 * factor, num_transitions, num_leapfrogs)
    limits = _limits(sample)
    rare = [_rare(score, flow, limits, points) for points in (moved.start, moved.end)]
    before, after = (_statistics((points - mean) / deviation, r)
                     for points, r in zip((moved.start, moved.end), rare, strict=True))
    return _largest(before, after, sample.ess, layout)


def _moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviations, and a factor of the covariance: of many latents, only scales."""
    mean = weights @ z
    if z.shape[-1] <= MAX_FULL:
        centred = z - mean
        covariance = (weights.unsqueeze(-1) * centred).mT @ centred
        return mean, covariance.diagonal().sqrt(), factor_or_scales(covariance)
    variance = torch.zeros_like(mean)
    for part, weight in zip(z.split(CHUNK), weights.split(CHUNK), strict=True):
        variance += weight @ (part - mean).square()
    return mean, variance.sqrt(), variance.clamp(min=1e-300).sqrt()


def _statistics(x: Tensor, rare: Tensor) -> Tensor:
    """First and second powers of standardized coordinates, and the indicators."""
    return torch.cat([x, x.square(), rare.to(x)], -1)


def _limits(sample: ImportanceSample) -> tuple[list[Tensor], list[Tensor]]:
    """Log weights that few draws are above, and log densities of the guide that few are below."""
    weights = sample.log_weights.exp()
    return ([_quantile(sample.log_p - sample.log_q, weights, 1 - rare) for rare in RARE],
            [_quantile(sample.log_q, weights, rare) for rare in RARE])


def _rare(score: Score, flow: Flow | GuideDraws, limits: tuple[list[Tensor], list[Tensor]],
          z: Tensor) -> Tensor:
    """Which points are beyond each limit."""
    log_q = torch.cat([flow.log_prob(part) for part in z.split(CHUNK)]).double().cpu()
    log_w = score.value(z).double().cpu() - log_q
    heavy, thin = limits
    return torch.stack([*(log_w > limit for limit in heavy),
                        *(log_q < limit for limit in thin)], -1).double()


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


def _largest(before: Tensor, after: Tensor, ess: float, layout: LatentLayout) -> Drift:
    """The largest move in standard errors, of the chains and of the draws they start from."""
    moves, dim = after - before, layout.size
    variance = moves.var(0) / len(moves) + before.var(0) / ess
    variance[2 * dim:].clamp_(min=LEAST_CHANGED / len(moves) ** 2)
    z_scores = (moves.mean(0) / variance.clamp(min=1e-24).sqrt()).abs().nan_to_num(0.0)
    if dim > MAX_FULL:  # few chains of many latents, one of which lies far out by chance
        z_scores = _as_normal(z_scores, len(moves) - 1)
    limit = torch.special.ndtri(torch.tensor(
        1 - FALSE_ALARM / 2 / len(z_scores), dtype=torch.float64)).item()
    worst = int(z_scores.argmax())
    place = worst % dim if worst < 2 * dim else int(z_scores[:2 * dim].argmax()) % dim
    size = max(moves.mean(0)[place].abs().item(),
               (after.std(0) - before.std(0))[place].abs().item())
    return Drift(layout.at(place).name, z_scores[worst].item(), limit, size)


def _as_normal(t: Tensor, df: int) -> Tensor:
    """Size of the normal score that is as rare as a Student's t.

    References:
        Wallace (1959), Bounds on normal approximations to Student's t, Annals of Mathematical
        Statistics 30(4), section 3.
    """
    return (8 * df + 1) / (8 * df + 3) * (df * (t.square() / df).log1p()).sqrt()
