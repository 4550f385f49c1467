"""Coupling layers: any transformer, any split of the coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import HIDDEN_DIMS, MLP, built_network, by_coordinate, check_network
from pyro_nfvi.flows.transformers import Transformer, checked_transformer


class Coupling(Bijection):
    r"""Coupling layer: one part of the input moves, steered by the part that stays.

    .. math:: z_a = u_a, \qquad z_b = \tau(u_b;\, c(u_a, \text{context}))

    Both directions cost one pass. With one coordinate nothing stays, and the transformer's
    parameters are learned directly.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        mask: True for the coordinates that move. Default: the second half.
        transformer: Scalar map :math:`\tau`. Default: :class:`Affine`.
        hidden_dims: Sizes of the conditioner's hidden layers.
        activation: Constructor of the conditioner's nonlinearity.
        conditioner: Constructor of a network to use instead, such as
            ``partial(ConvNet, (1, 8, 8))``. It is called with the mask, ``context_dim`` and the
            number of parameters :math:`P` a coordinate; its network maps what stays, followed by
            the context, to the first parameter of all that moves, then the second, and so on:
            ``(*batch, kept + context_dim) -> (*batch, P * moved)``.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the mask has another length or moves nothing, or an option is of no use.

    Example:
        >>> layer = Coupling(3, context_dim=2)
        >>> z, log_det = layer(torch.randn(7, 3), torch.randn(2))
        >>> z.shape, log_det.shape
        (torch.Size([7, 3]), torch.Size([7]))

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, eq. 7-8.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *,
                 mask: Sequence[bool] | Tensor | None = None,
                 transformer: Transformer | None = None,
                 hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh,
                 conditioner: Callable[[Tensor, int, int], nn.Module] | None = None) -> None:
        super().__init__(input_dim, context_dim)
        moved = _checked_mask(mask, self.input_dim)
        self._kept, self._moved = _indices(~moved), _indices(moved)
        order = torch.cat([(~moved).nonzero(), moved.nonzero()]).squeeze(-1).argsort()
        self._order: list[int] = order.tolist()  # where each coordinate stands in (kept, moved)
        self.transformer = checked_transformer("Coupling", transformer)
        check_network("Coupling", hidden_dims, activation)
        num_moved, num_params = int(moved.sum()), self.transformer.params_per_dim
        self.conditioner: nn.Module
        if conditioner is None or num_moved == self.input_dim:
            self.conditioner = MLP(self.input_dim - num_moved + self.context_dim,
                                   num_moved * num_params, hidden_dims, activation)
        else:
            self.conditioner = built_network(
                "Coupling", conditioner, moved, self.context_dim, num_params,
                "partial(ConvNet, (1, 8, 8))")

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = u[..., self._kept]
        moved, log_det = self.transformer.forward(u[..., self._moved], self._params(kept, context))
        return self._join(kept, moved), log_det.sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = z[..., self._kept]
        moved, log_det = self.transformer.inverse(z[..., self._moved], self._params(kept, context))
        return self._join(kept, moved), log_det.sum(-1)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, known = z[..., self._kept], u[..., self._moved]
        moved, log_det = self.transformer.inverse_at(known, z[..., self._moved],
                                                     self._params(kept, context))
        return self._join(kept, moved), log_det.sum(-1)

    def _params(self, kept: Tensor, context: Tensor | None) -> Tensor:
        x = kept if context is None else torch.cat([kept, context], -1)
        params: Tensor = self.conditioner(x)
        return by_coordinate(params, self.transformer.params_per_dim)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        places, count = list(range(self.input_dim)), kept.shape[-1]
        if self._order == places:
            return torch.cat([kept, moved], -1)
        if self._order == places[count:] + places[:count]:
            return torch.cat([moved, kept], -1)
        return torch.cat([kept, moved], -1)[..., self._order]

    def extra_repr(self) -> str:
        """Dimensions and transformer."""
        return f"{super().extra_repr()}, transformer={self.transformer!r}"


def _checked_mask(mask: Sequence[bool] | Tensor | None, input_dim: int) -> Tensor:
    if mask is None:
        return torch.arange(input_dim) >= input_dim // 2
    try:
        moved = torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # of no use as numbers
        moved = torch.zeros(0)
    flags = moved == 1
    if moved.shape != (input_dim,) or not flags.any() or not (flags | (moved == 0)).all():
        raise ValueError(f"Coupling expected `mask` to hold {input_dim} booleans of which at least "
                         f"one is true, got {mask!r}.")
    return flags


def _indices(mask: Tensor) -> slice | list[int]:
    """Where ``mask`` is true: as a slice, which is a free view, if the places are regular."""
    places: list[int] = mask.nonzero().squeeze(-1).tolist()
    if not places:
        return slice(0, 0)
    step = places[1] - places[0] if len(places) > 1 else 1
    if places == list(range(places[0], places[-1] + 1, step)):
        return slice(places[0], places[-1] + 1, step)
    return places
