"""Pathfinder: the Gaussian that L-BFGS leaves behind, and which of them is best."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_nfvi.inference.pathfinder import (
    NUM_CANDIDATES,
    PathGaussian,
    _gaussian,
    _spread,
    pathfinder,
)
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, mixture, normal


def factored(alpha, s, y, z, gradient):
    loc, scale, directions, stretch = _gaussian(z, gradient, alpha, s, y)
    return PathGaussian(loc, scale, directions, stretch, 0.0, z, arrived=True)


def test_a_history_of_all_conjugate_directions_gives_mean_and_covariance_exactly():
    target = normal(torch.arange(6.0), covariance(6, 1e4))
    s = torch.linalg.eigh(target.covariance_matrix).eigenvectors
    y = target.precision_matrix @ s
    z, alpha = torch.randn(6, dtype=DOUBLE), torch.rand(6, dtype=DOUBLE) + 0.5
    gradient = target.precision_matrix @ (target.loc - z)
    found = factored(alpha, s, y, z, gradient)
    torch.testing.assert_close(found.covariance(), target.covariance_matrix)
    torch.testing.assert_close(found.loc, target.loc)


def test_any_history_gives_the_covariance_that_the_last_step_saw():
    target = normal(torch.zeros(6), covariance(6, 100.0))
    s = torch.randn(6, 3, dtype=DOUBLE)
    y = target.precision_matrix @ s
    found = factored(torch.rand(6, dtype=DOUBLE) + 0.5, s, y, s[:, 0], y[:, 0])
    torch.testing.assert_close(found.covariance() @ y[:, -1], s[:, -1])  # the secant equation


def test_without_a_history_the_covariance_is_the_diagonal():
    z, alpha = torch.randn(3, dtype=DOUBLE), torch.tensor([1.0, 4.0, 9.0], dtype=DOUBLE)
    found = factored(alpha, z.new_zeros(3, 0), z.new_zeros(3, 0), z, torch.ones_like(z))
    torch.testing.assert_close(found.covariance(), alpha.diag())
    torch.testing.assert_close(found.loc, z + alpha)


@pytest.mark.parametrize("seed", range(5))
def test_a_gaussian_target_is_recovered_up_to_a_nat(seed):
    torch.manual_seed(seed)
    target = normal(torch.arange(5.0), covariance(5, 100.0, seed))
    best, *_ = pathfinder(Score(target.log_prob), 3 * torch.randn(6, 5, dtype=DOUBLE))
    assert kl_divergence(normal(best.loc, best.covariance()), target) < 1
    assert best.arrived
    assert target.log_prob(best.mode) > target.log_prob(target.loc) - 0.01


def test_the_elbo_of_a_gaussian_is_that_of_its_draws():
    target = normal(torch.arange(4.0), covariance(4, 10.0))
    for found in pathfinder(Score(target.log_prob), torch.randn(4, 4, dtype=DOUBLE)):
        mine = normal(found.loc, found.covariance())
        z = mine.sample((4000,))
        terms = target.log_prob(z) - mine.log_prob(z)
        assert abs(found.elbo - terms.mean()) < 5 * terms.std() / 16 ** 0.5 + 1e-6


def test_distance_is_in_standard_deviations():
    target = normal(torch.zeros(5), covariance(5, 100.0))
    best, *_ = pathfinder(Score(target.log_prob), torch.randn(2, 5, dtype=DOUBLE))
    gap = torch.randn(5, dtype=DOUBLE)
    squared = gap @ torch.linalg.solve(best.covariance(), gap)
    assert best.distance(gap) == pytest.approx(squared.sqrt().item())


def test_the_best_place_comes_first():
    eye = torch.eye(2)
    light, heavy = normal(torch.full((2,), -10.0), eye), normal(torch.full((2,), 10.0), eye)
    score = Score(mixture([0.01, 0.99], light, heavy))
    starts = torch.tensor([[-9.0, -12.0], [11.0, 9.0], [-8.0, -9.0], [7.0, 9.0]], dtype=DOUBLE)
    found = pathfinder(score, starts)
    elbos = [gaussian.elbo for gaussian in found]
    assert elbos == sorted(elbos, reverse=True)
    assert [bool(g.mode[0] > 0) for g in found] == [True, True, False, False]


def test_a_flat_log_joint_gives_the_standard_normal_at_the_start():
    start = torch.tensor([[1.0, -2.0]], dtype=DOUBLE)
    found, = pathfinder(Score(lambda z: 0 * z.sum(-1) - 3.0), start)
    assert torch.equal(found.loc, start[0])
    torch.testing.assert_close(found.covariance(), torch.eye(2, dtype=DOUBLE))
    assert found.elbo == float("-inf")  # nothing is known, so that all else comes first
    assert not found.arrived


def test_a_path_that_is_on_its_way_to_infinity_has_not_arrived():
    found = pathfinder(Score(lambda z: z.sum(-1)), torch.zeros(1, 2, dtype=DOUBLE))
    assert not any(gaussian.arrived for gaussian in found)


def test_starts_without_density_are_left_out():
    score = Score(lambda z: (3 * z.log() - z).sum(-1))
    starts = torch.tensor([[-1.0], [2.0], [-3.0], [9.0]], dtype=DOUBLE)
    found = pathfinder(score, starts)
    assert len(found) == 2
    assert all(abs(g.mode - 3.0) < 0.01 for g in found)
    assert pathfinder(score, -torch.ones(3, 1, dtype=DOUBLE)) == []


@pytest.mark.parametrize("count", [1, NUM_CANDIDATES, NUM_CANDIDATES + 1, 200])
def test_candidates_are_spread_over_the_path_and_dense_at_its_end(count):
    chosen = _spread(count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= NUM_CANDIDATES
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    late = min(count, NUM_CANDIDATES // 2)
    assert chosen[-late:] == list(range(count - late, count))
    assert max(b - a for a, b in zip([-1, *chosen], chosen, strict=False)) <= 1 + count // 7


def test_paths_longer_than_the_candidates_keep_their_ends():
    def rosenbrock(z):
        return -(100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2)
    found, = pathfinder(Score(rosenbrock), torch.tensor([[-5.0, 25.0]], dtype=DOUBLE))
    torch.testing.assert_close(found.mode, torch.ones(2, dtype=DOUBLE), rtol=0, atol=1e-3)
    assert found.arrived
