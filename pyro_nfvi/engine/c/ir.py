"""What generated code computes with: memory, views of it, and expressions over an index."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.int64: "int64_t",
           torch.int32: "int32_t", torch.bool: "_Bool", torch.uint8: "uint8_t"}
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.int64: "i64", torch.int32: "i32",
            torch.bool: "b8", torch.uint8: "u8"}

Shape = tuple[int, ...]
Index = tuple[str, ...]  # one C expression for each dimension


class Unsupported(NotImplementedError):
    """The code generator has no rule for something."""


@dataclass(eq=False)
class Buffer:
    """A piece of memory: an input, a constant, an output, or scratch of the arena."""

    name: str
    dtype: torch.dtype
    size: int
    scratch: bool = True


@dataclass(frozen=True)
class View:
    """Strided elements of a buffer, as torch lays them out."""

    buffer: Buffer
    shape: Shape
    strides: Shape
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.buffer.dtype

    def at(self, index: Index) -> str:
        """The C expression of one element."""
        terms = [i if stride == 1 else f"{i}*{stride}"
                 for i, stride, size in zip(index, self.strides, self.shape, strict=True)
                 if size != 1 and stride != 0 and i != "0"]
        terms += [str(self.offset)] if self.offset or not terms else []
        return f"{self.buffer.name}[{'+'.join(terms)}]"

    def meta(self) -> torch.Tensor:
        """A tensor of this geometry without memory, to ask torch what a view operation does."""
        return torch.empty(0, dtype=self.buffer.dtype, device="meta").as_strided(
            self.shape, self.strides, self.offset)

    def like(self, meta: torch.Tensor) -> View:
        """Another view of the same buffer."""
        return View(self.buffer, tuple(meta.shape), tuple(meta.stride()),
                    int(meta.storage_offset()))


class Scope(ABC):
    """Where expressions are written out: names what was computed already."""

    @abstractmethod
    def load(self, view: View, index: Index) -> str:
        """The value of an element."""

    @abstractmethod
    def local(self, expr: Expr, index: Index, make: Callable[[], str]) -> str:
        """A local variable with the value of ``expr`` at ``index``, made at most once."""


@dataclass(eq=False)
class Expr(ABC):
    """A tensor that is not in memory: how to compute its elements.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        cost: Operations an element takes.
    """

    shape: Shape
    dtype: torch.dtype
    cost: int = field(default=0, init=False)

    @property
    def varying(self) -> frozenset[int]:
        """Dimensions along which elements differ, counted from the right: -1, -2, ..."""
        return frozenset(range(-len(self.shape), 0))

    @abstractmethod
    def emit(self, scope: Scope, index: Index) -> str:
        """The C expression of one element."""

    @abstractmethod
    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        """The elements it reads."""


@dataclass(eq=False)
class Load(Expr):
    """Elements of memory."""

    view: View = field(kw_only=True)

    @property
    def varying(self) -> frozenset[int]:
        rank = len(self.shape)
        return frozenset(d - rank for d in range(rank)
                         if self.view.strides[d] != 0 and self.shape[d] != 1)

    def emit(self, scope: Scope, index: Index) -> str:
        return scope.load(self.view, index)

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        yield self.view, index


@dataclass(eq=False)
class Number(Expr):
    """The same number everywhere."""

    value: float = field(kw_only=True)

    @property
    def varying(self) -> frozenset[int]:
        return frozenset()

    def emit(self, scope: Scope, index: Index) -> str:
        return literal(self.value, self.dtype)

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        yield from ()


@dataclass(eq=False)
class Apply(Expr):
    """A C expression of other expressions, broadcast as torch does."""

    template: str = field(kw_only=True)
    args: Sequence[Expr] = field(kw_only=True)
    weight: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        self.cost = self.weight + sum(arg.cost for arg in self.args)
        self._varying = frozenset[int]().union(*(arg.varying for arg in self.args))

    @property
    def varying(self) -> frozenset[int]:
        return self._varying

    def emit(self, scope: Scope, index: Index) -> str:
        def make() -> str:
            values = [arg.emit(scope, aligned(arg.shape, index)) for arg in self.args]
            return self.template.format(*values)
        return scope.local(self, index, make)

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        for arg in self.args:
            yield from arg.loads(aligned(arg.shape, index))


@dataclass(eq=False)
class Reindexed(Expr):
    """Another expression read at other places."""

    source: Expr = field(kw_only=True)
    place: Callable[[Index], Index] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.cost = self.source.cost

    def emit(self, scope: Scope, index: Index) -> str:
        return self.source.emit(scope, self.place(index))

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        yield from self.source.loads(self.place(index))


@dataclass(eq=False)
class Position(Expr):
    """A C expression of the index itself; ``{0}``, ``{1}``... are the dimensions."""

    template: str = field(kw_only=True)

    def emit(self, scope: Scope, index: Index) -> str:
        return self.template.format(*(f"({i})" for i in index))

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        yield NOWHERE, tuple(f"({i})" for i in index)


@dataclass(eq=False)
class Taken(Expr):
    """Elements of memory at places that other expressions compute."""

    view: View = field(kw_only=True)
    places: Callable[[Index], Sequence[Expr | str]] = field(kw_only=True)
    index_of: Callable[[Index], Index] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.cost = 2

    def emit(self, scope: Scope, index: Index) -> str:
        def make() -> str:
            inner = self.index_of(index)
            places = [p if isinstance(p, str)
                      else f"(int)({p.emit(scope, aligned(p.shape, inner))})"
                      for p in self.places(index)]
            return scope.load(self.view, tuple(places))
        return scope.local(self, index, make)

    def loads(self, index: Index) -> Iterator[tuple[View, Index]]:
        inner = self.index_of(index)
        for place in self.places(index):
            if isinstance(place, Expr):
                yield from place.loads(aligned(place.shape, inner))
        computed = f"({','.join(inner)})"
        yield self.view, tuple(p if isinstance(p, str) else computed for p in self.places(index))


NOWHERE = View(Buffer("", torch.bool, 0), (), ())


def aligned(shape: Shape, index: Index) -> Index:
    """The index of a broadcast operand: the last dimensions, size one always at zero."""
    tail = index[len(index) - len(shape):]
    return tuple("0" if size == 1 else i for size, i in zip(shape, tail, strict=True))


def literal(value: float, dtype: torch.dtype) -> str:
    """A number as C text."""
    if not dtype.is_floating_point and math.isinf(value):
        if dtype == torch.bool:
            return str(int(value > 0))
        most = torch.iinfo(dtype).max
        return f"INT64_C({most})" if value > 0 else f"(-INT64_C({most}) - 1)"
    if not dtype.is_floating_point:
        return f"INT64_C({int(value)})" if dtype == torch.int64 else str(int(value))
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"({float(value)!r}" + ("f)" if dtype == torch.float32 else ")")


def loops(dims: Sequence[int], shape: Sequence[int], apart: bool = False) -> str:
    """Heads of nested loops over these dimensions; ``apart``: the innermost has no conflicts."""
    heads = [f"for (int i{d} = 0; i{d} < {shape[d]}; i{d}++) " for d in dims]
    if heads and apart:
        heads[-1] = "\n#pragma GCC ivdep\n" + heads[-1]
    return "".join(heads)
