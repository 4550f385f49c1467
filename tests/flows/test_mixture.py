"""MixtureOfFlows: the density of its parts, draws in proportion, and nothing that is learned."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import distributions as td

from pyro_nfvi.flows import (
    Compose,
    Diagonal,
    Flow,
    Gaussian,
    LowRank,
    LULinear,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    Planar,
    StudentT,
    Triangular,
    nsf,
)
from pyro_nfvi.testing import perturb

NUM_SAMPLES = 200_000
WEIGHTS = [0.2, 0.5, 0.3]


def make_parts(input_dim: int = 2) -> list[Flow]:
    """Flows of three kinds, away from where they start."""
    return [perturb(flow, 1.0) for flow in (
        Flow(Triangular(input_dim)), Flow(Diagonal(input_dim), StudentT(input_dim, df=9.0)),
        Flow(LowRank(input_dim, rank=1), MultivariateStudentT(input_dim, df=9.0)))]


def make_mixture(input_dim: int = 2) -> MixtureOfFlows:
    return MixtureOfFlows(make_parts(input_dim), WEIGHTS).double()


def assert_means(values: torch.Tensor, expected: torch.Tensor) -> None:
    """The mean of independent rows lies within four standard errors of what is expected."""
    error = values.std(0) / len(values) ** 0.5
    assert (error > 0).any()
    assert ((values.mean(0) - expected).abs() <= 4 * error + 1e-10).all()


# ------------------------------------------------------------------ a density

@pytest.mark.parametrize("batch", [(), (5,), (4, 5), (0,)], ids=str)
def test_its_density_is_the_weighted_sum_of_those_of_its_flows(batch):
    mixture = make_mixture()
    u = 3 * torch.randn(*batch, 2).double()
    density = sum(w * flow.log_prob(u).exp()
                  for w, flow in zip(WEIGHTS, mixture.flows, strict=True))
    assert mixture.log_prob(u).shape == batch
    torch.testing.assert_close(mixture.log_prob(u), density.log())


def test_it_is_the_mixture_of_gaussians_of_torch():
    layers = [perturb(layer(3), 1.0) for layer in (Triangular, Diagonal, LowRank, LULinear)]
    mixture = MixtureOfFlows([Flow(layer) for layer in layers], [4.0, 3.0, 2.0, 1.0]).double()
    factors = torch.stack([layer.double().factor() for layer in layers]).detach()
    parts = td.MultivariateNormal(torch.stack([layer.shift() for layer in layers]).detach(),
                                  factors @ factors.mT)
    truth = td.MixtureSameFamily(td.Categorical(torch.tensor([0.4, 0.3, 0.2, 0.1]).double()), parts)
    u = 3 * torch.randn(100, 3).double()
    torch.testing.assert_close(mixture.log_prob(u), truth.log_prob(u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixture.mean, truth.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixture.variance, truth.variance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("input_dim", [1, 2])
def test_its_density_integrates_to_one(input_dim):
    mixture = make_mixture(input_dim)
    side = torch.linspace(-40, 40, 801).double()
    points = torch.cartesian_prod(*[side] * input_dim).reshape(-1, input_dim)
    mass = mixture.log_prob(points).exp().sum() * (side[1] - side[0]) ** input_dim
    assert mass.item() == pytest.approx(1, abs=1e-4)


def test_a_far_point_has_a_finite_density_and_slope():
    mixture = MixtureOfFlows(make_parts()[:1] * 2, [1.0, 1e-30])
    u = torch.full((2,), 1e4, requires_grad=True)
    log_prob = mixture.log_prob(u)
    slope, = torch.autograd.grad(log_prob, u)
    assert log_prob.isfinite()
    assert slope.isfinite().all()


# ------------------------------------------------------------------ draws

def test_it_draws_its_flows_in_proportion():
    parts = [Flow(Diagonal(1)) for _ in WEIGHTS]
    for centre, part in zip((-100.0, 0.0, 100.0), parts, strict=True):
        part.bijection.shift.value.data.fill_(centre)
    u = MixtureOfFlows(parts, WEIGHTS).rsample((NUM_SAMPLES,)).squeeze(-1)
    for centre, weight in zip((-100, 0, 100), WEIGHTS, strict=True):
        share = ((u - centre).abs() < 50).double().mean().item()
        assert abs(share - weight) <= 4 * math.sqrt(weight * (1 - weight) / NUM_SAMPLES)


def test_every_coordinate_of_a_draw_is_of_the_same_flow():
    parts = [Flow(Diagonal(3)), Flow(Diagonal(3))]
    parts[1].bijection.shift.value.data.fill_(100.0)
    far = MixtureOfFlows(parts, [1.0, 1.0]).rsample((4, 500)) > 50
    assert (far.all(-1) | ~far.any(-1)).all()


def test_draws_have_its_moments():
    mixture = make_mixture()
    u = mixture.rsample((NUM_SAMPLES,))
    assert_means(u, mixture.mean)
    assert_means((u - mixture.mean).square(), mixture.variance)


GENERAL = {"planar": lambda: Flow(Compose([Planar(2), Diagonal(2)])),
           "spline": lambda: Flow(nsf(2, num_layers=2)),
           "mixture-base": lambda: Flow(Triangular(2), Mixture(2, 2, spread=1.0)),
           "mixture-of-mixtures": lambda: Flow(Triangular(2), make_mixture().float())}


@pytest.mark.parametrize("name", GENERAL)
def test_moments_without_a_closed_form_are_estimated(name):
    mixture = MixtureOfFlows([perturb(GENERAL[name]()), Flow(Diagonal(2))], [0.6, 0.4]).double()
    state = torch.get_rng_state()
    mean, variance = mixture.mean, mixture.variance
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mixture.mean, mean)
    assert torch.equal(mixture.variance, variance)
    u = mixture.rsample((NUM_SAMPLES,))
    for values, estimate in ((u, mean), ((u - mean).square(), variance)):
        error = values.std(0) * (1 / NUM_SAMPLES + 1 / 10_000) ** 0.5
        assert ((values.mean(0) - estimate).abs() <= 4 * error).all()


def test_moments_are_infinite_where_a_tail_is_too_heavy():
    parts = [Flow(Triangular(2), StudentT(2, df=[1.5, 5.0])), Flow(Diagonal(2))]
    variance = MixtureOfFlows(parts, [0.5, 0.5]).variance
    assert variance[0].isinf()
    assert variance[1].item() == pytest.approx(0.5 * 5 / 3 + 0.5)


# ------------------------------------------------------------------ nothing is learned

def test_it_has_no_parameters_but_all_the_state():
    parts = make_parts()
    mixture = MixtureOfFlows(parts, WEIGHTS)
    assert not list(mixture.parameters())
    mixture.requires_grad_(True)
    assert not mixture.log_prob(torch.zeros(2)).requires_grad
    assert not mixture.rsample((3,)).requires_grad
    kept = {name for name in mixture.state_dict() if name.startswith("flows.0.")}
    assert kept == {f"flows.0.{name}" for name in parts[0].state_dict()}


def test_it_keeps_copies_of_its_flows():
    parts = make_parts()
    mixture = MixtureOfFlows(parts, WEIGHTS)
    u = torch.randn(5, 2)
    before = mixture.log_prob(u)
    for part in parts:
        perturb(part, 1.0)
        assert all(p.requires_grad for p in part.parameters())
    assert torch.equal(mixture.log_prob(u), before)


@pytest.mark.parametrize("path", [False, True], ids=["total", "path"])
def test_a_flow_on_it_learns_its_own_bijection(path):
    flow = Flow(Diagonal(2), base=make_mixture().float())
    target = copy.deepcopy(flow).requires_grad_(False)
    perturb(flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    start = copy.deepcopy(flow.base.state_dict())
    draw = flow.rsample_and_path_log_prob if path else flow.rsample_and_log_prob
    losses = []
    for _ in range(200):
        z, log_q = draw((256,))
        losses.append((log_q - target.log_prob(z)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[-1].item()) < 0.02 < losses[0].item()
    for name, value in flow.base.state_dict().items():
        assert torch.equal(value, start[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_triangular_part_inverts_as_it_did(dtype):
    part = Flow(Triangular(30)).to(dtype)
    with torch.no_grad():
        part.bijection.lower.value.normal_()
        part.bijection.log_scale.value.normal_().add_(2)
    u = part().sample((100,))
    rtol = torch.finfo(dtype).eps ** 0.5
    torch.testing.assert_close(MixtureOfFlows([part], [1.0]).log_prob(u), part.log_prob(u),
                               rtol=rtol, atol=rtol)


# ------------------------------------------------------------------ a module

@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])
def test_it_copies_and_reloads(how):
    mixture = make_mixture()
    u = torch.randn(4, 2).double()
    torch.testing.assert_close(how(mixture).log_prob(u), mixture.log_prob(u))
    fresh = MixtureOfFlows(make_parts(), [1.0, 1.0, 1.0]).double()
    fresh.load_state_dict(mixture.state_dict())
    assert torch.equal(fresh.weights, mixture.weights)
    torch.testing.assert_close(fresh.log_prob(u), mixture.log_prob(u))


def test_it_follows_the_dtype():
    mixture = make_mixture()
    for dtype in (torch.float32, torch.float64):
        mixture.to(dtype)
        u = mixture.rsample((3,))
        for result in (u, mixture.log_prob(u), mixture.mean, mixture.variance, mixture.weights):
            assert result.dtype == dtype


def test_weights_may_be_of_any_scale_and_form():
    for weights in ([2, 6], (2.0, 6.0), torch.tensor([2.0, 6.0])):
        mixture = MixtureOfFlows(make_parts()[:2], weights)
        torch.testing.assert_close(mixture.weights, torch.tensor([0.25, 0.75]))


def test_its_repr_shows_the_weights():
    assert repr(MixtureOfFlows([Flow(Diagonal(2), Gaussian(2))], [3.0])).startswith(
        "MixtureOfFlows(\n  2, weights=[1]\n  (flows)")
