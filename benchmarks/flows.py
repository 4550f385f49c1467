"""Sampling and scoring a flow, against the same flow of other libraries, side by side.

One row times ``z, log q(z)`` for a batch of fresh noise (forward) and the gradient of a loss of
both in all parameters (backward). Rounds of all libraries are interleaved in one process, and
the median over rounds is shown, so that a busy machine slows every column alike.

    python benchmarks/flows.py [--threads 1] [--rounds 30] [--only "IAF x2"]

Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from tables import installed
from torch import Tensor, nn

from pyro_nfvi.flows import Flow, iaf, nsf, planar

if installed("normflows"):
    import normflows
if installed("zuko"):
    import zuko

BINS = 8
Sampler = Callable[[int], tuple[Tensor, Tensor]]


def hidden(dim: int) -> tuple[int, int]:
    """Hidden layers of every conditioner; Pyro wants them at least as wide as the input."""
    return (64, 64) if dim <= 64 else (128, 128)


def ours(recipe: Callable, dim: int) -> tuple[nn.Module, Sampler]:
    """pyro_nfvi: one pass gives the draw and its density."""
    options = {} if recipe.func is planar else {"hidden_dims": hidden(dim),
                                                    "activation": nn.ReLU}
    flow = Flow(recipe(dim, **options))
    return flow, lambda batch: flow.rsample_and_log_prob((batch,))


def pyro_twin(make: Callable, dim: int) -> tuple[nn.Module, Sampler]:
    """Pyro: the draw, then its density from the transforms' caches."""
    layers = nn.ModuleList(make(dim))
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)

    def sample(batch: int) -> tuple[Tensor, Tensor]:
        flow = dist.TransformedDistribution(base, list(layers))
        z = flow.rsample((batch,))
        return z, flow.log_prob(z)
    return layers, sample


def zuko_twin(make: Callable, dim: int) -> tuple[nn.Module, Sampler]:
    """Zuko: layers inverted where their fast direction is the density."""
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True)
    flow = zuko.lazy.Flow([zuko.lazy.LazyInverse(layer) for layer in make(dim)], base)
    return flow, lambda batch: flow().rsample_and_log_prob((batch,))


def normflows_twin(make: Callable, dim: int) -> tuple[nn.Module, Sampler]:
    """normflows: its own sample-and-score."""
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False),
                                     make(dim))
    return flow, flow.sample


def pyro_iaf(dim: int) -> list:
    return [T.affine_autoregressive(dim, hidden_dims=list(hidden(dim))) for _ in range(2)]


def pyro_nsf(dim: int) -> list:
    return [T.spline_coupling(dim, hidden_dims=list(hidden(dim)), count_bins=BINS, bound=5.0)
            for _ in range(4)]


def zuko_iaf(dim: int) -> list:
    return [zuko.flows.MaskedAutoregressiveTransform(
        dim, hidden_features=hidden(dim), order=torch.arange(dim) if k % 2 else
        torch.arange(dim).flip(0)) for k in range(2)]


def zuko_nsf(dim: int) -> list:
    univariate = zuko.transforms.MonotonicRQSTransform
    return [zuko.flows.GeneralCouplingTransform(
        dim, mask=torch.arange(dim) % 2 == k % 2, univariate=univariate,
        shapes=[(BINS,), (BINS,), (BINS - 1,)], hidden_features=hidden(dim)) for k in range(4)]


def normflows_iaf(dim: int) -> list:
    return [normflows.flows.MaskedAffineAutoregressive(
        dim, hidden(dim)[0], num_blocks=2, use_residual_blocks=False) for _ in range(2)]


def normflows_nsf(dim: int) -> list:
    return [normflows.flows.CoupledRationalQuadraticSpline(
        dim, 1, hidden(dim)[0], num_bins=BINS, tail_bound=5.0, reverse_mask=k % 2 == 1)
        for k in range(4)]


PACKAGES = {"pyro_nfvi": "pyro-nfvi", "pyro": "pyro-ppl", "zuko": "zuko", "normflows": "normflows"}
LIBRARIES = [name for name, package in PACKAGES.items() if installed(package)]
FLOWS: dict[str, dict[str, Callable[[int], tuple[nn.Module, Sampler]]]] = {
    "planar x8": {
        "pyro_nfvi": partial(ours, partial(planar, num_layers=8)),
        "pyro": partial(pyro_twin, lambda d: [T.planar(d) for _ in range(8)]),
        "normflows": partial(normflows_twin,
                             lambda d: [normflows.flows.Planar((d,)) for _ in range(8)]),
    },
    "IAF x2": {
        "pyro_nfvi": partial(ours, partial(iaf, num_layers=2)),
        "pyro": partial(pyro_twin, pyro_iaf),
        "zuko": partial(zuko_twin, zuko_iaf),
        "normflows": partial(normflows_twin, normflows_iaf),
    },
    "spline coupling x4": {
        "pyro_nfvi": partial(ours, partial(nsf, num_layers=4, num_bins=BINS)),
        "pyro": partial(pyro_twin, pyro_nsf),
        "zuko": partial(zuko_twin, zuko_nsf),
        "normflows": partial(normflows_twin, normflows_nsf),
    },
}


def step(module: nn.Module, sample: Sampler, batch: int) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    module.zero_grad()
    start = time.perf_counter()
    z, log_q = sample(batch)
    middle = time.perf_counter()
    (log_q.mean() + z.square().mean()).backward()
    return middle - start, time.perf_counter() - middle


def row(twins: dict[str, Callable], dim: int, batch: int, rounds: int
        ) -> dict[str, tuple[float, float]]:
    """Median microseconds forward and backward of every library, rounds interleaved."""
    built = {name: make(dim) for name, make in twins.items() if name in LIBRARIES}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    for k in range(rounds + 3):
        for name, (module, sample) in built.items():
            seconds = [step(module, sample, batch) for _ in range(2)]
            times[name] += seconds if k >= 3 else []
    return {name: tuple(1e6 * statistics.median(column) for column in zip(*values, strict=True))
            for name, values in times.items()}


def cell(times: tuple[float, float] | None) -> str:
    """A table cell: forward + backward = total."""
    return "-" if times is None else f"{times[0]:,.0f} + {times[1]:,.0f} = {sum(times):,.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=list(FLOWS), help="one flow only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    names = list(LIBRARIES)
    print(f"Microseconds forward + backward = total; torch {torch.__version__}, "
          f"{options.threads} thread(s), float32, median of {2 * options.rounds}.\n")
    print("| flow | D | batch | " + " | ".join(names) + " | fastest peer / ours |")
    print("|---|---|---|" + "---|" * (len(names) + 1))
    chosen = {options.only: FLOWS[options.only]} if options.only else FLOWS
    for flow, twins in chosen.items():
        for dim in (10, 100):
            for batch in (64, 4096):
                times = row(twins, dim, batch, options.rounds)
                totals = {name: sum(pair) for name, pair in times.items()}
                ratio = min(v for k, v in totals.items() if k != "pyro_nfvi") / totals["pyro_nfvi"]
                print(f"| {flow} | {dim} | {batch} | " + " | ".join(
                    cell(times.get(name)) for name in names) + f" | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
