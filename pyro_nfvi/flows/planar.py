"""Planar and radial flows: low-rank moves, log-det by the determinant lemma."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_nfvi.engine.record import is_recording
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import ContextParameter
from pyro_nfvi.flows.roots import Residual, increasing_root, refine_root

MARGIN = 1e-3  # keeps every derivative of a layer above this: invertible in float32 too
ZERO = math.log(math.expm1(1.0))  # softplus(ZERO) = 1


class Planar(Bijection):
    r"""Planar flow: a ridge of stretch or squeeze across one direction.

    .. math::
        z = u + \hat v \tanh(w^\top u + b), \qquad
        \hat v = v + [m(w^\top v) - w^\top v] \frac{w}{w^\top w}, \qquad
        \log|\det J| = \log\left|1 + w^\top \hat v\, (1 - \tanh^2(w^\top u + b))\right|

    with :math:`m(x) = (1 - \epsilon)(\mathrm{softplus}(x + \log(e - 1)) - 1) > -1`, so that the
    map is invertible and :math:`v = 0` is the identity. The inverse solves one scalar equation.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Example:
        >>> layer = Planar(2)
        >>> u = torch.randn(5, 2)
        >>> z, log_det = layer(u)
        >>> torch.allclose(layer.inverse(z)[0], u)
        True

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows,
        arXiv:1505.05770, eq. 10-12 and appendix A.1.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        direction = torch.randn(self.input_dim) / math.sqrt(self.input_dim)
        init = torch.cat([direction, torch.zeros(self.input_dim + 1)])
        self.params = ContextParameter(init, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, v, b, stretch = self._weights(context)
        t = torch.tanh(_dot(u, w) + b)
        z = torch.addcmul(u, t.unsqueeze(-1), v)
        return z, torch.log1p(stretch * (1 - t * t))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, v, b, stretch = self._weights(context)
        target = _dot(z, w) + b
        reach = stretch.abs()
        s = increasing_root(_ridge(target, stretch), target - reach, target + reach)
        return self._undo(z, v, stretch, s)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, v, b, stretch = self._weights(context)
        s = refine_root(_ridge(_dot(z, w) + b, stretch), _dot(u, w) + b)
        return self._undo(z, v, stretch, s)

    @staticmethod
    def _undo(z: Tensor, v: Tensor, stretch: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(s)
        u = torch.addcmul(z, t.unsqueeze(-1), v, value=-1)
        return u, -torch.log1p(stretch * (1 - t * t))

    def _weights(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The paper's w, constrained v, b, and the product of w with the constrained v."""
        return self._constrained(self.params(context))

    @staticmethod
    def _constrained(params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dim = params.shape[-1] // 2
        w, v, b = params.split([dim, dim, 1], -1)
        raw = (w * v).sum(-1, keepdim=True)
        stretch = _above_minus_one(raw)
        norm = (w * w).sum(-1, keepdim=True) + torch.finfo(w.dtype).tiny
        return w, torch.addcmul(v, (stretch - raw) / norm, w), b.squeeze(-1), stretch.squeeze(-1)

    @classmethod
    def _forward_run(cls, layers: Sequence[Bijection], u: Tensor, context: Tensor | None
                     ) -> tuple[Tensor, Tensor]:
        r"""A whole chain by two products, as the heights :math:`t_k` depend on few numbers.

        .. math:: t_k = \tanh(w_k^\top u + b_k + \textstyle\sum_{j<k} w_k^\top \hat v_j\, t_j),
                  \qquad z = u + \textstyle\sum_k t_k \hat v_k
        """
        if len(layers) == 1 or any(layer.context_dim for layer in layers):
            return super()._forward_run(layers, u, context)
        params = torch.stack([layer.params() for layer in layers])
        w, v, b, stretch = cls._constrained(params)
        t = _heights(u @ w.mT + b, w @ v.mT)
        return u + t @ v, torch.log1p(stretch * (1 - t * t)).sum(-1)


class Radial(Bijection):
    r"""Radial flow: stretch or squeeze around a centre.

    .. math::
        z = u + \frac{\beta}{\alpha + r} (u - c), \quad r = \lVert u - c \rVert, \quad
        \log|\det J| = (D - 1) \log\left(1 + \frac{\beta}{\alpha + r}\right)
        + \log\left(1 + \frac{\alpha \beta}{(\alpha + r)^2}\right)

    with :math:`\alpha > 0` and :math:`\beta = \alpha\, m(\tilde\beta) > -\alpha`, where
    :math:`m(0) = 0` is the identity. The inverse is the root of a quadratic in :math:`r`.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Example:
        >>> layer = Radial(2)
        >>> u = torch.randn(5, 2)
        >>> z, log_det = layer(u)
        >>> torch.allclose(layer.inverse(z)[0], u, atol=1e-6)
        True

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows,
        arXiv:1505.05770, eq. 14 and appendix A.2.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        log_alpha = torch.tensor([0.5 * math.log(self.input_dim)])  # the radius of typical noise
        init = torch.cat([torch.randn(self.input_dim), log_alpha, torch.zeros(1)])
        self.params = ContextParameter(init, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._weights(context)
        offset = u - centre
        r = torch.linalg.vector_norm(offset, dim=-1)
        z = torch.addcmul(u, (beta / (alpha + r)).unsqueeze(-1), offset)
        return z, self._log_det(r, alpha, beta)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._weights(context)
        offset = z - centre
        r = _radius(torch.linalg.vector_norm(offset, dim=-1), alpha, beta)
        u = centre + offset / (1 + beta / (alpha + r)).unsqueeze(-1)
        return u, -self._log_det(r, alpha, beta)

    def _log_det(self, r: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        h = 1 / (alpha + r)
        return (self.input_dim - 1) * torch.log1p(beta * h) + torch.log1p(alpha * beta * h * h)

    def _weights(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        centre, log_alpha, raw = self.params(context).split([self.input_dim, 1, 1], -1)
        alpha = log_alpha.squeeze(-1).exp()
        return centre, alpha, alpha * _above_minus_one(raw.squeeze(-1))


def _above_minus_one(x: Tensor) -> Tensor:
    r"""The constraint :math:`m(x) > -1` with :math:`m(0) = 0`."""
    return (1 - MARGIN) * (F.softplus(x + ZERO) - 1)


def _dot(x: Tensor, w: Tensor) -> Tensor:
    """Inner products of ``x`` with one vector, or with one a batch element."""
    return x @ w if w.dim() == 1 else (x * w).sum(-1)


def _heights(a: Tensor, g: Tensor) -> Tensor:
    r"""Solve :math:`t_k = \tanh(a_k + \sum_{j<k} g_{kj} t_j)`, of shape ``(*batch, K)``."""
    if is_recording():  # one operation of the graph
        from pyro_nfvi.flows.fused import ridge_heights
        return ridge_heights(a, g)
    return plain_heights(a, g)


def plain_heights(a: Tensor, g: Tensor) -> Tensor:
    """The recurrence, one step a layer."""
    t = [torch.tanh(a[..., 0])]
    for k in range(1, a.shape[-1]):
        t.append(torch.tanh(a[..., k] + torch.stack(t, -1) @ g[k, :k]))
    return torch.stack(t, -1)


def _ridge(target: Tensor, stretch: Tensor) -> Residual:
    r"""Residual of :math:`s + k \tanh s = y`, increasing in :math:`s` for :math:`k > -1`."""
    def residual(s: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(s)
        return s + stretch * t - target, 1 + stretch * (1 - t * t)
    return residual


def _radius(distance: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    r"""Root :math:`r \ge 0` of :math:`r^2 + (\alpha + \beta - d) r - \alpha d = 0`."""
    p = distance - alpha - beta
    q = (p * p + 4 * alpha * distance).sqrt()
    cancelling = 2 * alpha * distance / (q - p.clamp(max=0))  # the same root, for p < 0
    return torch.where(p < 0, cancelling, (p + q) / 2)
