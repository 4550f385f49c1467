"""How often a diagnosis is right: failures that must be flagged, good fits that must not be.

    python benchmarks/verdicts.py [--seeds 5]

Prints one row for each case: how many fits were flagged, over seeds, and by which checks.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_breast_cancer
from torch.distributions import constraints

from pyro_nfvi import NFVI, AutoFlow, CompiledTrace_ELBO, Posterior, planar

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SPREAD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


# ---------------------------------------------------------------------- models

def funnel() -> None:
    """Neal's funnel: the scale of nine latents is a tenth."""
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, (log_scale / 2).exp()))


def two_modes() -> None:
    """Two modes, twenty standard deviations apart."""
    x = pyro.sample("x", dist.Normal(0.0, 20.0).expand([2]).to_event(1))
    pair = torch.stack([torch.full((2,), -10.0), torch.full((2,), 10.0)])
    pyro.factor("modes", torch.logsumexp(dist.Normal(pair, 1.0).log_prob(x).sum(-1), 0))


def positive(y: torch.Tensor) -> None:
    """A rate, which is positive, about which the data say little."""
    rate = pyro.sample("rate", dist.Exponential(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """Linear regression."""
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0).expand([x.shape[-1]]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def correlated() -> None:
    """A Gaussian whose ten coordinates are correlated by 0.95."""
    covariance = 0.05 * torch.eye(10) + 0.95
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(10), covariance))


def eight_schools(spread: torch.Tensor, effect: torch.Tensor) -> None:
    """Eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, spread), obs=effect)


def logistic(x: torch.Tensor, y: torch.Tensor) -> None:
    """Logistic regression."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def banana() -> None:
    """A bent Gaussian."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a ** 2, 0.5))


def mixed(y: torch.Tensor) -> None:
    """Latents of several supports."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate * (1 + share[0])), obs=y)


# ---------------------------------------------------------------------- fits

def by_svi(model: Callable, guide: Callable, *args: Any, num_steps: int = 1000, lr: float = 0.02
           ) -> Posterior:
    """A guide fitted by Pyro's SVI."""
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr}), CompiledTrace_ELBO(num_particles=8))
    for _ in range(num_steps):
        svi.step(*args)
    return Posterior.of(model, guide, *args)


def by_nfvi(model: Callable, *args: Any, seed: int, **options: Any) -> Posterior:
    """A fit of this library's."""
    return NFVI(model, seed=seed, progress=False, **options).run(*args)


def on_one_mode(seed: int) -> Posterior:
    """A Gaussian that has found one mode of two."""
    start = {"x": torch.full((2,), 10.0)}
    guide = AutoMultivariateNormal(two_modes, init_scale=1.0, init_loc_fn=lambda site: start[
        site["name"]])
    return by_svi(two_modes, guide)


def over_both_sides(y: torch.Tensor) -> None:
    """A guide whose values may be negative, for a rate."""
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("rate", dist.Normal(loc, scale))


def on_one_side() -> None:
    """A guide whose values are positive, for a latent that is not."""
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("two", 2):
        pyro.sample("x", dist.LogNormal(loc, 0.5))


def two_latents() -> None:
    """Two standard normal latents."""
    with pyro.plate("two", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def rows(seed: int, dim: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Data of a linear regression."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(50, dim, generator=noise)
    return x, x.sum(-1) + torch.randn(50, generator=noise)


def cancer() -> tuple[torch.Tensor, torch.Tensor]:
    """Breast cancer, ten standardized columns."""
    data = load_breast_cancer()
    x = torch.tensor(data.data[:, :10], dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(data.target, dtype=torch.float32)


COUNTS = torch.tensor([0.0, 1.0, 0.0])
FAILURES: dict[str, Callable[[int], Posterior]] = {
    "funnel, mean-field": lambda seed: by_svi(funnel, AutoNormal(funnel)),
    "funnel, NFVI of a planar flow": lambda seed: by_nfvi(
        funnel, seed=seed, guide=AutoFlow(funnel, planar, num_layers=1), num_steps=300),
    "two modes, one found": on_one_mode,
    "support too wide": lambda seed: Posterior.of(positive, over_both_sides, COUNTS),
    "support too narrow": lambda seed: Posterior.of(two_latents, on_one_side),
    "under-trained, mean-field": lambda seed: by_svi(
        regression, AutoNormal(regression), *rows(seed), num_steps=30),
    "under-trained, flow by SVI": lambda seed: by_svi(
        eight_schools, AutoFlow(eight_schools), SPREAD, EFFECT, num_steps=30),
    "correlated, mean-field": lambda seed: by_svi(correlated, AutoNormal(correlated)),
    "point estimate": lambda seed: by_svi(regression, AutoDelta(regression), *rows(seed)),
}
GOOD: dict[str, Callable[[int], Posterior]] = {
    "linear regression": lambda seed: by_nfvi(regression, *rows(seed), seed=seed),
    "eight schools": lambda seed: by_nfvi(eight_schools, SPREAD, EFFECT, seed=seed),
    "breast cancer": lambda seed: by_nfvi(logistic, *cancer(), seed=seed),
    "correlated": lambda seed: by_nfvi(correlated, seed=seed),
    "two modes": lambda seed: by_nfvi(two_modes, seed=seed),
    "banana": lambda seed: by_nfvi(banana, seed=seed),
    "simplex and rate": lambda seed: by_nfvi(mixed, COUNTS + 2, seed=seed),
    "regression, Gaussian by SVI": lambda seed: by_svi(
        regression, AutoMultivariateNormal(regression, init_scale=0.1), *rows(seed),
        num_steps=3000, lr=0.01),
}


def table(cases: dict[str, Callable[[int], Posterior]], seeds: int) -> tuple[int, int]:
    """Print a row for each case; how many were flagged, of how many."""
    flagged = 0
    for name, fit in cases.items():
        checks: Counter[str] = Counter()
        number, start = 0, time.perf_counter()
        for seed in range(seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            report = fit(seed).diagnose(progress=False)
            number += not report.trusted
            checks.update(check.name for check in report.failures)
        flagged += number
        reasons = ", ".join(f"{check} {count}" for check, count in checks.items())
        print(f"| {name} | {number}/{seeds} | {reasons or '-'} | "
              f"{(time.perf_counter() - start) / seeds:.1f} s |", flush=True)
    return flagged, seeds * len(cases)


def main() -> None:
    """Print both tables and the two rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    warnings.filterwarnings("ignore")
    head = "| case | flagged | failed checks | time of a fit and its diagnosis |\n|---|---|---|---|"
    print(f"Failures:\n\n{head}")
    found, failures = table(FAILURES, seeds)
    print(f"\nGood fits:\n\n{head}")
    alarms, good = table(GOOD, seeds)
    print(f"\nFailures flagged: {found} of {failures} (should be all). "
          f"Good fits flagged: {alarms} of {good} (should be at most 1 in 20).")


if __name__ == "__main__":
    main()
