"""From C text to a loaded library: the compiler, and a cache that trusts only itself."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from pyro_nfvi.engine.c.ir import Unsupported

log = logging.getLogger("pyro_nfvi")
CACHE_VARIABLE = "PYRO_NFVI_CACHE"
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds
COMMON = ["-std=gnu11", "-shared", "-fPIC", "-w", "-fno-math-errno", "-fno-trapping-math"]
# The first set that a compiler accepts is used.
FLAG_SETS = (
    ["-O1", "-ftree-vectorize", "-fexpensive-optimizations", "-fvect-cost-model=dynamic",
     "-march=native", "-fopenmp-simd",
     "-mprefer-vector-width=512"],
    ["-O1", "-ftree-vectorize", "-march=native", "-fopenmp-simd"],
    ["-O2", "-mcpu=native", "-fopenmp-simd"],
    ["-O2"],
)


def load(text: str) -> ctypes.CDLL:
    """Compile C text and load it, or load what an earlier run compiled from the same text.

    Raises:
        Unsupported: If there is no compiler, or it fails.
    """
    compiler = _compiler()
    folder = cache_folder()
    key = hashlib.sha256("\0".join([text, _machine(), *compiler]).encode()).hexdigest()[:32]
    if folder is not None and (library := _cached(folder, key)) is not None:
        return library
    with tempfile.TemporaryDirectory(prefix="pyro_nfvi-") as scratch:
        built = _compile(text, compiler, Path(scratch))
        if folder is not None and (library := _kept(built, folder, key)) is not None:
            return library
        return ctypes.CDLL(str(built))


@cache
def _compiler() -> tuple[str, ...]:
    """Path, version and working flags of the system's compiler."""
    for name in [os.environ.get("CC", ""), *COMPILERS]:
        path = shutil.which(name) if name else None
        if path is None:
            continue
        for flags in FLAG_SETS:
            if _works(path, flags):
                version = subprocess.run([path, "--version"], capture_output=True, text=True,
                                         timeout=TIMEOUT, check=False).stdout.split("\n")[0]
                return (path, version, *flags)
    raise Unsupported("no working C compiler (cc, gcc or clang) was found; install one, or set CC")


def _works(path: str, flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory(prefix="pyro_nfvi-") as scratch:
        try:
            built = _compile("int probe(void) { return 1; }", (path, "", *flags), Path(scratch))
            return bool(ctypes.CDLL(str(built)).probe() == 1)
        except (OSError, Unsupported):
            return False


def _compile(text: str, compiler: tuple[str, ...], folder: Path) -> Path:
    path, _, *flags = compiler
    (folder / "step.c").write_text(text)
    built = folder / "step.so"
    command = [path, *flags, *COMMON, str(folder / "step.c"), "-o", str(built), "-lm"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT,
                                check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"the C compiler did not run: {error}") from error
    if result.returncode:
        raise Unsupported("the C compiler failed: " + _first_error(result.stderr))
    return built


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return lines[0].strip() if lines else "no message"


def cache_folder() -> Path | None:
    """The folder of compiled code, ours alone; None if there is none we can trust."""
    chosen, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(chosen) if chosen else Path(base or Path.home() / ".cache") / "pyro_nfvi"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _mistrust(folder)
    except (OSError, RuntimeError) as error:  # there may be no home
        reason = str(error)
    if reason:
        log.info("compiled code is not kept: %s", reason)
        return None
    return folder


def _mistrust(path: Path) -> str:
    """Why a file or folder may not be ours alone, or an empty string."""
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode) and path.is_dir():
        state = path.stat()
    elif stat.S_ISLNK(state.st_mode):
        return f"{path} is a link"
    if hasattr(os, "getuid") and state.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if os.name == "posix" and state.st_mode & 0o022:
        return f"others may write to {path}"
    return ""


def _cached(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library kept under this key, if its contents are those that were written."""
    path, record = folder / f"{key}.so", folder / f"{key}.sha256"
    try:
        if not path.exists():
            return None
        reason = _mistrust(path) or _mistrust(record)
        if not reason and record.read_text() != _digest(path):
            reason = f"{path} is not what was written"
        if not reason:
            return ctypes.CDLL(str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error)
    log.info("cached code is not used: %s", reason)
    return None


def _kept(built: Path, folder: Path, key: str) -> ctypes.CDLL | None:
    """Move a library to the cache, whole or not at all, and load it from there."""
    path, record = folder / f"{key}.so", folder / f"{key}.sha256"
    try:
        _put(record, _digest(built).encode())
        _put(path, built.read_bytes())
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.info("compiled code is not kept: %s", error)
        return None


def _put(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # readable by us alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o700)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _machine() -> str:
    """What compiled code depends on beside its text: processor and system."""
    features = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        features = "".join(sorted({line for line in lines
                                   if line.startswith(("model name", "flags", "Features"))}))
    return "\0".join([platform.machine(), platform.platform(), sys.platform, features])
