"""Batch and match: a Gaussian fitted by matching scores, without a learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nfvi.inference.score import Score, elbo_of

NUM_STEPS = 40
NUM_DRAWS = 64
WINDOW = 10  # steps whose mean ELBO is compared with that of those before

FINAL = 4  # times as many draws decide between the best on the way and the last
BLOWN_UP = 10.0  # nats a latent by which the ELBO may fall behind the best on the way
SMALL = 0.2  # gain, in standard errors of one batch, that ends the search


@torch.no_grad()
def batch_and_match(score: Score, loc: Tensor, factor: Tensor, num_steps: int = NUM_STEPS,
                    num_draws: int = NUM_DRAWS) -> tuple[Tensor, Tensor]:
    r"""Improve Gaussians :math:`\mathcal N(\mu, LL^\top)`, several at once.

    Every step draws a batch of each Gaussian and moves it to where its own score would be the
    one that was seen, not too far from where it is. In coordinates in which the Gaussian is
    standard, with :math:`\bar u, C` the moments of the batch and :math:`\bar g, \Gamma` those of
    its scores,

    .. math:: \Sigma U \Sigma + \Sigma = V, \qquad
              U = \lambda\Gamma + \tfrac{\lambda}{1+\lambda}\bar g\bar g^\top, \qquad
              V = I + \lambda C + \tfrac{\lambda}{1+\lambda}\bar u\bar u^\top, \qquad
              \mu = \tfrac{\lambda}{1+\lambda}(\Sigma\bar g + \bar u)

    Args:
        score: The log joint and its gradient.
        loc: Means ``(M, D)``.
        factor: Lower Cholesky factors ``(M, D, D)``.
        num_steps: Number of steps.
        num_draws: Draws of each Gaussian and step.

    Returns:
        The better of the best Gaussians on the way and the last ones, ``(M, D)`` and ``(M, D, D)``.

    References:
        Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul (2024), Batch and match,
        arXiv:2402.14758, eq. 7-10 and appendix D (the schedule).
    """
    count, dim = loc.shape
    best = loc, factor, loc.new_full((count,), -torch.inf)
    trend: list[Tensor] = []
    damping = loc.new_ones(count)
    for step in range(num_steps):
        u = torch.randn(count, num_draws, dim, dtype=loc.dtype, device=loc.device)
        z = loc.unsqueeze(1) + u @ factor.mT
        log_p, gradient = (part.reshape(count, num_draws, *part.shape[1:])
                           for part in score(z.reshape(-1, dim)))
        terms = _terms(factor, u, log_p)
        best = _better(best, loc, factor, terms)
        trend.append(elbo_of(terms))
        lost = ~(trend[-1] > best[2] - BLOWN_UP * (10 + dim))  # too far at once: back, and slower
        damping = torch.where(lost, 0.1 * damping, damping)
        loc = best[0].where(lost.unsqueeze(-1), loc)
        factor = best[1].where(lost.reshape(-1, 1, 1), factor)
        if _settled(trend, _error(terms)):
            break
        rate = damping * num_draws * dim / (step + 1)
        new = _step(loc, factor, u, gradient @ factor, log_p.isfinite(), rate)
        loc = new[0].where(~lost.unsqueeze(-1), loc)
        factor = new[1].where(~lost.reshape(-1, 1, 1), factor)
    return _best_of_two(score, best[:2], (loc, factor), FINAL * num_draws)


def _settled(trend: list[Tensor], error: Tensor) -> bool:
    """Whether no Gaussian gained more than a part of its standard error in the last steps."""
    if len(trend) < 2 * WINDOW:
        return False
    before, recent = torch.stack(trend[-2 * WINDOW:]).unflatten(0, (2, WINDOW)).mean(1)
    return not bool((recent - before > SMALL * error).any())


def _best_of_two(score: Score, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor],
                 num_draws: int) -> tuple[Tensor, Tensor]:
    """Of each pair the Gaussian with the higher ELBO on noise that neither was chosen by."""
    u = torch.randn(1, num_draws, a[0].shape[-1], dtype=a[0].dtype, device=a[0].device)
    elbos = []
    for loc, factor in (a, b):
        z = loc.unsqueeze(1) + u @ factor.mT
        log_p = score.value(z.flatten(0, 1)).reshape(z.shape[:2])
        elbos.append(elbo_of(_terms(factor, u, log_p)).nan_to_num(-torch.inf))
    first = elbos[0] > elbos[1]
    return (a[0].where(first.unsqueeze(-1), b[0]), a[1].where(first.reshape(-1, 1, 1), b[1]))


def _terms(factor: Tensor, u: Tensor, log_p: Tensor) -> Tensor:
    """Log joint less log density of the Gaussian, for every draw."""
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return log_p + 0.5 * (u.square() + math.log(2 * math.pi)).sum(-1) + log_det


def _error(terms: Tensor) -> Tensor:
    """Standard error of the ELBO, from the finite terms."""
    finite = terms.isfinite()
    mean = elbo_of(terms).unsqueeze(-1)
    squares = (terms - mean).square().where(finite, terms.new_zeros(()))
    return squares.sum(-1).sqrt() / finite.sum(-1).clamp(min=1)


def _better(best: tuple[Tensor, Tensor, Tensor], loc: Tensor, factor: Tensor, terms: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
    """The Gaussians with the higher ELBO, less a standard error: some are high by luck."""
    elbo = (elbo_of(terms) - _error(terms)).nan_to_num(-torch.inf)
    higher = elbo > best[2]
    return (loc.where(higher.unsqueeze(-1), best[0]),
            factor.where(higher.reshape(-1, 1, 1), best[1]), elbo.where(higher, best[2]))


def _step(loc: Tensor, factor: Tensor, u: Tensor, gradient: Tensor, finite: Tensor, rate: Tensor
          ) -> tuple[Tensor, Tensor]:
    weight = finite.to(u.dtype).unsqueeze(-1)
    mean_u, cov_u = _moments(u, weight)
    mean_g, cov_g = _moments(gradient, weight)
    rate = rate.unsqueeze(-1)
    part = rate / (1 + rate)
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    square = rate.unsqueeze(-1)
    seen = square * cov_g + part.unsqueeze(-1) * mean_g.unsqueeze(-1) * mean_g.unsqueeze(-2)
    wide = eye + square * cov_u + part.unsqueeze(-1) * mean_u.unsqueeze(-1) * mean_u.unsqueeze(-2)
    covariance = _solve(seen, wide)
    shift = part * ((covariance @ mean_g.unsqueeze(-1)).squeeze(-1) + mean_u)
    root, info = torch.linalg.cholesky_ex(covariance.nan_to_num())
    good = (info == 0) & root.isfinite().all(-1).all(-1) & shift.isfinite().all(-1)
    new_loc = loc + (factor @ shift.unsqueeze(-1)).squeeze(-1)
    return (new_loc.where(good.unsqueeze(-1), loc),
            (factor @ root).where(good.reshape(-1, 1, 1), factor))


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = weight.sum(1).clamp(min=1)
    mean = (weight * x).sum(1) / total
    centred = weight * (x - mean.unsqueeze(1))
    return mean, centred.mT @ centred / total.unsqueeze(-1)


def _solve(seen: Tensor, wide: Tensor) -> Tensor:
    r"""Solution of :math:`\Sigma U \Sigma + \Sigma = V`.

    With :math:`V = RR^\top` it is :math:`R\, h(R^\top U R) R^\top`,
    :math:`h(m) = 2 / (1 + \sqrt{1 + 4m})`.
    """
    root = torch.linalg.cholesky_ex(wide).L
    values, vectors = torch.linalg.eigh((root.mT @ seen @ root).nan_to_num(0.0, 0.0, 0.0))
    shrunk = 2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt())
    turned = root @ vectors
    return (turned * shrunk.unsqueeze(-2)) @ turned.mT
