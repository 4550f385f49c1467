"""Short Hamiltonian chains: they stay where the target is, and leave what it is not."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.inference.hmc import TARGET, short_chains
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, normal

NUM_CHAINS = 4000
COV = covariance(3, 100.0)


def log_gamma(z):
    """Gamma densities of shape 3, on the log scale: skewed, with one tail of an exponential."""
    return (3 * z - z.exp()).sum(-1)


def gamma_draws():
    return torch.distributions.Gamma(3.0, 1.0).sample((NUM_CHAINS, 2)).to(DOUBLE).log()


def gaussian_draws():
    return normal(torch.arange(3.0), COV).sample((NUM_CHAINS,))


def logistic(z):
    return (-z - 2 * torch.nn.functional.softplus(-z)).sum(-1)


def logistic_draws():
    u = torch.rand(NUM_CHAINS, 4, dtype=DOUBLE)
    return u.log() - (1 - u).log()


TARGETS = {"gaussian": (normal(torch.arange(3.0), COV).log_prob, gaussian_draws, COV),
           "log-gamma": (log_gamma, gamma_draws, 0.4 * torch.eye(2, dtype=DOUBLE)),
           "logistic": (logistic, logistic_draws, 3.3 * torch.eye(4, dtype=DOUBLE))}


def statistics(z):
    return torch.cat([z, z.square(), z.pow(3), (z > z.new_tensor(1.0)).to(z)], -1)


def z_scores(moves):
    return moves.mean(0) / (moves.std(0) / len(moves) ** 0.5)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("num_leapfrogs", [1, 8])
def test_exact_draws_stay_exact(name, num_leapfrogs):
    function, draw, cov = TARGETS[name]
    moved = short_chains(Score(function), draw(), torch.linalg.cholesky(cov), 10, num_leapfrogs)
    moves = statistics(moved.end) - statistics(moved.start)
    assert z_scores(moves[:, moves.std(0) > 0]).abs().max() < 4
    fresh = draw()
    z = (statistics(moved.end).mean(0) - statistics(fresh).mean(0)) / (
        2 * statistics(fresh).var(0) / NUM_CHAINS).sqrt()
    assert z.abs().max() < 4.5
    assert 0.5 < moved.acceptance < 1


def test_chains_forget_where_they_started():
    function, draw, cov = TARGETS["gaussian"]
    moved = short_chains(Score(function), draw(), torch.linalg.cholesky(cov), 20)
    both = torch.corrcoef(torch.stack([moved.start[:, 0], moved.end[:, 0]]))
    assert both[0, 1].abs() < 4 / NUM_CHAINS ** 0.5


@pytest.mark.parametrize("scale", [0.3, 2.0], ids=["too-narrow", "too-wide"])
def test_a_gaussian_of_wrong_width_gets_the_right_one(scale):
    target = normal(torch.zeros(3), torch.eye(3))
    start = scale * torch.randn(NUM_CHAINS, 3, dtype=DOUBLE)
    moved = short_chains(Score(target.log_prob), start, scale * torch.eye(3, dtype=DOUBLE), 30)
    variance = moved.end.var(0)
    assert ((variance - 1).abs() < 4.5 * (2 / NUM_CHAINS) ** 0.5).all()
    assert torch.equal(moved.start, start)


def test_draws_in_the_wrong_place_go_to_the_right_one():
    target = normal(torch.full((2,), 3.0), torch.eye(2))
    start = torch.randn(NUM_CHAINS, 2, dtype=DOUBLE)
    moved = short_chains(Score(target.log_prob), start, torch.eye(2, dtype=DOUBLE), 30)
    assert ((moved.end.mean(0) - 3).abs() < 4 / NUM_CHAINS ** 0.5).all()


def test_the_step_size_adapts_to_a_wrong_covariance():
    target = normal(torch.zeros(3), torch.eye(3))
    start = torch.randn(NUM_CHAINS, 3, dtype=DOUBLE)
    for factor in (20.0, 0.02):
        moved = short_chains(Score(target.log_prob), start,
                             factor * torch.eye(3, dtype=DOUBLE), 40)
        assert 0.3 * TARGET < moved.acceptance < 1
        correlation = torch.corrcoef(torch.stack([start[:, 0], moved.end[:, 0]]))[0, 1]
        assert correlation < 0.9


def test_chains_never_enter_where_there_is_no_density():
    def half(z):
        return (-z).sum(-1).where((z > 0).all(-1), z.new_tensor(-torch.inf))
    start = torch.distributions.Exponential(1.0).sample((NUM_CHAINS, 2)).to(DOUBLE)
    moved = short_chains(Score(half), start, torch.eye(2, dtype=DOUBLE), 20)
    assert (moved.end > 0).all()
    assert z_scores(moved.end - moved.start).abs().max() < 4
    assert (moved.end != moved.start).any(-1).double().mean() > 0.9


def test_a_seed_reproduces_the_chains():
    function, draw, cov = TARGETS["gaussian"]
    start, ends = draw()[:50], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ends.append(short_chains(Score(function), start, torch.linalg.cholesky(cov), 3).end)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_gradients_are_spent_as_announced():
    function, draw, cov = TARGETS["gaussian"]
    score = Score(function)
    short_chains(score, draw()[:10], torch.linalg.cholesky(cov), 50, 4)
    assert 10 * (1 + 50 * 3) < score.evaluations < 10 * (1 + 50 * 5)
