"""Diagnosis: known failures are flagged with a way out, good fits are not."""

from __future__ import annotations

import math
import os

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from pyro_nfvi import NFVI, AutoFlow, Posterior, planar
from pyro_nfvi.diagnostics import Check
from pyro_nfvi.diagnostics.diagnose import Restart, _slope
from pyro_nfvi.diagnostics.site_weights import site_weights
from pyro_nfvi.flows import Triangular
from pyro_nfvi.inference import History, Stage
from pyro_nfvi.inference.parallel import Surroundings, in_parallel, is_parallel

NAMES = ["fit", "support", "spread", "k-hat", "effective draws", "sites", "tails", "drift",
         "missed mass", "slope", "gradient", "restarts"]


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 20.0))
    modes = torch.tensor([-10.0, 10.0])
    pyro.factor("modes", torch.logsumexp(dist.Normal(modes, 1.0).log_prob(x), 0))


def on_one_mode():
    pyro.sample("x", dist.Normal(9.975, 0.9988))


def funnel():
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, (log_scale / 2).exp()))


def mean_field():
    """The best one, as its gradients are zero there."""
    pyro.sample("log_scale", dist.Normal(0.0, 1 / (1 / 9 + 9 / 2 * 0.9) ** 0.5))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, 0.9))


def two_latents():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("two", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def guide_of(loc=0.0, scale=1.0, draw=None):
    def guide():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("two", 2):
            pyro.sample("x", draw or dist.Normal(loc, scale))
    return guide


FAILURES = {
    "two-modes": (two_modes, on_one_mode, "missed mass"),
    "funnel": (funnel, mean_field, "k-hat"),
    "too-narrow": (two_latents, guide_of(scale=0.4), "k-hat"),
    "too-wide": (two_latents, guide_of(scale=10.0), "effective draws"),
    "far-away": (two_latents, guide_of(loc=5.0), "effective draws"),
    "half-the-support": (two_latents, guide_of(draw=dist.LogNormal(0.0, 0.5)), "missed mass"),
    "a-point": (two_latents, guide_of(draw=dist.Delta(torch.tensor(0.0))), "spread"),
}


@pytest.mark.parametrize(("model", "guide", "check"), FAILURES.values(), ids=FAILURES)
def test_a_failure_is_flagged_with_a_way_out(model, guide, check):
    pyro.set_rng_seed(0)
    report = Posterior.of(model, guide).diagnose(progress=False)
    assert not report.trusted
    assert check in [failure.name for failure in report.failures]
    assert all(failure.action for failure in report.failures)
    assert report.verdict.startswith(("Verdict: do not trust", "Verdict: too few"))
    assert [found.name for found in report.checks] == NAMES


def test_a_good_fit_is_not_flagged():
    pyro.set_rng_seed(0)
    report = Posterior.of(two_latents, guide_of(scale=1.05)).diagnose(progress=False)
    assert report.trusted
    assert not report.failures
    assert report.verdict.startswith("Verdict: good")
    assert report.max_pareto_k == 0.7


@pytest.fixture(scope="module")
def posterior():
    guide = AutoFlow(two_latents, planar, num_layers=1, affine=Triangular)
    return NFVI(two_latents, guide, num_steps=20, seed=0, progress=False).run()


def test_fits_from_other_seeds_are_compared_and_the_fit_stays(posterior):
    z, state = posterior.draws.z.clone(), torch.random.get_rng_state()
    parameters = [p.clone() for p in posterior.guide.parameters()]
    report = posterior.diagnose(restarts=1, progress=False)
    assert report["restarts"].status == "ok"
    assert report["gradient"].status == "ok"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(posterior.draws.z, z)
    for before, after in zip(parameters, posterior.guide.parameters(), strict=True):
        assert torch.equal(before, after)
    assert posterior.diagnose(progress=False)["restarts"].status == "skipped"


def test_a_fit_that_ended_elsewhere_is_told_apart(posterior):
    posterior_elsewhere = Posterior.of(two_latents, guide_of(loc=2.0))
    moved = Posterior(posterior_elsewhere.guide, posterior_elsewhere.log_joint, History(),
                      refit=lambda seed: posterior)
    report = moved.diagnose(restarts=1, progress=False)
    assert report["restarts"].failed
    assert "a fit from another seed has an ELBO" in report["restarts"].words


@pytest.mark.parametrize("restarts", [-1, 1.5, True])
def test_restarts_are_a_number(posterior, restarts):
    with pytest.raises(ValueError, match=r"Posterior\.diagnose expected `restarts` to be an int"):
        posterior.diagnose(restarts=restarts)


@pytest.mark.parametrize("n_jobs", [0, 1.5, True, "all"])
def test_jobs_are_a_number(posterior, n_jobs):
    with pytest.raises(ValueError, match=r"Posterior\.diagnose expected `n_jobs` to be a number"):
        posterior.diagnose(restarts=1, n_jobs=n_jobs)


def restarted(posterior, seeds, n_jobs):
    restart = Restart(posterior.refit, Surroundings.here(), 1)
    return list(in_parallel(restart, [(seed,) for seed in seeds], n_jobs))


@pytest.mark.slow
def test_seeds_give_the_same_restarts_in_other_processes():
    def local():
        assert torch.get_num_threads() == 1
        two_latents()
    posterior = NFVI(local, num_steps=20, seed=0, progress=False).run()
    here, there = (restarted(posterior, [1, 2], n_jobs) for n_jobs in (None, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.z, other.z)
        assert torch.equal(one.log_weights, other.log_weights)
    assert not torch.equal(here[0].z, here[1].z)
    assert is_parallel(2)
    reports = [posterior.diagnose(restarts=2, n_jobs=2, progress=False)]
    with joblib.parallel_config(n_jobs=2):
        assert is_parallel(None)
        reports.append(posterior.diagnose(restarts=2, progress=False))
    assert [report["restarts"].status for report in reports] == ["ok", "ok"]


def test_restarts_run_here_unless_the_user_says_more(posterior):
    processes = []

    def refit(seed):
        processes.append((os.getpid(), seed))
        return posterior
    watched = Posterior(posterior.guide, posterior.log_joint, posterior.history, refit=refit)
    assert watched.diagnose(restarts=3, progress=False)["restarts"].status == "ok"
    assert processes == [(os.getpid(), seed) for seed in (1, 2, 3)]


def test_the_first_fit_that_ends_elsewhere_is_enough(posterior):
    elsewhere, seeds = Posterior.of(two_latents, guide_of(loc=2.0)), []
    moved = Posterior(elsewhere.guide, elsewhere.log_joint, History(),
                      refit=lambda seed: seeds.append(seed) or posterior)
    assert moved.diagnose(restarts=3, progress=False)["restarts"].failed
    assert seeds == [1]


def test_restarts_leave_the_param_store_and_random_states_alone(posterior):
    def refit(seed):
        pyro.param("theirs", torch.zeros(()))
        np.random.rand()
        return posterior
    watched = Posterior(posterior.guide, posterior.log_joint, posterior.history,
                        posterior.draws, refit)
    before = torch.get_rng_state().tolist(), str(np.random.get_state())
    watched.diagnose(restarts=1, progress=False)
    assert (torch.get_rng_state().tolist(), str(np.random.get_state())) == before
    assert "theirs" not in pyro.get_param_store()


def test_a_restart_that_ctrl_c_ends_early_is_not_compared(posterior):
    interrupted = Posterior(posterior.guide, posterior.log_joint, History(interrupted=True))
    watched = Posterior(posterior.guide, posterior.log_joint, posterior.history,
                        refit=lambda seed: interrupted)
    with pytest.raises(KeyboardInterrupt):
        watched.diagnose(restarts=1, progress=False)


# ------------------------------------------------------------------ which site is to blame

@pytest.mark.parametrize(("draw", "worst"), [
    (lambda: (dist.Normal(0.0, 0.6), dist.Normal(0.0, 1.0)), "a"),
    (lambda: (dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.6)), "x"),
])
def test_the_worst_site_is_the_badly_fitted_one(draw, worst):
    def guide():
        of_a, of_x = draw()
        pyro.sample("a", of_a)
        with pyro.plate("two", 2):
            pyro.sample("x", of_x)
    pyro.set_rng_seed(0)
    posterior = Posterior.of(two_latents, guide)
    found = site_weights(posterior.draws, posterior.log_joint.layout)
    assert found.worst == worst
    other = {"a": "x", "x": "a"}[worst]
    # log w = s^2 (1 - 0.36) / 2 in the normal score s: a Pareto tail of shape 1 - 0.36
    assert found.pareto_k[worst] == pytest.approx(0.64, abs=0.2)
    assert found.pareto_k[other] < 0.4
    assert found.tails[worst] == pytest.approx(2.5 ** 2 * 0.64 / 2, rel=0.2)


def test_the_action_for_bad_weights_names_the_site():
    pyro.set_rng_seed(0)
    report = Posterior.of(two_latents, guide_of(scale=0.4)).diagnose(progress=False)
    assert "reparametrise site 'x'" in report["k-hat"].action
    assert "base=StudentT" in report["k-hat"].action
    assert report["sites"].status == "warn"
    assert report["tails"].words == "the guide's tails are too light at site 'x'"


def test_a_few_draws_have_no_site_to_blame(posterior):
    sample = posterior.draws
    few = type(sample)(sample.z[:50], sample.log_p[:50], sample.log_q[:50],
                       sample.log_weights[:50], 0.1)
    assert site_weights(few, posterior.log_joint.layout) is None


# ------------------------------------------------------------------ the end of the fit

def test_a_rising_elbo_is_noticed():
    noise = np.random.default_rng(0).normal(size=1000)
    rising = History([*(np.arange(1000) / 50 + noise)], stages=[Stage("flow", 1000)])
    flat = History([*noise], stages=[Stage("flow", 1000)])
    assert _slope(rising).status == "warn"
    assert _slope(rising).value == pytest.approx(4.0, abs=0.6)
    assert _slope(flat).status == "ok"
    assert _slope(History()).status == "skipped"
    assert _slope(History(stages=[Stage("Gaussian")])).words == "no gradient step was needed"


def test_losses_of_svi_are_read():
    posterior = Posterior.of(two_latents, guide_of())
    losses = [10 - 0.01 * step + 0.1 * math.sin(step) for step in range(1000)]
    report = posterior.diagnose(losses=losses, progress=False)
    assert report["slope"].status == "warn"
    assert report.trusted


# ------------------------------------------------------------------ the report

def test_a_report_is_worth_printing_and_indexing():
    pyro.set_rng_seed(0)
    report = Posterior.of(two_latents, guide_of(scale=0.4)).diagnose(progress=False)
    text = repr(report)
    assert "FAIL  k-hat" in text
    assert "->" in text
    assert report.verdict in text
    html = report._repr_html_()
    assert "<table>" in html
    assert "&#x27;x&#x27;" in html
    with pytest.raises(KeyError, match="no check 'khat'; there are fit, support"):
        report["khat"]


def test_a_check_says_whether_it_failed():
    assert Check("name", "fail", "words").failed
    assert not Check("name", "warn", "words").failed


def test_minibatches_are_not_searched():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as chosen:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 0.4))
    report = Posterior.of(model, guide, torch.zeros(6)).diagnose(progress=False)
    for name in ("drift", "missed mass"):
        assert report[name].status == "skipped"
        assert "minibatches" in report[name].words


def test_bad_weights_of_minibatches_are_laid_to_them():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as chosen:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 0.4))
    rows = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 10.0])  # whichever are drawn, they are far off
    report = Posterior.of(model, guide, rows).diagnose(progress=False)
    assert not report.trusted
    assert report.failures[0].action == "the model draws minibatches; give it all data"


@pytest.mark.parametrize(("kind", "way_out"), [
    (AutoNormal, "posterior.metropolis()"), (AutoDiagonalNormal, "posterior.neutra()")])
def test_chains_through_a_guide_are_offered_where_it_serves(kind, way_out):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    posterior = Posterior.of(funnel, kind(funnel, init_scale=0.1))
    report = posterior.diagnose(progress=False)
    assert report["k-hat"].action.endswith(way_out)
