"""How good a VAE is: log p(x) by importance weights, latents in use, the amortization gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_float, check_positive_int, type_name
from pyro_nfvi.inference.amortization import AmortizationGap, reoptimize
from pyro_nfvi.vae.data import Data
from pyro_nfvi.vae.objective import elbo_terms

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE

BATCH_SIZE = 500  # data at a time
SAMPLES_AT_ONCE = 10  # of each of them
ACTIVE = 0.01  # variance over the data from which a latent counts as used
MEAN_DRAWS = 64


@dataclass(frozen=True)
class LogLikelihood:
    """Importance-weighted estimate of the log-likelihood, in nats.

    Attributes:
        values: Of each datum.
        standard_errors: Of those, by the delta method.
        num_dims: Numbers in a datum, of those that were seen.
        discrete: Whether these are probabilities, so that bits are what it takes to store them.

    Example:
        >>> LogLikelihood(torch.tensor([-80.0, -82.0]), torch.tensor([0.1, 0.1]), num_dims=784.0)
        LogLikelihood(-81.000 +- 0.071 nats a datum, 0.1491 bits a dimension, 2 data)
    """

    values: Tensor
    standard_errors: Tensor
    num_dims: float
    discrete: bool = True

    @property
    def mean(self) -> float:
        """Mean over the data."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """Monte Carlo error of the mean, for these data."""
        return self.standard_errors.square().sum().sqrt().item() / len(self.values)

    @property
    def bits_per_dim(self) -> float:
        """Bits it takes to store each number of the data, if these are discrete."""
        return bits_per_dim(self.mean, self.num_dims)

    def __repr__(self) -> str:
        bits = f"{self.bits_per_dim:.4f} bits a dimension, " if self.discrete else ""
        return (f"LogLikelihood({self.mean:.3f} +- {self.standard_error:.3f} nats a datum, "
                f"{bits}{len(self.values)} data)")


def bits_per_dim(nats: float, num_dims: float) -> float:
    r"""Bits a dimension: :math:`-\log p(x) / (D \log 2)`.

    Raises:
        ValueError: If an argument is no number, or there is no dimension.

    Example:
        >>> round(bits_per_dim(-64 * math.log(2), 64), 6)
        1.0
    """
    if not isinstance(nats, (int, float, np.number, Tensor)):
        raise ValueError(f"bits_per_dim expected `nats` to be a number, got {type_name(nats)}.")
    check_positive_float("bits_per_dim", "num_dims", num_dims)
    return -nats / (num_dims * math.log(2))


@torch.no_grad()
def log_likelihood(vae: VAE, data: Data, num_samples: int) -> LogLikelihood:
    """Importance-weighted estimate of log p(x): :meth:`~pyro_nfvi.vae.VAE.log_likelihood`."""
    check_positive_int("VAE.log_likelihood", "num_samples", num_samples, minimum=2)

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        posterior, prior = vae.posterior_of(x, mask), vae.prior(vae.posterior_of)

        def log_weights(count: int) -> Tensor:
            z = posterior.rsample((count,))
            log_joint = vae.likelihood_at(z, mask).log_prob(x) + prior.log_prob(z)
            return log_joint - posterior.log_prob(z)
        log_w = torch.cat([log_weights(len(part)) for part in
                           torch.arange(num_samples).split(SAMPLES_AT_ONCE)]).double()
        value = log_w.logsumexp(0) - math.log(num_samples)
        spread = (log_w - value).exp().std(0) / math.sqrt(num_samples)
        return torch.stack([value, spread], -1)
    with pyro.validation_enabled(False), evaluating(vae):
        both = by_batches(of_batch, data)
    num_seen = vae.event_shape.numel() if data[1] is None else int(data[1].sum()) / len(both)
    return LogLikelihood(both[:, 0], both[:, 1], num_seen, vae.likelihood.discrete)


@torch.no_grad()
def active_units(vae: VAE, data: Data) -> Tensor:
    """Which latents depend on the data: :meth:`~pyro_nfvi.vae.VAE.active_units`."""
    if len(data[0]) < 2:
        raise ValueError("VAE.active_units expected at least two data, got one.")

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.stack(torch.var_mean(vae.posterior_of(x, mask).sample((MEAN_DRAWS,)), 0), 1)
    with pyro.validation_enabled(False), evaluating(vae):
        variances, means = by_batches(of_batch, data).unbind(1)
    return means.var(0) - variances.mean(0) / MEAN_DRAWS > ACTIVE


def amortization_gap(vae: VAE, data: Data, *, num_steps: int, lr: float, num_particles: int,
                     seed: int | None) -> AmortizationGap:
    """What the encoder loses: :meth:`~pyro_nfvi.vae.VAE.amortization_gap`."""

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        def elbo(features: Tensor, count: int) -> Tensor:
            fit, divergence = elbo_terms(vae, x, mask, count, features)
            return fit - divergence.sum(-1)
        with torch.no_grad():
            features = vae.features(x, mask)
        gap = reoptimize(elbo, features, num_steps=num_steps, lr=lr, num_particles=num_particles)
        return torch.stack([gap.amortized, gap.optimized], -1)
    with forked_rng(seed) if seed is not None else nullcontext(), evaluating(vae), \
            pyro.validation_enabled(False):
        return AmortizationGap(*by_batches(of_batch, data).unbind(-1))


@torch.no_grad()
def to_arviz(vae: VAE, data: Data, *, num_samples: int, coords: Mapping[str, Any] | None) -> Any:
    """The VAE's view of data, for ArviZ: :meth:`~pyro_nfvi.vae.VAE.to_arviz`."""
    check_positive_int("VAE.to_arviz", "num_samples", num_samples)
    x, mask = data

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        z = vae.posterior_of(x, mask).sample((num_samples,))
        params = vae.params_at(z)
        fit = vae.seen_part(params, mask).log_prob(x)
        drawn = vae.likelihood(params).sample()
        return torch.cat([z, fit.unsqueeze(-1), drawn.reshape(*fit.shape, -1)], -1)
    with evaluating(vae):
        z, fit, drawn = by_batches(of_batch, data, 1).split(
            [vae.latent_dim, 1, vae.event_shape.numel()], -1)
    shape = (num_samples, *x.shape)
    event = [f"x_dim_{i}" for i in range(len(vae.event_shape))]
    groups = {"posterior": {"z": _arviz.as_array(z)[None]},
              "posterior_predictive": {"x": _arviz.as_array(drawn.reshape(shape))[None]},
              "log_likelihood": {"x": _arviz.as_array(fit.squeeze(-1))[None]},
              "observed_data": {"x": _arviz.as_array(
                  x if mask is None else x.where(mask, x.new_tensor(torch.nan)))}}
    dims = {"z": ["data", "latent"], "x": ["data", *event]}
    return _arviz.inference_data(groups, dims, coords or {}, {})


def by_batches(function: Callable[[Tensor, Tensor | None], Tensor], data: Data, dim: int = 0
               ) -> Tensor:
    """Results of a function of data and mask, computed some data at a time."""
    x, mask = data
    parts = [function(x[rows], None if mask is None else mask[rows])
             for rows in torch.arange(len(x), device=x.device).split(BATCH_SIZE)]
    return torch.cat(parts, dim)


@contextmanager
def evaluating(vae: VAE) -> Iterator[None]:
    """Put every module into evaluation mode, and back afterwards."""
    modes = [(module, module.training) for module in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
