"""Stepper: which tier is taken and why, what it finds out, and how it ends."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import NFVI, AutoPlanar
from pyro_nfvi.engine import Compiled, Engine, Stepper, compiled
from pyro_nfvi.engine.c import build
from pyro_nfvi.engine.c.ir import Unsupported
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.draws import Replay
from pyro_nfvi.engine.programs import GraphProgram
from pyro_nfvi.flows import Triangular
from pyro_nfvi.inference import Loop, Stage, loop
from tests.engine.fits import make_loop

DOUBLE = torch.float64
Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])


@pytest.fixture
def lines(caplog):
    """What was logged, line by line."""
    caplog.set_level("INFO", "pyro_nfvi")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "pyro_nfvi"]


class Bowl:
    """A Gaussian fitted to a Gaussian: a function that ``change`` may spoil."""

    def __init__(self, change=lambda z: z):
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=DOUBLE))
        self.change = change

    def __call__(self):
        z = self.change(self.x + 0.1 * torch.randn(4, 2, dtype=DOUBLE))
        return -(z ** 2).sum(-1), z

    def loop(self, num_steps=20, **kwargs):
        return Loop([self.x], self, lambda z: "the bowl", num_steps, 0.05, progress=False,
                    **kwargs)

    def stepper(self, tier="auto", num_steps=20):
        return Stepper(self.loop()._loss, [self.x], tier, num_steps)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


# ------------------------------------------------------------------ which tier

def test_generated_code_comes_first(lines):
    stepper = Bowl().stepper()
    assert (stepper.tier, stepper.reason) == ("c", "")
    assert isinstance(stepper.program, CProgram)
    assert lines() == []


@pytest.mark.parametrize("tier", ["c", "fx", "eager"])
def test_a_tier_that_is_asked_for_is_taken(tier):
    stepper = Bowl().stepper(tier)
    assert (stepper.tier, stepper.reason) == (tier, "")
    assert stepper.run([0.1] * 3) == len(stepper.elbo) == 3


def test_the_eager_tier_does_not_run_the_function_before_it_must():
    calls = []
    bowl = Bowl(lambda z: calls.append(1) or z)
    stepper = bowl.stepper("eager")
    assert not calls
    stepper.run([0.1] * 3)
    assert len(calls) == 3


def test_a_long_fit_without_c_is_worth_a_compilation(monkeypatch):
    stepper = Bowl().stepper("fx")
    assert list(stepper._candidates("auto")) == ["c", "fx"]
    monkeypatch.setattr(compiled, "WORTH_INDUCTOR", 0.0)
    assert list(stepper._candidates("auto")) == ["c", "inductor", "fx"]


def without_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    build._compiler.cache_clear()


def with_a_failing_compiler(monkeypatch, tmp_path):
    build._compiler()
    def fail(*_):
        raise Unsupported("the C compiler failed: internal error")
    monkeypatch.setattr(build, "_compile", fail)
    monkeypatch.setenv("PYRO_NFVI_CACHE", str(tmp_path))


def with_a_library_that_does_not_load(monkeypatch, tmp_path):
    def fail(*_):
        raise OSError("cannot map the segment")
    monkeypatch.setattr("pyro_nfvi.engine.c.program.load", fail)


@pytest.mark.parametrize(("spoil", "words"), [
    (without_path, "no working C compiler"), (with_a_failing_compiler, "internal error"),
    (with_a_library_that_does_not_load, "cannot map the segment"),
], ids=["no-compiler", "failing-compiler", "unloadable"])
def test_without_a_compiler_the_graph_runs_and_one_line_says_why(spoil, words, lines, monkeypatch,
                                                                 tmp_path):
    spoil(monkeypatch, tmp_path)
    try:
        fitted = Bowl().loop(compile="auto")
        history = fitted.run()
    finally:
        build._compiler.cache_clear()
    assert (fitted.engine.tier, len(history.elbo)) == ("fx", 20)
    assert words in fitted.engine.reason
    assert lines() == [f"fx tier: {fitted.engine.reason}"]


def test_an_operation_that_c_does_not_know_is_named(lines):
    def change(z):
        return z + torch.linalg.eigvalsh(torch.diag_embed(z))
    stepper = Bowl(change).stepper()
    assert stepper.tier == "fx"
    assert "eigh" in stepper.reason
    assert lines() == [f"fx tier: {stepper.reason}"]


def test_a_program_that_disagrees_with_python_is_not_used(monkeypatch):
    call = CProgram.__call__
    monkeypatch.setattr(CProgram, "__call__", lambda self, *a: [1.01 * t for t in call(self, *a)])
    stepper = Bowl().stepper()
    assert stepper.tier == "fx"
    assert stepper.reason.startswith("c: it gives -")
    assert "where Python gives -" in stepper.reason


def test_a_program_whose_gradient_is_wrong_is_not_used(monkeypatch):
    call = CProgram.__call__

    def wrong(self, *args):
        value, gradient = call(self, *args)
        return [value, gradient.flip(0)]
    monkeypatch.setattr(CProgram, "__call__", wrong)
    stepper = Bowl().stepper()
    assert stepper.tier == "fx"
    assert stepper.reason.startswith("c: the gradient differs by ")


def test_a_graph_that_fails_says_how(monkeypatch):
    def fail(self, *args):
        raise RuntimeError("view size is not compatible\nand more")
    monkeypatch.setattr(GraphProgram, "__call__", fail)
    stepper = Bowl().stepper("fx")
    assert (stepper.tier, stepper.reason) == ("eager", "fx: view size is not compatible")


# ------------------------------------------------------------------ models that cannot be recorded

def condition(mu, y):
    return mu if mu > -100 else -mu


def item(mu, y):
    return mu + mu.detach().item()


def shape_of_a_latent(mu, y):
    return mu + len(y[y > mu])


def random_latent(mu, y):
    return mu + torch.normal(mu.detach(), 1.0)


def in_place(mu, y):
    y.add_(0.0 * mu.detach())
    return mu


def numpy_noise(mu, y):
    return mu + float(np.random.standard_normal())


def python_noise(mu, y):
    return mu + random.gauss(0.0, 1.0)


def list_of_numbers(mu, y):
    return mu + sum(mu.detach().reshape(1).tolist())


def numpy_numbers(mu, y):
    return mu + float(mu.detach().numpy())


class Counter:
    calls = 0

    def __call__(self, mu, y):
        Counter.calls += 1
        return mu * Counter.calls


def eager_engine(change, num_steps=6, compile="auto"):
    """The engine of a fit whose mean goes through ``change``; it must fit all the same."""
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(change(mu, y), 1.0), obs=y[0])
    fitted = make_loop(model, Y.clone(), num_steps=num_steps, num_particles=3, compile=compile)
    history = fitted.run()
    assert len(history.elbo) == num_steps
    assert all(map(math.isfinite, history.elbo))
    assert "\n" not in fitted.engine.reason
    return fitted.engine


@pytest.mark.parametrize(("change", "words"), [
    (condition, "Python reads a number that depends on a parameter or a latent"),
    (item, "Python reads a number that depends on a parameter or a latent"),
    (shape_of_a_latent, "a shape depends on a parameter or a latent"),
    (random_latent, "random numbers whose distribution depends on a parameter or a latent"),
    (in_place, "changes a tensor that outlives the run, in place"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_model_that_cannot_be_recorded_runs_as_it_is_and_says_why(change, words, lines):
    engine = eager_engine(change)
    assert engine.tier == "eager"
    assert words in engine.reason
    assert lines() == [f"eager tier: {engine.reason}"]


@pytest.mark.parametrize(("change", "tier"), [
    (numpy_noise, "auto"), (python_noise, "fx"), (Counter(), "fx"), (list_of_numbers, "fx"),
    (numpy_numbers, "fx")], ids=["numpy-noise", "random", "counter", "list", "numpy"])
def test_a_model_with_what_no_recorder_sees_runs_as_it_is_and_says_why(change, tier, lines):
    engine = eager_engine(change, compile=tier)
    assert (engine.tier, engine.reason) == ("eager", compiled.HIDDEN_STATE)
    assert lines() == [f"eager tier: {engine.reason}"]


def test_a_function_that_draws_more_than_before_is_found_out():
    with Replay([torch.zeros(2)]):
        assert torch.randn(2).tolist() == [0, 0]
        with pytest.raises(RuntimeError, match="more random numbers than when it was recorded"):
            torch.randn(2)


def test_a_function_that_draws_another_shape_is_found_out():
    with Replay([torch.zeros(2)]), pytest.raises(RuntimeError, match="of shape .3,. where"):
        torch.empty(3).normal_()


def test_a_model_that_changes_a_little_with_every_call_runs_as_it_is():
    calls = []

    def annealed(mu, y):
        calls.append(1)
        return mu + len(calls) / 5e4
    with pytest.warns(UserWarning, match="the model changed while the compiled loop ran"):
        engine = eager_engine(annealed)
    assert (engine.tier, engine.reason) == ("eager", compiled.HIDDEN_STATE)


# ------------------------------------------------------------------ models that change meanwhile

@pytest.mark.parametrize(("change_at", "back_to"), [(30, 5), (130, 100), (195, 150)])
def test_a_model_that_changes_during_the_fit_is_found_and_runs_as_it_is(change_at, back_to,
                                                                        monkeypatch, lines):
    target, run = [0.0], Stepper.run
    seen = {}

    def spy(stepper, rates, fed=()):
        made = len(stepper.elbo)
        seen.setdefault(made, stepper.state.live.clone())
        if made >= change_at:
            target[0] = 3.0
        if stepper.tier == "eager" and "after" not in seen:
            seen["after"] = made, stepper.state.step, stepper.state.live.clone()
        return run(stepper, rates)
    monkeypatch.setattr(Stepper, "run", spy)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # step by step
    bowl = Bowl(lambda z: z - target[0])
    fitted = bowl.loop(200)
    with pytest.warns(UserWarning, match="the model changed while the compiled loop ran .it gives "
                                         f".*; going back to step {back_to} and on without"):
        history = fitted.run()
    assert len(history.elbo) == 200
    assert seen["after"][:2] == (back_to, back_to)
    assert torch.equal(seen["after"][2], seen[back_to])
    assert fitted.engine.tier == "eager"
    assert "where Python gives" in fitted.engine.reason
    assert lines() == [f"eager tier: {fitted.engine.reason}"]


def test_a_rollback_after_the_model_changed_does_not_return_to_the_change(monkeypatch):
    bowl = Bowl()
    fitted = bowl.loop(100)
    stepper = fitted.stepper = bowl.stepper("c", 100)
    stepper.run([0.1] * 5)
    trusted = fitted._trust(stepper)
    stepper.run([0.1] * 60)
    bowl.change = lambda z: z - 3.0
    with pytest.warns(UserWarning, match="the model changed"):
        fitted._checked(stepper, trusted)
    stepper.state.roll_back()
    assert torch.equal(stepper.state.live, trusted[0])
    assert stepper.state.step == 5


def test_a_model_that_stays_the_same_is_checked_quietly(monkeypatch):
    checks, agrees = [], Compiled.agrees
    monkeypatch.setattr(Compiled, "agrees", lambda self: checks.append(1) or agrees(self))
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)
    fitted = Bowl().loop(100)
    fitted.run()
    assert fitted.engine.tier == "c"
    assert len(checks) == 1 + 1 + loop.NUM_CHECKS  # built, begun, and after each quarter


# ------------------------------------------------------------------ errors of the model

class Broken:
    """The conjugate model, which raises from a call on."""

    def __init__(self, at, error):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, y):
        self.calls += 1
        if self.calls >= self.at:
            raise self.error
        conjugate(y)


def small(model, **kwargs):
    guide = AutoPlanar(model, num_layers=1, affine=Triangular)
    return NFVI(model, guide, **{"num_particles": 4, "num_steps": 10, "seed": 0, "progress": False,
                                 **kwargs})


@pytest.mark.filterwarnings("ignore:NFVI runs the model once for each of 4 particles")
@pytest.mark.parametrize("error", [ValueError, RuntimeError],
                         ids=lambda error: error.__name__)
@pytest.mark.parametrize("at", range(1, 12))
def test_an_error_of_the_model_is_its_own_whenever_it_comes(at, error):
    model = Broken(at, error("the column 'x' is missing"))
    with pytest.raises(error, match="the column 'x' is missing") as caught:
        small(model).run(Y)
    assert type(caught.value) is error


def wrong_shape(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu + torch.zeros(3), torch.ones(2)), obs=y)


def wrong_argument(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, torch.tensor(-1.0), validate_args=True), obs=y[0])


def wrong_name(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, undefined), obs=y[0])  # noqa: F821


@pytest.mark.parametrize("model", [wrong_shape, wrong_argument, wrong_name],
                         ids=lambda model: model.__name__)
def test_a_model_that_is_wrong_raises_what_it_raises_without_the_engine(model):
    caught = []
    for tier in ("auto", "eager"):
        with pytest.raises(Exception) as error:  # noqa: PT011  (which one is what is compared)
            small(model, compile=tier).run(Y)
        caught.append((type(error.value), str(error.value)))
    assert caught[0] == caught[1]


# ------------------------------------------------------------------ random numbers

def random_states():
    return (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))


@pytest.mark.parametrize("tier", ["auto", "fx", "eager"])
@pytest.mark.parametrize("model", [conjugate, subsampled], ids=lambda model: model.__name__)
def test_building_takes_no_random_numbers(tier, model):
    fitted = make_loop(model, Y)
    before = random_states()
    stepper = Stepper(fitted._loss, fitted.parameters, tier)
    stepper.agrees()
    assert random_states() == before
    assert stepper.tier == {"auto": "c"}.get(tier, tier)


@pytest.mark.parametrize("model", [conjugate, subsampled], ids=lambda model: model.__name__)
def test_a_seed_gives_the_same_fit_however_fast_the_machine_is(model, monkeypatch):
    fits = []
    for seconds in (0.1, 0.0, 3e-5):  # the steps between two looks at the clock
        monkeypatch.setattr(loop, "CHUNK_SECONDS", seconds)
        pyro.set_rng_seed(3)
        fitted = make_loop(model, Y, num_steps=150, num_particles=7)
        history = fitted.run()
        fits.append((history.elbo, torch.get_rng_state().tolist(),
                     [p.tolist() for p in fitted.parameters]))
        assert fitted.engine.tier == "c"
    assert fits[0] == fits[1] == fits[2]


# ------------------------------------------------------------------ Ctrl-C

def interrupt_after(fitted, num_steps, sent):
    """Send a real Ctrl-C once the fit has made some steps; again, if Python loses it.

    It does, rarely: one that lands in a finalizer is printed and forgotten.
    """
    def watch():
        deadline = time.monotonic() + 30
        while len(fitted.history.elbo) < num_steps and time.monotonic() < deadline:
            time.sleep(0.002)
        while not fitted.history.interrupted:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            while not fitted.history.interrupted and time.monotonic() < sent[-1] + 2:
                time.sleep(0.002)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("tier", ["c", "fx", "eager"])
@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_ctrl_c_ends_the_steps_within_a_second_and_loses_none(tier, num_steps):
    bowl, sent = Bowl(), []
    fitted = bowl.loop(10 ** 7, compile=tier)
    thread = interrupt_after(fitted, num_steps, sent)
    history = fitted.run()
    assert time.monotonic() - sent[-1] < 1
    thread.join()
    state = fitted.stepper.state
    assert history.interrupted
    assert len(history.elbo) == state.step == fitted.stepper.made >= num_steps
    assert history.stages == [Stage("fit", state.step)]
    assert torch.equal(bowl.x.detach(), state.live[0])
    assert state.live.isfinite().all()


def test_ctrl_c_during_a_fit_gives_the_posterior_so_far(monkeypatch):
    sent, make = [], Loop.__init__

    def spy(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if args[5:] and "flow" in args[6]:
            interrupt_after(self, 1, sent)
    monkeypatch.setattr(Loop, "__init__", spy)
    with pytest.warns(UserWarning, match="NFVI was interrupted after [0-9]+ steps"):
        posterior = small(subsampled, num_steps=10 ** 7).run(Y)  # has no gate before the flow
    assert posterior.engine.tier == "c"
    assert posterior.history.interrupted
    assert posterior.sample(3)["mu"].isfinite().all()


def test_ctrl_c_while_building_leaves_the_parameters_alone():
    def change(z):
        raise KeyboardInterrupt
    bowl = Bowl(change)
    history = bowl.loop().run()
    assert (history.interrupted, history.elbo, history.engines) == (True, [], [])
    assert bowl.x.tolist() == [1.0, -2.0]


# ------------------------------------------------------------------ steps that are not finite

def wall(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("good", dist.Normal(mu, 1.0), obs=y[0])
    pyro.factor("wall", torch.where(mu > 1.2, -math.inf, 0.0))
    pyro.sample("late", dist.Normal(mu, 1.0), obs=y[1])


def cliff(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])
    pyro.factor("cliff", torch.where(mu > 1.2, 0.0 * mu, mu).abs().sqrt())  # 0 has no slope


def histories_by_tier(model, num_particles, scale=0.9, **options):
    """The same fit by generated code and by the recorded operations."""
    histories = []
    for tier in ("c", "fx"):
        pyro.set_rng_seed(0)
        fitted = make_loop(model, Y.double(), num_steps=60, num_particles=num_particles,
                           compile=tier, dtype=DOUBLE,
                           make=partial(AutoPlanar, num_layers=1, init_scale=scale), **options)
        history = fitted.run()
        assert fitted.engine.tier == tier
        assert len(history.elbo) == 60
        assert all(map(math.isfinite, history.elbo))
        assert all(p.isfinite().all() for p in fitted.parameters)
        histories.append(history)
    compiled_, plain = histories
    torch.testing.assert_close(torch.tensor(compiled_.elbo), torch.tensor(plain.elbo),
                               rtol=1e-6, atol=1e-6)
    assert compiled_.rollbacks == plain.rollbacks
    return compiled_


def unshielded(flow, log_joint, num_particles):
    """The ELBO, as one who does not think of slopes would write it."""
    z, log_q = flow.rsample_and_log_prob((num_particles,))
    return log_joint(z) - log_q, z


@pytest.mark.parametrize(("model", "site", "options"), [
    (wall, "'wall' (observed)", {"num_particles": 1, "scale": 1.5}),
    (cliff, "the gradient", {"num_particles": 3, "objective": unshielded})],
    ids=["value", "gradient"])
def test_a_step_that_is_not_finite_rolls_back_in_any_tier(model, site, options):
    history = histories_by_tier(model, **options)
    assert 0 < len(history.rollbacks) < 10
    assert {blamed for _, blamed in history.rollbacks} == {site}
    assert any(step > 5 for step, _ in history.rollbacks)  # in the middle of a chunk


@pytest.mark.parametrize("model", [wall, cliff], ids=["value", "gradient"])
def test_a_particle_that_is_not_finite_is_left_out_in_any_tier(model):
    assert histories_by_tier(model, num_particles=8).rollbacks == []


def test_a_function_without_noise_blames_the_right_place_too():
    x = torch.nn.Parameter(torch.tensor([1.0], dtype=DOUBLE))

    def estimates():  # climbs up to where the logarithm ends
        return torch.log(1.5 - x).expand(3) + 10 * x, x.expand(3, 1)
    fitted = Loop([x], estimates, lambda z: f"x is {z.item():.2f}", 100, 0.3, progress=False)
    history = fitted.run()
    assert fitted.engine.tier == "c"
    assert history.rollbacks
    for _, site in history.rollbacks:
        assert float(site.removeprefix("x is ")) > 1.5


# ------------------------------------------------------------------ what is told

def test_engines_are_equal_whatever_the_clock_says():
    assert Engine("c", "", 1.0, 2.0) == Engine("c", "", math.nan, math.nan)
    assert Engine("c", "", 1.0, 2.0) != Engine("fx", "", 1.0, 2.0)


def test_the_time_of_a_step_is_known_once_there_is_one():
    stepper = Bowl().stepper("fx")
    assert math.isnan(stepper.engine.microseconds)
    assert stepper.engine.build_seconds > 0
    stepper.run([0.1] * 4)
    assert 0 < stepper.engine.microseconds < 1e6


# ------------------------------------------------------------------ feeds

def fed_stepper(tier, feeds, num_steps=20):
    """A stepper whose ELBO tells what it was fed."""
    x = torch.nn.Parameter(torch.ones(3, dtype=DOUBLE))

    def function():
        noise = 1e-3 * torch.randn(3, dtype=DOUBLE)
        elbo = -(x + noise - x.detach()).square().sum() - (x * 0).sum()
        for feed in feeds:
            elbo = elbo + torch.where(feed, 2.0, 3.0).sum().to(DOUBLE) \
                if feed.dtype == torch.bool else elbo + (feed * x).sum()
        return [elbo, *torch.autograd.grad(-elbo, [x])]
    return x, Stepper(function, [x], tier, num_steps, feeds)


@pytest.mark.parametrize("tier", ["c", "fx", "eager"])
def test_each_step_sees_its_own_feeds_and_no_other(tier):
    feeds = [torch.zeros(3, dtype=DOUBLE), torch.zeros(2, 3, dtype=torch.bool)]
    x, stepper = fed_stepper(tier, feeds)
    assert stepper.tier == tier, stepper.reason
    numbers = torch.randn(7, 3, dtype=DOUBLE)
    flags = torch.rand(7, 2, 3) > 0.5
    made = stepper.run([1e-12] * 4, [numbers[:4], flags[:4]])
    made += stepper.run([1e-12] * 3, [numbers[4:], flags[4:]])
    assert made == 7
    expected = numbers.sum(-1) + 18 - flags.sum((-1, -2))
    assert stepper.elbo == pytest.approx(expected.tolist(), abs=1e-3)
    assert stepper.agrees() == ""


@pytest.mark.parametrize("tier", ["c", "fx", "eager"])
def test_a_feed_that_is_not_finite_stops_before_its_step(tier):
    feeds = [torch.zeros(3, dtype=DOUBLE)]
    x, stepper = fed_stepper(tier, feeds)
    numbers = torch.ones(6, 3, dtype=DOUBLE)
    numbers[3] = math.nan
    assert stepper.run([1e-3] * 6, [numbers]) == 3
    assert len(stepper.elbo) == stepper.state.step == 3
    assert stepper.state.live.isfinite().all()
    assert (stepper.failed is None) == (tier == "eager")
    assert stepper.run([1e-3] * 2, [numbers[4:]]) == 2


def test_feeds_are_split_with_the_blocks_of_the_noise(monkeypatch):
    monkeypatch.setattr("pyro_nfvi.engine.stepper.BLOCK_BYTES", 3 * 24)  # of three steps
    feeds = [torch.zeros(3, dtype=DOUBLE)]
    _, stepper = fed_stepper("c", feeds)
    assert stepper.draw_bytes == 24
    numbers = torch.arange(10.0, dtype=DOUBLE).unsqueeze(-1).expand(10, 3).contiguous()
    assert stepper.run([1e-12] * 10, [numbers]) == 10
    assert stepper.elbo == pytest.approx([3.0 * step for step in range(10)], abs=1e-3)


def test_the_parameters_alone_are_trained():
    feeds = [torch.full((3,), 2.0, dtype=DOUBLE)]
    x, stepper = fed_stepper("c", feeds)
    stepper.run([0.1], [torch.full((1, 3), 5.0, dtype=DOUBLE)])
    stepper.state.write_back()
    assert (x.detach() > 1.09).all()
    assert feeds[0].tolist() == [2.0] * 3
