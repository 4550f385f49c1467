"""Densities whose fit is killed and run again."""

from __future__ import annotations

import itertools
import os
import re
import signal
import types
import warnings
from dataclasses import asdict
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import ELBO, NFVI, fit_density, maf, nsf
from pyro_nfvi.flows import Inverse, planar
from pyro_nfvi.inference import Checkpoint, density_loops, loop
from pyro_nfvi.inference.checkpoint import CheckpointStore
from pyro_nfvi.inference.density_loops import Annealing, DensityLoop, LikelihoodLoop, UntilHalf
from tests.fits import differences
from tests.killed import run_again, told

small = partial(nsf, num_layers=1, num_bins=3, hidden_dims=(8,))
affine = partial(maf, num_layers=1, hidden_dims=(8,))
ROWS = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).exp()
GIVEN = ROWS.sum(-1, keepdim=True)


def bent(z):
    return -z[..., 0].square() - (z[..., 1] - z[..., 0].square()).square()


def fit(flow, **options):
    return fit_density(flow, **{"seed": 0, "progress": False, "compile": "fx", "num_steps": 12,
                                "batch_size": 20, "num_particles": 8, **options})


def outcome(flow, **options):
    """All that a fit leaves behind; with a seed that is no random state."""
    fitted = fit(flow, **options)
    return {"state": fitted.flow.state_dict(), "history": told(fitted.history),
            "rng": torch.get_rng_state() if options.get("seed", 0) is None else None}


CASES = {
    "rows": (small, {"samples": ROWS, "validation": None}),
    "held out": (small, {"samples": ROWS, "validation": 0.3}),
    "given contexts": (affine, {"samples": ROWS, "context": GIVEN, "validation": (ROWS, GIVEN)}),
    "patience": (small, {"samples": ROWS, "validation": 0.4, "patience": 1, "lr": 2.0,
                         "num_steps": 60}),
    "global seed": (affine, {"samples": ROWS, "validation": 0.3, "seed": None}),
    "as it is": (lambda dim: Inverse(planar(dim)), {"samples": ROWS, "standardize": False,
                                                     "validation": 0.3}),
    "density": (small(2), {"log_density": bent}),
    "annealed for long": (affine(2), {"log_density": bent, "annealing": 0.9, "seed": None}),
    "eager density": (affine(2), {"log_density": bent, "compile": "eager",
                                  "objective": ELBO(path_gradient=False)}),
}
SLOW = {"as it is", "density", "eager density", "given contexts"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else
                                  case for case in CASES])
@pytest.mark.filterwarnings("ignore:fit_density. (k-hat|it misses|the held-out)")
def test_a_fit_that_is_killed_goes_on_bit_for_bit(case, monkeypatch, tmp_path):
    flow, options = CASES[case]
    monkeypatch.setattr(density_loops, "LOOK_EVERY", 3)
    seeds = iter([3, 3, 4, 5])  # the random state of a new process is another

    def run(checkpoint=None):
        torch.manual_seed(next(seeds))
        return outcome(flow, checkpoint=checkpoint, **options)
    expected = run()
    every = max(1, len(expected["history"]["elbo"]) // 6)
    found, states = run_again(monkeypatch, tmp_path / "fit", run, [1, 3], every)
    assert [0 if state is None else len(state["stepper"]["elbo"]) for state in states] \
        == [0, every, 3 * every + every]
    assert differences(found, expected) == []


def test_patience_is_lost_and_cuts_the_rate_on_the_way(monkeypatch):
    monkeypatch.setattr(density_loops, "LOOK_EVERY", 3)
    flow, options = CASES["patience"]
    fitted = fit(flow, **options)
    assert fitted.history.patience_lost  # else the case above proves less
    assert len(fitted.history.elbo) < 60


@pytest.mark.parametrize("options", [
    {"samples": ROWS.round(), "validation": 0.3}, {"log_density": bent}], ids=["rows", "density"])
@pytest.mark.filterwarnings("ignore:fit_density. k-hat")
def test_a_complete_fit_returns_without_a_step_what_was_found(options, monkeypatch, tmp_path):
    first = fit(affine(2), checkpoint=tmp_path, **options)
    monkeypatch.setattr(density_loops.ModuleLoop, "_stepper", None)  # none is even prepared
    again = fit(affine(2), checkpoint=tmp_path, **options)
    assert differences(asdict(again.history), asdict(first.history)) == []
    assert torch.equal(again.log_prob(ROWS), first.log_prob(ROWS))
    assert not again.flow.training


def test_what_was_of_concern_is_said_again(tmp_path):
    repeating = torch.stack([torch.randn(400), torch.arange(400.0) % 3], -1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="fit_density: column 1 takes 3 values only"):
            fit(affine(2), samples=repeating, checkpoint=tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
@pytest.mark.filterwarnings("ignore:fit_density. (k-hat|it misses)")
def test_a_signal_keeps_a_last_checkpoint(signum, monkeypatch, tmp_path):
    run = partial(outcome, affine(2), log_density=bent)
    checkpoint, show = Checkpoint(tmp_path, every_seconds=float("inf")), DensityLoop._show

    def send(self, bar):
        show(self, bar)
        if len(self.history.elbo) == 7:
            os.kill(os.getpid(), signum)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(DensityLoop, "_show", send)
        if signum == signal.SIGINT:
            with pytest.warns(UserWarning, match=r"interrupted after 7 steps; this is the best so "
                                                 r"far\. The same call goes on from its checkp"):
                assert run(checkpoint=checkpoint)["history"]["interrupted"]
        else:
            with pytest.raises(SystemExit) as error:
                run(checkpoint=checkpoint)
            assert error.value.code == 128 + signal.SIGTERM
    with CheckpointStore(checkpoint) as store:
        assert len(store.latest()["stepper"]["elbo"]) == 7
    assert differences(run(checkpoint=checkpoint), run()) == []


ROW_CASES = {
    "the flows differ": {"flow": maf(2, num_layers=2, hidden_dims=(8,))},
    "its `num_steps` was 12, not 13": {"num_steps": 13},
    "its `lr` was 0.02, not 0.01": {"lr": 0.01},
    "its `seed` was 0, not 1": {"seed": 1},
    "its `patience` was 10, not 2": {"patience": 2},
    "its `batch_size` was 20, not 30": {"batch_size": 30},
    "its `standardize` was True, not False": {"standardize": False},
    "its `samples.shape` was [60, 2], not [59, 2]": {"samples": ROWS[1:]},
    "the samples differ": {"samples": ROWS.flip(0)},
    "the held-out rows differ": {"validation": 0.5},
}
DENSITY_CASES = {
    "its `objective` was 'ELBO(path_gradient=True)', not 'ELBO(path_gradient=False)'":
        {"objective": ELBO(path_gradient=False)},
    "its `num_particles` was 8, not 9": {"num_particles": 9},
    "its `annealing` was 0.5, not 0.0": {"annealing": 0.0},
    "the log densities differ": {"log_density": lambda z: 2 * bent(z)},
}


@pytest.mark.filterwarnings("ignore:fit_density. (k-hat|it misses)")
@pytest.mark.parametrize(("options", "cases"), [
    ({"samples": ROWS, "validation": ROWS[:30]}, ROW_CASES),
    ({"log_density": bent}, DENSITY_CASES)], ids=["rows", "density"])
def test_checkpoints_of_another_fit_are_refused_by_name(options, cases, tmp_path):
    fit(affine(2), checkpoint=tmp_path, **options)
    for what, change in cases.items():
        message = (f"fit_density found checkpoints of another fit in {str(tmp_path)!r}: {what}. "
                   "Choose another folder, or remove that one to start anew.")
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            fit(**{"flow": affine(2), "checkpoint": tmp_path, **options, **change})
    fit(affine(2), checkpoint=tmp_path, **options)  # is still there


def test_a_folder_of_another_kind_of_fit_is_refused(tmp_path):
    fit(affine(2), samples=ROWS, validation=None, checkpoint=tmp_path)
    nfvi = NFVI(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="^NFVI found .*: the kinds of fit differ"):
        nfvi.run()
    with pytest.raises(ValueError, match="^fit_density found .*: the kinds of fit differ"):
        fit(affine(2), log_density=bent, checkpoint=tmp_path)


def test_another_fitted_flow_is_another_fit(tmp_path):
    first, second = (fit(affine(2), samples=ROWS, validation=None, seed=seed) for seed in (0, 1))
    options = {"samples": ROWS, "validation": None, "checkpoint": tmp_path}
    fit(first, **options)
    fit(first, **options)
    with pytest.raises(ValueError, match="the fitted flows differ"):
        fit(second, **options)


def test_a_function_is_known_again_by_its_name(tmp_path):
    def objective(flow, log_density, num_particles):
        return ELBO()(flow, log_density, num_particles)

    def copied(function):  # which is elsewhere in the memory, as in another process
        again = types.FunctionType(function.__code__, function.__globals__)
        again.__qualname__ = function.__qualname__
        assert repr(again) != repr(function)
        return again

    def other(*args):
        return ELBO()(*args)
    options = {"log_density": bent, "checkpoint": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(affine(2), objective=objective, **options)
        fit(affine(2), objective=copied(objective), **options)
    with pytest.raises(ValueError, match="its `objective` was '<function .*objective>', not"):
        fit(affine(2), objective=other, **options)


def test_time_is_that_of_all_processes(monkeypatch, tmp_path):
    loops = []

    def restore(self, stepper, snapshot):
        restored(self, stepper, snapshot)
        loops.append((self, snapshot["seconds"]))
    restored = LikelihoodLoop._restore
    monkeypatch.setattr(LikelihoodLoop, "_restore", restore)
    fitted, _ = run_again(monkeypatch, tmp_path, lambda checkpoint: fit(
        affine(2), samples=ROWS, validation=None, checkpoint=checkpoint, max_seconds=1000.0), [4])
    (resumed, spent), = loops
    assert spent > 0
    assert resumed.deadline - resumed.start == pytest.approx(1000.0, abs=5.0)
    assert fitted.history.seconds > spent


def test_powers_of_the_density_go_on_from_a_step():
    one, other = Annealing(10, torch.zeros(1)), Annealing(7, torch.zeros(1))
    powers = one.take(8)[0]
    other.restore(one.snapshot(5))
    assert torch.equal(other.take(3)[0], powers[5:])
    assert one.epoch is None


def test_the_rate_falls_after_half_of_the_steps_whatever_the_clock_says():
    def rates(sizes):
        schedule, made = UntilHalf(130), []
        while len(made) < schedule.num_steps:
            made += schedule.rates(len(made), next(sizes))
            schedule.look(made)
        return made
    ones, many = rates(itertools.repeat(1)), rates(itertools.cycle([57, 7, 20]))
    assert ones == many
    assert ones[49:65] == [1.0] * 16
    assert ones[66] < 1.0


def test_what_is_no_folder_is_refused():
    with pytest.raises(ValueError, match="fit_density expected `checkpoint` to be the path of a f"):
        fit(affine(2), samples=ROWS, checkpoint=3)
