"""Random models, guides, data and arguments: is every result finite, or one clear sentence?

    python benchmarks/fuzz.py                                # 1,000 cases
    python benchmarks/fuzz.py --num-cases 100 --seed 3       # others

The cases and the judge are those of tests/fuzz.py. Each case is run in another process, which is
ended if it hangs even where Python cannot interrupt it. What failed is printed with the code that
does it again; the counts go to results/fuzz.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import local
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are beside us

RESULT = Path(__file__).parent / "results" / "fuzz.md"
BLOCK = 12  # cases drawn at a time: hypothesis varies what it has drawn before
LONGEST = 900.0  # seconds of waiting for one case, on a busy machine too
Judged = tuple[Any, Any]  # case and outcome


def serve(pipe: Any, folder: str) -> None:
    """Judge the cases of one block after the other, as the parent asks for them."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    os.chdir(folder)  # where odd paths lead
    from tests import fuzz

    while (number := pipe.recv()) is not None:
        for case in fuzz.drawn(fuzz.cases(), number, BLOCK):
            pipe.send((case, None))
            pipe.send((case, fuzz.judge(case)))
        pipe.send(None)


class Child:
    """A process that judges, and is replaced when it hangs or dies."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.folder), daemon=True)
        self.process.start()

    def judged(self, number: int) -> Iterator[Judged]:
        """The cases of a block with their outcomes."""
        from tests.fuzz import Outcome

        self.pipe.send(number)
        case: Any = f"block {number}"
        while True:
            try:
                found = self.pipe.recv() if self.pipe.poll(LONGEST) else "hangs"
            except EOFError:
                found = "ends the process"
            if found is None:
                return
            if isinstance(found, str):
                self.process.kill()
                yield case, Outcome("failure", found)
                self._start()
                return
            case, outcome = found
            if outcome is not None:
                yield case, outcome


def run(num_cases: int, seed: int, num_processes: int) -> Iterator[Judged]:
    """As many different cases as asked for, with their outcomes."""
    mine, seen = local(), set()

    def block(number: int) -> list[Judged]:
        if not hasattr(mine, "child"):
            mine.child = Child(folder)
        return list(mine.child.judged(number))

    def blocks() -> Iterator[list[Judged]]:
        number = 10_000 * seed
        while True:
            numbers = range(number, number + num_processes)
            yield from pool.map(block, numbers)
            number += num_processes

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_processes) as pool:
        new = (judged for found in blocks() for judged in found
               if not (repr(judged[0]) in seen or seen.add(repr(judged[0]))))
        yield from islice(new, num_cases)


def table(outcomes: list[Judged]) -> list[str]:
    """How many of each kind, of fits and of calls."""
    counts = Counter((type(case).__name__, outcome.kind) for case, outcome in outcomes)
    rows = ["| | fits | calls |", "|---|---|---|"]
    for kind in ("finite", "clear error", "the model's own error", "failure"):
        rows.append(f"| {kind} | {counts['Fit', kind]} | {counts['Call', kind]} |")
    return rows


def wordings(outcomes: list[Judged]) -> list[str]:
    """The clear errors by what they say, without names and numbers."""
    plain = Counter(re.split(r", got|: |\. |; ", re.sub(r"'[^']*'|-?\d+(\.\d+)?", "_", o.words))[0]
                    for _, o in outcomes if o.kind == "clear error")
    rows = ["| how often | the error begins |", "|---|---|"]
    return rows + [f"| {count} | {words[:150].replace('|', '/')} |"
                   for words, count in plain.most_common(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=1)
    options = parser.parse_args()
    begin, outcomes, failures = time.monotonic(), list[Judged](), list[str]()
    for case, outcome in run(options.num_cases, options.seed, options.num_processes):
        outcomes.append((case, outcome))
        if outcome.failed:
            failures.append(f"judge({case!r})\n    {outcome.words}\n")
            print(f"{failures[-1]}{outcome.details}", flush=True)
        if len(outcomes) % 50 == 0:
            print(f"{len(outcomes)} cases, {time.monotonic() - begin:.0f} s", flush=True)
    seconds = sum(outcome.seconds for _, outcome in outcomes)
    longest = max(outcome.seconds for _, outcome in outcomes)
    lines = [
        "# Random models and arguments", "",
        f"`python benchmarks/fuzz.py --num-cases {options.num_cases} --seed {options.seed}`: "
        f"{len(outcomes)} different cases, {seconds:.0f} s of computing, {longest:.0f} s the "
        "longest. The model's own errors are what the model says without the library too.", "",
        *table(outcomes), "", *wordings(outcomes), "", "## Failures", "",
        *(["```", *failures, "```"] if failures else ["None."]), ""]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
