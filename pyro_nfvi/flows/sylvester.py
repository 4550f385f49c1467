"""Sylvester flows: many ridges in one frame, log-det by Sylvester's determinant identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.linear import matvec
from pyro_nfvi.flows.nets import ContextParameter
from pyro_nfvi.flows.planar import MARGIN
from pyro_nfvi.flows.roots import FEW_STEPS, Residual, increasing_root

MAX_RIDGES = 16  # of a layer whose number is not set
NUM_REFINEMENTS = 2  # steps by a constant Jacobian, each of which adds an exact derivative


class OrthogonalFrame(nn.Module):
    """Any orthonormal frame: the QR factor of a learned matrix, whatever the context.

    A factorization for each context would cost more than all the rest of a layer, for little.

    Args:
        input_dim: Number of coordinates :math:`D`.
        num_ridges: Number of columns :math:`M`.
        context_dim: Number of context coordinates, which are not used.

    Shape:
        ``(*batch, context_dim) -> (D, M)``.

    Example:
        >>> q = OrthogonalFrame(5, 2)()
        >>> torch.allclose(q.mT @ q, torch.eye(2), atol=1e-5)
        True

    References:
        van den Berg et al. (2018), arXiv:1803.05649, section 4.1 (orthogonal Sylvester flows).
    """

    def __init__(self, input_dim: int, num_ridges: int, context_dim: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(input_dim, num_ridges))

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The columns."""
        return torch.linalg.qr(self.value).Q


class HouseholderFrame(nn.Module):
    r"""Frame of a product of reflections, of which every context may have its own.

    .. math:: Q = H_1 \cdots H_n E_M, \qquad H_i = I - 2 \frac{v_i v_i^\top}{v_i^\top v_i}

    :math:`E_M` are the first :math:`M` unit vectors. The product is taken in one go, as
    :math:`I - V S^{-1} V^\top` with :math:`S` the upper triangle of :math:`V^\top V`, of half
    the diagonal.

    Args:
        input_dim: Number of coordinates :math:`D`.
        num_ridges: Number of columns :math:`M`.
        context_dim: Number of context coordinates; 0 for none.
        num_reflections: Number of reflections :math:`n`.

    Shape:
        ``(D, M)`` without context, ``(*batch, context_dim) -> (*batch, D, M)`` with.

    Example:
        >>> q = HouseholderFrame(5, 2, context_dim=3)(torch.randn(7, 3))
        >>> q.shape, torch.allclose(q.mT @ q, torch.eye(2), atol=1e-5)
        (torch.Size([7, 5, 2]), True)

    References:
        van den Berg et al. (2018), arXiv:1803.05649, section 4.2 (Householder Sylvester flows);
        Joffrain et al. (2006), Accumulating Householder Transformations, Revisited (the product).
    """

    def __init__(self, input_dim: int, num_ridges: int, context_dim: int = 0, *,
                 num_reflections: int = 8) -> None:
        super().__init__()
        check_positive_int("HouseholderFrame", "num_reflections", num_reflections)
        self.num_ridges = num_ridges
        self.vectors = ContextParameter(torch.randn(input_dim, num_reflections), context_dim)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The columns, for this context."""
        v = self.vectors(context)
        eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
        gram = v.mT @ v
        half = gram.diagonal(dim1=-2, dim2=-1) / 2 + torch.finfo(v.dtype).tiny
        s = gram.triu(1) + torch.diag_embed(half)
        product = torch.linalg.solve_triangular(s, v.mT[..., :self.num_ridges], upper=True)
        return eye[:, :self.num_ridges] - v @ product

    def extra_repr(self) -> str:
        """Number of reflections."""
        return f"num_reflections={self.vectors.value.shape[-1]}"


class CoordinateFrame(nn.Module):
    """The coordinate axes themselves, from the first on or from the last: nothing is learned.

    Args:
        input_dim: Number of coordinates :math:`D`.
        num_ridges: Number of columns :math:`M`.
        context_dim: Number of context coordinates, which are not used.
        reverse: Whether to start with the last axis.

    Shape:
        ``(*batch, context_dim) -> (D, M)``.

    Example:
        >>> CoordinateFrame(3, 2, reverse=True)()
        tensor([[0., 0.],
                [0., 1.],
                [1., 0.]])

    References:
        van den Berg et al. (2018), arXiv:1803.05649, section 4.3 (triangular Sylvester flows).
    """

    axes: Tensor

    def __init__(self, input_dim: int, num_ridges: int, context_dim: int = 0, *,
                 reverse: bool = False) -> None:
        super().__init__()
        axes = torch.eye(input_dim)
        axes = axes.flip(0) if reverse else axes
        self.register_buffer("axes", axes[:, :num_ridges].clone())

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The columns."""
        return self.axes


Frame = Callable[[int, int, int], nn.Module]


class Sylvester(Bijection):
    r"""Sylvester flow: :math:`M` ridges at once, in an orthonormal frame.

    .. math::
        z = u + Q R \tanh(\tilde R Q^\top u + b), \qquad
        \log|\det J| = \textstyle\sum_i \log(1 + R_{ii} \tilde R_{ii} \tanh'(\cdot)_i)

    :math:`Q` is :math:`D \times M` orthonormal and :math:`R, \tilde R` are upper triangular with
    diagonals inside :math:`(-1, 1)`. :math:`R = 0` is the identity. The inverse solves the
    triangular system from its last equation up, one scalar root each.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        num_ridges: Number of ridges :math:`M`, at most :math:`D`. Default: all, up to 16.
        frame: Constructor of the frame :math:`Q`, which takes :math:`D`, :math:`M` and the number
            of context coordinates: :class:`OrthogonalFrame`, :class:`HouseholderFrame`, or
            :class:`CoordinateFrame`.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If there are more ridges than coordinates, or ``frame`` builds no module.

    Example:
        >>> layer = Sylvester(5, num_ridges=2, frame=HouseholderFrame)
        >>> u = torch.randn(7, 5)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u)
        True

    References:
        van den Berg, Hasenclever, Tomczak & Welling (2018), Sylvester Normalizing Flows for
        Variational Inference, arXiv:1803.05649, eq. 6-9.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, num_ridges: int | None = None,
                 frame: Frame = OrthogonalFrame) -> None:
        super().__init__(input_dim, context_dim)
        size = min(self.input_dim, MAX_RIDGES) if num_ridges is None else num_ridges
        self.num_ridges = check_positive_int("Sylvester", "num_ridges", size)
        if self.num_ridges > self.input_dim:
            raise ValueError(f"Sylvester expected `num_ridges` of at most input_dim="
                             f"{self.input_dim}, got {num_ridges}.")
        if isinstance(frame, nn.Module) or not callable(frame):
            raise ValueError("Sylvester expected `frame` to be a constructor such as "
                             f"HouseholderFrame, got {frame!r}.")
        self.frame = frame(self.input_dim, self.num_ridges, self.context_dim)
        self.outer = ContextParameter(torch.zeros(size, size), self.context_dim)
        self.inner = ContextParameter(torch.ones(size).diag(), self.context_dim)
        self.bias = ContextParameter(torch.zeros(size), self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        q, outer, inner, b = self._weights(context)
        t = torch.tanh(matvec(inner, matvec(q.mT, u)) + b)
        return u + matvec(q, matvec(outer, t)), _log_det(outer, inner, t)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        q, outer, inner, b = self._weights(context)
        t = _triangular_root(matvec(q.mT, z), outer, inner, b)
        return z - matvec(q, matvec(outer, t)), -_log_det(outer, inner, t)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        q, outer, inner, b = self._weights(context)
        t = _refined_root(matvec(q.mT, u), matvec(q.mT, z), outer, inner, b)
        return z - matvec(q, matvec(outer, t)), -_log_det(outer, inner, t)

    def _weights(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outer, inner = _bounded_upper(self.outer(context)), _bounded_upper(self.inner(context))
        return self.frame(context), outer, inner, self.bias(context)

    def extra_repr(self) -> str:
        """Dimensions and number of ridges."""
        return f"{super().extra_repr()}, num_ridges={self.num_ridges}"


def _bounded_upper(raw: Tensor) -> Tensor:
    """Upper-triangular matrix whose diagonal lies strictly inside (-1, 1)."""
    diagonal = (1 - MARGIN) * torch.tanh(raw.diagonal(dim1=-2, dim2=-1))
    return raw.triu(1) + torch.diag_embed(diagonal)


def _log_det(outer: Tensor, inner: Tensor, t: Tensor) -> Tensor:
    gain = outer.diagonal(dim1=-2, dim2=-1) * inner.diagonal(dim1=-2, dim2=-1)
    return torch.log1p(gain * (1 - t * t)).sum(-1)


def _triangular_root(target: Tensor, outer: Tensor, inner: Tensor, bias: Tensor) -> Tensor:
    r"""Solve :math:`y + R t = \text{target},\ t = \tanh(\tilde R y + b)` for :math:`t`."""
    y: list[Tensor] = []  # from the last coordinate to the first
    t: list[Tensor] = []
    for i in reversed(range(target.shape[-1])):
        rest = target[..., i] - _weighted(outer[..., i, i + 1:], t)
        offset = bias[..., i] + _weighted(inner[..., i, i + 1:], y)
        residual = _ridge_in_frame(rest, outer[..., i, i], inner[..., i, i], offset)
        reach = outer[..., i, i].abs()
        y_i = increasing_root(residual, rest - reach, rest + reach, FEW_STEPS)
        y.insert(0, y_i)
        t.insert(0, torch.tanh(inner[..., i, i] * y_i + offset))
    return torch.stack(t, -1)


def _refined_root(y: Tensor, target: Tensor, outer: Tensor, inner: Tensor, bias: Tensor
                  ) -> Tensor:
    """The same with a known root ``y``, to which implicit gradients are attached."""
    y = y.detach()
    with torch.no_grad():
        t = torch.tanh(matvec(inner, y) + bias)
        bent = (outer * (1 - t * t).unsqueeze(-2)) @ inner
        slope = bent + torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    for _ in range(NUM_REFINEMENTS):
        gap = target - y - matvec(outer, torch.tanh(matvec(inner, y) + bias))
        step = torch.linalg.solve_triangular(slope, gap.unsqueeze(-1), upper=True)
        y = y + step.squeeze(-1)
    return torch.tanh(matvec(inner, y) + bias)


def _weighted(row: Tensor, values: list[Tensor]) -> Tensor | float:
    return (row * torch.stack(values, -1)).sum(-1) if values else 0.0


def _ridge_in_frame(target: Tensor, outer: Tensor, inner: Tensor, offset: Tensor) -> Residual:
    def residual(y: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.tanh(inner * y + offset)
        return y + outer * t - target, 1 + outer * inner * (1 - t * t)
    return residual
