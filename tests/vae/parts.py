"""Data and VAEs with known answers for the tests of this folder."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.distributions import MultivariateNormal

from pyro_nfvi.vae import VAE, FlowPosterior, FullGaussian, Gaussian

NOISE = 0.5


def linear_gaussian(num_data, seed=0, num_dims=5, latent_dim=2):
    """Weights, shift and data of ``x = W z + b + NOISE e``."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_dims, latent_dim, generator=generator)
    shift = torch.randn(num_dims, generator=generator)
    z = torch.randn(num_data, latent_dim, generator=generator)
    noise = torch.randn(num_data, num_dims, generator=generator)
    return weights, shift, z @ weights.T + shift + NOISE * noise


class Linear(nn.Linear):
    """An encoder or decoder of one's own, which knows no masks and one batch dimension."""

    def forward(self, x):
        assert x.dim() == 2
        return super().forward(x)


def exact_vae(weights, shift, posterior=FullGaussian):
    """A VAE whose decoder is these weights, with the exact posterior where it is linear."""
    num_dims, latent_dim = weights.shape
    encoder = Linear(num_dims, latent_dim)
    vae = VAE(Gaussian((num_dims,), NOISE), latent_dim, encoder=encoder,
              decoder=Linear(latent_dim, num_dims), posterior=posterior)
    covariance = torch.linalg.inv(torch.eye(latent_dim) + weights.T @ weights / NOISE ** 2)
    gain = covariance @ weights.T / NOISE ** 2
    with torch.no_grad():
        vae.decoder.weight.copy_(weights)
        vae.decoder.bias.copy_(shift)
        encoder.weight.copy_(gain)
        encoder.bias.copy_(-gain @ shift)
        set_gaussian(vae.posterior, covariance)
    return vae


@torch.no_grad()
def set_gaussian(posterior, covariance):
    """Let a posterior have the features for its mean, and this covariance.

    One without correlations gets scales 1.5 times as wide, which bounds importance weights in
    two dimensions.
    """
    full = isinstance(posterior, FullGaussian)
    factor = torch.linalg.cholesky(covariance)
    deviation = factor.diagonal() if full else 1.5 * covariance.diagonal().sqrt()
    raw, eye = deviation.expm1().log() - math.log(math.e - 1), torch.eye(len(factor))
    if isinstance(posterior, FlowPosterior):
        units = posterior.flow.bijection.units
        units.weight.copy_(torch.cat([eye, 0 * eye]))
        units.bias.copy_(torch.cat([0 * raw, raw]))
        return
    posterior.loc.weight.copy_(eye)
    posterior.loc.bias.zero_()
    posterior.scale.weight.zero_()
    posterior.scale.bias.copy_(raw)
    if full:
        posterior.lower.bias.copy_(factor.tril(-1).reshape(-1))


def log_evidence(weights, shift, x, seen=slice(None)):
    """Exact log p(x), of some of the coordinates."""
    covariance = weights @ weights.T + NOISE ** 2 * torch.eye(len(weights))
    return MultivariateNormal(shift[seen], covariance[seen][:, seen]).log_prob(x[:, seen])


def fitted(vae, x, mask=None, **options):
    """``fit`` without what it says of short trainings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "VAE.fit: (posterior collapse|only )")
        return vae.fit(x, mask, **{"num_epochs": 2, "batch_size": 8, "seed": 0, "progress": False,
                                   **options})
