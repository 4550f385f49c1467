"""Priors of the latent: a standard Gaussian, a flow, or the mixture of encoded examples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_nfvi._shapes import check_callables, check_positive_int, type_name
from pyro_nfvi.flows import Bijection, BijectionTransform, Flow, realnvp
from pyro_nfvi.guides.pyro_dist import NoiseDistribution

Encode = Callable[[Tensor], TorchDistributionMixin]


class Prior(nn.Module, ABC):
    """Distribution of the latent before any data.

    Args:
        latent_dim: Number of latent coordinates :math:`D`.

    Shape:
        result: a Pyro distribution of batch shape ``()`` and event shape ``(latent_dim,)``.

    Example:
        >>> class Wide(Prior):
        ...     def forward(self, encode):
        ...         return dist.Normal(torch.zeros(self.latent_dim), 3.0).to_event(1)
        >>> Wide(2)(None).event_shape
        torch.Size([2])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_positive_int(type(self).__name__, "latent_dim", latent_dim)

    @abstractmethod
    def forward(self, encode: Encode) -> TorchDistributionMixin:
        """The distribution; ``encode`` is the posterior of data, should it depend on that."""


class StandardGaussian(Prior):
    r"""The usual prior :math:`\mathcal N(0, 1)`.

    Args:
        latent_dim: Number of latent coordinates :math:`D`.

    Example:
        >>> StandardGaussian(2)(None).sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    loc: Tensor
    scale: Tensor

    def forward(self, encode: Encode) -> TorchDistributionMixin:
        """Independent standard normals."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class FlowPrior(Prior):
    """A learned flow.

    The prior's density is asked for at draws of the posterior, so take a flow that is fast
    backwards: couplings, or :func:`~pyro_nfvi.maf`.

    Args:
        latent_dim: Number of latent coordinates :math:`D`.
        recipe: Function of ``latent_dim`` that builds the flow.
        **options: Options of the recipe, such as ``num_layers``.

    Example:
        >>> FlowPrior(2, num_layers=2)(None).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Chen et al. (2017), Variational Lossy Autoencoder, arXiv:1611.02731, section 3.2.
    """

    def __init__(self, latent_dim: int, recipe: Callable[..., Bijection] = realnvp,
                 **options: Any) -> None:
        super().__init__(latent_dim)
        check_callables("FlowPrior", recipe=recipe)
        self.flow = Flow(recipe(latent_dim, **options))

    def forward(self, encode: Encode) -> TorchDistributionMixin:
        """The flow as a Pyro distribution."""
        return dist.TransformedDistribution(NoiseDistribution(self.flow.base),
                                            [BijectionTransform(self.flow.bijection)])


class VampPrior(Prior):
    r"""Mixture of the posteriors of learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_{k=1}^K q(z \mid u_k)

    Pseudo-inputs of :class:`~pyro_nfvi.vae.Categorical` data stay where they start, as classes have
    no gradient.

    Args:
        latent_dim: Number of latent coordinates :math:`D`.
        pseudo_inputs: Where the :math:`u_k` start, ``(K, *event_shape)``: some of the data.

    Raises:
        ValueError: If there are no pseudo-inputs.

    Example:
        >>> from pyro_nfvi.vae import VAE, Bernoulli
        >>> x = torch.rand(100, 4).round()
        >>> vae = VAE(Bernoulli((4,)), latent_dim=2, prior=VampPrior(2, x[:10]))
        >>> vae.prior(vae.posterior_of).sample((5,)).shape
        torch.Size([5, 2])

    References:
        Tomczak & Welling (2018), VAE with a VampPrior, arXiv:1705.07120, eq. 9-10.
    """

    def __init__(self, latent_dim: int, pseudo_inputs: Tensor) -> None:
        super().__init__(latent_dim)
        if not isinstance(pseudo_inputs, Tensor) or not pseudo_inputs.numel():
            got = "an empty one" if isinstance(pseudo_inputs, Tensor) else type_name(pseudo_inputs)
            raise ValueError("VampPrior expected `pseudo_inputs` to be a tensor (K, *event_shape), "
                             f"got {got}. Take some of the data: x[:100].")
        values = pseudo_inputs.detach().clone()
        dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
        self.pseudo_inputs = nn.Parameter(values.to(dtype))

    def forward(self, encode: Encode) -> TorchDistributionMixin:
        """The mixture, by the posterior as it is now."""
        return EqualMixture(encode(self.pseudo_inputs))


class EqualMixture(dist.TorchDistribution):
    """Mixture of the distributions along the last batch dimension, all as likely.

    Args:
        components: Distribution of batch shape ``(*batch, K)``.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, components: TorchDistributionMixin, validate_args: bool | None = None
                 ) -> None:
        self.components = components
        *batch, self.num_components = components.batch_shape
        super().__init__(torch.Size(batch), components.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EqualMixture:
        """The same mixture over another batch shape."""
        components = self.components.expand(torch.Size([*batch_shape, self.num_components]))
        return type(self)(components, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, by a sum over the components."""
        terms = self.components.log_prob(value.unsqueeze(-2))
        return terms.logsumexp(-1) - math.log(self.num_components)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of a component drawn before."""
        with torch.no_grad():
            draws = self.components.sample(torch.Size(sample_shape))
            shape = draws.shape[:-2]
            which = torch.randint(self.num_components, shape, device=draws.device)
            place = which[..., None, None].expand(*shape, 1, draws.shape[-1])
            return draws.gather(-2, place).squeeze(-2)
