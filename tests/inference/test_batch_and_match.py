"""Batch and match: Gaussians are found exactly, others improved, bad draws left out."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_nfvi.inference.batch_and_match import _solve, _step, batch_and_match
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, normal


def standard(count, dim):
    return torch.zeros(count, dim, dtype=DOUBLE), torch.eye(dim, dtype=DOUBLE).repeat(count, 1, 1)


def whitened(target, loc, factor):
    """Mean and covariance in coordinates in which the target is standard."""
    lower = target.scale_tril
    root = torch.linalg.solve_triangular(lower, factor, upper=False)
    gap = torch.linalg.solve_triangular(lower, (loc - target.loc).unsqueeze(-1), upper=False)
    return gap.squeeze(-1), root @ root.mT


def skewed(z):
    """Gamma densities of shape 5 and rate 2, on the log scale, each with its Jacobian."""
    return (5 * z - 2 * z.exp()).sum(-1)


def elbo(function, loc, factor, num_draws=4000):
    q = MultivariateNormal(loc, scale_tril=factor)
    z = q.sample((num_draws,))
    terms = function(z) - q.log_prob(z)
    return terms.mean(), terms.std() / num_draws ** 0.5


def test_the_equation_is_solved():
    a, b = torch.randn(2, 4, 6, 6, dtype=DOUBLE)
    seen, wide = a @ a.mT, b @ b.mT + 0.1 * torch.eye(6, dtype=DOUBLE)
    seen[0] = 0  # no score seen: the covariance is V
    covariances = _solve(seen, wide)
    torch.testing.assert_close(covariances @ seen @ covariances + covariances, wide)
    torch.testing.assert_close(covariances[0], wide[0])
    assert (torch.linalg.eigvalsh(covariances) > 0).all()


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
def test_a_correlated_gaussian_is_recovered_in_mean_and_covariance(condition):
    target = normal(torch.arange(20.0), covariance(20, condition))
    loc, factor = batch_and_match(Score(target.log_prob), *standard(1, 20))
    mean, cov = whitened(target, loc[0], factor[0])
    assert mean.norm() < 0.01
    torch.testing.assert_close(cov, torch.eye(20, dtype=DOUBLE), rtol=0, atol=0.01)


def test_a_gaussian_that_is_already_right_stays():
    target = normal(torch.arange(5.0), covariance(5, 100.0))
    loc, factor = batch_and_match(Score(target.log_prob), target.loc.unsqueeze(0),
                                  target.scale_tril.unsqueeze(0))
    torch.testing.assert_close(loc[0], target.loc)
    torch.testing.assert_close(factor[0], target.scale_tril)


def test_a_step_of_several_is_the_step_of_each():
    loc, factor = torch.randn(3, 4, dtype=DOUBLE), torch.randn(3, 4, 4, dtype=DOUBLE).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.5)
    u, gradient = torch.randn(2, 3, 16, 4, dtype=DOUBLE)
    finite = torch.rand(3, 16) > 0.2
    rate = torch.tensor([0.5, 2.0, 100.0], dtype=DOUBLE)
    together = _step(loc, factor, u, gradient, finite, rate)
    for i in range(3):
        alone = _step(*(a[i:i + 1] for a in (loc, factor, u, gradient, finite, rate)))
        torch.testing.assert_close([a[i:i + 1] for a in together], list(alone))


def test_several_at_once_reach_what_each_reaches_alone():
    score = Score(skewed)
    locs = torch.tensor([[0.0, 0.0, 0.0], [2.0, 1.0, -1.0], [-1.0, -1.0, 2.0]], dtype=DOUBLE)
    factors = torch.tensor([0.2, 0.5, 1.0], dtype=DOUBLE).reshape(3, 1, 1) * standard(3, 3)[1]
    together = batch_and_match(score, locs, factors)
    for i in range(3):
        alone = batch_and_match(score, locs[i:i + 1], factors[i:i + 1])
        (one, error), (other, _) = (elbo(skewed, loc, factor) for loc, factor in (
            (together[0][i], together[1][i]), (alone[0][0], alone[1][0])))
        assert abs(one - other) < 4 * 2 ** 0.5 * error + 0.05  # noise of 64 draws a step


def test_a_skewed_density_is_matched_near_its_moments():
    loc, factor = batch_and_match(Score(skewed), *standard(1, 3))
    mean = torch.digamma(torch.tensor(5.0, dtype=DOUBLE)) - torch.tensor(2.0).log()
    variance = torch.polygamma(1, torch.tensor(5.0, dtype=DOUBLE))
    assert ((loc[0] - mean).abs() < 0.3 * variance.sqrt()).all()
    found = (factor[0] @ factor[0].T).diagonal()
    assert ((found / variance).log().abs() < 0.5).all()


def test_draws_without_density_are_left_out():
    def gamma(z):
        return (3 * z.log() - z).sum(-1)
    score = Score(gamma)
    start = 2 * torch.ones(1, 2, dtype=DOUBLE), 2 * standard(1, 2)[1]
    loc, factor = batch_and_match(score, *start)
    assert score.non_finite > 0
    assert loc.isfinite().all()
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    q = normal(loc[0], factor[0] @ factor[0].T)
    assert (q.sample((1000,)) > 0).double().mean() > 0.9
    assert (loc - 4).abs().max() < 1.5  # the mean; the mode is at 3


def test_where_nothing_has_a_density_the_start_comes_back():
    start = standard(2, 3)
    loc, factor = batch_and_match(Score(lambda z: z.sum(-1) * torch.nan), *start)
    assert torch.equal(loc, start[0])
    assert torch.equal(factor, start[1])


def test_the_result_is_no_worse_than_the_start():
    start = standard(1, 3)
    loc, factor = batch_and_match(Score(skewed), *start)
    before, first = elbo(skewed, start[0][0], start[1][0])
    after, second = elbo(skewed, loc[0], factor[0])
    assert after - before > 4 * (first ** 2 + second ** 2).sqrt()


def test_a_search_that_gains_nothing_ends_early():
    target = normal(torch.zeros(2), torch.eye(2))
    score = Score(target.log_prob)
    batch_and_match(score, *standard(1, 2), num_steps=400)
    assert score.evaluations < 100 * 64
