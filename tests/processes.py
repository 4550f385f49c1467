"""Functions and scripts run by several processes, as torchrun runs them, each with a time limit.

Processes that run a function are forked from one that has imported torch and Pyro already, which
costs its seconds once for all tests.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent
LOADED = ["torch", "torch.distributed", "pyro", "pyro.infer.autoguide", "pyro_nfvi", "pytest"]


def run_ranks(what: Callable[[], Any] | Path, num_ranks: int, timeout: float = 60.0,
              dying: Collection[int] = ()) -> list[Any]:
    """Run a function, or a script, in several processes that see the environment of torchrun.

    Args:
        what: A function without arguments that can be pickled, such as one of a test module or a
            ``functools.partial`` of it; or a script.
        num_ranks: Number of processes.
        timeout: Seconds after which they are killed, and the test fails.
        dying: Those that are to end by a signal, or not at all: when the others have ended they
            are killed.

    Returns:
        What the function returned, or the script printed, by rank; None of those that die.

    Raises:
        AssertionError: If a process fails or takes too long, with what all of them have printed.
    """
    start = _start_script if isinstance(what, Path) else _start_function
    with TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(num_ranks)]
        port = free_port()
        processes = [start(what, _environment(rank, num_ranks, port), place)
                     for rank, place in enumerate(places)]
        try:
            late = _wait(processes, dying, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait() if isinstance(process, subprocess.Popen) else process.join()
        failed = [rank for rank in range(num_ranks)
                  if rank not in dying and _code(processes[rank]) != 0]
        said = "\n".join(f"--- rank {rank}\n{place.with_suffix('.txt').read_text()}"
                         for rank, place in enumerate(places))
        assert not failed, f"ranks {failed} failed, of which {late} took too long\n{said}"
        return [None if rank in dying else _result(place) for rank, place in enumerate(places)]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def _start_function(function: Callable, environment: dict[str, str], place: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_run, args=(function, environment, place), daemon=True)
    process.start()
    return process


def _start_script(script: Path, environment: dict[str, str], place: Path) -> Any:
    with place.with_suffix(".txt").open("w") as errors, place.open("w") as output:
        return subprocess.Popen([sys.executable, "-W", "error", str(script)], cwd=ROOT,
                                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                                stdout=output, stderr=errors, start_new_session=True)


def _run(function: Callable, environment: dict[str, str], place: Path) -> None:
    with place.with_suffix(".txt").open("w") as errors:
        for stream in (1, 2):
            os.dup2(errors.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    warnings.simplefilter("error")
    try:
        place.write_bytes(pickle.dumps(function()))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _wait(processes: list[Any], dying: Collection[int], end: float) -> list[int]:
    """Wait for all that end by themselves; those that do not."""
    def alive() -> list[int]:
        return [rank for rank, process in enumerate(processes)
                if rank not in dying and _code(process) is None]
    while alive() and time.monotonic() < end:
        time.sleep(0.02)
    return alive()


def _code(process: Any) -> int | None:
    code: int | None = process.poll() if isinstance(process, subprocess.Popen) \
        else process.exitcode
    return code


def _result(place: Path) -> Any:
    content = place.read_bytes()
    return pickle.loads(content) if content[:1] == b"\x80" else content.decode()
