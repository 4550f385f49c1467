"""How good a VAE is: log p(x) by importance weights, latents in use, the amortization gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_int
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
    """

    values: Tensor
    standard_errors: Tensor
    num_dims: float

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


def bits_per_dim(nats: float, num_dims: float) -> float:
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
    return LogLikelihood(both[:, 0], both[:, 1], num_seen)


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

    def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.stack(torch.var_mean(vae.posterior_of(x, mask).sample((MEAN_DRAWS,)), 0), 1)
    with pyro.validation_enabled(False), evaluating(vae):
        variances, means = by_batches(of_batch, data).unbind(1)
    return means.var(0) - variances.mean(0) / MEAN_DRAWS > ACTIVE


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
def to_arviz(vae: VAE, data: Data, *, num_samples: int = 100,
             coords: Mapping[str, Any] | None = None) -> Any:
    """Latents, reconstructions and data as InferenceData (ArviZ 0.x) or DataTree (1.x).

    Groups: ``posterior`` (``z``), ``posterior_predictive`` (``x``), ``log_likelihood`` (``x``, of
    a datum given each draw), ``observed_data`` (``x``). Dimensions: ``data``, ``latent``,
    ``x_dim_0``, ...

    Args:
        vae: The VAE.
        data: Data and mask, checked.
        num_samples: Draws.
        coords: Values along dimensions, by name.
    """
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
    groups = {"posterior": {"z": _numpy(z)[None]},
              "posterior_predictive": {"x": _numpy(drawn.reshape(shape))[None]},
              "log_likelihood": {"x": _numpy(fit.squeeze(-1))[None]},
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


def _numpy(values: Tensor) -> Any:
    return values.detach().cpu().numpy()
