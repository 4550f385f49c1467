"""One SVI step in four libraries, side by side: ours, Pyro, Pyro's JIT, and NumPyro.

Same model, same flow under the same affine map, same number of particles, float32, one thread,
all on one core. Each library runs in a process of its own; rounds of all libraries of a row are
interleaved, and the median over rounds is shown. Times are processor time, so that a busy
machine disturbs them little. Building is from model and data in hand to the first finished step,
with cold caches and without imports.

    python benchmarks/inner_loop.py [--models schools] [--particles 1 16] [--output results.md]
    python benchmarks/inner_loop.py --check     # do all libraries reach the same ELBO?
    python benchmarks/inner_loop.py --growth    # how our step grows with latents, draws, depth
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from inner_loop_worker_common import Spec, write_data

DEPTHS = {"planar": 8, "iaf": 2, "nsf": 4}
TITLES = {"schools": "eight schools", "logistic": "logistic regression",
          "hierarchical": "hierarchical regression", "planar": "planar", "iaf": "IAF",
          "nsf": "spline coupling"}
LIBRARIES = {"ours": "ours", "eager": "ours", "pyro": "pyro", "pyro jit": "pyro",
             "numpyro": "numpyro"}  # and the worker of each
LENGTHS = (2_000, 20_000)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
              "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS":
              "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
Row = tuple[str, str, int, int]  # model, flow, depth, particles


class Worker:
    """A library in a process of its own, fitting one row.

    Attributes:
        error: Why it answers no more, or an empty string.
    """

    def __init__(self, spec: Spec, python: str, cache: str) -> None:
        script = Path(__file__).with_name(f"inner_loop_worker_{LIBRARIES[spec.library]}.py")
        caches = {"PYRO_NFVI_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        self.process = subprocess.Popen(
            [python, str(script), json.dumps(asdict(spec))], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD, **caches})
        self.error = ""

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Answer to one command, empty after an error."""
        if self.error:
            return {}
        try:
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            answer = {"error": f"the worker died, exit status {self.process.poll()}"}
        self.error = answer.get("error", "")
        return {} if self.error else answer

    def stop(self) -> dict[str, Any]:
        """Last answer; the process ends."""
        answer = self.ask("stop")
        with suppress(BrokenPipeError):  # it is dead already
            self.process.stdin.close()
        self.process.wait()
        return answer


@dataclass
class Column:
    """What one library did on one row; times in seconds unless they are named ``us``.

    Attributes:
        us: Median microseconds of a step.
        wall_us: The same in wall time.
        build: From model and data to the first step.
        rebuild: The same once more, in the same process.
        fixed: What a fit costs beside building and steps.
        peak_mb: Largest memory of the process, after importing the library and at the end.
        error: Why there are no times.
        extra: Whatever else the worker said: medians of numbers, the last of the rest.
    """

    us: float = math.nan
    wall_us: float = math.nan
    build: float = math.nan
    rebuild: float = math.nan
    fixed: float = 0.0
    peak_mb: tuple[float, float] = (math.nan, math.nan)
    error: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def total(self, steps: int) -> float:
        """Seconds of a fit of that many steps in a fresh process."""
        return self.build + self.fixed + 1e-6 * steps * self.us


# ---------------------------------------------------------------------- measuring


def start(row: Row, options: argparse.Namespace, folder: Path,
          lr: Callable[[str], float] = lambda library: 1e-3) -> dict[str, Worker]:
    """One worker for each library; ``lr`` is the rate of each."""
    model, flow, depth, particles = row
    data = write_data(model, folder)
    workers = {}
    for name in options.libraries:
        tier = "eager" if name == "eager" else options.tier
        spec = Spec(name, model, flow, depth, particles, data, tier, lr(name))
        python = options.numpyro_python if name == "numpyro" else sys.executable
        workers[name] = Worker(spec, python, tempfile.mkdtemp(dir=folder))
    return workers


def measure(row: Row, options: argparse.Namespace) -> dict[str, Column]:
    """All libraries on one row, their rounds interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        workers = start(row, options, Path(folder))
        columns = {name: built(worker) for name, worker in workers.items()}
        steps = {name: worker.ask("calibrate", seconds=options.seconds).get("steps", 0)
                 for name, worker in workers.items()}
        for name, worker in workers.items():
            worker.ask("run", steps=steps[name])  # warm-up, and what compiles for that length
        rounds = [{name: worker.ask("run", steps=steps[name]) for name, worker in
                   workers.items()} for _ in range(options.rounds)]
        for name, worker in workers.items():
            finish(columns[name], worker, [answers[name] for answers in rounds])
    return columns


def built(worker: Worker) -> Column:
    """Build twice."""
    hello, first, second = worker.ask("hello"), worker.ask("build"), worker.ask("build")
    memory = hello.get("peak_mb", math.nan)
    return Column(build=first.get("cpu", math.nan), rebuild=second.get("cpu", math.nan),
                  peak_mb=(memory, memory), extra={"versions": hello.get("versions", {}),
                                                   "build_wall": first.get("wall")})


def finish(column: Column, worker: Worker, answers: list[dict[str, Any]]) -> None:
    """Medians of the rounds, and the peak of memory."""
    column.peak_mb = (column.peak_mb[0], worker.stop().get("peak_mb", math.nan))
    column.error = worker.error
    if column.error:
        return
    merged = {key: median([answer[key] for answer in answers]) for key in answers[0]}
    column.us, column.wall_us = merged.pop("us"), merged.pop("wall_us")
    column.fixed = merged.pop("fixed", 0.0)
    column.extra |= merged


def median(values: list[Any]) -> Any:
    """Median of numbers, the last of anything else."""
    numbers = all(isinstance(value, (int, float)) for value in values)
    return statistics.median(values) if numbers else values[-1]


# ---------------------------------------------------------------------- tables


def label(row: Row) -> str:
    """First cells of a table row."""
    model, flow, depth, particles = row
    return f"{TITLES.get(model, model)} | {TITLES[flow]} x{depth} | {particles}"


def number(value: float) -> str:
    """Three digits or so."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(columns: dict[str, Column], peer: str, of: Callable[[Column], float]) -> float:
    """How many times longer another library takes than ours."""
    if peer not in columns or "ours" not in columns:
        return math.nan
    return of(columns[peer]) / of(columns["ours"])


def loop_us(column: Column) -> float:
    """Microseconds of NumPyro's steps in a loop written by hand."""
    return column.extra.get("loop_us", math.nan)


def table(head: list[str], rows: Iterable[tuple[str, list[Any]]]) -> str:
    """A markdown table; numbers are rounded."""
    lines = ["| model | flow | particles | " + " | ".join(head) + " |",
             "|" + "---|" * (len(head) + 3)]
    for first, cells in rows:
        shown = [cell if isinstance(cell, str) else number(cell) for cell in cells]
        lines.append(f"| {first} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def step_table(results: dict[Row, dict[str, Column]], names: list[str]) -> str:
    """Microseconds of a step, and how many of ours the others take."""
    def cells(columns: dict[str, Column]) -> list[Any]:
        ours, numpyro = columns.get("ours", Column()), columns.get("numpyro", Column())
        by_hand = loop_us(numpyro)
        return [*(columns[name].us for name in names), by_hand,
                ratio(columns, "pyro", lambda c: c.us), ratio(columns, "pyro jit", lambda c: c.us),
                ratio(columns, "numpyro", lambda c: c.us), by_hand / ours.us,
                str(ours.extra.get("tier", "-"))]
    head = [*names, "numpyro by hand", "pyro / ours", "jit / ours", "numpyro / ours",
            "by hand / ours", "tier"]
    return table(head, ((label(row), cells(columns)) for row, columns in results.items()))


def fit_table(results: dict[Row, dict[str, Column]], names: list[str]) -> str:
    """Seconds to build, and of a whole fit."""
    def cells(columns: dict[str, Column]) -> list[Any]:
        builds = [columns[name].build for name in names]
        rebuild = columns["ours"].rebuild if "ours" in columns else math.nan
        fits = [columns[name].total(steps) for steps in LENGTHS for name in names]
        ratios = [ratio(columns, peer, lambda c, n=steps: c.total(n))
                  for steps in LENGTHS for peer in ("pyro", "numpyro")]
        return [*builds, rebuild, *fits, *ratios]
    head = [*(f"build {name}" for name in names), "rebuild ours",
            *(f"{steps:,} {name}" for steps in LENGTHS for name in names),
            *(f"{steps:,} {peer} / ours" for steps in LENGTHS for peer in ("pyro", "numpyro"))]
    return table(head, ((label(row), cells(columns)) for row, columns in results.items()))


def memory_table(results: dict[Row, dict[str, Column]], names: list[str]) -> str:
    """Peak memory in MB, and how much of it came after the imports."""
    def cell(column: Column) -> str:
        before, peak = column.peak_mb
        return f"{number(peak)} (+{number(peak - before)})"
    return table(names, ((label(row), [cell(columns[name]) for name in names])
                         for row, columns in results.items()))


def notes(results: dict[Row, dict[str, Column]]) -> str:
    """Errors, and why ours did not take its fastest tier."""
    said: dict[str, list[str]] = {}
    for row, columns in results.items():
        for name, column in columns.items():
            problem = column.error or (column.extra.get("reason") if name == "ours" else "")
            if problem:
                said.setdefault(f"{name}: {problem}", []).append(label(row).replace(" | ", ", "))
    return "\n".join(f"- {problem} ({'; '.join(rows)})" for problem, rows in said.items())


# ---------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A claim about a number of every row it applies to.

    Attributes:
        name: The claim in words.
        value: The number.
        bound: What it must be above; below, if ``lower`` is false.
        applies: The rows it is about.
    """

    name: str
    value: Callable[[dict[str, Column]], float]
    bound: float
    lower: bool = True
    applies: Callable[[Row], bool] = lambda row: True


def per_step(peer: str) -> Callable[[dict[str, Column]], float]:
    """How many of our steps one of another library takes."""
    return lambda columns: ratio(columns, peer, lambda c: c.us)


def per_fit(peer: str, steps: int) -> Callable[[dict[str, Column]], float]:
    """How many of our fits one of another library takes."""
    return lambda columns: ratio(columns, peer, lambda c: c.total(steps))


def of_ours(name: str) -> Callable[[dict[str, Column]], float]:
    """A number of our own."""
    return lambda columns: getattr(columns.get("ours"), name, math.nan)


TARGETS = [
    Target("Pyro / ours, eight schools, 1 particle", per_step("pyro"), 100.0,
           applies=lambda row: row[0] == "schools" and row[3] == 1),
    Target("Pyro / ours, up to 16 particles", per_step("pyro"), 20.0,
           applies=lambda row: row[3] <= 16),
    Target("Pyro / ours, 64 particles", per_step("pyro"), 10.0, applies=lambda row: row[3] == 64),
    Target("Pyro JIT / ours, per step", per_step("pyro jit"), 1.0),
    Target("NumPyro / ours, per step", per_step("numpyro"), 1.0),
    *(Target(f"NumPyro / ours, {steps:,} steps", per_fit("numpyro", steps), 1.0)
      for steps in LENGTHS),
    Target("NumPyro by hand / ours, per step", lambda columns: ratio(
        columns, "numpyro", lambda c: loop_us(c) if "loop_us" in c.extra else c.us), 1.0),
    Target("build of ours, seconds", of_ours("build"), 3.0, lower=False),
    Target("rebuild of ours, seconds", of_ours("rebuild"), 0.2, lower=False),
]


def verdict(target: Target, results: dict[Row, dict[str, Column]]) -> str:
    """The worst row of a target, and the rows that miss it."""
    values = {label(row).replace(" | ", ", "): target.value(columns)
              for row, columns in results.items() if target.applies(row)}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return f"- {target.name}: not measured"
    sign = 1 if target.lower else -1
    missed = [name for name, value in values.items() if sign * (value - target.bound) < 0]
    worst = min(values, key=lambda name: sign * values[name])
    words = ("smallest", "at least") if target.lower else ("largest", "below")
    line = (f"- {'**missed**' if missed else 'met'}: {target.name}: {words[0]} "
            f"{number(values[worst])} ({worst}); {words[1]} {number(target.bound)} wanted")
    return line + (f"; {len(missed)} of {len(values)} rows miss: "
                   + "; ".join(f"{name} ({number(values[name])})" for name in missed)
                   if missed else "")


# ---------------------------------------------------------------------- growth


def growth(options: argparse.Namespace) -> str:
    """How our step grows with latents, particles and depth, one at a time."""
    options.libraries = ["ours"]
    sections = []
    for flow in options.flows:
        sweeps = {"latents": [(f"normal-{dim}", flow, DEPTHS[flow], 16)
                              for dim in (10, 30, 100, 300, 1000)],
                  "particles": [("normal-30", flow, DEPTHS[flow], count)
                                for count in (1, 4, 16, 64, 256)],
                  "depth": [("normal-30", flow, depth, 16) for depth in (2, 4, 8, 16)]}
        for name, rows in sweeps.items():
            sections.append(sweep(f"{TITLES[flow]}, {name}", name, rows, options))
            say(sections[-1])
    return "\n\n".join(sections)


def sweep(title: str, name: str, rows: list[Row], options: argparse.Namespace) -> str:
    """One sweep as a table, with the slope of log time against log size."""
    size = {"latents": lambda row: int(row[0].split("-")[1]), "depth": lambda row: row[2],
            "particles": lambda row: row[3]}[name]
    columns = [measure(row, options)["ours"] for row in rows]
    x, y = np.log([size(row) for row in rows]), np.log([column.us for column in columns])
    slope, last = np.polyfit(x, y, 1)[0], (y[-1] - y[-2]) / (x[-1] - x[-2])
    lines = [f"**{title}**: exponent {slope:.2f}, between the last two {last:.2f}", "",
             f"| {name} | microseconds a step | build | tier |", "|---|---|---|---|"]
    lines += [f"| {size(row)} | {number(c.us)} | {number(c.build)} | "
              f"{c.error or c.extra.get('tier', '-')} |"
              for row, c in zip(rows, columns, strict=True)]
    return "\n".join(lines)


# ---------------------------------------------------------------------- check


def check(options: argparse.Namespace) -> str:
    """ELBO of every library on eight schools after 2,000 steps, which must agree."""
    lines = ["| flow | " + " | ".join(options.libraries) + " | spread |",
             "|" + "---|" * (len(options.libraries) + 2)]
    for flow in options.flows:
        with tempfile.TemporaryDirectory() as folder:
            row = ("schools", flow, DEPTHS[flow], 16)
            workers = start(row, options, Path(folder), partial(check_rate, flow))
            values = {name: final_elbo(worker) for name, worker in workers.items()}
        finite = [value for value in values.values() if isinstance(value, float)]
        shown = [f"{value:.2f}" if isinstance(value, float) else value
                 for value in values.values()]
        lines.append(f"| {TITLES[flow]} x{DEPTHS[flow]} | " + " | ".join(shown)
                     + f" | {max(finite, default=math.nan) - min(finite, default=math.nan):.2f} |")
    return "\n".join(lines)


def check_rate(flow: str, library: str) -> float:
    """Learning rate; Pyro's unscaled spline networks run away at the rate of the others."""
    return 3e-3 if flow == "nsf" and library.startswith("pyro") else 1e-2


def final_elbo(worker: Worker) -> float | str:
    """ELBO after 2,000 steps, or the error."""
    worker.ask("build")
    worker.ask("fit", steps=2000)
    elbo = worker.ask("elbo", draws=10_000).get("elbo", math.nan)
    worker.stop()
    return worker.error or elbo


# ---------------------------------------------------------------------- main


def machine(results: dict[Row, dict[str, Column]], options: argparse.Namespace) -> str:
    """One line about where this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions: dict[str, str] = {}
    for columns in results.values():
        for column in columns.values():
            versions |= column.extra.get("versions", {})
    return (f"{names[0] if names else platform.processor()}, one core, one thread, float32; Python "
            f"{platform.python_version()}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"; median of {options.rounds} interleaved rounds of processor time.")


def report(results: dict[Row, dict[str, Column]], options: argparse.Namespace) -> str:
    """The whole document."""
    names = options.libraries
    peers = [name for name in names if name != "eager"]
    return "\n\n".join([
        machine(results, options),
        "Microseconds of a step. NumPyro: the scan of `SVI.run`; by hand: its steps in a loop "
        "that keeps no losses.", step_table(results, names),
        "Seconds to build, from model and data to the first step, and of a fit of so many steps.",
        fit_table(results, peers),
        "Peak memory of the process in MB (of which after the imports).",
        memory_table(results, names), "Targets:",
        "\n".join(verdict(target, results) for target in TARGETS), notes(results)]) + "\n"


def benchmark(options: argparse.Namespace) -> str:
    """All rows."""
    rows = [(model, flow, DEPTHS[flow], particles) for model in options.models
            for flow in options.flows for particles in options.particles]
    results = {}
    for row in rows:
        results[row] = measure(row, options)
        say(label(row) + ": " + ", ".join(f"{name} {column.error or number(column.us)}"
                                          for name, column in results[row].items()))
        if options.json:
            entries = [{"row": list(row), "columns": {name: asdict(column) for name, column in
                                                      columns.items()}}
                       for row, columns in results.items()]
            options.json.write_text(json.dumps(entries, indent=1))
    return report(results, options)


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+"}
    models = ["schools", "logistic", "hierarchical"]
    parser.add_argument("--models", **several, default=models, choices=models)
    parser.add_argument("--flows", **several, default=list(DEPTHS), choices=list(DEPTHS))
    parser.add_argument("--particles", **several, type=int, default=[1, 16, 64, 256])
    parser.add_argument("--libraries", **several, default=list(LIBRARIES),
                        choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one round of one library")
    parser.add_argument("--tier", default="auto", help="of our loop: c, inductor, fx, eager, auto")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1)
    parser.add_argument("--numpyro-python", default=sys.executable, metavar="PATH",
                        help="Python that has NumPyro")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--growth", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    os.sched_setaffinity(0, {options.core})  # the workers inherit it
    text = (check if options.check else growth if options.growth else benchmark)(options)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
