"""Which operations a recording splits into simpler ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table

aten = torch.ops.aten

# Kept whole, although torch knows how to split them: generated code does them in one go.
WHOLE = """
    addcdiv addcmul alias as_strided bmm clamp clamp_max clamp_min clone copy cumprod cumsum detach
    diagonal diagonal_backward dot expand fill flip floor_divide full full_like isinf lerp
    lift_fresh logical_and logical_not logical_or logical_xor masked_fill mv permute rsub
    scalar_tensor select select_backward sgn sigmoid_backward slice slice_backward softplus
    softplus_backward split split_with_sizes squeeze stack sum t tanh_backward threshold_backward
    transpose trunc unbind unsqueeze view where
""".split()
# Split too, although they belong to the core.
ALSO_SPLIT = ["_softmax.default", "_log_softmax.default", "linalg_vector_norm.default",
              "var_mean.correction",
              "embedding.default", "repeat.default", "elu.default", "leaky_relu.default",
              "gelu.default", "hardtanh.default", "addmv.default", "_adaptive_avg_pool2d.default"]


def decomposition(op: Any) -> Callable | None:
    """How to compute ``op`` by simpler operations, or None to keep it."""
    rule = _rules().get(op)
    return op.decompose if rule is None and _is_composite(op) else rule


def _is_composite(op: Any) -> bool:
    """Whether torch itself defines an operation by others, whatever the tensors."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), "CompositeImplicitAutograd"))


@cache
def _rules() -> dict[Any, Callable]:
    rules = {op: rule for op, rule in core_aten_decompositions().items()
             if getattr(op, "_opname", "") not in WHOLE}
    for name in ALSO_SPLIT:
        packet, overload = name.split(".")
        op = getattr(getattr(aten, packet), overload)
        rules[op] = decomposition_table[op]
    return rules | OWN


def _var(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None,
         keepdim: bool = False) -> Tensor:
    dims = list(range(x.dim())) if not dim else list(dim)
    squares = (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim)
    count = math.prod(x.shape[d] for d in dims)
    return squares / max(count - (1 if correction is None else correction), 0)


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    scale = (_var(x, dims, correction=0, keepdim=True) + eps).rsqrt()
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, scale


def _largest(x: Tensor) -> Tensor:
    return x.amax(list(range(x.dim())))


def _smallest(x: Tensor) -> Tensor:
    return x.amin(list(range(x.dim())))


def _argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The first place of the largest element, or of a nan."""
    if dim is None:
        place = _argmax(x.reshape(-1), 0)
        return place.reshape([1] * x.dim()) if keepdim else place
    if x.dim() == 0:
        return torch.zeros_like(x, dtype=torch.int64)
    size, shape = x.shape[dim], [1] * x.dim()
    shape[dim] = size
    hit = (x == x.amax(dim, keepdim=True)) | (x != x)
    places = torch.arange(size, device=x.device).reshape(shape)
    return torch.where(hit, places, size).amin(dim, keepdim=keepdim)


def _argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return _argmax(-x, dim, keepdim)


def _max(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax(dim, keepdim=keepdim), _argmax(x, dim, keepdim)


def _min(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim=keepdim), _argmin(x, dim, keepdim)


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    factor = factor.mT if upper else factor
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    size = factor.shape[-1]
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return _cholesky_solve(eye.expand(factor.shape), factor, upper)


def _distances(x: Tensor, y: Tensor, p: float, mode: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(x[..., :, None, :] - y[..., None, :, :], p, dim=-1)


def _distances_backward(grad: Tensor, x: Tensor, y: Tensor, p: float, distances: Tensor) -> Tensor:
    step = x[..., :, None, :] - y[..., None, :, :]
    if p == 1:
        slope = step.sgn()
    else:
        size = distances[..., None]
        slope = torch.where(size == 0, 0, step.sgn() * (step.abs() / size) ** (p - 1))
    return (grad[..., None] * slope).sum(-2)


OWN: dict[Any, Callable] = {
    aten.var.correction: _var, aten.native_layer_norm.default: _layer_norm,
    aten.max.default: _largest, aten.min.default: _smallest, aten.max.dim: _max,
    aten.min.dim: _min, aten.argmax.default: _argmax, aten.argmin.default: _argmin,
    aten.cholesky_solve.default: _cholesky_solve, aten.cholesky_inverse.default: _cholesky_inverse,
    aten._cdist_forward.default: _distances, aten._cdist_backward.default: _distances_backward,
    aten._euclidean_dist.default: lambda x, y: _distances(x, y, 2.0),
}
