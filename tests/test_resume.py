"""A fit that was interrupted goes on from its checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_nfvi import ELBO, NFVI, AutoFlow, Checkpoint, planar, radial
from pyro_nfvi.engine import stepper
from pyro_nfvi.flows import MultivariateStudentT
from pyro_nfvi.inference import loop, stages
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.checkpoint import CheckpointStore
from tests.fits import (
    KINDS,
    X,
    Y,
    array_loader,
    bent,
    copied_checkpoints,
    data_loader,
    differences,
    fit,
    guide_of,
    never_satisfied,
    of_rows,
    outcome,
    small,
    step_by_step,
    subsampled,
    with_parameter,
)
from tests.processes import LOADED


class Killed(BaseException):
    """What a kill is to the code: nothing is done about it."""


@pytest.fixture(autouse=True)
def _quick_gates(monkeypatch):
    never_satisfied(monkeypatch)
    monkeypatch.setattr(stages, "NUM_SAMPLES", 300)


def checkpoint(folder, every_steps=1, **options):
    return Checkpoint(folder, every_steps=every_steps, **options)


def killed_at(monkeypatch, number, run):
    """Run until so many checkpoints are written."""
    write, written = CheckpointStore.write, []

    def write_and_die(store, state):
        write(store, state)
        written.append(1)
        if len(written) == number:
            raise Killed
    with monkeypatch.context() as patch:
        step_by_step(patch)
        patch.setattr(CheckpointStore, "write", write_and_die)
        with pytest.raises(Killed):
            run()


def signalled(monkeypatch, signum, steps, run):
    """Run, and get a signal after so many steps of the flow."""
    look = loop.Loop._look

    def look_and_signal(self, stepper):
        look(self, stepper)
        if len(self.history.elbo) == steps:
            signal.raise_signal(signum)
    with monkeypatch.context() as patch:
        step_by_step(patch)
        patch.setattr(loop.Loop, "_look", look_and_signal)
        return run()


# ---------------------------------------------------------------------- bit for bit

def goes_on_from_copies(monkeypatch, tmp_path, kind, which, every_steps=1, **options):
    """A plain fit, one with checkpoints, and those resumed from some of them, are the same."""
    plain = outcome(fit(kind, **options))
    with copied_checkpoints(monkeypatch, tmp_path / "copies") as copies:
        with monkeypatch.context() as patch:
            step_by_step(patch)
            one = checkpoint(tmp_path / "fit", every_steps)
            kept = outcome(fit(kind, checkpoint=one, **options))
        assert differences(plain, kept) == []
        for number in which(copies):
            again = outcome(fit(kind, checkpoint=checkpoint(copies[number], 1000), **options))
            assert differences(plain, again) == [], f"{kind} from checkpoint {number}"
    return plain


def every(copies):
    """All boundaries of stages, and every third step."""
    return sorted({0, 1, 2, 22, 23, len(copies) - 1, *range(0, len(copies), 3)} & set(
        range(len(copies))))


def few(copies):
    """One step within the flow's training, and one within the last."""
    return [2, -2] if len(copies) > 6 else [2]


@pytest.mark.parametrize("kind", ["auto", "parameter", "data-loader", pytest.param(
    "rollbacks", marks=pytest.mark.slow)])
def test_a_fit_goes_on_bit_for_bit_from_some_checkpoints(monkeypatch, tmp_path, kind):
    plain = goes_on_from_copies(monkeypatch, tmp_path, kind, few, every_steps=7)
    if kind == "rollbacks":
        assert plain["history"]["rollbacks"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_goes_on_bit_for_bit_from_checkpoints_everywhere(monkeypatch, tmp_path, kind):
    plain = goes_on_from_copies(monkeypatch, tmp_path, kind, every)
    names = [stage["name"] for stage in plain["history"]["stages"]]
    if kind == "trained":
        assert names == ["flow"]
    elif kind in ("parameter", "subsampled"):
        assert names == ["Gaussian", "flow"]
    else:
        assert names == ["Gaussian", "flow", "more particles"]
        assert set(plain["tiers"]) <= {kind, "c"} if kind in ("fx", "c") else True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "rollbacks", "array-loader"])
def test_noise_drawn_in_many_blocks_goes_on_too(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(stepper, "BLOCK_BYTES", 7 * 128)
    goes_on_from_copies(monkeypatch, tmp_path, kind, lambda copies: every(copies)[::2])


@pytest.mark.slow
def test_a_schedule_that_looks_at_the_elbo_goes_on_too(monkeypatch, tmp_path):
    """Its steps are many enough for it to decide when the rate falls."""
    plain = outcome(fit("auto", num_steps=700))
    assert len(plain["history"]["elbo"]) < 1400
    monkeypatch.setattr(loop.Loop, "_chunk", lambda self, stepper: 30)
    with copied_checkpoints(monkeypatch, tmp_path / "copies") as copies:
        kept = outcome(fit("auto", num_steps=700, checkpoint=checkpoint(tmp_path / "fit", 60)))
        assert differences(plain, kept) == []
        assert len(copies) > 8
        for copy in copies[2::5]:
            again = outcome(fit("auto", num_steps=700, checkpoint=checkpoint(copy, 1000)))
            assert differences(plain, again) == []


@pytest.mark.slow
def test_a_fit_killed_after_each_few_steps_ends_the_same(monkeypatch, tmp_path):
    plain = outcome(fit("rollbacks"))
    one = checkpoint(tmp_path / "fit", keep=2)
    for _ in range(6):
        killed_at(monkeypatch, 7, lambda: fit("rollbacks", checkpoint=one))
    assert differences(plain, outcome(fit("rollbacks", checkpoint=one))) == []


# ---------------------------------------------------------------------- whose fit it is

def test_a_fit_goes_on_wherever_the_random_state_is(monkeypatch, tmp_path):
    """Without a seed it is that with which the fit began that counts."""
    plain, one = outcome(fit("auto")), checkpoint(tmp_path)
    killed_at(monkeypatch, 9, lambda: fit("auto", checkpoint=one))
    torch.manual_seed(99)
    assert differences(plain, outcome(small(bent, checkpoint=one).run(Y))) == []


def tilted(flow, log_joint, num_particles):
    """An objective of one's own, whose repr has an address."""
    return ELBO()(flow, log_joint, num_particles)


def test_an_objective_of_one_s_own_is_the_same_in_another_process(monkeypatch, tmp_path):
    one = checkpoint(tmp_path, 10**6)
    killed_at(monkeypatch, 1, lambda: small(bent, objective=tilted, checkpoint=one).run(Y))
    again = partial(tilted)  # as another process would have it: elsewhere
    with pytest.raises(ValueError, match="its `objective` was"):
        small(bent, objective=again, checkpoint=one).run(Y)
    other = eval(f"lambda *args: {tilted.__name__}(*args)", {"tilted": tilted})
    other.__qualname__ = other.__name__ = tilted.__qualname__
    assert repr(other) != repr(tilted)
    assert len(small(bent, objective=other, checkpoint=one).run(Y).history.elbo) == 40


def wider(y):
    """As ``bent``, with another prior."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.01))
    pyro.sample("y", dist.Normal(b + a ** 2, 0.5), obs=y[0])


OTHERS = {
    "seed": (lambda one: small(bent, checkpoint=one, seed=5).run(Y), "its `seed` was None, not 5"),
    "particles": (lambda one: small(bent, checkpoint=one, num_particles=4).run(Y),
                  "its `num_particles` was 8, not 4"),
    "steps": (lambda one: small(bent, checkpoint=one, num_steps=30).run(Y),
              "its `num_steps` was 20, not 30"),
    "rate": (lambda one: small(bent, checkpoint=one, lr=0.1).run(Y), "its `lr` was 0.03, not 0.1"),
    "objective": (lambda one: small(bent, checkpoint=one, objective=ELBO(False)).run(Y),
                  "its `objective` was 'ELBO(path_gradient=True)', not "
                  "'ELBO(path_gradient=False)'"),
    "type": (lambda one: small(bent, checkpoint=one, dtype=torch.float32).run(Y),
             "the floating-point types differ, torch.float64 then and torch.float32 now"),
    "data": (lambda one: small(bent, checkpoint=one).run(Y * 1.0001), "the data differ, first 'y'"),
    "prior": (lambda one: small(wider, checkpoint=one).run(Y),
              "the densities of the sites differ, first 'b'"),
    "model": (lambda one: small(with_parameter, checkpoint=one).run(Y),
              "the latent sites differ, {'a': [], 'b': []} then and {'mu': []} now"),
    "recipe": (lambda one: small(bent, AutoFlow(bent, radial), checkpoint=one).run(Y),
               "the guides differ"),
    "noise": (lambda one: small(bent, AutoFlow(bent, partial(planar, num_layers=1), base=partial(
        MultivariateStudentT)), checkpoint=one).run(Y), "the guides differ"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the first checkpoint of a fit."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 1, lambda: small(bent, checkpoint=checkpoint(folder)).run(Y))
    return folder


@pytest.mark.parametrize("other", OTHERS)
def test_another_fit_in_the_same_folder_is_refused_in_one_sentence(begun, other):
    run, words = OTHERS[other]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        run(checkpoint(begun))
    assert str(caught.value) == (
        f"NFVI found checkpoints of another fit in {str(begun)!r}: {words}. Choose another "
        "folder, or remove that one to start anew.")


LOADERS = {"batch": (lambda: ArrayLoader(X, batch_size=10),
                     "the loaders differ, .*'batch_size': 8} then and .*'batch_size': 10} now"),
           "data": (lambda: ArrayLoader(X + 1, batch_size=8), "the data differ, first 'y'"),
           "kind": (data_loader, "the loaders differ, .* then and .* now")}


@pytest.mark.parametrize("other", [pytest.param("batch", marks=pytest.mark.slow), "data",
                                   pytest.param("kind", marks=pytest.mark.slow)])
def test_another_loader_is_refused(monkeypatch, tmp_path, other):
    make, words = LOADERS[other]
    one = checkpoint(tmp_path)
    killed_at(monkeypatch, 1, lambda: small(of_rows, checkpoint=one).run(loader=array_loader()))
    with pytest.raises(ValueError, match=f"{words}. Choose another folder"):
        small(of_rows, checkpoint=one).run(loader=make())


class Noisy(Dataset):
    """Rows that differ at each look."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index] + 0.01 * torch.randn(3)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [DataLoader(Noisy(), batch_size=8, shuffle=True),
                                    list(X.split(8))], ids=["augmented", "list"])
def test_a_loader_that_draws_by_itself_is_recognized_from_any_random_state(monkeypatch, tmp_path,
                                                                           loader):
    one = checkpoint(tmp_path)
    killed_at(monkeypatch, 9, lambda: small(of_rows, checkpoint=one).run(loader=loader))
    torch.manual_seed(99)
    assert len(small(of_rows, checkpoint=one).run(loader=loader).history.elbo) == 40


# ---------------------------------------------------------------------- in one process

@pytest.mark.parametrize("model", [bent, pytest.param(with_parameter, marks=pytest.mark.slow),
                                   pytest.param(subsampled, marks=pytest.mark.slow)])
def test_ctrl_c_gives_the_posterior_so_far_and_the_same_call_goes_on(monkeypatch, tmp_path, model):
    """Also if that call has the guide, and the parameters, that the first has trained."""
    torch.manual_seed(11)
    plain = outcome(small(model).run(Y))
    pyro.clear_param_store()
    nfvi = small(model, checkpoint=checkpoint(tmp_path))
    torch.manual_seed(11)
    with pytest.warns(UserWarning, match="interrupted after 10 steps.*same call goes on"):
        posterior = signalled(monkeypatch, signal.SIGINT, 10, lambda: nfvi.run(Y))
    assert posterior.history.interrupted
    assert posterior.resample(50)["mu" if model is not bent else "a"].isfinite().all()
    assert differences(plain, outcome(nfvi.run(Y))) == []


@pytest.mark.slow
def test_ctrl_c_in_the_gaussian_stage_starts_it_anew(monkeypatch, tmp_path):
    plain = outcome(fit("auto"))

    def interrupt(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(stages, "gaussian_start", interrupt)
        with pytest.warns(UserWarning, match="interrupted after 0 steps"):
            fit("auto", checkpoint=checkpoint(tmp_path))
    assert differences(plain, outcome(fit("auto", checkpoint=checkpoint(tmp_path)))) == []


class Net(nn.Module):
    """A mean with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1).double()


@pytest.mark.slow
def test_a_network_that_was_trained_so_far_goes_on(monkeypatch, tmp_path):
    def run(net, one=None):
        def model(y):
            module = pyro.module("net", net)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(module.layer(z.reshape(1, 1))[0, 0], 1.0), obs=y)
        pyro.clear_param_store()
        torch.manual_seed(11)
        return small(model, checkpoint=one).run(Y)
    torch.manual_seed(3)
    net = Net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    plain = outcome(run(net))
    net.load_state_dict(state)
    killed_at(monkeypatch, 12, lambda: run(net, checkpoint(tmp_path)))
    assert differences(plain, outcome(run(net, checkpoint(tmp_path)))) == []


def test_a_complete_fit_returns_at_once(monkeypatch, tmp_path):
    one = checkpoint(tmp_path, None)
    first = outcome(fit("auto", checkpoint=one))

    def never(*args, **kwargs):
        raise AssertionError("nothing is to be done")
    for owner, name in ((loop.Loop, "run"), (stages, "gaussian_start"),
                        (stages, "importance_sample")):
        monkeypatch.setattr(owner, name, never)
    begin = time.perf_counter()
    assert differences(first, outcome(fit("auto", checkpoint=one))) == []
    assert time.perf_counter() - begin < 2.0


# ---------------------------------------------------------------------- time, files, signals

def test_the_time_of_both_runs_counts(monkeypatch, tmp_path):
    one = checkpoint(tmp_path)
    run = partial(fit, "eager", num_steps=10**6, checkpoint=one, num_particles=2)
    with pytest.warns(UserWarning, match="interrupted"):
        signalled(monkeypatch, signal.SIGINT, 15, lambda: run(max_seconds=1000.0))
    with CheckpointStore(one) as store:
        state = store.latest()
        store.write({**state, "seconds": 998.0})
    begin = time.perf_counter()
    with pytest.warns(UserWarning, match="its time was up"):
        posterior = run(max_seconds=1000.0)
    assert time.perf_counter() - begin < 20.0
    assert 998.0 < posterior.history.seconds < 1018.0
    assert len(posterior.history.elbo) > 15


@pytest.mark.slow
def test_a_fit_whose_time_is_up_before_it_goes_on_still_ends_well(monkeypatch, tmp_path):
    one = checkpoint(tmp_path)
    killed_at(monkeypatch, 9, lambda: fit("eager", checkpoint=one, max_seconds=1000.0))
    with CheckpointStore(one) as store:
        store.write({**store.latest(), "seconds": 2000.0})
    with pytest.warns(UserWarning, match="its time was up"):
        posterior = fit("eager", checkpoint=one, max_seconds=1000.0)
    assert posterior.resample(50)["a"].isfinite().all()


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_there_are_the_newest_checkpoints_a_lock_and_no_other_file(monkeypatch, tmp_path, keep):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    step_by_step(monkeypatch)
    fit("eager", checkpoint=checkpoint("fit", 5, keep=keep))
    files = sorted(path.name for path in (tmp_path / "here" / "fit").iterdir())
    assert files[0] == ".lock"
    assert len(files) == 1 + keep
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["fit"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def terminated(folder):
    """A fit whose process gets SIGTERM after ten steps."""
    with pytest.MonkeyPatch.context() as patch:
        never_satisfied(patch)
        patch.setattr(stages, "NUM_SAMPLES", 300)
        signalled(patch, signal.SIGTERM, 10, lambda: fit("auto", checkpoint=checkpoint(
            folder, 10**6)))


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="needs SIGTERM")
def test_sigterm_ends_the_process_and_the_next_goes_on(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=terminated, args=(tmp_path / "fit",))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    with CheckpointStore(Checkpoint(tmp_path / "fit")) as store:
        assert len(store.latest()["loop"]["stepper"]["elbo"]) == 10
    plain, again = fit("auto"), fit("auto", checkpoint=checkpoint(tmp_path / "fit"))
    assert differences(outcome(plain), outcome(again)) == []


def test_a_fit_leaves_other_random_states_alone(tmp_path):
    """Those of NumPy and Python, which are no part of a checkpoint."""
    states = random.getstate(), np.random.get_state()[1].copy()
    fit("eager", checkpoint=checkpoint(tmp_path))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert os.listdir(tmp_path)


def test_nfvi_itself_says_what_a_checkpoint_is():
    with pytest.raises(ValueError, match="NFVI expected `checkpoint` to be the path of a folder"):
        NFVI(bent, guide_of(bent), checkpoint=3)
