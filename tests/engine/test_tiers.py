"""Every tier computes what Python computes, on the same noise, over every model and flow."""

from __future__ import annotations

import itertools
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_nfvi import ELBO
from pyro_nfvi.engine import record
from pyro_nfvi.engine.adam import CLIP_FACTOR, CLIP_WINDOW
from pyro_nfvi.engine.draws import Replay
from pyro_nfvi.engine.programs import GraphProgram
from pyro_nfvi.flows import LowRank, Mixture, MultivariateStudentT, StudentT
from pyro_nfvi.guides import AutoPlanar
from pyro_nfvi.inference import Loop
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.stopping import OneCycle
from tests.cases import MODELS, mixture_of_flows
from tests.engine.fits import FLOWS, RATES, Fit, make_loop

DOUBLE = torch.float64
TOLERANCES = {torch.float32: 1e-5, DOUBLE: 1e-10}
# Models that generated code cannot compute, and words of the reason; the graph can.
NOT_IN_C: dict[str, str] = {}
slow = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Fits of this module are shared in it, and no longer."""
    yield
    fit_of.cache_clear()


@cache
def fit_of(model, flow, dtype):
    """A compiled fit of a model of the case table."""
    return Fit(*MODELS[model], make=FLOWS[flow], dtype=dtype)


def assert_agree(fit, rates=RATES):
    """The losses of every program of a fit are those of Python."""
    expected = fit.losses(fit.stepper.python, rates)
    scale = 1 + expected.abs()
    for program in (fit.program, GraphProgram(fit.stepper.recording)):
        error = ((fit.losses(program, rates) - expected).abs() / scale).max().item()
        assert error < TOLERANCES[fit.loop.parameters[0].dtype]
    assert expected.std() > 0


# ------------------------------------------------------------------ losses

def combinations():
    """Every model, flow and type; all but one of each model, and all but those of one, are slow."""
    for model, flow, dtype in itertools.product(MODELS, FLOWS, TOLERANCES):
        quick = model == "plates" or (flow, dtype) == ("planar", DOUBLE)
        yield pytest.param(model, flow, dtype, id=f"{model}-{flow}-{str(dtype)[6:]}",
                           marks=[] if quick else slow)


@pytest.mark.parametrize(("model", "flow", "dtype"), list(combinations()))
def test_every_tier_gives_the_losses_of_python(model, flow, dtype):
    fit = fit_of(model, flow, dtype)
    assert fit.stepper.tier == ("fx" if model in NOT_IN_C else "c")
    assert NOT_IN_C.get(model, "") in fit.stepper.reason
    assert bool(fit.stepper.reason) == (model in NOT_IN_C)
    assert_agree(fit)


@pytest.mark.parametrize("model", MODELS)
def test_the_recorded_log_joint_equals_the_terms_of_trace_elbo(model):
    fit = fit_of(model, "planar", DOUBLE)
    guide, log_joint = fit.loop.guide, fit.loop.log_joint

    def terms():
        z, log_q = guide._flow().rsample_and_log_prob((8,))
        return [log_joint(z) - log_q]
    recording = record(terms, fit.loop.parameters)
    noise, *others = [draw.many(1)[0] for draw in recording.draws]
    (got,) = GraphProgram(recording)(fit.stepper.inputs(), [noise, *others])
    expected = []
    for row in noise:
        with Replay([row, *others]), default_dtype(DOUBLE):
            q = poutine.trace(guide).get_trace(*fit.args)
            p = poutine.trace(poutine.replay(fit.model, trace=q)).get_trace(*fit.args)
        expected.append(p.log_prob_sum() - q.log_prob_sum())
    expected = torch.stack(expected).detach()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    elbo, *_ = fit.program(fit.stepper.inputs(), [noise, *others])  # of the tier itself
    torch.testing.assert_close(elbo, expected.mean(), rtol=1e-10, atol=1e-10)


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_torchs_compiler_gives_the_losses_of_python():
    fit = Fit(*MODELS["plates"], tier="inductor", dtype=torch.float32)
    assert (fit.stepper.tier, fit.stepper.reason) == ("inductor", "")
    assert_agree(fit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", MODELS)
def test_a_captured_graph_on_a_gpu_gives_the_losses_of_python(model):
    fit = Fit(*MODELS[model], tier="auto", dtype=torch.float32, device="cuda")
    assert (fit.stepper.tier, fit.stepper.reason) == ("cuda_graph", "")
    assert_agree(fit)


# ------------------------------------------------------------------ objectives, bases, parameters

def test_the_total_gradient_is_compiled_too():
    fit = Fit(*MODELS["plates"], objective=ELBO(path_gradient=False))
    assert fit.stepper.tier == "c"
    assert_agree(fit)
    path = fit_of("plates", "planar", DOUBLE)
    assert fit.losses(fit.program)[0] == pytest.approx(path.losses(path.program)[0].item())
    assert fit.losses(fit.program)[-1] != path.losses(path.program)[-1]


@pytest.mark.parametrize("path_gradient", [True, False], ids=["path", "total"])
@pytest.mark.parametrize("options", [
    {"base": partial(StudentT, df=4.0)}, {"base": partial(StudentT, df=[3.0, 4.0, 5.0, 6.0, 7.0])},
    {"base": MultivariateStudentT}, {"base": mixture_of_flows}, {"affine": LowRank},
    {"affine": LowRank, "base": mixture_of_flows},
], ids=["student-t", "student-t-each", "multivariate-student-t", "mixture-of-flows", "low-rank",
        "low-rank-mixture-of-flows"])
def test_a_base_of_set_noise_or_another_affine_map_is_compiled(options, path_gradient):
    fit = Fit(*MODELS["plates"], make=partial(AutoPlanar, num_layers=1, **options),
              objective=ELBO(path_gradient=path_gradient))
    assert (fit.stepper.tier, fit.stepper.reason) == ("c", "")
    assert_agree(fit)


@pytest.mark.parametrize(("base", "words"), [
    (partial(StudentT, learn=True), "depends on a parameter or a latent"),
    (partial(Mixture, num_components=2), "distribution depends on a parameter or a latent"),
], ids=["student-t-learned", "mixture"])
def test_a_base_whose_noise_is_learned_runs_as_it_is_and_says_why(base, words):
    model, args = MODELS["plates"]
    loop = make_loop(model, *args(), make=partial(AutoPlanar, num_layers=1, base=base))
    history = loop.run()
    assert loop.engine.tier == "eager"
    assert words in loop.engine.reason
    assert len(history.elbo) == len(RATES)


def with_param(data):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    shift = pyro.param("shift", torch.zeros(2))
    x = pyro.sample("x", dist.Normal(0.0, scale))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x + shift.sum(), 1.0), obs=data)


def test_parameters_of_the_model_are_learned_by_the_compiled_loop():
    fit = Fit(with_param, lambda: (torch.tensor([2.0, 3.0]),))
    assert fit.stepper.tier == "c"
    assert_agree(fit)
    fit.losses(fit.program)
    compiled = {name: value.tolist() for name, value in pyro.get_param_store().items()}
    assert compiled["scale"] != pytest.approx(0.5, rel=0.1)
    assert min(compiled["shift"]) > 0
    fit.losses(fit.stepper.python)
    for name, value in pyro.get_param_store().items():
        assert compiled[name] == pytest.approx(value.tolist(), rel=1e-8)


def with_a_param_of_another_type(data):
    scale = pyro.param("scale", torch.tensor(0.5, dtype=DOUBLE), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(0.0, scale.float()))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x, 1.0), obs=data)


def test_parameters_of_two_types_keep_their_types():
    fit = Fit(with_a_param_of_another_type, lambda: (torch.tensor([2.0, 3.0]),),
              dtype=torch.float32)
    assert fit.stepper.tier == "fx"
    assert "parameters of more than one type" in fit.stepper.reason
    assert_agree(fit)
    assert pyro.param("scale").dtype == DOUBLE
    assert {p.dtype for p in fit.loop.parameters} == {torch.float32, DOUBLE}


# ------------------------------------------------------------------ minibatches

def test_minibatches_vary_and_the_compiled_loss_follows_them():
    fit = fit_of("subsampled", "planar", DOUBLE)
    stepper, inputs = fit.stepper, fit.stepper.inputs()
    noise, orders = stepper.draws(24)
    assert len({tuple(order[:2].sort().values.tolist()) for order in orders}) == 6  # all pairs
    losses = {}
    for order in orders:
        elbo, *gradients = fit.program(inputs, [noise[0], order])
        expected = stepper.python(inputs, [noise[0], order])
        for ours, theirs in zip([elbo, *gradients], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        losses.setdefault(tuple(order[:2].sort().values.tolist()), []).append(elbo.item())
    means = [values[0] for values in losses.values()]
    assert all(max(values) - min(values) < 1e-9 for values in losses.values())
    assert len({round(mean, 6) for mean in means}) == 6


# ------------------------------------------------------------------ clipping

def test_generated_code_clips_long_gradients_as_python_does():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=DOUBLE))

    def estimates():  # the length of the gradient is Cauchy
        u = torch.rand(1, dtype=DOUBLE)
        weight = 1 / (1e-6 + (1 - 2 * u).abs())
        return -weight * (x ** 2).sum(-1).expand(3), x.expand(3, 2)
    fit = Fit.__new__(Fit).build(Loop([x], estimates, str, 350, 0.01), "c")
    assert fit.stepper.tier == "c"
    assert_agree(fit, [0.01] * 350)
    norms = torch.tensor(fit.stepper.state.norms)
    assert len(norms) == CLIP_WINDOW
    assert norms.max() > 0.9 * CLIP_FACTOR * norms.median()  # some were cut


def test_a_compiled_gaussian_fit_is_that_of_adam_in_torch():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    fit = Fit.__new__(Fit).build(Loop([x], lambda: (-(x ** 4).sum(-1).expand(3), x.expand(3, 2)),
                                      str, 50, 0.1), "c")
    rates = [0.1 * rate for rate in OneCycle(50).rates(0, 50)]
    losses = fit.losses(fit.program, rates)
    y = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=DOUBLE))
    optimizer = torch.optim.Adam([y])
    for rate, ours in zip(rates, losses, strict=True):
        loss = (y ** 4).sum()
        assert ours.item() == pytest.approx(-loss.item(), rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
