"""Checkpoints: written whole, found again, and never in the way of a fit."""

import errno
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_nfvi import _files
from pyro_nfvi._files import write_file
from pyro_nfvi.inference import Checkpoint
from pyro_nfvi.inference import checkpoint as module
from pyro_nfvi.inference.checkpoint import FORMAT, VERSION, CheckpointStore

STATE = {"flow": OrderedDict(w=torch.randn(3, 4), b=torch.zeros(3, dtype=torch.float64)),
         "rng": (torch.get_rng_state(), 2 ** 130, -1.5, True, None), "name": "fit", 3: [[], {}],
         "dtype": torch.float64, "shape": torch.Size([2]), "z": 1j,
         "leaf": torch.nn.Parameter(torch.ones(2)), "elbo": [math.inf, -math.inf]}


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, keep=3)) as store:
        yield store


def names(folder):
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def number(count, ending=""):
    return f"checkpoint-{count:08d}.pt{ending}"


def same(one, other):
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return (type(one) is type(other) and len(one) == len(other)
                and all(map(same, one, other)))
    return type(one) is type(other) and one == other


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# ------------------------------------------------------------------ what the user passes

def test_a_checkpoint_has_defaults_and_is_a_value():
    assert Checkpoint("fit") == Checkpoint("fit", 60.0, None, 3)
    assert Checkpoint("fit", math.inf, 5, 1).every_seconds == math.inf
    with pytest.raises(FrozenInstanceError):
        Checkpoint("fit").keep = 2


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"folder": None}, "Checkpoint expected `folder` to be the path of a folder, got None."),
    ({"folder": ""}, "expected `folder` to be the path of a folder, got ''"),
    ({"folder": b"fit"}, "expected `folder` to be the path of a folder, got b'fit'"),
    ({"every_seconds": 0.0}, "Checkpoint expected `every_seconds` to be a positive number, got 0"),
    ({"every_seconds": -math.inf}, "`every_seconds` to be a positive number"),
    ({"every_seconds": math.nan}, "`every_seconds` to be a positive number"),
    ({"every_seconds": "1"}, "`every_seconds` to be a positive number"),
    ({"every_steps": 0}, "Checkpoint expected `every_steps` to be an integer >= 1, got 0"),
    ({"every_steps": 2.0}, "`every_steps` to be an integer >= 1"),
    ({"keep": 0}, "Checkpoint expected `keep` to be an integer >= 1, got 0."),
    ({"keep": True}, "`keep` to be an integer >= 1"),
    ({"keep": None}, "`keep` to be an integer >= 1"),
])
def test_a_wrong_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpoint(**{"folder": "fit", **kwargs})


def test_none_a_folder_or_a_checkpoint_will_do():
    checkpoint = Checkpoint("fit", keep=1)
    assert Checkpoint.of("NFVI", None) is None
    assert Checkpoint.of("NFVI", checkpoint) is checkpoint
    assert Checkpoint.of("NFVI", "fit") == Checkpoint("fit")
    assert Checkpoint.of("NFVI", Path("fit")) == Checkpoint(Path("fit"))


@pytest.mark.parametrize("value", [3, True, b"fit", "", ["fit"], Checkpoint])
def test_what_is_no_checkpoint_is_refused_in_the_name_of_its_owner(value):
    with pytest.raises(ValueError, match="^NFVI expected `checkpoint` to be the path of a folder "
                                         "or a Checkpoint, got "):
        Checkpoint.of("NFVI", value)


# ------------------------------------------------------------------ there and back

def test_a_state_comes_back_as_it_was(store):
    assert store.latest() is None
    assert store.write(STATE) is True
    assert same(store.latest(), STATE)
    assert names(store.folder) == [number(1)]


def test_a_file_is_what_torch_reads(store):
    store.write({"step": 3})
    content = torch.load(store.folder / number(1), weights_only=True)
    assert content == {"format": FORMAT, "version": VERSION, "state": {"step": 3}}


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_few_are_kept(keep, tmp_path):
    with CheckpointStore(Checkpoint(tmp_path / "a" / "b", keep=keep)) as store:
        for step in range(1, 5):
            store.write({"step": step})
            assert store.latest() == {"step": step}
            assert names(store.folder) == [number(i) for i in
                                           range(max(1, step + 1 - keep), step + 1)]


def test_numbers_go_on_in_the_next_process_beyond_eight_digits(tmp_path):
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        store.write({"step": 1})
    os.rename(tmp_path / number(1), tmp_path / number(99_999_999))
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        store.write({"step": 2})
        assert names(tmp_path) == [number(100_000_000), number(99_999_999)]
        assert store.latest() == {"step": 2}


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    others = ["notes.txt", "checkpoint-1.pt", "checkpoint-00000009.pt.bak", "checkpoint.pt",
              ".checkpoint-00000001.pt.swp", "my-checkpoint-00000009.pt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    with CheckpointStore(Checkpoint(tmp_path, keep=1)) as store:
        assert store.latest() is None
        store.write({"step": 1})
        store.write({"step": 2})
    assert names(tmp_path) == sorted([*others, number(2)])


@pytest.mark.parametrize("value", [np.float64(1.0), np.ones(2), object(), {1, 2}, b"x", print,
                                   signal.SIGINT, torch.nn.Linear(1, 1), Path("x")],
                         ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("place", [lambda v: ({"a": v}, "state['a']"),
                                   lambda v: ({"a": [0, (v,)]}, "state['a'][1][0]")],
                         ids=["shallow", "deep"])
def test_what_a_file_cannot_hold_is_refused_with_its_place(store, value, place):
    state, where = place(value)
    with pytest.raises(TypeError, match=re.escape(f"got {type(value).__name__} at {where}.")):
        store.write(state)
    assert names(store.folder) == []


def test_a_key_that_a_file_cannot_hold_is_refused(store):
    with pytest.raises(TypeError, match="got frozenset at a key of state"):
        store.write({frozenset(): 1})


# ------------------------------------------------------------------ when

class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_time_alone_decides_by_default(clock, tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, every_seconds=60.0)) as store:
        assert not store.due(0)
        clock.now += 59.9
        assert not store.due(10 ** 6)
        clock.now += 0.1
        assert store.due(10 ** 6 + 1)
        assert store.due(10 ** 6 + 1)  # until it is written
        store.write({})
        assert not store.due(10 ** 6 + 2)
        clock.now += 60
        assert store.due(10 ** 6 + 3)


def test_steps_count_from_the_last_write(clock, tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, math.inf, every_steps=10)) as store:
        found = []
        for step in range(0, 60, 4):
            clock.now += 1e9
            if store.due(step):
                found.append(step)
                store.write({})
    assert found == [12, 24, 36, 48]


def test_steps_count_anew_where_a_stage_begins_or_a_fit_goes_on(tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, math.inf, every_steps=10)) as store:
        assert not store.due(500)  # goes on from there
        assert store.due(510)
        store.write({})
        assert not store.due(3)  # the next stage
        assert not store.due(12)
        assert store.due(13)


def test_never_is_never(clock, tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, math.inf)) as store:
        clock.now += 1e12
        assert not store.due(10 ** 12)


# ------------------------------------------------------------------ damage

@pytest.mark.parametrize("spoil", [cut, changed, lambda path: path.write_bytes(b""),
                                   lambda path: path.write_text("hello"),
                                   lambda path: torch.save({"step": 9}, path),
                                   lambda path: write_file(path, {"step": 9}),
                                   lambda path: (path.unlink(), path.mkdir())],
                         ids=["cut", "changed", "empty", "text", "no-seal", "other", "folder"])
def test_the_one_before_a_damaged_one_is_taken_with_a_warning(store, spoil):
    for step in (1, 2, 3):
        store.write({"step": step})
    spoil(store.folder / number(3))
    with pytest.warns(UserWarning, match=rf"NFVI expected a checkpoint, got '.*{number(3)}', which "
                                         r".*\. Looking for the one before\.$") as caught:
        assert store.latest() == {"step": 2}
    assert len(caught) == 1
    store.write({"step": 4})
    assert names(store.folder) == [number(1), number(2), number(3, ".damaged"), number(4)]
    assert store.latest() == {"step": 4}  # and no warning


def test_as_many_damaged_ones_as_there_are_are_passed_by(store):
    for step in (1, 2, 3):
        store.write({"step": step})
    cut(store.folder / number(3))
    changed(store.folder / number(2))
    with pytest.warns(UserWarning, match="Looking for the one before") as caught:
        assert store.latest() == {"step": 1}
    assert [re.search(r"-0*(\d)\.pt", str(w.message)).group(1) for w in caught] == ["3", "2"]


def test_a_damaged_one_is_no_reason_to_remove_a_good_one(tmp_path):
    with CheckpointStore(Checkpoint(tmp_path, keep=2)) as store:
        store.write({"step": 1})
        store.write({"step": 2})
    cut(tmp_path / number(2))
    with CheckpointStore(Checkpoint(tmp_path, keep=2)) as store:
        with pytest.warns(UserWarning, match="its end is missing"):
            assert store.latest() == {"step": 1}
        store.write({"step": 3})
    assert names(tmp_path) == [number(1), number(2, ".damaged"), number(3)]


def test_a_failed_write_leaves_the_damaged_one_where_it_is(store, monkeypatch):
    store.write({"step": 1})
    store.write({"step": 2})
    cut(store.folder / number(2))
    with pytest.warns(UserWarning, match="Looking for the one before"):
        store.latest()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file", no_space)
        with pytest.warns(UserWarning, match="could not write"):
            assert not store.write({"step": 3})
    assert names(store.folder) == [number(1), number(2)]
    assert store.write({"step": 3})
    assert names(store.folder) == [number(1), number(2, ".damaged"), number(3)]


def test_if_none_can_be_read_the_way_out_is_said(store):
    for step in (1, 2):
        store.write({"step": step})
        cut(store.folder / number(step))
    with pytest.warns(UserWarning, match="Looking for"), pytest.raises(ValueError, match=(
            "^NFVI can read none of the 2 checkpoints in '.*'. Remove them to start anew, or "
            "choose another folder.$")):
        store.latest()


def test_a_newer_version_is_not_passed_by(store):
    store.write({"step": 1})
    write_file(store.folder / number(2), {"format": FORMAT, "version": VERSION + 1, "new": {}})
    with pytest.raises(ValueError, match=f"NFVI reads files up to version {VERSION}, got version "
                                         f"{VERSION + 1}: update pyro_nfvi to read '.*00002.pt'."):
        store.latest()
    assert names(store.folder) == [number(1), number(2)]


@pytest.mark.parametrize("write", [torch.save, lambda content, path: write_file(path, content),
                                   lambda content, path: path.write_bytes(pickle.dumps(content))],
                         ids=["torch", "sealed", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(store, write):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(store.folder / "executed"),)
    write({"format": FORMAT, "version": VERSION, "state": {"step": Trap()}},
          store.folder / number(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="^NFVI (can read none of|expected a checkpoint)"):
            store.latest()
    assert names(store.folder) == [number(1)]


# ------------------------------------------------------------------ disks and folders

def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_the_fit_goes_on_with_one_warning(store, monkeypatch, clock):
    store.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(_files.torch, "save", lambda content, file: no_space(file.write(b"half")))
        clock.now += 61
        assert store.due(1)
        with pytest.warns(UserWarning, match="^NFVI could not write a checkpoint to '.*' .*No space"
                                             ".*The fit goes on, and tries again.$") as caught:
            assert store.write({"step": 2}) is False
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert not store.due(2)  # only at the next interval
        clock.now += 61
        assert store.due(3)
        assert store.write({"step": 3}) is False  # a warning would be an error
    assert names(store.folder) == [number(1)]
    assert store.latest() == {"step": 1}
    assert store.write({"step": 4}) is True
    assert store.latest() == {"step": 4}


def test_a_system_that_allows_no_larger_file_is_as_a_full_disk(tmp_path):
    pytest.importorskip("resource")
    code = """
import os, resource, signal, warnings, torch
from pyro_nfvi.inference.checkpoint import Checkpoint, CheckpointStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with CheckpointStore(Checkpoint("fit")) as store, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(store.write({"step": 1}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    print([store.write({"step": step, "w": torch.ones(100_000)}) for step in (2, 3)])
    print(len(caught), "File too large" in str(caught[0].message), store.latest())
    print(sorted(os.listdir("fit")), store.write({"step": 4}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "True", "[False, False]", "1 True {'step': 1}", f"['.lock', '{number(1)}'] True"]


def test_a_folder_that_went_away_is_made_again(store):
    store.write({"step": 1})
    for name in os.listdir(store.folder):
        os.remove(store.folder / name)
    os.rmdir(store.folder)
    assert store.write({"step": 2})
    assert store.latest() == {"step": 2}


def test_what_cannot_be_the_folder_is_said_before_the_fit(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="^NFVI expected the checkpoints' folder, got the file "
                                         "'.*file'. Choose another path.$"):
        CheckpointStore(Checkpoint(tmp_path / "file"))
    with pytest.raises(ValueError, match="^VAE cannot write to '.*below', the folder of its checkpo"
                                         r"ints \(Not a directory\). Choose another one.$"):
        CheckpointStore(Checkpoint(tmp_path / "file" / "below"), "VAE")
    assert names(tmp_path) == ["file"]


def test_a_folder_that_must_not_be_written_to_is_said_before_the_fit(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(ValueError, match=r"NFVI cannot write to '.*', .* \(Permission denied\)"):
        CheckpointStore(Checkpoint(tmp_path))


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore(Checkpoint("fit")) as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.write({"step": 1})
    assert names(tmp_path / "fit") == [number(1)]


# ------------------------------------------------------------------ processes

def test_a_folder_is_for_one_fit_at_a_time(tmp_path):
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        with pytest.raises(ValueError, match="^NFVI found the checkpoints in '.*' in use by another"
                                             " fit of this process. Wait until it is done, or "
                                             "choose another folder.$"):
            CheckpointStore(Checkpoint(tmp_path / "." / ""))
        store.write({"step": 1})
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        assert store.latest() == {"step": 1}
        store.close()
        store.close()


def test_a_store_that_is_forgotten_or_was_refused_locks_nothing(tmp_path):
    store = CheckpointStore(Checkpoint(tmp_path))
    for _ in range(3):
        with pytest.raises(ValueError, match="in use"):
            CheckpointStore(Checkpoint(tmp_path))
    del store
    CheckpointStore(Checkpoint(tmp_path)).close()


def test_where_there_are_no_locks_there_are_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    with CheckpointStore(Checkpoint(tmp_path)) as store:
        assert store.write({"step": 1})


KILLS = """
import os, random, signal, sys, time, torch
from pyro_nfvi.inference.checkpoint import Checkpoint, CheckpointStore

def refused(user):
    try:
        CheckpointStore(Checkpoint("fit"))
    except ValueError as error:
        return f"in use by {user}" in str(error)
    return False

def child(pipe):
    with CheckpointStore(Checkpoint("fit", keep=2)) as store:
        step = (store.latest() or {"step": 0})["step"]
        assert refused("another fit of this process")  # which leaves the lock as it is
        os.write(pipe, b"locked")
        while True:
            step += 1
            assert store.write({"step": step, "w": torch.full((200_000,), step)})

generator, last, leftovers, steps = random.Random(0), 0, 0, []
for _ in range(int(sys.argv[1])):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        child(write)
    os.close(write)  # so that a child that fails is heard of
    try:
        assert os.read(read, 6) == b"locked"
        assert refused(f"process {pid} on ")
        time.sleep(generator.uniform(0.0, 0.05))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
    leftovers += sum(name.startswith(".checkpoint") for name in os.listdir("fit"))
    with CheckpointStore(Checkpoint("fit")) as store:
        state = store.latest() or {"step": 0, "w": torch.zeros(1)}
    assert (state["w"] == state["step"]).all() and state["step"] >= last, (state, last)
    steps.append(state["step"])
    last = state["step"]
    assert not any(name.startswith(".checkpoint") for name in os.listdir("fit"))
with CheckpointStore(Checkpoint("fit", keep=2)) as store:
    store.write({"step": last + 1})
assert len(os.listdir("fit")) == 3, os.listdir("fit")  # two, and the lock
print(last, leftovers, len(set(steps)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_process_killed_at_any_time_leaves_a_newest_checkpoint_and_no_lock(kills, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", KILLS, str(kills)],
                          capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    last, leftovers, different = map(int, done.stdout.split())
    assert last > kills / 2  # they did write
    assert leftovers > kills / 10  # and were killed in the middle
    assert different > kills / 4


def test_any_number_of_checkpoints_may_be_damaged_at_random(tmp_path):
    generator = random.Random(0)
    for round_ in range(12):
        folder = tmp_path / str(round_)
        with CheckpointStore(Checkpoint(folder, keep=5)) as store:
            for step in range(1, 6):
                store.write({"step": step})
            bad = {step for step in range(1, 6) if generator.random() < 0.4}
            for step in bad:
                generator.choice([cut, changed])(folder / number(step))
            good = {1, 2, 3, 4, 5} - bad
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if good:
                    assert store.latest() == {"step": max(good)}
                else:
                    with pytest.raises(ValueError, match="can read none of the 5"):
                        store.latest()
            store.write({"step": 6})
            assert store.latest() == {"step": 6}


def test_a_write_that_ctrl_c_ends_leaves_nothing_half_done(store, monkeypatch):
    store.write({"step": 1})

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(_files.torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write({"step": 2})
    assert names(store.folder) == [number(1)]
    assert store.latest() == {"step": 1}


def test_time_between_checkpoints_is_not_that_of_writing_them(tmp_path, monkeypatch):
    """A slow disk does not leave the fit with nothing but writing."""
    with CheckpointStore(Checkpoint(tmp_path, every_seconds=0.05)) as store:
        monkeypatch.setattr(module, "write_file", lambda *args: time.sleep(0.1))
        store.write({})
        assert not store.due(1)
