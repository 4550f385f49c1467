"""A posterior in the shape of a banana, whose evidence is known, and fits of it by both doors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_nfvi import NFVI, AutoFlow, Posterior


def banana() -> None:
    """The datum says where the second latent is, once the first is known."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    pyro.sample("obs", dist.Normal(y - x * x, 0.3), obs=torch.tensor(0.5))


def log_evidence() -> float:
    """By the trapezoid rule over the first latent; the second is Gaussian given it."""
    x = torch.linspace(-8, 8, 20_001).double()
    spread = (9 + 0.3**2) ** 0.5
    density = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(-x * x, spread).log_prob(
        torch.tensor(0.5))
    return float(torch.trapezoid(density.exp(), x).log())


def fitted(recipe: Callable, num_steps: int = 300, num_particles: int = 64) -> Posterior:
    """By the fit engine."""
    return NFVI(banana, AutoFlow(banana, recipe), num_steps=num_steps, progress=False,
                num_particles=num_particles).run()


def elbo_at_the_end(posterior: Posterior) -> float:
    """Mean over the last steps."""
    return statistics.fmean(posterior.history.elbo[-20:])


def elbo_by_svi(recipe: Callable, num_steps: int = 300, lr: float = 0.05) -> float:
    """ELBO that Pyro's own loop reaches."""
    guide = AutoFlow(banana, recipe)
    rate = {"lr": lr, "lrd": 0.1 ** (1 / num_steps)}
    svi = SVI(banana, guide, pyro.optim.ClippedAdam(rate),
              Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(num_steps):
        svi.step()
    with torch.no_grad():
        return -Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(banana, guide)
