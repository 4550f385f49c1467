"""What every recipe costs: drawing, scoring any point, and its parameters.

Forward is a batch of draws with their log-densities (the sampling direction), inverse the
log-density of as many given points (the density direction), each without a gradient. The last two
columns are a step of training, as the flow itself computes it, not compiled: with the gradient in
all parameters of what is drawn and scored (variational inference, a density), and of the likelihood
of given points (data). Recipes are found by looking: functions of pyro_nfvi.flows that take
(input_dim, context_dim, *, num_layers). A cell is the median over rounds, in microseconds of
processor time; all recipes take turns within a round, so that a busy machine slows every row alike.

    python benchmarks/flow_costs.py [--dims 2 16 64] [--batch 256] [--rounds 9] [--only nsf maf]
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pyro_nfvi import flows
from pyro_nfvi.flows import Bijection, Flow

LIMIT = 0.5  # seconds that a call may take before it is not repeated
Times = dict[str, list[float]]  # direction -> seconds


def recipes() -> dict[str, Callable[..., Bijection]]:
    """Every recipe of the package, by name."""
    found = {}
    for name in flows.__all__:
        function = getattr(flows, name)
        if inspect.isfunction(function):
            parameters = list(inspect.signature(function).parameters)
            if parameters[:2] == ["input_dim", "context_dim"] and "num_layers" in parameters:
                found[name] = function
    return found


def built(recipe: Callable[..., Bijection], dim: int) -> Flow | str:
    """The flow with the recipe's defaults, away from the identity, or why there is none."""
    torch.manual_seed(0)
    try:
        flow = Flow(recipe(dim))
    except (ValueError, NotImplementedError) as error:
        return str(error).split(". ")[0]
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return flow


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()  # of the processor: others may be at work
    call()
    return time.process_time() - start


def calls(flow: Flow, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by the name of its column."""
    u = flow.base.rsample((batch,)).detach()
    z = flow.bijection(u)[0].detach()

    @torch.no_grad()
    def forward() -> object:
        return flow.bijection(u)

    @torch.no_grad()
    def inverse() -> object:
        return flow.log_prob(z)

    def by_draws() -> object:
        flow.zero_grad()
        x, log_q = flow.rsample_and_log_prob((batch,))
        return (log_q.mean() + x.square().mean()).backward()

    def by_data() -> object:
        flow.zero_grad()
        return flow.log_prob(z).mean().backward()
    return {"forward": forward, "inverse": inverse, "by draws": by_draws, "by data": by_data}


def measured(timed: dict[str, dict[str, Callable[[], object]]], rounds: int) -> dict[str, Times]:
    """Seconds of each call of each recipe, all taking turns; slow ones are called once."""
    times: dict[str, Times] = {name: {column: [seconds(call)] for column, call in columns.items()}
                               for name, columns in timed.items()}  # also warms up
    for _ in range(rounds):
        for name, columns in timed.items():
            for column, call in columns.items():
                if times[name][column][0] < LIMIT:
                    times[name][column].append(seconds(call))
    return {name: {column: values[1:] or values for column, values in columns.items()}
            for name, columns in times.items()}


def count(flow: nn.Module) -> int:
    return sum(parameter.numel() for parameter in flow.parameters() if parameter.requires_grad)


def main() -> None:
    """Print a table for each number of coordinates."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 16, 64])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(recipes()), default=list(recipes()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Microseconds of processor time for a batch of {options.batch}; torch "
          f"{torch.__version__}, 1 thread, float32, recipes with their defaults.")
    for dim in options.dims:
        built_flows = {name: built(recipes()[name], dim) for name in options.only}
        usable = {name: flow for name, flow in built_flows.items() if isinstance(flow, Flow)}
        times = measured({name: calls(flow, options.batch) for name, flow in usable.items()},
                         options.rounds)
        print(f"\nD = {dim}\n\n| recipe | parameters | forward | inverse | step by draws | "
              "step by data |\n|---|---|---|---|---|---|")
        for name, flow in built_flows.items():
            if isinstance(flow, str):
                print(f"| {name} | {flow} | | | | |")
                continue
            cells = [f"{1e6 * statistics.median(values):,.0f}" for values in times[name].values()]
            print(f"| {name} | {count(flow):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
