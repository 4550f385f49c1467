"""Matrix products and factorizations: which kernel, and in which order its result lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from pyro_nfvi.engine.c import blas
from pyro_nfvi.engine.c.ir import C_TYPES, SUFFIXES, Expr, Number, Unsupported, View, loops

if TYPE_CHECKING:
    from pyro_nfvi.engine.c.lower import Lowering, Value

NARROW = 8  # products with fewer columns than this are loop nests


def mm(lowering: Lowering, node: fx.Node, a: Value, b: Value) -> Value:
    """``a @ b`` of two matrices."""
    (rows, inner), columns = a.shape, b.shape[1]
    if 0 in (rows, inner, columns):
        return Number((rows, columns), node.meta["dtype"], value=0)
    if not node.meta["dtype"].is_floating_point:
        raise Unsupported("a product of integers")
    if inner == 1:
        return lowering.apply("{{0}} * {{1}}", [a, b], node.meta["dtype"], node)
    left, right = lowering.view(a), lowering.view(b)
    if columns == 1 and not _runs(left, 0):
        return _row_sums(lowering, node, left, right, 1)
    if rows == 1 and not _runs(right, 1):
        return _row_sums(lowering, node, left, right, 0)
    return _gemm(lowering, node, left, right, lowering.wanted.get(node))


def _row_sums(lowering: Lowering, node: fx.Node, a: View, b: View, dim: int) -> View:
    """Matrix times column (``dim`` 1) or row times matrix (0): multiply, then add up."""
    flipped = a if dim == 0 else b
    turned = View(flipped.buffer, flipped.shape[::-1], flipped.strides[::-1], flipped.offset)
    matrix = b if dim == 0 else a
    product = lowering.broadcast("{0} * {1}", [lowering.expr(turned), lowering.expr(matrix)],
                                 node.meta["dtype"], matrix.shape)
    return lowering.schedule.reduce("sum", product, (dim,))


def _runs(view: View, dim: int) -> bool:
    """Whether elements along a dimension lie side by side, enough for vectors."""
    return view.strides[dim] == 1 and view.shape[dim] >= NARROW


def _gemm(lowering: Lowering, node: fx.Node, a: View, b: View, target: View | None) -> View:
    """The kernel wants the columns of ``b``, or the rows of ``a``, side by side in memory."""
    if _is_for_blas(a, b):
        return _blas(lowering, a, b, target)
    by_column = b.strides[1] == 1 or b.shape[1] == 1
    by_row = a.strides[0] == 1 or a.shape[0] == 1
    if by_column and by_row:  # the side that is a batch of particles stays innermost
        batches = [lowering.is_random(arg) for arg in node.args[-2:]]
        by_column = b.shape[1] >= a.shape[0] if batches[0] == batches[1] else batches[1]
    elif not by_column and not by_row:
        by_column = b.shape[1] >= NARROW or b.shape[1] >= a.shape[0]
        a, b = (a, _copy(lowering, b, 1)) if by_column else (_copy(lowering, a, 0), b)
    shape = (a.shape[0], b.shape[1])
    strides = (shape[1], 1) if by_column else (1, shape[0])
    fits = target is not None and target.strides[1 if by_column else 0] == 1
    out = target if fits else lowering.empty(shape, a.dtype, strides)
    assert out is not None
    text = _call(a, b, out) if by_column else _call(_turned(b), _turned(a), _turned(out))
    lowering.schedule.kernel(text, [a, b], [out])
    return out


def _copy(lowering: Lowering, view: View, inner: int) -> View:
    """A copy of a matrix whose elements along a dimension lie side by side."""
    out = lowering.empty(view.shape, view.dtype, (1, 0) if inner == 1 else (0, 1))
    heads = loops((1 - inner, inner), view.shape)
    index = ("i0", "i1")
    lowering.schedule.kernel(f"{heads}{out.at(index)} = {view.at(index)};", [view], [out])
    return out


def _call(a: View, b: View, out: View) -> str:
    (rows, inner), columns = a.shape, b.shape[1]
    return (f"gemm_{SUFFIXES[a.dtype]}({rows}, {columns}, {inner}, {_pointer(a)}, {a.strides[0]}, "
            f"{a.strides[1]}, {_pointer(b)}, {b.strides[0]}, {_pointer(out)}, {out.strides[0]});")


def _is_for_blas(a: View, b: View) -> bool:
    """Whether a product is large, and its matrices lie as torch's library takes them."""
    (rows, inner), columns = a.shape, b.shape[1]
    if rows * inner * columns < blas.LARGE:
        return False
    if blas.address(a.dtype) is None:
        if rows * inner * columns > blas.TOO_LARGE:
            raise Unsupported("a large matrix product, which torch's library does not show")
        return False
    return _leading(a) > 0 and _leading(b) > 0


def _leading(view: View) -> int:
    """Distance of the rows, or of the columns, of a matrix that BLAS can read; else 0."""
    rows, columns = view.shape
    if view.strides[1] == 1 and view.strides[0] >= columns:
        return view.strides[0]
    return view.strides[1] if view.strides[0] == 1 and view.strides[1] >= rows else 0


def _blas(lowering: Lowering, a: View, b: View, target: View | None) -> View:
    (rows, inner), columns = a.shape, b.shape[1]
    fits = target is not None and target.strides[1] == 1 and target.strides[0] >= columns
    out = target if fits else lowering.empty((rows, columns), a.dtype, (columns, 1))
    assert out is not None
    turned = [int(view.strides[1] != 1) for view in (a, b)]
    lowering.schedule.kernel(
        f"large_{SUFFIXES[a.dtype]}({rows}, {columns}, {inner}, {_pointer(a)}, {_leading(a)}, "
        f"{turned[0]}, {_pointer(b)}, {_leading(b)}, {turned[1]}, {_pointer(out)}, "
        f"{out.strides[0]});", [a, b], [out])
    return out


def _pointer(view: View) -> str:
    return f"{view.buffer.name} + {view.offset}" if view.offset else view.buffer.name


def _turned(view: View) -> View:
    return View(view.buffer, view.shape[::-1], view.strides[::-1], view.offset)


def bmm(lowering: Lowering, node: fx.Node, a: Value, b: Value) -> Value:
    """``a @ b`` of two batches of matrices: multiply, then add up."""
    batch, rows, inner = a.shape
    columns, dtype = b.shape[2], node.meta["dtype"]
    if 0 in (batch, rows, inner, columns):
        return Number((batch, rows, columns), dtype, value=0)
    if inner == 1:
        return lowering.apply("{{0}} * {{1}}", [a, b], dtype, node)
    left, right = lowering.view(a), lowering.view(b)
    if rows == 1 and right.strides[0] == 0:  # one matrix for the whole batch: no batch at all
        result = mm(lowering, node, _without(left, 1), _without(right, 0))
        return lowering.unsqueezed(result, 1)
    if columns == 1 and left.strides[0] == 0:
        turned = _turned(_without(left, 0))
        return lowering.unsqueezed(mm(lowering, node, _without(right, 2), turned), 2)
    left, right = lowering.unsqueezed(left, 3), lowering.unsqueezed(right, 1)
    shape = (batch, rows, inner, columns)
    product = lowering.broadcast("{0} * {1}", [lowering.expr(left), lowering.expr(right)], dtype,
                                 shape)
    total = lowering.schedule.reduce("sum", product, (2,))
    return total.like(total.meta().squeeze(2))


def _without(view: View, dim: int) -> View:
    """A view at the start of a dimension, which goes."""
    return View(view.buffer, view.shape[:dim] + view.shape[dim + 1:],
                view.strides[:dim] + view.strides[dim + 1:], view.offset)


def mv(lowering: Lowering, node: fx.Node, a: Value, x: Value) -> Value:
    """``a @ x`` of a matrix and a vector."""
    column = lowering.unsqueezed(x, 1)
    matrix = lowering.view(a)
    if _runs(matrix, 0) and not (_runs(matrix, 1) and matrix.shape[1] > 1):
        result = _gemm(lowering, node, matrix, column, None)
    else:
        result = _row_sums(lowering, node, matrix, column, 1)
    return result.like(result.meta().squeeze(1))


def dot(lowering: Lowering, node: fx.Node, x: Value, y: Value) -> Value:
    """Inner product of two vectors."""
    product: Expr = lowering.broadcast("{0} * {1}", [lowering.expr(x), lowering.expr(y)],
                                       node.meta["dtype"], tuple(x.shape))
    total = lowering.schedule.reduce("sum", product, (0,))
    return total.like(total.meta().squeeze(0))


def cholesky(source: View, out: View) -> str:
    """Lower Cholesky factors of a batch of matrices; nan where there is none."""
    size, kind = source.shape[-1], C_TYPES[source.dtype]
    batch, index = _batch_loops(source.shape[:-2])

    def of(view: View, i: str, j: str) -> str:
        return view.at((*index, i, j))
    return (
        f"{batch} for (int j = 0; j < {size}; j++) {{\n"
        f"{kind} d = {of(source, 'j', 'j')};\n"
        f"for (int k = 0; k < j; k++) d -= {of(out, 'j', 'k')} * {of(out, 'j', 'k')};\n"
        f"d = sqrt_{SUFFIXES[source.dtype]}(d); {of(out, 'j', 'j')} = d;\n"
        f"for (int i = 0; i < j; i++) {of(out, 'i', 'j')} = 0;\n"
        f"for (int i = j + 1; i < {size}; i++) {{ {kind} s = {of(source, 'i', 'j')};\n"
        f"for (int k = 0; k < j; k++) s -= {of(out, 'i', 'k')} * {of(out, 'j', 'k')};\n"
        f"{of(out, 'i', 'j')} = s / d; }} }}")


def solve_triangular(a: View, b: View, out: View, upper: bool, unit: bool) -> str:
    """Solutions of ``a @ out = b`` for a batch of triangular matrices."""
    size, columns, kind = a.shape[-1], b.shape[-1], C_TYPES[a.dtype]
    batch, index = _batch_loops(a.shape[:-2])

    def of(view: View, i: str, j: str) -> str:
        return view.at((*index, i, j))
    rows = f"for (int i = {size - 1}; i >= 0; i--)" if upper else \
        f"for (int i = 0; i < {size}; i++)"
    known = f"for (int k = i + 1; k < {size}; k++)" if upper else "for (int k = 0; k < i; k++)"
    divide = "" if unit else f" / {of(a, 'i', 'i')}"
    return (f"{batch} {rows} for (int j = 0; j < {columns}; j++) {{\n"
            f"{kind} s = {of(b, 'i', 'j')};\n"
            f"{known} s -= {of(a, 'i', 'k')} * {of(out, 'k', 'j')};\n"
            f"{of(out, 'i', 'j')} = s{divide}; }}")


def qr(source: View, q: View, r: View) -> str:
    """QR factors of a batch of matrices, by the reflections and the signs of LAPACK."""
    (m, n), kind = source.shape[-2:], C_TYPES[source.dtype]
    batch, index = _batch_loops(source.shape[:-2])

    def of(view: View, i: str, j: str) -> str:
        return view.at((*index, i, j))
    below, rows, columns = f"for (int i = k + 1; i < {m}; i++)", f"i < {m}", f"j < {n}"
    return (
        f"{batch} {{ {kind} w[{m * n}], tau[{n}];\n"
        f"for (int i = 0; {rows}; i++) for (int j = 0; {columns}; j++)"
        f" w[i * {n} + j] = {of(source, 'i', 'j')};\n"
        f"for (int k = 0; k < {n}; k++) {{ {kind} s = 0, a = w[k * {n} + k]; tau[k] = 0;\n"
        f"{below} s += w[i * {n} + k] * w[i * {n} + k];\n"
        f"if (s != 0) {{ {kind} b = sqrt_{SUFFIXES[source.dtype]}(a * a + s);\n"
        f"if (a >= 0) b = -b;\n"
        f"tau[k] = (b - a) / b; w[k * {n} + k] = b; {below} w[i * {n} + k] /= a - b; }}\n"
        f"for (int j = k + 1; {columns}; j++) {{ {kind} d = w[k * {n} + j];\n"
        f"{below} d += w[i * {n} + k] * w[i * {n} + j];\n"
        f"d *= tau[k]; w[k * {n} + j] -= d; {below} w[i * {n} + j] -= d * w[i * {n} + k]; }} }}\n"
        f"for (int i = 0; i < {n}; i++) for (int j = 0; {columns}; j++)"
        f" {of(r, 'i', 'j')} = j < i ? 0 : w[i * {n} + j];\n"
        f"for (int i = 0; {rows}; i++) for (int j = 0; {columns}; j++)"
        f" {of(q, 'i', 'j')} = i == j;\n"
        f"for (int k = {n - 1}; k >= 0; k--) for (int j = k; {columns}; j++) {{\n"
        f"{kind} d = {of(q, 'k', 'j')}; {below} d += w[i * {n} + k] * {of(q, 'i', 'j')};\n"
        f"d *= tau[k]; {of(q, 'k', 'j')} -= d; {below} {of(q, 'i', 'j')} -= d * w[i * {n} + k];"
        f" }} }}")


def _batch_loops(shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    names = tuple(f"n{d}" for d in range(len(shape)))
    heads = "".join(f"for (int {n} = 0; {n} < {size}; {n}++) "
                    for n, size in zip(names, shape, strict=True))
    return heads, names
