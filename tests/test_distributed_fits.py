"""Several processes fit as one does, to rounding, and all of them end with the same."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import time
import warnings
from datetime import timedelta
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed

from pyro_nfvi import NFVI, Checkpoint
from pyro_nfvi.inference import loop, stages
from pyro_nfvi.inference.checkpoint import CheckpointStore
from pyro_nfvi.inference.distributed import DistributedTeam, LostProcess
from tests.fits import KINDS, differences, fit, never_satisfied, outcome, step_by_step
from tests.processes import run_ranks

STEPS = 60
PARTICLES = 16
# The Gaussian is exact for "subsampled": gradients are rounding, and Adam makes steps of them.
CLOSE = {"float32": 2e-5, "subsampled": 1e-4}


def quick(patch):
    never_satisfied(patch)
    patch.setattr(stages, "NUM_SAMPLES", 300)


def said_and_done(kind, **options):
    """The outcome of a fit, and what was printed."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        quick(patch)
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        posterior = fit(kind, **{"num_particles": PARTICLES, "num_steps": STEPS, **options})
        found = outcome(posterior)
    return {**found, "said": errors.getvalue()}


def of_processes(kinds, **options):
    """Fits of several kinds one after the other, by the processes of torchrun."""
    return {kind: said_and_done(kind, distributed="auto", **options) for kind in kinds}


def largest(one, other):
    """Largest relative difference of two lists of numbers."""
    scale = max(map(abs, one))
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / scale


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)],
                ids=lambda size: f"{size}-processes")
def fits(request):
    """Fits of one process, and of several."""
    kinds = ["auto", "float32", "parameter", "array-loader"] if request.param == 2 else \
        [kind for kind in KINDS if kind != "rollbacks"]
    together = run_ranks(partial(of_processes, kinds), request.param, timeout=500.0)
    return {kind: (said_and_done(kind), [one[kind] for one in together]) for kind in kinds}


def of_a_shard():
    """A fit of a part of the rows in each process, which is a mistake."""
    y = torch.arange(6.0).view(2, 3)[int(os.environ["RANK"])]
    try:
        NFVI(mean_of, num_steps=5, num_particles=4, progress=False, distributed="auto").run(y)
    except ValueError as error:
        return str(error)
    return ""


def mean_of(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_processes_with_a_shard_of_the_rows_each_are_refused():
    for words in run_ranks(of_a_shard, 2):
        assert words == ("NFVI expected the same model and data in all processes of a fit, got "
                         "others: the data differ, first 'y'. Give each of them all rows; a "
                         "loader shares rows out.")


# ---------------------------------------------------------------------- as one process

def test_the_elbo_of_each_step_is_that_of_one_process_to_rounding(fits):
    for kind, (alone, together) in fits.items():
        expected, found = alone["history"]["elbo"], together[0]["history"]["elbo"]
        assert len(found) == len(expected) >= STEPS
        assert largest(expected[:STEPS], found[:STEPS]) < CLOSE.get(kind, 1e-9)


def test_stages_tiers_and_the_gaussian_are_those_of_one_process(fits):
    for alone, together in fits.values():
        stages_of = [[stage["name"] for stage in one["history"]["stages"]]
                     for one in (alone, together[0])]
        assert stages_of[0] == stages_of[1]
        assert alone["tiers"] == together[0]["tiers"]
        gaussian = alone["history"]["stages"][0]
        if gaussian["name"] == "Gaussian":
            assert differences(gaussian, together[0]["history"]["stages"][0]) == []


def test_the_draws_are_those_of_one_process_to_rounding(fits):
    for kind, (alone, together) in fits.items():
        close = 100 * CLOSE.get(kind, 1e-8)
        for name in ("z", "log_p", "log_q"):
            torch.testing.assert_close(together[0]["draws"][name], alone["draws"][name],
                                       rtol=close, atol=close)


def test_all_processes_end_with_the_same_bits(fits):
    """Parameters, those of the model, history, draws and random state."""
    for _, together in fits.values():
        for one in together[1:]:
            assert differences({**together[0], "said": ""}, {**one, "said": ""}) == []


def slowly(steps):
    """ELBOs of a fit at a rate that lets rounding grow."""
    return said_and_done("auto", distributed="auto", num_steps=steps, lr=0.1)["history"]


@pytest.mark.slow
def test_rounding_grows_with_the_steps_and_the_posterior_stays():
    """Adam divides by the size of gradients: what is a digit at first is a figure in the end."""
    steps = 2000
    together = run_ranks(partial(slowly, steps), 2, timeout=500.0)[0]
    alone = said_and_done("auto", num_steps=steps, lr=0.1)["history"]
    gaps = [abs(a - b) for a, b in zip(alone["elbo"], together["elbo"], strict=False)]
    assert max(gaps[:100]) < 1e-9
    last = [sum(one["elbo"][-200:]) / 200 for one in (alone, together)]
    spread = torch.tensor(alone["elbo"][-200:]).std().item() / math.sqrt(200)
    assert abs(last[0] - last[1]) < 5 * spread


# ---------------------------------------------------------------------- checkpoints

def run_with(folder, cut, steps):
    """A fit with checkpoints; it gets Ctrl-C at the second process after so many steps."""
    look, rank = loop.Loop._look, int(os.environ["RANK"])

    def look_and_signal(self, stepper):
        look(self, stepper)
        if rank == 1 and len(self.history.elbo) == cut:
            signal.raise_signal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_by_step(patch)
        patch.setattr(loop.Loop, "_look", look_and_signal)
        found = said_and_done("auto", distributed="auto", num_steps=steps, progress=cut is not None,
                              checkpoint=Checkpoint(folder, every_steps=7))
    return {**found, "warnings": [str(one.message) for one in caught]}


def interrupted_and_resumed(folder):
    return run_with(folder / "fit", 12, 25), run_with(folder / "fit", None, 25), \
        run_with(folder / "whole", None, 25)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run_ranks(partial(interrupted_and_resumed, folder), 2)


def test_ctrl_c_at_one_process_ends_all_and_the_leader_says_so(resumed):
    firsts = [one[0] for one in resumed[1]]
    for first in firsts:
        assert first["history"]["interrupted"]
        assert len(first["history"]["elbo"]) == 12
    assert [len(first["warnings"]) for first in firsts] == [1, 0]
    assert "interrupted after 12 steps" in firsts[0]["warnings"][0]


def test_the_same_processes_go_on_bit_for_bit(resumed):
    for _, second, whole in resumed[1]:
        assert not second["history"]["interrupted"]
        assert differences(whole, second) == []


def test_only_the_leader_shows_bars(resumed):
    first, other = (one[0]["said"] for one in resumed[1])
    assert "NFVI Gaussian" in first
    assert "NFVI flow" in first
    assert other == ""


def test_only_the_leader_writes(resumed):
    """It alone holds the lock, which names its process; there is one number for each write."""
    names = sorted(path.name for path in (resumed[0] / "whole").iterdir())
    assert names[0] == ".lock"
    assert len(names) == 4
    with CheckpointStore(Checkpoint(resumed[0] / "whole")) as store:
        assert store.latest()["stage"] == 3


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(tmp_path):
    run_ranks(partial(run_with, tmp_path / "fit", 12, 25), 2)
    alone = said_and_done("auto", num_steps=25, checkpoint=Checkpoint(tmp_path / "fit"))
    whole = said_and_done("auto", num_steps=25)
    assert largest(whole["history"]["elbo"], alone["history"]["elbo"]) < 1e-9
    assert len(alone["history"]["elbo"]) == len(whole["history"]["elbo"])


# ---------------------------------------------------------------------- death

def dying_at(folder, how, stage, victim, limit=None):
    """One process ends, or stops, in a stage; what the others raise, and how soon."""
    rank = int(os.environ["RANK"])
    if limit is not None:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=limit))
    at = [time.monotonic()]

    def die():
        if rank == victim:
            os.kill(os.getpid(), how)
    look, start = loop.Loop._look, stages.gaussian_start

    def look_and_die(self, stepper):
        at[0] = time.monotonic()
        look(self, stepper)
        if stage == "flow" and len(self.history.elbo) == 12:
            die()

    def start_and_die(*args):
        at[0] = time.monotonic()
        if stage == "Gaussian":
            die()
        return start(*args)
    with pytest.MonkeyPatch.context() as patch:
        step_by_step(patch)
        patch.setattr(loop.Loop, "_look", look_and_die)
        patch.setattr(stages, "gaussian_start", start_and_die)
        with pytest.raises(LostProcess) as caught:
            said_and_done("auto", distributed="auto", num_steps=25,
                          checkpoint=Checkpoint(folder, every_steps=5))
    return str(caught.value), time.monotonic() - at[0]


@pytest.mark.parametrize(("how", "stage", "victim", "limit"), [
    ("SIGKILL", "flow", 1, None),
    pytest.param("SIGKILL", "flow", 0, None, marks=pytest.mark.slow),
    pytest.param("SIGKILL", "Gaussian", 0, None, marks=pytest.mark.slow),
    pytest.param("SIGSTOP", "flow", 1, 10.0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others_and_the_fit_goes_on(tmp_path, how, stage, victim,
                                                                 limit):
    found = run_ranks(partial(dying_at, tmp_path, getattr(signal, how), stage, victim, limit), 2,
                      dying=[victim])
    text, seconds = found[1 - victim]
    assert f"a process of the distributed fit (rank {victim}) has died or does not answer" in text
    assert text.endswith(f"It goes on from the last checkpoint in {str(tmp_path)!r}.")
    assert seconds < 15.0 if stage == "Gaussian" else seconds < 5.0 + (limit or 0.0)
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        content = store.latest()
    if stage == "flow":
        assert len(content["loop"]["stepper"]["elbo"]) == 10
    whole = said_and_done("auto", num_steps=25)
    again = said_and_done("auto", num_steps=25, checkpoint=Checkpoint(tmp_path))
    assert largest(whole["history"]["elbo"], again["history"]["elbo"]) < 1e-9


@pytest.mark.slow
def test_a_process_that_dies_is_replaced_and_two_go_on_bit_for_bit(tmp_path):
    run_ranks(partial(dying_at, tmp_path / "fit", signal.SIGKILL, "flow", 1), 2, dying=[1])
    again = run_ranks(partial(run_with, tmp_path / "fit", None, 25), 2)
    whole = run_ranks(partial(run_with, tmp_path / "whole", None, 25), 2)
    for one, other in zip(whole, again, strict=True):
        assert differences(one, other) == []


def test_particles_have_to_be_shared_evenly(monkeypatch):
    monkeypatch.setattr(DistributedTeam, "of", lambda *args: DistributedTeam("NFVI", 0, 3))
    with pytest.raises(ValueError, match="`num_particles` to be a multiple of the 3 processes, "
                                         "got 16"):
        fit("auto", num_particles=16, distributed="auto")
