"""Block neural autoregressive layers: one masked network that is monotone in each coordinate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import ContextParameter, MaskedLinear, OutputLinear
from pyro_nfvi.flows.planar import _above_minus_one
from pyro_nfvi.flows.roots import FEW_STEPS, increasing_root, refine_root
from pyro_nfvi.flows.transformers import soft_clamp


class BlockAutoregressive(Bijection):
    r"""Block neural autoregressive layer: a masked network, positive along its diagonal blocks.

    Each hidden layer has a block of units :math:`h_i` for every coordinate,

    .. math::
        h_i^{(l)} = \tanh\left(B_i^{(l)} h_i^{(l-1)} + \textstyle\sum_{j<i} W_{ij}^{(l)}
        h_j^{(l-1)} + b_i^{(l)}\right), \qquad h_i^{(0)} = u_i, \quad B > 0,

    so that :math:`g_i = v_i^\top h_i^{(L)}` with :math:`v > 0` rises with :math:`u_i`. It enters
    by a gate,

    .. math::
        z_i = u_i + \gamma_i\, g_i / G_i + c_i(u_{<i}), \qquad
        \log|\det J| = \textstyle\sum_i \log(1 + \gamma_i g_i' / G_i), \qquad \gamma_i > -1

    where :math:`G_i = v_i^\top B_i^{(L)} \cdots B_i^{(1)}` is the most :math:`g_i'` can be, as
    :math:`\tanh' \le 1`, and :math:`c_i` is linear in the :math:`h_j^{(L)}`. The paper's gate,
    up to scale, is that of :math:`\gamma > 0`; here :math:`\gamma = c = 0` is the identity, the map
    is onto, and derivatives need no logs, as none exceeds :math:`1 + |\gamma_i|`. The inverse is
    one scalar root a coordinate, the first coordinate first.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        block_dim: Number of units of a block.
        num_hidden: Number of hidden layers :math:`L`.
        reverse: Whether the order starts with the last coordinate.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If a number is no positive integer.

    Example:
        >>> layer = BlockAutoregressive(3, block_dim=4)
        >>> u = torch.randn(7, 3)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u)
        True

    References:
        De Cao, Titov & Aziz (2019), Block Neural Autoregressive Flow, arXiv:1904.04676, section 3
        (whose log-determinant is a product of the blocks' logs, and whose gate is
        :math:`\alpha f(u) + (1 - \alpha) u` with :math:`0 < \alpha < 1`).
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, block_dim: int = 8,
                 num_hidden: int = 2, reverse: bool = False) -> None:
        super().__init__(input_dim, context_dim)
        owner = "BlockAutoregressive"
        self.block_dim = check_positive_int(owner, "block_dim", block_dim)
        self.num_hidden = check_positive_int(owner, "num_hidden", num_hidden)
        self.reverse = bool(reverse)
        sizes = [1] + [self.block_dim] * self.num_hidden
        self.below = nn.ModuleList(  # W and b, the first layer's with the context's columns
            MaskedLinear(self._mask(rows, columns, 0 if k else self.context_dim))
            for k, (columns, rows) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)))
        self.diagonal = nn.ParameterList(  # B, softly clamped in logs, and last v
            nn.Parameter(torch.randn(self.input_dim, rows, columns) / 2)
            for columns, rows in zip(sizes, [*sizes[1:], 1], strict=True))
        self.gate = ContextParameter(torch.zeros(self.input_dim), self.context_dim)
        mask = self._mask(1, self.block_dim, self.context_dim)
        self.shift = OutputLinear(mask.shape[1], self.input_dim, mask)

    def _mask(self, rows: int, columns: int, context_dim: int) -> Tensor:
        """True where an output's block comes after that of the input, and for the context."""
        after = torch.arange(self.input_dim).repeat_interleave(rows)
        before = torch.arange(self.input_dim).repeat_interleave(columns)
        before = torch.cat([before, torch.full((context_dim,), -1)])
        return after[:, None] > before

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u, gate = self._ordered(u), _above_minus_one(self.gate(context))
        *blocks, v = self._positive()
        h, slope = u.unsqueeze(-1), torch.ones_like(u).unsqueeze(-1)
        for k, (layer, block) in enumerate(zip(self.below, blocks, strict=True)):
            offset = layer(_joined([h.flatten(-2)], None if k else context))
            h, slope = _level(h, slope, offset.unflatten(-1, (self.input_dim, -1)), block)
        shift = self.shift(_joined([h.flatten(-2)], context))
        z = u + gate * _product(v, h).squeeze(-1) + shift
        return self._ordered(z), torch.log1p(gate * _product(v, slope).squeeze(-1)).sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(z, None, context)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(z, self._ordered(u), context)

    def _solve(self, z: Tensor, known: Tensor | None, context: Tensor | None
               ) -> tuple[Tensor, Tensor]:
        """One coordinate after another: to each, the blocks of those before are constants."""
        z, gate = self._ordered(z), _above_minus_one(self.gate(context))
        *blocks, v = self._positive()
        levels: list[list[Tensor]] = [[] for _ in range(self.num_hidden + 1)]
        log_det = z.new_zeros(z.shape[:-1])
        for i in range(self.input_dim):
            ladder = _Ladder(self._offsets(i, levels, context), [block[i] for block in blocks],
                             v[i], gate[..., i])
            target = z[..., i] - self._shift(i, levels[-1], context)
            u = ladder.root(target, None if known is None else known[..., i])
            rungs, _, log_slope = ladder.climb(u)
            log_det = log_det - log_slope
            for level, rung in zip(levels, rungs, strict=True):
                level.append(rung)
        return self._ordered(torch.cat(levels[0], -1)), log_det

    def _ordered(self, x: Tensor) -> Tensor:
        return x.flip(-1) if self.reverse else x

    def _positive(self) -> list[Tensor]:
        """The B of every layer, ``(D, rows, columns)``, and last v, over the greatest slope."""
        blocks = [soft_clamp(raw).exp() / raw.shape[-1] for raw in self.diagonal]
        greatest = blocks[0]
        for block in blocks[1:]:
            greatest = block @ greatest
        return [*blocks[:-1], blocks[-1] / greatest]

    def _offsets(self, i: int, levels: list[list[Tensor]], context: Tensor | None
                 ) -> list[Tensor]:
        """What the blocks before and the context add to the block of a coordinate."""
        rows = slice(i * self.block_dim, (i + 1) * self.block_dim)
        return [_rows(layer.weight, layer.bias, rows, levels[k], None if k else context)
                for k, layer in enumerate(self.below)]

    def _shift(self, i: int, before: list[Tensor], context: Tensor | None) -> Tensor:
        weight, bias = self.shift.scaled()
        return _rows(weight, bias, slice(i, i + 1), before, context).squeeze(-1)

    def extra_repr(self) -> str:
        """Dimensions, sizes and order."""
        return (f"{super().extra_repr()}, block_dim={self.block_dim}, "
                f"num_hidden={self.num_hidden}, reverse={self.reverse}")


class _Ladder(NamedTuple):
    """One coordinate's way through the layers, the other coordinates being given."""

    offsets: list[Tensor]
    blocks: list[Tensor]
    v: Tensor
    gate: Tensor

    def climb(self, u: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Units of every layer, the value without its shift, and its log-slope."""
        h, slope = u.unsqueeze(-1), torch.ones_like(u).unsqueeze(-1)
        rungs = [h]
        for offset, block in zip(self.offsets, self.blocks, strict=True):
            h, slope = _level(h, slope, offset, block)
            rungs.append(h)
        value = u + self.gate * _product(self.v, h).squeeze(-1)
        return rungs, value, torch.log1p(self.gate * _product(self.v, slope).squeeze(-1))

    def root(self, target: Tensor, known: Tensor | None) -> Tensor:
        """The coordinate whose value is ``target``, by a search if it is not known."""
        def residual(u: Tensor) -> tuple[Tensor, Tensor]:
            _, value, log_slope = self.climb(u)
            return value - target, log_slope.exp()
        if known is not None:
            return refine_root(residual, known)
        reach = self.gate.abs() * self.v.sum()
        return increasing_root(residual, target - reach, target + reach, FEW_STEPS)


def _level(h: Tensor, slope: Tensor, offset: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Units of a layer, and their derivatives in the coordinate of their block."""
    h = torch.tanh(offset + _product(block, h))
    return h, (1 - h * h) * _product(block, slope)


def _product(block: Tensor, h: Tensor) -> Tensor:
    """``block @ h`` for the block of one coordinate, or the blocks of all."""
    return h @ block.mT if block.dim() == 2 else torch.einsum("dij,...dj->...di", block, h)


def _joined(parts: list[Tensor], context: Tensor | None) -> Tensor:
    return torch.cat(parts if context is None else [*parts, context], -1)


def _rows(weight: Tensor, bias: Tensor, rows: slice, before: list[Tensor],
          context: Tensor | None) -> Tensor:
    """Rows of a masked product that see the blocks before, which come first, and the context."""
    weight, bias = weight[rows], bias[rows]
    seen = weight[:, :sum(part.shape[-1] for part in before)]
    if context is not None:
        seen = torch.cat([seen, weight[:, -context.shape[-1]:]], -1)
    elif not before:
        return bias
    return F.linear(_joined(before, context), seen, bias)
