"""The Gaussian stage: one place or several, near or hidden, full or low-rank, or nowhere."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, kl_divergence

from pyro_nfvi.flows import FixedLinear, FixedLowRank
from pyro_nfvi.inference.initialization import (
    NUM_STARTS,
    flow_elbo,
    gaussian_start,
    starting_points,
)
from pyro_nfvi.inference.score import Score
from tests.inference.targets import (
    DOUBLE,
    covariance,
    gaussian_flow,
    log_joint_of,
    mixture,
    normal,
)


def boxes(dim, width=2.0):
    """Starts uniform between minus and plus ``width``."""
    return lambda count: width * (2 * torch.rand(count, dim, dtype=DOUBLE) - 1)


def start_of(function, dim, width=2.0, **kwargs):
    return gaussian_start(Score(function), boxes(dim, width), **kwargs)


def places(start):
    return torch.stack([flow.bijection.shift for flow in start.places])


# ------------------------------------------------------------------ places

def test_a_gaussian_is_one_place_and_found_exactly():
    target = normal(torch.arange(10.0), covariance(10, 1e4))
    start = start_of(target.log_prob, 10)
    flow, = start.places
    assert start.flow is flow
    q = normal(flow.bijection.shift, flow.bijection.lower @ flow.bijection.lower.T)
    assert kl_divergence(q, target) < 1e-3
    assert start.elbo[0] == pytest.approx(0.0, abs=1e-2)


@pytest.mark.parametrize("match", [False, True])
def test_a_skewed_density_is_one_place(match):
    start = start_of(lambda z: (3 * z - z.exp()).sum(-1), 3, match=match)
    assert len(start.places) == 1
    log_evidence = 3 * torch.tensor(3.0).lgamma()
    assert log_evidence - 0.5 < start.elbo[0] < log_evidence + 0.1  # 512 draws


@pytest.mark.parametrize("match", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_two_separated_modes_are_two_places_the_heavier_first(seed, match):
    torch.manual_seed(seed)
    parts = (normal(torch.full((3,), -4.0), covariance(3, 10.0)),
             normal(torch.full((3,), 4.0), covariance(3, 10.0, seed=1)))
    start = start_of(mixture([0.9, 0.1], *parts), 3, 8.0, match=match)
    expected = torch.stack([part.loc for part in parts])
    rough = 0.1 if match else 0.5  # Pathfinder alone, from few draws
    torch.testing.assert_close(places(start), expected, rtol=0, atol=rough)
    for found, weight in zip(start.elbo, (0.9, 0.1), strict=True):
        error = 0.05 if match else 1.0  # Pathfinder's own covariance is rough
        assert found == pytest.approx(torch.tensor(weight).log().item(), abs=error)


def test_two_bumps_that_hang_together_are_one_place():
    eye = torch.eye(2)
    bumps = mixture([0.5, 0.5], normal(torch.tensor([-1.2, 0.0]), eye),
                    normal(torch.tensor([1.2, 0.0]), eye))
    assert len(start_of(bumps, 2).places) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_mode_that_no_path_leads_to_is_found(seed):
    # Half the mass within 0.05 of (3, 3); from everywhere else the gradient leads to zero.
    torch.manual_seed(seed)
    narrow = normal(torch.full((2,), 3.0), 0.05 ** 2 * torch.eye(2))
    target = mixture([0.5, 0.5], normal(torch.zeros(2), torch.eye(2)), narrow)
    hidden = start_of(target, 2, match=False)
    assert len(hidden.places) == 1  # as long as nobody looks for it
    found = start_of(target, 2)
    assert len(found.places) == 2
    assert ((places(found) - 3.0).abs() < 0.05).all(-1).any()


def test_of_many_modes_the_best_come_first():
    centers = torch.tensor([[-7.0, -7.0], [-7.0, 7.0], [7.0, -7.0], [7.0, 7.0], [0.0, 0.0]])
    weights = [0.05, 0.1, 0.15, 0.3, 0.4]
    target = mixture(weights, *(normal(center, 0.3 * torch.eye(2)) for center in centers))
    start = start_of(target, 2, 10.0)
    torch.testing.assert_close(places(start), centers.flip(0).to(DOUBLE), rtol=0, atol=0.1)
    torch.testing.assert_close(torch.tensor(start.elbo), torch.tensor(weights[::-1]).log(),
                               rtol=0, atol=0.05)


# ------------------------------------------------------------------ forms

def test_above_the_limit_covariances_are_of_low_rank():
    dim = 30
    target = normal(torch.arange(30.0), covariance(dim, 100.0))
    start = start_of(target.log_prob, dim, max_full=20)
    assert isinstance(start.flow.bijection, FixedLowRank)
    assert start.elbo[0] > -20  # of a standard normal around the mean: below -500
    assert isinstance(start_of(target.log_prob, dim, max_full=30).flow.bijection, FixedLinear)


def test_a_log_joint_that_is_finite_nowhere_has_no_start():
    assert start_of(lambda z: z.sum(-1) * torch.nan, 2) is None


def test_a_log_joint_so_low_that_nats_are_lost_in_rounding_has_a_start():
    start = start_of(lambda z: -1e23 - z.square().sum(-1), 2)
    assert start.flow.bijection.shift.isfinite().all()


def test_a_log_joint_that_is_finite_at_few_starts_is_enough():
    def half(z):
        return (3 * z.log() - z).sum(-1)
    start = start_of(half, 2)
    assert len(start.places) == 1
    assert ((places(start) - 4).abs() < 1.5).all()


def test_the_elbo_of_the_target_itself_is_its_log_mass():
    target = normal(torch.arange(3.0), covariance(3, 10.0))
    score = Score(lambda z: target.log_prob(z) + 5.0)
    assert flow_elbo(score, gaussian_flow(target.loc, target.covariance_matrix)) == \
        pytest.approx(5.0)


# ------------------------------------------------------------------ starting points

class Improper(dist.ImproperUniform):
    """A flat prior, of which Pyro asks a first value."""

    def sample(self, sample_shape=()):
        return torch.randn(self.shape(sample_shape))


def far_away():
    pyro.sample("x", dist.Normal(1000.0, 1.0))
    pyro.sample("s", dist.Gamma(2.0, 1.0))


def flat():
    pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()),
                infer={})
    pyro.sample("s", dist.Gamma(2.0, 1.0))


def with_first_value():
    pyro.sample("x", Improper(constraints.real, (), ()))
    pyro.sample("s", dist.Gamma(2.0, 1.0))


def starts_of(log_joint, count=60):
    center = torch.tensor([0.25, -0.5], dtype=DOUBLE)
    points = starting_points(log_joint, center)(count)
    assert points.shape == (count, 2)
    assert points.dtype == DOUBLE
    assert points.isfinite().all()
    assert torch.equal(points[0], center)
    return points


def test_starts_are_the_center_two_boxes_and_draws_of_the_prior():
    points = starts_of(log_joint_of(far_away))
    prior = points[:, 0] > 900
    assert prior.sum() == 10
    box = points[~prior].abs()
    assert box.max() <= 10
    assert 18 <= (box > 2).any(-1).sum() <= 20
    assert starts_of(log_joint_of(far_away), NUM_STARTS).shape == (NUM_STARTS, 2)


def test_a_prior_that_cannot_be_drawn_from_leaves_the_boxes():
    log_joint = log_joint_of(with_first_value)
    log_joint.model = flat
    assert log_joint.prior_draw() is None
    assert starts_of(log_joint).abs().max() <= 10


def test_an_improper_prior_with_a_first_value_is_drawn_from():
    draw = log_joint_of(with_first_value).prior_draw()
    assert draw.shape == (2,)
    assert starts_of(log_joint_of(with_first_value)).abs().max() < 20


def test_starts_are_of_the_default_dtype_of_the_fit():
    log_joint = log_joint_of(far_away)
    points = starting_points(log_joint, torch.zeros(2, dtype=torch.float32))(12)
    assert points.dtype == torch.float32
