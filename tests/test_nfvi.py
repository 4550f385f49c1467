"""NFVI: one call from model and data to a posterior, and one clear error for each mistake."""

from __future__ import annotations

import math
import time
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch.distributions import MultivariateNormal, constraints

from pyro_nfvi import (
    ELBO,
    NFVI,
    AutoFlow,
    AutoGaussian,
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoSpline,
    Posterior,
    planar,
)
from pyro_nfvi.flows import (
    FixedLinear,
    LowRank,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    StudentT,
    Triangular,
)
from pyro_nfvi.inference import stages

Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def bent(y):
    """A posterior along a parabola, which no Gaussian follows."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a ** 2, 0.5), obs=y[0])


def subsampled(y):
    """Its log joint differs from call to call, so no gate is asked."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=4) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def with_control_flow(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > -100 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def names(posterior):
    return [stage.name for stage in posterior.history.stages]


class Interrupting:
    """The conjugate model, interrupted at a call."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, y):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        conjugate(y)


def small(model, guide=None, num_layers=1, **kwargs):
    """A quick NFVI: few particles, few steps, a planar flow."""
    guide = AutoPlanar(model, num_layers=num_layers, affine=Triangular) if guide is None else guide
    return NFVI(model, guide, **{"num_particles": 16, "num_steps": 20, "progress": False, **kwargs})


def posterior_of_conjugate(y):
    variance = 1 / (1 + len(y))
    return variance * y.sum(), variance ** 0.5


# ------------------------------------------------------------------ truth

def test_a_gaussian_posterior_is_recovered_by_the_default_guide():
    x = torch.stack([torch.ones(15), torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 15) ** 2], -1)
    y = x @ torch.tensor([1.0, 2.0, -1.0]) + 0.5 * torch.randn(15)
    precision = torch.eye(3) + x.T @ x / 0.25
    truth = MultivariateNormal(torch.linalg.solve(precision, x.T @ y / 0.25),
                               precision_matrix=precision)
    posterior = NFVI(regression, num_particles=64, num_steps=400, seed=0, progress=False).run(x, y)
    assert posterior.ess > 9900  # of 10,000
    draws = posterior.resample(10_000)["w"]
    variance, covariance = truth.variance, truth.covariance_matrix
    num_effective = posterior.ess / (1 + posterior.ess / 10_000)  # two stages of sampling
    error = (variance / num_effective) ** 0.5
    assert ((draws.mean(0) - truth.mean).abs() < 4 * error).all()
    error = ((covariance ** 2 + torch.outer(variance, variance)) / num_effective) ** 0.5
    assert ((draws.T.cov() - covariance).abs() < 4 * error).all()
    evidence = MultivariateNormal(torch.zeros(15), 0.25 * torch.eye(15) + x @ x.T).log_prob(y)
    value, standard = posterior.elbo
    assert value < evidence + 4 * standard
    assert value > evidence - 0.1


def test_a_parameter_of_the_model_is_learned_jointly():
    # y ~ N(mu, s), mu ~ N(0, 1): the marginal likelihood of s has its maximum where
    # y'y = s^2 + 1, for one observation.
    def model(y):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, scale), obs=y)
    posterior = small(model, num_steps=600, num_particles=256, lr=0.05, seed=0).run(
        torch.tensor(3.0))
    scale = pyro.param("scale").item()
    assert scale == pytest.approx(8 ** 0.5, rel=0.01)
    draws = posterior.sample(10_000)["mu"]
    assert abs(draws.mean() - 3 / 9) < 4 * draws.std() / 100
    assert draws.var().item() == pytest.approx(8 / 9, rel=4 * (2 / 10_000) ** 0.5)


def test_a_module_with_priors_is_fitted():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.mu = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, y):
            mu = self.mu
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    posterior = small(Model(), num_steps=200, lr=0.05, seed=0).run(Y)
    mean, deviation = posterior_of_conjugate(Y)
    draws = posterior.resample(5000)["mu"]
    assert abs(draws.mean() - mean) < 6 * deviation / posterior.ess ** 0.5


# ------------------------------------------------------------------ guides

@pytest.mark.parametrize("make", [AutoIAF, AutoPlanar, AutoRadial, AutoSpline, AutoFlow],
                         ids=lambda make: make.__name__)
def test_every_named_guide_is_fitted(make):
    def model(y):
        conjugate(y)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a ** 2, 0.5))
    guide = make(model, num_layers=2)
    posterior = small(model, guide, num_steps=150, num_particles=64, lr=0.02, seed=0).run(Y)
    assert posterior.guide is guide
    assert names(posterior)[:2] == ["Gaussian", "flow"]
    early, late = (torch.tensor(posterior.history.elbo[part]).mean()
                   for part in (slice(20), slice(-20, None)))
    assert late > early
    mean, deviation = posterior_of_conjugate(Y)
    assert abs(posterior.sample(2000)["mu"].mean() - mean) < 0.5 * deviation


def test_a_guide_without_a_flow_is_a_gaussian_from_end_to_end():
    posterior = small(conjugate, AutoGaussian(conjugate), seed=0).run(Y)
    assert names(posterior) == ["Gaussian"]
    mean, deviation = posterior_of_conjugate(Y)
    draws = posterior.sample(10_000)["mu"]
    assert abs(draws.mean() - mean) < 4 * deviation / 100
    assert draws.std().item() == pytest.approx(deviation, rel=0.05)


def test_a_trained_guide_goes_on_from_where_it_is():
    guide = AutoPlanar(conjugate, num_layers=2)
    first = small(conjugate, guide, num_steps=300, lr=0.05, seed=0).run(Y)
    level, error = first.elbo
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    second = small(conjugate, guide, num_steps=20, lr=1e-4, seed=1).run(Y)
    assert second.guide is guide
    stage, = second.history.stages
    assert (stage.name, stage.num_steps, stage.gradients) == ("flow", 20, 20 * 16)
    assert second.history.elbo[0] > level - 0.5
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0.01)


@pytest.mark.parametrize(("model", "num_steps"), [(conjugate, 0), (subsampled, 1)],
                         ids=["gaussian", "flow"])
def test_the_smallest_run_works(model, num_steps):
    posterior = small(model, num_particles=1, num_steps=1).run(Y)
    assert len(posterior.history.elbo) == num_steps


def test_an_objective_of_your_own_is_maximised():
    calls = []

    def objective(flow, log_joint, num_particles):
        calls.append(num_particles)
        return ELBO()(flow, log_joint, num_particles)
    small(subsampled, objective=objective, num_steps=10, num_particles=8, compile="eager").run(Y)
    assert calls[-10:] == [8] * 10
    assert all(count < 8 for count in calls[:-10])  # to see what memory a step takes


def test_keyword_arguments_reach_the_model():
    def model(*, y):
        conjugate(y)
    assert small(model).run(y=Y).sample(2)["mu"].shape == (2,)


# ------------------------------------------------------------------ stages and gates

def test_a_gaussian_posterior_needs_no_flow():
    posterior = small(conjugate, seed=0).run(Y)
    stage, = posterior.history.stages
    assert (stage.name, stage.num_steps) == ("Gaussian", 0)
    assert stage.ess > 0.99
    assert stage.elbo == posterior.elbo[0]
    assert posterior.history.gradients == stage.gradients > 0
    assert posterior.history.elbo == []
    assert posterior.engine is None
    assert posterior.summary().trusted


def test_a_bent_posterior_takes_the_flow_and_the_draws_at_the_gate_are_kept():
    posterior = NFVI(bent, num_particles=64, num_steps=1000, seed=0, progress=False).run(2 * Y)
    gaussian, *flows = posterior.history.stages
    assert names(posterior)[:2] == ["Gaussian", "flow"]
    assert gaussian.ess < 0.6 or gaussian.pareto_k > 0.5
    assert posterior.history.gradients == gaussian.gradients + sum(
        stage.num_steps * particles for stage, particles in zip(flows, (64, 128), strict=False))
    assert len(posterior.history.elbo) == sum(stage.num_steps for stage in flows)
    assert all(0 < stage.num_steps <= 1000 for stage in flows)
    assert posterior.pareto_k in [stage.pareto_k for stage in flows]
    assert posterior.ess > 10_000 * gaussian.ess
    assert posterior.summary().trusted
    # E[b + a^2] by quadrature, through the same densities
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    a, b = torch.meshgrid(grid, 2 * grid, indexing="ij")
    density = (-0.5 * a ** 2 - 0.125 * b ** 2 - 2 * (2 * Y[0] - b - a ** 2) ** 2).exp()
    truth = (density * (b + a ** 2)).sum() / density.sum()
    draws = posterior.resample(10_000)
    bend = draws["b"] + draws["a"] ** 2
    assert abs(bend.mean() - truth) < 6 * bend.std() / posterior.ess ** 0.5


def test_a_fit_that_stays_poor_gets_more_particles():
    posterior = small(bent, num_steps=5, seed=0).run(Y)
    assert names(posterior) == ["Gaussian", "flow", "more particles"]
    _, flow, more = posterior.history.stages
    assert (flow.num_steps, flow.gradients) == (5, 5 * 16)
    assert (more.num_steps, more.gradients) == (5, 5 * 32)
    assert len(posterior.history.elbo) == 10


def learned(y):
    scale = pyro.param("scale", torch.tensor(0.5, dtype=y.dtype), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, scale), obs=y[0])


@pytest.mark.parametrize("model", [learned, subsampled], ids=lambda model: model.__name__)
def test_a_log_joint_that_is_not_one_function_goes_through_the_flow_ungated(model):
    posterior = small(model, num_steps=10).run(Y)
    assert names(posterior) == ["Gaussian", "flow"]
    assert len(posterior.history.elbo) == 10
    assert all(math.isnan(stage.pareto_k) for stage in posterior.history.stages)


@pytest.mark.parametrize("num_latents", [2, 500])
def test_the_frame_is_a_gaussian_near_the_posterior_and_the_flow_starts_inside(num_latents):
    def model():
        with pyro.plate("all", num_latents):
            pyro.sample("x", dist.Normal(100.0, 1e-3))
    posterior = small(model, AutoPlanar(model, num_layers=1), seed=0).run()
    affine, frame = posterior.guide._flow().bijection.layers[1:]
    assert type(affine) is (Triangular if num_latents == 2 else LowRank)
    assert (type(frame) is FixedLinear) == (num_latents == 2)
    assert (frame.shift - 100).abs().max() < 1e-3
    assert names(posterior) == ["Gaussian"]
    assert posterior.sample(1000)["x"].std(0).mean().item() == pytest.approx(1e-3, rel=0.05)


def test_both_modes_are_found_with_their_weights():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        near, far = ((-0.5 * (x - place).square().sum(-1) / 0.25) for place in (-4.0, 4.0))
        pyro.factor("modes", torch.logaddexp(near + math.log(0.3), far + math.log(0.7)))
    posterior = small(model, seed=0).run()
    assert names(posterior) == ["Gaussian"]
    base = posterior.guide._flow().base
    assert isinstance(base, MixtureOfFlows)
    assert len(base.flows) == 2
    assert posterior.summary().trusted
    share = (posterior.resample(10_000)["x"][:, 0] > 0).double().mean().item()
    assert share == pytest.approx(0.7, abs=4 * (0.21 / posterior.ess) ** 0.5 + 1e-4)


def test_heavy_tails_get_noise_with_heavy_tails():
    def model():
        pyro.sample("x", dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1))
    posterior = small(model, seed=0).run()
    assert names(posterior) == ["Gaussian"]
    assert isinstance(posterior.guide._flow().base, (StudentT, MultivariateStudentT))
    assert posterior.pareto_k < 0.5


def test_a_base_of_your_own_is_kept():
    guide = AutoPlanar(conjugate, num_layers=1, base=partial(StudentT, df=3.0, learn=True))
    posterior = small(conjugate, guide).run(Y)
    assert isinstance(posterior.guide._flow().base, StudentT)
    assert posterior.guide._flow().base.raw_df.requires_grad


def test_chains_that_drift_away_are_a_concern_and_the_verdict_says_so(monkeypatch):
    found = stages.drift

    def spy(*args):
        result = found(*args)
        return type(result)("mu", 99.0, result.limit, 2.5)
    monkeypatch.setattr(stages, "drift", spy)
    posterior = small(conjugate, num_steps=20).run(Y)
    assert names(posterior)[:2] == ["Gaussian", "flow"]  # the gate stayed shut
    concern, = posterior.history.concerns
    assert "'mu'" in concern
    summary = posterior.summary()
    assert not summary.trusted
    assert concern in summary.verdict


def test_a_fit_keeps_to_its_time():
    start = time.monotonic()
    posterior = small(subsampled, num_steps=10 ** 7, max_seconds=3.0).run(Y)
    assert time.monotonic() - start < 20
    assert 0 < len(posterior.history.elbo) < 10 ** 7
    assert posterior.sample(5)["mu"].isfinite().all()


def test_gradients_may_be_switched_off_outside():
    with torch.no_grad():
        posterior = NFVI(bent, AutoFlow(bent, planar), num_steps=5, num_particles=4, seed=0,
                         progress=False).run(Y)
        assert not torch.is_grad_enabled()
    assert len(posterior.history.elbo) > 0


def test_an_improper_posterior_is_refused():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("flat", dist.ImproperUniform(constraints.real, (), ()))
    guide = AutoPlanar(model, init_loc_fn=init_to_value(values={"flat": torch.tensor(0.0)}))
    with pytest.raises(ValueError, match="seems to be improper.*'flat' runs away"):
        small(model, guide).run()


def test_an_improper_prior_is_no_obstacle_if_the_data_speak():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    guide = AutoPlanar(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(50.0)}))
    posterior = small(model, guide, seed=0).run(Y)
    assert posterior.summary().trusted
    draws = posterior.resample(10_000)["mu"]
    assert abs(draws.mean() - Y.mean()) < 6 * 5 ** -0.5 / posterior.ess ** 0.5


@pytest.mark.slow
def test_a_prior_whose_draws_break_the_model_is_no_obstacle():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 100.0))
        matrix = (x + 5.0).reshape(x.shape + (1, 1))  # no factor below -5
        log_det = 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        pyro.factor("f", 0.1 * log_det - 4 * x.square())
    guide = AutoGaussian(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)}))
    posterior = small(model, guide, seed=0).run()
    assert posterior.summary().trusted
    assert posterior.sample(100)["x"].std().item() == pytest.approx(8 ** -0.5, rel=0.4)


def test_a_model_whose_sites_change_is_refused():
    class Model:
        calls = 0

        def __call__(self):
            self.calls += 1
            pyro.sample("x", dist.Normal(0.0, 1.0))
            if self.calls > 2:
                pyro.sample("late", dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="same latent sites at each call; 'late' is new"):
        small(Model()).run()


# ------------------------------------------------------------------ seed and dtype

def run_twice(**kwargs):
    return [small(conjugate, **kwargs).run(Y) for _ in range(2)]


def test_a_seed_reproduces_the_run_exactly():
    one, other = run_twice(seed=3)
    assert one.history == other.history
    assert torch.equal(one.draws.z, other.draws.z)
    assert torch.equal(one.log_weights, other.log_weights)
    assert one.pareto_k == other.pareto_k
    for name, value in one.guide.state_dict().items():
        assert torch.equal(value, other.guide.state_dict()[name])


def test_two_seeds_give_two_runs():
    assert small(conjugate, seed=1).run(Y).history != small(conjugate, seed=2).run(Y).history


def test_without_a_seed_the_global_random_state_is_used():
    one, other = run_twice()
    assert one.history != other.history
    torch.manual_seed(7)
    one = small(conjugate).run(Y)
    torch.manual_seed(7)
    assert small(conjugate).run(Y).history == one.history


def refuse(y):
    raise KeyError("broken")


@pytest.mark.parametrize(("model", "error"), [
    (conjugate, None),
    (refuse, KeyError),
    (Interrupting(20, KeyError), KeyError),
    (Interrupting(3), KeyboardInterrupt),
    (Interrupting(20), UserWarning),
], ids=["success", "error-at-start", "error-in-fit", "ctrl-c-at-start", "ctrl-c-in-fit"])
def test_a_seeded_run_leaves_random_state_and_dtype_as_they_were(model, error):
    before = torch.get_rng_state()
    tier = "eager" if isinstance(model, Interrupting) else "auto"
    run = small(model, seed=0, dtype=torch.float64, compile=tier).run
    if error is None:
        run(Y)
    else:
        with pytest.raises(error):  # a warning is an error here
            run(Y)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_on_a_cpu_the_fit_is_in_double_precision():
    posterior = small(conjugate).run(Y)
    assert posterior.sample(3)["mu"].dtype == torch.float64
    assert posterior.log_joint.args[0].dtype == torch.float64
    assert {p.dtype for p in posterior.guide.parameters()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_a_model_that_holds_single_precision_is_fitted_in_it():
    x = torch.stack([torch.ones(6), torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 6) ** 2], -1)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
    posterior = small(model).run(x.sum(-1))
    assert posterior.sample(3)["w"].dtype == torch.float32
    assert posterior.summary().trusted


def test_single_precision_may_be_asked_for():
    assert small(conjugate, dtype=torch.float32).run(Y).sample(3)["mu"].dtype == torch.float32


def test_double_precision_converts_the_arguments_and_the_fit():
    seen = {}

    def model(y, options, count):
        seen.update(y=y.dtype, inner=options["x"][0].dtype, count=count.dtype,
                    default=torch.zeros(()).dtype)
        conjugate(y)
    posterior = small(model, dtype=torch.float64).run(
        Y, {"x": [torch.ones(2)]}, torch.tensor([1, 2]))
    assert seen == {"y": torch.float64, "inner": torch.float64, "count": torch.int64,
                    "default": torch.float64}
    assert posterior.sample(3)["mu"].dtype == torch.float64
    assert {p.dtype for p in posterior.guide.parameters()} == {torch.float64}
    assert Y.dtype == torch.float32


def test_double_precision_fits_a_regression():
    x = torch.randn(6, 3)
    posterior = small(regression, dtype=torch.float64).run(x, x.sum(-1))
    assert posterior.sample(4)["w"].dtype == torch.float64
    assert posterior.summary().table.shape[0] == 3


def test_arguments_that_are_no_tensors_pass_through():
    def model(y, label, count, nothing):
        assert (label, count, nothing) == ("a", 3, None)
        conjugate(y)
    small(model, dtype=torch.float64, device="cpu").run(Y, "a", 3, None)


# ------------------------------------------------------------------ how it is computed

@pytest.mark.parametrize("tier", ["auto", "c", "fx", "eager"])
def test_every_tier_finds_the_posterior_and_says_its_name(tier):
    def model(y):
        scale = pyro.param("scale", torch.ones((), dtype=y.dtype))  # no gate before the flow
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0 + 0 * scale), obs=y)
    posterior = small(model, num_steps=200, lr=0.05, seed=0, compile=tier).run(Y)
    mean, deviation = posterior_of_conjugate(Y)
    draws = posterior.resample(5000)["mu"]
    assert abs(draws.mean() - mean) < 6 * deviation / posterior.ess ** 0.5
    engines = posterior.history.engines
    assert [engine.tier for engine in engines] == ["c" if tier == "auto" else tier]
    assert posterior.engine is engines[-1]
    assert posterior.engine.reason == ""
    assert posterior.engine.microseconds > 0


def test_compiled_and_recorded_steps_are_those_of_the_same_seed():
    one, other = (small(bent, seed=0, compile=tier).run(Y)
                  for tier in ("c", "fx"))
    assert len(one.history.elbo) == 40
    assert one.history.elbo == pytest.approx(other.history.elbo, rel=1e-9)
    torch.testing.assert_close(one.draws.z, other.draws.z, rtol=1e-7, atol=1e-7)


def test_a_fit_that_cannot_be_compiled_works_and_says_why():
    guide = AutoPlanar(bent, num_layers=1, base=partial(Mixture, num_components=2))
    posterior = small(bent, guide).run(Y)
    assert len(posterior.history.elbo) == 40
    assert posterior.engine.tier == "eager"
    assert "random numbers whose distribution depends on" in posterior.engine.reason


# ------------------------------------------------------------------ bar, Ctrl-C, fallback

def test_the_bar_goes_to_stderr_under_the_stages_names(capsys):
    small(bent, progress=True).run(Y)
    out, err = capsys.readouterr()
    assert out == ""
    for name in ("Gaussian", "flow", "more particles"):
        assert f"NFVI {name}" in err


def test_without_progress_nothing_is_printed(capsys):
    small(conjugate, progress=False).run(Y)
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_in_the_gaussian_stage_returns_the_guide_as_it_starts():
    with pytest.warns(UserWarning, match="NFVI was interrupted after 0 steps"):
        posterior = small(Interrupting(12), num_steps=40, compile="eager").run(Y)
    assert posterior.history.interrupted
    assert posterior.history.elbo == []
    assert posterior.sample(5)["mu"].isfinite().all()
    assert "interrupted" in posterior.summary().verdict


@pytest.mark.parametrize("at", [8, 55], ids=["flow", "more-particles"])
def test_ctrl_c_returns_the_posterior_so_far_with_a_warning(at):
    calls = []

    def objective(flow, log_joint, num_particles):
        calls.extend([num_particles] * (num_particles > 4))  # fewer tell what memory a step takes
        if len(calls) == at:
            raise KeyboardInterrupt
        return ELBO()(flow, log_joint, num_particles)
    with pytest.warns(UserWarning, match=f"NFVI was interrupted after {at - 1} steps"):
        posterior = small(bent, num_steps=40, objective=objective, compile="eager").run(Y)
    assert posterior.history.interrupted
    assert len(posterior.history.elbo) == at - 1
    assert all(p.isfinite().all() for p in posterior.guide.parameters())
    assert posterior.sample(5)["a"].isfinite().all()
    assert "interrupted" in posterior.summary().verdict
    assert names(posterior) == ["Gaussian", "flow", "more particles"][:2 if at == 8 else 3]


def test_a_model_that_cannot_be_batched_still_fits_and_warns_why():
    with pytest.warns(UserWarning, match="once for each of 8 particles.*slow: .*control flow"):
        posterior = small(with_control_flow, num_particles=8, num_steps=5).run(Y)
    assert not posterior.log_joint.batched
    assert all(map(math.isfinite, posterior.history.elbo))


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="interrupted") as record:
        small(Interrupting(12), compile="eager").run(Y)
    assert record[0].filename == __file__


def test_a_log_joint_that_turns_bad_stops_with_a_warning_and_the_last_good_state():
    steps = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        mu = mu * math.nan if len(steps) > 5 else mu
        with pyro.plate("data", len(y), subsample_size=4) as chosen:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])

    def objective(flow, log_joint, num_particles):
        steps.extend([num_particles] * (num_particles > 4))  # fewer tell what memory a step takes
        return ELBO()(flow, log_joint, num_particles)
    with pytest.warns(UserWarning, match="NFVI: the log joint is not finite at step 5; .*'y'"):
        posterior = small(model, num_steps=60, objective=objective, compile="eager").run(Y)
    assert posterior.history.stopped
    assert len(posterior.history.elbo) == 5
    assert posterior.sample(5)["mu"].isfinite().all()
    assert not posterior.summary().trusted


# ------------------------------------------------------------------ mistakes

@pytest.mark.parametrize(("arguments", "words"), [
    ({"model": 3}, "NFVI expected `model` to be a Pyro model, a function, got int"),
    ({"model": None}, "NFVI expected `model`.* got NoneType"),
    ({"guide": AutoNormal(conjugate)}, "NFVI expected `guide` to be an AutoFlow such as "
                                       r"AutoIAF\(model\), got AutoNormal.*SVI"),
    ({"guide": AutoIAF}, "NFVI expected `guide` .* got AutoIAF"),
    ({"guide": planar}, "NFVI expected `guide` .* got function"),
    ({"guide": "planar"}, "NFVI expected `guide` .* got str"),
    ({"objective": ELBO}, r"NFVI expected `objective` to be one such as ELBO\(\), got .*ELBO"),
    ({"objective": "elbo"}, "NFVI expected `objective` .* got 'elbo'"),
    ({"objective": Trace_ELBO()}, "NFVI expected `objective` .* got .*Trace_ELBO"),
    ({"num_particles": 0}, "NFVI expected `num_particles` to be an integer >= 1, got 0"),
    ({"num_particles": "many"}, "NFVI expected `num_particles` .* got 'many'"),
    ({"num_particles": 2.5}, "NFVI expected `num_particles` .* got 2.5"),
    ({"num_steps": 0}, "NFVI expected `num_steps` .* got 0"),
    ({"num_steps": -5}, "NFVI expected `num_steps` .* got -5"),
    ({"num_steps": 1e3}, "NFVI expected `num_steps` .* got 1000.0"),
    ({"num_steps": True}, "NFVI expected `num_steps` .* got True"),
    ({"lr": 0}, "NFVI expected `lr` to be a positive number, got 0"),
    ({"lr": "small"}, "NFVI expected `lr` .* got 'small'"),
    ({"lr": math.nan}, "NFVI expected `lr` .* got nan"),
    ({"max_seconds": 0}, "NFVI expected `max_seconds` to be a positive number, got 0"),
    ({"max_seconds": "long"}, "NFVI expected `max_seconds` .* got 'long'"),
    ({"max_seconds": math.nan}, "NFVI expected `max_seconds` .* got nan"),
    ({"max_seconds": True}, "NFVI expected `max_seconds` .* got True"),
    ({"seed": "abc"}, "NFVI expected `seed` to be an integer.* got 'abc'"),
    ({"seed": 1.5}, "NFVI expected `seed` .* got 1.5"),
    ({"seed": True}, "NFVI expected `seed` .* got True"),
    ({"dtype": "float64"}, "NFVI expected `dtype` to be torch.float64 or torch.float32, got "
                           "'float64'"),
    ({"dtype": torch.int64}, "NFVI expected `dtype` .* got torch.int64"),
    ({"dtype": float}, "NFVI expected `dtype` .* got"),
    ({"compile": torch.zeros(3)}, "NFVI expected `compile` to be one of .*, got tensor"),
    ({"compile": "fast"}, r"NFVI expected `compile` to be one of \('auto', 'c', .*'eager'\), got "
                          "'fast'"),
    ({"compile": True}, "NFVI expected `compile` .* got True"),
    ({"compile": None}, "NFVI expected `compile` .* got None"),
    ({"device": "gpu"}, "NFVI expected `device` to be a torch.device such as .* got 'gpu'"),
    ({"device": 1.5}, "NFVI expected `device` .* got 1.5"),
], ids=lambda value: None if isinstance(value, str) else
    ", ".join(f"{k}={getattr(v, '__name__', type(v).__name__ if callable(v) else v)}"
              for k, v in value.items()))
def test_a_wrong_argument_is_named_with_the_way_out(arguments, words):
    with pytest.raises(ValueError, match=words):
        NFVI(**{"model": conjugate, **arguments})


def test_numbers_that_are_not_missing_are_asked_for():
    y = Y.clone()
    y[1] = y[3] = math.nan
    with pytest.raises(ValueError, match="NFVI expected site 'y' to be observed with numbers, "
                                         "got 2 NaN.*poutine.mask"):
        small(conjugate).run(y)


def test_the_way_out_of_missing_numbers_works():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y.nan_to_num())
    y = Y.clone()
    y[1] = math.nan
    posterior = small(model, num_steps=300, lr=0.05, seed=0).run(y)
    mean, deviation = posterior_of_conjugate(y[~y.isnan()])
    draws = posterior.resample(5000)["mu"]
    assert abs(draws.mean() - mean) < 6 * deviation / posterior.ess ** 0.5


def test_a_deterministic_site_may_be_nan():
    def model(y):
        conjugate(y)
        pyro.deterministic("nothing", torch.tensor(math.nan))
    small(model).run(Y)


def no_latent(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])


def discrete(y):
    conjugate(y)
    pyro.sample("k", dist.Categorical(torch.ones(3)))


def local_to_a_subsample(y):
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[chosen])


def never_finite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])
    pyro.factor("wall", 0 * mu - math.inf)


@pytest.mark.parametrize(("model", "words"), [
    (no_latent, "AutoFlow found no latent site in the model"),
    (discrete, r"AutoFlow handles continuous sites; 'k' is Categorical. Hide it: .*block"),
    (local_to_a_subsample, "AutoFlow holds one value for each latent; 'z' is local to the "
                           "subsampled plate 'data'"),
    (never_finite, "NFVI: the log joint is not finite at any of 12 starts; first bad site 'wall'.*"
                   "init_loc_fn"),
], ids=["no-latent", "discrete", "local-to-a-subsample", "never-finite"])
def test_a_model_that_cannot_be_fitted_is_refused_with_the_way_out(model, words):
    with pytest.raises(ValueError, match=words):
        NFVI(model, num_steps=20, num_particles=8, progress=False).run(Y)


def test_a_posterior_is_returned():
    assert isinstance(small(conjugate).run(Y), Posterior)
