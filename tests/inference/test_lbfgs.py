"""L-BFGS from many starts: it arrives, it ends, and it keeps its path."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.inference.lbfgs import maximize
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, normal


class Counting:
    """A score that notes the shapes it was called with."""

    def __init__(self, function):
        self.score, self.shapes = Score(function), []

    def __call__(self, z):
        self.shapes.append(tuple(z.shape))
        return self.score(z)


def rosenbrock(z):
    return -(100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2)


def gamma(z):
    """Maximum at 3; no density at zero and below."""
    return (3 * z.log() - z).sum(-1)


def test_a_gaussian_of_condition_1e8_is_climbed_to_the_top():
    target = normal(torch.arange(10.0), covariance(10, 1e8))
    starts = torch.stack([target.loc + 5, torch.zeros(10, dtype=DOUBLE)])
    for path in maximize(Score(target.log_prob), starts, num_steps=500):
        assert path.log_p[-1] > target.log_prob(target.loc) - 0.01
        assert len(path.z) < 500


def test_the_valley_of_rosenbrock_is_followed_to_its_end():
    starts = torch.tensor([[-1.2, 1.0], [2.0, -2.0], [0.0, 0.0], [-5.0, 30.0]], dtype=DOUBLE)
    paths = maximize(Score(rosenbrock), starts)
    ends = torch.stack([path.z[-1] for path in paths])
    torch.testing.assert_close(ends, torch.ones_like(ends), rtol=0, atol=1e-3)
    assert max(len(path.z) for path in paths) < 100


def test_points_without_density_are_steps_too_far():
    starts = torch.tensor([[0.01, 50.0], [100.0, 1e-4]], dtype=DOUBLE)
    paths = maximize(Score(gamma), starts)
    for path in paths:
        assert path.log_p.isfinite().all()
        torch.testing.assert_close(path.z[-1], torch.full_like(path.z[-1], 3.0), rtol=0, atol=1e-3)


def test_a_start_without_density_has_no_path():
    starts = torch.tensor([[-1.0], [1.0], [0.0]], dtype=DOUBLE)
    paths = maximize(Score(gamma), starts)
    assert len(paths) == 1
    assert torch.equal(paths[0].z[0], starts[1])
    assert maximize(Score(gamma), -torch.ones(2, 1, dtype=DOUBLE)) == []


@pytest.mark.parametrize("function", [lambda z: z.sum(-1), lambda z: z.pow(3).sum(-1),
                                      lambda z: z.exp().sum(-1)], ids=["line", "cubic", "exp"])
def test_a_function_without_a_top_is_climbed_for_a_while_and_left(function):
    counting = Counting(function)
    path, = maximize(counting, torch.ones(1, 2, dtype=DOUBLE), num_steps=30)
    assert 1 < len(path.z) <= 31
    assert path.z.isfinite().all()
    assert path.log_p[-1] > 100
    assert len(counting.shapes) <= 1 + 30 * 25


def test_where_there_is_nowhere_to_go_the_path_is_its_start():
    start = torch.tensor([[1.0, 2.0]], dtype=DOUBLE)
    path, = maximize(Score(lambda z: 0 * z.sum(-1)), start)
    assert torch.equal(path.z, start)


def test_every_point_of_a_path_is_higher_and_carries_its_own_gradient():
    path, = maximize(Score(rosenbrock), torch.tensor([[-1.2, 1.0]], dtype=DOUBLE))
    assert (path.log_p.diff() > 0).all()
    log_p, gradient = Score(rosenbrock)(path.z)
    torch.testing.assert_close((path.log_p, path.gradient), (log_p, gradient))


def test_all_starts_are_scored_in_one_batch_and_go_where_they_go_alone():
    starts = torch.tensor([[-1.2, 1.0], [2.0, -2.0], [0.9, 0.9]], dtype=DOUBLE)
    counting = Counting(rosenbrock)
    together = maximize(counting, starts)
    assert set(counting.shapes) == {(3, 2)}
    for start, path in zip(starts, together, strict=True):
        alone, = maximize(Score(rosenbrock), start.unsqueeze(0))
        torch.testing.assert_close(path.z[:5], alone.z[:5])
        torch.testing.assert_close(path.z[-1], alone.z[-1], rtol=0, atol=1e-3)


def test_a_budget_of_steps_is_kept():
    path, = maximize(Score(rosenbrock), torch.tensor([[-1.2, 1.0]], dtype=DOUBLE), num_steps=3)
    assert len(path.z) == 4
