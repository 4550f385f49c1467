"""Several places at once: a mixture of the Gaussians found there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nfvi.flows import FixedLinear, Flow, Gaussian, MixtureOfFlows
from pyro_nfvi.inference.score import Score

NUM_DRAWS = 1000  # of each place, to find the weights
NUM_ROUNDS = 50
SEPARATE = 0.99  # of the draws of a place that must be its own
LEAST_WEIGHT = 1e-4  # below, a place is left out


@torch.no_grad()
def mixture_of(score: Score, places: Sequence[Flow]) -> Flow:
    r"""One flow that draws from all places, in coordinates in which it has unit covariance.

    The weights are those under which the mixture is closest to the posterior: expectation
    maximisation on draws of all places, weighted by importance,

    .. math:: \pi_k \leftarrow \sum_i \bar w_i\,
              \frac{\pi_k q_k(z_i)}{\sum_j \pi_j q_j(z_i)}, \qquad
              w_i \propto \frac{p(x, z_i)}{\sum_j q_j(z_i)}

    Places that overlap are the bends of one, which a flow follows better: then the first is
    returned.

    Args:
        score: The log joint and its gradient.
        places: Gaussians of full covariance, the best first.

    References:
        Cappe, Douc, Guillin, Marin & Robert (2008), Adaptive importance sampling in general
        mixture classes, arXiv:0710.4242.
    """
    weights = _weights(score, places)
    kept = [(place, float(w)) for place, w in zip(places, weights, strict=True)
            if w > LEAST_WEIGHT]
    if not _separate(kept):
        return places[0]
    loc, factor = _moments(kept)
    frame = FixedLinear(loc, factor)
    parts = [Flow(_inside(place, frame), Gaussian(frame.input_dim).to(loc)) for place, _ in kept]
    return Flow(frame, MixtureOfFlows(parts, [w for _, w in kept]).to(loc))


def _separate(parts: Sequence[tuple[Flow, float]]) -> bool:
    """Whether almost every draw of a place belongs to that place."""
    for own, (place, _) in enumerate(parts):
        z, _ = place.rsample_and_log_prob((NUM_DRAWS,))
        log_q = torch.stack([flow.log_prob(z) + math.log(w) for flow, w in parts], -1)
        if log_q.softmax(-1)[:, own].mean() < SEPARATE:
            return False
    return True


def _weights(score: Score, places: Sequence[Flow]) -> Tensor:
    z = torch.cat([flow.rsample_and_log_prob((NUM_DRAWS,))[0] for flow in places])
    log_q = torch.stack([flow.log_prob(z) for flow in places], -1)
    log_w = score.value(z) - log_q.logsumexp(-1)
    importance = (log_w - log_w.max()).exp()
    weights = torch.full_like(log_q[0], 1 / len(places))
    for _ in range(NUM_ROUNDS):
        share = (weights.log() + log_q).softmax(-1)
        weights = (importance.unsqueeze(-1) * share).sum(0) / importance.sum()
    return weights


def _moments(parts: Sequence[tuple[Flow, float]]) -> tuple[Tensor, Tensor]:
    total = sum(w for _, w in parts)
    shifts = torch.stack([_map(flow).shift for flow, _ in parts])
    share = torch.tensor([w / total for _, w in parts]).to(shifts)
    mean = share @ shifts
    gaps = shifts - mean
    within = sum(w * _map(flow).lower @ _map(flow).lower.mT
                 for w, (flow, _) in zip(share, parts, strict=True))
    return mean, torch.linalg.cholesky(within + (share * gaps.mT) @ gaps)


def _inside(place: Flow, frame: FixedLinear) -> FixedLinear:
    """The place in the coordinates of the frame."""
    shift, _ = frame.inverse(_map(place).shift)
    return FixedLinear(shift, frame.inverse_lower @ _map(place).lower)


def _map(place: Flow) -> FixedLinear:
    assert isinstance(place.bijection, FixedLinear)
    return place.bijection
