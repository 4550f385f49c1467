"""The amortized guide: exact answers, Pyro's contract, plates that change, and its errors."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule
from pyro.optim import Adam, ClippedAdam
from torch import nn

from pyro_nfvi import AutoAmortizedFlow
from pyro_nfvi.flows import Diagonal, Identity, nsf, planar
from pyro_nfvi.guides import AutoFlow, AutoGaussian
from pyro_nfvi.inference import CompiledTrace_ELBO
from pyro_nfvi.testing import perturb

torch_script = pytest.mark.filterwarnings(  # torch's own, of every traced model
    "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
nothing_to_sum_out = pytest.mark.filterwarnings(
    "ignore:TraceEnum_ELBO found no sample sites configured for enumeration")
WAY_OUT = "Build a new guide, and call it first with the arguments you fit with."


# ------------------------------------------------------------------ models

TAU, SIGMA, PRIOR = 0.5, 1.0, 2.0  # of the groups, of the data, of their mean


def normal(x):
    """Groups of known spread about an unknown mean: the posterior is a Gaussian."""
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with pyro.plate("groups", x.shape[0]):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[:, 0])


def exact(x):
    """Mean and standard deviation of mu and of every z, and the correlation of the two."""
    spread = TAU**2 + SIGMA**2
    variance = 1 / (1 / PRIOR**2 + len(x) / spread)
    mu, weight = variance * x.sum() / spread, TAU**2 / spread
    sd = (weight * SIGMA**2 + (1 - weight) ** 2 * variance) ** 0.5
    return mu, variance**0.5, mu + weight * (x[:, 0] - mu), sd, (1 - weight) * variance**0.5 / sd


def minibatches(x, size=None):
    """The same, by random minibatches."""
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with pyro.plate("groups", x.shape[0], subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[index, 0])


def handed(batch, num_rows):
    """Minibatches handed to the model: it knows how many rows there are in all."""
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with pyro.plate("groups", num_rows, subsample_size=batch.shape[0]):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=batch[:, 0])


def constrained(x):
    """Positive, simplex, interval and vector latents, of globals and of groups."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("groups", x.shape[0]):
        rate = pyro.sample("rate", dist.LogNormal(0.0, scale))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3) + shares.sum(-1, keepdim=True)))
        q = pyro.sample("q", dist.Beta(2.0, 2.0))
        w = pyro.sample("w", dist.Uniform(-1.0, 1.0))
        mean = (p * torch.tensor([1.0, 2.0, 3.0])).sum(-1) * rate + q + w
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


def nested(x):
    """Groups at dim -2, times four at dim -1; one site of the groups alone, one of the times."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    groups, times = pyro.plate("groups", x.shape[0], dim=-2), pyro.plate("times", 4, dim=-1)
    with times:
        trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
    with groups:
        a = pyro.sample("a", dist.LogNormal(mu, 1.0))
        with times:
            b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(a * b[..., 0] + trend, 1.0), obs=x[:, :1].expand(-1, 4))


def nested_right(x):
    """Groups at dim -1, in times at dim -2, and a vector site."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", x.shape[0], dim=-1):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("times", 3, dim=-2):
            b = pyro.sample("b", dist.Normal((a * mu).sum(-1), 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x[:, 0].expand(3, -1))


def no_globals(x):
    """Every latent is local."""
    with pyro.plate("groups", x.shape[0]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def regression(x, y=None):
    """Each row predicts a number, by a slope of its own."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", x.shape[0]):
        own = pyro.sample("own", dist.Normal(slope, 0.5))
        pyro.sample("y", dist.Normal(own * x[:, 0], 1.0), obs=y)


X = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
NESTED = {"nested": "groups", "nested-right": "groups"}  # the plate has to be named
MODELS = {"normal": normal, "minibatches": partial(minibatches, size=4),
          "constrained": constrained, "nested": nested, "nested-right": nested_right,
          "no-globals": no_globals}
every_model = pytest.mark.parametrize("name", MODELS)
every_whole_model = pytest.mark.parametrize("name", [n for n in MODELS if n != "minibatches"])


def encoder(num_features=3):
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, num_features))


def make(name="normal", **kwargs):
    """A guide of one of the models, with a small flow."""
    options = {"num_layers": 1, "plate": NESTED.get(name), "context_dim": 2, **kwargs}
    return AutoAmortizedFlow(MODELS[name], encoder(), planar, **options)


def moved(name="normal", *args, **kwargs):
    """Such a guide away from where it starts."""
    return perturb(make(name, **kwargs).setup(*(args or (X,))), 0.3)


def train(model, guide, *args, steps=500, rate=0.05, elbo=None):
    elbo = elbo or CompiledTrace_ELBO(num_particles=8)
    svi = SVI(model, guide, ClippedAdam({"lr": rate, "lrd": 0.05 ** (1 / steps)}), elbo)
    return torch.tensor([svi.step(*args) for _ in range(steps)])


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


# ------------------------------------------------------------------ the truth

def gaussian(model, **kwargs):
    """A guide that holds the posterior of the normal model exactly."""
    return AutoAmortizedFlow(model, nn.Linear(1, 2), Identity, global_guide=AutoGaussian, **kwargs)


def check_against_closed_form(guide, x, fitted=None, count=4000):
    """Draws for ``x`` against the exact posterior, of a mean that was fitted to other data."""
    mu, mu_sd, _, z_sd, correlation = exact(x if fitted is None else fitted)
    weight = TAU**2 / (TAU**2 + SIGMA**2)
    z = mu + weight * (x[:, 0] - mu)
    draws = guide.sample_posterior(count, x)
    error = 4.5 / count**0.5
    slack = 0.12  # what stochastic steps leave undone, in standard deviations
    assert abs(draws["mu"].mean() - mu) < (slack + error) * mu_sd
    assert abs(draws["mu"].std() / mu_sd - 1) < slack + error
    assert ((draws["z"].mean(0) - z).abs() < (slack + error) * z_sd).all()
    assert ((draws["z"].std(0) / z_sd - 1).abs() < slack + error).all()
    found = torch.corrcoef(torch.cat([draws["mu"][:, None], draws["z"]], -1).T)[0, 1:]
    assert ((found - correlation).abs() < slack + error).all()


def test_the_posterior_is_exact_on_the_data_and_on_new_data_without_a_refit():
    pyro.set_rng_seed(2)
    x = 2 + (TAU**2 + SIGMA**2) ** 0.5 * torch.randn(12, 1)
    guide = gaussian(normal)
    train(normal, guide, x)
    assert exact(x)[-1] > 0.4  # mean and groups hang together
    check_against_closed_form(guide, x)
    new = 2 + 0.8 * torch.randn(5, 1)
    check_against_closed_form(guide, new, fitted=x)
    assert guide(new)["z"].shape == (5,)


def test_local_and_global_latents_are_correlated_as_they_should():
    pyro.set_rng_seed(3)
    x = 1 + torch.randn(3, 1)
    guide = gaussian(normal)
    train(normal, guide, x)
    assert exact(x)[-1] > 0.7
    check_against_closed_form(guide, x)


def test_minibatches_lead_to_the_same_posterior():
    pyro.set_rng_seed(2)
    x = 2 + (TAU**2 + SIGMA**2) ** 0.5 * torch.randn(12, 1)
    guide = gaussian(minibatches)
    train(minibatches, guide, x, 6, steps=800, rate=0.03)
    check_against_closed_form(guide, x)


@pytest.mark.parametrize("shuffled", [True, False], ids=["drawn", "handed"])
def test_the_loss_of_minibatches_is_that_of_all_data_on_average(shuffled):
    guide = moved("normal")
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        whole = torch.tensor([elbo.loss(normal, guide, X) for _ in range(100)])
    small = AutoAmortizedFlow(minibatches if shuffled else handed, guide.encoder, planar,
                              num_layers=1, context_dim=2)
    small.setup(*((X, 2) if shuffled else (X[:2], 6)))
    small.load_state_dict(guide.state_dict())
    losses = []
    for _ in range(250):
        if shuffled:
            losses.append(elbo.loss(minibatches, small, X, 2))
        else:
            losses.append(elbo.loss(handed, small, X[torch.randperm(6)[:2]], 6))
    parts = torch.tensor(losses)
    error = (whole.var() / len(whole) + parts.var() / len(parts)).sqrt()
    assert (whole.mean() - parts.mean()).abs() < 4.5 * error
    assert parts.std() > whole.std()


def test_the_globals_come_to_the_local_flow_in_units_of_their_own():
    def far():
        scale = pyro.sample("scale", dist.Normal(1e4, 1e3))
        with pyro.plate("groups", 6):
            pyro.sample("z", dist.Normal(scale, 1.0))

    guide = AutoAmortizedFlow(far, nn.Linear(2, 3), planar, inputs=lambda: X)
    guide.setup()
    shared = guide._draw_globals(1000)[1]
    assert 0.9 < shared.std() < 1.1
    assert shared.mean().abs() < 0.2


def test_the_local_flow_starts_at_the_location_and_scale_asked_for():
    values = {"z": torch.full((6,), 3.0) + X[:, 0], "mu": torch.tensor(5.0)}
    guide = make(init_loc_fn=init_to_value(values=values), init_scale=0.01).setup(X)
    draws = guide.sample_posterior(500, X)
    assert (draws["z"].mean(0) - values["z"].mean()).abs().max() < 4.5 * 0.01 / 500**0.5
    assert abs(draws["z"].std() - 0.01) < 4.5 * 0.01 / 6000**0.5
    assert (draws["mu"].mean() - 5.0).abs() < 4.5 * 0.1 / 500**0.5


# ------------------------------------------------------------------ objectives

ELBOS = {
    "Trace": Trace_ELBO, "MeanField": TraceMeanField_ELBO, "Graph": TraceGraph_ELBO,
    "Enum": partial(TraceEnum_ELBO, max_plate_nesting=2), "Jit": JitTrace_ELBO,
    "Renyi": partial(RenyiELBO, alpha=0.5, num_particles=2), "Compiled": CompiledTrace_ELBO}


@torch_script
@nothing_to_sum_out
@pytest.mark.parametrize("elbo", ELBOS)
@every_model
def test_svi_steps_with_every_elbo(name, elbo):
    guide, objective = make(name).setup(X), ELBOS[elbo]()
    before = snapshot(guide)
    losses = train(MODELS[name], guide, X, steps=3, elbo=objective)
    assert losses.isfinite().all()
    assert {key.split(".")[0] for key in changed(guide, before)} == (
        {"encoder", "flow"} | ({"global_guide"} if name != "no-globals" else set()))


@nothing_to_sum_out
@every_model
@pytest.mark.parametrize("elbo", [CompiledTrace_ELBO, TraceGraph_ELBO,
                                  partial(TraceEnum_ELBO, max_plate_nesting=2)],
                         ids=["Compiled", "Graph", "Enum"])
def test_elbos_agree_from_one_seed(name, elbo):
    guide, model, losses = moved(name), MODELS[name], []
    for objective in (Trace_ELBO(), elbo()):
        for _ in range(3):  # the second call of the compiled one is recorded
            pyro.set_rng_seed(5)
            loss = objective.loss_and_grads(model, guide, X)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if isinstance(objective, CompiledTrace_ELBO):
        assert objective.tier != "eager", objective.reason


def test_the_mean_field_elbo_keeps_the_jacobians():
    guide, losses = moved("constrained"), {}
    with torch.no_grad():
        for elbo in (Trace_ELBO, TraceMeanField_ELBO):
            objective = elbo(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
            losses[elbo] = torch.tensor([objective.loss(constrained, guide, X) for _ in range(60)])
    one, other = losses.values()
    error = (one.var() / len(one) + other.var() / len(other)).sqrt()
    assert (one.mean() - other.mean()).abs() < 4.5 * error


@every_model
def test_vectorized_particles_estimate_the_same_loss(name):
    guide, model = moved(name), MODELS[name]
    together = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=2)
    with torch.no_grad():
        alone = torch.tensor([Trace_ELBO().loss(model, guide, X) for _ in range(250)])
        batched = torch.tensor([together.loss(model, guide, X) for _ in range(60)])
    error = (alone.var() / len(alone) + batched.var() / len(batched)).sqrt()
    assert (alone.mean() - batched.mean()).abs() < 4.5 * error


@torch_script
def test_hidden_discrete_sites_are_summed_out_under_minibatches():
    def mixture(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", x.shape[0], subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * k, 1.0), obs=x[index, 0])

    def by_hand(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", x.shape[0], subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            kinds = dist.Categorical(torch.tensor([0.7, 0.3]))
            parts = dist.Normal(torch.stack([z, z + 2], -1), 1.0)
            pyro.sample("x", dist.MixtureSameFamily(kinds, parts), obs=x[index, 0])

    guide = AutoAmortizedFlow(poutine.block(mixture, hide=["k"]), encoder(), planar).setup(X)
    losses = []
    for model, elbo in ((mixture, TraceEnum_ELBO(max_plate_nesting=1)), (by_hand, Trace_ELBO())):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide, X))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------ densities and draws

SHAPES = {
    "normal": {"mu": (), "z": (6,)},
    "minibatches": {"mu": (), "z": (6,)},
    "constrained": {"scale": (), "shares": (2,), "rate": (6,), "p": (6, 3), "q": (6,), "w": (6,)},
    "nested": {"mu": (), "trend": (4,), "a": (6, 1), "b": (6, 4, 3)},
    "nested-right": {"mu": (2,), "a": (6, 2), "b": (3, 6)},
    "no-globals": {"z": (6,)},
}


@every_model
def test_draws_have_the_shapes_and_supports_of_the_model(name):
    draws = moved(name).sample_posterior(5, X)
    assert {site: tuple(value.shape) for site, value in draws.items()} == {
        site: (5, *shape) for site, shape in SHAPES[name].items()}
    trace = poutine.trace(poutine.condition(MODELS[name], {})).get_trace(X)
    for site, value in draws.items():
        if name != "minibatches":
            assert trace.nodes[site]["fn"].support.check(value).all(), site


@every_whole_model
def test_the_density_of_any_values_is_that_of_the_guides_trace(name):
    guide = moved(name)
    trace = poutine.trace(guide).get_trace(X)
    values = {site: trace.nodes[site]["value"] for site in SHAPES[name]}
    found, wanted = guide.log_prob(values, X).detach(), trace.log_prob_sum().detach()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_trace_of_a_minibatch_counts_its_locals_for_all():
    guide = moved("minibatches")
    trace = poutine.trace(guide).get_trace(X)
    values = {site: trace.nodes[site]["value"] for site in ("mu", "z")}
    shared = guide.global_guide.log_prob(values)
    local = guide.log_prob(values, X[trace.nodes["groups"]["value"]]) - shared
    wanted = trace.log_prob_sum().detach()
    assert torch.allclose((shared + 6 / 4 * local).detach(), wanted, rtol=1e-4, atol=1e-4)


@every_model
def test_densities_of_many_values_are_those_of_each(name):
    guide = moved(name)
    draws = guide.sample_posterior(4, X)
    together = guide.log_prob(draws, X)
    alone = [guide.log_prob({k: v[i] for k, v in draws.items()}, X) for i in range(4)]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


@every_model
def test_each_element_is_drawn_from_the_features_of_its_own_row(name):
    guide = moved(name)
    for part in guide.flow.bijection.layers[0].units.parameters():
        part.data.mul_(3)
    median, order = guide.median(X), torch.tensor([3, 0, 5, 1, 4, 2])
    turned = guide.median(X[order])
    for site in guide.local:
        axis = site.axis
        moved_along = median[site.name].index_select(axis, order)
        scale = median[site.name].std()
        assert (moved_along - turned[site.name]).abs().max() < 0.35 * scale + 0.1  # other draws


def test_medians_and_quantiles_are_those_of_draws_and_leave_the_seed_alone():
    guide = moved("constrained")
    state = torch.get_rng_state()
    quantiles, median = guide.quantiles([0.25, 0.5], X), guide.median(X)
    assert torch.equal(state, torch.get_rng_state())
    draws = guide.sample_posterior(4000, X)
    for name, value in median.items():
        assert torch.allclose(quantiles[name][1], value, atol=1e-6)
    for name in ("rate", "q", "scale"):
        share = (draws[name] < quantiles[name][0]).float().mean(0)
        error = 4.5 * (0.25 * 0.75 * (1 / 4000 + 1 / 2000)) ** 0.5
        assert ((share - 0.25).abs() < error).all()


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@every_whole_model
def test_predictive_draws_latents_and_data(name, parallel):
    guide, model = moved(name), MODELS[name]
    predictive = Predictive(model, guide=guide, num_samples=5, parallel=parallel,
                            return_sites=list(SHAPES[name]))
    samples = predictive(X)
    assert {site: value.numel() for site, value in samples.items()} == {
        site: 5 * torch.Size(shape).numel() for site, shape in SHAPES[name].items()}


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive_works_on_new_rows_without_their_outcome(parallel):
    guide = AutoAmortizedFlow(regression, encoder(), planar, inputs=lambda x, y=None: x)
    train(regression, guide, X, X[:, 0], steps=3)
    predictive = Predictive(regression, guide=guide, num_samples=5, parallel=parallel)
    samples = predictive(torch.randn(9, 2))
    assert samples["own"].shape == samples["y"].shape == (5, 9)


def test_predictive_draws_follow_the_guide():
    guide = moved()
    pyro.set_rng_seed(1)
    draws = guide.sample_posterior(2000, X)["z"]
    predicted = Predictive(normal, guide=guide, num_samples=2000, parallel=True)(X)["z"]
    error = draws.std(0) * (2 / 2000) ** 0.5
    assert ((draws.mean(0) - predicted.mean(0)).abs() < 4.5 * error).all()


# ------------------------------------------------------------------ plates that change

def test_a_last_smaller_minibatch_and_longer_data_need_nothing():
    guide = make()
    svi = SVI(normal, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for rows in (6, 2, 9, 6, 1):
        assert torch.tensor(svi.step(torch.randn(rows, 2))).isfinite()
        assert guide(torch.randn(rows, 2))["z"].shape == (rows,)


def test_plate_size_and_minibatch_size_may_both_change():
    guide = AutoAmortizedFlow(minibatches, encoder(), planar)
    for rows, size in ((6, 2), (6, 4), (9, 3), (6, None), (6, 2)):
        trace = poutine.trace(guide).get_trace(torch.randn(rows, 2), size)
        node = trace.nodes["_AutoAmortizedFlow_latent"]
        assert node["value"].shape == (size or rows, 1)
        assert node["scale"] == rows / (size or rows)
        assert trace.nodes["z"]["scale"] == rows / (size or rows)


def test_handed_minibatches_are_scaled_and_used_as_they_are():
    seen = []

    class Spy(nn.Linear):
        def forward(self, rows):
            seen.append(rows)
            return super().forward(rows)

    guide = AutoAmortizedFlow(handed, Spy(2, 3), planar)
    for rows in (4, 4, 2):
        trace = poutine.trace(guide).get_trace(X[:rows], 6)
        assert trace.nodes["z"]["scale"] == 6 / rows
        assert torch.equal(seen[-1], X[:rows])


def test_only_the_rows_of_the_minibatch_are_encoded():
    seen = []

    class Spy(nn.Linear):
        def forward(self, rows):
            seen.append(rows)
            return super().forward(rows)

    guide = AutoAmortizedFlow(minibatches, Spy(2, 3), planar)
    guide(X, 2)
    trace = poutine.trace(guide).get_trace(X, 2)
    index = trace.nodes["groups"]["value"]
    assert torch.equal(seen[-1], X[index])
    replayed = poutine.trace(poutine.replay(minibatches, trace)).get_trace(X, 2)
    assert torch.equal(replayed.nodes["x"]["value"], X[index, 0])


def given_indices(x, index):
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with pyro.plate("groups", x.shape[0], subsample=index):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[index, 0])


def given_plate(x, index):
    return pyro.plate("groups", x.shape[0], subsample=index)


@pytest.mark.parametrize("create_plates", [None, given_plate], ids=["argument", "create_plates"])
def test_indices_given_to_the_model_are_those_of_the_guide(create_plates):
    seen = []

    class Spy(nn.Linear):
        def forward(self, rows):
            seen.append(rows)
            return super().forward(rows)

    guide = AutoAmortizedFlow(given_indices, Spy(2, 3), planar, inputs=lambda x, index: x,
                              create_plates=create_plates)
    for index in ([0, 2], [5, 1], [3, 4, 0], [5, 4, 3, 2, 1, 0]):
        trace = poutine.trace(guide).get_trace(X, torch.tensor(index))
        assert trace.nodes["groups"]["value"].tolist() == index
        assert torch.equal(seen[-1], X[index])


def test_indices_made_inside_the_model_are_refused_until_the_plates_are_created_outside():
    def inside(x):
        given_indices(x, torch.tensor([3, 1]))

    guide = AutoAmortizedFlow(inside, encoder(), planar)
    message = ("AutoAmortizedFlow cannot know the indices that the model gives plate 'groups'. "
               "Pass create_plates, a function of the model's arguments that returns the plate (to "
               "the list, if the guide is part of one).")
    refuses(message, guide, X)
    listed = AutoGuideList(given_indices)
    listed.append(AutoAmortizedFlow(given_indices, encoder(), planar, inputs=lambda x, index: x))
    refuses(message, listed, X, torch.tensor([3, 1]))
    plates = AutoAmortizedFlow(inside, encoder(), planar, create_plates=lambda x: given_plate(
        x, torch.tensor([3, 1])))
    assert plates(X)["z"].shape == (2,)


def test_looking_at_new_arguments_does_not_disturb_the_random_state():
    guide, state = moved(), None
    values = []
    for seen in (False, True):
        pyro.set_rng_seed(4)
        values.append(guide(X[:3])["z"])
        assert seen == (state is not None)
        state = torch.get_rng_state()
    assert torch.equal(*values)


def test_a_counter_among_the_arguments_does_not_fill_the_memory():
    def counted(x, step):
        normal(x)

    guide = AutoAmortizedFlow(counted, encoder(), planar)
    for step in range(70):
        guide(X[:1 + step % 3], step)
    assert len(guide.sizes.seen) == 64


# ------------------------------------------------------------------ parameters

def test_a_second_guide_of_the_class_trains_too():
    for _ in range(2):
        guide = make().setup(X)
        before = snapshot(guide)
        train(normal, guide, X, steps=3, elbo=Trace_ELBO())
        assert {key.split(".")[0] for key in changed(guide, before)} == {
            "encoder", "flow", "global_guide"}


def test_parameters_come_back_from_the_param_store(tmp_path):
    guide = make()
    train(normal, guide, X, steps=5)
    pyro.get_param_store().save(tmp_path / "params.pt")
    wanted = guide.median(X)
    pyro.clear_param_store()
    fresh = make()
    fresh(X)
    pyro.get_param_store().load(tmp_path / "params.pt")
    fresh(X)
    assert all(torch.equal(value, wanted[name]) for name, value in fresh.median(X).items())


def test_state_dict_brings_a_guide_back():
    guide, other = moved(), make().setup(X)
    other.load_state_dict(guide.state_dict())
    assert torch.equal(guide.median(X)["z"], other.median(X)["z"])


def test_a_frozen_encoder_stays_as_it_is_and_silent():
    guide = make()
    guide.encoder.requires_grad_(False)
    guide.setup(X)
    before = snapshot(guide)
    train(normal, guide, X, steps=3, elbo=Trace_ELBO())
    assert {key.split(".")[0] for key in changed(guide, before)} == {"flow", "global_guide"}


def test_an_encoder_that_is_a_pyro_module_trains_once():
    guide = AutoAmortizedFlow(normal, PyroModule[nn.Linear](2, 3), planar).setup(X)
    before = snapshot(guide)
    train(normal, guide, X, steps=2, elbo=Trace_ELBO())
    assert any(key.startswith("encoder") for key in changed(guide, before))
    store = pyro.get_param_store()
    assert len({id(store._params[key]) for key in store}) == len(list(store))


def test_building_leaves_mode_and_statistics_of_the_encoder_alone():
    norm = nn.BatchNorm1d(2)
    guide = AutoAmortizedFlow(normal, nn.Sequential(norm, nn.Linear(2, 3)), planar).setup(X)
    assert norm.training
    assert norm.num_batches_tracked == 0
    guide(X)
    assert norm.num_batches_tracked == 1


def test_a_model_in_double_precision_gets_a_guide_in_double_precision():
    x = X.double()

    def double(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("groups", x.shape[0]):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = AutoAmortizedFlow(double, encoder(), planar)
    assert train(double, guide, x, steps=3, elbo=Trace_ELBO()).isfinite().all()
    assert {p.dtype for p in guide.flow.parameters()} == {torch.float64}
    assert {p.dtype for p in guide.encoder.parameters()} == {torch.float32}
    assert guide(x)["z"].dtype == guide.sample_posterior(2, x)["z"].dtype == torch.float64


def test_several_tensors_go_to_the_encoder():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 2)
            self.read = nn.Linear(4, 3)

        def forward(self, x, kind):
            return self.read(torch.cat([x, self.embed(kind)], -1))

    def two(x, kind):
        minibatches(x, 3)

    guide = AutoAmortizedFlow(two, Two(), planar, inputs=lambda x, kind: (x, kind))
    assert guide(X, torch.tensor([0, 1, 2, 3, 0, 1]))["z"].shape == (3,)


@pytest.mark.parametrize("recipe", [nsf, planar, Diagonal, Identity], ids=lambda r: r.__name__)
def test_every_recipe_serves_with_or_without_a_context(recipe):
    guide = AutoAmortizedFlow(constrained, encoder(), recipe)
    assert torch.tensor(Trace_ELBO().loss(constrained, guide, X)).isfinite()


def test_the_default_flow_serves_one_coordinate():
    guide = AutoAmortizedFlow(normal, encoder())
    assert train(normal, guide, X, steps=3).isfinite().all()


def test_a_flow_of_ones_own_for_the_globals():
    guide = make("constrained", global_guide=partial(AutoFlow, recipe=nsf, num_layers=2))
    assert train(constrained, guide, X, steps=3).isfinite().all()


# ------------------------------------------------------------------ copies and lists

def draw(guide, *args):
    pyro.set_rng_seed(7)
    return guide(*args)


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", ["constrained", "no-globals"])
def test_a_deepcopy_is_a_guide_of_its_own(name):
    guide = make(name)
    train(MODELS[name], guide, X, steps=2)
    other = copy.deepcopy(guide)
    wanted = draw(guide, X)
    pyro.clear_param_store()  # two guides of one name share what is in it
    assert equal(draw(other, X), wanted)
    perturb(other, 0.5)
    assert not equal(draw(other, X), wanted)
    assert len(other(X[:2])[other.local.sites[0].name]) == 2
    pyro.clear_param_store()
    assert equal(draw(guide, X), wanted)


@pytest.mark.parametrize("name", ["constrained", "no-globals", "normal"])
def test_a_pickle_draws_what_the_guide_draws_and_the_live_one_lives_on(name):
    guide = make(name)
    train(MODELS[name], guide, X, steps=2)
    other = pickle.loads(pickle.dumps(guide))
    assert equal(draw(guide, X), draw(other, X))
    assert {k: v.shape for k, v in other(X[:2]).items()} == {
        k: v.shape for k, v in guide(X[:2]).items()}
    assert other.sample_posterior(3, X[:4]).keys() == guide.median(X).keys()
    train(MODELS[name], guide, X, steps=1)


def test_a_pickle_cannot_tell_how_new_arguments_are_subsampled():
    guide = AutoAmortizedFlow(minibatches, encoder(), planar).setup(X, 2)
    other = pickle.loads(pickle.dumps(guide))
    assert other(X, 2)["z"].shape == (2,)
    with pytest.raises(ValueError, match="AutoAmortizedFlow was loaded without its model, and "
                                         "cannot tell how arguments of a new kind subsample plate"):
        other(X[:4], 2)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO], ids=lambda e: e.__name__)
def test_it_is_part_of_a_list(elbo):
    guide = AutoGuideList(constrained)
    guide.append(AutoNormal(poutine.block(constrained, expose=["scale"])))
    guide.append(AutoAmortizedFlow(poutine.block(constrained, hide=["scale"]), encoder(), planar))
    guide(X)
    before = snapshot(guide)
    assert train(constrained, guide, X, steps=3, elbo=elbo()).isfinite().all()
    assert {key.split(".")[0] for key in changed(guide, before)} == {"0", "1"}
    assert set(guide.median(X)) == set(SHAPES["constrained"])


# ------------------------------------------------------------------ errors

def refuses(message, guide, *args, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        guide(*args)


def test_a_model_without_local_latents_is_sent_to_auto_flow():
    def flat(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    refuses("AutoAmortizedFlow amortizes the latents of a plate; no plate of the model holds a "
            "latent. Use AutoFlow(model).", AutoAmortizedFlow(flat, encoder()), X)


def test_a_model_without_latents_is_refused():
    def observed(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0, 0])

    refuses("AutoAmortizedFlow found no latent site in the model",
            AutoAmortizedFlow(observed, encoder()), X)


def test_two_plates_have_to_be_told_apart():
    refuses("AutoAmortizedFlow cannot tell which plate to amortize: 'groups', 'times' hold "
            "latents. Name it: AutoAmortizedFlow(model, encoder, plate='groups').",
            AutoAmortizedFlow(nested, encoder()), X)


def test_a_plate_without_latents_cannot_be_amortized():
    refuses("AutoAmortizedFlow expected `plate` to name a plate that holds latents ('groups'), "
            "got 'group'.", make(plate="group"), X)


def test_the_subsampled_plate_is_the_local_one():
    def two(x):
        with pyro.plate("times", 4):
            pyro.sample("trend", dist.Normal(0.0, 1.0))
        minibatches(x, 2)

    guide = AutoAmortizedFlow(two, encoder(), planar).setup(X)
    assert guide.plate == "groups"
    assert [site.name for site in guide.global_guide.layout] == ["trend", "mu"]


def test_a_second_subsampled_plate_is_refused():
    def two(x):
        with pyro.plate("groups", x.shape[0], dim=-2):
            with pyro.plate("times", 4, subsample_size=2, dim=-1):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    refuses("AutoAmortizedFlow amortizes one plate, 'groups'; 'z' is local to the subsampled plate "
            "'times' (2 of 4).", AutoAmortizedFlow(two, encoder(), plate="groups"), X)


def test_a_sequential_plate_is_refused():
    def sequential(x):
        for i in pyro.plate("groups", x.shape[0]):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    refuses("AutoAmortizedFlow needs vectorized plates; 'z_0' is in the sequential plate 'groups'. "
            "Write `with pyro.plate('groups', size):`.", AutoAmortizedFlow(sequential, encoder()),
            X, error=NotImplementedError)


def test_a_discrete_local_latent_is_refused_with_the_way_out():
    def mixture(x):
        with pyro.plate("groups", x.shape[0]):
            pyro.sample("k", dist.Bernoulli(0.5))

    refuses("AutoAmortizedFlow handles continuous sites; 'k' is Bernoulli. Hide it: "
            "AutoAmortizedFlow(poutine.block(model, hide=['k'])).",
            AutoAmortizedFlow(mixture, encoder()), X)


def test_a_support_of_each_elements_own_is_refused():
    def bounded(x):
        with pyro.plate("groups", x.shape[0]):
            pyro.sample("z", dist.Uniform(-1.0, x[:, 0].abs() + 1))

    refuses("AutoAmortizedFlow needs one support for all elements; that of 'z' ",
            AutoAmortizedFlow(bounded, encoder()), X)


def test_two_candidates_for_the_encoder_are_named():
    refuses("AutoAmortizedFlow cannot tell which argument the encoder of plate 'rows' (6 elements) "
            "reads: 'x' of shape (6, 2) and 'y' of shape (6,) run over it. Pass inputs=lambda x, "
            "y=None: ...", AutoAmortizedFlow(regression, encoder()), X, X[:, 0])


def test_no_candidate_for_the_encoder_says_what_to_do():
    def closed():
        normal(X)

    refuses("AutoAmortizedFlow cannot tell which argument the encoder of plate 'groups' (6 "
            "elements) reads: no tensor's first dimension runs over it. Pass inputs=lambda: ...",
            AutoAmortizedFlow(closed, encoder()))
    guide = AutoAmortizedFlow(closed, encoder(), inputs=lambda: X)
    assert guide()["z"].shape == (6,)


def test_an_argument_may_come_by_name_or_by_place():
    guide = make()
    assert guide(X)["z"].shape == guide(x=X)["z"].shape == (6,)


def test_data_that_are_missing_say_that_the_encoder_reads_them():
    def generative(y=None):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=None if y is None else y[:, 0])

    guide = AutoAmortizedFlow(generative, encoder(), planar).setup(X)
    refuses("AutoAmortizedFlow expected argument 'y' to be a tensor, or a tuple of tensors, whose "
            "first dimension runs over plate 'rows', got NoneType. The encoder reads it also when "
            "predicting.", guide)


def test_inputs_that_fail_on_missing_data_say_so():
    guide = AutoAmortizedFlow(regression, encoder(), planar,
                              inputs=lambda x, y: torch.stack([x[:, 0], y + 1], -1))
    guide(X, X[:, 0])
    refuses("AutoAmortizedFlow: `inputs` failed on the model's arguments: TypeError: unsupported "
            "operand type(s) for +: 'NoneType' and 'int'. It is called with whatever the model is, "
            "also when predicting (y=None): let it read only what is always there.", guide, X, None)


@pytest.mark.parametrize("rows", [None, 3, (), (X, None), (X, X[:2]), torch.tensor(1.0)],
                         ids=["none", "number", "nothing", "tuple", "lengths", "scalar"])
def test_inputs_that_are_no_rows_are_refused(rows):
    refuses("AutoAmortizedFlow expected `inputs` to be a tensor, or a tuple of tensors, whose "
            "first dimension runs over plate 'groups', got ", make(inputs=lambda x: rows), X)


@pytest.mark.parametrize(("name", "minibatch"), [("normal", ""), (
    "minibatches", " or of its minibatch of 4")])
def test_rows_of_another_length_are_refused(name, minibatch):
    refuses(f"AutoAmortizedFlow expected one row for each of the 6 elements of plate 'groups'"
            f"{minibatch}, got 3. Let `inputs` return a tensor whose first dimension runs over the "
            "plate.", make(name, inputs=lambda x: x[:3]), X)


@pytest.mark.parametrize(("shape", "got"), [((6,), "(6,)"), ((6, 2, 2), "(6, 2, 2)"),
                                            ((3, 2), "(3, 2)"), ((6, 0), "(6, 0)"),
                                            (None, "NoneType")])
def test_features_of_another_shape_are_refused(shape, got):
    class Wrong(nn.Module):
        def forward(self, rows):
            return None if shape is None else torch.zeros(shape)

    refuses("AutoAmortizedFlow expected `encoder` to return features of shape (6, num_features), "
            f"got {got}. Flatten what it returns: one vector for each element of the plate.",
            AutoAmortizedFlow(normal, Wrong()), X)


def test_an_encoder_that_fails_is_named():
    refuses("AutoAmortizedFlow: `encoder` failed on rows of shape (6, 2): RuntimeError: ",
            AutoAmortizedFlow(normal, nn.Linear(5, 3)), X)


def test_globals_that_change_their_shape_say_what_to_do():
    def growing(x, size):
        pyro.sample("mu", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        no_globals(x)

    guide = AutoAmortizedFlow(growing, encoder(), planar)
    guide(X, 2)
    refuses(f"AutoAmortizedFlow expected site 'mu' of shape (2,), got (3,). {WAY_OUT}", guide, X, 3)


def test_locals_change_along_their_plate_only():
    def growing(x, size):
        with pyro.plate("groups", x.shape[0]):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))

    guide = AutoAmortizedFlow(growing, encoder(), planar)
    guide(X, 2)
    refuses(f"AutoAmortizedFlow expected site 'z' of shape (4, 2), got (4, 3). {WAY_OUT}",
            guide, X[:4], 3)


def test_a_site_that_was_latent_at_the_first_call_says_what_to_do():
    guide = AutoAmortizedFlow(regression, encoder(), planar, inputs=lambda x, y=None: x)
    guide(X)
    refuses("AutoAmortizedFlow was built when 'y' was latent; now it is observed.", guide, X,
            X[:, 0])


def test_a_site_that_disappears_is_named():
    def changing(x, extra):
        with pyro.plate("groups", x.shape[0]):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            if extra:
                pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoAmortizedFlow(changing, encoder(), planar)
    guide(X, True)
    refuses("AutoAmortizedFlow was built with a latent site 'w' that the model no longer has.",
            guide, X, False)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"encoder": torch.tanh}, "expected `encoder` to be a torch.nn.Module, got builtin"),
    ({"encoder": None}, "expected `encoder` to be a torch.nn.Module, got NoneType"),
    ({"model": None}, "expected `model` to be a function, got NoneType"),
    ({"recipe": planar(2)}, "`recipe` to be a function of the number of latents, got Compose"),
    ({"inputs": X}, "expected `inputs` to be a function, got Tensor"),
    ({"global_guide": "AutoFlow"}, "expected `global_guide` to be a function, got str"),
    ({"context_dim": 0}, "expected `context_dim` to be an integer >= 1, got 0"),
    ({"init_scale": -1.0}, "expected `init_scale` to be a positive number, got -1.0"),
    ({"init_loc_fn": 3}, "expected `init_loc_fn` to be a function, got int"),
    ({"plate": 3}, "expected `plate` to be the name of a plate, got 3"),
    ({"num_layer": 2}, "num_layer"),
    ({"hidden": 2}, "takes num_layers, num_passes, hidden_dims, activation"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_arguments_of_another_kind_are_refused_at_once(kwargs, message):
    options = {"model": normal, "encoder": encoder(), **kwargs}
    with pytest.raises(ValueError, match=f"AutoAmortizedFlow.*{re.escape(message)}"):
        AutoAmortizedFlow(**options)


def test_a_global_guide_that_is_no_flow_is_refused():
    refuses("AutoAmortizedFlow expected `global_guide` to return an AutoFlow, got AutoNormal.",
            make(global_guide=AutoNormal), X)


def test_a_refused_call_leaves_the_guide_unbuilt():
    guide = AutoAmortizedFlow(normal, nn.Linear(2, 3), planar, inputs=lambda x: x[:, :1])
    for _ in range(2):
        refuses("`encoder` failed", guide, X)
    assert guide.prototype_trace is None


USES = {
    "sample_posterior": lambda guide: guide.sample_posterior(3, X),
    "log_prob": lambda guide: guide.log_prob({"mu": torch.tensor(0.0)}, X),
    "median": lambda guide: guide.median(X),
    "quantiles": lambda guide: guide.quantiles([0.5], X),
    "load_state_dict": lambda guide: guide.load_state_dict({}),
}


@pytest.mark.parametrize("use", USES)
def test_a_guide_used_before_its_first_call_says_what_to_do(use):
    with pytest.raises(RuntimeError, match="AutoAmortizedFlow is built at its first call. Call it"):
        USES[use](make())


@pytest.mark.parametrize(("values", "message"), [
    ({"z": torch.zeros(6)}, "LatentLayout expected `values` to hold every latent site, 'mu' is"),
    ({"mu": torch.tensor(0.0)}, "AutoAmortizedFlow expected `values` to hold every latent site, "
                                "'z' is missing; got ['mu']."),
    ({"mu": torch.tensor(0.0), "z": torch.zeros(5)},
     "AutoAmortizedFlow expected site 'z' of shape (*sample, 6), got (5,)."),
    ({"mu": torch.tensor(0.0), "z": torch.full((6,), torch.nan)}, "site 'z' within its support"),
], ids=["global", "local", "shape", "support"])
def test_values_that_do_not_fit_log_prob_are_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make().setup(X).log_prob(values, X)


def test_a_number_of_draws_that_is_none_and_a_level_that_is_none_are_refused():
    guide = make().setup(X)
    with pytest.raises(ValueError, match="expected `num_samples` to be an integer >= 1, got 0"):
        guide.sample_posterior(0, X)
    with pytest.raises(ValueError, match="expected `quantiles` between 0 and 1, got"):
        guide.quantiles([1.5], X)
