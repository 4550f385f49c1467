"""Time and memory of a fit against the number of latents, of rows and of particles.

    python benchmarks/scale.py [--quick] [--limit 1500] [--only latents particles rows]

Every point is a fit by NFVI(compile="c") in a process of its own, on one thread: seconds of a step
of the flow (the mean over all steps, noise included), seconds to build the code of a step, seconds
of the whole fit with its Gaussian stage, the building and its 10,000 draws, and peak memory, less
that of a fit of one latent to no data. A growth is the slope of log time, or log memory, over the
log of what varies, by least squares; in brackets the least and the largest slope between
neighbours. The models:

- latents: D group effects with ten rows each, Student's t around them, its width learned, so that
  the flow is trained whatever the Gaussian is worth; 64 particles;
- particles: the same with 100 latents;
- rows: a regression with 10 coefficients on float32 files that are mapped, not read, by an
  ArrayLoader in minibatches of 4096; 64 particles. The Gaussian stage and the draws at the end
  count in the seconds of the fit only.

A point that takes over ``--limit`` seconds is stopped and says so; one that NFVI refuses for its
memory says that. All of it takes about twenty minutes on one idle core, ``--quick`` about two.
Tables go to results/scale.md, points to results/scale.jsonl; those of other kinds stay there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_nfvi import NFVI, ArrayLoader

RESULTS = Path(__file__).parent / "results"
UNIT = {"linux": 1024, "darwin": 1}.get(sys.platform, 1024)  # bytes of ru_maxrss
GRIDS = {"latents": [10, 30, 100, 300, 1000, 3000, 10_000],
         "particles": [1, 4, 16, 64, 256, 1024],
         "rows": [10 ** 3, 10 ** 4, 10 ** 5, 10 ** 6, 10 ** 7]}
QUICK = {"latents": [10, 100, 1000], "particles": [1, 16, 256], "rows": [10 ** 3, 10 ** 5]}
NUM_STEPS, BATCH, PARTICLES, LATENTS, FEATURES = 40, 4096, 64, 100, 10
COLUMNS = {"step_seconds": ("ms a step", 1e3), "build_seconds": ("s to build", 1.0),
           "fit_seconds": ("s a fit", 1.0), "bytes": ("MB", 1e-6)}
Point = dict[str, Any]


# ---------------------------------------------------------------------- models

def width() -> Tensor:
    """A learned width of the noise: its model goes through the flow in any case."""
    value: Tensor = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
    return value


def groups(y: Tensor, group: Tensor, num_groups: int) -> None:
    """Group effects, each seen ten times."""
    with pyro.plate("groups", num_groups):
        effect = pyro.sample("effect", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, effect[group], width()), obs=y)


def regression(num_rows: int) -> Callable[[Tensor, Tensor], None]:
    """Robust regression on a minibatch of so many rows in all."""
    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
        with pyro.plate("data", num_rows, subsample_size=len(x)):
            pyro.sample("y", dist.StudentT(4.0, x @ weights, width()), obs=y)
    return model


def empty() -> None:
    """One latent and no data."""
    pyro.sample("z", dist.Normal(0.0, width()))


# ---------------------------------------------------------------------- a point, in its process

def fit(kind: str, value: int) -> NFVI:
    """The fit of a point, which has not run."""
    particles = value if kind == "particles" else PARTICLES
    model = {"rows": regression(value), "empty": empty}.get(kind, groups)
    return NFVI(model, num_steps=NUM_STEPS, num_particles=particles, compile="c", seed=0,
                progress=False)


def arguments(kind: str, value: int) -> tuple:
    """Arguments of the model of a point."""
    if kind == "empty":
        return ()
    dim = value if kind == "latents" else LATENTS
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(10 * dim) % dim
    effect = 2 * torch.randn(dim, generator=generator)
    return effect[group] + torch.randn(10 * dim, generator=generator), group, dim


def mapped(num_rows: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Files of float32 numbers, written and mapped."""
    shapes = {"x": (num_rows, FEATURES), "y": (num_rows,)}
    arrays = {name: np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", np.float32, shape)
              for name, shape in shapes.items()}
    generator = np.random.default_rng(0)
    for start in range(0, num_rows, 10 ** 5):
        x = generator.standard_normal((min(10 ** 5, num_rows - start), FEATURES), np.float32)
        arrays["x"][start:start + len(x)] = x
        arrays["y"][start:start + len(x)] = x.sum(1) + generator.standard_normal(len(x))
    for array in arrays.values():
        array.flush()
    x, y = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in shapes)
    return x, y


def measured(kind: str, value: int) -> Point:
    """Run one fit and say what it took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        nfvi, args, options = fit(kind, value), (), {}
        if kind == "rows":
            options["loader"] = ArrayLoader(*mapped(value, folder), batch_size=min(BATCH, value))
        else:
            args = arguments(kind, value)
        start = time.perf_counter()
        try:
            posterior = nfvi.run(*args, **options)
        except ValueError as error:
            return {"error": str(error)}
        seconds, engine = time.perf_counter() - start, posterior.engine
    peak = UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"step_seconds": 1e-6 * engine.microseconds, "build_seconds": engine.build_seconds,
            "fit_seconds": seconds, "bytes": peak, "tier": engine.tier,
            "pareto_k": posterior.pareto_k}


def in_its_own_process(kind: str, value: int, limit: float) -> Point:
    """A point, or why there is none."""
    command = [sys.executable, __file__, "--point", kind, str(value)]
    point = {"kind": kind, "value": value}
    with tempfile.TemporaryDirectory() as cache:  # an empty one: code is built, not found
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYRO_NFVI_CACHE": cache}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit,
                                  env=environment)
        except subprocess.TimeoutExpired:
            return {**point, "error": f"over {limit:.0f} s"}
    if done.returncode:
        return {**point, "error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return {**point, **json.loads(done.stdout.splitlines()[-1])}


# ---------------------------------------------------------------------- tables

def slopes(x: Sequence[float], y: Sequence[float]) -> str:
    """Slope of the logs by least squares, and the least and largest between neighbours."""
    if len(x) < 2:
        return ""
    log_x, log_y = np.log(x), np.log(np.maximum(y, 1e-12))
    between = np.diff(log_y) / np.diff(log_x)
    return f"{np.polyfit(log_x, log_y, 1)[0]:.2f} [{between.min():.2f}, {between.max():.2f}]"


def above(point: Point, base: float) -> Point:
    """A point with the memory that it takes beyond the base."""
    return {**point, "bytes": max(point["bytes"] - base, 1e5)}


def row(point: Point, base: float) -> list[str]:
    """What a point took, or why it did not."""
    if "error" in point:
        return [point["error"], *[""] * (len(COLUMNS) + 1)]
    cells = [f"{factor * above(point, base)[name]:,.3g}" for name, (_, factor) in COLUMNS.items()]
    k = point["pareto_k"]
    return [*cells, point["tier"], f"{k:.2f}" if math.isfinite(k) else "-"]


def table(kind: str, points: Sequence[Point], base: float) -> str:
    """Markdown of all points of a kind, and how they grow."""
    head = [kind, *(name for name, _ in COLUMNS.values()), "tier", "k-hat"]
    lines = [head, ["---"] * len(head)]
    good = [above(point, base) for point in points if "error" not in point]
    lines += [[f"{point['value']:,}", *row(point, base)] for point in points]
    x = [point["value"] for point in good]
    lines.append(["growth", *(slopes(x, [point[name] for point in good]) for name in COLUMNS),
                  "", ""])
    return f"## Against {kind}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def head(base: float, quick: bool) -> str:
    """What was run, where and on what."""
    return (f"# Scale\n\nPrinted by `python benchmarks/scale.py{' --quick' * quick}`: torch "
            f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()} with "
            f"{os.cpu_count()} cores, 1 thread, double precision. Memory is the peak less "
            f"{base / 1e6:.0f} MB of a fit of one latent. {NUM_STEPS} steps of {PARTICLES} "
            "particles unless they vary. Growth is the slope of the logs [least, largest between "
            "neighbours].")


def kept_points(name: str) -> list[Point]:
    """The points of an earlier run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Print a table against each of latents, particles and rows."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=float, default=1500.0, help="seconds a point")
    parser.add_argument("--only", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measured(options.point[0], int(options.point[1]))))
        return
    name = "scale_quick" if options.quick else "scale"  # which keeps the full tables
    kept = {kind: [p for p in kept_points(name) if p["kind"] == kind] for kind in GRIDS}
    start = in_its_own_process("empty", 1, options.limit)
    if "error" in start:
        sys.exit(f"The empty fit failed: {start['error']}")
    for kind in options.only:
        kept[kind] = [in_its_own_process(kind, value, options.limit)
                      for value in (QUICK if options.quick else GRIDS)[kind]]
        print(f"\n{table(kind, kept[kind], start['bytes'])}", flush=True)
    points = [start, *(point for kind in GRIDS for point in kept[kind])]
    texts = [head(start["bytes"], options.quick), *(table(kind, kept[kind], start["bytes"])
                                                    for kind in GRIDS if kept[kind])]
    (RESULTS / f"{name}.md").write_text("\n\n".join(texts) + "\n")
    (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))


if __name__ == "__main__":
    main()
