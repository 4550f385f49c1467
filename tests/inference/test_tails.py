"""Tails: heavy ones get noise of Student's t, Gaussian ones keep theirs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import StudentT as TorchStudentT

from pyro_nfvi.flows import (
    FixedLinear,
    Flow,
    Gaussian,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    StudentT,
)
from pyro_nfvi.inference import tails
from pyro_nfvi.inference.importance import importance_sample
from pyro_nfvi.inference.tails import heavier_tails
from tests.inference.targets import DOUBLE, covariance, gaussian_flow, normal

WANTED = 0.5
LOC, COV = torch.arange(3, dtype=DOUBLE), covariance(3, 10.0)


def heavy(flow, target, num_draws=10_000):
    """The flow that is chosen, and draws of both."""
    before = importance_sample(flow, target, num_draws)
    chosen = heavier_tails(flow, target, before, WANTED)
    return chosen, before, importance_sample(chosen, target, num_draws)


def elliptical(df):
    """A t density with the location and the scatter of the flow."""
    return Flow(FixedLinear(LOC, torch.linalg.cholesky(COV)),
                MultivariateStudentT(3, df).to(DOUBLE)).log_prob


def independent(df):
    """Independent t densities, in directions of the coordinates."""
    return lambda z: TorchStudentT(torch.tensor(df, dtype=DOUBLE)).log_prob(z).sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_an_elliptical_t_target_gets_elliptical_t_noise(seed):
    torch.manual_seed(seed)
    flow = gaussian_flow(LOC, 1.5 * COV)
    chosen, before, after = heavy(flow, elliptical(3.0))
    assert isinstance(chosen.base, MultivariateStudentT)
    assert chosen.bijection is flow.bijection
    assert before.pareto_k > WANTED > after.pareto_k
    assert after.ess > before.ess


@pytest.mark.parametrize("seed", range(3))
def test_independent_heavy_tails_get_t_noise(seed):
    torch.manual_seed(seed)
    flow = gaussian_flow(torch.zeros(3, dtype=DOUBLE), 1.5 * torch.eye(3, dtype=DOUBLE))
    chosen, before, after = heavy(flow, independent(3.0))
    assert isinstance(chosen.base, StudentT)
    assert before.pareto_k > WANTED > after.pareto_k


@pytest.mark.parametrize("scale", [1.0, 1.2], ids=["exact", "too-wide"])
def test_a_gaussian_target_keeps_the_gaussian(scale):
    target = normal(LOC, COV)
    flow = gaussian_flow(LOC, scale * COV)
    chosen, *_ = heavy(flow, target.log_prob)
    assert chosen is flow


def test_every_place_of_a_mixture_gets_heavier_tails():
    eye = torch.eye(2, dtype=DOUBLE)
    places = [gaussian_flow(torch.full((2,), center, dtype=DOUBLE), 1.5 * eye)
              for center in (-30.0, 30.0)]
    base = MixtureOfFlows(places, [0.3, 0.7]).to(DOUBLE)
    flow = Flow(FixedLinear(torch.zeros(2, dtype=DOUBLE), eye), base)

    def target(z):
        parts = [MultivariateStudentT(2, 3.0).to(DOUBLE).log_prob(z - c) for c in (-30.0, 30.0)]
        return torch.logsumexp(torch.stack(parts, -1) + torch.tensor([0.3, 0.7]).log(), -1)
    chosen, before, after = heavy(flow, target)
    assert [type(part.base) for part in chosen.base.flows] == [MultivariateStudentT] * 2
    assert torch.equal(chosen.base.weights, base.weights)
    assert before.pareto_k > WANTED > after.pareto_k


@pytest.mark.parametrize("make", [lambda: StudentT(3, 5.0), lambda: StudentT(3, learn=True),
                                  lambda: MultivariateStudentT(3, 30.0),
                                  lambda: Mixture(3, num_components=2)],
                         ids=["t", "learned-t", "elliptical-t", "mixture"])
def test_other_noise_is_left_alone(make):
    flow = Flow(FixedLinear(LOC, torch.linalg.cholesky(COV)), make().to(DOUBLE))
    chosen, *_ = heavy(flow, elliptical(2.0), 1000)
    assert chosen is flow


def pretended(pareto_k, ess, elbo=0.0):
    """What is known of some draws."""
    return SimpleNamespace(pareto_k=pareto_k, ess=ess, num_samples=100, elbo=(elbo, 0.0))


GAUSSIAN = pretended(0.8, 50)


@pytest.mark.parametrize(("seen", "choice"), [
    ({"t-30": pretended(0.4, 60), "t-10": pretended(0.1, 55), "t-3": pretended(0.6, 90)}, "t-30"),
    ({"t-30": pretended(0.7, 90), "t-3": pretended(0.6, 60)}, "t-3"),
    ({"t-10": pretended(0.4, 95, elbo=-0.6), "t-3": pretended(0.3, 60, elbo=-0.4)}, "t-3"),
    ({"t-10": pretended(0.9, 95)}, "gaussian"),
], ids=["most-effective-of-the-good", "lowest-k-if-none-is-good", "not-at-the-cost-of-much-elbo",
        "none-is-better"])
def test_the_choice_is_by_k_hat_first_and_by_effective_draws_then(monkeypatch, seen, choice):
    def sample(flow, *args):
        elliptical = isinstance(flow.base, MultivariateStudentT)
        return seen.get(f"t-{flow.base.df:.0f}" if elliptical else "", pretended(2.0, 1))
    monkeypatch.setattr(tails, "importance_sample", sample)
    flow = gaussian_flow(LOC, COV)
    chosen = heavier_tails(flow, None, GAUSSIAN, WANTED)
    if choice == "gaussian":
        assert chosen is flow
    else:
        assert f"t-{chosen.base.df:.0f}" == choice


def test_the_choice_is_on_a_gaussian_base_of_the_flows_type():
    flow = gaussian_flow(LOC, 1.5 * COV)
    assert type(flow.base) is Gaussian
    chosen, *_ = heavy(flow, elliptical(3.0))
    assert chosen.base.zeros.dtype == DOUBLE
