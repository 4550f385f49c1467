"""Drift: an exact fit passes; mass that hangs together with a fit but is not in it is found."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi.flows import FixedLinear, Flow
from pyro_nfvi.flows.base import Base
from pyro_nfvi.inference.drift import (
    FEWEST_CHAINS,
    FEWEST_TRANSITIONS,
    MOST_CHAINS,
    MOST_TRANSITIONS,
    Drift,
    _affordable,
    drift,
)
from pyro_nfvi.inference.importance import importance_sample
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, gaussian_flow, log_joint_of

COV = covariance(3, 10.0)


def gaussian_model():
    """Sites of one coordinate and of two, jointly normal."""
    a = pyro.sample("first", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    b = pyro.sample("second", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    z = torch.cat([a, b])
    pyro.factor("rest", dist.MultivariateNormal(torch.zeros(3), COV).log_prob(z)
                - dist.Normal(0.0, 1.0).log_prob(z).sum())


def independent():
    pyro.sample("first", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    pyro.sample("second", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def funnel():
    width = pyro.sample("width", dist.Normal(0.0, 2.0))
    pyro.sample("inside", dist.Normal(torch.zeros(3), (width / 2).exp()).to_event(1))


class HalfNormal(Base):
    """Normal noise whose last coordinate stays on one side."""

    def __init__(self, input_dim, limit):
        super().__init__(input_dim)
        self.limit = limit
        self.mass = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(limit, dtype=DOUBLE))

    def rsample(self, sample_shape=()):
        u = torch.randn(*sample_shape, self.input_dim, dtype=DOUBLE)
        low = torch.rand(*sample_shape, dtype=DOUBLE) * self.mass
        u[..., -1] = torch.distributions.Normal(0.0, 1.0).icdf(low)
        return u

    def log_prob(self, u):
        log_q = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(-1) - self.mass.log()
        return log_q.where(u[..., -1] <= self.limit, log_q.new_tensor(-torch.inf))

    mean = variance = property(lambda self: self.zeros)


def drift_of(model, flow, budget=2e7):
    log_joint = log_joint_of(model)
    sample = importance_sample(flow, log_joint, 10_000)
    score = Score(log_joint)
    score(sample.z[:100])  # so that the work is known
    return drift(score, flow, sample, log_joint.layout, budget), sample


def exact():
    return gaussian_flow(torch.zeros(3, dtype=DOUBLE), COV)


@pytest.mark.parametrize("budget", [1e4, 3e5, pytest.param(2e7, marks=pytest.mark.slow)],
                         ids=["few-gradients", "some", "many"])
def test_an_exact_fit_does_not_drift(budget):
    alarms = 0
    for seed in range(20):
        torch.manual_seed(seed)
        alarms += drift_of(gaussian_model, exact(), budget)[0].found
    assert alarms <= 1  # two in twenty happen twice in ten thousand times


def test_a_fit_that_weights_put_right_does_not_drift():
    alarms = 0
    for seed in range(10):
        torch.manual_seed(seed)
        alarms += drift_of(gaussian_model, gaussian_flow(
            torch.full((3,), 0.1, dtype=DOUBLE), 1.5 * COV), 1e6)[0].found
    assert alarms <= 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("site", ["first", "second"])
def test_a_guide_cut_off_within_the_mass_is_found_and_its_site_named(seed, site):
    # A sixth of the mass is beyond the cut. Every draw has the same weight: they see nothing.
    torch.manual_seed(seed)
    order = [2, 1, 0] if site == "first" else [0, 1, 2]
    flow = Flow(FixedLinear(torch.zeros(3, dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)),
                Turned(HalfNormal(3, 1.0), order).to(DOUBLE))
    found, sample = drift_of(independent, flow)
    assert sample.ess > 9999
    assert found.found
    assert found.z_score > found.limit
    assert found.site == site
    assert found.size > 0.1
    assert f"at site {site!r}" in str(found)


class Turned(Base):
    """Noise in another order of its coordinates, which is its own inverse."""

    def __init__(self, base, order):
        super().__init__(base.input_dim)
        self.base, self.order = base, order

    def rsample(self, sample_shape=()):
        return self.base.rsample(sample_shape)[..., self.order]

    def log_prob(self, u):
        return self.base.log_prob(u[..., self.order])

    mean = variance = property(lambda self: self.zeros)


@pytest.mark.parametrize("seed", range(3))
def test_a_guide_that_is_too_narrow_along_one_site_is_found(seed):
    # Ten times too narrow: no weighting brings back what no draw has reached.
    torch.manual_seed(seed)
    cov = torch.tensor([0.01, 1.0, 1.0], dtype=DOUBLE).diag()
    found, _ = drift_of(independent, gaussian_flow(torch.zeros(3, dtype=DOUBLE), cov))
    assert found.found
    assert found.site == "first"


@pytest.mark.parametrize("seed", range(3))
def test_a_guide_without_the_neck_of_a_funnel_is_found(seed):
    torch.manual_seed(seed)
    flow = gaussian_flow(torch.tensor([2.0, 0.0, 0.0, 0.0], dtype=DOUBLE),
                         torch.tensor([0.5, 2.0, 2.0, 2.0], dtype=DOUBLE).diag())
    assert drift_of(funnel, flow)[0].found


def test_the_chains_are_as_many_as_can_be_paid():
    for gradients in (1.0, 1e3, 1e4, 1e5, 1e6, 1e12):
        chains, transitions, leapfrogs = _affordable(gradients)
        assert FEWEST_CHAINS <= chains <= MOST_CHAINS
        assert FEWEST_TRANSITIONS <= transitions <= MOST_TRANSITIONS
        least = FEWEST_CHAINS * FEWEST_TRANSITIONS * leapfrogs
        assert chains * transitions * leapfrogs <= max(gradients, least)
    assert _affordable(1e12)[:2] == (MOST_CHAINS, MOST_TRANSITIONS)


def test_a_move_within_the_limit_is_no_drift():
    assert not Drift("x", 3.9, 4.0, 0.1).found
    assert Drift("x", 4.1, 4.0, 0.1).found
    assert str(Drift("x", 4.1, 4.0, 0.1)).endswith("(4.1 standard errors), most at site 'x' "
                                                   "(by 0.10 sd)")
