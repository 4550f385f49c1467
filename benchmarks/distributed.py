"""What several processes gain: time of a step, with the particles of one fit shared between them.

    python benchmarks/distributed.py [--processes 1 2 4] [--rows 20000] [--output results.md]

Strong scaling: the same 512 particles in all, shared by more processes, each with one thread, on
one machine, connected by Gloo. Both models are logistic regressions with 10 latents, one of 1,000
rows, where a step takes little longer than to tell each other the gradient, and one of
``--rows``. Times are medians over rounds, of steps only: building is left out. More processes
than cores take turns, and cannot gain. Efficiency is the time of one process over that of all:
``T_1 / (p T_p)``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_nfvi import NFVI, AutoFlow, planar
from pyro_nfvi.engine import Stepper
from pyro_nfvi.inference.distributed import DistributedTeam

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.processes import run_ranks  # noqa: E402 - the folder of the tests is beside

RESULTS = Path(__file__).parent / "results"
PARTICLES, LATENTS = 512, 10


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def data(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, LATENTS, generator=generator)
    return x, torch.bernoulli((x[:, 0] - x[:, 1]).sigmoid(), generator=generator)


def trained_guide(args: tuple) -> AutoFlow:
    """A guide that counts as trained, so that a fit is one stage of steps."""
    guide = AutoFlow(regression, partial(planar, num_layers=4)).setup(*args)
    with torch.no_grad():
        guide.flow.bijection.layers[-1].shift.value.add_(0.01)
    return guide


@dataclass
class Meter:
    """What the steps of a process take.

    Attributes:
        steps: Number of steps.
        seconds: Their time, the first few left out.
        processor: Their processor time.
        sums: Number of sums over the processes.
        sum_bytes: Bytes of the tensors that were summed.
    """

    steps: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    sums: int = 0
    sum_bytes: int = 0

    def watch(self) -> None:
        """Measure the steps of this process from now on."""
        run, sum_ = Stepper.run, DistributedTeam.sum_

        def measured(stepper: Stepper, *args: Any) -> int:
            wall, processor, first = time.perf_counter(), time.process_time(), not stepper.made
            made = run(stepper, *args)
            if not first:
                self.steps += made
                self.seconds += time.perf_counter() - wall
                self.processor += time.process_time() - processor
            return made

        def counted(team: DistributedTeam, flat: Tensor) -> Tensor:
            self.sums, self.sum_bytes = self.sums + 1, self.sum_bytes + flat.nbytes
            return sum_(team, flat)
        Stepper.run, DistributedTeam.sum_ = measured, counted  # type: ignore[method-assign]


def measure(num_rows: int, num_steps: int) -> dict[str, Any]:
    """Times of the steps of one process of a fit."""
    torch.set_num_threads(1)
    args, meter = data(num_rows), Meter()
    meter.watch()
    posterior = NFVI(regression, trained_guide(args), num_particles=PARTICLES,
                     num_steps=num_steps, seed=0, dtype=torch.float32, progress=False,
                     distributed="auto").run(*args)
    return {"seconds": meter.seconds / meter.steps, "processor": meter.processor / meter.steps,
            "bytes": meter.sum_bytes / max(1, meter.sums), "tier": posterior.engine.tier,
            "elbo": statistics.fmean(posterior.history.elbo[-10:])}


def rounds(num_rows: int, num_steps: int, num_processes: int, number: int) -> dict[str, Any]:
    """Medians over rounds, of the slowest process of each."""
    slowest = []
    for _ in range(number):
        found = run_ranks(partial(measure, num_rows, num_steps), num_processes, timeout=600.0)
        slowest.append(max(found, key=lambda one: one["seconds"]))
    return {**slowest[0], **{name: statistics.median(one[name] for one in slowest)
                             for name in ("seconds", "processor")}}


def row(name: str, num_processes: int, found: dict[str, Any], one: float) -> str:
    efficiency = one / (num_processes * found["seconds"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    many = " (more than cores)" if num_processes > (cores or 1) else ""
    sent = f"{found['bytes']:,.0f}" if num_processes > 1 else "-"
    return (f"| {name} | {num_processes}{many} | {1e3 * found['seconds']:.3g} | "
            f"{1e3 * found['processor']:.3g} | {one / found['seconds']:.2f} | {efficiency:.0%} | "
            f"{sent} | {found['tier']} | {found['elbo']:.3f} |")


def table(processes: Sequence[int], cases: Sequence[tuple[str, int, int]], number: int
          ) -> list[str]:
    lines = []
    for name, num_rows, num_steps in cases:
        one = 0.0
        for num_processes in processes:
            found = rounds(num_rows, num_steps, num_processes, number)
            one = one or found["seconds"]
            lines.append(row(name, num_processes, found, one))
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, nargs=2, default=[1500, 40],
                        help="of the small and the large model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "distributed.md")
    options = parser.parse_args()
    cases = [("1,000 rows", 1000, options.steps[0]),
             (f"{options.rows:,} rows", options.rows, options.steps[1])]
    lines = table(options.processes, cases, options.rounds)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    options.output.write_text("\n".join([
        "# Processes that share a fit", "",
        f"By `benchmarks/distributed.py` on {os.cpu_count()} cores of {platform.machine()}{load}, "
        f"torch {torch.__version__}, Gloo: one step of {PARTICLES} particles in all, float32, one "
        f"thread each, median of {options.rounds} rounds. Bytes are those of the gradient, which "
        "each step sums over the processes. The last column is the mean of the last ELBOs: it is "
        "the same fit.", "",
        "| model | processes | ms a step | ms of processor | speedup | efficiency | bytes a step | "
        "tier | ELBO |", "|---|---|---|---|---|---|---|---|---|", *lines, ""]))


if __name__ == "__main__":
    main()
