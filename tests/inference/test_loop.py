"""Loop: rates of the steps, when they end, clipped gradients, rollback, Ctrl-C."""

from __future__ import annotations

import math
import signal
import time

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_nfvi import ELBO
from pyro_nfvi.engine import Engine
from pyro_nfvi.engine.adam import CLIP_FACTOR, SNAPSHOT_EVERY, AdamState
from pyro_nfvi.flows import Flow, Gaussian, Triangular
from pyro_nfvi.inference import History, Loop, Stage
from pyro_nfvi.inference.loop import MAX_ROLLBACKS
from pyro_nfvi.inference.stopping import FEWEST, OneCycle, UntilFlat

DOUBLE = torch.float64


def one_cycle(step, num_steps):
    """The rate of one step."""
    return OneCycle(num_steps).rates(step, 1)[0]


class Problem:
    """Minus a parabola, which misbehaves at the calls it is told to, and so runs as it is."""

    def __init__(self, bad_at=(), value=math.nan, stop_at=None, bad=range(4)):
        self.x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=DOUBLE))
        self.bad_at, self.value, self.stop_at = bad_at, value, stop_at
        self.bad = torch.isin(torch.arange(4), torch.tensor(bad))
        self.calls, self.scale, self.seen = 0, 1.0, []

    def __call__(self):
        call, self.calls = self.calls, self.calls + 1
        self.seen.append(self.x.detach().clone())
        if call == self.stop_at:
            raise KeyboardInterrupt
        elbo = -self.scale * (self.x ** 2).sum() * torch.ones(4, dtype=DOUBLE)
        if call in self.bad_at:
            elbo = torch.where(self.bad, self.value, elbo)
        return elbo, torch.arange(4.0).unsqueeze(-1) + self.x.sum()

    def loop(self, num_steps=40, lr=0.1, **kwargs):
        self.blamed = []

        def blame(z):
            self.blamed.append(z)
            return "'scale' (value inf)"
        return Loop([self.x], self, blame, num_steps, lr, progress=False, **{
            "compile": "eager", **kwargs})


@pytest.fixture
def updates(monkeypatch):
    """The updates of the state while the test runs: (gradient after clipping, rate)."""
    made, update = [], AdamState.update

    def spy(state, gradient, norm, rate):
        before = state.live[1].clone()
        update(state, gradient, norm, rate)
        made.append((10 * (state.live[1] - 0.9 * before), rate))
    monkeypatch.setattr(AdamState, "update", spy)
    return made


# ------------------------------------------------------------------ the rate

def test_the_optimiser_uses_the_rate(updates):
    Problem().loop(num_steps=20, lr=0.5).run()
    assert [rate for _, rate in updates] == [0.5 * one_cycle(k, 20) for k in range(20)]


# ------------------------------------------------------------------ when to stop

def test_a_loop_ends_when_its_schedule_does():
    history = Problem().loop(num_steps=UntilFlat(5000), lr=0.02).run()
    assert FEWEST < len(history.elbo) < 5000
    assert history.stages == [Stage("fit", len(history.elbo))]
    assert history.stopped == ""


@pytest.mark.parametrize("schedule", [OneCycle, UntilFlat], ids=lambda kind: kind.__name__)
def test_a_loop_whose_time_is_up_stops_and_says_so(schedule):
    problem = Problem()
    start = time.monotonic()
    history = problem.loop(num_steps=schedule(10 ** 7), deadline=start + 0.5).run()
    assert time.monotonic() - start < 5
    assert 0 < len(history.elbo) < 10 ** 7
    assert history.stopped == "its time was up" or schedule is UntilFlat
    assert problem.x.isfinite().all()


def test_before_its_time_is_up_a_loop_lets_the_rate_fall(updates):
    start = time.monotonic()
    Problem().loop(num_steps=UntilFlat(10 ** 7), lr=1e-9, deadline=start + 1.0).run()
    rates = [rate / 1e-9 for _, rate in updates]
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.9


# ------------------------------------------------------------------ Adam

def test_the_update_is_that_of_adam_with_clipped_gradients():
    shapes = [(3, 2), (), (4,)]
    ours = AdamState([torch.ones(shape, dtype=DOUBLE) for shape in shapes])
    theirs = [torch.nn.Parameter(torch.ones(shape, dtype=DOUBLE)) for shape in shapes]
    optimizer, num_cut = torch.optim.Adam(theirs), 0
    for step in range(50):
        size = 10.0 ** torch.randn((), dtype=DOUBLE)
        for parameter in theirs:
            parameter.grad = size * torch.randn_like(parameter)
        gradient = torch.cat([p.grad.flatten() for p in theirs])
        optimizer.param_groups[0]["lr"] = rate = 0.1 * one_cycle(step, 50)
        limit, norm = ours.limit(), gradient.norm().item()
        num_cut += norm > limit
        ours.update(gradient, norm, rate)
        torch.nn.utils.clip_grad_norm_(theirs, limit)
        optimizer.step()
        for view, parameter in zip(ours.views(), theirs, strict=True):
            torch.testing.assert_close(view, parameter.detach(), rtol=1e-12, atol=1e-12)
    assert 0 < num_cut < 25
    assert ours.step == 50


def test_the_state_is_written_back_where_it_came_from():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(()))]
    state = AdamState(parameters)
    state.update(torch.arange(7.0), 1.0, 0.1)
    assert all((p == 0).all() for p in parameters)
    state.write_back()
    assert all(torch.equal(p, view) for p, view in zip(parameters, state.views(), strict=True))
    assert parameters[0][0, 1].item() == pytest.approx(-0.1)  # a first step is as long as the rate


def test_snapshots_are_taken_every_so_often():
    state, taken = AdamState([torch.zeros(2)]), []
    for _ in range(3 * SNAPSHOT_EVERY):
        state.update(torch.ones(2), 1.0, 0.1)
        taken.append(state.saved_step)
    assert sorted(set(taken)) == [1, 1 + SNAPSHOT_EVERY, 1 + 2 * SNAPSHOT_EVERY]


# ------------------------------------------------------------------ an ordinary run

def test_a_run_maximises_and_records_every_step():
    problem = Problem()
    history = problem.loop(num_steps=300, name="stage").run()
    assert problem.x.detach().abs().max() < 1e-2
    assert len(history.elbo) == 300
    assert history.elbo[0] == -5
    assert history.elbo[-1] > -1e-3
    assert history.stages == [Stage("stage", 300)]
    assert (history.rollbacks, history.interrupted, history.stopped) == ([], False, "")


def test_the_engine_of_a_stage_is_in_the_history():
    loop = Problem().loop()
    engine, = loop.run().engines
    assert engine == loop.engine
    assert (engine.tier, engine.reason) == ("eager", "")
    assert engine.build_seconds > 0
    assert engine.microseconds > 0


def test_a_gaussian_posterior_is_recovered_in_mean_and_covariance():
    x = torch.linspace(-1, 1, 20, dtype=DOUBLE)
    design = torch.stack([torch.ones_like(x), x, x ** 2], -1)
    y = 1 + 2 * x + 0.1 * torch.sin(37 * x)
    precision = torch.eye(3, dtype=DOUBLE) + design.T @ design / 0.25
    posterior = MultivariateNormal(torch.linalg.solve(precision, design.T @ y / 0.25),
                                   precision_matrix=precision)

    def log_joint(w):
        return -((y - w @ design.T) ** 2).sum(-1) / 0.5 - (w ** 2).sum(-1) / 2
    flow = Flow(Triangular(3).double(), Gaussian(3).double())
    loop = Loop(list(flow.parameters()), lambda: ELBO()(flow, log_joint, 64), str, 2000, 0.05,
                progress=False)
    loop.run()
    assert loop.engine.tier == "c"
    mean, factor = flow.bijection.shift(None), flow.bijection._factor(None)[0]
    # The path gradient vanishes at the fit: closer than the standard errors of 10,000 draws.
    variance, covariance = posterior.variance, posterior.covariance_matrix
    error = (variance / 10_000) ** 0.5
    assert ((mean - posterior.mean).abs() < error).all()
    error = ((covariance ** 2 + torch.outer(variance, variance)) / 10_000) ** 0.5
    assert ((factor @ factor.T - covariance).abs() < error).all()


# ------------------------------------------------------------------ clipping

def test_one_long_gradient_is_cut_to_a_few_median_lengths(updates):
    problem = Problem()

    def estimates():
        problem.scale = 1e6 if problem.calls == 10 else 1.0
        return problem()
    Loop([problem.x], estimates, str, 100, 1e-6, progress=False, compile="eager").run()
    used, ordinary = [gradient.norm().item() for gradient, _ in updates], 2 * math.sqrt(5)
    assert used[10] == pytest.approx(CLIP_FACTOR * ordinary, rel=1e-3)
    assert used[9] == pytest.approx(ordinary, rel=1e-3)
    assert used[11] == pytest.approx(ordinary, rel=1e-3)


def test_the_first_gradient_is_never_cut(updates):
    problem = Problem()
    problem.scale = 1e8
    problem.loop(num_steps=1).run()
    (gradient, _), = updates
    assert gradient.norm().item() == pytest.approx(2e8 * math.sqrt(5))


def test_gradients_may_grow_step_by_step(updates):
    problem = Problem()

    def estimates():
        problem.scale *= 1.1
        return problem()
    Loop([problem.x], estimates, str, 400, 1e-9, progress=False, compile="eager").run()
    assert updates[-1][0].norm() > 1e6


# ------------------------------------------------------------------ rollback

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_log_joint_that_is_not_finite_rolls_back_and_names_the_site(value):
    problem = Problem(bad_at=[30], value=value)
    history = problem.loop(num_steps=60).run()
    assert history.rollbacks == [(30, "'scale' (value inf)")]
    assert len(history.elbo) == 60
    assert history.stopped == ""
    assert torch.isfinite(torch.tensor(history.elbo)).all()
    snapshot = problem.seen[SNAPSHOT_EVERY + 1]  # taken after the step of that number
    assert torch.equal(problem.seen[31], snapshot)


def test_a_bad_particle_is_the_one_to_blame():
    problem = Problem(bad_at=[3])
    problem.loop(num_steps=10).run()
    (z,) = problem.blamed
    assert z.item() == pytest.approx(problem.seen[3].sum().item())
    assert not z.requires_grad


@pytest.mark.parametrize("bad", [[2], [0, 3], [0, 1, 3]], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_particles_that_are_not_finite_are_left_out_if_others_are(value, bad):
    problem, clean = Problem(range(60), value, bad=bad), Problem()
    history, expected = (each.loop(num_steps=60).run() for each in (problem, clean))
    assert history.rollbacks == []
    assert problem.blamed == []
    assert history.elbo == pytest.approx(expected.elbo)
    torch.testing.assert_close(problem.x, clean.x)


@pytest.mark.parametrize("compile", ["eager", "fx", "c"])
def test_the_elbo_of_a_step_is_the_mean_of_its_finite_particles(compile):
    x = torch.nn.Parameter(torch.tensor([2.0], dtype=DOUBLE))

    def estimates():
        z = x * torch.arange(1.0, 5.0, dtype=DOUBLE)  # the last is out of bounds
        return -z.square() + torch.where(z > 7, -math.inf, 0.0), z.unsqueeze(-1)
    loop = Loop([x], estimates, str, 1, 0.1, progress=False, compile=compile)
    history = loop.run()
    assert loop.engine.tier == compile
    assert history.elbo == pytest.approx([-4 * (1 + 4 + 9) / 3])
    assert history.rollbacks == []
    assert x.item() == pytest.approx(1.9)


def test_each_rollback_halves_the_step(updates):
    Problem(bad_at=[5, 9]).loop(num_steps=20, lr=0.4).run()
    cuts = [rate / (0.4 * one_cycle(k, 20)) for k, (_, rate) in enumerate(updates)]
    assert cuts == pytest.approx([1.0] * 5 + [0.5] * 3 + [0.25] * 12)


def test_rollback_restores_the_state_of_the_optimiser():
    problem = Problem(bad_at=[10])
    loop = problem.loop(num_steps=30)
    moments = []
    roll_back = loop._roll_back

    def spy(*args):
        roll_back(*args)
        moments.append((loop.stepper.state.step, *loop.stepper.state.live[1:].clone()))
    loop._roll_back = spy
    loop.run()
    (step, first, second), = moments
    gradient = 2 * problem.seen[0]  # one step from zero
    assert step == 1
    torch.testing.assert_close(first, 0.1 * gradient)
    torch.testing.assert_close(second, 0.001 * gradient ** 2)


def test_too_many_rollbacks_stop_with_the_last_good_state():
    problem = Problem(bad_at=range(40, 1000))
    history = problem.loop(num_steps=100).run()
    assert len(history.rollbacks) == MAX_ROLLBACKS
    assert len(history.elbo) == 40
    assert torch.equal(problem.x.detach(), problem.seen[SNAPSHOT_EVERY + 1])
    for words in ("not finite at step 40", "'scale' (value inf)", "last good state"):
        assert words in history.stopped
    assert history.stages == [Stage("fit", 40)]


def test_a_gradient_that_is_not_finite_rolls_back_too():
    x = torch.nn.Parameter(torch.zeros(2))
    calls = []

    def estimates():
        calls.append(x.detach().clone())
        inner = (x - x.detach()).abs() if len(calls) == 4 else x
        return -(inner.sqrt() if len(calls) == 4 else inner ** 2).sum() * torch.ones(3), x.expand(
            3, 2)
    history = Loop([x], estimates, str, 6, 0.1, progress=False, compile="eager").run()
    assert history.rollbacks == [(3, "the gradient")]
    assert x.isfinite().all()


@pytest.mark.parametrize("compile", ["eager", "fx", "c"])
def test_a_factorization_that_fails_rolls_back_and_says_so(compile):
    x = torch.nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def estimates():
        z = x + torch.randn(8, 2, dtype=DOUBLE)
        factor = torch.linalg.cholesky((2 + z).diag_embed())  # fails where z < -2
        return -(z ** 2).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), z
    loop = Loop([x], estimates, str, 40, 0.01, progress=False, compile=compile)
    history = loop.run()
    assert loop.engine.tier == compile
    assert history.rollbacks
    for _, site in history.rollbacks:
        assert site.startswith("one that raised: linalg.cholesky")
        assert "\n" not in site


def test_one_that_fails_from_the_start_stops():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

    def estimates():
        torch.linalg.cholesky(-x.square().diag())
        return x.sum().expand(3), x.expand(3, 2)
    history = Loop([x], estimates, str, 5, 0.1, progress=False, compile="eager").run()
    assert history.elbo == []
    assert "one that raised: linalg.cholesky" in history.stopped


# ------------------------------------------------------------------ Ctrl-C

@pytest.mark.parametrize("step", [0, 1, 17, 39])
def test_ctrl_c_returns_the_history_so_far_and_finite_parameters(step):
    problem = Problem(stop_at=step)
    history = problem.loop().run()
    assert history.interrupted
    assert len(history.elbo) == step
    assert history.stages == [Stage("fit", step)]
    assert torch.equal(problem.x.detach(), problem.seen[-1])
    assert problem.x.isfinite().all()


# ------------------------------------------------------------------ history, bar

def test_histories_of_two_stages_add_up():
    engines = [Engine("c", "", 1.0, 2.0), Engine("fx", "because", 1.0, 2.0)]
    stages = [Stage("one", 2, gradients=32), Stage("two", 1, 0.1, 0.9, -1.0, 16)]
    first = History([1.0, 2.0], [(1, "a")], stages=stages[:1],
                    engines=engines[:1], concerns=["one"])
    second = History([3.0], [(0, "b")], True, "why", stages[1:], engines[1:], ["two"])
    assert first + second == History([1.0, 2.0, 3.0], [(1, "a"), (2, "b")], True, "why", stages,
                                     engines, ["one", "two"])
    assert (first + second).gradients == 48
    assert first.elbo == [1.0, 2.0]


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_shows_only_if_asked_to(progress, capsys):
    problem = Problem()
    Loop([problem.x], problem, str, 40, 0.1, progress=progress, name="NFVI flow").run()
    out, err = capsys.readouterr()
    assert out == ""
    assert ("NFVI flow" in err and "40/40" in err and "ELBO" in err) == progress
    assert bool(err) == progress


# ------------------------------------------------------------------ feeds

class Feed:
    """Numbers 0, 1, 2, ... as tensors, at most three steps at once."""

    most = 3

    epoch = None

    def __init__(self, shape=(2,)):
        self.live, self.shape = [torch.zeros(shape, dtype=DOUBLE)], shape
        self.supplied, self.counts = 0, []

    def take(self, count):
        first, self.supplied = self.supplied, self.supplied + count
        self.counts.append(count)
        steps = torch.arange(first, self.supplied, dtype=DOUBLE)
        return [steps.reshape(-1, *[1] * len(self.shape)).expand(count, *self.shape).clone()]


def fed_loop(feed, num_steps=20, compile="auto", noise=0.0):
    x = torch.nn.Parameter(torch.ones(2, dtype=DOUBLE))

    def estimates():
        z = x + noise * torch.randn(4, 2, dtype=DOUBLE)
        return (feed.live[0] + 0 * z).sum(-1) - z.square().sum(-1), z
    return Loop([x], estimates, str, num_steps, 1e-12, progress=False, compile=compile, feed=feed)


def test_a_feed_that_ends_with_the_signal_interrupts_the_fit_and_does_not_lose_it():
    class Workers(Feed):
        """Processes of the same group hear Ctrl-C too, and are gone before the next batch."""

        def take(self, count):
            if self.supplied:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return super().take(count)
    history = fed_loop(Workers()).run()
    assert history.interrupted
    assert len(history.elbo) == 3


def test_a_feed_that_fails_by_itself_says_so():
    class Broken(Feed):
        def take(self, count):
            raise RuntimeError("no such file")
    with pytest.raises(RuntimeError, match="no such file"):
        fed_loop(Broken()).run()


@pytest.mark.parametrize("compile", ["c", "fx", "eager"])
def test_every_step_has_a_feed_of_its_own(compile):
    feed = Feed()
    history = fed_loop(feed, compile=compile).run()
    assert history.engines[0].tier == compile
    assert history.elbo == pytest.approx([2.0 * step - 2 for step in range(20)], abs=1e-9)
    assert feed.supplied == 20


def test_no_more_steps_are_supplied_at_once_than_the_feed_can():
    feed = Feed()
    fed_loop(feed, num_steps=50).run()
    first, *later = feed.counts
    assert max(later) <= 3
    assert sum(feed.counts) == 50


@pytest.mark.parametrize("compile", ["c", "fx"])
def test_the_feed_does_not_disturb_the_noise(compile):
    elbos = []
    for count in (3, 1):
        torch.manual_seed(0)
        fitted = fed_loop(Feed(), compile=compile, noise=0.5)
        fitted._chunk = lambda stepper, count=count: count
        elbos.append(fitted.run().elbo)
    assert elbos[0] == elbos[1]


def test_the_checks_of_a_fed_loop_find_no_change_where_there_is_none():
    history = fed_loop(Feed(), num_steps=200).run()
    assert history.engines[0].tier == "c"
    assert history.rollbacks == []
