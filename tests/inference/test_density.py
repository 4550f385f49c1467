"""fit_density: data and densities, held-out rows, what comes back, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import re
import time
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import TransformReparam
from torch.distributions import MultivariateNormal

from pyro_nfvi import ELBO, NFVI, CompiledTrace_ELBO, FittedFlow, fit_density, maf, nsf, planar
from pyro_nfvi.flows import (
    Compose,
    Coupling,
    Diagonal,
    Flow,
    Identity,
    StudentT,
    Triangular,
)
from pyro_nfvi.inference import density_loops
from pyro_nfvi.inference.density_start import ContextUnits, FixedRegression
from tests.inference.targets import covariance, mixture, normal

DOUBLE = torch.float64
QUIET = {"seed": 0, "progress": False, "compile": "fx"}
small = partial(nsf, num_layers=2, num_bins=4, hidden_dims=(16,))
affine = partial(maf, num_layers=2, hidden_dims=(16,))


def fit(flow, **kwargs):
    return fit_density(flow, **{**QUIET, **kwargs})


def quick(flow, **kwargs):
    """A fit of a few steps, of which only the outside matters."""
    return fit(flow, **{"num_steps": 20, "compile": "eager", **kwargs})


def banana(count, seed=0):
    """Draws of a bent Gaussian, and their entropy."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    x[:, 1] += x[:, 0] ** 2
    return x, 2 * 0.5 * math.log(2 * math.pi * math.e)


# ------------------------------------------------------------------ data

def test_a_gaussian_far_away_on_several_scales_needs_no_steps_to_be_found():
    cov = 1e4 * covariance(5, 1e6)
    truth = normal(torch.linspace(-1e5, 1e5, 5), cov)
    x, fresh = truth.sample((4000,)), truth.sample((4000,))
    fitted = fit(affine(5), samples=x, num_steps=100, dtype=DOUBLE)
    gap = truth.log_prob(fresh).mean() - fitted.log_prob(fresh).mean()
    assert -1e-3 < gap < 0.02  # a Gaussian of 20 parameters loses 20 / 2 / 4000 nats
    assert fitted.history.validation[0] < fitted.history.nll + 0.01


def test_a_banana_is_learned_to_the_likelihood_of_the_truth():
    x, entropy = banana(3000)
    fitted = fit(maf(2, num_layers=2), samples=x, num_steps=800, compile="auto")
    fresh, _ = banana(4000, seed=1)
    nll = -fitted.log_prob(fresh)
    assert abs(nll.mean() - entropy) < 0.03 + 2 * nll.std() / 4000 ** 0.5
    assert abs(fitted.history.nll - nll.mean()) < 0.15  # of 300 held-out rows
    ranks = (fitted.sample((4000,)).double() < fresh.median(0).values).double().mean(0)
    assert (ranks - 0.5).abs().max() < 0.05


def test_a_conditional_density_follows_its_context_in_place_and_width():
    generator = torch.Generator().manual_seed(0)
    c = 1000 + 100 * torch.rand(3000, 1, generator=generator)  # far from standard
    width = 0.3 + (c - 1000) / 100
    x = 5 * c + 3 * width * torch.randn(3000, 1, generator=generator)
    fitted = fit(partial(affine, num_layers=1), samples=x, context=c, num_steps=1000,
                 compile="auto")
    at = torch.tensor([[1010.0], [1050.0], [1090.0]])
    draws = fitted.condition(at).sample((4000,)).squeeze(-1)
    assert torch.allclose(draws.mean(0), 5 * at.squeeze(-1), atol=0.4)  # a tenth of the width
    assert torch.allclose(draws.std(0), 3 * torch.tensor([0.4, 0.8, 1.2]), rtol=0.1)


def test_what_held_out_rows_like_best_is_what_comes_back():
    x, _ = banana(60)
    held_out, _ = banana(200, seed=1)
    fitted = fit(affine(2, hidden_dims=(64, 64)), samples=x, validation=held_out, num_steps=1500,
                 patience=2, dtype=DOUBLE)
    history = fitted.history
    assert history.checks[0] == 0
    assert np.diff(history.checks)[:-1].tolist() == [50] * (len(history.checks) - 2)
    assert len(history.checks) == len(history.train) == len(history.validation)
    assert history.nll == min(history.validation) < history.validation[-1]
    assert history.best_step == history.checks[int(np.argmin(history.validation))]
    assert -fitted.log_prob(held_out).mean().item() == pytest.approx(history.nll, abs=1e-9)
    assert history.patience_lost
    assert len(history.elbo) < 1200
    assert "has not risen for 2 checks" in history.stopped


def test_a_fit_without_held_out_rows_ends_when_the_likelihood_is_flat():
    x = normal(torch.zeros(2), covariance(2, 4.0)).sample((500,))
    fitted = fit(affine(2), samples=x, validation=None, num_steps=2000, compile="auto")
    assert not fitted.history.validation
    assert 400 < len(fitted.history.elbo) < 1200
    assert fitted.history.nll == fitted.history.train[-1]


def test_rows_are_split_so_that_none_is_in_both_parts(monkeypatch):
    seen = []
    init = density_loops.LikelihoodLoop.__init__

    def spy(self, flow, rows, held_out, **kwargs):
        seen.extend([rows, held_out])
        init(self, flow, rows, held_out, **kwargs)
    monkeypatch.setattr(density_loops.LikelihoodLoop, "__init__", spy)
    x = torch.arange(200.0).reshape(100, 2) + torch.randn(100, 2) * 0.1
    quick(affine(2, 1), samples=x, context=x.sum(-1), validation=0.2)
    (kept, c), (held_out, d) = seen
    assert (len(kept), len(held_out)) == (80, 20)
    both = torch.cat([kept, held_out])
    assert torch.equal(both[both[:, 0].argsort()], x)
    assert torch.equal(torch.cat([c, d]).squeeze(-1), both.sum(-1))


def test_a_seed_reproduces_the_fit_and_leaves_the_random_state_alone():
    x, _ = banana(100)
    flow = affine(2)
    state = torch.get_rng_state()
    fits = [quick(flow, samples=x, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    values = [fitted.log_prob(x[:5]) for fitted in fits]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert fits[0].history.elbo == fits[1].history.elbo


def test_a_recipe_is_built_for_the_data_by_the_seed():
    x, _ = banana(100)
    fits = [quick(affine, samples=x, context=x[:, :1], seed=3) for _ in range(2)]
    assert (fits[0].flow.input_dim, fits[0].flow.context_dim) == (2, 1)
    states = [fitted.flow.state_dict() for fitted in fits]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_flow_that_was_passed_stays_as_it_was():
    flow = Flow(affine(2), StudentT(2, learn=True))
    before = copy.deepcopy(flow.state_dict())
    fitted = quick(flow, samples=banana(100)[0])
    assert all(torch.equal(flow.state_dict()[name], before[name]) for name in before)
    assert all(p.requires_grad for p in flow.parameters())
    assert not any(p.requires_grad for p in fitted.flow.parameters())
    assert not fitted.flow.training


@pytest.mark.parametrize("again", [lambda fitted: fitted, lambda fitted: fitted.flow],
                         ids=["fitted", "its-flow"])
def test_a_fitted_flow_goes_on_from_where_it_is(again):
    x, _ = banana(300)
    first = quick(affine(2, 1), samples=x + 100, context=x[:, :1], num_steps=60)
    flow = again(first)
    if isinstance(flow, Flow):
        flow = copy.deepcopy(flow).requires_grad_()
    second = quick(flow, samples=x + 100, context=x[:, :1])
    assert second.history.train[0] < first.history.train[0]
    assert second.history.train[0] == pytest.approx(first.history.train[-1], abs=0.1)
    assert second.flow.state_dict().keys() == first.flow.state_dict().keys()
    assert not any(p.requires_grad for p in first.flow.parameters())


def test_layers_with_a_start_from_data_take_it():
    x, _ = banana(300)
    layer = Compose([Coupling(2), Diagonal(2)])
    fitted = quick(layer, samples=100 + 50 * x, standardize=False, validation=None, num_steps=5)
    assert fitted.history.train[0] < 12  # nats, where the standard normal has thousands
    assert fitted.flow.bijection.layers[1].shift.value.mean() > 100


@pytest.mark.parametrize("values", [
    np.asarray, lambda x: x.tolist(), lambda x: x.float(), lambda x: np.asarray(x)[::-1][::-1]],
    ids=["numpy", "list", "float32", "strided"])
def test_data_may_be_any_array_of_numbers(values):
    x = (100 * banana(100)[0]).round()  # so that no type rounds
    flow = affine(2)
    expected, fitted = quick(flow, samples=x), quick(flow, samples=values(x))
    assert fitted.history.elbo == expected.history.elbo


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_type_of_the_fit_is_the_flows_unless_told(dtype):
    x = banana(100)[0].numpy()
    assert quick(affine(2).to(dtype), samples=x).sample().dtype == dtype
    assert quick(affine(2), samples=x, dtype=dtype).sample().dtype == dtype
    assert quick(affine, samples=x, dtype=dtype).sample().dtype == dtype


def test_integers_and_single_columns_are_data():
    counts = torch.randint(0, 1000, (150,))
    fitted = quick(affine(1), samples=counts)
    assert fitted.event_shape == (1,)
    assert fitted.log_prob(counts.unsqueeze(-1).float()).shape == (150,)


def test_ctrl_c_keeps_the_best_so_far(monkeypatch):
    validate, values = density_loops.LikelihoodLoop._validate, []

    def interrupt(self, stepper, x, context):
        if len(values) == 3:
            raise KeyboardInterrupt
        validate(self, stepper, x, context)
        values.append(self.history.validation[-1])
    monkeypatch.setattr(density_loops.LikelihoodLoop, "_validate", interrupt)
    held_out, _ = banana(50, seed=1)
    with pytest.warns(UserWarning, match=r"fit_density was interrupted after 150 steps; this is "
                                         r"the best so far\."):
        fitted = quick(affine(2), samples=banana(100)[0], validation=held_out, num_steps=1000,
                       dtype=DOUBLE)
    assert fitted.history.interrupted
    assert -fitted.log_prob(held_out).mean().item() == pytest.approx(min(values), abs=1e-9)


def test_a_fit_ends_when_its_time_is_up():
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"fit_density: its time was up\."):
        fit(affine(2), samples=banana(500)[0], num_steps=10 ** 6, max_seconds=0.5, compile="eager")
    assert time.monotonic() - start < 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flat in time, or not: that depends on the machine
        fitted = fit(affine(2), log_density=lambda z: -z.square().sum(-1), num_steps=10 ** 6,
                     max_seconds=1.0, compile="eager", num_particles=16)
    assert time.monotonic() - start < 15
    assert fitted.history.stages[-1].pareto_k < 0.7  # annealed in the time there was


def test_values_that_repeat_are_a_concern():
    x = torch.stack([torch.randn(400), torch.arange(400.0) % 3], -1)
    with pytest.warns(UserWarning, match=r"column 1 takes 3 values only.* add noise"):
        fitted = quick(affine(2), samples=x)
    assert len(fitted.history.concerns) == 1


def test_collinear_columns_are_scaled_without_being_turned():
    x, _ = banana(200)
    fitted = quick(affine(3), samples=torch.cat([x, x[:, :1]], -1), dtype=DOUBLE)
    assert all(map(math.isfinite, fitted.history.validation))


def test_a_context_that_says_it_all_or_nothing_is_taken():
    c = torch.randn(100, 2)
    c[:, 1] = 7.0  # a constant
    fitted = quick(affine(1, 2), samples=2 * c[:, :1], context=c)
    assert all(map(math.isfinite, fitted.history.validation))


# ------------------------------------------------------------------ densities

@pytest.mark.parametrize("dim", [1, 4])
def test_a_gaussian_density_is_found_wherever_it_is(dim):
    target = normal(torch.linspace(50, -80, dim), 30 * covariance(dim, 1e4))
    fitted = fit(Triangular(dim), log_density=lambda z: 5.0 + target.log_prob(z), num_steps=150,
                 dtype=DOUBLE, num_particles=64)
    stage = fitted.history.stages[-1]
    assert stage.elbo == pytest.approx(5.0, abs=0.02)  # the normalizer, and a KL divergence near 0
    assert stage.pareto_k < 0.7
    z = fitted.sample((4000,))
    deviations = (z - target.loc) / target.covariance_matrix.diagonal().sqrt()
    assert deviations.mean(0).abs().max() < 5 / 4000 ** 0.5
    assert (deviations.std(0) - 1).abs().max() < 0.06


def test_annealing_finds_both_modes_and_their_masses():
    parts = [normal(torch.tensor([place, 0.0]), 0.25 * torch.eye(2)) for place in (-2.5, 2.5)]
    options = {"log_density": mixture([0.7, 0.3], *parts), "num_steps": 800, "dtype": DOUBLE,
               "num_particles": 64, "compile": "auto"}
    torch.manual_seed(0)
    flow = planar(2, num_layers=16)
    fitted = fit(flow, **options)
    assert abs((fitted.sample((4000,))[:, 0] < 0).double().mean() - 0.7) < 0.05
    assert fitted.history.stages[-1].elbo > -0.1  # the log normalizer is 0
    with pytest.warns(UserWarning, match=r"it misses a mode at \(2\.5, \S+\)\. Take more"):
        cold = fit(flow, annealing=0, **options)
    assert cold.history.stages[-1].elbo < math.log(0.7) + 0.01


def test_a_function_of_one_point_is_batched():
    def one(z):
        return -0.5 * (z[0] - 3) ** 2 - z[1] ** 4

    def rows(z):
        return -0.5 * (z[:, 0] - 3) ** 2 - z[:, 1] ** 4
    flow = affine(2)
    fits = [quick(flow, log_density=function, num_particles=8, dtype=DOUBLE)
            for function in (one, rows)]
    assert fits[0].history.elbo == pytest.approx(fits[1].history.elbo, rel=1e-6)


def test_a_function_that_reads_values_runs_row_by_row_with_a_warning():
    def branches(z):
        return -z.square().sum() if z.sum() > 0 else -z.abs().sum()
    with pytest.warns(UserWarning, match=r"calls `log_density` once for each of 8 particles, which "
                                         r"is slow: "):
        fitted = quick(affine(2), log_density=branches, num_particles=8, num_steps=5)
    assert len(fitted.history.elbo) == 5


def test_a_distribution_that_checks_its_arguments_is_a_density():
    target = MultivariateNormal(torch.ones(2), torch.eye(2), validate_args=True)
    fitted = quick(affine(2), log_density=target.log_prob, num_particles=8)
    assert len(fitted.history.elbo) == 20


def test_points_without_density_do_not_end_a_fit():
    def half(z):
        return torch.where(z[..., 0] > 0, -z.square().sum(-1), -torch.inf)
    fitted = quick(affine(2), log_density=half, num_steps=100, num_particles=32)
    assert len(fitted.history.elbo) == 100
    assert all(map(math.isfinite, fitted.history.elbo))


def test_draws_that_miss_part_of_the_density_are_a_concern():
    tails = StudentT(2, df=1.1)
    with pytest.warns(UserWarning, match=r"k-hat of its draws is .* it misses part of the density"):
        fitted = quick(Triangular(2), log_density=tails.log_prob, num_steps=100)
    assert "k-hat" in repr(fitted)


@pytest.mark.parametrize("path", [True, False])
def test_the_objective_may_be_another(path):
    calls = []

    def objective(*args):
        calls.append(args)
        return ELBO(path_gradient=path)(*args)
    fitted = quick(affine(2), log_density=lambda z: -z.square().sum(-1), objective=objective,
                   num_particles=8)
    assert len(calls) >= 20
    assert len(fitted.history.elbo) == 20


def test_powers_of_the_density_rise_to_one_and_stay_there():
    feed = density_loops.Annealing(4, torch.zeros(()))
    first, = feed.take(3)
    rest, = feed.take(4)
    assert torch.cat([first, rest]).tolist() == pytest.approx(
        [0.01, 0.2575, 0.505, 0.7525, 1.0, 1.0, 1.0])
    feed.rewind(1)
    assert feed.live[0].item() == pytest.approx(0.2575)
    assert feed.take(1)[0].tolist() == pytest.approx([0.2575])
    assert density_loops.Annealing(0, torch.zeros(())).take(2)[0].tolist() == [1.0, 1.0]


def test_ctrl_c_leaves_a_density_fit_where_it_is():
    calls = []

    def density(z):
        calls.append(1)
        if len(calls) == 400:
            raise KeyboardInterrupt
        return -z.square().sum(-1)
    with pytest.warns(UserWarning, match="fit_density was interrupted"):
        fitted = quick(affine(2), log_density=density, num_particles=8, num_steps=10 ** 5)
    assert fitted.history.interrupted
    assert fitted.sample((3,)).isfinite().all()


# ------------------------------------------------------------------ the distribution

@pytest.fixture(scope="module")
def prior():
    return quick(small(2), samples=banana(300)[0] + 1)


@pytest.fixture(scope="module")
def conditional():
    x, _ = banana(300)
    return quick(small(1, 1), samples=x[:, 1], context=x[:, 0])


def test_shapes_are_those_of_a_distribution(prior, conditional):
    assert isinstance(prior, FittedFlow)
    assert isinstance(prior, dist.TorchDistribution | dist.TransformedDistribution)
    assert (prior.batch_shape, prior.event_shape, prior.has_rsample) == ((), (2,), True)
    wide = prior.expand((5, 1)).expand((5, 3))
    assert wide.sample((4,)).shape == (4, 5, 3, 2)
    assert wide.log_prob(torch.zeros(2)).shape == (5, 3)
    assert prior.log_prob(torch.zeros(4, 5, 2)).shape == (4, 5)
    given = conditional.condition(torch.randn(6, 1))
    assert (given.batch_shape, given.event_shape) == ((6,), (1,))
    assert given.rsample((2,)).shape == (2, 6, 1)
    assert given.expand((3, 6)).sample().shape == (3, 6, 1)
    assert given.log_prob(torch.zeros(7, 6, 1)).shape == (7, 6)
    assert conditional.condition(torch.zeros(1)).expand((4,)).log_prob(torch.zeros(1)).shape == (4,)
    assert prior.expand((3,)).to_event(1).log_prob(torch.zeros(3, 2)).shape == ()


def test_a_draw_is_scored_as_any_point(prior, conditional):
    for q in (prior.to(DOUBLE), conditional.to(DOUBLE).condition(torch.randn(4, 1).double())):
        z, log_prob = q.rsample_and_log_prob((3,))
        assert torch.allclose(q.log_prob(z), log_prob, atol=1e-8)


def test_a_density_integrates_to_one(conditional):
    z = torch.linspace(-60, 60, 20_001, dtype=DOUBLE).unsqueeze(-1)
    density = conditional.condition(torch.tensor([0.5])).log_prob(z).exp()
    assert torch.trapezoid(density, z.squeeze(-1)) == pytest.approx(1.0, abs=1e-3)


def test_types_meet_half_way_as_those_of_tensors_do(prior, conditional):
    z, c = torch.randn(5, 2), torch.randn(5, 1)
    assert prior.log_prob(z).dtype == prior.sample().dtype == torch.float32
    assert prior.log_prob(z.double()).dtype == DOUBLE
    exact = prior.to(DOUBLE)
    assert torch.allclose(prior.log_prob(z.double()), exact.log_prob(z.double()), atol=1e-10)
    assert exact.log_prob(z).dtype == DOUBLE
    assert conditional.condition(c.double()).sample().dtype == DOUBLE
    assert conditional.condition(c).log_prob(z[:, :1].double()).dtype == DOUBLE
    assert conditional.condition(c.double()).log_prob(z[:, :1]).dtype == DOUBLE
    assert prior.flow.base.zeros.dtype == torch.float32  # and stays so
    assert exact.history is prior.history
    assert conditional.condition(c).to(DOUBLE).context.dtype == DOUBLE


def test_copies_and_pickles_are_the_same_distribution(prior, conditional):
    z = torch.randn(5, 2)
    for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(twin.log_prob(z), prior.log_prob(z))
        assert twin.history.nll == prior.history.nll
    given = conditional.condition(z[:, :1])
    twin = pickle.loads(pickle.dumps(given))
    assert torch.equal(twin.log_prob(z[:, 1:]), given.log_prob(z[:, 1:]))


def test_gradients_go_to_values_and_contexts_not_to_the_flow(prior, conditional):
    z, c = torch.randn(5, 2, requires_grad=True), torch.randn(5, 1, requires_grad=True)
    prior.log_prob(z).sum().backward()
    conditional.condition(c).log_prob(z[:, :1].detach()).sum().backward()
    assert (z.grad != 0).all()
    assert (c.grad != 0).all()
    assert not any(p.grad is not None for p in prior.flow.parameters())
    assert not prior.rsample().requires_grad
    assert conditional.condition(c).rsample().requires_grad
    assert not conditional.condition(c).sample().requires_grad


def test_it_maps_over_batches(prior, conditional):
    z = torch.randn(6, 2)
    with pyro.validation_enabled(False):
        assert torch.allclose(torch.func.vmap(prior.log_prob)(z), prior.log_prob(z), atol=1e-5)
        mapped = torch.func.vmap(lambda c, x: conditional.condition(c).log_prob(x))
        expected = conditional.condition(z[:, :1]).log_prob(z[:, 1:])
        assert torch.allclose(mapped(z[:, :1], z[:, 1:]), expected, atol=1e-5)


def test_wrong_contexts_and_values_are_refused(prior, conditional):
    with pytest.raises(ValueError, match=re.escape(
            "FittedFlow expected a context, got none. Give it one of shape (*batch, 1): "
            "fitted.condition(context).")):
        conditional.sample()
    with pytest.raises(ValueError, match="FittedFlow expected a context, got none"):
        conditional.log_prob(torch.zeros(1))
    with pytest.raises(ValueError, match="takes no context: it was fitted without"):
        prior.condition(torch.zeros(1))
    with pytest.raises(ValueError, match=re.escape("`context` of shape (*batch, 1), got (3,)")):
        conditional.condition(torch.zeros(3))
    with pytest.raises(ValueError, match=re.escape("`value` of shape (*batch, 2), got (3,)")):
        prior.log_prob(torch.zeros(3))


def both(prior, conditional, y):
    """A model with a fitted prior and a fitted likelihood."""
    with pyro.plate("groups", 3, dim=-2):
        z = pyro.sample("z", prior)
    level = z[..., 0].sum(-2, keepdim=True)
    with pyro.plate("data", len(y), dim=-1):
        given = conditional.condition(level.expand(*level.shape[:-1], len(y)).unsqueeze(-1))
        pyro.sample("y", given, obs=y)


@pytest.mark.parametrize("loss", [
    Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True), TraceMeanField_ELBO(),
    CompiledTrace_ELBO(compile="fx")], ids=["trace", "vectorized", "mean-field", "compiled"])
def test_it_is_prior_and_likelihood_of_a_model(loss, prior, conditional):
    y = torch.randn(4, 1)
    model = partial(both, prior, conditional)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step(y) for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert guide.median()["z"].shape == (3, 1, 2)
    if isinstance(loss, CompiledTrace_ELBO):
        assert loss.tier == "fx", loss.reason
    drawn = Predictive(model, num_samples=6)(y)
    assert drawn["z"].shape == (6, 3, 1, 2)
    trace = poutine.trace(model).get_trace(y)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (3, 1)
    assert trace.nodes["y"]["log_prob"].shape == (1, 4)


def test_a_prior_can_be_traded_for_its_noise(prior):
    def model():
        return pyro.sample("z", prior)
    reparametrized = poutine.reparam(model, config={"z": TransformReparam()})
    trace = poutine.trace(reparametrized).get_trace()
    noise = trace.nodes["z_base"]["value"]
    assert torch.allclose(prior.flow.bijection(noise)[0], trace.nodes["z"]["value"])


@pytest.mark.slow
def test_a_model_with_a_fitted_prior_is_fitted_in_double_precision(prior):
    def model(y):
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=y)
    posterior = NFVI(model, seed=0, progress=False).run(torch.tensor(1.5))
    assert posterior.log_joint.dtype == DOUBLE
    assert posterior.log_joint.batched
    assert posterior.pareto_k < 0.7
    z = prior.to(DOUBLE).sample((200_000,))
    weights = (-2 * (z[:, 0] - 1.5) ** 2).softmax(0)
    expected = weights @ z
    draws = posterior.resample(10_000)["z"].double()
    assert torch.allclose(draws.mean(0), expected, atol=0.05)


# ------------------------------------------------------------------ history

def test_a_history_can_be_read_and_drawn():
    x, _ = banana(200)
    fits = [quick(affine(2), samples=x, num_steps=60),
            quick(affine(2), samples=x, validation=None),
            quick(affine(2), log_density=lambda z: -z.square().sum(-1), num_particles=8)]
    labels = [[text.get_text() for text in fitted.plot().get_legend().get_texts()]
              for fitted in fits]
    assert labels == [["train", "held out"], ["train"], ["each step"]]
    assert re.fullmatch(r"FittedFlow\(2 coordinates, batch_shape=\(\), DensityHistory\(60 steps, "
                        r"held-out NLL -?\d+\.\d{3} at step \d+\)\)", repr(fits[0]))
    assert "NLL" in repr(fits[1])
    assert "ELBO" in repr(fits[2])
    ax = fits[0].plot()
    assert fits[1].plot(ax) is ax


def test_the_bar_shows_both_likelihoods(capsys):
    fit_density(affine(2), samples=banana(200)[0], num_steps=20, seed=0, compile="eager")
    assert re.search(r"fit_density: .*20/20.*NLL \d+\.\d{3}, held out \d+\.\d{3}",
                     capsys.readouterr().err)


# ------------------------------------------------------------------ its own layers

@pytest.mark.parametrize("layer", [
    lambda: ContextUnits(Coupling(2, 3), torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 10, 0.1])),
    lambda: FixedRegression(torch.tensor([[1.0, 2, 3], [0, 1, 0]]))],
    ids=["units", "regression"])
def test_layers_of_the_start_are_bijections(layer):
    layer = layer().double()
    u, c = torch.randn(7, 2, dtype=DOUBLE), torch.randn(7, 3, dtype=DOUBLE)
    z, log_det = layer(u, c)
    back, inverse_log_det = layer.inverse(z, c)
    assert torch.allclose(back, u)
    assert torch.allclose(log_det, -inverse_log_det)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda u, c: layer(u, c)[0]))(u, c)
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], log_det)
    again, _ = layer._inverse_at(u, z, c)
    assert torch.allclose(again, u)


# ------------------------------------------------------------------ refused

X = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
BAD = X.clone()
BAD[7, 1], BAD[9, 0] = torch.nan, torch.inf
FLAT = X.clone()
FLAT[:, 1] = 3.0


def constant(z):
    return torch.zeros(len(z))


REFUSED = {
    "neither": ({}, "expected either `samples` or `log_density`, got neither."),
    "both": ({"samples": X, "log_density": constant}, "got both."),
    "nan": ({"samples": BAD}, "`samples` to hold finite numbers, got NaN or infinity in 2 of 100 "
                              "rows, the first at 7. Leave them out: "),
    "nan-context": ({"flow": affine(2, 2), "samples": X, "context": BAD},
                    "`context` to hold finite numbers, got NaN"),
    "overflow": ({"samples": X.double() * 1e300}, "`samples` to hold finite numbers"),
    "constant": ({"samples": FLAT}, "expected `samples` to vary, got 3 in every row of column 1"),
    "constant-in-single": ({"samples": 1e9 + X.double()},
                           "got 1e+09 in every row of column 0, which has no density. In "
                           "torch.float64 it has one: dtype=torch.float64."),
    "one-row": ({"samples": X[:1]}, "expected `samples` to hold two rows or more, got one."),
    "few-rows": ({"samples": X[:60]}, "expected `validation` to hold out 10 rows or more and leave "
                                      "some, got 6 of 60. Hold out none: validation=None."),
    "no-rows": ({"samples": X[:0]}, "of shape (num_rows, size), got (0, 2)."),
    "images": ({"samples": torch.zeros(5, 3, 4)}, "got (5, 3, 4). Flatten each: "
                                                  "samples.reshape(5, -1)."),
    "scalar": ({"samples": 3.0}, "of shape (num_rows, size), got ()."),
    "words": ({"samples": ["a", "b"]}, "a tensor or an array of shape (num_rows, size), got list."),
    "complex": ({"samples": X.to(torch.complex64)}, "`samples` to hold real numbers"),
    "size": ({"samples": X[:, :1]}, "`samples` of shape (num_rows, 2), as the flow has it, got "
                                    "(100, 1)."),
    "no-context": ({"flow": affine(2, 1), "samples": X},
                   "`context` of shape (100, 1), as the flow has context_dim=1, got None."),
    "context": ({"samples": X, "context": X}, "takes no `context` with a flow of context_dim=0. "
                                              "Build it with context_dim=2."),
    "context-size": ({"flow": affine(2, 1), "samples": X, "context": X},
                     "`context` of shape (num_rows, 1), as the flow has it, got (100, 2)."),
    "context-rows": ({"flow": affine(2, 2), "samples": X, "context": X[:99]},
                     "`context` to have a row for each of the 100 of `samples`, got 99."),
    "context-density": ({"log_density": constant, "context": X}, "takes no `context` with "
                                                                 "`log_density`"),
    "fraction": ({"samples": X, "validation": 1.5}, "`validation` to be a fraction between 0 and "
                                                    "1, held-out samples, or None, got 1.5."),
    "true": ({"samples": X, "validation": True}, "`validation` to be a fraction"),
    "validation-size": ({"samples": X, "validation": X[:, :1]}, "`validation` of shape (num_rows, "
                                                                "2), as the flow has it"),
    "validation-triple": ({"samples": X, "validation": (X, X, X)}, "got a tuple of 3."),
    "validation-none": ({"samples": X, "validation": (None, X)}, "to hold samples, got None."),
    "validation-alone": ({"flow": affine(2, 2), "samples": X, "context": X, "validation": X},
                         "`validation` to be samples and their context, as a pair"),
    "validation-nan": ({"samples": X, "validation": BAD}, "`validation` to hold finite numbers"),
    "flow": ({"flow": "nsf", "samples": X}, "expected `flow` to be a Flow, a bijection such as "
                                            "nsf(2) or a fitted flow, got str."),
    "class": ({"flow": Triangular, "samples": X}, "expected `flow` to be a Flow"),
    "recipe-density": ({"flow": nsf, "log_density": constant}, "got a recipe, which with "
                       "`log_density` has no dimension. Call it: nsf(2)."),
    "frozen": ({"flow": Flow(affine(2)).requires_grad_(False), "samples": X}, "got only frozen "
               "ones. Thaw some: flow.requires_grad_()."),
    "no-parameters": ({"flow": Identity(2), "samples": X}, "with parameters to train"),
    "steps": ({"samples": X, "num_steps": 0}, "`num_steps` to be an integer >= 1, got 0."),
    "batch": ({"samples": X, "batch_size": 2.5}, "`batch_size` to be an integer >= 1"),
    "patience": ({"samples": X, "patience": 0}, "`patience` to be an integer >= 1"),
    "particles": ({"log_density": constant, "num_particles": 0},
                  "`num_particles` to be an integer >= 1, got 0."),
    "lr": ({"samples": X, "lr": -1.0}, "`lr` to be a positive number, got -1.0."),
    "seconds": ({"samples": X, "max_seconds": 0}, "`max_seconds` to be a positive number"),
    "seed": ({"samples": X, "seed": 1.5}, "`seed` to be an integer or None, got 1.5."),
    "dtype": ({"samples": X, "dtype": "float64"}, "`dtype` to be a floating-point torch.dtype"),
    "compile": ({"samples": X, "compile": "fast"}, "`compile` to be one of"),
    "annealing": ({"log_density": constant, "annealing": 1.0}, "`annealing` to be a fraction of "
                  "the steps, at least 0 and below 1, got 1.0."),
    "objective": ({"log_density": constant, "objective": ELBO}, "`objective` to be one such as "
                  "ELBO(), got <class"),
    "no-function": ({"log_density": dist.Normal(0.0, 1.0)}, "`log_density` to be a function of "
                    "points, got Normal. Of a distribution, take its method log_prob."),
    "column": ({"log_density": lambda z: -z.square().sum(-1, keepdim=True)},
               "got (5, 1) of torch.float32. Squeeze it: .squeeze(-1)."),
    "each-coordinate": ({"log_density": lambda z: -z.square()},
                        "of shape (5,) for points (5, 2), or () for one point (2,), got (5, 2)"),
    "sum-of-all": ({"log_density": lambda z: -z[:, 0] - z.square().sum()},
                   "to give a row the same value alone and among others"),
    "raises": ({"log_density": lambda z: z @ torch.ones(7)}, "; it raised RuntimeError: "),
    "a-number": ({"log_density": lambda z: 3.0}, "for one point (2,), got float."),
    "integer": ({"log_density": lambda z: z.sum(-1).long()}, "of torch.int64"),
    "no-gradient": ({"log_density": lambda z: torch.zeros(len(z))}, "its result has no gradient"),
    "numpy": ({"log_density": lambda z: torch.as_tensor(-np.square(z.detach().numpy()).sum(-1))},
              "made of torch operations on its argument: its result has no gradient"),
    "never-finite": ({"log_density": lambda z: z.sum(-1) * torch.nan},
                     "`log_density` to be finite where the flow starts, got nan at ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(case):
    kwargs, message = REFUSED[case]
    kwargs = {"flow": affine(2), **kwargs}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        quick(**kwargs)
    assert str(error.value).startswith("fit_density")
    assert "\n" not in str(error.value)


def test_no_gradients_no_fit():
    with torch.inference_mode(), pytest.raises(ValueError, match="torch.inference_mode"):
        quick(affine(2), samples=X)
    with torch.no_grad():
        assert len(quick(affine(2), samples=X).history.elbo) == 20
