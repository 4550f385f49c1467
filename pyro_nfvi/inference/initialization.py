"""The Gaussian stage: where a posterior is, how wide, and in how many places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi.flows import FixedLinear, FixedLowRank, Flow, Gaussian
from pyro_nfvi.inference.batch_and_match import batch_and_match
from pyro_nfvi.inference.curvature import curved
from pyro_nfvi.inference.factors import factor_or_scales
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.pathfinder import PathGaussian, pathfinder
from pyro_nfvi.inference.score import Score, elbo_of

NUM_STARTS = 12
MORE_STARTS = 24  # once there is more than one place to find
FEWEST_STARTS, NUM_GRADIENTS = 4, 300  # starts of a costly model, and gradients of each
PATH_BUDGET = 5e9  # numbers computed on the way from all of them
MAX_PLACES = 8
MAX_CURVED = 3  # of them, of many latents, that the curvature improves
MAX_FULL = 400  # latents up to which a covariance is full
NUM_DRAWS = 256  # that compare the ELBO of Gaussians
FAR = 5.0  # standard deviations between two places, by the wider of them
SPIKE = 40.0  # the same by the narrower: a spike within reach of a broad place is its own
NEGLIGIBLE = 10.0  # nats of ELBO by which a place may fall behind the best one
MAX_SEARCHED = 20  # latents up to which points are scattered in search of further modes
SEARCH_BUDGET = 4e7  # numbers computed for that, and the most points
MAX_SEARCH = 160_000
NUM_SEARCHED = 2  # of each cloud, the most surprising
CLOUDS = (1.5, 2.5, 5.0, 10.0)  # their standard deviations
MATCH_BUDGET = 1e5  # numbers a point, over how many Gaussians of one place are improved at once
MAX_MATCHED = 6
DIP = 1.0  # nats that the log density loses between two modes, or they are one
NUM_BETWEEN = 12  # points on the line between them


@dataclass(frozen=True)
class GaussianStart:
    """What the Gaussian stage found.

    Attributes:
        places: Gaussians as flows, the one with the highest ELBO first; further ones are far
            from it, and from each other.
        elbo: ELBO of each.
    """

    places: tuple[Flow, ...]
    elbo: tuple[float, ...]

    @property
    def flow(self) -> Flow:
        """The best Gaussian."""
        return self.places[0]


@torch.no_grad()
def gaussian_start(score: Score, draw_starts: Callable[[int], Tensor], *, match: bool = True,
                   max_full: int = MAX_FULL) -> GaussianStart | None:
    """Find Gaussians that approximate a posterior, from many starts.

    Pathfinder runs from every start; if the paths end in more than one place, from more starts.
    Batch and match then improves the best Gaussian of each place. Beyond ``max_full`` latents
    covariances are diagonal plus low rank, and the mean curvature improves them
    (:func:`~pyro_nfvi.inference.curvature.curved`).

    Args:
        score: The log joint and its gradient.
        draw_starts: Returns so many starting points ``(S, D)``.
        match: Whether to improve what Pathfinder found.
        max_full: Number of latents up to which a covariance is full throughout.

    Returns:
        The Gaussians, or None if the log joint is finite at none of the starts.
    """
    found = pathfinder(score, _affordable(score, draw_starts(NUM_STARTS)))
    if not found:
        return None
    places = _places(score, found)
    if len(places) > 1:
        found = _by_elbo(found + pathfinder(score, _affordable(score, draw_starts(MORE_STARTS))))
        places = _places(score, found)
    if len(found[0].loc) > max_full:
        return _ranked(score, _large(score, places, match))
    if len(places) == 1:  # the best by luck, perhaps
        places += [g for g in found[:_num_matched(score)] if g.elbo < found[0].elbo - DIP]
    flows = _improved(score, places, found[0].elbo, match)
    searchable = len(found[0].loc) <= MAX_SEARCHED and not score.failed and not score.noisy
    if match and found[0].arrived and searchable:
        flows = _with_narrow_places(score, flows)
    ranked = _ranked(score, flows)
    if found[0].arrived:
        return ranked
    return GaussianStart(ranked.places[:1], ranked.elbo[:1])  # no modes, but a way to infinity


def _affordable(score: Score, starts: Tensor) -> Tensor:
    """The given start and the highest others, as many as can be paid for."""
    count = int(max(PATH_BUDGET / (NUM_GRADIENTS * score.estimated_work(starts)), FEWEST_STARTS))
    if count >= len(starts):
        return starts
    order = score.value(starts).nan_to_num(-torch.inf)[1:].argsort(descending=True)
    return torch.cat([starts[:1], starts[1:][order[:count - 1]]])


def _large(score: Score, places: Sequence[PathGaussian], match: bool) -> list[Flow]:
    """Gaussians of low rank, and what their curvature makes of them."""
    flows = [_low_rank(place) for place in places]
    if not match:
        return flows
    return flows + [new for flow in flows[:MAX_CURVED] for new in curved(score, flow)]


def _num_matched(score: Score) -> int:
    """How many Gaussians of one place may be improved at the same time."""
    return int(min(max(MATCH_BUDGET / score.work, 2), MAX_MATCHED))


def _by_elbo(found: Sequence[PathGaussian]) -> list[PathGaussian]:
    return sorted(found, key=lambda gaussian: -gaussian.elbo)


def _improved(score: Score, places: Sequence[PathGaussian], elbo: float, match: bool
              ) -> list[Flow]:
    flows = [_dense(place.loc, place.covariance()) for place in places]
    return flows + _matched(score, flows, elbo) if match else flows


def _with_narrow_places(score: Score, flows: list[Flow]) -> list[Flow]:
    """Look for further places until none is found."""
    for _ in range(MAX_PLACES):
        known = _ranked(score, flows)
        new = [g for g in _elsewhere(score, known.places)
               if g.arrived and g.elbo > known.elbo[0] - NEGLIGIBLE
               and all(_dips(score, g.mode, flow.bijection.shift) for flow in known.places)]
        if not new:
            break
        flows = [*known.places, *_improved(score, new[:1], known.elbo[0], match=True)]
    return flows


def _elsewhere(score: Score, places: Sequence[Flow]) -> list[PathGaussian]:
    """Pathfinder from the points of clouds where the density is least explained so far.

    A narrow mode is a peak that no path from afar leads to.
    """
    zeros = places[0].base.zeros
    count = int(min(SEARCH_BUDGET / score.value_work, MAX_SEARCH)) // len(CLOUDS)
    starts = []
    for deviation in CLOUDS:
        z = deviation * torch.randn(max(count, NUM_SEARCHED), len(zeros)).to(zeros)
        log_q = torch.stack([place.log_prob(z) for place in places]).amax(0)
        surprise = (score.value(z) - log_q).nan_to_num(-torch.inf)
        starts.append(z[surprise.topk(NUM_SEARCHED).indices])
    return pathfinder(score, torch.cat(starts))


def _places(score: Score, found: Sequence[PathGaussian]) -> list[PathGaussian]:
    """The best Gaussian of each place with some mass."""
    found = [g for g in found if g.elbo >= found[0].elbo - NEGLIGIBLE - len(g.loc)]
    places: list[PathGaussian] = list(found[:1])
    for gaussian in found[1:]:
        if gaussian.arrived and all(_dips(score, gaussian.mode, other.mode) for other in places):
            places.append(gaussian)
    return places[:MAX_PLACES]


def _matched(score: Score, flows: Sequence[Flow], elbo: float) -> list[Flow]:
    standard = _standard(score, flows[0], elbo)
    flows = [*flows, *standard]
    loc = torch.stack([flow.bijection.shift for flow in flows])
    factor = torch.stack([flow.bijection.lower for flow in flows])
    pairs = zip(*batch_and_match(score, loc, factor), strict=True)
    return [Flow(FixedLinear(*pair), flows[0].base) for pair in pairs]


def _standard(score: Score, like: Flow, elbo: float) -> list[Flow]:
    """The standard normal, if it is not hopelessly far off."""
    dim, zeros = like.input_dim, like.base.zeros
    standard = Flow(FixedLinear(zeros, torch.eye(dim).to(zeros)), like.base)
    return [standard] if flow_elbo(score, standard) > elbo - 10 * dim - 100 else []


def _dense(loc: Tensor, covariance: Tensor) -> Flow:
    return Flow(FixedLinear(loc, factor_or_scales(covariance)), Gaussian(len(loc)).to(loc))


def _low_rank(gaussian: PathGaussian) -> Flow:
    bijection = FixedLowRank(gaussian.loc, gaussian.scale, gaussian.directions, gaussian.stretch)
    return Flow(bijection, Gaussian(len(gaussian.loc)).to(gaussian.loc))


def _ranked(score: Score, flows: Sequence[Flow]) -> GaussianStart:
    """The flows by ELBO, less those that are at the place of a better one."""
    elbos = [flow_elbo(score, flow) for flow in flows]
    kept: list[int] = []
    for i in sorted(range(len(flows)), key=lambda i: -elbos[i]):
        if not kept or (elbos[i] > elbos[kept[0]] - NEGLIGIBLE
                        and all(_flows_apart(score, flows[i], flows[j]) for j in kept)):
            kept.append(i)
    return GaussianStart(tuple(flows[i] for i in kept), tuple(elbos[i] for i in kept))


@torch.no_grad()
def flow_elbo(score: Score, flow: Flow, num_draws: int = NUM_DRAWS) -> float:
    """ELBO of a flow."""
    z, log_q = flow.rsample_and_log_prob((num_draws,))
    return elbo_of(score.value(z) - log_q).item()


def _flows_apart(score: Score, a: Flow, b: Flow) -> bool:
    """Whether two Gaussians are far from each other, with less density between them."""
    ends = (a.bijection.shift, b.bijection.shift)
    gaps = [flow.bijection.inverse(end)[0].norm().item()
            for flow, end in ((a, ends[1]), (b, ends[0]))]
    return (min(gaps) > FAR or max(gaps) > SPIKE) and _dips(score, *ends)


def _dips(score: Score, start: Tensor, end: Tensor) -> bool:
    line = torch.linspace(0, 1, NUM_BETWEEN, dtype=start.dtype).to(start.device)
    log_p = score.value(torch.lerp(start, end, line.unsqueeze(-1)))
    return bool(log_p.min() < torch.minimum(log_p[0], log_p[-1]) - DIP)


def starting_points(log_joint: LogJoint, center: Tensor) -> Callable[[int], Tensor]:
    """Starts for :func:`gaussian_start`: a given point, draws of the prior, and boxes.

    The boxes are those of Stan, uniform between -2 and 2 on the unconstrained scale, and one
    five times as wide, a third of the starts.
    """
    def draw(count: int) -> Tensor:
        prior = _prior_draws(log_joint, count // 6)
        boxes = 4 * torch.rand(count - len(prior), len(center)).to(center) - 2
        boxes[-(count // 3):] *= 5
        boxes[0] = center
        return torch.cat([boxes, prior.to(center)])
    return draw


def _prior_draws(log_joint: LogJoint, count: int) -> Tensor:
    """Draws of the prior, as far as the model can be run without data for its latents."""
    draws = [log_joint.prior_draw() for _ in range(count)]
    usable = [draw for draw in draws if draw is not None and draw.isfinite().all()]
    return torch.stack(usable) if usable else torch.zeros(0, log_joint.layout.size)
