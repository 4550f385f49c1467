"""Log-determinants by structure, against autograd row by row and against torch.func.

    python benchmarks/jacobian.py [--quick] [--device cpu] [--threads 1] [--output results.md]

Each line times log|det J| of one map at every row of a batch: by its structure, by
``torch.func.vmap(jacrev)`` and ``slogdet``, and by a loop of ``jacrev`` and ``slogdet`` over rows
(timed on 16 rows at most, times the rows). A cell that is expected to take over ``--budget``
seconds a run, or over 2 GB, is skipped and says so. Memory is that of all tensors alive at once
(on a GPU, what the allocator says); a table at the end compares that with the memory of a fresh
process. Growth is the slope of log time over log D, and that of the arithmetic, counted. The full
table takes under ten minutes on one idle core, ``--quick`` about one. Lines are kept beside the
output, as .jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_nfvi.flows import LowRankUpdate, iaf, nsf, planar
from pyro_nfvi.flows.jacobian import MemoryMeter, log_abs_det, power_series_log_det, rademacher
from pyro_nfvi.testing import perturb

RESULTS = Path(__file__).parent / "results"
HIDDEN, RIDGES, TERMS = 64, 8, 10
MAX_BYTES = 2**29  # our bound, wherever the whole would take more
MOST_BYTES = 2 * 10**9  # of a cell that is run at all


# ------------------------------------------------------------------ maps

class Elementwise(nn.Module):
    """Each coordinate by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        """The image."""
        return x + 0.5 * torch.tanh(self.scale * x)


class Running(nn.Module):
    """Lower triangular, at O(D) a call: each coordinate is scaled by the mean of those before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def slope(self, x: Tensor) -> Tensor:
        """The derivative of each coordinate in itself."""
        before = torch.cumsum(x, -1) - x
        return 1 + 0.5 * torch.tanh(self.weight * before / x.shape[-1]**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The image."""
        return x * self.slope(x)


class RunningWithDiagonal(Running):
    """The same, and it knows its diagonal."""

    diagonal = Running.slope


class Residual(nn.Module):
    """A full Jacobian: the point plus a network of it, of 64 hidden units."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The image."""
        return x + self.net(x)


def ridges(dim: int, num_ridges: int = RIDGES) -> nn.Module:
    return LowRankUpdate(nn.Sequential(nn.Linear(dim, num_ridges), nn.Tanh()),
                         nn.Linear(num_ridges, dim, bias=False))


def by_series(residual: Residual, x: Tensor) -> Tensor:
    """An estimate: one probe, ten terms."""
    return power_series_log_det(residual.net, x, noise=rademacher(x), num_terms=TERMS)[1]


def by_structure(structure: str, module: nn.Module, x: Tensor) -> Tensor:
    """Ours, under a bound where the whole may take more."""
    wide = {"diagonal": 1, "low-rank": RIDGES}.get(structure, x.shape[-1])
    large = not hasattr(module, "diagonal") and 24 * x.numel() * wide > MAX_BYTES
    return log_abs_det(module, x, structure=structure, max_bytes=MAX_BYTES if large else None)


# name -> how to make the map, our way, the power of D that is claimed
ROWS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module, Tensor], Tensor], float]] = {
    "diagonal": (Elementwise, partial(by_structure, "diagonal"), 1),
    "triangular, known diagonal": (RunningWithDiagonal, partial(by_structure, "triangular"), 1),
    "triangular": (Running, partial(by_structure, "triangular"), 2),
    "low rank": (ridges, partial(by_structure, "low-rank"), 1),
    "full": (Residual, partial(by_structure, "full"), 3),
    "estimate": (Residual, by_series, 1),
}


def batched(module: nn.Module, x: Tensor) -> Tensor:
    return torch.linalg.slogdet(vmap(jacrev(module))(x)).logabsdet


def looped(module: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.linalg.slogdet(jacrev(module)(row)).logabsdet for row in x])


# ------------------------------------------------------------------ measurements

def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Tensor], budget: float, warm: bool = True) -> float:
    """Median of up to seven runs that fit the budget; at least one."""
    times: list[float] = []
    if warm:
        synchronize(run())
    while not times or (len(times) < 7 and sum(times) + times[-1] < budget):
        start = time.perf_counter()
        synchronize(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(run: Callable[[], Tensor], cuda: bool = False) -> int:
    """Memory of all tensors alive at once."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with MemoryMeter() as meter:
        run()
    return meter.peak


class Work(TorchDispatchMode):
    """Counts arithmetic: two a multiply-add of matrices, 2/3 n^3 an LU, else one a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        result = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            self.count += 2 * result.numel() * args[-1].shape[-2]
        elif name == "_linalg_slogdet":
            self.count += 2 / 3 * args[0].numel() * args[0].shape[-1]
        elif not op.is_view:
            self.count += sum(leaf.numel() for leaf in tree_leaves(result)
                              if isinstance(leaf, Tensor))
        return result


def work(name: str, dim: int, batch: int = 4) -> float:
    make, ours, _ = ROWS[name]
    torch.manual_seed(0)
    with torch.no_grad(), Work() as counter:
        ours(make(dim), torch.randn(batch, dim))
    return counter.count


def slope(points: list[tuple[float, float]]) -> float:
    """Of log y over log x, by least squares."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    return (sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
            / sum((x - mx)**2 for x in xs))


class Table:
    """Measures cells in growing order, so that one can tell which would take too long."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.times: dict[tuple[str, str, int, int], float] = {}
        self.lines: list[str] = []
        self.records: list[dict] = []

    def say(self, line: str) -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self.lines.append(line)

    def expected(self, name: str, column: str, dim: int, batch: int, power: float) -> float:
        """Seconds by the nearest smaller cells."""
        guesses = [t * (dim / d)**power * (batch / b)
                   for (n, c, d, b), t in self.times.items()
                   if (n, c) == (name, column) and d <= dim and b <= batch and t > 1e-2]
        return min(guesses, default=0.0)

    def measured(self, name: str, column: str, dim: int, batch: int, power: float,
                 run: Callable[[], Tensor], bytes_expected: float) -> tuple[str, str]:
        """The cells of time and memory."""
        if bytes_expected > MOST_BYTES:
            return f"skipped: {bytes_expected / 1e9:.0f} GB", "-"
        expected = self.expected(name, column, dim, batch, power)
        if expected > self.options.budget:
            return f"skipped: about {expected:.1f} s", "-"
        with torch.no_grad():
            time_ = seconds(run, self.options.budget / 3)
            peak = peak_bytes(run, self.device.type == "cuda")
        self.times[name, column, dim, batch] = time_
        self.records.append({"map": name, "way": column, "dim": dim, "batch": batch,
                             "seconds": time_, "peak_bytes": peak})
        return f"{1e3 * time_:,.2f}", f"{peak / 1e6:,.2f}"

    def row(self, name: str, dim: int, batch: int) -> None:
        """Measure one map at one size, three ways."""
        make, ours, power = ROWS[name]
        torch.manual_seed(0)
        module, x = make(dim).to(self.device), torch.randn(batch, dim, device=self.device)
        dense = 4.0 * batch * dim**2
        cells = self.measured(name, "ours", dim, batch, power, partial(ours, module, x), 0)
        cells += self.measured(name, "vmap", dim, batch, 3, partial(batched, module, x), 4 * dense)
        rows = min(batch, 16)
        with torch.no_grad():
            if (name, "loop", dim, 1) not in self.times:
                self.times[name, "loop", dim, 1] = seconds(
                    partial(looped, module, x[:rows]), self.options.budget / 3) / rows
        loop = self.times[name, "loop", dim, 1] * batch
        mark = "" if batch <= 16 else "~"
        mine = self.times.get((name, "ours", dim, batch))
        gain = "-" if mine is None else f"{loop / mine:,.0f}"
        theirs = self.times.get((name, "vmap", dim, batch))
        other = "-" if mine is None or theirs is None else f"{theirs / mine:,.1f}"
        self.say(f"| {name} | {dim} | {batch:,} | {cells[0]} | {cells[2]} | {mark}{1e3 * loop:,.1f}"
                 f" | {other} | {mark}{gain} | {cells[1]} | {cells[3]} |")

    def growth(self, name: str, batch: int) -> str | None:
        """The slope of log time over log D, at the three largest sizes."""
        cells = sorted((d, t) for (n, c, d, b), t in self.times.items()
                       if (n, c, b) == (name, "ours", batch))[-3:]
        if len(cells) < 3 or cells[0][0] < 16:
            return None
        by_time, by_work = slope(cells), slope([(d, work(name, d)) for d in (256, 512, 1024)])
        dims = [cell[0] for cell in cells]
        self.records.append({"map": name, "batch": batch, "dims": dims, "growth": by_time,
                             "growth_of_work": by_work})
        return (f"| {name} | {ROWS[name][2]} | {by_work:.2f} | {batch:,} | {dims[0]}..{dims[-1]} | "
                f"{by_time:.2f} |")


def structures(table: Table, dims: list[int], batches: list[int]) -> None:
    table.say("## By structure\n\nMilliseconds without gradients, and megabytes. `vmap / ours` and "
              "`loop / ours` are ratios of times; ~ marks a loop that was timed on 16 rows. "
              "(vmap(jacrev) multiplies the unit vectors by the last layer once for all rows, "
              "which ours does for each: that is half of a product of the full map here.)\n")
    table.say("| map | D | batch | ours | vmap(jacrev) + slogdet | loop | vmap / ours | "
              "loop / ours | MB, ours | MB, vmap |\n|" + "---|" * 10)
    for name in ROWS:
        for batch in batches:
            for dim in dims:
                table.row(name, dim, batch)
    table.say("\n## Growth with D\n\nThe power of D in the arithmetic (counted at D = 256 to 1024, "
              "with 2/3 D^3 for an LU) and in the time (over the three largest sizes that were "
              "run). Claimed is the power for large D: a product with the "
              f"Jacobian of the full map is O({HIDDEN} D), whose D^2 part is the larger one up to "
              "D of some hundreds. Times below are overhead that does not grow, times above are "
              "tensors that outgrow the caches.\n")
    table.say("| map | claimed | arithmetic | batch | D | time |\n|" + "---|" * 6)
    for name in ROWS:
        for batch in batches:
            line = table.growth(name, batch)
            if line:
                table.say(line)


def ranks(table: Table, quick: bool) -> None:
    dim, batch = (256, 64) if quick else (512, 1024)
    table.say(f"\n## Growth with the rank M\n\nLow rank at D = {dim}, batch {batch}: O(D M^2).\n")
    table.say("| M | ms |\n|---|---|")
    sizes, times = (8, 16, 32, 64), []
    for size in sizes:
        module, x = ridges(dim, size).to(table.device), torch.randn(batch, dim).to(table.device)
        with torch.no_grad():
            times.append(seconds(partial(by_structure, "low-rank", module, x), 1.0))
        table.say(f"| {size} | {1e3 * times[-1]:.2f} |")
    power = slope(list(zip(sizes[1:], times[1:], strict=True)))
    table.records.append({"map": "low rank", "growth_with_rank": power})
    table.say(f"\nPower of M from {sizes[1]} to {sizes[-1]}: {power:.2f}, claimed 2.")


def modes(table: Table, quick: bool) -> None:
    """What the choice of ``mode="auto"`` rests on."""
    layers = {"network": Residual, "planar x8": partial(planar, num_layers=8),
              "IAF x2": partial(iaf, num_layers=2), "spline coupling x2": partial(nsf,
                                                                                  num_layers=2)}
    table.say("\n## Forward against reverse products\n\nMilliseconds of the full Jacobian's "
              "log-determinant, and with the gradient of its sum in all parameters.\n")
    table.say("| map | D | batch | reverse | forward | reverse, gradient | forward, gradient |\n|"
              + "---|" * 7)
    sizes = ((8, 64), (32, 16)) if quick else ((8, 1), (8, 1024), (64, 1), (64, 64), (64, 512),
                                               (256, 8))
    for name, make in layers.items():
        for dim, batch in sizes:
            torch.manual_seed(0)
            module = perturb(make(dim)).to(table.device)
            fn = module if name == "network" else lambda u, module=module: module(u)[0]
            x = torch.randn(batch, dim, device=table.device)
            cells = [mode_cell(fn, x, mode, gradient, table.options.budget)
                     for gradient in (False, True) for mode in ("reverse", "forward")]
            table.records.append({"map": name, "dim": dim, "batch": batch, "modes": cells})
            table.say(f"| {name} | {dim} | {batch} | "
                      + " | ".join(f"{1e3 * cell:,.2f}" for cell in cells) + " |")


def mode_cell(fn: Callable, x: Tensor, mode: str, gradient: bool, budget: float) -> float:
    def run() -> Tensor:
        with torch.set_grad_enabled(gradient):
            total = log_abs_det(fn, x, mode=mode).sum()
        if gradient:
            total.backward()
        return total
    return seconds(run, budget / 3)


# ------------------------------------------------------------------ memory

def in_fresh_process(dim: int, batch: int, bound: int | None, gradient: bool) -> dict:
    """Time and memory of one full log-determinant in a process that returns what it frees."""
    arguments = [str(dim), str(batch), str(bound or 0), str(int(gradient))]
    result = subprocess.run([sys.executable, __file__, "--process", *arguments], check=True,
                            capture_output=True, text=True,
                            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    return json.loads(result.stdout)


def process(dim: int, batch: int, bound: int, gradient: int) -> None:
    """What the fresh process does: once to load code, then with its peak reset."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, x = Residual(dim), torch.randn(batch, dim)

    def run() -> Tensor:
        with torch.set_grad_enabled(bool(gradient)):
            log_det = log_abs_det(module, x, max_bytes=bound or None)
        if gradient:
            log_det.sum().backward()
        return log_det
    run()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = memory_of_process("VmRSS"), time.perf_counter()
    run()
    row = {"seconds": time.perf_counter() - start,
           "process": memory_of_process("VmHWM") - before, "tensors": peak_bytes(run)}
    print(json.dumps(row))


def memory_of_process(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def bounds(table: Table, quick: bool) -> None:
    if table.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    table.say("\n## Under a bound\n\nThe full log-determinant in a fresh process (with the C "
              "library told to return what is freed): megabytes of the process, and of tensors as "
              "counted, beyond what was there. With a gradient, chunks are computed again.\n")
    table.say("| D | batch | gradient | bound, MB | process, MB | tensors, MB | ms |\n|"
              + "---|" * 7)
    dim, batch = (64, 256) if quick else (128, 1024)
    for gradient in (False, True):
        for bound in (None, 64 * 10**6, 16 * 10**6, 4 * 10**6):
            row = in_fresh_process(dim, batch, bound, gradient)
            table.records.append({"dim": dim, "batch": batch, "bound": bound,
                                  "gradient": gradient, **row})
            table.say(f"| {dim} | {batch} | {'yes' if gradient else 'no'} | "
                      f"{'none' if bound is None else bound // 10**6} | {row['process'] / 1e6:.1f} "
                      f"| {row['tensors'] / 1e6:.1f} | {1e3 * row['seconds']:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, in about a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, help="seconds of a run, above which it is skipped")
    parser.add_argument("--output", type=Path, default=RESULTS / "jacobian.md")
    parser.add_argument("--process", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        process(*options.process)
        return
    options.budget = options.budget or (0.3 if options.quick else 1.5)
    torch.set_num_threads(options.threads)
    table, start = Table(options), time.perf_counter()
    table.say("# Log-determinants by structure\n\nPrinted by `python benchmarks/jacobian.py"
              f"{' --quick' if options.quick else ''}`: torch {torch.__version__}, "
              f"{options.device}, {options.threads} thread(s), float32.\n")
    dims = [8, 32, 64, 128] if options.quick else [8, 16, 32, 64, 128, 256, 512]
    batches = [1, 64, 1024] if options.quick else [1, 64, 1024, 65_536]
    structures(table, dims, batches)
    ranks(table, options.quick)
    modes(table, options.quick)
    bounds(table, options.quick)
    table.say(f"\nAll of it took {time.perf_counter() - start:.0f} seconds.")
    options.output.write_text("\n".join(table.lines) + "\n")
    with open(options.output.with_suffix(".jsonl"), "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in table.records)


if __name__ == "__main__":
    main()
