"""From C text to a library: what the cache keeps, and what it does not trust."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_nfvi.engine.c import build
from pyro_nfvi.engine.c.build import cache_folder, load
from pyro_nfvi.engine.c.ir import Unsupported

pytestmark = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)),
                                reason="there is no C compiler")
posix = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
TEXT = "int answer(void) {{ return {}; }}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own for each test."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    compiler = build._compiler
    compiler()
    yield tmp_path / "cache"
    compiler.cache_clear()


@pytest.fixture
def lines(caplog):
    """What was logged, line by line."""
    caplog.set_level("INFO", "pyro_nfvi")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "pyro_nfvi"]


def answer(number=42):
    return load(TEXT.format(number)).answer()


def refuse(*_):
    raise AssertionError("the compiler was called")


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder, suffix):
    return sorted(path.name for path in folder.glob(f"*{suffix}"))


# ------------------------------------------------------------------ what is kept

def test_the_same_text_is_compiled_once(folder, lines, monkeypatch):
    assert answer() == 42
    monkeypatch.setattr(build, "_compile", refuse)
    assert answer() == 42
    assert lines() == []
    assert len(names(folder, ".so")) == len(names(folder, ".sha256")) == 1
    assert len(list(folder.iterdir())) == 2  # nothing half-written


def test_another_text_has_another_key(folder):
    assert (answer(1), answer(2)) == (1, 2)
    assert len(names(folder, ".so")) == 2


def test_other_flags_another_compiler_or_another_machine_have_another_key(folder, monkeypatch):
    answer()
    path, version, *flags = build._compiler()
    for count, compiler in enumerate([(path, version, *flags, "-O0"), (path, "99.0", *flags)], 2):
        monkeypatch.setattr(build, "_compiler", lambda compiler=compiler: compiler)
        assert answer() == 42
        assert len(names(folder, ".so")) == count
    monkeypatch.setattr(build, "_machine", lambda: "another processor")
    assert answer() == 42
    assert len(names(folder, ".so")) == 4


@posix
def test_the_cache_is_for_its_owner_alone(folder):
    before = os.umask(0)
    try:
        answer()
    finally:
        os.umask(before)
    for path in [folder, *folder.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_the_variables_choose_the_folder(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(build.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pyro_nfvi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "pyro_nfvi"
    assert cache_folder().is_dir()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_processes_that_compile_the_same_text_at_once_all_succeed(folder, monkeypatch):
    context = multiprocessing.get_context("fork")
    barrier, compile_ = context.Barrier(3, timeout=60), build._compile

    def together(*args):
        barrier.wait()  # nobody has found it in the cache
        built = compile_(*args)
        barrier.wait()  # everybody keeps it now
        return built
    monkeypatch.setattr(build, "_compile", together)
    processes = [context.Process(target=lambda: sys.exit(answer() - 42)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    monkeypatch.setattr(build, "_compile", refuse)
    assert answer() == 42
    assert len(list(folder.iterdir())) == 2


# ------------------------------------------------------------------ folders of no use

def file_instead(folder, monkeypatch):
    folder.write_text("a file")


def file_above(folder, monkeypatch):
    folder.write_text("a file")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(folder / "below"))


def others_may_write(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o770)


def another_owner(folder, monkeypatch):
    folder.mkdir()
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)


def full_disk(folder, monkeypatch):
    monkeypatch.setattr(build, "_put", no_space)


def full_disk_while_writing(folder, monkeypatch):
    monkeypatch.setattr(os, "fdopen", no_space)


def read_only(folder, monkeypatch):
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):  # as root
        pytest.skip("permissions do not bind root")


def read_only_parent(folder, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", fail)


def no_home(folder, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv(build.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)


@posix
@pytest.mark.parametrize("spoil", [
    file_instead, file_above, others_may_write, another_owner, full_disk, full_disk_while_writing,
    read_only, read_only_parent, no_home], ids=lambda spoil: spoil.__name__)
def test_without_a_folder_to_trust_code_is_compiled_and_not_kept(spoil, folder, lines, monkeypatch):
    spoil(folder, monkeypatch)
    assert answer() == 42
    line, = lines()
    assert line.startswith("compiled code is not kept: ")
    assert not folder.is_dir() or names(folder, ".so") == names(folder, ".new-*") == []


def test_a_folder_of_mine_may_be_a_link(folder, tmp_path, lines):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert answer() == 42
    assert lines() == []
    assert names(tmp_path / "elsewhere", ".so")


# ------------------------------------------------------------------ files of no use

def changed(library, record):
    with open(library, "ab") as file:
        file.write(b"!")


def foreign(library, record):
    library.write_bytes(b"no library")
    record.write_text(build._digest(library))


def empty(library, record):
    library.write_bytes(b"")


def without_a_record(library, record):
    record.unlink()


def record_of_bytes(library, record):
    record.write_bytes(b"\xff\xfe")


def open_library(library, record):
    library.chmod(0o770)


def open_record(library, record):
    record.chmod(0o702)


def linked_library(library, record):
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


def linked_record(library, record):
    record.rename(record.with_name("elsewhere"))
    record.symlink_to("elsewhere")


def folder_instead(library, record):
    record.unlink()
    record.mkdir()


def plant(folder, tmp_path, monkeypatch):
    """Put another library, not loaded yet, in the place of the ordinary one."""
    paths = []

    def put(built, folder, key):
        paths.extend([folder / f"{key}.so", folder / f"{key}.sha256"])
    with monkeypatch.context() as patch:
        patch.setattr(build, "_kept", put)
        answer()
    other = build._compile(TEXT.format(1), build._compiler(), tmp_path)
    build._put(paths[0], other.read_bytes())
    build._put(paths[1], build._digest(other).encode())
    return paths


def test_what_is_kept_under_the_key_is_what_is_loaded(folder, tmp_path, monkeypatch):
    plant(folder, tmp_path, monkeypatch)
    assert answer() == 1


@posix
@pytest.mark.parametrize("spoil", [
    changed, foreign, empty, without_a_record, record_of_bytes, open_library, open_record,
    linked_library, linked_record], ids=lambda spoil: spoil.__name__)
def test_a_file_that_may_not_be_mine_is_replaced(spoil, folder, tmp_path, lines, monkeypatch):
    spoil(*plant(folder, tmp_path, monkeypatch))
    assert answer() == 42  # the planted one would give 1
    line, = lines()
    assert line.startswith("cached code is not used: ")
    monkeypatch.setattr(build, "_compile", refuse)
    assert answer() == 42


@posix
def test_a_file_that_cannot_be_replaced_is_left_alone(folder, tmp_path, lines):
    answer()
    library, = folder.glob("*.so")
    record = library.with_suffix(".sha256")
    folder_instead(library, record)
    assert answer() == 42
    assert [line.split(":")[0] for line in lines()] == [
        "cached code is not used", "compiled code is not kept"]


@posix
def test_a_file_of_another_user_is_not_used(folder, lines, monkeypatch):
    answer()
    library, = folder.glob("*.so")
    lstat = Path.lstat

    def theirs(path):
        state = list(lstat(path))
        state[stat.ST_UID] += path == library
        return os.stat_result(state)
    monkeypatch.setattr(Path, "lstat", theirs)
    assert answer() == 42
    assert lines() == [f"cached code is not used: {library} belongs to another user"]


# ------------------------------------------------------------------ compilers

def test_a_text_that_is_wrong_says_what_the_compiler_says():
    with pytest.raises(Unsupported, match="the C compiler failed: .*error.*nonsense"):
        load("int answer(void) { return nonsense; }")


def test_a_compiler_that_hangs_is_given_up(monkeypatch):
    def hang(*_, **__):
        raise subprocess.TimeoutExpired("cc", build.TIMEOUT)
    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(Unsupported, match="the C compiler did not run: .*timed out"):
        answer()


def test_no_compiler_is_said_in_a_sentence(monkeypatch, tmp_path):
    build._compiler.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Unsupported, match="no working C compiler .* install one, or set CC"):
        answer()


def test_a_compiler_that_does_not_work_is_passed_over(monkeypatch, tmp_path):
    build._compiler.cache_clear()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    assert answer() == 42
    assert build._compiler()[0] != str(broken)


def test_the_variable_cc_comes_first(monkeypatch, tmp_path):
    build._compiler.cache_clear()
    own = tmp_path / "own"
    own.symlink_to(shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"))
    monkeypatch.setenv("CC", str(own))
    assert answer() == 42
    assert build._compiler()[0] == str(own)


def test_flags_that_a_compiler_refuses_are_left_out(monkeypatch):
    build._compiler.cache_clear()
    monkeypatch.setattr(build, "FLAG_SETS", (["-no-such-flag=1"], ["-O1"]))
    assert build._compiler()[2:] == ("-O1",)
    assert answer() == 42


def test_a_library_is_what_ctypes_loads():
    assert isinstance(load(TEXT.format(3)), ctypes.CDLL)
