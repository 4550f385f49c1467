"""A user's script as mypy --strict sees it: public names have types, none of them Any.

It is not run: :mod:`test_release` has mypy read it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from typing_extensions import assert_type

import pyro_nfvi
from pyro_nfvi import (
    NFVI,
    AutoFlow,
    AutoIAF,
    Calibration,
    CompiledTrace_ELBO,
    FittedFlow,
    Posterior,
    calibrate,
    fit_density,
    iaf,
    nsf,
)
from pyro_nfvi.diagnostics import Report, Summary
from pyro_nfvi.engine import Engine
from pyro_nfvi.flows import Compose, Flow
from pyro_nfvi.vae import VAE, Bernoulli


def model(y: torch.Tensor) -> None:
    """Any model."""


def fit() -> Posterior:
    """From a model to a posterior, and what it offers."""
    posterior = NFVI(model, AutoIAF(model), num_steps=10, seed=0).run(torch.zeros(3))
    assert_type(posterior, Posterior)
    assert_type(posterior.pareto_k, float)
    assert_type(posterior.elbo, tuple[float, float])
    assert_type(posterior.engine, Engine | None)
    assert_type(posterior.resample(3), dict[str, torch.Tensor])
    assert_type(posterior.summary(), Summary)
    assert_type(posterior.summary().trusted, bool)
    assert_type(posterior.diagnose(), Report)
    assert_type(Posterior.load("fit.pt", model), Posterior)
    return posterior


def others() -> None:
    """Flows, guides and the rest."""
    assert_type(pyro_nfvi.NFVI(model), NFVI)
    assert_type(AutoFlow(model, nsf), AutoFlow)
    assert_type(iaf(3), Compose)
    assert_type(Flow(nsf(2)).rsample_and_log_prob((3,)), tuple[torch.Tensor, torch.Tensor])
    assert_type(fit_density(nsf, samples=torch.zeros(9, 2)), FittedFlow)
    assert_type(calibrate(model, NFVI(model), torch.zeros(3)), Calibration)
    assert_type(CompiledTrace_ELBO(), CompiledTrace_ELBO)
    assert_type(VAE(Bernoulli((8, 8)), latent_dim=2), VAE)
    recipe: Callable[[int], Compose] = nsf
    assert_type(recipe(2), Compose)
