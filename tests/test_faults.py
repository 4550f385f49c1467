"""What goes wrong on real machines, and in real data: a fit goes on, or says what it is."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import Checkpoint
from pyro_nfvi.inference import checkpoint as module
from pyro_nfvi.inference import stages
from pyro_nfvi.inference.checkpoint import CheckpointStore
from tests.fits import (
    Y,
    array_loader,
    bent,
    differences,
    fit,
    never_satisfied,
    of_rows,
    outcome,
    small,
    step_by_step,
)
from tests.processes import run_ranks


@pytest.fixture(autouse=True)
def _quick_gates(monkeypatch):
    never_satisfied(monkeypatch)
    monkeypatch.setattr(stages, "NUM_SAMPLES", 300)


# ---------------------------------------------------------------------- kill -9

def forked(function):
    """A process that runs a function and ends with 0 if it went well."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)


def killed_at_random(folder, kills, seconds):
    """Kill a fit at random times, so often; then let it end."""
    warnings.simplefilter("error")
    generator, steps, found = random.Random(0), [], []
    with pytest.MonkeyPatch.context() as patch:
        never_satisfied(patch)
        patch.setattr(stages, "NUM_SAMPLES", 300)
        patch.setattr("pyro_nfvi.inference.loop.CHUNK_SECONDS", 0.002)
        whole = outcome(fit("eager", num_steps=60))
        one = Checkpoint(folder / "fit", every_steps=5)
        for _ in range(kills):
            pid = forked(lambda: fit("eager", num_steps=60, checkpoint=one))
            time.sleep(generator.uniform(0.0, seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with CheckpointStore(one) as store:
                content = store.latest()
            loop = (content or {}).get("loop")
            steps.append(0 if content is None else len(content["history"]["elbo"]) + (
                0 if loop is None else len(loop["stepper"]["elbo"])))
        found = outcome(fit("eager", num_steps=60, checkpoint=one))
    return steps, differences(whole, found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("kills", "seconds"), [
    pytest.param(5, 1.0, marks=pytest.mark.slow), pytest.param(40, 2.0, marks=pytest.mark.slow)])
def test_a_fit_that_is_killed_again_and_again_ends_bit_for_bit_the_same(tmp_path, kills, seconds):
    (steps, different), = run_ranks(partial(killed_at_random, tmp_path, kills, seconds), 1, 300.0)
    assert different == []
    assert steps == sorted(steps)  # nothing that was kept is lost


# ---------------------------------------------------------------------- disks

def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_disk_that_fills_the_fit_ends_with_one_warning(monkeypatch, tmp_path):
    plain, write = outcome(fit("eager")), module.write_file
    written = []

    def write_three(*args):
        written.append(1)
        (write if len(written) <= 3 else no_space)(*args)
    step_by_step(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", write_three)
        with pytest.warns(UserWarning, match="could not write") as caught:
            found = outcome(fit("eager", checkpoint=Checkpoint(tmp_path, every_steps=1)))
    assert [str(one.message) for one in caught] == [
        f"NFVI could not write a checkpoint to {str(tmp_path)!r} ([Errno 28] No space left on "
        "device). The fit goes on, and tries again."]
    assert differences(plain, found) == []
    assert len(written) > 20
    again = outcome(fit("eager", checkpoint=Checkpoint(tmp_path)))  # from the third
    assert differences(plain, again) == []


def too_large(folder):
    """A fit in a process that may write files of so many bytes only, as one with a quota."""
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        never_satisfied(patch)
        patch.setattr(stages, "NUM_SAMPLES", 300)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        found = outcome(fit("eager", checkpoint=Checkpoint(folder)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, ) * 2)
    return found, [str(one.message) for one in caught], os.listdir(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a Unix")
def test_a_quota_that_no_checkpoint_fits_into_is_one_warning_too(tmp_path):
    (found, messages, left), = run_ranks(partial(too_large, tmp_path / "fit"), 1)
    assert len(messages) == 1
    assert "could not write a checkpoint" in messages[0]
    assert left == [".lock"]
    assert differences(outcome(fit("eager")), found) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [pytest.param(cut, marks=pytest.mark.slow), flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_as_good(monkeypatch, tmp_path, spoil):
    plain, write = outcome(fit("eager")), CheckpointStore.write

    class Killed(BaseException):
        pass

    def write_and_die(store, state):
        write(store, state)
        if "loop" in state and len(state["loop"]["stepper"]["elbo"]) == 12:
            raise Killed
    one = Checkpoint(tmp_path, every_steps=4)
    with monkeypatch.context() as patch:
        step_by_step(patch)
        patch.setattr(CheckpointStore, "write", write_and_die)
        with pytest.raises(Killed):
            fit("eager", checkpoint=one)
    newest = max(tmp_path.glob("checkpoint-*.pt"))
    spoil(newest)
    with pytest.warns(UserWarning, match=f"{newest.name}.* Looking for the one before"):
        again = outcome(fit("eager", checkpoint=one))
    assert differences(plain, again) == []


# ---------------------------------------------------------------------- data

@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_data_that_are_no_numbers_are_refused_by_name(value):
    y = Y.clone()
    y[0] = value
    with pytest.raises(ValueError, match="NFVI.*'y'"):
        small(bent).run(y)


def test_bad_rows_of_a_loader_are_refused_by_name():
    x = array_loader().gather(torch.arange(30))[0].clone()
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NFVI.*'y'"):
        small(of_rows).run(loader=[x])


def test_masked_data_may_be_anything():
    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            filled = torch.where(seen, y, torch.zeros(()))
            pyro.sample("y", dist.Normal(mu, 1.0).mask(seen), obs=filled)
    y = Y.clone()
    y[2] = torch.nan
    posterior = small(model).run(y, ~y.isnan())
    known = y[~y.isnan()]
    exact = known.double().sum() / (1 + len(known))
    assert abs(posterior.resample(4000)["mu"].mean() - exact) < 4 * 0.45 / 4000 ** 0.5 + 0.05


def overflowing(y):
    """exp of a latent that a flow may carry far, in single precision."""
    a = pyro.sample("a", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((5.0 * a).exp()), obs=y)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64,
                                                               marks=pytest.mark.slow)])
def test_a_likelihood_that_overflows_gives_finite_results(dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NFVI. the log joint is not finite")
        posterior = small(overflowing, dtype=dtype).run(torch.tensor([3.0, 5.0, 4.0]))
    assert all(value.isfinite().all() for value in posterior.guide.state_dict().values())
    assert posterior.resample(100)["a"].isfinite().all()


def hopeless(y):
    """A likelihood that overflows wherever its latent is."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal((a.square() + 800.0).exp(), 1.0), obs=y[0])


def test_a_likelihood_that_overflows_everywhere_is_named():
    with pytest.raises(ValueError, match="not finite at any of 12 starts; first bad site 'y'"):
        small(hopeless).run(Y)
