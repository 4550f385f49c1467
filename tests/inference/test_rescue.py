"""Rescue: chains that have the posterior as their limit, whatever the guide."""

from __future__ import annotations

import math
import sys
import time
import warnings
from functools import partial

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam

from pyro_nfvi import NFVI, AutoFlow, AutoPathfinder, AutoSpline
from pyro_nfvi.flows import Diagonal, Flow, Gaussian
from pyro_nfvi.inference import Chains, LogJoint, metropolis, neutra
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.testing import perturb
from tests.inference.targets import DOUBLE, covariance, gaussian_flow, log_joint_of, normal

LOC, COV = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), covariance(3, 20.0)
TARGET = normal(LOC, COV)
Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])


def assert_moments(draws, mean, deviation):
    """Mean and sd ``(K,)`` of chains ``(chain, draw, K)`` within four standard errors."""
    for k, x in enumerate(np.moveaxis(np.asarray(draws, float), -1, 0)):
        assert abs(x.mean() - float(mean[k])) < 4 * arviz.mcse(x, method="mean"), k
        assert abs(x.std() - float(deviation[k])) < 4 * arviz.mcse(x, method="sd"), k


def assert_converged(draws):
    """R-hat and ESS as a user would want them."""
    for x in np.moveaxis(np.asarray(draws, float), -1, 0):
        assert arviz.rhat(x) < 1.02
        assert arviz.ess(x) > 100


def kept_random_state(function):
    """Whether a call leaves the global random state as it was."""
    before = torch.get_rng_state()
    function()
    return torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------ Metropolis-Hastings

@pytest.mark.parametrize(("shift", "scale"), [(0.0, 2.0), (1.0, 1.7), (-0.5, 1.5)])
def test_metropolis_finds_a_gaussian_from_a_wrong_one(shift, scale):
    away = shift * torch.linalg.cholesky(COV) @ torch.ones(3, dtype=DOUBLE)
    flow = gaussian_flow(LOC + away, scale ** 2 * COV)
    chains = metropolis(flow, TARGET.log_prob, num_draws=2000, seed=0)
    assert_moments(chains.z, LOC, COV.diagonal().sqrt())
    assert_converged(chains.z)
    assert 0.1 < chains.acceptance_rate < 0.9


def test_metropolis_in_one_dimension_and_single_precision():
    flow = Flow(Diagonal(1), Gaussian(1))
    chains = metropolis(flow, lambda z: torch.distributions.Normal(0.5, 0.8).log_prob(z).sum(-1),
                        num_chains=2, num_draws=2000, seed=1)
    assert chains.z.shape == (2, 2000, 1)
    assert chains.z.dtype == torch.float32
    assert_moments(chains.z, [0.5], [0.8])


def test_every_draw_of_an_exact_flow_is_accepted():
    chains = metropolis(gaussian_flow(LOC, COV), TARGET.log_prob, seed=0)
    assert chains.acceptance_rate == pytest.approx(1, abs=1e-9)
    assert chains.stats["accepted"].all()


def test_statistics_of_metropolis_are_those_of_its_draws():
    flow = gaussian_flow(LOC, 2 * COV)
    chains = metropolis(flow, lambda z: TARGET.log_prob(z) + 3, num_chains=3, seed=0)
    torch.testing.assert_close(chains.stats["lp"], TARGET.log_prob(chains.z) + 3)
    torch.testing.assert_close(chains.stats["log_q"], flow.log_prob(chains.z).detach())
    moved = (chains.z[:, 1:] != chains.z[:, :-1]).any(-1)
    assert torch.equal(moved, chains.stats["accepted"][:, 1:])
    assert {tuple(value.shape) for value in chains.stats.values()} == {(3, 1000)}
    chance = chains.stats["acceptance_rate"]
    error = (chance * (1 - chance)).sum().sqrt()
    assert abs(chance.sum() - chains.stats["accepted"].sum()) < 4 * error


def test_metropolis_never_goes_where_there_is_no_density():
    def half(z):  # an exponential on one side; nan, or an infinite density, on the other
        outside = z[:, 0].where(z[:, 0] < -1, z.new_tensor(torch.nan)).where(
            z[:, 0] < -0.5, z.new_tensor(torch.inf))
        return (-z[:, 0]).where(z[:, 0] > 0, outside.where(z[:, 0] > -1, z.new_tensor(torch.nan)))
    flow = gaussian_flow(torch.zeros(1, dtype=DOUBLE), 4 * torch.eye(1, dtype=DOUBLE))
    chains = metropolis(flow, half, num_draws=3000, seed=0)
    assert (chains.z > 0).all()
    assert_moments(chains.z, [1.0], [1.0])


def test_a_draw_without_a_factor_costs_metropolis_no_other():
    def log_joint(z):
        return TARGET.log_prob(z) + 0 * torch.linalg.cholesky(
            1.0 - LOC[0] + 3 * COV[0, 0].sqrt() + z[:, :1].unsqueeze(-1)).squeeze((-1, -2))
    chains = metropolis(gaussian_flow(LOC, 2 * COV), log_joint, num_draws=200, seed=0)
    assert chains.acceptance_rate > 0.3


def test_metropolis_is_reproduced_by_its_seed():
    def run(seed):
        return metropolis(gaussian_flow(LOC, 2 * COV), TARGET.log_prob, num_draws=200, seed=seed).z
    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    assert kept_random_state(lambda: run(1))
    torch.manual_seed(5)
    first = run(None)
    torch.manual_seed(5)
    assert torch.equal(first, run(None))


@pytest.mark.parametrize(("scale", "words"), [
    (0.4, r"one draw was held for \d+% of a chain"),
    (40.0, r"\d\.\d% of the proposals were accepted .* one draw was held")])
def test_a_flow_that_will_not_do_for_metropolis_is_announced(scale, words):
    flow = gaussian_flow(LOC, scale ** 2 * COV)
    with pytest.warns(UserWarning, match=words) as record:
        metropolis(flow, TARGET.log_prob, num_draws=300, seed=0)
    assert record[0].filename == __file__


def test_metropolis_refuses_what_is_no_flow():
    with pytest.raises(ValueError, match="metropolis expected `flow` to be a Flow, got Normal"):
        metropolis(dist.Normal(0.0, 1.0), TARGET.log_prob)


def test_metropolis_refuses_a_log_joint_that_is_finite_nowhere():
    with pytest.raises(ValueError, match="metropolis expected the log joint to be finite .* none "
                                         "at 12 of a chain"):
        metropolis(gaussian_flow(LOC, COV), lambda z: z[:, 0] * torch.nan, num_draws=2, warmup=10)


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def test_metropolis_refuses_a_minibatch():
    log_joint = log_joint_of(minibatch, Y.double())
    flow = Flow(Diagonal(1).double(), Gaussian(1).double())
    with pytest.raises(ValueError, match="metropolis needs one density .* no subsample_size"):
        metropolis(flow, log_joint)


@pytest.mark.parametrize("wrong", [{"num_chains": 0}, {"num_draws": 2.5}, {"warmup": "many"},
                                   {"seed": 1.5}, {"seed": True}], ids=str)
@pytest.mark.parametrize("sampler", [
    partial(metropolis, gaussian_flow(LOC, COV), TARGET.log_prob),
    lambda **wrong: neutra(conjugate, AutoPathfinder(conjugate).setup(Y), Y, **wrong)],
    ids=["metropolis", "neutra"])
def test_a_wrong_option_is_named(sampler, wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"expected `{name}` to be an integer.*got {value!r}"):
        sampler(**wrong)


def test_chains_say_what_they_are():
    chains = metropolis(gaussian_flow(LOC, COV), TARGET.log_prob, num_chains=1, num_draws=2000)
    assert repr(chains) == ("Chains(1 chain of 2,000 draws of 3 latents, acceptance rate 1.00)")
    assert (chains.num_chains, chains.num_draws, chains.num_divergences) == (1, 2000, 0)
    diverging = torch.tensor([[True, False], [False, False]])
    rates = torch.full((2, 2), 0.5)
    assert repr(Chains(torch.zeros(2, 2, 1), {"acceptance_rate": rates, "diverging": diverging})
                ) == "Chains(2 chains of 2 draws of 1 latents, acceptance rate 0.50, 1 divergences)"


# ------------------------------------------------------------------ NeuTra: models

def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def bent(y):
    """A posterior along a parabola, which no Gaussian follows."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a ** 2, 1.0), obs=y[0])


def rates(counts):
    """Gamma rates with Poisson counts: the first site is in a plate, and positive."""
    with pyro.plate("group", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("count", dist.Poisson(rate), obs=counts)


COUNTS = torch.tensor([0.0, 3.0, 7.0])


def scaled():
    with poutine.scale(scale=0.25):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(2.0))


def masked():
    with pyro.plate("three", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(2.0))


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.8, 1.0, 2.0])))
    pyro.sample("n", dist.Multinomial(8, p), obs=torch.tensor([1.0, 2.0, 5.0]))


def built(kind, model, *args, dtype=DOUBLE):
    """A guide whose flow is not the identity, as after some training."""
    with default_dtype(dtype):
        guide = kind(model).setup(*args).to(dtype=dtype)
        perturb(guide, 0.3)
    return guide


def in_double(function, *args, **kwargs):
    with default_dtype(DOUBLE):
        return function(*args, **kwargs)


def log_joint_at(model, layout, z, *args):
    """Log joint at one latent."""
    log_joint = LogJoint(model, args, {}, layout, DOUBLE)
    log_joint.batched = False  # vmap has no multinomial
    return in_double(log_joint, z)


def log_density(model, guide, u, *args):
    """Log density of the model at the guide's draw, times the guide's Jacobian."""
    transform = guide.get_transform()
    z = transform(u)
    log_det = torch.linalg.slogdet(torch.func.jacrev(transform.with_cache(0))(u)).logabsdet
    return log_joint_at(model, guide.layout, z, *args) + log_det


def target_of(model, guide, *args):
    """What NUTS gets to see."""
    room = sys.modules["pyro_nfvi.inference.neutra"]  # the function has its name
    with room._surroundings(guide):
        potential = room._potential(model, guide, args, {})
        return room._Target(potential, room._noise(guide), 10_000)


MODELS = {"conjugate": (conjugate, (Y.double(),)), "bent": (bent, (Y.double(),)),
          "rates": (rates, (COUNTS.double(),)), "simplex": (simplex, ()),
          "scaled": (scaled, ()), "masked": (masked, ())}


# ------------------------------------------------------------------ NeuTra: the density

@pytest.mark.parametrize("name", ["conjugate", "bent", "rates", "simplex"])
def test_the_compiled_potential_is_the_one_of_pyros_neutra(name):
    model, args = MODELS[name]
    guide = built(AutoSpline, model, *args)
    target = target_of(model, guide, *args)
    assert target.compiled.tier == "c", target.compiled.reason
    _, truth, _, _ = in_double(initialize_model, NeuTraReparam(guide).reparam(model), args)
    site = f"{next(iter(guide.layout)).name}_shared_latent"
    for _ in range(5):
        u = torch.randn(guide.layout.size, dtype=DOUBLE)
        value, gradient = target.value_and_gradient(u)
        at = u.clone().requires_grad_()
        expected = in_double(truth, {site: at})
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, at)[0], rtol=1e-8,
                                   atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_potential_is_minus_the_log_density_of_the_noise(name):
    model, args = MODELS[name]
    guide = built(AutoSpline, model, *args)
    target = target_of(model, guide, *args)
    for _ in range(3):
        u = torch.randn(guide.layout.size, dtype=DOUBLE)
        torch.testing.assert_close(target.value_and_gradient(u)[0],
                                   -log_density(model, guide, u, *args).detach(), rtol=1e-10,
                                   atol=1e-10)


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoDiagonalNormal, AutoIAFNormal])
@pytest.mark.parametrize("name", ["rates", "conjugate"])
def test_the_potential_of_pyros_guides_is_put_right(kind, name):
    model, args = MODELS[name]
    if kind is AutoIAFNormal and name == "conjugate":
        model, args = MODELS["bent"]  # it takes two latents
    guide = in_double(kind, model)
    in_double(guide, *args)
    perturb(guide, 0.3)
    layout = log_joint_of(model, *args).layout
    target = target_of(model, guide, *args)
    values = []
    for _ in range(4):
        u = torch.randn(layout.size, dtype=DOUBLE)
        transform = guide.get_transform()
        jacobian = torch.autograd.functional.jacobian(transform, u)
        expected = log_joint_at(model, layout, transform(u), *args) + \
            torch.linalg.slogdet(jacobian).logabsdet
        values.append(target.value_and_gradient(u)[0] + expected.detach())
    torch.testing.assert_close(torch.stack(values), torch.zeros(4, dtype=DOUBLE), rtol=0,
                               atol=1e-9)


# ------------------------------------------------------------------ NeuTra: the draws

def moments_on_a_grid(log_joint, low, high, size=801):
    """Mean and sd of two latents by quadrature."""
    axes = [torch.linspace(a, b, size, dtype=DOUBLE) for a, b in zip(low, high, strict=True)]
    z = torch.cartesian_prod(*axes)
    weights = torch.softmax(log_joint(z), 0)
    mean = weights @ z
    return mean, (weights @ (z - mean).square()).sqrt()


@pytest.fixture(scope="module")
def bent_guide():
    return AutoPathfinder(bent).setup(Y)


@pytest.fixture(scope="module")
def bent_chains(bent_guide):
    return neutra(bent, bent_guide, Y, num_draws=500, warmup=150, seed=0, progress=False,
                  target_accept_prob=0.9)


def test_neutra_goes_beyond_its_guide(bent_chains):
    truth = moments_on_a_grid(log_joint_of(bent, Y.double()), (-5.0, -8.0), (5.0, 6.0))
    assert_converged(bent_chains.z)
    assert_moments(bent_chains.z, *truth)


def test_neutra_keeps_the_dtype_of_its_guide(bent_chains):
    assert bent_chains.z.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_statistics_of_neutra_are_those_of_its_draws(bent_chains):
    stats = bent_chains.stats
    assert {tuple(value.shape) for value in stats.values()} == {(4, 500)}
    expected = log_joint_of(bent, Y.double())(bent_chains.z.double())
    torch.testing.assert_close(stats["lp"], expected, rtol=1e-4, atol=1e-4)
    assert ((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1)).all()
    assert 0.8 < bent_chains.acceptance_rate < 0.98
    assert (stats["step_size"] == stats["step_size"][:, :1]).all()  # adapted before
    assert (stats["n_steps"] < 2 ** stats["tree_depth"]).all()
    assert (stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all()


def test_the_energy_is_that_of_the_trajectory_from_the_last_draw(bent_chains, bent_guide):
    """Less the potential there it is half a chi-squared variate of as many degrees as latents."""
    transform, origin = bent_guide.get_transform(), torch.zeros(2)
    log_det = transform.log_abs_det_jacobian(origin, transform(origin)).detach()  # it is affine
    stats = bent_chains.stats
    kinetic = stats["energy"][:, 1:] + stats["lp"][:, :-1] + log_det.double()
    assert kinetic.min() > -1e-3
    error = kinetic.numel() ** -0.5
    assert abs(kinetic.mean() - 1) < 4 * error
    assert abs(kinetic.var() - 1) < 4 * 8 ** 0.5 * error


def test_neutra_finds_the_rates_of_counts():
    guide = AutoPathfinder(rates).setup(COUNTS)
    chains = neutra(rates, guide, COUNTS, num_chains=2, num_draws=300, warmup=100, seed=0,
                    progress=False)
    shape = 2.0 + COUNTS
    assert_moments(chains.z.exp(), shape / 2, shape.sqrt() / 2)
    assert_converged(chains.z)


def test_neutra_finds_the_rates_through_a_guide_of_pyros():
    guide = AutoIAFNormal(rates)
    guide(COUNTS)
    perturb(guide, 0.2)
    chains = neutra(rates, guide, COUNTS, num_chains=2, num_draws=300, warmup=100, seed=0,
                    progress=False)
    shape = 2.0 + COUNTS
    assert_moments(chains.z.exp(), shape / 2, shape.sqrt() / 2)


def test_neutra_sums_over_latents_that_the_guide_leaves_out():
    def mixture(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(mu + 4 * k, 1.0), obs=y)

    def log_joint(z):
        normal_at = partial(torch.distributions.Normal, scale=1.0)
        parts = [normal_at(z + shift).log_prob(Y) + math.log(weight)
                 for shift, weight in ((0.0, 0.7), (4.0, 0.3))]
        return (torch.distributions.Normal(0.0, 2.0).log_prob(z).squeeze(-1)
                + torch.logaddexp(*parts).sum(-1))
    guide = AutoFlow(poutine.block(mixture, hide=["k"]), init_scale=0.5).setup(Y)
    chains = neutra(mixture, guide, Y, num_chains=2, num_draws=400, warmup=150, seed=0,
                    progress=False)
    grid = torch.linspace(-8, 6, 4001).unsqueeze(-1)
    weights = torch.softmax(log_joint(grid), 0)
    mean = weights @ grid
    assert_moments(chains.z, mean, (weights @ (grid - mean).square()).sqrt())


def with_control_flow(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 1.5), obs=y[0])


def test_a_model_that_cannot_be_recorded_runs_as_it_is():
    guide = AutoFlow(with_control_flow, init_scale=0.5).setup(Y)
    chains = neutra(with_control_flow, guide, Y, num_chains=1, num_draws=30, warmup=30, seed=0,
                    progress=False)
    assert chains.z.isfinite().all()
    assert chains.acceptance_rate > 0.4


def test_places_where_a_matrix_has_no_factor_are_left_out():
    def correlated():
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        one = torch.ones(())
        matrix = torch.stack([torch.stack([one, rho]), torch.stack([rho, one])])
        factor = torch.linalg.cholesky(matrix)
        pyro.factor("factor", factor.diagonal().log().sum())
    guide = AutoFlow(correlated, init_scale=0.5, init_loc_fn=lambda site: torch.zeros(()))
    # one chain of few draws: every trajectory may end where there is no factor
    with pytest.warns(UserWarning, match="neutra: .* of 200 transitions diverged"):
        chains = neutra(correlated, guide.setup(), num_chains=1, num_draws=200, warmup=50, seed=0,
                        progress=False)
    assert (chains.z.abs() < 1).all()
    assert chains.z.std() > 0.2
    assert chains.num_divergences == chains.stats["diverging"].sum() > 0


def test_a_matrix_without_an_inverse_is_nowhere_to_be():
    def inverted():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        inverse = torch.linalg.inv(x.clamp(min=0) * torch.eye(2))
        pyro.factor("inverse", -inverse.diagonal().sum())
    guide = AutoFlow(inverted, init_scale=1.0, init_loc_fn=lambda site: torch.tensor(0.5)).setup()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="neutra: .* diverged")
        chains = neutra(inverted, guide, num_chains=1, num_draws=50, warmup=50, seed=0,
                        progress=False)
    assert (chains.z > 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:neutra. .* diverged")
@pytest.mark.parametrize("centred", [True, False])
def test_neutra_agrees_with_reference_draws_of_eight_schools(centred):
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(sigma, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            if centred:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                theta = mu + tau * pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(theta, sigma), obs=y)
    posterior = NFVI(model, seed=0, progress=False).run(sigma, y)
    log_joint = posterior.log_joint
    chains = neutra(partial(log_joint.model, *log_joint.args), posterior.guide, seed=1,
                    num_draws=500, warmup=300, progress=False, target_accept_prob=0.95)
    assert_converged(chains.z)
    values = log_joint.layout.constrain(chains.z)[0]
    reference = arviz.load_arviz_data("non_centered_eight")["posterior"]
    for name in ("mu", "tau"):
        ours, theirs = values[name].numpy(), reference[name].values
        error = math.hypot(arviz.mcse(ours), arviz.mcse(theirs))
        assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert chains.num_divergences < 20  # of 2000


@pytest.mark.slow
def test_a_default_run_on_a_tiny_model_takes_seconds():
    guide = AutoPathfinder(conjugate).setup(Y)
    start = time.process_time()
    chains = neutra(conjugate, guide, Y, seed=0, progress=False)
    assert time.process_time() - start < 10
    assert_moments(chains.z, [Y.sum() / 6], [6 ** -0.5])


# ------------------------------------------------------------------ NeuTra: its manners

def short(model=conjugate, args=(Y,), guide=None, **options):
    guide = AutoPathfinder(model).setup(*args) if guide is None else guide
    return neutra(model, guide, *args, **{"num_chains": 2, "num_draws": 20, "warmup": 20,
                                          "progress": False, **options})


def test_neutra_is_reproduced_by_its_seed():
    guide = AutoPathfinder(conjugate).setup(Y)
    first = short(guide=guide, seed=1)
    assert torch.equal(first.z, short(guide=guide, seed=1).z)
    assert not torch.equal(first.z, short(guide=guide, seed=2).z)
    assert not torch.equal(first.z[0], first.z[1])
    assert torch.equal(first.z[:1], short(guide=guide, seed=1, num_chains=1).z)
    assert kept_random_state(lambda: short(guide=guide, seed=1))
    torch.manual_seed(5)
    first = short(guide=guide)
    torch.manual_seed(5)
    assert torch.equal(first.z, short(guide=guide).z)
    assert not torch.equal(first.z, short(guide=guide).z)


def test_neutra_leaves_guide_and_param_store_as_they_were():
    guide = built(AutoSpline, bent, Y.double())
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    kept = set(pyro.get_param_store())
    short(bent, (Y.double(),), guide)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in guide.parameters())
    assert set(pyro.get_param_store()) == kept


def test_model_arguments_may_be_called_as_options_are():
    def model(y, seed):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(seed, 1.0)), 1.0), obs=y)
    guide = AutoFlow(model).setup(Y[0], seed=3.0)
    assert neutra(partial(model, seed=3.0), guide, Y[0], seed=1, num_chains=1, num_draws=5,
                  warmup=5, progress=False).z.shape == (1, 5, 1)


@pytest.mark.parametrize("progress", [True, False])
def test_neutra_shows_a_bar_only_if_asked_to(progress, capsys):
    short(progress=progress)
    shown = capsys.readouterr().err
    assert ("neutra" in shown and "chain 2 of 2" in shown and "80/80" in shown) == progress
    assert progress or not shown


def interrupting(monkeypatch, after):
    """Ctrl-C after that many transitions."""
    kernel = sys.modules["pyro_nfvi.inference.neutra"]._Kernel
    transition, made = kernel.sample, []

    def sample(self, params):
        made.append(1)
        if len(made) > after:
            raise KeyboardInterrupt
        return transition(self, params)
    monkeypatch.setattr(kernel, "sample", sample)


def test_ctrl_c_keeps_the_chains_that_are_done(monkeypatch):
    guide = AutoPathfinder(conjugate).setup(Y)
    whole = short(guide=guide, seed=1, num_chains=3)
    interrupting(monkeypatch, after=100)
    with pytest.warns(UserWarning, match="neutra was interrupted in chain 3 of 3") as record:
        chains = short(guide=guide, seed=1, num_chains=3)
    assert record[0].filename == __file__
    assert torch.equal(chains.z, whole.z[:2])
    assert chains.stats["lp"].shape == (2, 20)


def test_ctrl_c_in_the_first_chain_goes_through(monkeypatch):
    interrupting(monkeypatch, after=30)
    with pytest.raises(KeyboardInterrupt):
        short()


def test_a_model_that_changes_while_chains_run_is_announced():
    seen = []

    def model(y):
        seen.append(1)
        mu = pyro.sample("mu", dist.Normal(0.0 if len(seen) < limit else 5.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])
    limit = math.inf
    guide = AutoFlow(model, init_scale=0.5).setup(Y)
    short(model, (Y,), guide)
    calls = len(seen)
    seen.clear()
    limit = calls - 1  # in the last look at the model
    with pytest.warns(UserWarning, match="neutra: the model changed while the chains ran"):
        short(model, (Y,), guide)


@pytest.mark.parametrize("kind", [AutoDelta, AutoNormal, AutoLaplaceApproximation,
                                  AutoLowRankMultivariateNormal], ids=lambda k: k.__name__)
def test_a_guide_without_a_transform_is_refused(kind):
    guide = kind(conjugate)
    guide(Y)
    with pytest.raises(ValueError, match="neutra expected `guide` to map noise to all latents, .*"
                                         f"got {kind.__name__}"):
        short(guide=guide)


def test_what_is_no_guide_is_refused():
    with pytest.raises(ValueError, match="neutra expected `guide` to map noise .* got function"):
        short(guide=conjugate)


@pytest.mark.parametrize("kind", [AutoFlow, AutoIAFNormal], ids=lambda k: k.__name__)
def test_a_guide_that_is_not_built_is_refused(kind):
    with pytest.raises(ValueError, match=f"got one of {kind.__name__} that is not built"):
        short(guide=kind(bent))


@pytest.mark.parametrize("value", [0.0, 1.0, -1, "most"])
def test_a_wrong_target_of_acceptance_is_named(value):
    with pytest.raises(ValueError, match="neutra expected `target_accept_prob` to be"):
        short(target_accept_prob=value)


def test_a_guide_for_another_model_is_refused():
    with pytest.raises(ValueError, match=r"'a' is not\s+among them \(mu\)"):
        short(bent, (Y,), AutoPathfinder(conjugate).setup(Y))
    with pytest.raises(ValueError, match=r"'b' is of shape \(\) in the guide and missing in the m"):
        short(lambda y: pyro.sample("a", dist.Normal(0.0, 1.0)), (Y,), AutoFlow(bent).setup(Y))
    with pytest.raises(ValueError, match="neutra: the model does not run at a draw of the guide"):
        short(rates, (COUNTS[:2],), AutoFlow(rates).setup(COUNTS))


def test_neutra_refuses_a_minibatch():
    with pytest.raises(ValueError, match="neutra: .* subsample sites. Give the model all data"):
        short(minibatch, (Y,), AutoFlow(minibatch).setup(Y))


def test_neutra_refuses_a_model_with_noise_of_its_own():
    def noisy(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("noise", mu * torch.rand(()))
    with pytest.raises(ValueError, match="neutra needs one density"):
        short(noisy, (Y,), AutoFlow(noisy).setup(Y))


def test_neutra_refuses_a_density_that_is_finite_nowhere():
    def nowhere(y):
        pyro.factor("nothing", torch.nan * pyro.sample("mu", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match="neutra expected the density to be finite .* at 100"):
        short(nowhere, (Y,), AutoFlow(conjugate).setup(Y))


def test_neutra_takes_an_improper_prior():
    def improper(y):
        with pyro.plate("data", len(y)):
            mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    guide = AutoFlow(improper, init_loc_fn=lambda site: torch.zeros(5)).setup(Y)
    assert short(improper, (Y,), guide).z.isfinite().all()
