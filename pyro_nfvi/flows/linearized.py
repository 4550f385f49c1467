"""A network at a point: its value, and its Jacobian as a product of few factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn import functional as F

from pyro_nfvi.flows.linear import matvec
from pyro_nfvi.flows.nets import OUTPUT_SCALE, OutputLinear


@dataclass(frozen=True)
class Linearized:
    r"""A multilayer perceptron :math:`g` from :math:`D` to :math:`D` numbers, at a point.

    .. math:: J = W_K\, \mathrm{diag}(s_{K-1})\, W_{K-1} \cdots \mathrm{diag}(s_1)\, W_1

    Whatever is asked of :math:`J` is computed from its factors, without a pass of autograd:
    results are differentiable, to any order.

    Attributes:
        value: :math:`g` at the point, ``(*batch, D)``.
        weights: :math:`W_1, \dots, W_K`, the same for the whole batch.
        slopes: Derivatives :math:`s_1, \dots, s_{K-1}` of the activations, ``(*batch, width)``.
    """

    value: Tensor
    weights: Sequence[Tensor]
    slopes: Sequence[Tensor]

    def trace(self) -> Tensor:
        r"""Trace of :math:`J`, which costs about as much as the value.

        .. math:: \mathrm{tr} J = s_1^\top
                  \left[W_1 W_K \odot (W_{K-1} \cdots \mathrm{diag}(s_2) W_2)^\top\right] s_{K-1}
        """
        first, last = self.weights[0], self.weights[-1]
        if not self.slopes:
            return first.diagonal().sum().expand(self.value.shape[:-1])
        if len(self.slopes) == 1:
            return self.slopes[0] @ (first * last.mT).sum(-1)
        inner = self.weights[1].mT
        for w, s in zip(self.weights[2:-1], self.slopes[1:-1], strict=True):
            inner = F.linear(inner * s.unsqueeze(-2), w)
        ring = (first @ last) * inner
        return (matvec(ring, self.slopes[-1]) * self.slopes[0]).sum(-1)

    def log_det(self) -> Tensor:
        r"""Log-determinant of :math:`I + J`, where the norm of :math:`J` is below one.

        .. math:: \det(I_D + A B) = \det(I_m + B A)

        so that the matrix is as small as the narrowest layer, however many coordinates.
        """
        log_det = log_det_near_identity(self._narrow()[1])
        return log_det.expand(self.value.shape[:-1])

    def solver(self) -> Callable[[Tensor], Tensor]:
        r"""Solves by :math:`I + J`, of which :math:`J = A B` is cut where it is narrowest.

        .. math:: (I_D + A B)^{-1} = I_D - A (I_m + B A)^{-1} B
        """
        cut, small = self._narrow()

        def solve(v: Tensor) -> Tensor:
            inner = solve_near_identity(small, self._through(v, range(cut)))
            return v - self._through(inner, range(cut, len(self.weights)))
        return solve

    def _narrow(self) -> tuple[int, Tensor]:
        """The layer before which the network is narrowest, and the product from there round."""
        widths = [w.shape[-1] for w in self.weights]
        cut, depth = widths.index(min(widths)), len(widths)
        eye = torch.eye(widths[cut], dtype=self.value.dtype, device=self.value.device)
        rows = self._through(eye, [*range(cut, depth), *range(cut)], rows=True)
        return cut, rows.mT

    def _through(self, x: Tensor, layers: Sequence[int], rows: bool = False) -> Tensor:
        """Tangents ``(*batch, width)``, or rows of them ``(*batch, n, width)``, through layers."""
        for k in layers:
            x = F.linear(x, self.weights[k])
            if k < len(self.slopes):
                x = x * (self.slopes[k].unsqueeze(-2) if rows else self.slopes[k])
        return x


@dataclass(frozen=True)
class Perceptron:
    r"""A multilayer perceptron, once the parameters of its layers are known.

    Attributes:
        weights: Matrix of each layer, ``(out, in)``.
        biases: What each layer adds, ``(out,)`` or ``(*batch, out)``.
        activations: Elementwise nonlinearity after each layer but the last.

    Shape:
        ``(*batch, D) -> (*batch, D)``.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activations: Sequence[nn.Module]

    def __call__(self, x: Tensor) -> Tensor:
        """Image of ``x``."""
        for w, b, activation in self._hidden():
            x = activation(F.linear(x, w) + b)
        return F.linear(x, self.weights[-1]) + self.biases[-1]

    def at(self, x: Tensor) -> Linearized:
        """Image and Jacobian at ``x``."""
        slopes = []
        for w, b, activation in self._hidden():
            x, slope = value_and_slope(activation, F.linear(x, w) + b)
            slopes.append(slope)
        return Linearized(F.linear(x, self.weights[-1]) + self.biases[-1], self.weights, slopes)

    def _hidden(self) -> Iterator[tuple[Tensor, Tensor, nn.Module]]:
        return zip(self.weights[:-1], self.biases[:-1], self.activations, strict=True)


def scaled(layer: OutputLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias of an output layer, as it applies them."""
    assert layer.weight is not None
    return OUTPUT_SCALE * layer.weight, OUTPUT_SCALE * layer.bias


def value_and_slope(activation: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative, itself differentiable."""
    if isinstance(activation, nn.Tanh):
        y = torch.tanh(x)
        return y, 1 - y * y
    if hasattr(activation, "value_and_slope"):
        pair: tuple[Tensor, Tensor] = activation.value_and_slope(x)
        return pair
    y, pull = vjp(activation, x)
    return y, pull(torch.ones_like(y))[0]


def log_det_near_identity(a: Tensor) -> Tensor:
    r"""Log-determinant of :math:`I + A` for a batch of matrices of norm below one."""
    if a.shape[-1] == 1:
        return torch.log1p(a[..., 0, 0])
    if a.shape[-1] == 2:
        return torch.log1p(a.diagonal(dim1=-2, dim2=-1).sum(-1) + _det_of_two(a))
    return torch.linalg.slogdet(_plus_identity(a)).logabsdet


def solve_near_identity(a: Tensor, v: Tensor) -> Tensor:
    r"""Solution of :math:`(I + A) x = v` for a batch of matrices of norm below one."""
    if a.shape[-1] == 1:
        return v / (1 + a[..., 0])
    if a.shape[-1] == 2:
        x, y = v.unbind(-1)
        up = (1 + a[..., 1, 1]) * x - a[..., 0, 1] * y
        down = (1 + a[..., 0, 0]) * y - a[..., 1, 0] * x
        det = 1 + a.diagonal(dim1=-2, dim2=-1).sum(-1) + _det_of_two(a)
        return torch.stack([up, down], -1) / det.unsqueeze(-1)
    solution, _ = torch.linalg.solve_ex(_plus_identity(a), v.unsqueeze(-1))
    return solution.squeeze(-1)


def _plus_identity(a: Tensor) -> Tensor:
    return a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _det_of_two(a: Tensor) -> Tensor:
    return a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
