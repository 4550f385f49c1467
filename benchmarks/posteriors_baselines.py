"""Pyro's own guides and NUTS on one posterior, for :mod:`posteriors`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import arviz
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

GUIDES: dict[str, Callable] = {
    "Pyro AutoNormal": AutoNormal, "Pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "Pyro AutoIAFNormal": AutoIAFNormal, "Pyro AutoLaplaceApproximation": AutoLaplaceApproximation}
METHODS = [*GUIDES, "Pyro NUTS"]
STEPS, LR = 2000, 1e-2
WARM_UP, SAMPLES = 1000, 1000
NUM_DRAWS = 10_000
CHUNK = 500  # draws at a time


@dataclass
class Problem:
    """A posterior to fit.

    Attributes:
        name: Its name.
        family: Posteriors of one model count as one family.
        density: The log joint on flat unconstrained coordinates.
        reference: Draws by name.
        latents: Draws of the latent sites.
        floor: Errors of independent draws.
    """

    name: str
    family: str
    model: Callable
    args: tuple
    kwargs: dict
    density: Any
    reference: dict[str, np.ndarray]
    latents: Callable[[], dict[str, np.ndarray]]
    floor: dict[str, float]


@dataclass
class Result:
    """What a method found.

    Attributes:
        draws: Draws by name of site.
        log_ratios: Log of joint over guide density, if there is a guide.
        row: What else there is to say.
    """

    draws: dict[str, np.ndarray]
    log_ratios: np.ndarray | None
    row: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def __call__(self) -> dict[str, float]:
        """Of this process, and by the clock on the wall."""
        return {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}


def fit(problem: Problem, method: str, seed: int, cap: float) -> Result:
    """Fit by one of :data:`METHODS`."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return nuts(problem, cap) if method == "Pyro NUTS" else guide(problem, method)


# ---------------------------------------------------------------------- guides


def guide(problem: Problem, method: str) -> Result:
    """A guide at its defaults: 2,000 steps of Adam at 1e-2."""
    clock, args, kwargs = Clock(), problem.args, problem.kwargs
    fitted = GUIDES[method](problem.model)
    svi = SVI(problem.model, fitted, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(*args, **kwargs)
    if method == "Pyro AutoLaplaceApproximation":
        fitted = fitted.laplace_approximation(*args, **kwargs)
    row = {**clock(), "gradients": STEPS}
    with torch.no_grad():
        z, log_q = drawn(fitted)
    if not z.isfinite().all():
        raise ValueError("draws of the guide are not finite")
    log_ratios = log_prob(problem.density, z) - log_q
    return Result(quantities(problem.density, z), log_ratios.numpy(), row)


def drawn(fitted: Any) -> tuple[Tensor, Tensor]:
    """Flat unconstrained draws of a guide and their log density."""
    if isinstance(fitted, AutoNormal):
        pairs = [fitted._get_loc_and_scale(name)
                 for name, _ in fitted.prototype_trace.iter_stochastic_nodes()]
        loc, scale = (torch.cat([part.reshape(-1) for part in parts])
                      for parts in zip(*pairs, strict=True))
        posterior = pyro.distributions.Normal(loc, scale).to_event(1)
    else:
        posterior = fitted.get_posterior()
    z = posterior.rsample((NUM_DRAWS,))
    return z, posterior.log_prob(z)


@torch.no_grad()
def log_prob(density: Any, z: Tensor) -> Tensor:
    """Log joint of draws; nan where it cannot be computed."""
    if len(z) > CHUNK:
        return torch.cat([log_prob(density, part) for part in z.split(CHUNK)])
    try:
        return density.log_prob(z)
    except (ValueError, RuntimeError):  # a matrix without a factor, a parameter out of its range
        if len(z) == 1:
            return z.new_full((1,), torch.nan)
        return torch.cat([log_prob(density, half) for half in z.tensor_split(2)])


@torch.no_grad()
def quantities(density: Any, z: Tensor) -> dict[str, np.ndarray]:
    """Latent and deterministic sites of flat unconstrained draws."""
    parts = [density.constrain(part) for part in z.split(CHUNK)]
    try:
        parts = [density.quantities(part) for part in parts]
    except (ValueError, RuntimeError):  # not computable for some: the latents have to do
        parts = [{name: value.numpy() for name, value in part.items()} for part in parts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------------- NUTS


class Capped(Exception):
    """Time is up."""


def nuts(problem: Problem, cap: float) -> Result:
    """One chain, stopped after so many seconds of processor time."""
    clock, count, kept = Clock(), {"Warmup": 0, "Sample": 0}, []
    capped = False

    def hook(kernel: Any, z: dict[str, Tensor], stage: str, step: int) -> None:
        name = "Sample" if stage.startswith("Sample") else "Warmup"
        count[name] += 1
        if name == "Sample":
            kept.append({site: value.detach().clone() for site, value in z.items()})
        if clock()["cpu"] > cap:
            raise Capped
    kernel = NUTS(problem.model, jit_compile=True, ignore_jit_warnings=True)
    try:
        MCMC(kernel, SAMPLES, WARM_UP, hook_fn=hook, disable_progbar=True).run(
            *problem.args, **problem.kwargs)
    except Capped:
        capped = len(kept) < SAMPLES
    row: dict[str, Any] = {**clock(), "capped": capped, "warm_up": count["Warmup"],
                           "samples": count["Sample"]}
    if len(kept) < 100:  # too few to say anything
        return Result({}, None, row)
    z = torch.stack(list(flat(kept, list(problem.density.sites))))
    draws = quantities(problem.density, z)
    row["ess_bulk"] = min(float(size) for name in draws for size in
                          bulk_ess(draws[name].reshape(len(kept), -1)))
    row["divergences"] = len(getattr(kernel, "_divergences", []))
    return Result(draws, None, row)


def flat(kept: list[dict[str, Tensor]], names: list[str]) -> Iterator[Tensor]:
    """Unconstrained draws as vectors, sites in the order of the density."""
    for z in kept:
        yield torch.cat([z[name].reshape(-1) for name in names])


def bulk_ess(columns: np.ndarray) -> np.ndarray:
    """Of each column of one chain; of numbers that are the same in all draws there is none."""
    moving = columns[:, np.ptp(columns, 0) > 0]
    return np.array([arviz.ess(column[None], method="bulk") for column in moving.T])
