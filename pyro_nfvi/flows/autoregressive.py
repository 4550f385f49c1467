"""Autoregressive layers: any transformer, any number of passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import HIDDEN_DIMS, MaskedMLP, built_network, check_network
from pyro_nfvi.flows.recurrent import RecurrentNet
from pyro_nfvi.flows.transformers import NumericallyInverted, Transformer, checked_transformer


class Autoregressive(Bijection):
    r"""Masked autoregressive layer: each coordinate is steered by those before it.

    .. math:: z_i = \tau(u_i;\, c_i(u_{<i}, \text{context}))

    Sampling costs one pass, the inverse ``num_passes``; :class:`Inverse` swaps the two, which
    turns an inverse autoregressive flow into a masked autoregressive flow.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        num_passes: Number of groups the coordinates fall into, and of passes of the inverse:
            2 is a coupling layer with one part that moves freely, :math:`D` (the default) is
            fully autoregressive.
        reverse: Whether the order starts with the last coordinate.
        transformer: Scalar map :math:`\tau`. Default: :class:`Affine`.
        hidden_dims: Sizes of the hidden layers of the :class:`MaskedMLP` that is the conditioner.
        activation: Constructor of its nonlinearity.
        conditioner: Constructor of a network to use instead, such as :class:`RecurrentNet`. It is
            called with the group of every coordinate, ``context_dim`` and the number of
            parameters :math:`P` a coordinate; its network maps points and context (or None) to
            ``(*batch, D, P)``, by coordinates of lower groups alone.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If there are more passes than coordinates, or an option is of no use.

    Example:
        >>> layer = Autoregressive(3)
        >>> u = torch.randn(7, 3)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u)
        True

    References:
        Kingma et al. (2016), Improved Variational Inference with Inverse Autoregressive Flow,
        arXiv:1606.04934, eq. 10; Papamakarios, Pavlakou & Murray (2017), Masked Autoregressive
        Flow for Density Estimation, arXiv:1705.07057, eq. 2-4.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, num_passes: int | None = None,
                 reverse: bool = False, transformer: Transformer | None = None,
                 hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh,
                 conditioner: Callable[[Tensor, int, int], nn.Module] | None = None) -> None:
        super().__init__(input_dim, context_dim)
        self.num_passes = _checked_passes(num_passes, self.input_dim)
        self.reverse = bool(reverse)
        self.transformer = checked_transformer("Autoregressive", transformer)
        check_network("Autoregressive", hidden_dims, activation)
        groups, num_params = self._groups(), self.transformer.params_per_dim
        self._spans = [_span(groups == k) for k in range(self.num_passes)]
        self.conditioner: nn.Module
        if conditioner is None:
            self.conditioner = MaskedMLP(groups, self.context_dim, num_params, hidden_dims,
                                         activation)
        else:
            self.conditioner = built_network(
                "Autoregressive", conditioner, groups, self.context_dim, num_params, "RecurrentNet")

    def _groups(self) -> Tensor:
        position = torch.arange(self.input_dim)
        position = position.flip(0) if self.reverse else position
        return (position * self.num_passes).div(self.input_dim, rounding_mode="floor")

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = self.transformer.forward(u, self.conditioner(u, context))
        return z, log_det.sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.conditioner, RecurrentNet):
            u, log_det = self.conditioner.invert(self.transformer.inverse, z, context)
            return u, log_det.sum(-1)
        if isinstance(self.transformer, NumericallyInverted):
            return self._inverse_by_group(z, context)
        u = log_det = torch.zeros_like(z)
        for _ in range(self.num_passes):  # after pass k the first k groups are exact
            u, log_det = self.transformer.inverse(z, self.conditioner(u, context))
        return u, log_det.sum(-1)

    def _inverse_by_group(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, each coordinate being inverted once, since that is what costs here."""
        solved: list[tuple[Tensor, Tensor]] = []
        for span in self._spans:
            u = self._joined([u for u, _ in solved], z)
            params = self.conditioner(u, context)[..., span, :]
            solved.append(self.transformer.inverse(z[..., span], params))
        return (self._joined([u for u, _ in solved], z),
                self._joined([log_det for _, log_det in solved], z).sum(-1))

    def _joined(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Parts of the first groups in their places, and zeros in those of the others."""
        rest = self.input_dim - sum(part.shape[-1] for part in parts)
        parts = [*parts, like.new_zeros(*like.shape[:-1], rest)]
        return torch.cat(parts[::-1] if self.reverse else parts, -1)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """One Newton step from ``u``, which has the derivatives of the root it stays at."""
        u = u.detach()
        residual = (self._forward(u, context)[0] - z).unsqueeze(-1)
        jacobian = self._jacobian(u.clone(), None if context is None else context.detach())
        step = torch.linalg.solve_triangular(jacobian, residual, upper=self.reverse)
        u = u - step.squeeze(-1)
        return u, -self._forward(u, context)[1]

    @torch.enable_grad()
    def _jacobian(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Derivatives of every coordinate in every other, ``(*batch, D, D)``, all at once."""
        u = u.requires_grad_()
        z, _ = self._forward(u, context)
        eye = torch.eye(self.input_dim, dtype=u.dtype, device=u.device)
        rows = eye.reshape(-1, *[1] * (u.dim() - 1), self.input_dim).expand(-1, *u.shape)
        jacobian, = torch.autograd.grad(z, u, rows, is_grads_batched=True)
        return jacobian.movedim(0, -2).detach()

    def extra_repr(self) -> str:
        """Dimensions, passes, order and transformer."""
        return (f"{super().extra_repr()}, num_passes={self.num_passes}, reverse={self.reverse}, "
                f"transformer={self.transformer!r}")


def _span(mask: Tensor) -> slice:
    """Where ``mask`` is true, which is one run of places."""
    places = mask.nonzero().squeeze(-1)
    return slice(int(places[0]), int(places[-1]) + 1)


def _checked_passes(num_passes: int | None, input_dim: int) -> int:
    if num_passes is None:
        return input_dim
    check_positive_int("Autoregressive", "num_passes", num_passes)
    if num_passes > input_dim:
        raise ValueError(f"Autoregressive expected `num_passes` of at most input_dim={input_dim}, "
                         f"got {num_passes}.")
    return num_passes
