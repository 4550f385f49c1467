"""From a recorded graph to loop nests: one pass over its operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from pyro_nfvi.engine.c import ridges, spline  # noqa: F401  (they register their rules)
from pyro_nfvi.engine.c.ir import (
    C_TYPES,
    SUFFIXES,
    Apply,
    Buffer,
    Expr,
    Load,
    Number,
    Reindexed,
    Shape,
    Unsupported,
    View,
)
from pyro_nfvi.engine.c.ops import RULES, opname
from pyro_nfvi.engine.c.schedule import Schedule

Value = View | Expr
MAX_COST = 200  # an expression longer than this is written to memory
DEAR = 5  # the cost of a division
BATCH = 8  # a draw whose first dimension is at least this long is a batch of particles


class Lowering:
    """A graph on its way to C: the value of every node, in memory or as an expression.

    Args:
        graph: The recorded graph.
        inputs: Example inputs and draws, whose strides the code will assume.

    Attributes:
        schedule: The loop nests so far.
        constants: Views and values of the graph's constants, in the order of the code's pointers.
        outputs: Views of the outputs.
        functions: Names and texts of C functions that rules have asked for.

    Raises:
        Unsupported: If an operation has no rule.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.schedule = Schedule()
        self.values: dict[fx.Node, Any] = {}
        self.functions: dict[tuple, tuple[str, str]] = {}
        self.inputs, self.constants = [], []  # type: ignore[var-annotated]
        nodes = list(graph.graph.nodes)
        results = nodes[-1].args[0]
        self.outputs = [self._output(k, node) for k, node in enumerate(results)]
        self.wanted = self._wanted(results)
        self.random: set[Any] = set()
        places = iter(inputs)
        for node in nodes[:-1]:
            if node.op == "placeholder":
                self._place_input(node, next(places))
            elif node.op == "get_attr":
                self._place_constant(node, getattr(graph, str(node.target)))
            else:
                self.values[node] = self._settled(node, self._lower(node))
            if node.name.startswith("draw") or any(n in self.random
                                                   for n in node.all_input_nodes):
                self.random.add(node)
        for node, target in zip(results, self.outputs, strict=True):
            self._finish(node, target)

    def _output(self, place: int, node: fx.Node) -> View:
        shape, dtype = node.meta["shape"], node.meta["dtype"]
        buffer = Buffer(f"out{place}", dtype, math.prod(shape), scratch=False)
        return View(buffer, shape, row_major_strides(shape))

    def _wanted(self, results: Sequence[fx.Node]) -> dict[fx.Node, View]:
        """Products that may be written straight to their output, through transpositions."""
        wanted: dict[fx.Node, View] = {}
        for node, view in zip(results, self.outputs, strict=True):
            while isinstance(node, fx.Node) and len(node.users) == 1 and node.op == "call_function":
                if opname(node) in ("t", "transpose") and len(view.shape) == 2:
                    view = View(view.buffer, view.shape[::-1], view.strides[::-1])
                elif opname(node) not in ("detach", "alias"):
                    break
                node = node.args[0]
            if node.op == "call_function" and opname(node) == "mm" and len(node.users) == 1:
                wanted[node] = view
        return wanted

    def _place_input(self, node: fx.Node, example: Tensor) -> None:
        buffer = Buffer(f"in{len(self.inputs)}", example.dtype, example.numel(), scratch=False)
        view = View(buffer, tuple(example.shape), tuple(example.stride()))
        self.inputs.append(view)
        batch = node.name.startswith("draw") and example.dim() > 1 and example.shape[0] >= BATCH
        if batch and example.stride(0) != 1 and example.dtype.is_floating_point:
            strides = first_innermost_strides(view.shape)
            view = self.schedule.store(self.expr(view), self.empty(view.shape, example.dtype,
                                                                   strides))
        self.values[node] = view

    def _place_constant(self, node: fx.Node, value: Tensor) -> None:
        value = value.contiguous()
        if value.dtype not in C_TYPES:
            raise Unsupported(f"a constant of type {value.dtype}")
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            self.values[node] = Number(tuple(value.shape), value.dtype,
                                       value=value.flatten()[0].item())
            return
        shape, strides = tuple(value.shape), tuple(value.stride())
        if value.dim() > 1 and len(value) > 1 and bool((value == value[:1]).all()):
            value, strides = value[0].contiguous(), (0, *strides[1:])  # copies of one: keep one
        buffer = Buffer(f"c{len(self.constants)}", value.dtype, value.numel(), scratch=False)
        view = View(buffer, shape, strides)
        self.constants.append((view, value))
        self.values[node] = view

    def _lower(self, node: fx.Node) -> Any:
        if opname(node) == "getitem":
            return self.values[node.args[0]][node.args[1]]
        rule = RULES.get(opname(node))
        if rule is None:
            raise Unsupported(f"{node.target}")
        dtype = node.meta.get("dtype")
        if dtype is not None and dtype not in C_TYPES:
            raise Unsupported(f"{node.target} on {dtype}")
        return rule(self, node, *tree_map(self._resolved, node.args),
                    **{k: self._resolved(v) for k, v in node.kwargs.items()})

    def _resolved(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def _settled(self, node: fx.Node, value: Any) -> Any:
        """The value, written to memory if it is long, or dear and used more than once."""
        if isinstance(value, Expr) and (value.cost > MAX_COST
                                        or (value.cost > 0 and len(node.users) > 1)):
            narrow = self._narrowed(value, 0)
            return self.schedule.store(value) if narrow is value else narrow
        return value

    def _finish(self, node: fx.Node, target: View) -> None:
        value = self.values[node]
        if not (isinstance(value, View) and value.buffer is target.buffer):
            self.schedule.store(self.cast(value, target.buffer.dtype), target)

    # What the rules build with.

    def expr(self, value: Any, dtype: torch.dtype | None = None) -> Expr:
        """A value as an expression; a Python number needs a type."""
        if isinstance(value, Expr):
            return value
        if isinstance(value, View):
            return Load(value.shape, value.buffer.dtype, view=value)
        assert dtype is not None
        return Number((), dtype, value=value)

    def view(self, value: Value) -> View:
        """A value in memory."""
        return value if isinstance(value, View) else self.schedule.store(value)

    def cast(self, value: Any, dtype: torch.dtype) -> Expr:
        """A value of another type."""
        expr = self.expr(value, dtype)
        if expr.dtype == dtype:
            return expr
        text = "{0} != 0" if dtype == torch.bool else f"({C_TYPES[dtype]})({{0}})"
        return Apply(expr.shape, dtype, template=text, args=[expr], weight=0)

    def apply(self, template: str, args: Sequence[Any], dtype: torch.dtype, node: fx.Node,
              weight: int = 1) -> Expr:
        """A pointwise operation computed in ``dtype``; the result has the node's type."""
        if dtype not in SUFFIXES:
            raise Unsupported(f"{node.target} on {dtype}")
        text = template.format(T=SUFFIXES[dtype], C=C_TYPES[dtype])
        exprs = [self.cast(arg, dtype) for arg in args]
        return self.broadcast(text, exprs, node.meta["dtype"], node.meta["shape"], weight)

    def broadcast(self, text: str, args: Sequence[Expr], dtype: torch.dtype, shape: Shape,
                  weight: int = 1) -> Expr:
        """Expressions combined; one that would be computed again and again is stored first."""
        size = math.prod(shape)
        held = [self.expr(self.schedule.store(a)) if a.cost > 1 and math.prod(a.shape) < size else a
                for a in args]
        return self._narrowed(Apply(tuple(shape), dtype, template=text, args=held, weight=weight))

    def _narrowed(self, expr: Expr, least_cost: int = DEAR) -> Expr:
        """An expression that repeats along a dimension is computed once for it, if dear."""
        rank = len(expr.shape)
        narrow = tuple(n if d - rank in expr.varying else 1 for d, n in enumerate(expr.shape))
        if expr.cost < least_cost or narrow == tuple(expr.shape):
            return expr
        view = self.schedule.store(Reindexed(narrow, expr.dtype, source=expr,
                                             place=lambda index: index))
        return self.expr(view.like(view.meta().expand(expr.shape)))

    def expanded(self, expr: Expr, shape: Shape) -> Expr:
        """An expression broadcast to a shape."""
        return expr if tuple(expr.shape) == tuple(shape) else Apply(
            tuple(shape), expr.dtype, template="{0}", args=[expr], weight=0)

    def unsqueezed(self, value: Value, dim: int) -> View:
        """A view with one more dimension."""
        view = self.view(value)
        return view.like(view.meta().unsqueeze(dim))

    def batched(self, view: View, batch: Shape) -> View:
        """A batch of matrices, expanded."""
        return view.like(view.meta().expand(*batch, *view.shape[-2:]))

    def common_dtype(self, x: Any, y: Any) -> torch.dtype:
        """The type in which torch compares two values."""
        def example(value: Any) -> Any:
            if not isinstance(value, (View, Expr)):
                return value
            dtype = value.buffer.dtype if isinstance(value, View) else value.dtype
            return torch.empty(value.shape, dtype=dtype, device="meta")
        return torch.result_type(example(x), example(y))

    def empty(self, shape: Shape, dtype: torch.dtype, strides: Shape | None) -> View:
        """New memory; of several with the same order the strides of a dense tensor."""
        order = range(len(shape)) if strides is None else sorted(
            range(len(shape)), key=lambda d: (-strides[d], d))
        dense, step = [0] * len(shape), 1
        for dim in reversed(list(order)):
            dense[dim] = step
            step *= shape[dim]
        return View(self.schedule.buffer(dtype, step), tuple(shape), tuple(dense))

    def like(self, view: View) -> View:
        """New memory in the order of another."""
        return self.empty(view.shape, view.buffer.dtype, view.strides)

    def hint(self, values: Sequence[Any]) -> Shape | None:
        """Strides to follow: those of the largest value in memory, if any."""
        exprs = [self.expr(v) for v in values]
        views = [view for e in exprs for view, _ in e.loads(tuple("0" * len(e.shape)))
                 if len(view.shape) == len(e.shape) and view.shape == tuple(e.shape)]
        if not views:
            return None
        view = max(views, key=lambda v: math.prod(v.shape))
        outside = max(view.strides, default=0) + 1  # a dimension of length one belongs outside
        return tuple(outside if size == 1 else stride
                     for stride, size in zip(view.strides, view.shape, strict=True))

    def gradient_hint(self, node: fx.Node, grad: Value, args: Sequence[Any]) -> Shape | None:
        """Strides for the gradient of a view, in the order of the gradient's own."""
        strides, shape = self.hint([grad]), node.meta["shape"]
        if strides is None:
            return None
        if opname(node) == "slice_backward":
            return strides
        if opname(node) == "select_backward":
            dim = args[0] % len(shape)
            return (*strides[:dim], max(strides, default=1) + 1, *strides[dim:])
        return None

    def put(self, value: Value, target: View) -> View:
        """Write a value to a part of a buffer."""
        return self.schedule.store(self.expr(value), target)

    def put_into(self, whole: View, value: Value, part: View) -> View:
        """Write a value over a part of ``whole``."""
        self.put(self.expanded(self.cast(value, whole.buffer.dtype), part.shape), part)
        return whole

    def filled(self, shape: Shape, dtype: torch.dtype, value: float, strides: Shape | None
               ) -> View:
        """New memory that holds one number."""
        out = self.empty(shape, dtype, strides)
        return self.schedule.store(Number(tuple(shape), dtype, value=value), out)

    def copied(self, value: Value, strides: Shape | None) -> View:
        """A copy that may be written to."""
        expr = self.expr(value)
        return self.schedule.store(expr, self.empty(expr.shape, expr.dtype, strides))

    def is_random(self, argument: Any) -> bool:
        """Whether a value depends on the draws, and so differs from particle to particle."""
        return argument in self.random

    def row_major(self, value: Value, copy: bool = False) -> View:
        """A value in memory, the last dimension innermost."""
        if isinstance(value, View) and not copy and value.meta().is_contiguous():
            return value
        return self.copied(value, None)


def row_major_strides(shape: Shape) -> Shape:
    """Strides with the last dimension innermost."""
    return tuple(math.prod(shape[d + 1:]) for d in range(len(shape)))


def first_innermost_strides(shape: Shape) -> Shape:
    """Strides with the first dimension innermost, the others reversed."""
    return tuple(math.prod(shape[:d]) for d in range(len(shape)))
