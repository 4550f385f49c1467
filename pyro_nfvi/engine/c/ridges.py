"""The recurrence of a chain of planar layers, and its gradient; see ``flows/planar.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from pyro_nfvi.engine.c.ir import C_TYPES, SUFFIXES, View, loops
from pyro_nfvi.engine.c.ops import rule

if TYPE_CHECKING:
    from pyro_nfvi.engine.c.lower import Lowering, Value


@rule("ridge_heights")
def _heights(lowering: Lowering, node: fx.Node, a: Value, g: Value) -> View:
    start, weights = lowering.view(a), lowering.view(g)
    out, count = lowering.like(start), start.shape[-1]
    suffix, kind = SUFFIXES[start.dtype], C_TYPES[start.dtype]
    lines = []
    for k in range(count):
        terms = [_at(start, k), *(f"{weights.at((str(k), str(j)))} * t{j}" for j in range(k))]
        lines.append(f"const {kind} t{k} = tanh_{suffix}({' + '.join(terms)}); "
                     f"{_at(out, k)} = t{k};")
    return _run(lowering, [start, weights], out, lines)


@rule("ridge_heights_backward")
def _heights_backward(lowering: Lowering, node: fx.Node, t: Value, g: Value, gt: Value) -> View:
    heights, weights, grads = lowering.view(t), lowering.view(g), lowering.view(gt)
    out, count, kind = lowering.like(heights), heights.shape[-1], C_TYPES[heights.dtype]
    lines = []
    for k in reversed(range(count)):
        terms = [_at(grads, k), *(f"{weights.at((str(i), str(k)))} * a{i}"
                                  for i in range(k + 1, count))]
        lines.append(f"const {kind} h{k} = {_at(heights, k)}; const {kind} a{k} = "
                     f"({' + '.join(terms)}) * (1 - h{k} * h{k}); {_at(out, k)} = a{k};")
    return _run(lowering, [heights, weights, grads], out, lines)


def _at(view: View, k: int) -> str:
    """Element ``k`` of the row that the loops are at."""
    rank = len(view.shape)
    index = ["0" if size == 1 else f"i{d}" for d, size in enumerate(view.shape[:-1])]
    return view.at((*index, str(k))) if rank > 1 else view.at((str(k),))


def _run(lowering: Lowering, reads: list[View], out: View, lines: list[str]) -> View:
    batch = [d for d in range(len(out.shape) - 1) if out.shape[d] != 1]
    batch.sort(key=lambda d: -out.strides[d])
    text = loops(batch, out.shape, apart=bool(batch)) + "{\n" + "\n".join(lines) + "\n}"
    lowering.schedule.kernel(text, reads, [out])
    return out
