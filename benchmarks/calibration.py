"""Simulation-based calibration of exact, wrong and fitted posteriors.

    python benchmarks/calibration.py               # posteriors right and wrong on purpose, seconds
    python benchmarks/calibration.py --refit nfvi mean-field --simulations 100 --jobs 2   # minutes

The first model is conjugate, so its posterior is known: a mean with a normal prior and five
observations. The exact posterior ought to pass, four wrong ones ought not to: too narrow, too wide,
shifted, and the prior itself, which ranks of the mean cannot tell but those of the log-likelihood
do. Then NFVI and Pyro's mean-field guide are refitted to each data set of a regression, in parallel
processes. Results are kept in results/calibration.jsonl, the latest of each case, and shown in
results/calibration.md; the first kind writes two pictures too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_nfvi import NFVI, Calibration, calibrate

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "calibration.jsonl"
Y = torch.zeros(5)
PRECISION = 1.0 + len(Y)


def conjugate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior(scale: float = 1.0, shift: float = 0.0) -> Callable:
    """The exact posterior, or one with another scale or location, in its standard deviations."""
    deviation = PRECISION ** -0.5

    def guide(y: Tensor) -> None:
        loc = y.sum() / PRECISION + shift * deviation
        pyro.sample("mu", dist.Normal(loc, scale * deviation))
    return guide


def prior(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(1e-4 * y.sum(), 1.0))


def log_likelihood(values: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    mu = values["mu"].unsqueeze(-1)
    return {"log_likelihood": dist.Normal(mu, 1.0).log_prob(data["y"]).sum(-1)}


def regression(x: Tensor, y: Tensor) -> None:
    """Intercept and slope, correlated in the posterior: a mean-field guide is too narrow."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 1.0), obs=y)


def mean_field(model: Callable, *args: Tensor) -> AutoNormal:
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.98}),
              Trace_ELBO(32, max_plate_nesting=1, vectorize_particles=True))
    for _ in range(200):
        svi.step(*args)
    return guide


def timed(name: str, *args: Any, **options: Any) -> Calibration:
    """Calibrate, print, and keep what the table shows."""
    start = time.perf_counter()
    calibration = calibrate(*args, seed=0, **options)
    seconds = time.perf_counter() - start
    print(f"\n{name}, {seconds:.0f} s\n{calibration}")
    summary = calibration.summary().reset_index(names="number").to_dict("records")
    keep({"case": name, "simulations": calibration.num_simulations,
          "failures": len(calibration.failures), "seconds": round(seconds, 1), "rows": summary})
    return calibration


def exact_and_wrong() -> dict[str, Calibration]:
    cases = {"exact": posterior(), "too narrow (0.6)": posterior(scale=0.6),
             "too wide (1.6)": posterior(scale=1.6), "shifted (0.5)": posterior(shift=0.5),
             "the prior": prior}
    return {name: timed(name, conjugate, guide, Y, amortized=True, progress=False,
                        quantities_fn=log_likelihood) for name, guide in cases.items()}


def refit(kind: str, num_simulations: int, n_jobs: int) -> None:
    name, fit = {"nfvi": ("NFVI", NFVI(regression)),
                 "mean-field": ("Pyro's AutoNormal", mean_field)}[kind]
    timed(name, regression, fit, torch.linspace(1.0, 3.0, 12), torch.zeros(12),
          num_simulations=num_simulations, n_jobs=n_jobs)


def kept() -> dict[str, dict[str, Any]]:
    """What is known of each case, in order."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    return {record["case"]: record for record in map(json.loads, lines)}


def keep(record: dict[str, Any]) -> None:
    records = {**kept(), record["case"]: record}
    KEPT.write_text("".join(f"{json.dumps(each)}\n" for each in records.values()))


def table() -> str:
    rows = ["| posterior | simulations | number | p | VSBC p | mean rank | 50% central "
            "| 90% central | 90% HDI | its draws are |", "|" + "---|" * 10]
    rows += [f"| {each['case']} | {each['simulations']} | {row['number']} | {row['p_value']:.2g} | "
             f"{row['vsbc_p_value']:.2g} | {row['mean_rank']:.2f} | {row['central_50']:.2f} | "
             f"{row['central_90']:.2f} | {row['hdi_90']:.2f} | {row['draws']} |"
             for each in kept().values() for row in each["rows"]]
    return "\n".join(rows)


def pictures(results: dict[str, Calibration]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    for method in ("plot_ecdf", "plot_coverage"):
        figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained")
        panels = [*((name, "mu") for name in results), ("the prior", "log_likelihood")]
        for ax, (name, site) in zip(axes.ravel(), panels, strict=True):
            getattr(results[name], method)(site, axes=ax)
            ax.set_title(name if site == "mu" else f"{name}, log-likelihood")
        path = RESULTS / f"calibration_{method.removeprefix('plot_')}.png"
        figure.savefig(path, dpi=80)
        Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)  # a third in size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refit", nargs="+", choices=["nfvi", "mean-field"], default=[])
    parser.add_argument("--simulations", type=int, default=100, help="of each refit")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    for kind in options.refit:
        refit(kind, options.simulations, options.jobs)
    if not options.refit:
        pictures(exact_and_wrong())
    text = ("# Simulation-based calibration\n\nBy `benchmarks/calibration.py`: p-values of "
            "uniform ranks and of their symmetry (VSBC), and coverage of intervals. Posteriors of "
            "a conjugate model that are right or wrong on purpose, then refits of a regression.\n\n"
            f"{table()}\n\n![ranks](calibration_ecdf.png)\n![coverage](calibration_coverage.png)\n")
    (RESULTS / "calibration.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
