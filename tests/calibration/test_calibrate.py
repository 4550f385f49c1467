"""Simulation-based calibration: exact tests, bands, ranks, simulated data, refits, reports."""

from __future__ import annotations

import itertools
import pickle
import random

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn

from pyro_nfvi import NFVI, AutoAmortizedFlow, AutoGaussian, Calibration, calibrate
from pyro_nfvi.calibration.ecdf import symmetry_p_values, uniformity_test
from pyro_nfvi.calibration.ranks import central_ranks_of, hdi_ranks_of, ranks_of
from pyro_nfvi.calibration.simulation import SimulatedModel, Simulator

Y = torch.zeros(5)
PRECISION = 1.0 + len(Y)
SCALE = PRECISION ** -0.5


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


class Conjugate(nn.Module):
    """Exact posterior of the model, or one that is wrong by some scale and shift."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.scale, self.shift = scale * SCALE, shift * SCALE

    def forward(self, y):
        pyro.sample("mu", dist.Normal(y.sum() / PRECISION + self.shift, self.scale))


def exact_draws(model, y):
    """The same as a fit: it gets the model, and reads the data off it."""
    data = poutine.trace(model).get_trace(y).nodes["y"]["value"]
    return {"mu": data.sum() / PRECISION + torch.randn(999, dtype=data.dtype) * SCALE}


def run(fit, *args, model=model, **options):
    options = {"num_simulations": 10, "num_draws": 99, "seed": 0, "progress": False, **options}
    return calibrate(model, fit, *(args or (Y,)), **options)


@pytest.fixture(scope="module")
def exact():
    return run(Conjugate(), num_simulations=200, num_draws=999)


@pytest.fixture(scope="module")
def narrow():
    return run(Conjugate(scale=0.6), num_simulations=200, num_draws=999)


@pytest.fixture(scope="module")
def shifted():
    return run(Conjugate(shift=0.7), num_simulations=200, num_draws=999)


# ------------------------------------------------------------------ tests of ranks

def test_p_values_equal_those_of_all_possible_ranks():
    test = uniformity_test(4, 3)
    ranks = np.array(list(itertools.product(range(4), repeat=4))).T
    counts = test.counts(ranks)
    chance = test.points / 4
    below = stats.binom.cdf(counts, 4, chance[:, None])
    above = stats.binom.sf(counts - 1, 4, chance[:, None])
    gamma = 2 * np.minimum(below, above).min(0)
    truth = (gamma[:, None] >= gamma - 1e-12).mean(1)
    np.testing.assert_allclose(test.p_values(ranks), truth, rtol=1e-12)


@pytest.mark.parametrize("num_ranks", [10, 300])
def test_the_smallest_p_value_keeps_its_digits(num_ranks):
    p = uniformity_test(num_ranks, 1).p_values(np.zeros((num_ranks, 1)))
    np.testing.assert_allclose(p, 2.0 ** (1 - num_ranks), rtol=1e-10)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize(("num_ranks", "num_draws"), [(200, 999), (200, 99), (40, 10), (5, 1)])
def test_uniform_ranks_stay_in_the_band_as_often_as_it_says(num_ranks, num_draws, level):
    test = uniformity_test(num_ranks, num_draws)
    ranks = np.random.default_rng(1).integers(0, num_draws, (num_ranks, 4000), endpoint=True)
    lower, upper = test.band(level)
    share = test.counts(ranks) / num_ranks
    inside = ((share >= lower[:, None]) & (share <= upper[:, None])).all(0)
    error = (level * (1 - level) / 4000) ** 0.5
    slack = {200: 0.02, 40: 0.03, 5: 0.5}[num_ranks]  # few ranks have few p-values
    assert level - 4 * error < inside.mean() < level + slack + 4 * error


def test_a_curve_leaves_the_band_if_and_only_if_its_p_value_says_so():
    test = uniformity_test(50, 20)
    ranks = np.random.default_rng(2).binomial(20, 0.5, (50, 400)) // 2 * 2
    ranks[:, 200:] = np.random.default_rng(3).integers(0, 21, (50, 200))
    lower, upper = test.band(0.9)
    share = test.counts(ranks) / 50
    inside = ((share >= lower[:, None]) & (share <= upper[:, None])).all(0)
    np.testing.assert_array_equal(inside, test.p_values(ranks) > 0.1)
    assert 0 < inside.sum() < 400


@pytest.mark.parametrize("ranks", [[0, 1, 1, 2, 3, 7, 9], [9, 9, 9, 8, 8, 0, 7], [4, 5, 6, 6]])
def test_symmetry_p_values_equal_those_of_all_signs(ranks):
    offsets = 2 * np.array(ranks) - 9

    def distance(signed):
        return max(abs(np.sign(signed[np.abs(signed) >= size]).sum()) for size in np.abs(signed))
    signs = np.array(list(itertools.product([-1, 1], repeat=len(ranks))))
    truth = np.mean([distance(s * np.abs(offsets)) >= distance(offsets) for s in signs])
    p = symmetry_p_values(np.array(ranks)[:, None], 9)
    np.testing.assert_allclose(p, truth, rtol=1e-12)


def test_ranks_in_the_middle_alone_are_symmetric():
    assert symmetry_p_values(np.full((30, 1), 5), 10) == 1.0


# ------------------------------------------------------------------ ranks

DRAWS = {"normal": lambda rng, shape: rng.normal(size=shape),
         "exponential": lambda rng, shape: rng.exponential(size=shape),
         "two modes": lambda rng, shape: rng.normal(size=shape) + 8 * rng.integers(0, 2, shape),
         "poisson": lambda rng, shape: rng.poisson(2.0, shape).astype(float),
         "constant": lambda rng, shape: np.ones(shape)}


@pytest.mark.parametrize("kind", DRAWS)
def test_ranks_of_one_more_draw_are_uniform(kind):
    rng = np.random.default_rng(0)
    draws, truth = DRAWS[kind](rng, (49, 3000)), DRAWS[kind](rng, (3000,))
    ranks = ranks_of(draws, truth, rng)
    hdi = hdi_ranks_of(draws, truth, ranks, rng)
    for some in (ranks, hdi, central_ranks_of(ranks, 49)):
        assert some.min() >= 0
        assert some.max() <= 49
        assert stats.chisquare(np.bincount(some, minlength=50)).pvalue > 1e-3


def test_highest_density_intervals_are_those_of_the_distribution():
    rng = np.random.default_rng(0)
    draws, truth = rng.exponential(size=(999, 400)), rng.exponential(size=400)
    ranks = ranks_of(draws, truth, rng)
    level = 1 - np.exp(-truth)  # they start at zero
    error = hdi_ranks_of(draws, truth, ranks, rng) / 1000 - level
    assert np.sqrt(np.mean(error[level > 0.2] ** 2)) < 0.05
    error = central_ranks_of(ranks, 999) / 1000 - level
    assert np.sqrt(np.mean(error[level > 0.2] ** 2)) > 0.2


@pytest.mark.parametrize("num_draws", [1, 4, 5])
def test_central_intervals_grow_from_the_middle(num_draws):
    entered = central_ranks_of(np.arange(num_draws + 1), num_draws)
    assert sorted(entered) == list(range(num_draws + 1))
    for size in range(1, num_draws + 2):
        inside = np.flatnonzero(entered < size)
        assert inside[-1] - inside[0] == size - 1
        assert abs(inside[0] - (num_draws - inside[-1])) <= 1


# ------------------------------------------------------------------ right and wrong posteriors

def test_the_exact_posterior_has_uniform_ranks(exact):
    assert exact.p_value > 0.01
    assert exact.vsbc_p_value > 0.01
    assert exact.calibrated
    assert exact.verdict.startswith("Verdict: calibrated, as far as 200 simulations tell")


def test_p_values_of_the_exact_posterior_are_spread_over_seeds():
    p = [run(Conjugate(), num_simulations=30, num_draws=49, seed=seed).p_value
         for seed in range(12)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert min(p) > 1e-4


def test_a_narrow_posterior_is_found_but_not_by_symmetry(narrow):
    assert narrow.p_value < 1e-4
    assert narrow.vsbc_p_value > 0.01
    assert not narrow.calibrated
    assert "not calibrated" in narrow.verdict
    assert "'mu', whose draws are too narrow." in narrow.verdict


@pytest.mark.parametrize(("shift", "words"), [(0.7, "too high"), (-0.7, "too low")])
def test_a_shifted_posterior_is_found_by_ranks_and_by_symmetry(shift, words):
    calibration = run(Conjugate(shift=shift), num_simulations=150)
    assert calibration.p_value < 1e-4
    assert calibration.vsbc_p_value < 1e-4
    assert calibration.summary().loc["mu", "draws"] == words


def test_a_wide_posterior_is_found():
    calibration = run(Conjugate(scale=1.8), num_simulations=200)
    assert calibration.p_value < 1e-4
    assert "too wide" in calibration.verdict


@pytest.mark.parametrize("kind", ["central", "hdi"])
def test_coverage_is_nominal_for_the_exact_posterior_and_low_for_a_narrow_one(exact, narrow, kind):
    table = exact.coverage((0.1, 0.5, 0.9, 0.95), kind)
    assert table.level.tolist() == [0.1, 0.5, 0.9, 0.95]
    np.testing.assert_allclose(table.standard_error, (table.level * (1 - table.level) / 200) ** 0.5)
    assert (abs(table.coverage - table.level) < 3.5 * table.standard_error).all()
    expected = 2 * stats.norm.cdf(0.6 * stats.norm.ppf(0.95)) - 1  # of the interval of 90%
    assert narrow.coverage([0.9], kind).coverage[0] == pytest.approx(expected, abs=0.12)


def test_levels_are_rounded_to_draws_and_say_so():
    table = run(Conjugate(), num_draws=9).coverage([0.5, 0.88])
    assert table.level.tolist() == [0.5, 0.9]


def test_the_prior_passes_as_a_posterior_unless_the_likelihood_is_ranked():
    def prior(y):
        pyro.sample("mu", dist.Normal(1e-4 * y.sum(), 1.0))

    def log_likelihood(values, data):
        mu = values["mu"].unsqueeze(-1)
        return {"log_likelihood": dist.Normal(mu, 1.0).log_prob(data["y"]).sum(-1)}
    options = {"amortized": True, "num_simulations": 60, "seed": 1}
    assert run(prior, **options).p_value > 0.01
    calibration = run(prior, quantities_fn=log_likelihood, **options)
    assert calibration.p_values["mu"] > 0.01
    assert calibration.p_values["log_likelihood"] < 1e-10
    assert run(Conjugate(), quantities_fn=log_likelihood, num_simulations=60).p_value > 0.01


def test_p_values_are_corrected_for_their_number():
    ranks = {"a": np.arange(100)[:, None].repeat(3, 1), "b": np.zeros(100, int)}
    truths = {name: value.astype(float) for name, value in ranks.items()}
    truths["b"][0] = 1.0
    calibration = Calibration(ranks, ranks, ranks, truths, 99, 100)
    assert calibration.p_value == 4 * calibration.p_values["b"] < 1e-10
    assert "each corrected for 4 numbers" in calibration.verdict


# ------------------------------------------------------------------ kinds of latents

def test_elements_that_never_vary_are_left_out():
    def correlated(y):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=y)

    def guide(y):
        pyro.sample("factor", dist.LKJCholesky(3, 1.0 + 1e-6 * y.exp().mean()))
    calibration = run(guide, torch.zeros(3), model=correlated, amortized=True)
    assert calibration.ranks["factor"].shape == (10, 3, 3)
    varies = np.tril(np.ones((3, 3), bool))
    varies[0, 0] = False
    np.testing.assert_array_equal(np.isfinite(calibration.p_values["factor"]), varies)
    assert list(calibration.summary().index) == [
        "factor[1, 0]", "factor[1, 1]", "factor[2, 0]", "factor[2, 1]", "factor[2, 2]"]


def test_discrete_latents_are_ranked_with_ties_at_random():
    def coins(y):
        fair = pyro.sample("fair", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(fair, 1.0), obs=y)

    def posterior(model, y):
        y = poutine.trace(model).get_trace(y).nodes["y"]["value"]
        return {"fair": dist.Bernoulli(logits=y - 0.5).sample((99,))}
    calibration = run(posterior, torch.tensor(0.0), model=coins, num_simulations=200)
    assert calibration.p_value > 0.01
    assert (calibration.ranks["fair"] != 0).any()


def test_sites_can_be_chosen_and_plates_name_the_dimensions():
    def groups(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("group", 4):
            pair = pyro.sample("pair", dist.Normal(mu, 1.0).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal(pair.sum(-1), 1.0), obs=y)

    def guide(y):
        with pyro.plate("group", 4):
            pyro.sample("pair", dist.Normal(y.unsqueeze(-1), 1.0).expand([4, 2]).to_event(1))
    calibration = run(guide, torch.zeros(4), model=groups, amortized=True, sites=["pair"])
    data = calibration.to_xarray()
    assert data.pair.dims == ("chain", "draw", "group", "pair_dim_1")
    np.testing.assert_allclose(data.pair[0], calibration.ranks["pair"] / 99)
    assert list(calibration.ranks) == ["pair"]


# ------------------------------------------------------------------ data

def simulated(model, *args, **kwargs):
    torch.manual_seed(0)
    simulator = Simulator(model, args, kwargs)
    _, data = simulator.draw()
    return simulator, data, simulator.arguments(data)


def test_data_replace_the_argument_that_is_observed_and_no_other():
    x, y = torch.zeros(5), torch.zeros(5)

    def regression(x, y, scale=1.0):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x, scale).to_event(1), obs=y)
    _, data, (args, kwargs) = simulated(regression, x, y=y, scale=2.0)
    assert args[0] is x
    assert kwargs["scale"] == 2.0
    torch.testing.assert_close(kwargs["y"], data["y"])
    assert (y == 0).all()


def test_parts_of_one_argument_are_each_replaced():
    table = torch.randn(5, 4)

    def parts(batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        x = batch["table"][:, 0]
        pyro.sample("one", dist.Normal(mu + x, 1.0).to_event(1), obs=batch["table"][:, 1])
        pyro.sample("two", dist.Normal(mu, torch.ones(2, 5)).to_event(2),
                    obs=batch["table"][:, 2:].T)
    _, data, ((batch,), _) = simulated(parts, {"table": table, "name": "x"})
    new = batch["table"]
    torch.testing.assert_close(new[:, 0], table[:, 0])
    torch.testing.assert_close(new[:, 1], data["one"])
    torch.testing.assert_close(new[:, 2:], data["two"].T)
    assert batch["name"] == "x"
    assert not torch.equal(new[:, 1], table[:, 1])


@pytest.mark.parametrize("kind", ["indexed", "numpy", "expanded"])
def test_a_copy_of_an_argument_is_known_by_its_numbers(kind):
    y = torch.arange(5.0) if kind != "numpy" else np.arange(5.0)

    def copies(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5) as index:
            value = {"indexed": lambda: y[index], "expanded": lambda: y * 1.0,
                     "numpy": lambda: torch.tensor(y, dtype=torch.float32)}[kind]()
            pyro.sample("y", dist.Normal(mu, 1.0), obs=value)
    simulator, data, (args, _) = simulated(copies, torch.zeros(5), y)
    assert simulator.in_place
    assert type(args[1]) is type(y)
    np.testing.assert_allclose(args[1], data["y"])
    assert (args[0] == 0).all()


def test_data_that_could_be_either_argument_are_left_to_the_user():
    def twice(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + x, 1.0).to_event(1), obs=y.clone())
    x = torch.arange(3.0)
    assert not simulated(twice, x, x.clone())[0].in_place
    assert not simulated(twice, torch.zeros(3), torch.ones(3))[0].in_place  # nothing to tell by
    assert simulated(twice, torch.zeros(3), x)[0].in_place


def test_a_model_observes_simulated_data_whatever_its_arguments_are():
    y = torch.zeros(5)

    def closed():
        model(y)
    simulator, data, (args, kwargs) = simulated(closed)
    assert not simulator.in_place
    trace = poutine.trace(SimulatedModel(closed, data)).get_trace(*args, **kwargs)
    assert trace.nodes["y"]["is_observed"]
    torch.testing.assert_close(trace.nodes["y"]["value"], data["y"])
    seen = []

    def fit(model):
        seen.append(poutine.trace(model).get_trace().nodes["y"]["value"])
        return {"mu": torch.randn(99)}
    calibrate(closed, fit, num_simulations=2, num_draws=99, progress=False)
    assert not torch.equal(*seen)


def test_conditioned_data_are_simulated_too_and_interventions_stay():
    def open_model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + loc, 1.0))
    held = poutine.do(open_model, data={"loc": torch.tensor(3.0)})
    simulator, data, _ = simulated(poutine.condition(held, data={"y": torch.tensor(0.0)}))
    assert list(simulator.latents) == ["mu", "loc"]
    assert list(data) == ["y"]
    y = torch.stack([simulator.draw()[1]["y"] for _ in range(50)])
    assert abs(y.mean() - 3) < 4 * (2 / 50) ** 0.5


def test_data_of_another_dtype_follow_that_of_the_value_they_replace():
    fitted = SimulatedModel(model, {"y": torch.ones(5)})
    trace = poutine.trace(fitted).get_trace(torch.zeros(5, dtype=torch.float64))
    assert trace.nodes["y"]["value"].dtype == torch.float64


def test_arguments_can_be_made_by_the_user():
    def logs(y):
        model(y.log())

    def guide(y):
        Conjugate()(y.log())
    calibration = run(guide, torch.ones(5), model=logs, amortized=True, num_simulations=100,
                      args_fn=lambda data: (data["y"].exp(),))
    assert calibration.p_value > 0.01
    with pytest.raises(ValueError, match="cannot tell which argument holds the data of 'y'"):
        run(guide, torch.ones(5), model=logs, amortized=True)
    with pytest.raises(ValueError, match="expected `args_fn` to return a tuple"):
        run(guide, torch.ones(5), model=logs, amortized=True, args_fn=lambda data: data["y"])


# ------------------------------------------------------------------ fits

def test_a_function_that_fits_gets_the_model_with_its_data():
    calibration = run(exact_draws, num_simulations=200, num_draws=999)
    assert calibration.p_value > 0.01
    assert calibration.vsbc_p_value > 0.01


def test_a_guide_of_pyro_can_be_fitted_for_each_data_set():
    def fit(model, y):
        guide = AutoNormal(model, init_scale=SCALE)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(30):
            svi.step(y)
        gaps.append((guide.median()["mu"] - y.sum() / PRECISION).item())
        return guide
    gaps = []
    pyro.param("kept", torch.tensor(2.0))
    calibration = run(fit, num_simulations=6)
    assert calibration.num_simulations == 6
    assert max(map(abs, gaps)) < 0.5
    assert len(set(calibration.ranks["mu"])) > 1
    assert set(pyro.get_param_store()) == {"kept"}
    assert pyro.param("kept") == 2.0


def test_an_amortized_flow_reads_all_rows_in_one_pass():
    def groups(x):
        with pyro.plate("groups", len(x)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=x[index])

    class Encoder(nn.Linear):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return super().forward(x)
    guide = AutoAmortizedFlow(groups, Encoder(3, 4), num_layers=2)
    x = torch.randn(6, 3)
    svi = SVI(groups, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(200):
        svi.step(torch.randn(64, 1) + torch.randn(64, 3))
    guide.train()
    Encoder.calls = 0
    calibration = run(guide, x, model=groups, num_simulations=50)
    assert Encoder.calls == 50 + 2  # two to see whether it reads its data
    assert calibration.p_value > 1e-4
    assert calibration.ranks["z"].shape == (50, 6)
    assert guide.training


def test_draws_beyond_those_asked_for_are_thinned():
    def fit(model, y):
        return {"mu": torch.arange(400.0)}
    calibration = run(fit, num_draws=4)
    assert ((calibration.ranks["mu"] == 0) == (calibration.prior_draws["mu"] <= 0)).all()


def test_weighted_draws_are_ranked_beside_the_plain_ones():
    class Fitted:
        def __init__(self, y):
            self.y = y

        def sample(self, num_samples):
            return {"mu": self.y.sum() / PRECISION + 5 + torch.randn(num_samples)}

        def resample(self, num_samples):
            return {"mu": self.y.sum() / PRECISION + SCALE * torch.randn(num_samples)}
    calibration = run(lambda model, y: Fitted(y), weighted=True, num_simulations=60)
    assert calibration.p_value > 0.01
    assert calibration.vsbc_p_value < 1e-10
    assert calibration.calibrated
    assert not run(lambda model, y: Fitted(y), num_simulations=60).calibrated


@pytest.mark.slow
def test_nfvi_is_calibrated_and_stays_as_it_was():
    nfvi = NFVI(model, AutoGaussian(model), seed=3)
    calibration = run(nfvi, num_simulations=20)
    assert not calibration.failures
    assert calibration.p_value > 0.01
    assert nfvi.model is model
    assert nfvi.seed == 3
    assert nfvi.guide.prototype_trace is None
    assert run(NFVI(model), num_simulations=2, weighted=True).num_simulations == 2


def test_refits_leave_the_checkpoints_alone(tmp_path):
    class Fit(NFVI):
        def run(self, y):
            assert self.checkpoint is None
            return {"mu": y.mean() + SCALE * torch.randn(1000)}
    assert not run(Fit(model, checkpoint=tmp_path), num_simulations=3).failures


@pytest.mark.slow
def test_seeds_give_the_same_in_other_processes():
    def local(y):
        model(y)
    one = run(NFVI(local), model=local, num_simulations=4)
    two = run(NFVI(local, AutoGaussian(local)), model=local, num_simulations=4, n_jobs=2)
    again = run(NFVI(local), model=local, num_simulations=4, n_jobs=2)
    assert not two.failures
    np.testing.assert_array_equal(one.prior_draws["mu"], two.prior_draws["mu"])
    np.testing.assert_array_equal(one.ranks["mu"], again.ranks["mu"])


def test_a_seed_makes_it_reproducible_and_leaves_random_states():
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    before = states()
    first, again, other = (run(exact_draws, seed=seed) for seed in (1, 1, 2))
    assert states() == before
    np.testing.assert_array_equal(first.ranks["mu"], again.ranks["mu"])
    assert (first.ranks["mu"] != other.ranks["mu"]).any()
    torch.manual_seed(5)
    unseeded = run(exact_draws, seed=None).ranks["mu"]
    assert (run(exact_draws, seed=None).ranks["mu"] != unseeded).any()
    torch.manual_seed(5)
    np.testing.assert_array_equal(run(exact_draws, seed=None).ranks["mu"], unseeded)


def test_simulations_do_not_depend_on_those_before_them():
    few, many = (run(exact_draws, num_simulations=n).ranks["mu"] for n in (5, 9))
    np.testing.assert_array_equal(few, many[:5])


def test_the_default_dtype_is_that_of_the_caller():
    torch.set_default_dtype(torch.float64)
    try:
        double = run(exact_draws, torch.zeros(5))
    finally:
        torch.set_default_dtype(torch.float32)
    single = run(exact_draws)
    assert (double.prior_draws["mu"] != single.prior_draws["mu"]).any()


def test_refits_run_on_one_thread():
    before, seen = torch.get_num_threads(), []

    def fit(model, y):
        seen.append(torch.get_num_threads())
        return exact_draws(model, y)
    torch.set_num_threads(2)
    try:
        run(fit)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


# ------------------------------------------------------------------ what goes wrong

def test_failed_fits_are_counted_and_named():
    def fit(model, y):
        draws = exact_draws(model, y)
        if y[0] > 1.0:
            raise ArithmeticError("no luck")
        return {"mu": draws["mu"] * torch.nan} if y[0] < -1.0 else draws
    calibration = run(fit, num_simulations=40, num_draws=999)
    kinds = {failure.text for failure in calibration.failures}
    assert kinds == {"ArithmeticError: no luck", "ValueError: the fit gave draws of 'mu' that are "
                                                 "nan"}
    assert calibration.num_simulations + len(calibration.failures) == 40
    assert "no luck" in "".join(failure.details for failure in calibration.failures)
    assert not calibration.calibrated
    assert f"{len(calibration.failures)} of 40 simulations failed" in calibration.verdict


def test_a_quantity_that_is_nan_is_a_failure():
    def root(values, data):
        return {"root": (-values["mu"].abs()).sqrt()}
    with pytest.raises(ValueError, match="the fit gave draws of 'root' that are nan"):
        run(Conjugate(), quantities_fn=root)


def test_fits_that_all_fail_are_called_off():
    calls = []

    def fit(model, y):
        calls.append(1)
        raise ArithmeticError("no luck")
    with pytest.raises(ValueError, match="all of the first 5 simulations failed, the first with "
                                         "ArithmeticError: no luck") as caught:
        run(fit, num_simulations=1000)
    assert len(calls) < 20
    assert "raise ArithmeticError" in str(caught.value.__cause__)


def test_warnings_of_fits_are_counted_not_raised():
    def fit(model, y):
        import warnings
        if y[0] > 0:
            warnings.warn("slow today", stacklevel=2)
        warnings.warn("old", DeprecationWarning, stacklevel=2)
        return exact_draws(model, y)
    calibration = run(fit, num_draws=999)
    assert 0 < len(calibration.notes) < 10
    assert {note.text for note in calibration.notes} == {"slow today"}
    assert f"{len(calibration.notes)} of 10 fits warned; the first: slow today" \
        in calibration.verdict


def test_an_interrupt_keeps_what_is_done():
    calls = []

    def fit(model, y):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return exact_draws(model, y)
    with pytest.warns(UserWarning, match="calibrate was interrupted after 7 of 30 simulations"):
        calibration = run(fit, num_simulations=30, num_draws=999)
    assert calibration.num_simulations == 7
    assert "Interrupted after 7 of 30" in calibration.verdict
    calls[:] = [1] * 7
    with pytest.raises(KeyboardInterrupt):
        run(fit)


def test_a_fit_that_was_interrupted_inside_is_not_counted():
    class Fitted:
        history = type("History", (), {"interrupted": True})
    with pytest.raises(KeyboardInterrupt):
        run(lambda model, y: Fitted())


@pytest.mark.parametrize("posterior", [
    3, {"nu": torch.zeros(99)}, {"mu": torch.zeros(98)}, {"mu": torch.tensor(1.0)},
    {"mu": torch.zeros(99, 2)}, lambda *args: None], ids=lambda value: str(type(value)))
def test_what_a_fit_may_not_return_is_said(posterior):
    with pytest.raises(ValueError, match="simulations failed, the first with ValueError: the fit "):
        run(lambda model, y: posterior)


def minibatches(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def with_factor(y):
    model(y)
    pyro.factor("extra", torch.tensor(1.0))


def with_param(y):
    pyro.param("scale", torch.tensor(1.0))
    model(y)


def improper(y):
    pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    model(y)


def masked_prior(y):
    with poutine.mask(mask=False):
        pyro.sample("nu", dist.Normal(0.0, 1.0))
    model(y)


def without_data(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def without_latents(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([5]).to_event(1), obs=y)


@pytest.mark.parametrize(("broken", "words"), [
    (minibatches, "'y' is in plate 'data', which draws 2 of 5. Use the full plate"),
    (with_factor, "'extra' is a pyro.factor"),
    (poutine.scale(model, scale=2.0), "'mu' is scaled by 2.0"),
    (with_param, "this one has pyro.param statements"),
    (improper, "cannot draw from the prior of this model: .*proper prior"),
    (masked_prior, "'nu' has its prior masked out"),
    (without_data, "expected a model that observes data"),
    (without_latents, "found no latent site"),
    (3, "expected `model` to be a Pyro model"),
], ids=lambda value: getattr(value, "__name__", "other") if callable(value) else None)
def test_a_model_that_cannot_be_simulated_is_refused(broken, words):
    with pytest.raises(ValueError, match=f"calibrate .*{words}"):
        run(exact_draws, model=broken)


def test_masked_data_and_a_prior_that_overflows_are_dealt_with():
    def wild(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 80.0))
        with poutine.mask(mask=torch.tensor([True, True, False, False, False])):
            pyro.sample("y", dist.Normal(0.0, scale).expand([5]), obs=y)
    calibration = run(lambda model, y: {"scale": torch.ones(99)}, model=wild, num_simulations=40)
    assert any("'scale' with a value that is not finite" in f.text or "y" in f.text
               for f in calibration.failures)
    assert calibration.num_simulations > 0


@pytest.mark.parametrize(("fit", "options", "words"), [
    (3, {}, "expected `fit` to be NFVI"),
    (AutoGaussian(model), {}, "got AutoGaussian, which does not read data"),
    (3, {"amortized": True}, "expected an amortized guide to be callable"),
    (Conjugate(), {"weighted": True}, "an amortized guide, whose draws have no weights"),
    (exact_draws, {"num_simulations": 0}, "`num_simulations` to be an integer >= 1"),
    (exact_draws, {"num_draws": 1}, "`num_draws` to be an integer >= 2"),
    (exact_draws, {"n_jobs": 0}, "`n_jobs` to be a number of processes"),
    (exact_draws, {"n_jobs": 1.5}, "`n_jobs` to be a number of processes"),
    (exact_draws, {"seed": -1}, "`seed` to be an integer >= 0"),
    (exact_draws, {"seed": "a"}, "`seed` to be an integer >= 0"),
    (exact_draws, {"sites": ["nu"]}, "`sites` among mu, got 'nu'"),
    (exact_draws, {"sites": []}, "`sites` among mu, got none"),
    (exact_draws, {"args_fn": 3}, "`args_fn` to be a function"),
    (exact_draws, {"quantities_fn": 3}, "`quantities_fn` to be a function"),
], ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "")
def test_wrong_arguments_are_named(fit, options, words):
    with pytest.raises(ValueError, match=f"calibrate .*{words}"):
        run(fit, **options)


def test_a_guide_that_does_not_read_data_is_refused():
    guide = AutoNormal(model)
    guide(Y)
    with pytest.raises(ValueError, match="got one whose draws are the same whatever the data"):
        run(guide)


def test_a_guide_that_fails_is_refused():
    with pytest.raises(ValueError, match="the guide gave no draws for simulated data: TypeError"):
        run(lambda x, y: None, amortized=True)


# ------------------------------------------------------------------ reports

def test_the_table_and_the_words_are_printed(exact, shifted):
    table = shifted.summary()
    assert list(table.columns) == ["p_value", "vsbc_p_value", "mean_rank", "central_50",
                                   "central_90", "hdi_50", "hdi_90", "draws"]
    assert table.loc["mu", "mean_rank"] == shifted.ranks["mu"].mean() / 999
    assert table.loc["mu", "central_90"] == shifted.coverage([0.9]).coverage[0]
    assert exact.summary().loc["mu", "draws"] == ""
    ranks = {"x": np.random.default_rng(0).integers(0, 100, (60, 300))}
    table = Calibration(ranks, ranks, ranks, ranks, 99, 60).summary()
    assert table.p_value.min() < 0.05
    assert (table.draws == "").all()
    assert exact.verdict in repr(exact)
    assert "too high" in repr(shifted)


def test_few_draws_leave_a_table_and_few_simulations_say_so():
    calibration = run(Conjugate(), num_draws=2, num_simulations=3)
    assert calibration.summary().shape == (1, 8)
    assert "3 simulations are too few to tell" in calibration.verdict
    assert run(Conjugate(), num_simulations=1).num_simulations == 1


def test_a_truth_that_never_varies_leaves_nothing_to_test():
    ranks = {"x": np.arange(60)}
    calibration = Calibration(ranks, ranks, ranks, {"x": np.ones(60)}, 99, 60)
    assert calibration.summary().empty
    assert not calibration.calibrated
    assert "nothing to test" in repr(calibration)


def test_a_calibration_can_be_pickled(shifted):
    copy = pickle.loads(pickle.dumps(shifted))
    assert copy.verdict == shifted.verdict


@pytest.fixture
def _closed_figures():
    yield
    plt.close("all")


@pytest.mark.usefixtures("_closed_figures")
def test_the_plot_shows_a_right_posterior_inside_the_band_and_wrong_ones_outside(
        exact, narrow, shifted):
    test = uniformity_test(200, 999)
    lower, upper = test.band(0.95)
    zero = test.points / 1000
    for calibration, inside in ((exact, True), (narrow, False), (shifted, False)):
        ax, = calibration.plot_ecdf()
        line = ax.lines[1].get_ydata()[1:-1]
        shares = test.counts(calibration.ranks["mu"]) / 200
        np.testing.assert_allclose(line, shares - zero)
        assert bool(((line >= lower - zero - 1e-9) & (line <= upper - zero + 1e-9)).all()) == inside
        assert ("outside: mu" in [text.get_text() for text in ax.get_legend().texts]) != inside
        assert ax.get_title() == "mu"


@pytest.mark.usefixtures("_closed_figures")
@pytest.mark.parametrize("kind", ["central", "hdi"])
def test_the_plot_of_coverage_is_the_coverage(narrow, kind):
    ax, = narrow.plot_coverage(kind=kind)
    x, y = ax.lines[1].get_data()
    table = narrow.coverage([float(level) for level in x[1:-1]], kind)
    np.testing.assert_allclose(y[1:-1], table.coverage)
    assert (y[20:80] < x[20:80]).all()


@pytest.mark.usefixtures("_closed_figures")
def test_sites_of_many_numbers_share_a_panel_and_a_wider_band():
    rng = np.random.default_rng(0)
    ranks = {"a": rng.integers(0, 100, (50, 8)), "b_$x": rng.integers(0, 100, 50)}
    ranks |= {f"c{k}": ranks["b_$x"] for k in range(40)}
    calibration = Calibration(ranks, ranks, ranks, ranks, 99, 50)
    axes = calibration.plot_ecdf(["a", "b_$x"])
    axes[0].figure.canvas.draw()
    assert [len(ax.lines) for ax in axes] == [9, 2]
    many, one = (ax.collections[0].get_paths()[0].get_extents().height for ax in axes)
    assert many > 1.1 * one
    assert len(calibration.plot_ecdf()) == 24
    given = plt.subplots(1, 2)[1]
    assert calibration.plot_coverage("b_$x", axes=given[1])[0] is given[1]
    with pytest.raises(ValueError, match="plot_ecdf expected 2 axes, one for each site, got 1"):
        calibration.plot_ecdf(["a", "c1"], axes=given[0])


@pytest.mark.parametrize(("call", "words"), [
    (lambda c: c.coverage([1.5]), "coverage expected levels between 0 and 1, got 1.5"),
    (lambda c: c.coverage(kind="equal"), "`kind` to be 'central' or 'hdi', got 'equal'"),
    (lambda c: c.plot_ecdf(level=0), "plot_ecdf expected levels between 0 and 1"),
    (lambda c: c.plot_coverage("nu"), "`var_names` among mu, got 'nu'"),
], ids=["level", "kind", "band", "site"])
def test_wrong_options_of_reports_are_named(exact, call, words):
    with pytest.raises(ValueError, match=words):
        call(exact)


def test_a_deterministic_site_in_a_plate_is_simulated_as_it_is():
    def shifted(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            loc = pyro.deterministic("loc", mu + torch.arange(3.0))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    _, data = Simulator(shifted, (torch.zeros(3),), {}).draw()
    assert data["y"].shape == (3,)
