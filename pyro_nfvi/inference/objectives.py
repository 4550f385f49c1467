"""Objectives: what a fit maximises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyro_nfvi.flows import Flow


@dataclass(frozen=True)
class ELBO:
    r"""Evidence lower bound, estimated by reparametrized particles in one pass.

    .. math:: \mathrm{ELBO}(\phi) = \mathbb E_{u}\left[\log p(x, z_\phi(u))
              - \log q_\phi(z_\phi(u))\right]

    Args:
        path_gradient: Leave out the score term of the gradient, whose mean is zero: the noise
            of the gradient then vanishes as the flow fits.

    Example:
        >>> import torch
        >>> from pyro_nfvi.flows import Identity
        >>> flow = Flow(Identity(2))
        >>> elbo, z = ELBO()(flow, lambda z: flow.log_prob(z) - 3.0, 5)
        >>> torch.allclose(elbo, torch.tensor(-3.0))  # the evidence, as the flow is exact
        True

    References:
        Roeder, Wu & Duvenaud (2017), Sticking the Landing, arXiv:1703.09194; Vaitl et al.
        (2022), Gradients should stay on Path, arXiv:2207.08219.
    """

    path_gradient: bool = True

    def __call__(self, flow: Flow, log_joint: Callable[[Tensor], Tensor], num_particles: int
                 ) -> tuple[Tensor, Tensor]:
        """One estimate of the ELBO for every particle, and the particles.

        A particle at which the log joint has no finite gradient adds none.

        Returns:
            Estimates ``(num_particles,)`` and latents ``(num_particles, D)``.
        """
        draw = flow.rsample_and_path_log_prob if self.path_gradient else flow.rsample_and_log_prob
        z, log_q = draw((num_particles,))
        return log_joint(_shielded(z)) - log_q, z


def _shielded(z: Tensor) -> Tensor:
    """The same points; a gradient that is not finite at one of them becomes zero there."""
    z = z.view_as(z)
    if z.requires_grad:
        z.register_hook(_finite_rows)
    return z


def _finite_rows(gradient: Tensor) -> Tensor:
    finite = gradient.isfinite().all(-1, keepdim=True)
    return gradient.where(finite, gradient.new_zeros(()))
