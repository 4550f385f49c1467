"""Files that are whole, or said not to be."""

import errno
import io
import os
import random
import subprocess
import sys
import zipfile
from enum import Enum

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_nfvi import AutoFlow, Posterior, _files, iaf, planar
from pyro_nfvi._files import (
    END_SIZE,
    SEAL_SIZE,
    DamagedFile,
    read_file,
    read_parts,
    remove_leftovers,
    write_file,
    write_text,
)
from pyro_nfvi.guides.flow_state import flow_state, load_flow_state
from pyro_nfvi.inference import History, LogJoint
from tests import fits

CONTENT = {"format": "ours", "version": 2, "values": torch.arange(300.0), "names": ["a", "b"]}


def read(path, sealed=False):
    """As a class ``Fit`` would read what its ``save`` wrote."""
    if sealed:
        return read_parts(path, "Fit", "a file of fits", "ours", 2, {"values"}, sealed=True)
    return read_file(path, "Fit", "ours", 2, {"values"})


@pytest.fixture
def path(tmp_path):
    write_file(tmp_path / "fit.pt", CONTENT)
    return tmp_path / "fit.pt"


# ------------------------------------------------------------------ whole files

def test_what_is_written_is_read(path):
    for sealed in (False, True):
        content = read(path, sealed)
        assert content.keys() == CONTENT.keys()
        assert torch.equal(content["values"], CONTENT["values"])
        assert content["names"] == ["a", "b"]
    assert os.listdir(path.parent) == ["fit.pt"]


def test_a_sealed_file_is_an_archive_that_torch_and_others_read(path):
    assert torch.load(path, weights_only=True)["names"] == ["a", "b"]
    assert torch.load(path, weights_only=True, mmap=True)["values"][7] == 7
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"pyro_nfvi sha256 ")


def test_a_file_of_an_earlier_version_has_no_seal_and_is_read(tmp_path):
    path = tmp_path / "fit.pt"
    torch.save(CONTENT, path)
    assert torch.equal(read(path)["values"], CONTENT["values"])
    with pytest.raises(DamagedFile, match=r"Fit expected a file of fits, got '.*fit.pt', which is "
                                          r"foreign \(no seal\)\."):
        read(path, sealed=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool,
                                   torch.complex64, torch.uint8])
def test_tensors_of_any_type_and_layout_come_back(dtype, tmp_path):
    value = torch.arange(24).reshape(4, 6).to(dtype)
    for number, tensor in enumerate([value, value.T, value[1:3, ::2], value[0, 0], value[:0]]):
        write_file(tmp_path / f"{number}.pt", {"format": "ours", "values": tensor})
        again = read(tmp_path / f"{number}.pt")["values"]
        assert again.dtype == dtype
        assert torch.equal(again, tensor)


# ------------------------------------------------------------------ parts of tensors

BIG = torch.arange(100_000.0)  # 400 kB
PARTS = {
    "rows": BIG[:10],
    "column": BIG.reshape(-1, 100)[:50, 3],
    "transposed": BIG.reshape(-1, 100)[:3].T,
    "steps": BIG[::1000],
    "number": BIG[7],
    "nothing": BIG[:0],
    "expanded": BIG[:2, None].expand(2, 200_000),
    "bits": BIG.view(torch.int32)[:9],
    "imaginary": BIG.to(torch.complex64)[:9].conj().imag,
    "with-gradient": BIG.clone().requires_grad_()[:2],
    "parameter": nn.Parameter(BIG[5:8]),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_of_a_tensor_is_written_without_the_rest(part, tmp_path):
    path = tmp_path / "fit.pt"
    write_file(path, {**CONTENT, "values": {"args": [{"list": (part, torch.Size([2]))}]}})
    assert path.stat().st_size < 7000
    again, size = read(path)["values"]["args"][0]["list"]
    assert torch.equal(again, part)
    assert (again.dtype, again.requires_grad) == (part.dtype, part.requires_grad)
    assert type(size) is torch.Size
    assert part.untyped_storage().nbytes() >= BIG.nbytes  # what is written is a copy


def test_a_tensor_that_is_there_four_times_is_written_once(tmp_path):
    path = tmp_path / "fit.pt"
    write_file(path, {**CONTENT, "values": [BIG, BIG, BIG.reshape(-1, 10), BIG.reshape(-1, 10).T]})
    assert path.stat().st_size < 1.02 * BIG.nbytes


def test_a_tensor_that_has_no_memory_of_its_own_is_written_as_it_is(path):
    write_file(path, {**CONTENT, "values": torch.eye(3).to_sparse()})
    assert torch.equal(read(path)["values"].to_dense(), torch.eye(3))


# ------------------------------------------------------------------ fits

def normal(y, *others):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def with_another_latent(y):
    pyro.sample("nu", dist.Normal(0.0, 1.0))
    normal(y)


def guide_of(width=8, num_layers=1, model=normal):
    guide = AutoFlow(model, lambda size: iaf(size, num_layers=num_layers, hidden_dims=(width,)))
    guide.setup(BIG[:5])
    return guide


def fit_to(*args):
    """A fit that is not fitted yet."""
    guide = AutoFlow(normal, planar)
    guide.setup(*args)
    return Posterior(guide, LogJoint(normal, args, {}, guide.layout, torch.float32), History())


def test_the_file_of_a_fit_to_some_rows_holds_no_others(tmp_path):
    path = tmp_path / "fit.pt"
    fit_to(BIG[:5], BIG.numpy()[5:9]).save(path)
    assert path.stat().st_size < 20_000
    y, others = Posterior.load(path, normal).log_joint.args
    assert torch.equal(y, BIG[:5])
    assert others.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["eager", "array-loader", "data-loader"])
def test_loading_leaves_the_random_state_alone(kind, tmp_path):
    path, loader = tmp_path / "fit.pt", fits.KINDS[kind]()[2].get("loader")
    model = fits.bent if loader is None else fits.of_rows
    fits.fit(kind, num_steps=2).save(path)
    before = torch.get_rng_state()
    Posterior.load(path, model, loader=loader)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="does not fit"):
        Posterior.load(path, model, AutoFlow(model, iaf), loader=loader)
    assert torch.equal(torch.get_rng_state(), before)


OTHER_GUIDES = {
    "narrower": ({"width": 8}, {"width": 4}, r"was of shape \[8, 1\], now it is of shape \[4, 1\]"),
    "shorter": ({"num_layers": 2}, {}, r"was of shape \[8, 1\], now it is not there"),
    "longer": ({}, {"num_layers": 2}, r"was not there, now it is of shape \[8, 1\]"),
    "other-model": ({}, {"model": with_another_latent},
                    r"was of shape \[8, 1\], now it is of shape \[8, 2\]"),
}


@pytest.mark.parametrize("name", OTHER_GUIDES)
def test_the_state_of_another_guide_is_refused_in_a_sentence(name):
    saved, own, words = OTHER_GUIDES[name]
    with pytest.raises(ValueError, match="^AutoFlow is not the guide that was fitted: "
                                         rf"'flow\.[^ ]+' {words}\. Build it as that one\.$"):
        load_flow_state(guide_of(**own), flow_state(guide_of(**saved)))


@pytest.mark.parametrize(("model", "make", "misfit", "way_out"), [
    (normal, lambda: AutoFlow(normal, iaf), "guide",
     "Leave `guide` out, or build it as the one that was fitted."),
    (with_another_latent, lambda: None, "model", "Pass the model that was fitted."),
], ids=["guide", "model"])
def test_a_file_that_does_not_fit_is_refused_with_its_first_difference_alone(
        model, make, misfit, way_out, tmp_path):
    path = tmp_path / "fit.pt"
    fit_to(BIG[:5]).save(path)
    with pytest.raises(ValueError, match=f"^Posterior.load: the {misfit} does not fit '.*fit.pt': "
                                         f"'flow[^ ]+' was [^.]+, now it is [^.]+. {way_out}$"):
        Posterior.load(path, model, make())


REFUSED = {
    "integer-keys": ({"a": 1, 3: 4}, "dict with a key of int. Give it keys that are strings."),
    "tensor-keys": ([{BIG: 1}], "dict with a key of Tensor. Give it keys that are strings."),
    "complex": (np.ones(3, complex), "ndarray of complex128. Pass it in float64, as a tensor or as "
                                     "a list."),
    "text": (np.array(["a"]), "ndarray of <U1. Pass it in float64, as a tensor or as a list."),
    "set": ({1, 2}, "set. Pass the model its parts."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_no_file_holds_is_refused_with_the_way_out(name, tmp_path):
    argument, words = REFUSED[name]
    with pytest.raises(ValueError, match="^Posterior.save expected model arguments of tensors, "
                       f"arrays, numbers, strings, lists and dicts, got {words}$"):
        fit_to(BIG[:5], argument).save(tmp_path / "fit.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="no longdouble on this machine")
@pytest.mark.parametrize("argument", [np.ones(3, np.longdouble), np.longdouble(1)],
                         ids=["array", "number"])
def test_a_longdouble_is_refused_with_the_way_out(argument, tmp_path):
    with pytest.raises(ValueError, match=f"got {type(argument).__name__} of float[0-9]*. Pass it "
                                         "in float64, as a tensor or as a list.$"):
        fit_to(BIG[:5], argument).save(tmp_path / "fit.pt")
    assert os.listdir(tmp_path) == []


class Colour(str, Enum):
    RED = "red"


@pytest.mark.parametrize("dtype", [">f8", ">i2", "<f4", "<u2"])
def test_arrays_of_any_byte_order_and_steps_come_back(dtype, tmp_path):
    values = np.arange(24).reshape(4, 6).astype(dtype)
    arrays = [values, values.T, values[::-1, ::2], values[0, :1], values[:0]]
    fit_to(BIG[:5], arrays).save(tmp_path / "fit.pt")
    again = Posterior.load(tmp_path / "fit.pt", normal).log_joint.args[1]
    for found, array in zip(again, arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")


def test_keys_that_are_strings_of_another_class_come_back_as_strings(tmp_path):
    fit_to(BIG[:5], {np.str_("a"): 1, Colour.RED: 2}).save(tmp_path / "fit.pt")
    again = Posterior.load(tmp_path / "fit.pt", normal).log_joint.args[1]
    assert again == {"a": 1, "red": 2}
    assert {type(key) for key in again} == {str}


# ------------------------------------------------------------------ damage

def test_a_file_cut_short_anywhere_is_found(path):
    whole = path.read_bytes()
    size = len(whole)
    lengths = {0, 1, 3, 4, 5, END_SIZE, size // 2, *range(size - SEAL_SIZE - 30, size),
               *random.Random(0).sample(range(size), 50)}
    for length in lengths:
        path.write_bytes(whole[:length])
        for sealed in (False, True):
            with pytest.raises(DamagedFile, match="which is damaged or foreign"):
                read(path, sealed)


def test_one_byte_that_changed_anywhere_is_found(path):
    whole, generator = path.read_bytes(), random.Random(0)
    end = len(whole) - SEAL_SIZE - END_SIZE
    places = [*range(8), *range(end, len(whole)), *generator.sample(range(end), 300)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        for sealed in (False, True):
            with pytest.raises(DamagedFile, match="which is damaged"):
                read(path, sealed)


@pytest.mark.parametrize("change", [lambda b: b + b"\0", lambda b: b"\0" + b, lambda b: b + b,
                                    lambda b: b[:200] + b[300:], lambda b: bytes(len(b)),
                                    lambda b: b[:len(b) // 2] + bytes(len(b) - len(b) // 2)],
                         ids=["longer", "moved", "twice", "hole", "zeros", "half-zeros"])
def test_bytes_that_came_or_went_are_found(path, change):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFile, match="which is damaged"):
        read(path)


WRONG = {
    "missing": (lambda path: path.unlink(), "^Fit.load found no file '.*fit.pt'.$"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(IsADirectoryError\)"),
    "empty": (lambda path: path.write_bytes(b""), r"which is damaged or foreign \(empty\)\."),
    "text": (lambda path: path.write_text("mean,sd"), r"foreign \(no archive of torch\)"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:900]),
            "foreign: after 900 bytes, its end is missing"),
    "changed": (lambda path: path.write_bytes(path.read_bytes().replace(b"names", b"manes")),
                "which is damaged: its SHA-256 is not that of its seal"),
    "other-archive": (lambda path: zipfile.ZipFile(path, "w").close(), "no archive of torch"),
    "other-zip": (lambda path: _zip(path), r"which is damaged or foreign \(RuntimeError\)"),
    "other-content": (lambda path: write_file(path, {"format": "theirs", "version": 9}),
                      "which holds something else"),
    "odd-version": (lambda path: write_file(path, {**CONTENT, "version": "2"}),
                    "which holds something else"),
    "parts": (lambda path: write_file(path, {"format": "ours"}),
              r"which is damaged or foreign \(no values\)"),
    "newer": (lambda path: write_file(path, {**CONTENT, "version": 3}), "Fit.load reads files up "
              "to version 2, got version 3: update pyro_nfvi to read '.*fit.pt'."),
}


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(path, name):
    spoil, words = WRONG[name]
    spoil(path)
    with pytest.raises(ValueError, match=words) as caught:
        read(path)
    assert "fit.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DamagedFile) == (name not in ("missing", "newer"))


class Trap:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: write_file(path, content)],
                         ids=["plain", "sealed"])
def test_code_in_a_file_is_refused_and_not_run(write, tmp_path):
    trap, path = tmp_path / "executed", tmp_path / "fit.pt"
    write({**CONTENT, "values": Trap(trap)}, path)
    with pytest.raises(ValueError, match="Fit.load expected a file of Fit.save, got '.*fit.pt', "
                                         "which is "):
        read(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)  # it would have
    assert trap.exists()


def test_a_whole_file_that_torch_does_not_read_is_not_called_damaged(tmp_path):
    path = tmp_path / "fit.pt"
    write_file(path, {**CONTENT, "values": random.Random(0)})
    with pytest.raises(ValueError, match="which is whole, but holds what torch .* does not "
                                         "read .* Write it with this torch, or update") as error:
        read(path)
    assert not isinstance(error.value, DamagedFile)


# ------------------------------------------------------------------ writing that fails

class FullDisk(io.FileIO):
    """A file on a disk that has room for so many bytes."""

    room = 2000

    def write(self, data):
        if self.tell() + len(data) > self.room:
            super().write(data[:self.room - self.tell()])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 10, 1000, 2000, 2300])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(path, room, monkeypatch):
    before = path.read_bytes()
    assert len(before) > 2300
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(_files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, CONTENT)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["fit.pt"]


def test_a_limit_of_the_system_on_the_size_is_an_oserror_too(tmp_path):
    pytest.importorskip("resource")
    code = """
import os, resource, signal, torch
from pyro_nfvi._files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 4000, 500_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_file("fit.pt", {"a": torch.ones(100_000), "b": torch.ones(150_000)})
    except OSError as error:
        print(type(error).__name__, error.errno, os.listdir())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=tmp_path)
    assert done.stdout == 4 * f"OSError {errno.EFBIG} []\n", done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_bytes_that_do_not_reach_the_disk_are_an_error(path, number, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_file(path, CONTENT)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["fit.pt"]


def test_a_file_system_without_fsync_has_files_nevertheless(path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    monkeypatch.setattr(os, "fsync", fail)
    write_text(path, "hello")
    assert path.read_text() == "hello"


def test_the_file_reaches_the_disk_before_its_name_and_the_name_before_the_end(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(source, target):
        calls.append("name")
        replace(source, target)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_file(path, CONTENT)
    assert calls == ["file", "name", "folder"]


def test_only_leftovers_of_the_named_files_are_removed(tmp_path):
    code = "0123456789abcdef" * 2
    for name in ("fit.pt", ".fit.pt", f".fit.pt.{code}", f".fit-1.pt.{code}", f".other.pt.{code}",
                 ".fit.pt.swp", f".fit.pt.{code}0"):
        (tmp_path / name).touch()
    (tmp_path / f".fit-2.pt.{code}").mkdir()  # cannot be removed as a file: left
    remove_leftovers(tmp_path, "fit*.pt")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fit.pt", ".fit.pt", f".other.pt.{code}", ".fit.pt.swp", f".fit.pt.{code}0",
        f".fit-2.pt.{code}"}


def test_writing_takes_no_second_copy_of_the_tensors(tmp_path):
    pytest.importorskip("resource")
    code = """
import resource, torch
from pyro_nfvi._files import write_file
write_file("warm.pt", {"a": torch.ones(3)})
content = {"a": torch.ones(20_000_000), "b": torch.ones(10_000_000)}  # 120 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_file("fit.pt", content)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=tmp_path)
    assert int(done.stdout) < 20e6  # bytes
