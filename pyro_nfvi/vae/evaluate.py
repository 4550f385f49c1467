"""How good a VAE is: log p(x) by importance weights, latents in use, the amortization gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.inference.amortization import AmortizationGap, reoptimize
from pyro_nfvi.vae.data import Data
from pyro_nfvi.vae.objective import elbo_terms

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE

BATCH_SIZE = 500  # data at a time
SAMPLES_AT_ONCE = 50  # of each of them
ACTIVE = 0.01  # variance over the data from which a latent counts as used
MEAN_DRAWS = 64


@dataclass(frozen=True)
class LogLikelihood:
    """Importance-weighted estimate of the log-likelihood, in nats.

    Attributes:
        values: Of each datum.
        standard_errors: Of those, by the delta method.
        num_dims: Numbers in a datum.
    """

    values: Tensor
    standard_errors: Tensor
    num_dims: int

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
        return (f"LogLikelihood({self.mean:.3f} +- {self.standard_error:.3f} nats a datum, "
                f"{self.bits_per_dim:.4f} bits a dimension, {len(self.values)} data)")


def bits_per_dim(nats: float, num_dims: int) -> float:
    r"""Bits a dimension: :math:`-\log p(x) / (D \log 2)`."""
    return -nats / (num_dims * math.log(2))


@torch.no_grad()
def log_likelihood(vae: VAE, data: Data, num_samples: int = 1000) -> LogLikelihood:
    r"""Importance-weighted estimate of :math:`\log p(x)`, a lower bound on average.

    .. math:: \log \frac1S \sum_{s=1}^S \frac{p(x \mid z_s)\, p(z_s)}{q(z_s \mid x)},
              \qquad z_s \sim q(z \mid x)

    Args:
        vae: The VAE.
        data: Data and mask, checked.
        num_samples: Draws :math:`S` for each datum.

    References:
        Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders,
        arXiv:1509.00519, eq. 8; Rezende, Mohamed & Wierstra (2014), arXiv:1401.4082, appendix E.
    """
    check_positive_int("VAE.log_likelihood", "num_samples", num_samples, minimum=2)

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        log_w = torch.cat([_log_weights(vae, x, mask, len(part)) for part in
                           torch.arange(num_samples).split(SAMPLES_AT_ONCE)]).double()
        value = log_w.logsumexp(0) - math.log(num_samples)
        spread = (log_w - value).exp().std(0) / math.sqrt(num_samples)
        return torch.stack([value, spread], -1)
    with pyro.validation_enabled(False):
        both = by_batches(of_batch, data)
    return LogLikelihood(both[:, 0], both[:, 1], vae.event_shape.numel())


@torch.no_grad()
def active_units(vae: VAE, data: Data) -> Tensor:
    r"""Which latents depend on the data: :math:`\mathrm{Var}_x(\mathbb E_q[z_j]) > 0.01`.

    Args:
        vae: The VAE.
        data: Data and mask, checked; at least two of them.

    Returns:
        Booleans ``(latent_dim,)``.

    References:
        Burda, Grosse & Salakhutdinov (2016), arXiv:1509.00519, section 5.2.
    """
    if len(data[0]) < 2:
        raise ValueError("VAE.active_units expected at least two data, got one.")
    with pyro.validation_enabled(False):
        means = by_batches(lambda x, mask: vae.posterior_of(x, mask).sample((MEAN_DRAWS,)).mean(0),
                           data)
        noise = by_batches(lambda x, mask: vae.posterior_of(x, mask).sample((MEAN_DRAWS,)).var(0),
                           data).mean(0) / MEAN_DRAWS
    return means.var(0) - noise > ACTIVE


def amortization_gap(vae: VAE, data: Data, *, num_steps: int = 200, lr: float = 0.02,
                     num_particles: int = 16, seed: int | None = None) -> AmortizationGap:
    """How much of the ELBO is lost because one encoder serves all data.

    The features of every datum are optimised for that datum alone, from the encoder's on.

    Args:
        vae: The VAE.
        data: Data and mask, checked.
        num_steps: Steps of the optimisation.
        lr: Its learning rate.
        num_particles: Draws of each step.
        seed: Makes it reproducible, and leaves the global random state as it was.

    References:
        Cremer, Li & Duvenaud (2018), Inference Suboptimality in Variational Autoencoders,
        arXiv:1801.03558, section 3.
    """
    x, mask = data

    def elbo(features: Tensor, count: int) -> Tensor:
        fit, divergence = elbo_terms(vae, x, mask, count, features)
        return fit - divergence.sum(-1)
    with torch.no_grad():
        features = vae.features(x, mask)
    with pyro.validation_enabled(False):
        return reoptimize(elbo, features, num_steps=num_steps, lr=lr,
                          num_particles=num_particles, seed=seed)


@torch.no_grad()
def to_arviz(vae: VAE, data: Data, *, num_samples: int = 100,
             coords: Mapping[str, Any] | None = None) -> Any:
    """Latents, reconstructions and data as InferenceData (ArviZ 0.x) or DataTree (1.x).

    Groups: ``posterior`` (``z``), ``posterior_predictive`` (``x``), ``log_likelihood`` (``x``, of
    the draws), ``observed_data`` (``x``). Dimensions: ``data``, ``latent``, ``x_dim_0``, ...

    Args:
        vae: The VAE.
        data: Data and mask, checked.
        num_samples: Draws.
        coords: Values along dimensions, by name.
    """
    check_positive_int("VAE.to_arviz", "num_samples", num_samples)
    x, mask = data
    z = by_batches(lambda x, mask: vae.posterior_of(x, mask).sample((num_samples,)), data, 1)
    fit = vae.likelihood_at(z, mask).log_prob(x)
    drawn = vae.likelihood_at(z).sample()
    event = [f"x_dim_{i}" for i in range(len(vae.event_shape))]
    groups = {"posterior": {"z": _numpy(z)[None]},
              "posterior_predictive": {"x": _numpy(drawn)[None]},
              "log_likelihood": {"x": _numpy(fit)[None]},
              "observed_data": {"x": _numpy(x if mask is None else
                                            x.where(mask, x.new_tensor(torch.nan)))}}
    dims = {"z": ["data", "latent"], "x": ["data", *event]}
    return _arviz.inference_data(groups, dims, coords or {}, {})


def by_batches(function: Callable[[Tensor, Tensor | None], Tensor], data: Data, dim: int = 0
               ) -> Tensor:
    """Results of a function of data and mask, computed some data at a time."""
    x, mask = data
    parts = [function(x[rows], None if mask is None else mask[rows])
             for rows in torch.arange(len(x), device=x.device).split(BATCH_SIZE)]
    return torch.cat(parts, dim)


def _log_weights(vae: VAE, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Log importance weights ``(count, num_data)`` of posterior draws."""
    posterior, prior = vae.posterior_of(x, mask), vae.prior(vae.posterior_of)
    z = posterior.rsample((count,))
    log_joint = vae.likelihood_at(z, mask).log_prob(x) + prior.log_prob(z)
    weights: Tensor = log_joint - posterior.log_prob(z)
    return weights


def _numpy(values: Tensor) -> Any:
    return values.detach().cpu().numpy()
