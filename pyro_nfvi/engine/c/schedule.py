"""Loop nests: which statements share one, in which order its loops run, and their C text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pyro_nfvi.engine.c.ir import (
    C_TYPES,
    NOWHERE,
    Buffer,
    Expr,
    Index,
    Scope,
    Shape,
    View,
    literal,
)

LOOP = re.compile(r"i\d+")
MAX_STATEMENTS = 40  # of one nest: more would not fit the registers
STRIDED = 8.0  # cost of an operand read with a stride, against about 1 otherwise
SMALL = 1024  # elements of a nest that may run long before it is needed
SHORT = 8  # a loop shorter than this makes poor vectors
ALIGNMENT = 64  # bytes

# How each reduction starts and takes in one more element.
START = {"sum": 0, "prod": 1, "amax": -math.inf, "amin": math.inf, "any": 0, "all": 1}
STEP = {"sum": "{0} + {1}", "prod": "{0} * {1}", "amax": "({1} > {0} || {1} != {1}) ? {1} : {0}",
        "amin": "({1} < {0} || {1} != {1}) ? {1} : {0}", "any": "{0} | {1}", "all": "{0} & {1}"}


@dataclass(eq=False)
class Statement:
    """Write an expression to memory, element by element, or reduce it.

    Attributes:
        expr: What to compute.
        target: Where; of the expression's shape, with stride 0 along what is reduced.
        reduction: How elements of one place combine, or an empty string.
        reduced: Dimensions that are reduced.
    """

    expr: Expr
    target: View
    reduction: str = ""
    reduced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.index, self.extents = iteration(self.expr.shape)
        loops = [d for d, size in enumerate(self.expr.shape) if size != 1]
        self.reduced_loops = {loops.index(d) for d in self.reduced if d in loops}
        self.loads = list(dict.fromkeys(self.expr.loads(self.index)))

    def strides(self, view: View, index: Index) -> list[int | None]:
        """Stride of a view along each loop; None where its place is computed from the loop."""
        steps: list[int | None] = [0] * len(self.extents)
        sizes = zip(view.strides, view.shape, strict=True) if view is not NOWHERE else \
            iter([(0, 2)] * len(index))
        for place, (stride, size) in zip(index, sizes, strict=True):
            simple = LOOP.fullmatch(place)
            for loop in (int(name[1:]) for name in LOOP.findall(place)):
                before = steps[loop]
                steps[loop] = None if before is None or not simple else \
                    before + (stride if size != 1 else 0)
        return steps


def iteration(shape: Shape) -> tuple[Index, Shape]:
    """Loop variables of a shape, without loops of length one, and their extents."""
    names: list[str] = []
    extents: list[int] = []
    for size in shape:
        names.append("0" if size == 1 else f"i{len(extents)}")
        extents += [size] if size != 1 else []
    return tuple(names), tuple(extents)


@dataclass(eq=False)
class Kernel:
    """C text that is no loop nest of ours: a matrix product, a scan, a scatter."""

    text: str
    reads: list[Buffer]
    writes: list[Buffer]

    def emit(self, _: Callable[[Buffer], bool]) -> str:
        """The text."""
        return self.text


@dataclass(eq=False)
class Nest:
    """Statements over the same index, in one nest of loops.

    Attributes:
        extents: Length of each loop.
        order: The loops from the outermost to the innermost.
        statements: What the innermost body does.
    """

    extents: Shape
    order: tuple[int, ...]
    statements: list[Statement] = field(default_factory=list)

    @property
    def reads(self) -> list[Buffer]:
        """Buffers it reads."""
        return [view.buffer for s in self.statements for view, _ in s.loads if view is not NOWHERE]

    @property
    def writes(self) -> list[Buffer]:
        """Buffers it writes."""
        return [s.target.buffer for s in self.statements]

    def emit(self, needed: Callable[[Buffer], bool]) -> str:
        """The C text; ``needed`` tells which buffers someone else reads."""
        return _NestText(self, needed).text()


class _NestText(Scope):
    """One nest as text: locals for what was computed, loops merged where memory allows."""

    def __init__(self, nest: Nest, needed: Callable[[Buffer], bool]) -> None:
        self.nest, self.needed = nest, needed
        self.lines: list[str] = []
        self.known: dict[tuple[int, Index], str] = {}
        self.stored: dict[str, str] = {}  # address -> the local variable that was stored there
        self.loops = self._merged_loops()  # [(variable, extent, loops it stands for)]

    def text(self) -> str:
        before, after = self._accumulators()
        for place, statement in enumerate(self.nest.statements):
            self._write(place, statement)
        return self._loops(0, before, after)

    def load(self, view: View, index: Index) -> str:
        address = view.at(index)
        if address not in self.stored:
            name = f"v{len(self.stored)}"
            self.lines.append(f"const {C_TYPES[view.buffer.dtype]} {name} = {address};")
            self.stored[address] = name
        return self.stored[address]

    def local(self, expr: Expr, index: Index, make: Callable[[], str]) -> str:
        key = (id(expr), index)
        if key not in self.known:
            value = make()
            name = f"t{len(self.known)}"
            self.lines.append(f"const {C_TYPES[expr.dtype]} {name} = {value};")
            self.known[key] = name
        return self.known[key]

    def _write(self, place: int, statement: Statement) -> None:
        value = statement.expr.emit(self, statement.index)
        address = statement.target.at(self._target_index(statement))
        if not statement.reduction:
            if self.needed(statement.target.buffer):
                self.lines.append(f"{address} = {value};")
            self.stored[address] = value
            return
        if not self.needed(statement.target.buffer):
            return
        total = f"r{place}" if self._suffix(statement) is not None else address
        self.lines.append(f"{total} = {STEP[statement.reduction].format(total, value)};")

    @staticmethod
    def _target_index(statement: Statement) -> Index:
        return tuple("0" if d in statement.reduced else i
                     for d, i in enumerate(statement.index))

    def _suffix(self, statement: Statement) -> int | None:
        """Depth from which all loops are reduced: there a scalar accumulates. Else None."""
        reduced = [bool(set(loops) & statement.reduced_loops) for _, _, loops in self.loops]
        depth = len(reduced)
        while depth and reduced[depth - 1]:
            depth -= 1
        return depth if depth < len(reduced) or True not in reduced else None

    def _accumulators(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """Lines before and after the loop at each depth."""
        before: dict[int, list[str]] = {}
        after: dict[int, list[str]] = {}
        for place, s in enumerate(self.nest.statements):
            if not s.reduction or not self.needed(s.target.buffer):
                continue
            start = literal(START[s.reduction], s.expr.dtype)
            address = s.target.at(self._target_index(s))
            depth = self._suffix(s)
            outer = self.loops if depth is None else self.loops[:depth]
            in_parts = any(set(loops) & s.reduced_loops for _, _, loops in outer)
            if in_parts:  # memory collects what the scalar brings
                before.setdefault(0, []).append(self._filled(s, start))
            if depth is not None:
                kind, scalar = C_TYPES[s.expr.dtype], f"r{place}"
                total = STEP[s.reduction].format(address, scalar) if in_parts else scalar
                before.setdefault(depth, []).append(f"{kind} {scalar} = {start};")
                after.setdefault(depth, []).append(f"{address} = {total};")
        return before, after

    def _filled(self, statement: Statement, start: str) -> str:
        kept = [(v, n) for v, n, loops in self.loops if not set(loops) & statement.reduced_loops]
        address = statement.target.at(self._target_index(statement))
        return "".join(f"for (int {v} = 0; {v} < {n}; {v}++) " for v, n in kept) \
            + f"{address} = {start};"

    def _loops(self, depth: int, before: dict[int, list[str]], after: dict[int, list[str]]) -> str:
        start, end = " ".join(before.get(depth, [])), " ".join(after.get(depth, []))
        if depth == len(self.loops):
            body = "\n".join([start, *self.lines, end] if start or end else self.lines)
            return "{ " + body + " }"
        variable, extent, loops = self.loops[depth]
        head = self._pragma(loops) if depth == len(self.loops) - 1 else ""
        inner = self._loops(depth + 1, before, after)
        return "{ " + start + f"\n{head}for (int {variable} = 0; {variable} < {extent}; " \
            f"{variable}++)\n{inner}\n{end} }}"

    def _pragma(self, loops: list[int]) -> str:
        sums = [f"r{k}" for k, s in enumerate(self.nest.statements) if s.reduction
                and self.needed(s.target.buffer) and set(loops) & s.reduced_loops]
        if not sums:
            return "#pragma GCC ivdep\n"
        kinds = {s.reduction for s in self.nest.statements if s.reduction}
        return f"#pragma omp simd reduction(+:{','.join(sums)})\n" if kinds == {"sum"} else ""

    def _merged_loops(self) -> list[tuple[str, int, list[int]]]:
        """Loops, neighbours merged into one where every element moves on evenly."""
        steps = [s.strides(view, index) for s in self.nest.statements
                 for view, index in [*s.loads, (s.target, self._target_index(s))]]
        merged: list[tuple[str, int, list[int]]] = []
        for loop in reversed(self.nest.order):
            if merged and self._merges(steps, loop, merged[-1]):
                variable, extent, loops = merged[-1]
                merged[-1] = (variable, extent * self.nest.extents[loop], [*loops, loop])
            else:
                merged.append((f"i{loop}", self.nest.extents[loop], [loop]))
        gone = {f"i{k}" for _, _, loops in merged for k in loops[1:]}
        for s in self.nest.statements:
            s.index = tuple("0" if i in gone else i for i in s.index)
        return merged[::-1]

    def _merges(self, steps: list[list[int | None]], loop: int,
                inner: tuple[str, int, list[int]]) -> bool:
        _, extent, loops = inner
        same = all((loop in s.reduced_loops) == (loops[0] in s.reduced_loops)
                   for s in self.nest.statements)
        return same and all(outer is not None and within is not None and outer == within * extent
                            for outer, within in ((step[loop], step[loops[0]]) for step in steps))


class Schedule:
    """Nests and kernels in the order in which they run."""

    def __init__(self) -> None:
        self.items: list[Nest | Kernel] = []
        self.written: dict[Buffer, int] = {}  # last item that writes each buffer
        self.buffers: list[Buffer] = []  # scratch

    def buffer(self, dtype: torch.dtype, size: int) -> Buffer:
        """New scratch memory."""
        self.buffers.append(Buffer(f"b{len(self.buffers)}", dtype, max(size, 1)))
        return self.buffers[-1]

    def kernel(self, text: str, reads: Sequence[View], writes: Sequence[View]) -> None:
        """Run a piece of C text after what it reads."""
        self.items.append(Kernel(text, [v.buffer for v in reads], [v.buffer for v in writes]))
        for view in writes:
            self.written[view.buffer] = len(self.items) - 1

    def store(self, expr: Expr, target: View | None = None) -> View:
        """Write an expression to memory: to ``target``, or to new memory in a good order."""
        return self._add(expr, target, "", ())

    def reduce(self, kind: str, expr: Expr, dims: tuple[int, ...], target: View | None = None
               ) -> View:
        """Reduce an expression along ``dims``; the result keeps them, with length one."""
        return self._add(expr, target, kind, dims)

    def _add(self, expr: Expr, target: View | None, kind: str, dims: tuple[int, ...]) -> View:
        draft = Statement(expr, target or NOWHERE, kind, dims)
        order = _loop_order(draft)
        place = self._place(draft, order, target)
        if place is None:
            place = self._insert(Nest(draft.extents, order), self._earliest(draft, target, False))
        nest = self.items[place]
        assert isinstance(nest, Nest)
        shape = tuple(1 if d in dims else n for d, n in enumerate(expr.shape))
        if target is None:
            target = self._laid_out(expr, shape, nest.order)
        draft.target = target
        nest.statements.append(draft)
        self.written[target.buffer] = max(place, self.written.get(target.buffer, 0))
        return target

    def _laid_out(self, expr: Expr, shape: Shape, order: tuple[int, ...]) -> View:
        """New memory whose innermost dimension is that of the innermost loop."""
        strides, step = [0] * len(shape), 1
        loops = [d for d, size in enumerate(expr.shape) if size != 1]
        for dim in reversed([loops[k] for k in order]):
            strides[dim] = step
            step *= shape[dim]
        return View(self.buffer(expr.dtype, step), shape, tuple(strides))

    def _place(self, draft: Statement, order: tuple[int, ...], target: View | None) -> int | None:
        """The first nest that can take the statement, or None.

        Small work does not wait behind large: what needs it could not join the large nest then.
        """
        for place in range(self._earliest(draft, target, True), len(self.items)):
            nest = self.items[place]
            if _is_small(draft.extents) and isinstance(nest, Nest) and not _is_small(nest.extents):
                return None
            if isinstance(nest, Nest) and nest.extents == draft.extents and nest.order == order \
                    and len(nest.statements) < MAX_STATEMENTS and _mixes(nest, draft):
                return place
        return None

    def _earliest(self, draft: Statement, target: View | None, joins: bool) -> int:
        """Where all that a statement reads is there; ``joins``: if only in the same iteration."""
        earliest = 0 if target is None else self.written.get(target.buffer, -1) + 1
        for view, index in draft.loads:
            writer = self.written.get(view.buffer)
            if writer is not None:
                joined = joins and self._is_aligned(writer, view, index)
                earliest = max(earliest, writer if joined else writer + 1)
        return earliest

    def _insert(self, nest: Nest, earliest: int) -> int:
        """Add a nest: a small one early, where large ones can still build on it."""
        if not _is_small(nest.extents):
            earliest = len(self.items)
        self.items.insert(earliest, nest)
        for buffer, place in self.written.items():
            self.written[buffer] = place + (place >= earliest)
        return earliest

    def _is_aligned(self, writer: int, view: View, index: Index) -> bool:
        """Whether the nest that writes a view has just computed the very element read."""
        nest = self.items[writer]
        if not isinstance(nest, Nest):
            return False
        writes = [s for s in nest.statements if s.target.buffer is view.buffer]
        return all(not s.reduction and s.target.at(s.index) == view.at(index) for s in writes)

    def text(self) -> tuple[str, int]:
        """The C text of all items, and the bytes of scratch memory it needs."""
        readers, writers = self._users(lambda item: item.reads), self._users(
            lambda item: item.writes)
        local = {b for b in self.buffers if self._is_local(readers[b], writers[b])}
        offsets, size = self._arena(readers, writers, local)
        declared = [f"{C_TYPES[b.dtype]}* {b.name} = ({C_TYPES[b.dtype]}*)(arena + {offset});"
                    for b, offset in offsets.items()]
        body = [item.emit(lambda b: b not in local) for item in self.items]
        return "\n".join(declared + body), size

    def _users(self, buffers: Callable[[Nest | Kernel], list[Buffer]]
               ) -> dict[Buffer, list[int]]:
        users: dict[Buffer, list[int]] = defaultdict(list)
        for place, item in enumerate(self.items):
            for buffer in buffers(item):
                users[buffer].append(place)
        return users

    def _is_local(self, readers: list[int], writers: list[int]) -> bool:
        """Whether one nest alone writes and reads a buffer: then it needs no memory."""
        return len(set(writers + readers)) == 1 and isinstance(self.items[writers[0]], Nest)

    def _arena(self, readers: dict[Buffer, list[int]], writers: dict[Buffer, list[int]],
               local: set[Buffer]) -> tuple[dict[Buffer, int], int]:
        """Offsets of scratch buffers; two share memory if they never live together."""
        used = [b for b in self.buffers if writers[b] and b not in local]
        live: list[tuple[int, int, int]] = []  # (offset, end, last use)
        offsets, top = {}, 0
        for buffer in sorted(used, key=lambda b: writers[b][0]):
            live = [block for block in live if block[2] >= writers[buffer][0]]
            need = -(-buffer.size * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT
            offset = _gap(sorted(live), need)
            live.append((offset, offset + need, max(writers[buffer] + readers[buffer])))
            offsets[buffer], top = offset, max(top, offset + need)
        return offsets, top


def _gap(live: list[tuple[int, int, int]], need: int) -> int:
    """The first free place of that many bytes."""
    start = 0
    for offset, end, _ in live:
        if offset - start >= need:
            break
        start = max(start, end)
    return start


def _is_small(extents: Shape) -> bool:
    return math.prod(extents) <= SMALL


def _mixes(nest: Nest, draft: Statement) -> bool:
    """Sums are vectorized in a way of their own: they share loops only with sums."""
    kinds = {s.reduction for s in [*nest.statements, draft] if s.reduction}
    return len(kinds) <= 1


def _loop_order(statement: Statement) -> tuple[int, ...]:
    """Loops from the outermost to the innermost.

    Innermost is the loop along which most operands lie side by side; the others follow the
    memory of the largest operand.
    """
    views = [(v, i) for v, i in statement.loads if v is not NOWHERE]
    if statement.target is not NOWHERE and not statement.reduction:
        views.insert(0, (statement.target, statement.index))
    steps = list(dict.fromkeys(tuple(statement.strides(view, index)) for view, index in views))
    loops = list(range(len(statement.extents)))
    if not steps or not loops:
        return tuple(loops)
    inner = min(reversed(loops), key=lambda k: _inner_cost(steps, k, statement.extents[k]))
    sizes = [math.prod(n for n, s in zip(statement.extents, step, strict=True) if s)
             for step in steps]
    best = [abs(s or 0) for s in steps[sizes.index(max(sizes))]]
    outer = sorted((k for k in loops if k != inner), key=lambda k: (best[k] > 0, -best[k], k))
    return (*outer, inner)


def _inner_cost(steps: list[tuple[int | None, ...]], loop: int, extent: int) -> float:
    """Cost of an element if this loop is innermost, on average over the operands."""
    costs: dict[int | None, float] = {0: 1.0, 1: 0.9}  # it stays; it is the next in memory
    short = 4.0 if extent < SHORT else 0.0
    return short + sum(costs.get(step[loop], STRIDED) for step in steps) / len(steps)
