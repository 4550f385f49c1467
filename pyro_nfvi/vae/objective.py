"""The evidence lower bound of a VAE, term by term."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE


def elbo_terms(vae: VAE, x: Tensor, mask: Tensor | None, num_particles: int,
               features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Both terms of the ELBO, for each datum.

    .. math:: \mathbb E_{q(z \mid x)}[\log p(x \mid z)], \qquad
              \mathrm{KL}(q(z \mid x) \,\|\, p(z))

    The KL divergence is in closed form where there is one, else by the same draws.

    Args:
        vae: The VAE.
        x: Data.
        mask: What of them was seen, or None.
        num_particles: Draws for each datum.
        features: Features to use in place of the encoder's.

    Returns:
        The first ``(num_data,)``; the second ``(num_data, latent_dim)`` if it is a sum over the
        coordinates, else ``(num_data, 1)``.
    """
    features = vae.features(x, mask) if features is None else features
    posterior, prior = vae.posterior(features), vae.prior(vae.posterior_of)
    z = posterior.rsample((num_particles,))
    fit = vae.likelihood_at(z, mask).log_prob(x).mean(0)
    return fit, divergence(posterior, prior, z)


def divergence(posterior: TorchDistributionMixin, prior: TorchDistributionMixin, z: Tensor
               ) -> Tensor:
    """KL divergence ``(num_data, groups)``, in closed form or at draws ``z`` of the posterior."""
    try:
        if _factorizes(posterior) and _factorizes(prior):
            return kl_divergence(posterior.base_dist, prior.base_dist)
        return kl_divergence(posterior, prior).unsqueeze(-1)
    except NotImplementedError:
        return (posterior.log_prob(z) - prior.log_prob(z)).mean(0).unsqueeze(-1)


def penalty(terms: Tensor, seen: Tensor, free_bits: float) -> Tensor:
    r"""What the objective subtracts for each datum.

    .. math:: \textstyle\sum_j \max(\lambda_j, \mathbb E_n[\mathrm{KL}_{nj}])

    Without free bits this is the KL divergence itself. The :math:`\lambda_j` of a group is that
    of a coordinate times their number in it.

    Args:
        terms: KL divergences ``(num_data, groups)`` of :func:`elbo_terms`.
        seen: Which of the data count.
        free_bits: Nats of all coordinates together, which cost nothing.

    References:
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow,
        arXiv:1606.04934, eq. 15.
    """
    if not free_bits:
        return terms.sum(-1)
    weights = seen.to(terms.dtype) / seen.sum()
    return torch.clamp(weights @ terms, min=free_bits / terms.shape[-1]).sum().expand(len(terms))


def _factorizes(distribution: TorchDistributionMixin) -> bool:
    return (isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal)
            and distribution.reinterpreted_batch_ndims == 1)
