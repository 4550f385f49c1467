"""Posterior: draws, weights, verdict, pictures, files."""

from __future__ import annotations

import math
import os
import pickle
import re
import stat
from functools import partial
from typing import NamedTuple

import arviz
import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_nfvi import NFVI, AutoFlow, AutoIAF, AutoPlanar, Posterior, nsf, planar, realnvp
from pyro_nfvi.diagnostics import verdict
from pyro_nfvi.engine import Engine
from pyro_nfvi.flows import (
    Compose,
    Diagonal,
    FixedLinear,
    FixedLowRank,
    Flow,
    LowRank,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    Planar,
    StudentT,
    Triangular,
)
from pyro_nfvi.guides import AutoGaussian, AutoRadial
from pyro_nfvi.inference import AutoPathfinder, History, ImportanceSample, LogJoint, Stage
from pyro_nfvi.posterior import NUM_SAMPLES
from pyro_nfvi.testing import perturb

mpl.use("Agg")
DOUBLE = torch.float64
Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


TRUE_MEAN, TRUE_DEVIATION = Y.sum().item() / 6, 6 ** -0.5


def mixed(y):
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("group", 4):
        pyro.sample("share", dist.Beta(2.0, 2.0))
    conjugate(y)


def funnel():
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(5), (log_scale / 2).exp()).to_event(1))


def bent(y):
    """A posterior along a parabola, which no Gaussian follows."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a ** 2, 0.5), obs=y[0])


def fit(model, *args, guide=None, **kwargs):
    guide = AutoPlanar(model, num_layers=1, affine=Triangular) if guide is None else guide
    run = NFVI(model, guide, **{"num_particles": 16, "num_steps": 10, "seed": 0,
                                "progress": False, **kwargs}).run
    return run(*args)


@pytest.fixture(scope="module")
def good():
    return fit(conjugate, Y, num_steps=300, lr=0.05, dtype=DOUBLE)


@pytest.fixture(scope="module")
def trained():
    """A fit that went through the flow, twice."""
    return fit(bent, Y)


def set_gaussian(model, args, mean, deviation):
    """A posterior whose guide is this Gaussian, whatever the true one is."""
    guide = AutoFlow(model, planar, num_layers=1).setup(*args)
    affine = guide._modules["flow"].bijection.layers[-1]
    with torch.no_grad():
        affine.shift.value.fill_(mean)
        affine.log_scale.value.fill_(math.log(deviation))
    return Posterior(guide, LogJoint(model, args, {}, guide.layout), History([0.0]))


# ------------------------------------------------------------------ draws

@pytest.mark.parametrize("how", ["sample", "resample"])
@pytest.mark.parametrize("num_samples", [1, 7])
def test_draws_have_the_shapes_and_supports_of_their_sites(how, num_samples):
    draws = getattr(fit(mixed, Y), how)(num_samples)
    shapes = {name: tuple(value.shape[1:]) for name, value in draws.items()}
    assert shapes == {"scale": (), "weights": (3,), "share": (4,), "mu": ()}
    assert {len(value) for value in draws.values()} == {num_samples}
    assert not any(value.requires_grad for value in draws.values())
    assert (draws["scale"] > 0).all()
    assert constraints.simplex.check(draws["weights"]).all()
    assert constraints.unit_interval.check(draws["share"]).all()


@pytest.mark.parametrize("how", ["sample", "resample", "to_arviz"])
@pytest.mark.parametrize("num_samples", [0, -1, 2.5, "many", True], ids=str)
def test_a_wrong_number_of_draws_is_named(good, how, num_samples):
    with pytest.raises(ValueError, match=f"expected `num_samples` .* got {num_samples!r}"):
        getattr(good, how)(num_samples)


def test_samples_are_fresh_and_draws_are_kept(good):
    assert not torch.equal(good.sample(5)["mu"], good.sample(5)["mu"])
    assert good.draws is good.draws
    assert good.draws.num_samples == NUM_SAMPLES
    assert set(good.resample(50)["mu"].tolist()) <= set(good.draws.z[:, 0].tolist())


def test_log_prob_is_the_density_of_the_guide(good):
    grid = torch.linspace(-3, 4, 2001, dtype=DOUBLE)
    density = good.log_prob({"mu": grid}).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(good.log_prob({"mu": good.draws.z[:9, 0]}), good.draws.log_q[:9])


def test_log_prob_names_a_missing_site(good):
    with pytest.raises(ValueError, match="'mu' is missing"):
        good.log_prob({"nu": torch.zeros(2)})


# ------------------------------------------------------------------ weights

@pytest.mark.parametrize(("mean", "deviation"), [
    (TRUE_MEAN, TRUE_DEVIATION), (0.0, 1.0), (2.0, 1.5), (TRUE_MEAN, 3.0), (-0.5, 1.0),
], ids=["exact", "prior", "shifted", "wide", "far"])
def test_weighted_moments_are_true_even_for_a_poor_guide(mean, deviation):
    posterior = set_gaussian(conjugate, (Y,), mean, deviation)
    weights, mu = posterior.log_weights.exp(), posterior.draws.z[:, 0].double()
    for power, truth in ((1, TRUE_MEAN), (2, TRUE_MEAN ** 2 + TRUE_DEVIATION ** 2)):
        found = (weights * mu ** power).sum()
        error = ((weights * (mu ** power - found)) ** 2).sum().sqrt()
        assert abs(found - truth) < 4 * error
    resampled = posterior.resample(4000)["mu"]
    error = TRUE_DEVIATION * (1 / posterior.ess + 1 / 4000) ** 0.5
    assert abs(resampled.mean() - TRUE_MEAN) < 4 * error


def test_the_elbo_is_the_log_evidence_at_an_exact_fit():
    posterior = set_gaussian(conjugate, (Y.double(),), TRUE_MEAN, TRUE_DEVIATION)
    covariance = torch.eye(5) + torch.ones(5, 5)
    evidence = dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(Y).item()
    assert posterior.elbo[0] == pytest.approx(evidence, abs=1e-4)
    assert posterior.elbo[1] < 1e-4
    assert posterior.ess == pytest.approx(NUM_SAMPLES, rel=1e-4)


def test_the_elbo_has_the_closed_form_of_a_gaussian_guide():
    mean, deviation = 2.0, 0.8
    posterior = set_gaussian(conjugate, (Y,), mean, deviation)
    evidence = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(Y)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation),
        torch.distributions.Normal(TRUE_MEAN, TRUE_DEVIATION))
    value, error = posterior.elbo
    assert abs(value - (evidence - divergence)) < 4 * error


def test_weights_are_normalized_and_of_the_draws(good):
    assert good.log_weights.shape == (NUM_SAMPLES,)
    assert torch.logsumexp(good.log_weights, 0).abs() < 1e-10
    assert good.ess == good.draws.ess
    assert good.pareto_k == good.draws.pareto_k


# ------------------------------------------------------------------ reports

def test_a_summary_prints_a_table_and_a_verdict_of_one_line(good):
    summary = good.summary()
    table, rest = repr(summary).split("\n\n")
    assert "mu" in table
    assert "mean" in table
    numbers, verdict = rest.splitlines()
    assert "ELBO" in numbers
    assert "k-hat" in numbers
    assert "of 10,000 draws" in numbers
    assert verdict == summary.verdict
    assert verdict.startswith("Verdict: good")
    assert summary.trusted
    assert float(summary.table.loc["mu", "mean"]) == pytest.approx(TRUE_MEAN, abs=0.05)


def test_a_summary_has_a_page_for_notebooks(good):
    html = good.summary()._repr_html_()
    assert html.startswith("<table")
    assert "Verdict: good" in html


def test_every_coordinate_has_its_row():
    table = fit(mixed, Y).summary().table
    assert len(table) == 1 + 3 + 4 + 1


@pytest.mark.parametrize("posterior", [
    lambda: fit(funnel, num_steps=3),
    lambda: set_gaussian(conjugate, (Y,), TRUE_MEAN, 0.02),
    lambda: set_gaussian(conjugate, (Y,), 30.0, 0.1),
], ids=["funnel-after-few-steps", "too-narrow", "far-away"])
def test_a_bad_fit_is_not_to_be_trusted_and_says_what_to_do(posterior):
    summary = posterior().summary()
    assert not summary.trusted
    assert summary.verdict.startswith(("Verdict: do not trust", "Verdict: too few"))
    for way_out in ("num_steps", "guide", "neutra()"):
        assert way_out in summary.verdict
    assert "\n" not in summary.verdict


def test_an_exact_fit_is_good():
    assert set_gaussian(conjugate, (Y.double(),), TRUE_MEAN, TRUE_DEVIATION).summary().trusted


@pytest.mark.parametrize(("history", "words"), [
    (History([0.0] * 7, interrupted=True), "interrupted after 7 steps"),
    (History([0.0] * 7, stopped="the log joint is nan at step 7"), "stopped early: the log joint"),
], ids=["interrupted", "stopped"])
@pytest.mark.parametrize("deviation", [TRUE_DEVIATION * 1.2, 0.02], ids=["good", "bad"])
def test_the_verdict_mentions_a_fit_that_did_not_end(history, words, deviation):
    posterior = set_gaussian(conjugate, (Y,), TRUE_MEAN, deviation)
    posterior.history = history
    assert words in posterior.summary().verdict


@pytest.mark.parametrize("deviation", [TRUE_DEVIATION, 0.02], ids=["good", "bad"])
def test_a_concern_makes_any_fit_untrusted(deviation):
    posterior = set_gaussian(conjugate, (Y.double(),), TRUE_MEAN, deviation)
    posterior.history.concerns = ["chains drift away", "so do sheep"]
    summary = posterior.summary()
    assert not summary.trusted
    assert summary.verdict.startswith("Verdict: do not trust these draws: chains drift away; so do "
                                      "sheep. ")
    assert "neutra()" in summary.verdict
    assert "\n" not in summary.verdict


def test_a_log_joint_that_is_never_finite_is_named():
    summary = set_gaussian(conjugate, (torch.tensor([math.inf]),), 0.0, 0.1).summary()
    assert not summary.trusted
    assert "0.00% of the draws have a finite log joint" in summary.verdict


@pytest.mark.parametrize(("num_heavy", "trusted"), [(300, False), (1500, True)],
                         ids=["too-few", "enough"])
def test_the_verdict_asks_for_a_tenth_of_the_draws(num_heavy, trusted):
    log_p = torch.full((10_000,), -12.0, dtype=DOUBLE)
    log_p[:num_heavy] = torch.rand(num_heavy, dtype=DOUBLE)
    log_weights = log_p - log_p.logsumexp(0)
    sample = ImportanceSample(torch.randn(10_000, 1), log_p, 0 * log_p, log_weights, 0.3)
    assert (sample.ess >= 1000) == trusted
    answer, words = verdict(sample, History())
    assert answer is trusted
    assert trusted or ("too few effective draws" in words and "at least 1,000" in words)


def test_the_verdict_names_the_weighted_draws_where_only_these_are_good():
    log_p = 0.5 * torch.randn(10_000, dtype=DOUBLE)
    sample = ImportanceSample(torch.randn(10_000, 1), log_p, 0 * log_p, log_p - log_p.logsumexp(0),
                              pareto_k=0.6)
    answer, words = verdict(sample, History())
    assert answer
    assert words == ("Verdict: good after weighting (k-hat below 0.70); weighted draws (resample, "
                     "to_arviz) are the ones to use.")


def test_a_posterior_is_worth_printing(good):
    text = repr(good)
    for words in ("Posterior(AutoPlanar", "mu: ()", "ELBO -", "k-hat", "of 10,000"):
        assert words in text


# ------------------------------------------------------------------ pictures

def test_plot_elbo_returns_axes_with_the_stages(trained):
    ax = trained.plot_elbo()
    assert isinstance(ax, mpl.axes.Axes)
    assert ax.get_xlabel() == "step"
    assert "ELBO" in ax.get_ylabel()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), trained.history.elbo)
    _, flow, _ = trained.history.stages
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [flow.num_steps]
    mpl.pyplot.close(ax.figure)


def test_plot_elbo_draws_on_axes_of_yours(good):
    figure, ax = mpl.pyplot.subplots()
    assert good.plot_elbo(ax) is ax
    mpl.pyplot.close(figure)


@pytest.mark.parametrize("length", [0, 1, 2, 60])
def test_plot_elbo_takes_a_history_of_any_length(good, length):
    posterior = Posterior(good.guide, good.log_joint, History([1.0] * length,
                                                              stages=[Stage("flow", length)]))
    mpl.pyplot.close(posterior.plot_elbo().figure)


# ------------------------------------------------------------------ predictions

def line(x, y=None):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = pyro.deterministic("mean", x @ weights, event_dim=1)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def test_predictions_at_new_inputs_have_the_moments_of_the_closed_form():
    x, new = torch.randn(30, 2), torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(30)
    posterior = fit(line, x, y)  # in double precision; the new inputs are in single
    assert posterior.draws.z.dtype is DOUBLE
    values = posterior.predict(new, num_samples=4000)
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / 0.25)
    mean = new @ (covariance @ x.T @ y / 0.25)
    of_mean = (new @ covariance @ new.T).diagonal()
    for name, variance in (("mean", of_mean), ("y", of_mean + 0.25)):
        assert values[name].shape == (4000, 3)
        error = (values[name].mean(0) - mean) / (variance / 4000).sqrt()
        assert error.abs().max() < 4.5
        assert ((values[name].var(0) / variance).log().abs() < 4.5 * (2 / 4000) ** 0.5).all()
    given = posterior.predict(new, torch.full((3,), 100.0))["y"]  # data are drawn all the same
    assert given.max() < 50


def test_a_guide_in_double_precision_is_judged_on_data_in_single():
    x, y = torch.randn(30, 2), torch.randn(30)
    posterior = fit(line, x, y)
    again = Posterior.of(line, posterior.guide, x, y)
    assert again.draws.z.dtype is DOUBLE
    assert again.elbo[0] == pytest.approx(posterior.elbo[0], abs=1e-3)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(("args", "message"), [
    ((), "expected the arguments of the model, (x, y=None): missing a required argument: 'x'."),
    ((torch.ones(5, 2), None, 3), "expected the arguments of the model, (x, y=None): too many"),
], ids=["none", "many"])
def test_predictions_ask_for_the_arguments_of_the_model(args, message):
    posterior = Posterior.of(line, AutoPlanar(line), torch.randn(4, 2), torch.randn(4))
    with pytest.raises(ValueError, match=re.escape(f"Posterior.predict {message}")):
        posterior.predict(*args)


def test_predictions_for_latents_of_new_groups_are_refused():
    def grouped(count):
        with pyro.plate("groups", count):
            pyro.sample("z", dist.Normal(0.0, 1.0))
    posterior = Posterior.of(grouped, AutoPlanar(grouped), 3)
    with pytest.raises(ValueError, match=r"'z' of shape \(3,\), got \(4,\). Only data may be"):
        posterior.predict(4)


# ------------------------------------------------------------------ files: what is kept

def round_trip(posterior, tmp_path, model, **kwargs):
    path = tmp_path / "fit.pt"
    posterior.save(path)
    return Posterior.load(path, model, **kwargs)


def assert_same_fit(one, other):
    assert other.history == one.history
    assert type(other.guide) is type(one.guide)
    state = other.guide.state_dict()
    assert list(state) == list(one.guide.state_dict())
    for name, value in one.guide.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)
    for way in ("sample_posterior", "quantiles"):
        torch.manual_seed(5)
        expected = getattr(one.guide, way)(3 if way == "sample_posterior" else [0.3])
        torch.manual_seed(5)
        got = getattr(other.guide, way)(3 if way == "sample_posterior" else [0.3])
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    z = one.draws.z[:5]
    torch.testing.assert_close(other.log_joint(z), one.log_joint(z), rtol=0, atol=0)


GUIDES = {
    "AutoFlow": AutoFlow,
    "AutoPlanar": AutoPlanar,
    "AutoIAF": AutoIAF,
    "options": partial(AutoRadial, num_layers=3),
    "nested-options": lambda model: AutoFlow(
        model, partial(partial(nsf, num_layers=3, num_bins=5), num_layers=2, hidden_dims=(8,))),
    "affine": partial(AutoFlow, recipe=realnvp, affine=Triangular, num_layers=2),
    "base": partial(AutoPlanar, base=partial(StudentT, df=4.0, learn=True)),
    "mixture": partial(AutoPlanar, base=partial(Mixture, num_components=2)),
    "no-flow": AutoGaussian,
    "low-rank": partial(AutoPlanar, affine=partial(LowRank, rank=2)),
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_fit_comes_back_from_its_file(make, tmp_path):
    posterior = fit(mixed, Y, guide=make(mixed), num_steps=4)
    assert_same_fit(posterior, round_trip(posterior, tmp_path, mixed))


def test_the_default_fit_comes_back_from_its_file(tmp_path):
    posterior = NFVI(conjugate, num_steps=4, num_particles=8, progress=False).run(Y)
    assert_same_fit(posterior, round_trip(posterior, tmp_path, conjugate))


def test_a_loaded_fit_goes_on_training(good, tmp_path):
    loaded = round_trip(good, tmp_path, conjugate)
    again = fit(conjugate, Y, guide=loaded.guide, dtype=DOUBLE)
    assert [(stage.name, stage.num_steps) for stage in again.history.stages] == [("flow", 10)]
    assert loaded.summary().trusted


# What a fit puts around the guide's flow, of two coordinates.
FRAMES = {
    "full": (lambda: FixedLinear(torch.randn(2), torch.tensor([[2.0, 0.0], [0.5, 0.1]])), None,
             Triangular),
    "low-rank": (lambda: FixedLowRank(torch.randn(2), torch.tensor([3.0, 0.1]),
                                      torch.tensor([[0.6], [0.8]]), torch.tensor([2.0])), None,
                 partial(LowRank, rank=1)),
    "student-t": (lambda: FixedLinear(torch.randn(2), torch.eye(2)),
                  partial(StudentT, df=[3.0, 7.0]), Triangular),
    "multivariate-student-t": (lambda: FixedLinear(torch.randn(2), torch.eye(2)),
                               partial(MultivariateStudentT, df=3.5), LowRank),
    "mixture": (lambda: FixedLinear(torch.randn(2), torch.eye(2)), lambda dim: MixtureOfFlows(
        [Flow(perturb(Triangular(dim))), Flow(FixedLowRank(
            torch.ones(2), torch.ones(2), torch.eye(2), torch.tensor([1.0, -0.5]))),
         Flow(perturb(Diagonal(dim)), MultivariateStudentT(dim, 4.0)),
         Flow(FixedLinear(torch.zeros(2), torch.eye(2)), StudentT(dim, df=[2.0, 30.0]))],
        [0.1, 0.2, 0.3, 0.4]), Diagonal),
}


def assert_equal_density(one, other, tmp_path):
    z = one.guide._flow().rsample_and_log_prob((50,))[0].detach()
    assert torch.equal(other.guide._flow().log_prob(z), one.guide._flow().log_prob(z))
    draws = one.sample(20)
    assert torch.equal(other.log_prob(draws), one.log_prob(draws))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_with_its_noise_comes_back_from_its_file(name, dtype, tmp_path):
    make_frame, base, affine = FRAMES[name]
    y = Y.to(dtype)
    guide = AutoPlanar(bent, num_layers=2)
    guide.setup(y).whiten(make_frame(), None if base is None else base(2), affine(2)).to(dtype)
    perturb(guide._flow())
    posterior = Posterior(guide, LogJoint(bent, (y,), {}, guide.layout, dtype), History([0.0]))
    loaded = round_trip(posterior, tmp_path, bent)
    assert_same_fit(posterior, loaded)
    assert_equal_density(posterior, loaded, tmp_path)
    assert repr(loaded.guide._flow()) == repr(guide._flow())


def two_modes():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    near, far = ((-0.5 * (x - place).square().sum(-1) / 0.25) for place in (-4.0, 4.0))
    pyro.factor("modes", torch.logaddexp(near + math.log(0.3), far + math.log(0.7)))


def heavy():
    pyro.sample("x", dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1))


def wide():
    with pyro.plate("all", 410):
        pyro.sample("x", dist.Normal(100.0, 0.1))


@pytest.mark.parametrize(("model", "base", "frame"), [
    (two_modes, MixtureOfFlows, FixedLinear),
    (heavy, (StudentT, MultivariateStudentT), FixedLinear),
    (wide, object, FixedLowRank),
], ids=["mixture", "student-t", "low-rank"])
def test_a_fit_of_the_gaussian_stage_comes_back_from_its_file(model, base, frame, tmp_path):
    posterior = fit(model)
    flow = posterior.guide._flow()
    assert isinstance(flow.base, base)
    assert isinstance(flow.bijection.layers[-1], frame) or model is two_modes
    loaded = round_trip(posterior, tmp_path, model)
    assert_same_fit(posterior, loaded)
    assert_equal_density(posterior, loaded, tmp_path)
    assert loaded.summary().trusted == posterior.summary().trusted


def test_a_fit_of_pathfinder_comes_back_to_a_guide_of_its_kind(tmp_path):
    posterior = fit(conjugate, Y, guide=AutoPathfinder(conjugate))
    path = tmp_path / "fit.pt"
    posterior.save(path)
    loaded = Posterior.load(path, conjugate, guide=AutoPathfinder(conjugate))
    assert_same_fit(posterior, loaded)
    assert_equal_density(posterior, loaded, tmp_path)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_a_fit_in_double_precision_comes_back(tmp_path):
    x = torch.randn(5, 2)
    posterior = fit(regression, x, x.sum(-1), dtype=DOUBLE)
    loaded = round_trip(posterior, tmp_path, regression)
    assert_same_fit(posterior, loaded)
    assert loaded.sample(2)["w"].dtype == DOUBLE
    assert torch.get_default_dtype() == torch.float32


def test_an_interrupted_history_comes_back(good, tmp_path):
    history = History([1.0, 2.0, math.inf], [(1, "'mu' (value inf)"), (2, "the gradient")], True,
                      "why", [Stage("Gaussian", gradients=300),
                              Stage("flow", 3, 0.4, 0.5, -1.0, 48)], concerns=["drift"])
    loaded = round_trip(Posterior(good.guide, good.log_joint, history), tmp_path, conjugate).history
    assert math.isnan(loaded.stages[0].elbo)
    loaded.stages[0] = history.stages[0]  # nan is not nan
    assert loaded == history
    assert loaded.gradients == 348


def test_the_engines_of_a_fit_come_back(good, tmp_path):
    engine = Engine("fx", "c: an operation", 0.5, math.nan)
    history = History([1.0], stages=[Stage("flow", 1, 0.0, 0.0, 0.0)], engines=[engine])
    loaded = round_trip(Posterior(good.guide, good.log_joint, history), tmp_path, conjugate)
    assert loaded.engine == engine
    assert loaded.engine.build_seconds == 0.5
    assert math.isnan(loaded.engine.microseconds)
    assert round_trip(good, tmp_path, conjugate).engine == good.engine


def test_a_file_of_an_earlier_version_is_refused_in_a_sentence(good, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    content = torch.load(path, weights_only=True)
    del content["flow"]
    torch.save({**content, "version": 1}, path)
    with pytest.raises(ValueError, match="Posterior.load expected a file of Posterior.save, got "
                                         ".*fit.pt"):
        Posterior.load(path, conjugate)


ARGUMENTS = {
    "tensor": torch.arange(3.0),
    "integers": torch.arange(3),
    "booleans": torch.tensor([True, False]),
    "half": torch.ones(2, dtype=torch.float16),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "slice": torch.arange(10.0)[2:8:2],
    "numpy": np.arange(3.0),
    "numpy-integers": np.arange(3, dtype=np.int32),
    "numpy-booleans": np.array([True, False]),
    "numpy-view": np.arange(6.0).reshape(2, 3)[::-1].T,
    "numpy-scalar-array": np.array(2.0),
    "numpy-number": np.float64(2.5),
    "numpy-integer": np.int64(3),
    "number": 2.5,
    "infinity": math.inf,
    "integer": 3,
    "text": "county",
    "nothing": None,
    "bool": True,
    "shape": torch.Size([2, 3]),
    "list": [1, 2.0, "a", None],
    "tuple": (torch.ones(2), 1),
    "empty-list": [],
    "empty-tuple": (),
    "empty-dict": {},
    "dict": {"a": torch.ones(2), "numpy": np.ones(2)},
    "dict-like-ours": {"dict": {"list": [1]}, "tuple": [1]},
    "nested": [{"a": (1, [np.ones(2), {"b": torch.zeros(1)}])}, ()],
}


def same(one, other):
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and one.dtype == other.dtype and \
            np.array_equal(np.asarray(one.detach() if torch.is_tensor(one) else one),
                           np.asarray(other.detach() if torch.is_tensor(other) else other))
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(
            same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(
            map(same, one, other))
    return one == other and not isinstance(other, np.generic)


def with_anything(*args, **kwargs):
    conjugate(Y)


@pytest.mark.parametrize("argument", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_every_kind_come_back(good, argument, tmp_path):
    log_joint = LogJoint(with_anything, (argument, 1), {"key": argument}, good.guide.layout,
                         DOUBLE)
    loaded = round_trip(Posterior(good.guide, log_joint, good.history), tmp_path, with_anything)
    assert same((argument, 1), loaded.log_joint.args)
    assert same({"key": argument}, loaded.log_joint.kwargs)


class Point(NamedTuple):
    x: float
    y: float


@pytest.mark.parametrize(("argument", "name"), [
    (object(), "object"), (lambda: 0, "function"), ({1: 2}, "dict"), (Point(0.0, 1.0), "Point"),
    (np.array(["a"]), "ndarray"), ({1, 2}, "set"), (1j, "complex"), ([object()], "object"),
], ids=["object", "function", "dict-of-integers", "namedtuple", "numpy-text", "set", "complex",
        "inside-a-list"])
def test_an_argument_that_a_file_cannot_hold_is_named(good, argument, name, tmp_path):
    log_joint = LogJoint(with_anything, (argument,), {}, good.guide.layout, DOUBLE)
    with pytest.raises(ValueError, match=f"Posterior.save expected model arguments of .* got "
                                         f"{name}"):
        Posterior(good.guide, log_joint, good.history).save(tmp_path / "fit.pt")
    assert list(tmp_path.iterdir()) == []


def with_param(y):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def test_parameters_of_the_model_come_back(tmp_path):
    posterior = fit(with_param, Y, num_steps=40)
    learned = pyro.param("scale").item()
    assert learned != pytest.approx(0.5)
    posterior.save(tmp_path / "fit.pt")
    expected = posterior.log_joint(torch.ones(2, 1)).detach()
    pyro.clear_param_store()
    loaded = Posterior.load(tmp_path / "fit.pt", with_param)
    assert pyro.param("scale").item() == pytest.approx(learned, rel=1e-6)
    torch.testing.assert_close(loaded.log_joint(torch.ones(2, 1)).detach(), expected)


# ------------------------------------------------------------------ files: guides of your own

def own_recipe(size):
    return Compose([Planar(size), Diagonal(size)])


class OwnGuide(AutoFlow):
    pass


OWN = {
    "recipe": lambda model: AutoFlow(model, own_recipe),
    "lambda": lambda model: AutoFlow(model, lambda size: Planar(size)),
    "class": lambda model: OwnGuide(model, planar),
    "affine": lambda model: AutoFlow(model, planar, affine=lambda size: Diagonal(size)),
    "option": lambda model: AutoIAF(model, activation=torch.nn.ReLU),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_a_guide_of_your_own_is_asked_for(make, tmp_path):
    posterior = fit(conjugate, Y, guide=make(conjugate), num_steps=4)
    path = tmp_path / "fit.pt"
    posterior.save(path)
    with pytest.raises(ValueError, match=r"Pass it: Posterior.load\(path, model, guide=...\)"):
        Posterior.load(path, conjugate)
    assert_same_fit(posterior, Posterior.load(path, conjugate, guide=make(conjugate)))


@pytest.mark.parametrize("guide", [
    AutoPlanar(conjugate, num_layers=3), AutoIAF(conjugate), AutoPlanar(mixed, num_layers=1),
], ids=["layers", "class", "model"])
def test_a_guide_that_does_not_fit_the_file_is_refused(good, guide, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    with pytest.raises(ValueError, match="Posterior.load: the guide does not fit .*fit.pt") as e:
        Posterior.load(path, conjugate, guide=guide)
    assert len(str(e.value)) < 400 + len(str(path))  # not every parameter of both


def test_another_model_at_loading_is_named_in_a_warning(good, tmp_path):
    def tighter(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.9))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    good.save(tmp_path / "fit.pt")
    with pytest.warns(UserWarning, match="Posterior.load: this is another model .*: the densities "
                                         "of the sites differ, first 'mu'") as caught:
        Posterior.load(tmp_path / "fit.pt", tighter)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("guide", [AutoPlanar, "planar"], ids=["class", "text"])
def test_a_guide_of_another_kind_is_refused(good, guide, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    with pytest.raises(ValueError, match="Posterior.load expected `guide` to be an AutoFlow"):
        Posterior.load(path, conjugate, guide=guide)


# ------------------------------------------------------------------ files: safety

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [
    lambda content, path: torch.save(content, path),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
    lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
], ids=["torch", "pickle", "legacy-torch"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside"])
def test_loading_executes_no_code_of_the_file(write, inside, tmp_path):
    trap, path = tmp_path / "executed", tmp_path / "fit.pt"
    content = Malicious(trap)
    write({"format": "pyro_nfvi posterior", "version": 1, "args": [content]} if inside else content,
          path)
    with pytest.raises(ValueError, match="Posterior.load expected a file of Posterior.save"):
        Posterior.load(path, conjugate)
    assert not trap.exists()


def test_a_name_in_the_file_reaches_only_public_names(good, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    content = torch.load(path, weights_only=True)
    content["guide"]["recipe"]["name"] = "__loader__"
    torch.save(content, path)
    with pytest.raises(ValueError, match="Posterior.load knows no '__loader__'"):
        Posterior.load(path, conjugate)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="Posterior.load found no file .*nothing.pt"):
        Posterior.load(tmp_path / "nothing.pt", conjugate)


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path):
    data = bytearray(path.read_bytes())
    data[100:140] = bytes(40)
    path.write_bytes(bytes(data))


DAMAGE = {
    "truncated": _truncated,
    "flipped": _flipped,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("mean,sd\n0,1\n"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "state-dict": lambda path: torch.save({"weight": torch.ones(3)}, path),
    "other-format": lambda path: torch.save({"format": "other", "version": 1}, path),
    "parts-missing": lambda path: torch.save({"format": "pyro_nfvi posterior", "version": 1}, path),
    "no-version": lambda path: torch.save({"format": "pyro_nfvi posterior"}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_file_is_refused_in_a_sentence(good, damage, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    damage(path)
    with pytest.raises(ValueError, match="Posterior.load expected a file of Posterior.save, got "
                                         ".*fit.pt"):
        Posterior.load(path, conjugate)


def test_a_newer_file_asks_for_a_newer_library(good, tmp_path):
    path = tmp_path / "fit.pt"
    good.save(path)
    torch.save({**torch.load(path, weights_only=True), "version": 99}, path)
    with pytest.raises(ValueError, match="up to version 3, got version 99: update pyro_nfvi"):
        Posterior.load(path, conjugate)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()],
                         ids=["disk-full", "ctrl-c"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(good, error, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    good.save(path)
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        good.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_twice_replaces_the_file(good, tmp_path):
    path = tmp_path / "fit.pt"
    path.write_text("old")
    good.save(str(path))
    assert Posterior.load(str(path), conjugate).history == good.history
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_any_new_file(good, tmp_path):
    path, other = tmp_path / "fit.pt", tmp_path / "other"
    other.touch()
    good.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_saving_leaves_random_state_and_dtype_as_they_were(good, tmp_path):
    before = torch.get_rng_state()
    good.save(tmp_path / "fit.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_the_verdict_on_an_all_but_exact_fit_is_good_whatever_k_hat_is():
    ratios = torch.zeros(2000, dtype=torch.float64)
    ratios[:3] = torch.tensor([1e-3, 2e-2, 1e-1])  # a tail of nothing: k-hat far above the bar
    log_weights = ratios - ratios.logsumexp(0)
    sample = ImportanceSample(torch.randn(2000, 1), ratios, 0 * ratios, log_weights, 2.7)
    assert verdict(sample, History())[0]
    worse = ImportanceSample(torch.randn(2000, 1), ratios, 0 * ratios, log_weights, float("inf"))
    assert not verdict(worse, History())[0]


# ------------------------------------------------------------------ rescue, pictures, page

def test_chains_through_the_guide_are_arviz_data(good):
    data = good.metropolis(num_draws=500, seed=0, coords={"data": list("abcde")})
    assert data.posterior.mu.shape == (4, 500)
    assert data.log_likelihood.y.shape == (4, 500, 5)
    assert {"lp", "log_q", "acceptance_rate", "accepted"} <= set(data.sample_stats.data_vars)
    assert data.posterior.attrs["weighting"] == "none needed: Metropolis-Hastings"
    table = arviz.summary(data)
    assert (table.r_hat < 1.05).all()
    mcse = TRUE_DEVIATION / table.loc["mu", "ess_bulk"] ** 0.5
    assert abs(data.posterior.mu.mean().item() - TRUE_MEAN) < 5 * mcse


def test_nuts_through_the_guide_is_arviz_data(good, tmp_path):
    data = good.neutra(num_chains=2, num_draws=200, warmup=100, seed=0, progress=False)
    assert data.posterior.mu.shape == (2, 200)
    mcse = TRUE_DEVIATION / arviz.summary(data).loc["mu", "ess_bulk"] ** 0.5
    assert abs(data.posterior.mu.mean().item() - TRUE_MEAN) < 5 * mcse
    path = str(tmp_path / "chains.nc")
    data.to_netcdf(path)
    assert arviz.from_netcdf(path).sample_stats.diverging.shape == (2, 200)


def test_every_picture_is_drawn(good):
    for axes in (good.plot_elbo(), good.plot_weights(), good.plot_pareto_k()):
        assert axes.has_data()
    exact = {"mu": TRUE_MEAN + TRUE_DEVIATION * torch.randn(500)}
    for figure in (good.plot_marginals(exact), good.plot_pairs(), good.plot_predictive(["y"])):
        assert any(axes.has_data() for axes in figure.axes)


def test_a_page_tells_all_there_is_to_a_fit(good, tmp_path):
    path = tmp_path / "report.html"
    good.report(path, title="Five <numbers>", progress=False)
    text = path.read_text(encoding="utf-8")
    for words in ("Five &lt;numbers&gt;", "Verdict: trusted", "k-hat", "missed mass", "AutoPlanar",
                  "Predictive checks", "float"):
        assert words in text
    with pytest.raises(ValueError, match="folder"):
        good.report(tmp_path / "nowhere" / "report.html")
