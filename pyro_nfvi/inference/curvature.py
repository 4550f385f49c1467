"""Gaussians from the mean curvature, for many latents: of low rank, or of full covariance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_nfvi.flows import FixedLinear, FixedLowRank, Flow
from pyro_nfvi.inference.score import Score, elbo_of

NUM_ROUNDS = 12  # of curvature, mean and scales, each where the last one led
NUM_DRAWS = 64  # pairs of mirrored draws that the mean of the score and the scales are taken of
NUM_BASES = 4  # pairs of mirrored draws at which directions are bent
ROUND_BUDGET = 2e9  # numbers computed in a round, above which both are fewer
NUM_GRADIENTS, LEAST_EFFORT = 1200, 0.25  # of a round, and the part of them that is made anyway
BLOCK, NUM_BLOCKS = 4, 12  # vectors a block, and blocks, of the Krylov space
RANK = 40  # directions kept of it
STEP = 0.1  # standard deviations between the two scores whose difference is a curvature
GAIN = 0.5  # nats of ELBO below which another round is not worth it
LEAST, MOST = 1e-3, 1e6  # curvature of a direction, relative to what its scale says
MAX_GROWTH = 10.0  # times by which a scale may grow in a round
FULL_BUDGET = 2e10  # numbers computed for a full matrix of curvature
MAX_DENSE = 3000  # latents up to which a covariance from the curvature may be full
NUM_COMPARED = 256  # draws that compare the ELBO of two rounds
CLOSE = 1.0  # variance of the log weights of a Gaussian that no other need improve on


@torch.no_grad()
def curved(score: Score, start: Flow, max_dense: int = MAX_DENSE) -> list[Flow]:
    r"""Improve a Gaussian of low rank until its curvature is that of the log joint, on average.

    At the Gaussian of highest ELBO the mean of the score is zero, and its precision is the mean
    curvature,

    .. math:: \mathbb E_q[\nabla \log p] = 0, \qquad
              \Sigma^{-1} = \Lambda := -\mathbb E_q[\nabla^2 \log p]

    Only products :math:`\Lambda v` are computed, as differences of scores. The scales are
    :math:`s_i = \Lambda_{ii}^{-1/2}`, from random signs :math:`v`; then a Krylov space of
    :math:`S \Lambda S`, begun at the mean score, gives the directions in which that differs most
    from the identity, and Newton's step for the mean. A Gaussian whose precision is diagonal but
    for a few latents or directions, as in most hierarchies, is found exactly. Nothing of size
    :math:`D^2` is made, unless the Gaussian of low rank is not good, the latents are few enough
    and :math:`2D` scores can be afforded: then the full matrix, at the mean, competes with it.

    Args:
        score: The log joint and its gradient.
        start: A Gaussian on a :class:`~pyro_nfvi.flows.FixedLowRank`.
        max_dense: Number of latents up to which a covariance may be full.

    Returns:
        The Gaussian of low rank, and one of full covariance if that was tried.

    References:
        Opper & Archambeau (2009), The variational Gaussian approximation revisited, Neural
        Computation 21(3), eq. 14-15; Bekas, Kokiopoulou & Saad (2007), An estimator for the
        diagonal of a matrix, eq. 3; Saad (2011), Numerical Methods for Large Eigenvalue
        Problems, chapter 6 (Krylov).
    """
    best, best_elbo, spread = start, *_elbo(score, start)
    for _ in range(NUM_ROUNDS):
        new = _round(score, best)
        elbo, new_spread = _elbo(score, new)
        gain = elbo - best_elbo
        if gain > 0:
            best, best_elbo, spread = new, elbo, new_spread
        if not gain > GAIN:
            break
    dim = start.input_dim
    if spread < CLOSE or dim > max_dense or 2 * dim * score.work > FULL_BUDGET:
        return [best]
    return [best, *_full(score, best)]


def _elbo(score: Score, flow: Flow) -> tuple[float, float]:
    """ELBO, and the variance of the log weights."""
    z, log_q = flow.rsample_and_log_prob((NUM_COMPARED,))
    terms = score.value(z) - log_q
    return elbo_of(terms).item(), terms[terms.isfinite()].var().nan_to_num(torch.inf).item()


def _round(score: Score, flow: Flow) -> Flow:
    """Scales, then directions and mean."""
    frame = flow.bijection
    effort = min(max(ROUND_BUDGET / (NUM_GRADIENTS * score.work), LEAST_EFFORT), 1.0)
    num_draws = int(effort * NUM_DRAWS)
    scale = _scales(score, flow, num_draws)
    pull = score(frame.shift + _mirrored(flow, num_draws))[1].mean(0) * scale
    bases = frame.shift + _mirrored(flow, int(effort * NUM_BASES))
    space, small = _krylov(lambda v: _products(score, bases, scale, v), pull)
    values, vectors = torch.linalg.eigh(small)
    values = values.clamp(LEAST, MOST)
    directions = space @ vectors
    along = directions.mT @ pull
    newton = pull + directions @ ((1 / values - 1) * along)
    kept = (values - 1 - values.log()).topk(min(RANK, len(values))).indices
    bijection = FixedLowRank(frame.shift + scale * newton, scale, directions[:, kept],
                             values[kept].rsqrt() - 1)
    return Flow(bijection, flow.base)


def _mirrored(flow: Flow, count: int) -> Tensor:
    """Draws less the mean, in pairs whose sum is zero: ``(2 * count, D)``."""
    z, _ = flow.rsample_and_log_prob((count,))
    centred = z - flow.bijection.shift
    return torch.cat([centred, -centred])


def _scales(score: Score, flow: Flow, num_draws: int) -> Tensor:
    """One over the root of the diagonal of the mean curvature; the old scale where it has none."""
    old = flow.bijection.scale
    curvature = _diagonal(score, flow.bijection.shift + _mirrored(flow, num_draws), old,
                          _signs(flow, num_draws))
    largest = MAX_GROWTH * old
    return torch.where(curvature > 0, curvature.rsqrt(), largest).minimum(largest)


def _signs(flow: Flow, num_draws: int) -> Tensor:
    zeros = flow.base.zeros.expand(2 * num_draws, -1)
    return 2 * torch.randint_like(zeros, 2) - 1


def _diagonal(score: Score, z: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
    """Mean curvature at the points along each coordinate, estimated; its noise is by the signs."""
    bent = _differences(score, z, STEP * scale * signs)
    return -(signs * bent).mean(0) / (2 * STEP * scale)


def _differences(score: Score, z: Tensor, step: Tensor) -> Tensor:
    """Scores one step ahead less those one step back."""
    ahead, back = score(torch.cat([z + step, z - step]))[1].chunk(2)
    return ahead - back


def _products(score: Score, bases: Tensor, scale: Tensor, vectors: Tensor) -> Tensor:
    r"""Products :math:`S \Lambda S v` with the columns of ``vectors``, ``(D, b)``."""
    step = STEP * (scale * vectors.mT).repeat_interleave(len(bases), 0)
    bent = _differences(score, bases.repeat(vectors.shape[-1], 1), step)
    mean = bent.reshape(vectors.shape[-1], len(bases), -1).mean(1)
    return (-scale * mean / (2 * STEP)).mT


def _krylov(product: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``(D, m)`` of a block Krylov space, and the operator within."""
    dim = len(start)
    block = torch.randn(dim, min(BLOCK, dim), dtype=start.dtype, device=start.device)
    block[:, 0] = start.where(start.norm() > 0, block[:, 0])
    block = torch.linalg.qr(block).Q
    parts, images = [block], []
    for _ in range(NUM_BLOCKS):
        images.append(product(parts[-1]))
        if dim <= (len(parts) + 1) * block.shape[-1]:
            break
        space, new = torch.cat(parts, -1), images[-1]
        for _ in range(2):  # once leaves rounding
            new = new - space @ (space.mT @ new)
        parts.append(torch.linalg.qr(new).Q)
    space = torch.cat(parts[:len(images)], -1)
    small = space.mT @ torch.cat(images, -1)
    return space, 0.5 * (small + small.mT)


def _full(score: Score, flow: Flow) -> list[Flow]:
    """The Gaussian of the full curvature at the mean, with the diagonal of the mean curvature."""
    loc, scale = flow.bijection.shift, flow.bijection.scale
    rows = [_differences(score, loc.expand(len(part), -1), STEP * part * scale)
            for part in torch.eye(len(loc), dtype=loc.dtype, device=loc.device).split(NUM_DRAWS)]
    matrix = -torch.cat(rows) * scale / (2 * STEP)
    matrix = 0.5 * (matrix + matrix.mT)
    signs, centred = _signs(flow, NUM_DRAWS), _mirrored(flow, NUM_DRAWS)
    there, around = (_diagonal(score, z, scale, signs)
                     for z in (loc.expand(len(signs), -1), loc + centred))
    ratio = (around / there).clamp(1 / MAX_GROWTH, MAX_GROWTH).sqrt()
    root, info = torch.linalg.cholesky_ex(matrix * ratio * ratio.unsqueeze(-1))
    covariance = torch.cholesky_inverse(root)
    factor, again = torch.linalg.cholesky_ex(covariance)
    if info or again:
        return []
    shift = loc + scale * (covariance @ (score(loc + centred)[1].mean(0) * scale))
    return [Flow(FixedLinear(shift, scale.unsqueeze(-1) * factor), flow.base)]
