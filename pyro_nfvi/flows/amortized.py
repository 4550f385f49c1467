"""A bijection in the units that an encoder's features say: what amortized posteriors are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.planar import ZERO

LEAST_SCALE = 1e-6


class Amortized(Bijection):
    r"""A bijection whose location, scale and own context are read off features.

    .. math:: z = m(c) + s(c) \odot f(u;\, h(c)), \qquad
              \log|\det J| = \log|\det J_f| + \textstyle\sum_i \log s_i(c)

    :math:`m`, :math:`s = \mathrm{softplus}(\cdot) > 0` and :math:`h` are linear in the features
    :math:`c` of an encoder. With the identity for :math:`f` this is the diagonal Gaussian of a
    variational autoencoder; the flow works in the units of that Gaussian. It starts as the
    identity, whatever the features.

    Args:
        bijection: The map :math:`f`, with or without a context of its own.
        context_dim: Number of features :math:`c`.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If ``bijection`` is none, or there are no features.

    Example:
        >>> from pyro_nfvi.flows import Flow, planar
        >>> flow = Flow(Amortized(planar(2, context_dim=4), context_dim=10))
        >>> flow(torch.randn(7, 10)).rsample().shape
        torch.Size([7, 2])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, section 3;
        Rezende & Mohamed (2015), arXiv:1505.05770, section 4.2 (flows with encoded parameters).
    """

    def __init__(self, bijection: Bijection, context_dim: int) -> None:
        if not isinstance(bijection, Bijection):
            raise ValueError("Amortized expected `bijection` to be a Bijection, got "
                             f"{type_name(bijection)}.")
        super().__init__(bijection.input_dim, context_dim)
        if not self.context_dim:
            raise ValueError("Amortized expected `context_dim` to be at least 1, got 0. Without "
                             "features use the bijection itself.")
        self.bijection = bijection
        self.units = nn.Linear(self.context_dim, 2 * self.input_dim)
        nn.init.zeros_(self.units.weight)
        nn.init.zeros_(self.units.bias)
        inner = bijection.context_dim
        self.inner_context = nn.Linear(self.context_dim, inner) if inner else None

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, inner = self._parts(context)
        w, log_det = self.bijection._forward(u, inner)
        return torch.addcmul(shift, w, scale), log_det + scale.log().sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, inner = self._parts(context)
        u, log_det = self.bijection._inverse((z - shift) / scale, inner)
        return u, log_det - scale.log().sum(-1)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, scale, inner = self._parts(context)
        u, log_det = self.bijection._inverse_at(u, (z - shift) / scale, inner)
        return u, log_det - scale.log().sum(-1)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        assert context is not None
        shift, raw = self.units(context).chunk(2, -1)
        inner = None if self.inner_context is None else self.inner_context(context)
        return shift, LEAST_SCALE + (1 - LEAST_SCALE) * F.softplus(raw + ZERO), inner
