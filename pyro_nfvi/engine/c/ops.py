"""One rule for each tensor operation: what it is in C."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from pyro_nfvi.engine.c import products
from pyro_nfvi.engine.c.ir import (
    Apply,
    Expr,
    Index,
    Number,
    Position,
    Reindexed,
    Taken,
    Unsupported,
    View,
    literal,
    loops,
)

if TYPE_CHECKING:
    from pyro_nfvi.engine.c.lower import Lowering, Value

aten = torch.ops.aten
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

# {T} is the suffix of the functions of the type computed in, {C} its name.
UNARY = {name: f"{name}_{{T}}({{{{0}}}})" for name in """
    abs acos acosh asin asinh atan atanh ceil cos cosh digamma erf erfc erfinv exp exp2 expm1 floor
    i0 lgamma log log10 log1p log2 reciprocal relu round rsqrt sigmoid sign sgn sin sinh
    special_erfcx special_i0e special_i1 special_i1e special_ndtri sqrt tan tanh
    trunc""".split()} | {"neg": "-{{0}}"}
TESTS = {"isnan": "{{0}} != {{0}}", "isinf": "isinf_{T}({{0}})", "logical_not": "!{{0}}"}
BINARY = {
    "add": "{{0}} + {{1}}", "sub": "{{0}} - {{1}}", "mul": "{{0}} * {{1}}",
    "maximum": "maximum_{T}({{0}}, {{1}})", "minimum": "minimum_{T}({{0}}, {{1}})",
    "atan2": "atan2_{T}({{0}}, {{1}})", "fmod": "fmod_{T}({{0}}, {{1}})",
    "remainder": "remainder_{T}({{0}}, {{1}})", "bitwise_and": "{{0}} & {{1}}",
    "bitwise_or": "{{0}} | {{1}}", "bitwise_xor": "{{0}} ^ {{1}}", "rsub": "{{1}} - {{0}}",
    "hypot": "hypot_{T}({{0}}, {{1}})", "copysign": "copysign_{T}({{0}}, {{1}})",
    "tanh_backward": "{{0}} * (1 - {{1}} * {{1}})",
    "sigmoid_backward": "{{0}} * (1 - {{1}}) * {{1}}",
}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
               "logical_and": "&&", "logical_or": "||", "logical_xor": "!= !!"}
LARGEST_QR = 10_000  # numbers in a matrix to factorize, which lie on the stack
HEAVY = 10  # cost of a function, against 1 of an addition
VIEWS = """alias detach diagonal expand lift_fresh permute select slice split
    split_with_sizes squeeze t transpose unbind unsqueeze view unfold""".split()
RESHAPES = "_reshape_alias _unsafe_view".split()  # all are views here, or of copies


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function
    return register


@rule(*UNARY)
def _unary(lowering: Lowering, node: fx.Node, x: Value, **options: Any) -> Expr:
    if options:
        raise Unsupported(f"{node.target} with {', '.join(options)}")
    name, dtype = opname(node), node.meta["dtype"]
    weight = 1 if name in ("neg", "abs", "relu") else HEAVY
    return lowering.apply(UNARY[name], [x], dtype, node, weight)


@rule(*TESTS)
def _test(lowering: Lowering, node: fx.Node, x: Value) -> Expr:
    return lowering.apply(TESTS[opname(node)], [x], x.dtype, node)


@rule("bitwise_not")
def _bitwise_not(lowering: Lowering, node: fx.Node, x: Value) -> Expr:
    text = "!{{0}}" if node.meta["dtype"] == torch.bool else "~{{0}}"
    return lowering.apply(text, [x], node.meta["dtype"], node)


@rule(*BINARY)
def _binary(lowering: Lowering, node: fx.Node, x: Value, y: Value, alpha: float = 1) -> Expr:
    text = BINARY[opname(node)]
    if alpha != 1:
        scaled = literal(alpha, node.meta["dtype"])
        text = text.replace("{{1}}", f"{scaled} * {{{{1}}}}") if opname(node) != "rsub" \
            else text.replace("{{0}}", f"{scaled} * {{{{0}}}}")
    return lowering.apply(text, [x, y], node.meta["dtype"], node)


@rule("div")
def _div(lowering: Lowering, node: fx.Node, x: Value, y: Value,
         rounding_mode: str | None = None) -> Expr:
    dtype = node.meta["dtype"]
    if rounding_mode is None:
        return lowering.apply("{{0}} / {{1}}", [x, y], dtype, node, HEAVY // 2)
    if not dtype.is_floating_point and rounding_mode == "trunc":
        return lowering.apply("trunc_divide_{T}({{0}}, {{1}})", [x, y], dtype, node, HEAVY)
    text = "floor_divide_{T}({{0}}, {{1}})" if rounding_mode == "floor" else \
        "trunc_{T}({{0}} / {{1}})"
    return lowering.apply(text, [x, y], dtype, node, HEAVY)


@rule("floor_divide")
def _floor_divide(lowering: Lowering, node: fx.Node, x: Value, y: Value) -> Expr:
    return _div(lowering, node, x, y, "floor")


@rule(*COMPARISONS)
def _comparison(lowering: Lowering, node: fx.Node, x: Value, y: Value) -> Expr:
    logical = opname(node).startswith("logical")
    dtype = torch.bool if logical else lowering.common_dtype(x, y)
    return lowering.apply(f"{{{{0}}}} {COMPARISONS[opname(node)]} {{{{1}}}}", [x, y], dtype, node)


@rule("pow")
def _pow(lowering: Lowering, node: fx.Node, x: Value, exponent: Value) -> Expr:
    dtype = node.meta["dtype"]
    known = {2: "{{0}} * {{0}}", 1: "{{0}}", 3: "{{0}} * {{0}} * {{0}}", 0.5: "sqrt_{T}({{0}})",
             -1: "reciprocal_{T}({{0}})", -0.5: "rsqrt_{T}({{0}})",
             -2: "reciprocal_{T}({{0}} * {{0}})"}
    if isinstance(exponent, (int, float)) and exponent in known and dtype.is_floating_point:
        weight = 1 if exponent in (1, 2, 3) else HEAVY
        return lowering.apply(known[exponent], [x], dtype, node, weight)
    return lowering.apply("pow_{T}({{0}}, {{1}})", [x, exponent], dtype, node, 4 * HEAVY)


@rule("polygamma")
def _polygamma(lowering: Lowering, node: fx.Node, order: int, x: Value) -> Expr:
    return lowering.apply(f"polygamma_{{T}}({{{{0}}}}, {order})", [x], node.meta["dtype"], node,
                          4 * HEAVY)


@rule("where")
def _where(lowering: Lowering, node: fx.Node, condition: Value, x: Value, y: Value) -> Expr:
    dtype = node.meta["dtype"]
    args = [lowering.cast(condition, torch.bool), lowering.cast(x, dtype), lowering.cast(y, dtype)]
    return lowering.broadcast("{0} ? {1} : {2}", args, dtype, node.meta["shape"])


@rule("masked_fill")
def _masked_fill(lowering: Lowering, node: fx.Node, x: Value, mask: Value, value: Value) -> Expr:
    return _where(lowering, node, mask, value, x)


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(lowering: Lowering, node: fx.Node, x: Value, low: Any = None, high: Any = None,
           min: Any = None, max: Any = None) -> Expr:
    low, high = low if min is None else min, high if max is None else max
    if opname(node) == "clamp_max":
        low, high = None, low if high is None else high
    text, args = "{{0}}", [x]
    for bound, sign in ((low, "<"), (high, ">")):
        if bound is not None:  # written so that a nan stays one
            args.append(bound)
            text = f"clamp_{'low' if sign == '<' else 'high'}_{{T}}({text}, " \
                f"{{{{{len(args) - 1}}}}})"
    return lowering.apply(text, args, node.meta["dtype"], node)


@rule("addcmul", "addcdiv")
def _addcmul(lowering: Lowering, node: fx.Node, x: Value, y: Value, z: Value, value: float = 1
             ) -> Expr:
    sign = "*" if opname(node) == "addcmul" else "/"
    scale = "" if value == 1 else literal(value, node.meta["dtype"]) + " * "
    return lowering.apply(f"{{{{0}}}} + {scale}{{{{1}}}} {sign} {{{{2}}}}", [x, y, z],
                          node.meta["dtype"], node)


@rule("lerp")
def _lerp(lowering: Lowering, node: fx.Node, x: Value, y: Value, weight: Value) -> Expr:
    return lowering.apply("lerp_{T}({{0}}, {{1}}, {{2}})", [x, y, weight], node.meta["dtype"],
                          node)


@rule("softplus")
def _softplus(lowering: Lowering, node: fx.Node, x: Value, beta: float = 1, threshold: float = 20
              ) -> Expr:
    return lowering.apply("softplus_{T}({{0}}, {{1}}, {{2}})", [x, beta, threshold],
                          node.meta["dtype"], node, 2 * HEAVY)


@rule("softplus_backward")
def _softplus_backward(lowering: Lowering, node: fx.Node, grad: Value, x: Value, beta: float,
                       threshold: float) -> Expr:
    return lowering.apply("{{0}} * softplus_slope_{T}({{1}}, {{2}}, {{3}})",
                          [grad, x, beta, threshold], node.meta["dtype"], node, 2 * HEAVY)


@rule("threshold_backward")
def _threshold_backward(lowering: Lowering, node: fx.Node, grad: Value, x: Value, threshold: float
                        ) -> Expr:
    return lowering.apply("({{1}} <= {{2}}) ? 0 : {{0}}", [grad, x, threshold],
                          node.meta["dtype"], node)


@rule("_to_copy", "clone", "copy", "lift_fresh_copy")
def _copy(lowering: Lowering, node: fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    if opname(node) == "copy":
        x = _[0]
        return lowering.expanded(lowering.cast(x, node.meta["dtype"]), node.meta["shape"])
    return lowering.cast(x, node.meta["dtype"]) if x.dtype != node.meta["dtype"] else x


@rule("full_like", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_full",
      "fill")
def _filled(lowering: Lowering, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Expr:
    name, dtype, shape = opname(node), node.meta["dtype"], node.meta["shape"]
    value: Any = 1 if "ones" in name else 0
    if "full" in name or name == "fill":
        value = kwargs.get("fill_value", args[-1] if args else None)
    if isinstance(value, (int, float)):
        return Number(shape, dtype, value=value)
    return lowering.expanded(lowering.cast(value, dtype), shape)


@rule(*VIEWS, *RESHAPES)
def _view(lowering: Lowering, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    if opname(node) in ("alias", "detach", "lift_fresh"):
        return x
    if isinstance(x, Expr) and opname(node) == "expand" and x.cost <= 1:
        return lowering.expanded(x, node.meta["shape"])
    if isinstance(x, Number) and "shape" in node.meta:
        return Number(node.meta["shape"], x.dtype, value=x.value)
    view = lowering.view(x)
    op: Any = node.target
    if opname(node) in RESHAPES:
        op, args = aten.view.default, args[:1]
    try:
        made = op(view.meta(), *args, **kwargs)
    except (RuntimeError, ValueError):  # torch would need a copy, and so do we
        view = lowering.row_major(view)
        made = op(view.meta(), *args, **kwargs)
    return [view.like(part) for part in made] if isinstance(made, (list, tuple)) \
        else view.like(made)


@rule("sum", "mean", "amax", "amin", "any", "all", "prod")
def _reduction(lowering: Lowering, node: fx.Node, x: Value, dims: Any = None,
               keepdim: bool = False, **_: Any) -> Value:
    name, rank, dtype = opname(node), len(x.shape), node.meta["dtype"]
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = list(range(rank))
    dims = sorted({d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)})
    expr = lowering.cast(x, dtype)
    kept = tuple(n for d, n in enumerate(x.shape) if d not in dims)
    if math.prod(x.shape) == 0:
        if name in ("amax", "amin"):
            raise Unsupported(f"{name} of an empty tensor")
        empty = {"mean": math.nan, "prod": 1, "all": 1}.get(name, 0)
        return Number(node.meta["shape"], dtype, value=empty)
    if rank:
        view = lowering.schedule.reduce("sum" if name == "mean" else name, expr, tuple(dims))
        result: Value = view if keepdim else dropped(view, dims)
    else:
        result = expr
    if name != "mean":
        return result
    count = math.prod(x.shape) / max(math.prod(kept), 1)
    return lowering.apply("{{0}} / {{1}}", [result, count], dtype, node, 1)


@rule("cumsum", "cumprod")
def _scan(lowering: Lowering, node: fx.Node, x: Value, dim: int, **_: Any) -> View:
    sign = "+" if opname(node) == "cumsum" else "*"
    source = lowering.view(lowering.cast(x, node.meta["dtype"]))
    out = lowering.like(source)
    if not source.shape:
        return lowering.schedule.store(lowering.expr(source), out)
    dim %= len(source.shape)
    index = tuple(f"i{d}" for d in range(len(source.shape)))
    before = tuple("(k-1)" if d == dim else i for d, i in enumerate(index))
    here = tuple("k" if d == dim else i for d, i in enumerate(index))
    zero = tuple("0" if d == dim else i for d, i in enumerate(index))
    others = sorted((d for d in range(len(index)) if d != dim), key=lambda d: -out.strides[d])
    inner = loops(others, source.shape)
    text = (f"{inner} {out.at(zero)} = {source.at(zero)};\n"
            f"for (int k = 1; k < {source.shape[dim]}; k++) {inner} "
            f"{out.at(here)} = {out.at(before)} {sign} {source.at(here)};")
    lowering.schedule.kernel(text, [source], [out])
    return out


@rule("flip")
def _flip(lowering: Lowering, node: fx.Node, x: Value, dims: Sequence[int]) -> Expr:
    shape = tuple(x.shape)
    turned = {d % len(shape) for d in dims}

    def place(index: Index) -> Index:
        return tuple(f"({shape[d] - 1}-{i})" if d in turned and shape[d] > 1 else i
                     for d, i in enumerate(index))
    return Reindexed(shape, x.dtype, source=lowering.expr(lowering.view(x)), place=place)


@rule("cat", "stack")
def _cat(lowering: Lowering, node: fx.Node, parts: Sequence[Value], dim: int = 0) -> View:
    shape, dtype = node.meta["shape"], node.meta["dtype"]
    dim %= len(shape)
    parts = [p for p in parts if tuple(p.shape) != (0,)]
    views = [p for p in parts if isinstance(p, View)]
    model = max(views, key=lambda v: math.prod(v.shape), default=None)
    if opname(node) == "stack":
        parts = [lowering.unsqueezed(p, dim) for p in parts]
        model = None
    out = lowering.empty(shape, dtype, model.strides if model is not None
                         else lowering.hint(parts))
    start = 0
    for part in parts:
        piece = View(out.buffer, tuple(part.shape), out.strides,
                     out.offset + start * out.strides[dim])
        lowering.put(lowering.cast(part, dtype), piece)
        start += part.shape[dim]
    return out


@rule("constant_pad_nd")
def _pad(lowering: Lowering, node: fx.Node, x: Value, pad: Sequence[int], value: float = 0
         ) -> View:
    shape, dtype = node.meta["shape"], node.meta["dtype"]
    out = lowering.filled(shape, dtype, value, lowering.hint([x]))
    source, target = lowering.view(x) if min(pad) < 0 else None, out
    for k in range(len(pad) // 2):
        dim, before, after = len(shape) - 1 - k, pad[2 * k], pad[2 * k + 1]
        target = _cut(target, dim, max(before, 0), max(after, 0))
        if source is not None:
            source = _cut(source, dim, max(-before, 0), max(-after, 0))
    lowering.put_into(out, x if source is None else source, target)
    return out


def _cut(view: View, dim: int, before: int, after: int) -> View:
    """A view without its first and last places along a dimension."""
    made = view.meta().narrow(dim, before, view.shape[dim] - before - after)
    return view.like(made)


@rule("slice_backward", "select_backward", "diagonal_backward")
def _view_backward(lowering: Lowering, node: fx.Node, grad: Value, sizes: Any, *args: Any) -> View:
    out = lowering.filled(node.meta["shape"], node.meta["dtype"], 0,
                          lowering.gradient_hint(node, grad, args))
    view = {"slice_backward": aten.slice.Tensor, "select_backward": aten.select.int,
            "diagonal_backward": aten.diagonal.default}[opname(node)]
    return lowering.put_into(out, grad, out.like(view(out.meta(), *args)))


@rule("slice_scatter", "select_scatter", "diagonal_scatter")
def _view_scatter(lowering: Lowering, node: fx.Node, x: Value, source: Value, *args: Any,
                  **kwargs: Any) -> View:
    out = lowering.row_major(x, copy=True)
    view = {"slice_scatter": aten.slice.Tensor, "select_scatter": aten.select.int,
            "diagonal_scatter": aten.diagonal.default}[opname(node)]
    return lowering.put_into(out, source, out.like(view(out.meta(), *args, **kwargs)))


@rule("tril", "triu")
def _triangle(lowering: Lowering, node: fx.Node, x: Value, diagonal: int = 0) -> Expr:
    rank = len(node.meta["shape"])
    sign = "<=" if opname(node) == "tril" else ">="
    inside = Position(node.meta["shape"], torch.bool,
                      template=f"{{{rank - 1}}} - {{{rank - 2}}} {sign} {diagonal}")
    dtype = node.meta["dtype"]
    return lowering.broadcast("{0} ? {1} : {2}", [inside, lowering.expr(x), Number(
        (), dtype, value=0)], dtype, node.meta["shape"])


@rule("gather")
def _gather(lowering: Lowering, node: fx.Node, x: Value, dim: int, where: Value, **_: Any) -> Expr:
    view, places, shape = lowering.view(x), lowering.expr(where), node.meta["shape"]
    if not shape:
        raise Unsupported("gather of a single number")
    dim %= len(shape)
    return Taken(shape, node.meta["dtype"], view=view, index_of=lambda index: index,
                 places=lambda index: [places if d == dim else i for d, i in enumerate(index)])


@rule("index_select")
def _index_select(lowering: Lowering, node: fx.Node, x: Value, dim: int, where: Value) -> Expr:
    view, places, shape = lowering.view(x), lowering.expr(where), node.meta["shape"]
    dim %= max(len(shape), 1)
    return Taken(shape, node.meta["dtype"], view=view, index_of=lambda index: (index[dim],),
                 places=lambda index: [places if d == dim else i for d, i in enumerate(index)])


@rule("scatter_add", "scatter")
def _scatter(lowering: Lowering, node: fx.Node, x: Value, dim: int, where: Value, source: Value
             ) -> View:
    if isinstance(source, (int, float)):
        source = Number(tuple(where.shape), node.meta["dtype"], value=source)
    places = lowering.view(where)
    values = lowering.view(lowering.cast(source, node.meta["dtype"]))
    out = lowering.copied(x, lowering.hint([source, where]))
    dim %= max(len(out.shape), 1)
    index = tuple(f"i{d}" for d in range(len(places.shape)))
    to = tuple(f"(int)({places.at(index)})" if d == dim else i for d, i in enumerate(index))
    sign = "+=" if opname(node) == "scatter_add" else "="
    order = sorted(range(len(index)), key=lambda d: -out.strides[d])
    order.sort(key=lambda d: d != dim)  # writes that meet, if any, come one after the other
    apart = bool(order) and order[-1] != dim  # no two writes of the inner loop meet
    text = f"{loops(order, places.shape, apart)} {out.at(to)} {sign} {values.at(index)};"
    lowering.schedule.kernel(text, [places, values, out], [out])
    return out


@rule("index", "_unsafe_index")
def _index(lowering: Lowering, node: fx.Node, x: Value, indices: Sequence[Any]) -> Expr:
    view = lowering.view(x)
    shape, used, count, place = _indexing(lowering, view.shape, indices)

    def places(index: Index) -> list[Expr | str]:
        outer = list(index[:used[0]]) + list(index[used[0] + count:])
        return [place[d] if d in place else outer.pop(0) for d in range(len(view.shape))]
    return Taken(node.meta["shape"], node.meta["dtype"], view=view, places=places,
                 index_of=lambda index: index[used[0]:used[0] + count])


@rule("index_put", "_unsafe_index_put")
def _index_put(lowering: Lowering, node: fx.Node, x: Value, indices: Sequence[Any], source: Value,
               accumulate: bool = False) -> View:
    sizes = tuple(x.shape)
    broadcast, used, count, place = _indexing(lowering, sizes, indices)
    out = lowering.copied(x, _beside(lowering, source, sizes, used, count))
    rest = [n for d, n in enumerate(out.shape) if d not in place]
    shape = (*out.shape[:used[0]], *broadcast, *rest[used[0]:])
    values = lowering.view(lowering.expanded(lowering.cast(source, node.meta["dtype"]), shape))
    index = tuple(f"i{d}" for d in range(len(shape)))
    inner = index[used[0]:used[0] + count]
    outer = list(index[:used[0]]) + list(index[used[0] + count:])
    to, reads = [], [values, out]
    for d in range(len(out.shape)):
        if d in place:
            view = lowering.view(lowering.expanded(place[d], broadcast))
            reads.append(view)
            to.append(f"(int)({view.at(inner)})")
        else:
            to.append(outer.pop(0))
    sign = "+=" if accumulate else "="
    order = sorted(range(len(shape)), key=lambda d: -values.strides[d])
    # Whether no two writes of the inner loop meet.
    apart = bool(order) and not used[0] <= order[-1] < used[0] + count
    text = f"{loops(order, shape, apart)} {out.at(tuple(to))} {sign} {values.at(index)};"
    lowering.schedule.kernel(text, reads, [out])
    return out


def _beside(lowering: Lowering, source: Value, sizes: Sequence[int], used: Sequence[int],
            count: int) -> tuple[int, ...] | None:
    """Strides for a tensor to write to: what lies side by side in the source does so in it."""
    hint = lowering.hint([source])
    if hint is None or len(hint) != len(sizes) - len(used) + count or count != len(used):
        return None
    return hint


def _indexing(lowering: Lowering, shape: Sequence[int], indices: Sequence[Any]
              ) -> tuple[tuple[int, ...], list[int], int, dict[int, Expr]]:
    """Broadcast shape of the indices, where they are, their rank, and the wrapped indices."""
    used = [d for d, i in enumerate(indices) if i is not None]
    if used != list(range(used[0], used[0] + len(used))):
        raise Unsupported("indices that are not side by side")
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in used):
        raise Unsupported("a mask as index")
    broadcast = tuple(torch.broadcast_shapes(*(indices[d].shape for d in used)))
    place: dict[int, Expr] = {}
    for d in used:
        expr = lowering.cast(indices[d], torch.int64)
        place[d] = Apply(expr.shape, torch.int64, args=[expr],
                         template=f"{{0}} < 0 ? {{0}} + {shape[d]} : {{0}}")
    return broadcast, used, len(broadcast), place


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "addmv")
def _product(lowering: Lowering, node: fx.Node, *args: Value, beta: float = 1, alpha: float = 1
             ) -> Value:
    name = opname(node)
    *bias, a, b = args
    result: Value = {"mm": products.mm, "addmm": products.mm, "bmm": products.bmm,
                     "baddbmm": products.bmm, "mv": products.mv, "addmv": products.mv,
                     "dot": products.dot}[name](lowering, node, a, b)
    if not bias:
        return result
    text = f"{literal(beta, node.meta['dtype'])} * {{{{0}}}} + " \
        f"{literal(alpha, node.meta['dtype'])} * {{{{1}}}}" if (beta, alpha) != (1, 1) \
        else "{{0}} + {{1}}"
    return lowering.apply(text, [bias[0], result], node.meta["dtype"], node)


def _only_fails(user: fx.Node) -> bool:
    """Whether a use of `info` does no more than raise, or put nan where there is no factor."""
    return opname(user) == "_linalg_check_errors" or (
        opname(user) == "ge" and user.args[1] == 1)


@rule("linalg_cholesky_ex")
def _cholesky(lowering: Lowering, node: fx.Node, x: Value, upper: bool = False, **_: Any) -> list:
    if upper:
        raise Unsupported("an upper Cholesky factor")
    infos = [part for part in node.users if part.args[1] == 1]
    if not all(_only_fails(user) for part in infos for user in part.users):
        raise Unsupported("a Cholesky factor whose `info` is used")
    source = lowering.view(x)
    out = lowering.like(lowering.row_major(source))
    lowering.schedule.kernel(products.cholesky(source, out), [source], [out])
    info = Number(tuple(source.shape[:-2]), torch.int32, value=0)  # the factor is nan itself
    return [out, info]


@rule("linalg_qr")
def _qr(lowering: Lowering, node: fx.Node, x: Value, mode: str = "reduced", **_: Any) -> list:
    source = lowering.view(x)
    *batch, m, n = source.shape
    if mode != "reduced" or m < n or m * n > LARGEST_QR:
        raise Unsupported("a QR factorization of a wide or large matrix, or a complete one")
    q = lowering.empty((*batch, m, n), source.dtype, None)
    r = lowering.empty((*batch, n, n), source.dtype, None)
    lowering.schedule.kernel(products.qr(source, q, r), [source], [q, r])
    return [q, r]


@rule("linalg_solve_triangular")
def _solve_triangular(lowering: Lowering, node: fx.Node, a: Value, b: Value, *, upper: bool,
                      left: bool = True, unitriangular: bool = False) -> View:
    left_view, right = lowering.view(a), lowering.view(b)
    if not left:  # X A = B is A' X' = B'
        left_view, right, upper = transposed(left_view), transposed(right), not upper
    out = lowering.empty(node.meta["shape"], node.meta["dtype"], None)
    solution = out if left else transposed(out)
    batch = tuple(node.meta["shape"][:-2])
    left_view = lowering.batched(left_view, batch)
    right = lowering.batched(right, batch)
    text = products.solve_triangular(left_view, right, solution, upper, unitriangular)
    lowering.schedule.kernel(text, [left_view, right], [out])
    return out


@rule("_linalg_check_errors")
def _no_check(lowering: Lowering, node: fx.Node, *_: Any, **__: Any) -> None:
    """A failed factorization shows as nan, which ends the loop."""


def opname(node: fx.Node) -> str:
    """Name of the operation, without its overload."""
    target: Any = node.target
    return str(getattr(target, "_opname", target.__name__))


def dropped(view: View, dims: Sequence[int]) -> View:
    """A view without these dimensions, which have length one."""
    kept = [d for d in range(len(view.shape)) if d not in dims]
    return View(view.buffer, tuple(view.shape[d] for d in kept),
                tuple(view.strides[d] for d in kept), view.offset)


def transposed(view: View) -> View:
    """The last two dimensions swapped."""
    *batch, m, n = view.shape
    *steps, a, b = view.strides
    return View(view.buffer, (*batch, n, m), (*steps, b, a), view.offset)
