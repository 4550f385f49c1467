"""Posteriors of a datum's latent, read off the features of an encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Independent, register_kl
from torch.nn import functional as F

from pyro_nfvi._shapes import check_callables, check_positive_int, check_tensor
from pyro_nfvi.flows import Amortized, Bijection, Flow, realnvp
from pyro_nfvi.flows.planar import ZERO
from pyro_nfvi.guides.pyro_dist import conditional

LEAST_SCALE = 1e-6


class AmortizedPosterior(nn.Module, ABC):
    """Distribution of a datum's latent :math:`z`, whose parameters come from features.

    Args:
        feature_dim: Number of features of a datum.
        latent_dim: Number of latent coordinates :math:`D`.

    Shape:
        features: ``(*batch, feature_dim)``; result: a reparametrized Pyro distribution of batch
        shape ``(*batch,)`` and event shape ``(latent_dim,)``.

    Raises:
        ValueError: If a dimension is not a positive integer, or the features have another shape.

    Example:
        >>> class Shift(AmortizedPosterior):  # of unit scale
        ...     def _distribution(self, features):
        ...         return dist.Normal(features[..., :self.latent_dim], 1.0).to_event(1)
        >>> Shift(8, 2)(torch.randn(5, 8)).rsample().shape
        torch.Size([5, 2])
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__()
        owner = type(self).__name__
        self.feature_dim = check_positive_int(owner, "feature_dim", feature_dim)
        self.latent_dim = check_positive_int(owner, "latent_dim", latent_dim)

    def forward(self, features: Tensor) -> TorchDistributionMixin:
        """The distribution for these features."""
        features = check_tensor(type(self).__name__, "features", features, self.feature_dim)
        return self._distribution(features)

    @abstractmethod
    def _distribution(self, features: Tensor) -> TorchDistributionMixin:
        """The distribution for checked features."""


class DiagonalGaussian(AmortizedPosterior):
    r"""Independent coordinates: :math:`q(z) = \mathcal N(m, \mathrm{diag}(s^2))`.

    :math:`m` and :math:`s = \mathrm{softplus}(\cdot) > 0` are linear in the features. The KL
    divergence from a Gaussian prior is in closed form.

    Args:
        feature_dim: Number of features of a datum.
        latent_dim: Number of latent coordinates :math:`D`.

    Example:
        >>> DiagonalGaussian(8, 2)(torch.randn(5, 8)).rsample().shape
        torch.Size([5, 2])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix B.
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__(feature_dim, latent_dim)
        self.loc = nn.Linear(feature_dim, latent_dim)
        self.scale = nn.Linear(feature_dim, latent_dim)

    def _distribution(self, features: Tensor) -> TorchDistributionMixin:
        loc, raw_scale = _side_by_side(features, self.loc, self.scale)
        return dist.Normal(loc, _positive(raw_scale)).to_event(1)


class FullGaussian(AmortizedPosterior):
    r"""Correlated coordinates: :math:`q(z) = \mathcal N(m, L L^\top)`.

    :math:`m` and the lower triangle :math:`L`, whose diagonal goes through a softplus, are linear
    in the features. The KL divergence from a Gaussian prior is in closed form.

    Args:
        feature_dim: Number of features of a datum.
        latent_dim: Number of latent coordinates :math:`D`.

    Example:
        >>> FullGaussian(8, 2)(torch.randn(5, 8)).covariance_matrix.shape
        torch.Size([5, 2, 2])

    References:
        Kingma & Welling (2019), An Introduction to Variational Autoencoders, arXiv:1906.02691,
        section 2.5.1.
    """

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__(feature_dim, latent_dim)
        self.loc = nn.Linear(feature_dim, latent_dim)
        self.scale = nn.Linear(feature_dim, latent_dim)
        self.lower = nn.Linear(feature_dim, latent_dim * latent_dim)
        nn.init.zeros_(self.lower.weight)  # starts diagonal
        nn.init.zeros_(self.lower.bias)

    def _distribution(self, features: Tensor) -> TorchDistributionMixin:
        lower = self.lower(features).unflatten(-1, (self.latent_dim, self.latent_dim))
        factor = lower.tril(-1) + torch.diag_embed(_positive(self.scale(features)))
        return CorrelatedNormal(self.loc(features), scale_tril=factor)


class FlowPosterior(AmortizedPosterior):
    r"""A normalizing flow whose location, scale and context are read off the features.

    .. math:: z = m(c) + s(c) \odot f(u;\, h(c)), \qquad u \sim \mathcal N(0, 1)

    It starts as a diagonal Gaussian.

    Args:
        feature_dim: Number of features of a datum.
        latent_dim: Number of latent coordinates :math:`D`.
        recipe: Function ``(latent_dim, context_dim)`` that builds the flow :math:`f`, such as
            :func:`~pyro_nfvi.iaf` or :func:`~pyro_nfvi.planar`.
        context_dim: Size of the flow's context :math:`h`.
        **options: Options of the recipe, such as ``num_layers``.

    Example:
        >>> from pyro_nfvi import planar
        >>> FlowPosterior(8, 2, planar, num_layers=4)(torch.randn(5, 8)).rsample().shape
        torch.Size([5, 2])

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows,
        arXiv:1505.05770; Kingma et al. (2016), arXiv:1606.04934; van den Berg et al. (2018),
        Sylvester Normalizing Flows, arXiv:1803.05649.
    """

    def __init__(self, feature_dim: int, latent_dim: int,
                 recipe: Callable[..., Bijection] = realnvp, *, context_dim: int = 32,
                 **options: Any) -> None:
        super().__init__(feature_dim, latent_dim)
        check_callables("FlowPosterior", recipe=recipe)
        check_positive_int("FlowPosterior", "context_dim", context_dim)
        bijection = recipe(latent_dim, context_dim, **options)
        layer = Amortized(bijection, feature_dim)
        layer.units.reset_parameters()  # one that starts blind to the data learns later
        self.flow = Flow(layer)

    def _distribution(self, features: Tensor) -> TorchDistributionMixin:
        return conditional(self.flow, features)


class CorrelatedNormal(dist.MultivariateNormal):
    """A multivariate normal whose KL divergence from independent normals is in closed form.

    Torch and Pyro have that one only between two of a kind.
    """


@register_kl(CorrelatedNormal, Independent)
def _kl_correlated_independent(q: CorrelatedNormal, p: Independent) -> Tensor:
    r"""Closed form of two Gaussians, the second with independent coordinates.

    .. math:: \tfrac12 \sum_i \Big[ \sum_j \big(\tfrac{L_{ij}}{s_i}\big)^2
              + \big(\tfrac{m_i - t_i}{s_i}\big)^2 - 1 + 2 \log s_i - 2 \log L_{ii} \Big]
    """
    prior = p.base_dist
    while isinstance(prior, torch.distributions.Distribution) and hasattr(prior, "base_dist"):
        prior = prior.base_dist
    if not isinstance(prior, torch.distributions.Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError
    factor, scale = q.scale_tril / prior.scale.unsqueeze(-1), prior.scale.log()
    distance = ((q.loc - prior.loc) / prior.scale).square()
    log_diagonal = q.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    terms = factor.square().sum(-1) + distance - 1 + 2 * (scale - log_diagonal)
    return 0.5 * terms.sum(-1)


def _side_by_side(features: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Outputs of linear layers of the same features, by one matrix product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return F.linear(features, weight, bias).split([layer.out_features for layer in layers], -1)


def _positive(raw: Tensor) -> Tensor:
    return LEAST_SCALE + F.softplus(raw + ZERO)
