"""ELBO: the same value as Pyro's, and a gradient that is right and, at the optimum, exact."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_nfvi import ELBO, AutoFlow, planar
from pyro_nfvi.flows import Compose, Flow, Gaussian, Planar, StudentT, Triangular, nsf
from pyro_nfvi.inference import LogJoint
from pyro_nfvi.testing import perturb

DOUBLE = torch.float64
LOG_EVIDENCE = -3.0
both_gradients = pytest.mark.parametrize("path_gradient", [True, False], ids=["path", "total"])


def make_target():
    factor = torch.tensor([[0.8, 0.0, 0.0], [0.5, 1.2, 0.0], [-0.3, 0.4, 0.6]], dtype=DOUBLE)
    return MultivariateNormal(torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), scale_tril=factor)


def log_joint(z):
    return make_target().log_prob(z) + LOG_EVIDENCE


@torch.no_grad()
def exact_flow():
    affine, target = Triangular(3).double(), make_target()
    affine.shift.value.copy_(target.loc)
    affine.log_scale.value.copy_(target.scale_tril.diagonal().log())
    affine.lower.value.copy_(target.scale_tril.tril(-1))
    return Flow(affine, Gaussian(3).double())


def gaussian_of(flow):
    affine = flow.bijection
    return MultivariateNormal(affine.shift(None), scale_tril=affine._factor(None)[0])


def gradients(objective, flow, num_particles, repeats):
    parameters = list(flow.parameters())
    found = []
    for _ in range(repeats):
        elbo, _ = objective(flow, log_joint, num_particles)
        parts = torch.autograd.grad(elbo.mean(), parameters)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


# ------------------------------------------------------------------ the value

def two_sites(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, scale), obs=y)


@both_gradients
def test_the_value_equals_that_of_trace_elbo_within_standard_errors(path_gradient):
    y = torch.tensor([0.5, -1.0, 2.0])
    guide = AutoFlow(two_sites, planar, num_layers=2)
    perturb(guide.setup(y))
    ours, _ = ELBO(path_gradient)(guide._flow(), LogJoint(two_sites, (y,), {}, guide.layout), 4000)
    pyros = torch.tensor([-Trace_ELBO().loss(two_sites, guide, y) for _ in range(400)])
    error = (ours.var() / len(ours) + pyros.var() / len(pyros)) ** 0.5
    assert abs(ours.mean() - pyros.mean()) < 4 * error


@both_gradients
def test_the_value_is_the_log_evidence_less_the_divergence(path_gradient):
    flow = perturb(exact_flow(), 0.3)
    elbo, _ = ELBO(path_gradient)(flow, log_joint, 50_000)
    expected = LOG_EVIDENCE - kl_divergence(gaussian_of(flow), make_target())
    assert abs(elbo.mean() - expected) < 4 * elbo.std() / len(elbo) ** 0.5


@both_gradients
def test_an_exact_fit_gives_the_log_evidence_for_every_particle(path_gradient):
    elbo, _ = ELBO(path_gradient)(exact_flow(), log_joint, 100)
    torch.testing.assert_close(elbo, torch.full_like(elbo, LOG_EVIDENCE), rtol=0, atol=1e-12)


def test_both_gradients_have_the_same_value_and_particles():
    flow = perturb(Flow(nsf(3, num_layers=2))).double()
    results = []
    for path_gradient in (True, False):
        torch.manual_seed(5)
        results.append(ELBO(path_gradient)(flow, log_joint, 50))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@both_gradients
def test_there_is_one_estimate_for_each_particle(path_gradient):
    elbo, z = ELBO(path_gradient)(exact_flow(), log_joint, 7)
    assert (elbo.shape, z.shape) == ((7,), (7, 3))
    assert elbo.requires_grad


# ------------------------------------------------------------------ the gradient

def test_the_path_gradient_has_no_variance_at_an_exact_fit():
    flow = exact_flow()
    path = gradients(ELBO(), flow, 1, 20)
    total = gradients(ELBO(path_gradient=False), flow, 1, 20)
    assert path.abs().max() < 1e-12
    assert total.abs().max() > 0.1


@pytest.mark.parametrize("base", [Gaussian, StudentT], ids=["gaussian", "student-t"])
def test_the_path_gradient_has_no_variance_when_the_target_is_the_flow_itself(base):
    flow = perturb(Flow(Compose([Planar(3), Triangular(3)]), base(3)).double())
    target = Flow(Compose([Planar(3), Triangular(3)]), base(3)).double()
    target.load_state_dict(flow.state_dict())
    elbo, _ = ELBO()(flow, target.log_prob, 20)
    for part in torch.autograd.grad(elbo.sum(), list(flow.parameters())):
        assert part.abs().max() < 1e-8


@both_gradients
def test_the_gradient_is_unbiased_away_from_the_fit(path_gradient):
    flow = perturb(exact_flow(), 0.3)
    expected = torch.autograd.grad(-kl_divergence(gaussian_of(flow), make_target()),
                                   list(flow.parameters()))
    expected = torch.cat([part.flatten() for part in expected])
    found = gradients(ELBO(path_gradient), flow, 200, 200)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


def test_the_path_gradient_is_unbiased_for_a_nonlinear_flow():
    flow = perturb(Flow(Compose([Planar(3), Triangular(3)]))).double()
    path, total = (gradients(ELBO(kind), flow, 200, 150) for kind in (True, False))
    error = ((path.var(0) + total.var(0)) / len(path)) ** 0.5
    assert ((path.mean(0) - total.mean(0)).abs() <= 4 * error + 1e-12).all()


def test_an_objective_is_worth_printing_and_comparing():
    assert repr(ELBO()) == "ELBO(path_gradient=True)"
    assert ELBO() == ELBO(path_gradient=True) != ELBO(path_gradient=False)
