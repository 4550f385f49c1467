"""Stages and gates: easy models end early, hard ones go on, Ctrl-C never costs the fit."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

from pyro_nfvi import NFVI, AutoFlow, AutoPlanar, planar
from pyro_nfvi.flows import (
    FixedLinear,
    Gaussian,
    MixtureOfFlows,
    MultivariateStudentT,
    StudentT,
)
from pyro_nfvi.inference import ImportanceSample, stages
from pyro_nfvi.inference.stages import GOOD, NEARLY_EXACT, PASSABLE, Gate, Stages

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
X = torch.stack([torch.ones(12), torch.linspace(-1, 1, 12)], -1)
Y = X @ torch.tensor([1.0, -2.0]) + 0.3 * torch.linspace(-1, 1, 12).sin()


def easy(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def centred_eight_schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x ** 2, 0.3))


def with_parameter(y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, scale), obs=y)


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=4) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def run(model, *args, guide=None, **options):
    """A quick fit."""
    guide = AutoPlanar(model, num_layers=1) if guide is None else guide
    options = {"num_particles": 16, "num_steps": 60, "seed": 0, "progress": False,
               "compile": "fx"} | options
    return NFVI(model, guide, **options).run(*args)


def names(posterior):
    return [stage.name for stage in posterior.history.stages]


def is_usable(posterior):
    """Whether draws and densities are finite and those of one and the same guide."""
    z, log_q = posterior.draws.z, posterior.draws.log_q
    torch.testing.assert_close(posterior.guide._flow().log_prob(z).detach(), log_q)
    assert z.isfinite().all()
    assert all(value.isfinite().all() for value in posterior.sample(50).values())
    return posterior.summary() is not None


# ------------------------------------------------------------------ gates

def sample(pareto_k, effective):
    """A sample of that k-hat, and of as many effective draws out of a hundred."""
    log_weights = torch.full((100,), -math.inf)
    log_weights[:effective] = -math.log(effective)
    zeros = torch.zeros(100)
    return ImportanceSample(torch.zeros(100, 1), zeros, zeros, log_weights, pareto_k)


@pytest.mark.parametrize(("gate", "pareto_k", "effective", "open_"), [
    (GOOD, 0.4, 70, True), (GOOD, 0.6, 70, False), (GOOD, 0.4, 50, False),
    (GOOD, math.inf, 100, False), (GOOD, math.nan, 100, False), (GOOD, -math.inf, 100, True),
    (PASSABLE, 0.6, 10, True), (PASSABLE, 0.8, 90, False), (PASSABLE, 0.6, 5, False),
    (NEARLY_EXACT, 3.0, 100, True), (NEARLY_EXACT, 3.0, 98, False),
    (Gate(0.5, 0.6), 0.5, 90, False),
])
def test_a_gate_asks_for_both_k_hat_and_effective_draws(gate, pareto_k, effective, open_):
    assert gate.lets_through(sample(pareto_k, effective)) is open_


# ------------------------------------------------------------------ how far a fit goes

def test_an_easy_model_is_done_after_the_gaussian():
    posterior = run(easy, X, Y, guide=AutoFlow(easy))
    stage, = posterior.history.stages
    assert stage.name == "Gaussian"
    assert stage.num_steps == 0
    assert stage.gradients == posterior.history.gradients > 0
    assert stage.ess > GOOD.ess
    assert stage.ess == posterior.ess / posterior.draws.num_samples
    assert stage.elbo == posterior.elbo[0]
    assert posterior.history.elbo == []
    assert posterior.engine is None
    assert is_usable(posterior)
    precision = torch.eye(2) + X.T @ X / 0.25
    truth = MultivariateNormal(torch.linalg.solve(precision, X.T @ Y / 0.25),
                               precision_matrix=precision)
    draws = posterior.sample(10_000)["w"]
    assert ((draws.mean(0) - truth.mean).abs() < 4 * truth.stddev / 100).all()
    assert ((draws.var(0) / truth.variance - 1).abs() < 4 * (2 / 10_000) ** 0.5).all()


def test_a_hard_model_goes_on_to_the_flow():
    posterior = run(centred_eight_schools, EFFECTS, ERRORS)
    assert names(posterior)[:2] == ["Gaussian", "flow"]
    gaussian, flow, *_ = posterior.history.stages
    assert not GOOD.lets_through(sample(gaussian.pareto_k, max(1, int(100 * gaussian.ess))))
    assert len(posterior.history.elbo) == sum(s.num_steps for s in posterior.history.stages)
    assert flow.num_steps > 0
    assert flow.gradients == 16 * flow.num_steps
    assert is_usable(posterior)


@pytest.mark.slow
def test_the_flow_of_a_hard_model_beats_its_gaussian_and_is_right():
    posterior = NFVI(centred_eight_schools, seed=0, progress=False).run(EFFECTS, ERRORS)
    gaussian, *later = posterior.history.stages
    assert max(stage.elbo for stage in later) > gaussian.elbo + 0.1
    truth = moments_of_eight_schools()
    draws = posterior.resample(10_000)
    for name, (mean, deviation) in truth.items():
        error = deviation / posterior.ess ** 0.5
        assert abs(draws[name].mean() - mean) < 5 * error + 0.05 * deviation


def moments_of_eight_schools():
    """Posterior mean and standard deviation of mu and tau, by quadrature: schools are normal."""
    mu = torch.linspace(-25, 35, 601, dtype=torch.float64).unsqueeze(-1)
    log_tau = torch.linspace(-8, 7, 1501, dtype=torch.float64)
    tau = log_tau.exp()
    log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    for effect, error in zip(EFFECTS, ERRORS, strict=True):
        log_p = log_p + dist.Normal(mu, (tau ** 2 + error ** 2).sqrt()).log_prob(effect)
    weight = (log_p - log_p.logsumexp((0, 1))).exp()
    result = {}
    for name, value in (("mu", mu), ("tau", tau)):
        mean = (weight * value).sum()
        result[name] = mean.item(), ((weight * (value - mean) ** 2).sum() ** 0.5).item()
    return result


def test_a_fit_that_nothing_satisfies_ends_after_more_particles(monkeypatch):
    monkeypatch.setattr(stages, "GOOD", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "NEARLY_EXACT", Gate(0.5, 2.0))
    posterior = run(easy, X, Y)
    assert names(posterior) == ["Gaussian", "flow", "more particles"]
    assert [s.gradients // s.num_steps for s in posterior.history.stages[1:]] == [16, 32]
    assert is_usable(posterior)


def test_a_model_with_parameters_is_trained_through_the_flow():
    posterior = run(with_parameter, torch.tensor(3.0), num_steps=600, num_particles=256, lr=0.05)
    assert names(posterior) == ["Gaussian", "flow"]
    assert pyro.param("scale").item() == pytest.approx(8 ** 0.5, rel=0.02)
    assert all(math.isnan(stage.pareto_k) for stage in posterior.history.stages)
    assert is_usable(posterior)
    draws = posterior.sample(10_000)["mu"]
    assert abs(draws.mean() - 3 / 9) < 4 * draws.std() / 100 + 0.01


def test_a_model_with_minibatches_asks_no_gate():
    posterior = run(minibatch, torch.ones(20), num_steps=400, num_particles=64, lr=0.02)
    assert names(posterior) == ["Gaussian", "flow"]
    assert all(math.isnan(stage.pareto_k) for stage in posterior.history.stages)
    mean, deviation = 20 / 21, 21 ** -0.5
    draws = posterior.sample(10_000)["mu"]
    assert abs(draws.mean() - mean) < 0.5 * deviation


def test_a_trained_guide_goes_on_without_a_gaussian():
    guide = AutoPlanar(easy, num_layers=1)
    run(easy, X, Y, guide=guide)
    assert names(run(easy, X, Y, guide=guide)) == ["flow"]


def test_two_places_become_a_mixture_under_the_flow():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("modes", torch.logaddexp(-0.5 * (x - 8) ** 2, -0.5 * (x + 8) ** 2 - 1.0))
    posterior = run(model)
    assert isinstance(posterior.guide.flow.base, MixtureOfFlows)
    assert names(posterior) == ["Gaussian"]
    share = torch.sigmoid(torch.tensor(1.0))  # the prior is symmetric
    upper = (posterior.sample(10_000)["x"] > 0).double().mean()
    assert abs(upper - share) < 4 * (share * (1 - share) / 10_000) ** 0.5 + 1e-3


def test_heavy_tails_get_heavy_noise():
    def model():
        pyro.sample("x", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))
    posterior = run(model)
    assert isinstance(posterior.guide.flow.base, StudentT | MultivariateStudentT)
    assert posterior.pareto_k < 0.7
    assert is_usable(posterior)


def test_noise_that_the_user_chose_stays():
    def base(dim):
        return StudentT(dim, 5.0)
    posterior = run(easy, X, Y, guide=AutoFlow(easy, planar, num_layers=1, base=base))
    assert type(posterior.guide.flow.base) is StudentT
    assert isinstance(posterior.guide.flow.bijection.layers[-1], FixedLinear)


def test_a_drift_is_a_concern_that_keeps_the_gate_shut(monkeypatch):
    class Found:
        found = True

        def __str__(self):
            return "it moved"
    monkeypatch.setattr(stages, "drift", lambda *args: Found())
    posterior = run(easy, X, Y)
    assert names(posterior) == ["Gaussian", "flow", "more particles"]
    assert posterior.history.concerns == ["it moved"]
    assert "do not trust" in posterior.summary().verdict
    assert "it moved" in posterior.summary().verdict


# ------------------------------------------------------------------ a better earlier fit

def test_a_better_earlier_fit_is_kept(monkeypatch):
    train = Stages._train

    def worsened(self, name, options):
        train(self, name, options)
        if name == "more particles":
            with torch.no_grad():
                for parameter in self.guide.flow.bijection.layers[1].parameters():
                    parameter += 0.7
    monkeypatch.setattr(Stages, "_train", worsened)
    monkeypatch.setattr(stages, "GOOD", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "NEARLY_EXACT", Gate(0.5, 2.0))
    posterior = run(easy, X, Y)
    _, flow, again = posterior.history.stages
    assert again.elbo < flow.elbo - 0.1
    assert posterior.elbo[0] == flow.elbo
    assert posterior.ess / posterior.draws.num_samples == flow.ess
    assert is_usable(posterior)


# ------------------------------------------------------------------ Ctrl-C

def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


class Interrupting:
    """A schedule that sends Ctrl-C at a look."""

    def __init__(self, at):
        self.at, self.looks = at, 0

    def __call__(self, num_steps):
        schedule = self.made(num_steps)
        look = schedule.look

        def interrupted(elbo):
            self.looks += 1
            if self.looks == self.at:
                raise KeyboardInterrupt
            look(elbo)
        schedule.look = interrupted
        return schedule

    made = stages.UntilFlat


@pytest.mark.parametrize("name", ["gaussian_start", "mixture_of", "importance_sample",
                                  "heavier_tails"])
def test_ctrl_c_in_the_gaussian_stage_leaves_a_usable_guide(monkeypatch, name):
    def model():  # two places with heavy tails, so that everything is asked for
        x = pyro.sample("x", dist.Normal(0.0, 30.0))
        two = torch.stack([dist.StudentT(3.0, c, 1.0).log_prob(x) for c in (-20.0, 20.0)])
        pyro.factor("modes", two.logsumexp(0))
    monkeypatch.setattr(stages, name, interrupt)
    with pytest.warns(UserWarning, match="NFVI was interrupted after 0 steps"):
        posterior = run(model)
    assert posterior.history.interrupted
    assert is_usable(posterior)
    assert "interrupted" in posterior.summary().verdict


@pytest.mark.parametrize("at", [1, 2], ids=["at-once", "later"])
def test_ctrl_c_while_the_flow_trains_leaves_a_usable_guide(monkeypatch, at):
    monkeypatch.setattr(stages, "_schedule", Interrupting(at))
    with pytest.warns(UserWarning, match=r"NFVI was interrupted after \d+ steps"):
        posterior = run(banana)
    assert names(posterior) == ["Gaussian", "flow"]
    assert 0 < len(posterior.history.elbo) < 60
    assert is_usable(posterior)


def test_ctrl_c_with_more_particles_leaves_a_usable_guide(monkeypatch):
    calls = []

    class Second(Interrupting):
        def __call__(self, num_steps):
            calls.append(num_steps)
            return super().__call__(num_steps) if len(calls) == 2 else self.made(num_steps)
    monkeypatch.setattr(stages, "GOOD", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "NEARLY_EXACT", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "_schedule", Second(1))
    with pytest.warns(UserWarning, match="NFVI was interrupted"):
        posterior = run(easy, X, Y)
    assert names(posterior) == ["Gaussian", "flow", "more particles"]
    assert 0 < posterior.history.stages[2].num_steps < posterior.history.stages[1].num_steps
    assert is_usable(posterior)


@pytest.mark.parametrize("gate", [2, 3], ids=["flow", "more-particles"])
def test_ctrl_c_at_a_later_gate_leaves_draws_of_the_guide_as_it_is(monkeypatch, gate):
    draw, calls = stages.importance_sample, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == gate:
            raise KeyboardInterrupt
        return draw(*args)
    monkeypatch.setattr(stages, "GOOD", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "NEARLY_EXACT", Gate(0.5, 2.0))
    monkeypatch.setattr(stages, "heavier_tails", lambda flow, *args: flow)
    monkeypatch.setattr(stages, "importance_sample", interrupted)
    with pytest.warns(UserWarning, match="NFVI was interrupted"):
        posterior = run(easy, X, Y)
    assert len(posterior.history.stages) == gate
    assert is_usable(posterior)


def test_ctrl_c_while_the_drift_is_measured_leaves_a_usable_guide(monkeypatch):
    monkeypatch.setattr(stages, "drift", interrupt)
    with pytest.warns(UserWarning, match="interrupted after 0 steps"):
        posterior = run(easy, X, Y)
    assert names(posterior) == ["Gaussian"]
    assert is_usable(posterior)


def test_an_interrupted_gaussian_stage_starts_where_the_guide_does(monkeypatch):
    monkeypatch.setattr(stages, "gaussian_start", interrupt)
    with pytest.warns(UserWarning, match="interrupted"):
        posterior = run(easy, X, Y)
    assert posterior.history.stages == []
    assert type(posterior.guide.flow.base) is Gaussian
    assert posterior.sample(1000)["w"].abs().max() < 2  # the start: 0 +- 0.1
