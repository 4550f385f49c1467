"""A recurrent conditioner: one cell that reads the coordinates in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.nets import OutputLinear, by_coordinate

ScalarInverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # z, params -> u, log|du/dz|


class RecurrentNet(nn.Module):
    r"""Recurrent conditioner: parameters of a group are read off a state that saw those before.

    .. math:: h_0 = \mathrm{GRU}(0, \text{context};\, 0), \qquad
              h_g = \mathrm{GRU}(u_{g-1}, \text{context};\, h_{g-1}), \qquad
              \theta_g = W_g h_g + b_g

    The cell is the same at every step, so that its size does not grow with the number of
    coordinates; the steps follow one another. The inverse of an
    :class:`~pyro_nfvi.flows.Autoregressive` layer is one sweep, as its forward pass is. The
    :math:`W_g` and :math:`b_g` start at zero.

    Args:
        groups: Group of each coordinate, integers from 0 up, shape ``(D,)``.
        context_dim: Number of context coordinates; 0 for none.
        num_params: Outputs for each coordinate.
        hidden_dim: Size of the state.

    Shape:
        ``(*batch, D), (*batch, context_dim) -> (*batch, D, num_params)``.

    Raises:
        ValueError: If ``hidden_dim`` is no positive integer, or the groups are no integers.

    Example:
        >>> from pyro_nfvi.flows import Autoregressive
        >>> layer = Autoregressive(3, conditioner=RecurrentNet)
        >>> u = torch.randn(7, 3)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u)
        True

    References:
        Oliva et al. (2018), Transformation Autoregressive Networks, arXiv:1801.09819 (the
        recurrent autoregressive model); Papamakarios et al. (2021), Normalizing Flows for
        Probabilistic Modeling and Inference, arXiv:1912.02762, section 3.1.2; Cho et al. (2014),
        Learning Phrase Representations using RNN Encoder-Decoder, arXiv:1406.1078 (the cell).
    """

    def __init__(self, groups: Tensor, context_dim: int, num_params: int, *,
                 hidden_dim: int = 64) -> None:
        super().__init__()
        check_positive_int("RecurrentNet", "hidden_dim", hidden_dim)
        if groups.dtype is torch.bool:
            raise ValueError("RecurrentNet expected `groups` to be integers, got booleans, as of a "
                             "Coupling. It is for Autoregressive layers.")
        order = groups.argsort(stable=True)
        self._order: list[int] = order.tolist()
        self._place: list[int] = order.argsort().tolist()
        self._counts: list[int] = groups.bincount().tolist()
        self.hidden_dim, self.num_params = hidden_dim, num_params
        self.read = nn.Linear(max(self._counts) + context_dim, 3 * hidden_dim)
        self.keep = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.outputs = nn.ModuleList(OutputLinear(hidden_dim, count * num_params)
                                     for count in self._counts)

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """Parameters of every coordinate, given those before it and the context."""
        h, params = self._start(u, context), []
        for k, group in enumerate(self._in_order(u)):
            params.append(self._params(k, h))
            h = h if k == len(self._counts) - 1 else self._step(h, group, context)
        return torch.cat(params, -2)[..., self._place, :]

    def invert(self, inverse: ScalarInverse, z: Tensor, context: Tensor | None
               ) -> tuple[Tensor, Tensor]:
        """Undo an autoregressive map in one sweep: what is solved moves the state on.

        Args:
            inverse: Inverse of its transformer.
            z: Points, ``(*batch, D)``.
            context: Their contexts, or None.

        Returns:
            Their preimages, and the log-derivative of every coordinate.
        """
        h, solved = self._start(z, context), []
        for k, group in enumerate(self._in_order(z)):
            solved.append(inverse(group, self._params(k, h)))
            h = h if k == len(self._counts) - 1 else self._step(h, solved[-1][0], context)
        u, log_det = (torch.cat(parts, -1) for parts in zip(*solved, strict=True))
        return u[..., self._place], log_det

    def _in_order(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[..., self._order].split(self._counts, -1)

    def _params(self, k: int, h: Tensor) -> Tensor:
        params: Tensor = self.outputs[k](h)
        return by_coordinate(params, self.num_params)

    def _start(self, like: Tensor, context: Tensor | None) -> Tensor:
        batch = like.shape[:-1]
        return self._step(like.new_zeros(*batch, self.hidden_dim), like.new_zeros(*batch, 0),
                          context)

    def _step(self, h: Tensor, group: Tensor, context: Tensor | None) -> Tensor:
        """The state after one more group, padded with zeros where groups differ in size."""
        group = F.pad(group, (0, max(self._counts) - group.shape[-1]))
        x = group if context is None else torch.cat([group, context], -1)
        reset, update, new = self.read(x).chunk(3, -1)
        h_reset, h_update, h_new = self.keep(h).chunk(3, -1)
        candidate = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
        return torch.lerp(candidate, h, torch.sigmoid(update + h_update))
