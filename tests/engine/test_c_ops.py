"""Generated C code: every operation alone, and random expressions of many, against torch."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pyro_nfvi.engine.c.ops import RULES, opname
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.decompositions import decomposition
from pyro_nfvi.engine.record import record

aten = torch.ops.aten
Case = Callable[[SimpleNamespace], list[Tensor]]
FLOATS = [torch.float32, torch.float64]
CUSTOM = {name for name in RULES if not hasattr(aten, name)}  # tested where they are defined
ULPS = 4  # allowed error of one operation, in units of the last place; torch itself makes 2
ROUGH = {"i0": 32, "special_i0e": 32, "special_i1": 32, "special_i1e": 32, "special_erfcx": 1e3,
         "special_ndtri": 100, "digamma": 1e3,
         "polygamma": 1e7}  # where torch errs more; test_c_functions.py knows the truth
SUM_ULPS = 64  # of operations whose terms cancel: in units of the largest number, at least of 1
SUMS = set("""_linalg_check_errors add addcdiv addcmul addmm addmv baddbmm bmm cumsum digamma dot
    lerp lgamma linalg_cholesky_ex linalg_qr linalg_solve_triangular mean mm mv rsub sub sum
    tanh_backward """.split())
SIGNLESS = SUMS | {"maximum", "minimum", "amax", "amin", "clamp", "special_i1",
                   "special_i1e"}  # where either zero is right


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_NFVI_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


# ------------------------------------------------------------------ tensors to work on

def pool(dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of the cases: ordinary numbers in many shapes, and edge values."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)
    info = torch.finfo(dtype)
    edges = [0.0, 1.0, 0.5, 1.5, 2.0, 3.0, 0.1, 1e-3, 1e-9, info.tiny, info.tiny / 64, info.max,
             info.max / 2, 1e4, 30.0, 88.0, 100.0, 720.0, math.inf]
    square = normal(2, 4, 4)
    return {
        "x": normal(3, 4), "y": normal(3, 4), "row": normal(4), "column": normal(3, 1),
        "number": normal(), "one": normal(1, 1), "cube": normal(2, 3, 4),
        "wide": normal(2, 3, 4, 5), "long": normal(67), "tall": normal(40, 9),
        "edges": torch.tensor([*edges, *(-e for e in edges), math.nan], dtype=dtype),
        "spd": square @ square.mT + 4 * torch.eye(4, dtype=dtype), "rhs": normal(2, 4, 3),
        "whole": whole(-9, 9, 3, 4), "count": whole(1, 6, 3, 4), "places": whole(0, 3, 3, 4),
        "picks": whole(-3, 3, 5), "mask": normal(3, 4) > 0, "mask_row": normal(4) > 0,
        "small": whole(-9, 9, 3, 4).int()}


def layouts(p: SimpleNamespace) -> list[Tensor]:
    """Ordinary numbers, the same in every order that memory may have."""
    return [p.x, p.x.T, p.wide[:, ::2, 1:, ::3], p.wide.permute(2, 0, 3, 1), p.number, p.one,
            p.row.expand(3, 4), p.column.expand(2, 3, 4), p.tall[::3, 1::2], p.long, p.long.flip(0),
            p.cube[1], p.cube[:, :, 2], p.x[:0]]


def pairs(p: SimpleNamespace) -> list[tuple[Tensor, Tensor]]:
    """Operands that broadcast."""
    return [(p.x, p.y), (p.x, p.y.T.contiguous().T), (p.x, p.row), (p.column, p.x), (p.number, p.x),
            (p.cube, p.column), (p.row, p.column), (p.one, p.number), (p.wide[..., 0], p.cube[:1]),
            (p.x.T, p.column.T), (p.number, p.number), (p.row[::2], p.column)]


# ------------------------------------------------------------------ one table: name -> cases

def unary(op: Callable, whole: bool = False, edges: Sequence[int] | None = None) -> Case:
    def case(p: SimpleNamespace) -> list[Tensor]:
        special = p.edges if edges is None else p.edges[list(edges)]
        results = [op(x) for x in layouts(p)] + [op(special)]
        return results + ([op(p.whole), op(p.small)] if whole else [])
    return case


def binary(op: Callable, whole: str = "", scalar: bool = True, flag: bool = False,
           edges: Sequence[int] | None = None) -> Case:
    """``whole`` is the name of integers that may be the second operand."""
    def case(p: SimpleNamespace) -> list[Tensor]:
        special = p.edges if edges is None else p.edges[list(edges)]
        results = [op(x, y) for x, y in pairs(p)] + [op(special[:, None], special)]
        results += [op(p.x, 2.5), op(p.x.T, -1)] if scalar else []
        if whole:
            integers = getattr(p, whole)
            results += [op(p.whole, integers), op(p.x, integers), op(integers, p.x.T.T),
                        op(p.small, integers.int()), op(p.small, integers)]
            results += [op(p.whole, 2)] if scalar else []
        return results + ([op(p.mask, p.mask_row)] if flag else [])
    return case


def reduction(op: Callable) -> Case:
    def case(p: SimpleNamespace) -> list[Tensor]:
        dims = [(d,) for d in range(4)] + list(itertools.combinations(range(4), 2)) + [
            (0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (-1,)]
        turned = p.wide.permute(2, 0, 3, 1)
        return [op(x, d, k) for x in (p.wide, turned) for d in dims for k in (False, True)] + [
            op(p.row.expand(3, 4), (0,), False), op(p.number, (), False), op(p.one, (1,), True),
            op(p.edges[:18], (0,), False), op(p.tall, (0,), False), op(p.tall, (1,), True)]
    return case


def single(op: Callable) -> Case:
    """A reduction of one dimension or all."""
    def case(p: SimpleNamespace) -> list[Tensor]:
        return [op(p.wide, 2), op(p.wide, -1), op(p.cube.permute(2, 0, 1), 0), op(p.x.T, 1),
                op(p.row.expand(3, 4), 0), op(p.column, 1)]
    return case


def bitwise(op: Callable) -> Case:
    return lambda p: [op(p.whole, p.places), op(p.mask, p.mask_row), op(p.whole, 5),
                      op(p.small, p.whole[:1])]


EXACT = [k for k in range(38) if k % 19 in (0, 1, 2, 3, 4, 5, 14, 15)]  # where torch is exact


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.1


CASES: dict[str, list[Case]] = {
    **{name: [unary(getattr(torch, name))] for name in """
        acos acosh asin asinh atan atanh ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor
        lgamma log log10 log1p log2 reciprocal round rsqrt sigmoid sin sinh sqrt tan tanh
        trunc""".split()},
    **{"special_" + name: [unary(getattr(torch.special, name), edges=EXACT)]
       for name in "erfcx i0e i1 i1e ndtri".split()},
    "i0": [unary(torch.i0, edges=EXACT)],
    "polygamma": [lambda p: [torch.polygamma(k, positive(x)) for k in (1, 2, 4)
                             for x in layouts(p)]],
    **{name: [unary(getattr(torch, name), whole=True)]
       for name in "abs relu sign sgn neg isnan isinf logical_not".split()},
    **{name: [binary(getattr(torch, name), "whole", flag=True)]
       for name in "add mul lt le gt ge eq ne".split()},
    **{name: [binary(getattr(torch, name), "whole", scalar=False, flag=True)]
       for name in "maximum minimum logical_and logical_or logical_xor".split()},
    **{name: [binary(getattr(torch, name), "count", edges=EXACT)]
       for name in "fmod remainder".split()},
    **{name: [bitwise(getattr(torch, name))]
       for name in "bitwise_and bitwise_or bitwise_xor".split()},
    "bitwise_not": [lambda p: [~p.mask, ~p.whole, ~p.small]],
    "sub": [binary(torch.sub, "whole"), lambda p: [torch.sub(p.x, p.y, alpha=0.3),
                                                   torch.sub(p.whole, p.count, alpha=3)]],
    "rsub": [binary(torch.rsub, "whole"), lambda p: [torch.rsub(p.x, p.y, alpha=0.3),
                                                     torch.rsub(p.x, 2, alpha=3)]],
    "atan2": [binary(torch.atan2, scalar=False)], "hypot": [binary(torch.hypot, scalar=False)],
    "copysign": [binary(torch.copysign, scalar=False)],
    "tanh_backward": [binary(aten.tanh_backward.default, scalar=False)],
    "sigmoid_backward": [binary(aten.sigmoid_backward.default, scalar=False)],
    "div": [binary(torch.div, "count"),
            binary(lambda x, y: torch.div(x, y, rounding_mode="floor"), "count"),
            binary(lambda x, y: torch.div(x, y, rounding_mode="trunc"), "count")],
    "floor_divide": [binary(torch.floor_divide, "count")],
    "pow": [binary(torch.pow, "count", scalar=False), lambda p: [
        f(x) for x in (p.x.abs(), p.edges, p.x.T) for f in (
            *(lambda x, k=k: x ** k for k in (0, 1, 2, 3, 4, -1, -2, 0.5, -0.5, 2.7)),
            lambda x: 2.5 ** x)] + [p.whole ** 2, p.whole ** 3, p.whole ** 0.5, 2 ** p.count]],
    "where": [lambda p: [torch.where(p.mask, p.x, p.y), torch.where(p.mask.T, p.x.T, 0.0),
                         torch.where(p.mask_row, p.cube, p.column), torch.where(p.mask, 1, p.x),
                         torch.where(p.edges > 0, p.edges, -p.edges),
                         torch.where(p.mask, p.whole, p.x), torch.where(p.mask, p.mask_row, True)]],
    "masked_fill": [lambda p: [p.x.masked_fill(p.mask, -math.inf), p.cube.masked_fill(p.mask, 0),
                               p.x.masked_fill(p.mask_row, p.number),
                               p.whole.masked_fill(p.mask, 7)]],
    "clamp": [lambda p: [f(x) for x in (*layouts(p), p.edges, p.whole) for f in (
        lambda x: x.clamp(-1, 1), lambda x: x.clamp(min=0), lambda x: x.clamp(max=0))],
        lambda p: [p.x.clamp(p.y, p.y + 1), p.x.clamp(min=p.row), p.x.clamp(max=p.column)]],
    "clamp_min": [unary(lambda x: torch.clamp_min(x, 0.25)),
                  lambda p: [torch.clamp_min(p.x, p.row)]],
    "clamp_max": [unary(lambda x: torch.clamp_max(x, 0.25)),
                  lambda p: [torch.clamp_max(p.x, p.row)]],
    "addcmul": [lambda p: [p.x.addcmul(p.y, p.row), p.x.addcmul(p.y, p.column, value=-0.3),
                           p.number.addcmul(p.cube, p.x)]],
    "addcdiv": [lambda p: [p.x.addcdiv(p.y, p.row), p.x.addcdiv(p.y, p.column, value=-0.3),
                           p.number.addcdiv(p.cube, p.x)]],
    "lerp": [lambda p: [p.x.lerp(p.y, 0.3), p.x.lerp(p.y.T.contiguous().T, p.row.sigmoid()),
                        p.x.lerp(p.y, 0.9)]],
    "softplus": [unary(torch.nn.functional.softplus),
                 lambda p: [torch.nn.functional.softplus(3 * p.x, 2.0, 5.0)]],
    "softplus_backward": [lambda p: [aten.softplus_backward(p.y, x, b, t)
                                     for x in (p.x, p.x.T.contiguous().T, 3 * p.x)
                                     for b, t in ((1.0, 20.0), (2.0, 5.0))]
                          + [aten.softplus_backward(p.edges[:1] + 1, p.edges[:18], 1.0, 20.0)]],
    "threshold_backward": [lambda p: [aten.threshold_backward(p.y, p.x, 0),
                                      aten.threshold_backward(p.edges, p.edges, 0)]],
    "_to_copy": [lambda p: [x.to(t)
                            for x in (p.x, p.whole, p.mask, p.cube.permute(2, 0, 1), p.small)
                            for t in (torch.float32, torch.float64, torch.int64, torch.int32,
                                      torch.bool)] + [p.edges.bool()]],
    "clone": [lambda p: [p.x.T.clone() + 1, (p.x * 2).clone(), p.whole.clone()]],
    "copy": [lambda p: [aten.copy(p.x, p.row), aten.copy(p.x, p.whole), aten.copy(p.whole, p.x)]],
    "lift_fresh_copy": [lambda p: [aten.lift_fresh_copy(p.x.T)]],
    "lift_fresh": [lambda p: [aten.lift_fresh(p.x.T)]],
    "full_like": [lambda p: [torch.full_like(p.x, 2.5), torch.full_like(p.whole, 3) + p.x,
                             torch.full_like(p.x, -math.inf), torch.full_like(p.mask, True)]],
    "zeros_like": [lambda p: [torch.zeros_like(p.x), torch.zeros_like(p.whole) + p.row]],
    "ones_like": [lambda p: [torch.ones_like(p.x), torch.ones_like(p.mask)]],
    "empty_like": [lambda p: [torch.where(p.mask | ~p.mask, p.x, torch.empty_like(p.x))]],
    "new_zeros": [lambda p: [p.x.new_zeros(2, 3)]],
    "new_ones": [lambda p: [p.x.new_ones(2, 3), p.whole.new_ones(2)]],
    "new_full": [lambda p: [p.x.new_full((2, 3), 0.5)]],
    "fill": [lambda p: [aten.fill(p.x, 2.5), aten.fill(p.x, p.number)]],
    "alias": [lambda p: [aten.alias(p.x.T), aten.alias(p.x * 2)]],
    "detach": [lambda p: [p.x.T.detach(), (p.x * 2).detach()]],
    "diagonal": [lambda p: [p.x.diagonal(), p.cube.diagonal(1, 1, 2), p.spd.diagonal(-1, -2, -1),
                            (p.cube * 2).diagonal(0, 0, 2)]],
    "expand": [lambda p: [p.row.expand(3, 4), p.number.expand(2, 3), (p.column * 2).expand(3, 4),
                          p.one.exp().expand(5, 2, 3), p.column.expand(2, -1, 4).exp()]],
    "permute": [lambda p: [p.wide.permute(3, 1, 0, 2), (p.wide + 1).permute(2, 3, 0, 1)]],
    "transpose": [lambda p: [p.wide.transpose(1, 3), (p.cube * 2).transpose(0, -1)]],
    "t": [lambda p: [p.x.t(), p.row.t(), (p.x * 2).t()]],
    "select": [lambda p: [p.wide.select(1, 2), p.wide.select(-1, -2), (p.x * 2).select(0, 1)]],
    "slice": [lambda p: [p.wide[:, 1:], p.wide[..., ::2], p.x.T[1:-1], (p.x * 2)[:, -3:],
                         p.long[5:60:7], p.x[:, 3:3]]],
    "split": [lambda p: [*p.wide.split(2, 3), *(p.x * 2).split(3, 1)]],
    "split_with_sizes": [lambda p: [*p.wide.split([1, 4], 3), *(p.x * 2).split([3, 1], 1)]],
    "unbind": [lambda p: [*p.cube.unbind(1), *(p.x * 2).unbind(-1)]],
    "squeeze": [lambda p: [p.one.squeeze(), p.column.squeeze(-1), (p.column * 2).squeeze(1),
                           p.one.exp().squeeze((0, 1)), p.x.squeeze(0)]],
    "unsqueeze": [lambda p: [p.x.unsqueeze(1), (p.x.T * 2).unsqueeze(-1), p.number.unsqueeze(0)]],
    "view": [lambda p: [p.wide.view(6, 20), (p.wide * 2).view(-1), p.x.T.reshape(2, 6),
                        p.wide.permute(2, 0, 3, 1).reshape(8, 15), p.number.view(1, 1)]],
    "_unsafe_view": [lambda p: [aten._unsafe_view(p.wide, [6, 20])]],
    "_reshape_alias": [lambda p: [aten._reshape_alias(p.wide, [6, 20], [20, 1])]],
    "unfold": [lambda p: [p.long.unfold(0, 5, 3), p.x.unfold(1, 2, 1),
                          (p.x.T * 2).unfold(0, 3, 1)]],
    "sum": [reduction(lambda x, d, k: x.sum(d, keepdim=k)), lambda p: [
        p.wide.sum(), p.whole.sum(), p.mask.sum(0), p.number.sum(), p.small.sum(1),
        p.edges[:11].sum(),
        (p.x * p.row).sum(), p.x.T.exp().sum(1), p.x.sum((0, 1), dtype=torch.float64),
        p.cube.expand(5, 2, 3, 4).sum((0, 2)), p.mask.sum(dtype=torch.float32), p.x[:0].sum(0),
        p.x[:0].sum(1), p.x[:0].sum()]],
    "mean": [reduction(lambda x, d, k: x.mean(d, keepdim=k)), lambda p: [
        p.wide.mean(), p.x.T.mean(0), p.number.mean(), p.whole.mean(1, dtype=torch.float64),
        p.x[:0].mean(0)]],
    "amax": [reduction(lambda x, d, k: x.amax(d, keepdim=k)), lambda p: [
        p.edges.amax(), p.edges[:-1].amax(), p.edges[20:30].amax(), p.whole.amax(1)]],
    "amin": [reduction(lambda x, d, k: x.amin(d, keepdim=k)), lambda p: [
        p.edges.amin(), p.edges[:-1].amin(), p.edges[:10].amin(), p.whole.amin(0)]],
    "prod": [single(lambda x, d: x.prod(d)), single(lambda x, d: x.prod(d, keepdim=True)),
             lambda p: [p.x.prod(), p.whole.prod(1), p.number.prod(), p.count.prod(),
                        p.x[:0].prod(0)]],
    "any": [single(lambda x, d: (x > 1).any(d)), lambda p: [p.mask[:0].any(0),
        p.mask.any(), p.x.bool().any(0, keepdim=True), p.x.any(), p.whole.any(1),
        (p.wide > 2).any((0, 2)) if hasattr(aten.any, "dims") else p.mask.any(1)]],
    "all": [single(lambda x, d: (x > -1).all(d)), lambda p: [
        p.mask.all(), p.x.bool().all(0, keepdim=True), p.x.all(), p.whole.all(1)]],
    "cumsum": [single(lambda x, d: x.cumsum(d)), lambda p: [
        p.whole.cumsum(0), p.mask.cumsum(1), p.number.cumsum(0), (p.x * 2).T.cumsum(0)]],
    "cumprod": [single(lambda x, d: x.cumprod(d)), lambda p: [p.whole.cumprod(0)]],
    "flip": [lambda p: [p.x.flip(0), p.wide.flip(1, -1), (p.x.T * 2).flip(0, 1), p.one.flip(0),
                        p.column.flip(0, 1), p.x.flip(0).exp().flip(1)]],
    "cat": [lambda p: [torch.cat([p.x, p.y], 0), torch.cat([p.x.T, p.y.T], 1),
                       torch.cat([p.x, p.column, p.row.expand(3, 4) * 2], -1),
                       torch.cat([p.x, p.whole, p.mask]),
                       torch.cat([p.cube, p.cube * 2], 1)[:, 1:5],
                       torch.cat([p.x.new_zeros(0), p.x]), torch.cat([p.x[:, :0], p.x], 1),
                       torch.cat([p.wide.permute(2, 0, 3, 1), p.wide.permute(2, 0, 3, 1)], 2)]],
    "stack": [lambda p: [torch.stack([p.x, p.y], d) for d in (0, 1, 2, -1)] + [
        torch.stack([p.number, p.number * 2]), torch.stack([p.x.T * 2, p.y.T], 1)]],
    "constant_pad_nd": [lambda p: [torch.nn.functional.pad(p.x, pad, value=v) for pad, v in (
        ((1, 2), 0.0), ((0, 0, 3, 1), 1.5), ((1, 1, 1, 1), -math.inf), ((-1, 2, 1, -1), 2.0))] + [
            torch.nn.functional.pad(p.cube.permute(2, 0, 1) * 2, (1, 0, 0, 2))]],
    "slice_backward": [lambda p: [aten.slice_backward(p.x, [3, 9], 1, 0, 8, 2),
                                  aten.slice_backward(p.x.T * 2, [9, 3], 0, 2, 6, 1),
                                  aten.slice_backward(p.wide.permute(2, 0, 3, 1), [4, 2, 9, 3],
                                                      2, -5, 9, 1)]],
    "select_backward": [lambda p: [aten.select_backward(p.x, [3, 2, 4], 1, -1),
                                   aten.select_backward(p.x.T * 2, [5, 4, 3], 0, 3),
                                   aten.select_backward(p.number, [4], 0, 1)]],
    "diagonal_backward": [lambda p: [aten.diagonal_backward(p.row, [4, 5], 0, 0, 1),
                                     aten.diagonal_backward(p.x * 2, [3, 5, 4], -1, 1, 2)]],
    "slice_scatter": [lambda p: [aten.slice_scatter(p.x, p.column, 1, 2, 3),
                                 aten.slice_scatter(p.x.T, p.y[:, :2].T, 0, 0, 4, 2),
                                 aten.slice_scatter(p.x * 2, p.row[None], 0, 1, 2)]],
    "select_scatter": [lambda p: [aten.select_scatter(p.x, p.row, 0, 1),
                                  aten.select_scatter(p.cube.permute(2, 0, 1) * 2, p.x[:2, :3], 0,
                                                      -1)]],
    "diagonal_scatter": [lambda p: [aten.diagonal_scatter(p.x, p.row[:3]),
                                    aten.diagonal_scatter(p.spd, p.rhs[..., 0], 0, 1, 2)]],
    "tril": [lambda p: [p.x.tril(), p.cube.tril(-1), (p.spd * 2).tril(1), p.x.T.tril()]],
    "triu": [lambda p: [p.x.triu(), p.cube.triu(-1), (p.spd * 2).triu(1),
                        p.edges.expand(4, -1).triu()]],
    "gather": [lambda p: [p.x.gather(0, p.places), p.x.T.gather(1, p.places.T),
                          p.cube.gather(2, p.places[None, :, :2]), (p.x * 2).gather(1, p.places),
                          p.whole.gather(1, p.places[:2, :1]), p.x.gather(0, p.places % 2)]],
    "index_select": [lambda p: [p.x.index_select(0, p.places[0]),
                                p.x.T.index_select(1, p.places[0]),
                                p.wide.index_select(-2, p.places[1]),
                                (p.x * 2).index_select(1, p.places[:, 0])]],
    "scatter_add": [lambda p: [p.x.scatter_add(0, p.places, p.y),
                               p.x.T.scatter_add(1, p.places.T, p.y.T),
                               p.x.scatter_add(1, p.places[:2, :2], p.y * 2),
                               (p.cube * 0).scatter_add(1, p.places[None], p.cube * 2)]],
    "scatter": [lambda p: [p.x.scatter(1, p.places[:, :1], p.y),
                           p.x.scatter(1, p.places[:, :1], 0.5),
                           p.cube.scatter(0, p.places[None] % 2, p.cube * 2)]],
    "index": [lambda p: [p.x[p.picks], p.x[:, p.picks], p.wide[:, p.picks], p.x[p.picks, p.picks],
                         p.wide[:, p.picks[:, None], p.picks], p.wide[..., p.picks],
                         (p.x * 2)[p.places], p.x.T[p.picks, :2], p.x[p.count % 3, p.count % 4],
                         p.x[p.picks % 3 - 1], p.long[p.whole]]],
    "_unsafe_index": [lambda p: [aten._unsafe_index(p.x, [p.picks]),
                                 aten._unsafe_index(p.x, [None, p.picks])]],
    "index_put": [lambda p: [p.x.index_put((p.picks,), p.row, accumulate=True),
                             p.x.index_put((p.picks[:1],), p.row * 2),
                             aten.index_put(p.x, [None, p.picks], p.column, True),
                             aten.index_put(p.cube, [None, p.picks, p.picks], p.number, True),
                             aten.index_put(p.x.T, [p.picks % 3], p.column.T, True)]],
    "_unsafe_index_put": [lambda p: [aten._unsafe_index_put(p.x, [p.picks], p.row, True)]],
    "mm": [lambda p: [p.x[:0] @ p.y.T, p.x[:, :0] @ p.y[:, :0].T,
                      p.x @ p.y.T, p.x.T @ p.y, p.tall @ p.tall.T, p.tall.T @ p.tall,
                      p.tall @ p.x.T.tile(3, 1)[:9], p.column @ p.row[None], p.x @ p.row[:, None],
                      p.row[None] @ p.y.T, p.tall[:, ::2] @ p.tall[:5, :], (p.x * 2) @ (p.y.T * 3),
                      p.row.expand(3, 4) @ p.y.T, p.tall[:, :1] @ p.tall[:1], p.x[:1] @ p.y[:1].T,
                      (p.x @ p.y.T).T, p.tall[::2] @ p.tall[::2].T, p.tall.T[:2] @ p.tall,
                      p.long[None] @ p.long[:, None], p.x @ p.x.T @ p.x,
                      p.x @ p.tall[:8:2, ::2], p.x @ p.column[:1].expand(4, 3),
                      p.row.expand(4, 4).T @ p.tall[:8:2, 1::3], p.tall[:, ::3] @ p.tall[:9:3, ::2],
                      p.tall[::2, ::2].T @ p.tall[:40:2, ::3]]],
    "addmm": [lambda p: [torch.addmm(p.column, p.x, p.y.T), torch.addmm(p.row, p.x.T, p.y),
                         torch.addmm(p.number, p.x, p.y.T, beta=0.5, alpha=2.0)]],
    "bmm": [lambda p: [torch.bmm(p.cube, p.cube.mT), torch.bmm(p.spd, p.rhs), torch.bmm(
        p.cube.mT, p.cube * 2), torch.bmm(p.rhs[:, :, :1], p.rhs[:, :1]), p.wide @ p.wide.mT,
        torch.bmm(p.x.expand(2, 3, 4), p.spd)]],
    "baddbmm": [lambda p: [torch.baddbmm(p.column, p.cube, p.cube.mT),
                           torch.baddbmm(p.number, p.spd, p.rhs, beta=0.5, alpha=2)]],
    "mv": [lambda p: [p.x @ p.row, p.x.T @ p.column[:, 0], p.tall @ p.tall[3],
                      p.tall.T @ p.long[:40], (p.x * 2) @ (p.row * 2),
                      p.tall.T @ p.wide.view(-1)[::3], p.column @ p.row[:1]]],
    "addmv": [lambda p: [torch.addmv(p.column[:, 0], p.x, p.row),
                         torch.addmv(p.number, p.x, p.row, beta=0.5, alpha=2)]],
    "dot": [lambda p: [p.row.dot(p.row), p.long.dot(p.long.flip(0)), p.x[:, 0].dot(p.y[:, 1])]],
    "linalg_cholesky_ex": [lambda p: [torch.linalg.cholesky(p.spd), torch.linalg.cholesky(p.spd[0]),
                                      torch.linalg.cholesky(p.spd.mT * 2),
                                      torch.linalg.cholesky(p.spd.flip(0).mT)]],
    "linalg_qr": [lambda p: [part for a in (p.spd, p.spd[0], p.x.T, p.tall[:, ::2], p.cube.mT,
                                            p.x[:, :3].triu(), p.x[:, :3] * 0)
                             for part in torch.linalg.qr(a)]],
    "_linalg_check_errors": [lambda p: [torch.linalg.cholesky(p.spd)]],
    "linalg_solve_triangular": [lambda p: [
        torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)
        for upper in (False, True) for unit in (False, True)
        for a, b, left in ((p.spd, p.rhs, True), (p.spd.mT, p.rhs * 2, True),
                           (p.spd, p.rhs.mT, False), (p.spd[0], p.rhs, True),
                           (p.spd, p.rhs[0], True))]],
}


CHUNK = 12  # operations in one C file: compiling takes most of the time


@cache
def results(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Results of torch and of one program of all cases; also says which operations it has."""
    tensors = pool(dtype)
    p, inputs = SimpleNamespace(**tensors), list(tensors.values())
    expected = {name: [r for case in CASES[name] for r in case(p)] for name in names}
    with pytest.MonkeyPatch.context() as patch:  # what has a rule is recorded, not split
        patch.setattr(sys.modules[record.__module__], "decomposition",
                      lambda op: None if op._opname in names else decomposition(op))
        recording = record(lambda: [r for name in names for case in CASES[name] for r in case(p)],
                           inputs)
    found = {opname(n) for n in recording.graph.graph.nodes if n.op == "call_function"}
    assert not set(names) - found, f"no case reaches {set(names) - found}"
    made = iter(CProgram(recording, inputs, [])(inputs, []))
    return {name: [(e, next(made)) for e in expected[name]] for name in names}


def results_of(name: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Results of one operation, from a program of many unless that fails."""
    names = sorted(CASES)
    start = names.index(name) // CHUNK * CHUNK
    try:
        return results(tuple(names[start:start + CHUNK]), dtype)[name]
    except Exception:  # alone, so that the message is about this operation
        return results((name,), dtype)[name]


def assert_same(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal up to rounding; nan, infinities, and the signs of zeros are the same."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    info, finite = torch.finfo(expected.dtype), expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, rtol=0, atol=0)
    scale = expected[finite].abs().max().clamp(min=1).item() if finite.any() else 1.0
    atol = SUM_ULPS * info.eps * scale if name in SUMS else info.tiny
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=atol,
                               rtol=ROUGH.get(name, ULPS) * info.eps)
    zero = (expected == 0) & (actual == 0)
    if name not in SIGNLESS:
        assert torch.equal(actual.signbit()[zero], expected.signbit()[zero])


def test_every_rule_has_a_case():
    assert sorted(CASES) == sorted(set(RULES) - CUSTOM), "give each rule of ops.py a case here"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_operation_is_the_one_of_torch(name, dtype):
    for expected, actual in results_of(name, dtype):
        assert_same(actual, expected, name)


def test_a_constant_mask_says_where_to_write():
    mask = torch.tensor([[True, False, True], [False, True, False]])

    def function(x: Tensor) -> list[Tensor]:
        out = x * 2
        out[mask] = x[:, 0].sum()
        out[1, mask[0]] += x[0, :2]
        return [out, x[mask]]
    x = torch.randn(2, 3)
    recording = record(lambda: function(x), [x])
    for made, expected in zip(CProgram(recording, [x], [], False)([x], []), function(x),
                              strict=True):
        torch.testing.assert_close(made, expected)


# ------------------------------------------------------------------ random expressions

NUM_GRAPHS, GRAPHS_A_FILE = {torch.float64: 300, torch.float32: 60}, 20
QUICK = {torch.float64: 80, torch.float32: 20}  # of these; the others take minutes
SHAPES = [(4, 3), (3, 4), (4,), (3,), (1, 3), (4, 1), (), (2, 4, 3), (2, 1, 3), (17, 5), (1,)]
SMOOTH = [torch.tanh, torch.sigmoid, torch.sin, torch.atan, torch.nn.functional.softplus, torch.neg,
          torch.abs, torch.relu, torch.square, lambda x: x * 0.5 + 1, lambda x: (-x.square()).exp(),
          lambda x: x.square().add(1).log(), lambda x: x.clamp(-0.7, 0.9),
          lambda x: x.square().add(0.5).sqrt(), lambda x: 1 / (1 + x.square()), torch.erf]
JOINT = [torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.logaddexp,
         lambda x, y: x / (1 + y.square()), lambda x, y: x.addcmul(y, y, value=0.3),
         lambda x, y: torch.where(x > y, x.tanh(), y), lambda x, y: x.lerp(y, 0.25)]


class Expression:
    """A random expression of some tensors; the same seed and shapes make the same one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Two of its values, and gradients of their sum."""
        self.random = random.Random(self.seed)
        self.values = list(inputs)
        for _ in range(self.random.randint(10, 30)):
            step = self.random.choice([self.smooth, self.smooth, self.joint, self.joint, self.joint,
                                       self.reduce, self.reduce, self.view, self.view, self.join,
                                       self.multiply, self.take, self.scan])
            made = step()
            if made is not None and 0 < made.numel() <= 600:
                self.values.append(bounded(made))
        results = self.random.sample(self.values[len(inputs):], 2) + [self.values[-1]]
        total = sum(r.sum() if r.dim() < 2 else r.mean(0).sum() for r in results)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        return results + [g for g in gradients if g is not None]

    def pick(self, min_dim: int = 0) -> Tensor:
        """A value, one of the latest more often; at least of so many dimensions."""
        place = min(int(self.random.expovariate(0.2)), len(self.values) - 1)
        x = self.values[-1 - place]
        return x if x.dim() >= min_dim else x.expand(*[2] * (min_dim - x.dim()), *x.shape)

    def dim(self, x: Tensor) -> int:
        return self.random.randrange(-x.dim(), x.dim())

    def smooth(self) -> Tensor:
        return self.random.choice(SMOOTH)(self.pick())

    def joint(self) -> Tensor | None:
        x, y = self.pick(), self.pick()
        try:
            torch.broadcast_shapes(x.shape, y.shape)
        except RuntimeError:
            y = y.mean()
        return self.random.choice(JOINT)(x, y)

    def reduce(self) -> Tensor:
        x = self.pick(1)
        dims = self.random.sample(range(x.dim()), self.random.randint(1, x.dim()))
        keep = self.random.random() < 0.5
        op = self.random.choice([torch.sum, torch.mean, torch.amax, torch.amin, torch.logsumexp,
                                 lambda x, d, k: x.var(d, unbiased=False, keepdim=k)])
        return op(x, dims, keep)

    def view(self) -> Tensor:
        x = self.pick(1)
        d, size = self.dim(x), x.shape[self.dim(x)]
        order = self.random.sample(range(x.dim()), x.dim())
        return self.random.choice([
            lambda: x.permute(order), lambda: x.unsqueeze(d), lambda: x.flatten(),
            lambda: x.narrow(d, x.shape[d] // 3, x.shape[d] - x.shape[d] // 3),
            lambda: x.flip(d), lambda: x.select(d, -1), lambda: x[::2],
            lambda: x.expand(2, *x.shape), lambda: x.reshape(-1, size),
            lambda: x.mT if x.dim() > 1 else x, lambda: x.squeeze(), lambda: x.clone(),
            lambda: x.movedim(d, 0).contiguous(), lambda: torch.nn.functional.pad(x, (1, 2)),
            lambda: x.unbind(d)[0], lambda: x.split(2, d)[-1], lambda: x.roll(1, d)])()

    def join(self) -> Tensor:
        x, y = self.pick(1), self.pick()
        y = y if y.shape == x.shape else x.sin()
        return self.random.choice([
            lambda: torch.cat([x, y, x], self.dim(x)), lambda: torch.stack([x, y], self.dim(x)),
            lambda: torch.cat([x.narrow(-1, 0, 1), y], -1)])()

    def multiply(self) -> Tensor:
        x, y = self.pick(2), self.pick(2)
        y = y.flatten(0, -2) if y.dim() != x.dim() or y.shape[:-2] != x.shape[:-2] else y
        return (x @ y if y.shape[-2] == x.shape[-1] else x @ x.mT.tanh()) * 0.3

    def take(self) -> Tensor:
        x = self.pick(1)
        places = torch.tensor([self.random.randrange(x.shape[-1]) for _ in range(4)])
        return self.random.choice([
            lambda: x[..., places], lambda: x.index_select(-1, places),
            lambda: x.gather(-1, places.expand(*x.shape[:-1], 4)),
            lambda: torch.zeros_like(x).index_add(-1, places, x[..., places].sin())])()

    def scan(self) -> Tensor:
        x = self.pick(1)
        return self.random.choice([torch.cumsum, torch.softmax, torch.log_softmax])(x, self.dim(x))


def bounded(x: Tensor) -> Tensor:
    """Squeezed if a shape lets numbers grow, which long sums do."""
    return x / (1 + 0.2 * x.abs()) if x.numel() > 20 else x


@pytest.mark.parametrize(("dtype", "start"), [
    pytest.param(dtype, start, marks=[pytest.mark.slow] if start >= QUICK[dtype] else [])
    for dtype in FLOATS for start in range(0, NUM_GRAPHS[dtype], GRAPHS_A_FILE)], ids=str)
def test_a_random_expression_is_what_torch_computes(dtype, start):
    seeds = range(start, start + GRAPHS_A_FILE)
    generator = torch.Generator().manual_seed(start)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    inputs = [x.to(dtype).requires_grad_() for x in exact]
    expected = [Expression(seed)([x.detach().double().requires_grad_() for x in inputs])
                for seed in seeds]
    recording = record(lambda: [r for seed in seeds for r in Expression(seed)(inputs)], inputs)
    made = iter(CProgram(recording, inputs, [])(inputs, []))
    rtol = 1e-10 if dtype == torch.float64 else 2e-4
    for seed, tensors in zip(seeds, expected, strict=True):
        for place, tensor in enumerate(tensors):
            actual, scale = next(made).double(), tensor.detach().abs().max().clamp(min=1).item()
            torch.testing.assert_close(
                actual, tensor.detach(), rtol=rtol, atol=rtol * scale,
                msg=lambda text, s=seed, p=place: f"expression {s}, result {p}: {text}")
