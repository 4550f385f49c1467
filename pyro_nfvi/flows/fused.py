"""Splines and chains of ridges as single operations of a recorded graph.

Each has its plain twin in :mod:`pyro_nfvi.flows.spline` or :mod:`pyro_nfvi.flows.planar`, by which
it runs where no code is generated, and a rule in :mod:`pyro_nfvi.engine.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi.flows import spline
from pyro_nfvi.flows.planar import plain_heights
from pyro_nfvi.flows.transformers import MAX_LOG_SCALE

CONSTANTS = [spline.ZERO_SLOPE, spline.MIN_BIN, spline.MIN_SLOPE, MAX_LOG_SCALE]
Pair = tuple[Tensor, Tensor]


def spline_pass(x: Tensor, params: Tensor, num_bins: int, bound: float, *, inverse: bool) -> Pair:
    """One direction of the spline and its log-derivative, as one operation."""
    params = params.expand(*x.shape, params.shape[-1])
    result: Pair = (_inverse if inverse else _forward)(x, params, num_bins, bound, CONSTANTS)
    return result


def ridge_heights(a: Tensor, g: Tensor) -> Tensor:
    """The recurrence of a chain of planar layers, as one operation."""
    heights: Tensor = _ridges(a, g)
    return heights


@torch.library.custom_op("pyro_nfvi::ridge_heights", mutates_args=())
def _ridges(a: Tensor, g: Tensor) -> Tensor:
    return plain_heights(a, g)


@torch.library.custom_op("pyro_nfvi::ridge_heights_backward", mutates_args=())
def _ridges_backward(t: Tensor, g: Tensor, gt: Tensor) -> Tensor:
    slope, count = 1 - t * t, t.shape[-1]
    ga: list[Tensor] = []  # from the last layer to the first
    for k in reversed(range(count)):
        later = torch.stack(ga, -1) @ g[k + 1:, k].flip(0) if ga else 0
        ga.append((gt[..., k] + later) * slope[..., k])
    return torch.stack(ga[::-1], -1)


def _ridges_gradients(ctx: Any, gt: Tensor) -> Pair:
    t, g = ctx.saved_tensors
    ga = _ridges_backward(t, g, gt)
    size = t.shape[-1]
    return ga, (ga.reshape(-1, size).mT @ t.reshape(-1, size)).tril(-1)


def _plain(num_bins: int, bound: float, inverse: bool) -> Callable[[Tensor, Tensor], Pair]:
    twin = spline.RationalQuadraticSpline(num_bins, bound)
    return twin._plain_inverse if inverse else twin._plain_forward


class _Adjoint:
    """The curve of every element at ``u``, and what gradients do to its inputs.

    Written out because an operation's own rule runs below autograd.
    """

    def __init__(self, u: Tensor, params: Tensor, num_bins: int, bound: float) -> None:
        twin = spline.RationalQuadraticSpline(num_bins, bound)
        self.twin, self.u, self.params = twin, u, params
        self.bins, self.slopes, _, self.log_scale = twin._split(params)
        self.v = u.clamp(-bound, bound)
        _, y, self.w, self.h, self.d0, self.d1 = twin._bin(self.v, self.bins, self.slopes, 0)
        knots = torch.cumsum(self.bins, -2) - bound
        self.at = (knots[..., 0, :-1, :] <= self.v.unsqueeze(-2)).sum(-2, keepdim=True)
        left = knots[..., 0, :, :].gather(-2, self.at).squeeze(-2) - self.w
        self.t = (self.v - left) / self.w
        self.xi, self.s = self.t.clamp(0, 1), self.h / self.w
        self.bend, self.mixed = self.d1 + self.d0 - 2 * self.s, self.xi * (1 - self.xi)
        self.den = self.s + self.bend * self.mixed
        value, self.slope = twin._spline(self.xi, y, self.w, self.h, self.d0, self.d1)
        self.value = value + self.slope * (u - self.v)

    def log_slope_gradient(self) -> Tensor:
        """Derivative of the log-slope in ``u``."""
        xi, rest = self.xi, 1 - self.xi
        num = self.d1 * xi * xi + 2 * self.s * self.mixed + self.d0 * rest * rest
        num_1 = 2 * (self.d1 * xi + self.s * (1 - 2 * xi) - self.d0 * rest)
        bent = num_1 / num - 2 * self.bend * (1 - 2 * xi) / self.den
        return torch.where((self.v == self.u) & (self.t == self.xi), bent / self.w, 0)

    def pull(self, gz: Tensor, gl: Tensor) -> Pair:
        """Gradients of ``u`` and the parameters, given those of value and log-derivative."""
        xi, rest, s, h, den, mixed = self.xi, 1 - self.xi, self.s, self.h, self.den, self.mixed
        ratio = (s / den).square()
        num, q = self.slope / ratio, (s * xi * xi + self.d0 * mixed) / den
        gval = gz * self.log_scale.exp()
        gslope = gl / self.slope + gval * (self.u - self.v)
        gnum, ga = gslope * ratio, gval * h / den
        gden = -2 * gslope * self.slope / den - ga * q
        gs = gslope * 2 * s * num / den.square() + 2 * gnum * mixed + ga * xi * xi \
            + gden * (1 - 2 * mixed)
        gmixed = 2 * gnum * s + ga * self.d0 + gden * self.bend
        gxi = 2 * gnum * (self.d1 * xi - self.d0 * rest) + 2 * ga * s * xi + gmixed * (1 - 2 * xi)
        gxi = torch.where((self.v == self.u) & (self.t == xi), gxi, 0)  # tails: its paths cancel
        edges = torch.stack([-gxi / self.w, gval], -2)
        own = torch.stack([-(gs * s + gxi * self.t) / self.w, gval * q + gs / self.w], -2)
        ends = torch.stack([gnum * rest * rest + (ga + gden) * mixed,
                            gnum * xi * xi + gden * mixed], -2)
        gu = gval * self.slope + torch.where(self.v == self.u, gxi / self.w - gval * self.slope, 0)
        raw_scale = (gz * self.value * self.log_scale.exp() + gl) * (
            1 - (self.log_scale / MAX_LOG_SCALE).square())
        return gu, self._parameters(edges, own, ends, gz, raw_scale)

    def _parameters(self, edges: Tensor, own: Tensor, ends: Tensor, gz: Tensor, raw_scale: Tensor
                    ) -> Tensor:
        count, bound = self.twin.num_bins, self.twin.bound
        place = torch.arange(count, device=self.u.device).unsqueeze(-1)
        at, g_own, g_edge = self.at.unsqueeze(-3), own.unsqueeze(-2), edges.unsqueeze(-2)
        g = torch.where(place < at, g_edge, torch.where(place == at, g_own, 0))
        share = 2 * bound * (1 - spline.MIN_BIN * count)
        p = (self.bins - 2 * bound * spline.MIN_BIN) / share
        raw_bins = share * p * (g - (p * g).sum(-2, keepdim=True))
        q = self.slopes + spline.ZERO_SLOPE
        knot = torch.arange(count + 1, device=self.u.device).unsqueeze(-1)
        g_slopes = torch.where(knot == self.at, ends[..., :1, :], 0) \
            + torch.where(knot == self.at + 1, ends[..., 1:, :], 0)
        return torch.cat([raw_bins.flatten(-3, -2), g_slopes * torch.sigmoid(q),
                          gz.unsqueeze(-2), raw_scale.unsqueeze(-2)], -2).mT


@torch.library.custom_op("pyro_nfvi::spline_forward", mutates_args=())
def _forward(u: Tensor, params: Tensor, num_bins: int, bound: float, constants: Sequence[float]
             ) -> tuple[Tensor, Tensor]:
    return _plain(num_bins, bound, False)(u, params)


@torch.library.custom_op("pyro_nfvi::spline_inverse", mutates_args=())
def _inverse(z: Tensor, params: Tensor, num_bins: int, bound: float, constants: Sequence[float]
             ) -> tuple[Tensor, Tensor]:
    return _plain(num_bins, bound, True)(z, params)


@torch.library.custom_op("pyro_nfvi::spline_backward", mutates_args=())
def _backward(u: Tensor, params: Tensor, gz: Tensor, gl: Tensor, num_bins: int, bound: float,
              constants: Sequence[float]) -> tuple[Tensor, Tensor]:
    gu, gp = _Adjoint(u, params, num_bins, bound).pull(gz, gl)
    return gu.clone(), gp.clone()


@torch.library.custom_op("pyro_nfvi::spline_inverse_backward", mutates_args=())
def _inverse_backward(u: Tensor, params: Tensor, gu: Tensor, gl: Tensor, num_bins: int,
                      bound: float, constants: Sequence[float]) -> tuple[Tensor, Tensor]:
    curve = _Adjoint(u, params, num_bins, bound)  # u solves z = f(u): f's gradients, turned round
    gz = (gu - gl * curve.log_slope_gradient()) / (curve.slope * curve.log_scale.exp())
    return gz, curve.pull(-gz, -gl)[1].clone()


def _same_shapes(x: Tensor, params: Tensor, *_: Any) -> Pair:
    return torch.empty_like(x), torch.empty_like(x)


def _gradient_shapes(x: Tensor, params: Tensor, *_: Any) -> Pair:
    return torch.empty_like(x), torch.empty_like(params)


def _keep_input(ctx: Any, inputs: tuple, output: Pair) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = inputs[2:]


def _keep_output(ctx: Any, inputs: tuple, output: Pair) -> None:
    ctx.save_for_backward(output[0], inputs[1])
    ctx.options = inputs[2:]


def _batched(op: Callable) -> Callable:
    """Rule under ``torch.func.vmap``: the batch goes to the front, where the operation takes it."""
    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Pair, tuple[int, int]]:
        moved = [(a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0))
                 if isinstance(a, Tensor) else a for a, dim in zip(args, in_dims, strict=True)]
        return op(*moved), (0, 0)
    return rule


for _op, _rule, _keep in ((_forward, _backward, _keep_input),
                          (_inverse, _inverse_backward, _keep_output)):
    _op.register_fake(_same_shapes)
    _rule.register_fake(_gradient_shapes)
    _op.register_autograd(
        lambda ctx, gy, gl, rule=_rule: (*rule(*ctx.saved_tensors, gy, gl, *ctx.options),
                                         None, None, None), setup_context=_keep)
    _op.register_vmap(_batched(_op))
    _rule.register_vmap(_batched(_rule))
_ridges.register_fake(lambda a, g: torch.empty_like(a))
_ridges_backward.register_fake(lambda t, g, gt: torch.empty_like(t))
_ridges.register_autograd(_ridges_gradients, setup_context=lambda ctx, inputs, output:
                          ctx.save_for_backward(output, inputs[1]))
