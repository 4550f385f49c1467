"""A fit that is killed again and again, at random times, and goes on each time.

    python benchmarks/kills.py [--num-kills 200] [--seed 0] [--output results.md]

One fit of three stages (a banana, by a planar flow) keeps a checkpoint every 10 steps. A process
that runs it gets SIGKILL at a time drawn uniformly between its start and half the length of a
whole fit; the next goes on in the same folder, until one completes; then a new folder is begun,
until there have been so many kills. After each, the newest checkpoint has to be readable, and the
steps that are lost are counted: those made since, of which there may be as many as are asked for,
and those between two looks at the clock. Each fit that completes has to end with the parameters,
the history and the draws of one that was never killed, bit for bit.

Processes are forked from one that has imported everything, so a kill costs no imports.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_nfvi import NFVI, AutoFlow, Checkpoint, planar
from pyro_nfvi.engine.adam import AdamState
from pyro_nfvi.inference.checkpoint import CheckpointStore
from pyro_nfvi.inference.loop import Loop

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.fits import differences, outcome  # noqa: E402 - the folder of the tests is beside

RESULTS = Path(__file__).parent / "results"
EVERY_STEPS, NUM_STEPS = 10, 100


def banana() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a.square(), 0.5), obs=torch.tensor(0.3))


def fit(folder: Path | None, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """What the fit ends with."""
    guide = AutoFlow(banana, partial(planar, num_layers=2))
    checkpoint = None if folder is None else Checkpoint(folder, every_steps=EVERY_STEPS)
    nfvi = NFVI(banana, guide, num_particles=16, num_steps=num_steps, seed=0, compile="fx",
                progress=False, checkpoint=checkpoint)
    return outcome(nfvi.run())


class Counts:
    """Numbers that a process and its parent both see: steps made, and most between two looks."""

    def __init__(self) -> None:
        self.memory = SharedMemory(create=True, size=16)
        self.numbers = self.memory.buf.cast("q")

    def watch(self) -> None:
        """Count the steps of this process."""
        update, look = AdamState.update, Loop._look
        steps_before = [self.numbers[0]]

        def counted(state: AdamState, *args: Any) -> None:
            update(state, *args)
            self.numbers[0] += 1

        def looked(loop: Loop, *args: Any) -> None:
            self.numbers[1] = max(self.numbers[1], self.numbers[0] - steps_before[0])
            steps_before[0] = self.numbers[0]
            look(loop, *args)
        AdamState.update, Loop._look = counted, looked  # type: ignore[method-assign]


@dataclass
class Tally:
    """What has happened so far."""

    kills: int = 0
    completions: int = 0
    equal: int = 0
    readable: int = 0
    lost: list[int] = field(default_factory=list)
    excess: int = 0  # kills that lost more than may be
    leftovers: int = 0  # files of a write that was cut short
    stages: Counter = field(default_factory=Counter)


def child_of(function: Callable[[], Any]) -> int:
    """A process that runs a function and ends with 0 if it went well."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        warnings.simplefilter("error")
        function()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def newest(folder: Path) -> dict[str, Any] | None:
    """The checkpoint that a fit would go on from."""
    with CheckpointStore(Checkpoint(folder)) as store:
        return store.latest()


def kept_steps(content: dict[str, Any] | None) -> int:
    if content is None:
        return 0
    loop = content.get("loop")
    return len(content["history"]["elbo"]) + (0 if loop is None else len(loop["stepper"]["elbo"]))


def place(content: dict[str, Any] | None) -> str:
    """Where a fit goes on."""
    if content is None:
        return "before the first checkpoint"
    stages = ["Gaussian", "flow", "more particles"]
    if content["stage"] == len(stages):
        return "after the last step"
    name = stages[content["stage"]]
    return f"in {name}" if content.get("loop") is not None else f"before {name}"


def attempt(folder: Path, result: Path, counts: Counts, seconds: float) -> bool:
    """Run the fit for so long; whether it completed."""
    def run() -> None:
        counts.watch()
        torch.save(fit(folder), result.with_suffix(".part"))
        result.with_suffix(".part").replace(result)
    pid = child_of(run)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"the fit failed, status {status}")
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def note_kill(tally: Tally, counts: Counts, folder: Path) -> None:
    """Look at what the kill has left."""
    tally.kills += 1
    tally.leftovers += any(path.name.startswith(".checkpoint") for path in folder.iterdir()) \
        if folder.exists() else 0
    content = newest(folder)  # a damaged one would be a warning, which is an error
    tally.readable += 1
    steps = kept_steps(content)
    tally.lost.append(counts.numbers[0] - steps)
    tally.excess += tally.lost[-1] > EVERY_STEPS + counts.numbers[1]
    tally.stages[place(content)] += 1
    counts.numbers[0] = steps


def whole_fit(folder: Path) -> tuple[dict[str, Any], float]:
    """The outcome of a fit that is never killed, and its time with checkpoints."""
    def reference() -> None:
        torch.save(fit(None), folder / "reference")
    begin = time.monotonic()
    os.waitpid(child_of(reference), 0)
    plain = time.monotonic() - begin
    begin = time.monotonic()
    os.waitpid(child_of(lambda: fit(folder / "timed")), 0)
    seconds = time.monotonic() - begin
    print(f"a fit takes {plain:.2f} s, with checkpoints {seconds:.2f} s", flush=True)
    return torch.load(folder / "reference"), seconds


def kill_fits(num_kills: int, generator: random.Random, temporary: Path
              ) -> tuple[Tally, float, int]:
    """Kill so often; the tally, the time of a whole fit, and the longest stretch of steps."""
    tally, counts, longest = Tally(), Counts(), 0
    expected, seconds = whole_fit(temporary)
    folder, result = temporary / "fit", temporary / "result"
    while tally.kills < num_kills:
        counts.numbers[1] = 0
        if not attempt(folder, result, counts, generator.uniform(0.0, seconds / 2)):
            note_kill(tally, counts, folder)
        else:
            tally.completions += 1
            found = torch.load(result)
            tally.equal += not differences(expected, found)
            shutil.rmtree(folder)
            result.unlink()
            counts.numbers[0] = 0
        longest = max(longest, counts.numbers[1])
        if tally.kills % 20 == 0:
            print(tally.kills, "kills,", tally.completions, "completions", flush=True)
    counts.numbers.release()
    counts.memory.close()
    counts.memory.unlink()
    return tally, seconds, longest


def report(tally: Tally, seconds: float, longest: int) -> str:
    lost = sorted(tally.lost)
    rows = [("kills", tally.kills), ("newest checkpoint readable", f"{tally.readable} of "
                                                                   f"{tally.kills}"),
            ("kills in the middle of a write", tally.leftovers),
            ("steps lost: median, worst", f"{statistics.median(lost):g}, {lost[-1]}"),
            (f"more than {EVERY_STEPS} and one look lost", tally.excess),
            ("most steps between two looks at the clock", longest),
            ("fits that completed", tally.completions),
            ("of which equal to the one never killed, bit for bit",
             f"{tally.equal} of {tally.completions}")]
    where = "\n".join(f"| {name} | {count} |" for name, count in sorted(tally.stages.items()))
    return "\n".join([
        "# Kills", "",
        f"By `benchmarks/kills.py --num-kills {tally.kills}` on one core of {platform.machine()}, "
        f"torch {torch.__version__}: a banana, a fit of {seconds:.1f} s with a checkpoint "
        f"every {EVERY_STEPS} steps, gets SIGKILL at random times and goes on each time.", "",
        "| what | number |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "",
        "Where fits went on after a kill:", "", "| place | kills |", "|---|---|", where, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    fit(None, num_steps=2)  # what is imported at first use
    with TemporaryDirectory() as temporary:
        tally, seconds, longest = kill_fits(options.num_kills, random.Random(options.seed),
                                            Path(temporary))
    text = report(tally, seconds, longest)
    options.output.write_text(text)
    print(text)
    if tally.equal < tally.completions or tally.excess or not math.isfinite(seconds):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
