"""Random operations of a recorded function: drawn outside the graph, for many steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BY_SIZE = {aten.randn.default, aten.rand.default}  # independent entries, of any size


@dataclass(frozen=True)
class Draw:
    """A random operation with its arguments, none of which depends on a latent.

    Attributes:
        op: The operation.
        args: Its positional arguments; of one that fills a tensor, an empty tensor comes first.
        kwargs: Its keyword arguments.
        shape: Shape of the result.
        dtype: Type of the result.
        device: Where the result is.
    """

    op: Callable
    args: tuple
    kwargs: dict[str, Any]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def once(self) -> Tensor:
        """One draw: the very operation that was recorded."""
        args = (torch.empty_like(self.args[0]), *self.args[1:]) if fills(self.op) else self.args
        result: Tensor = self.op(*args, **self.kwargs)
        return result

    def many(self, count: int) -> Tensor:
        """Draws ``(count, *shape)``; the first dimension of a shape is the innermost in memory.

        A batch of particles then lies side by side, which is how vector units read.
        """
        if self.op in BY_SIZE:
            inner = self.op([count, *reversed(self.shape)], *self.args[1:], **self.kwargs)
            last = range(len(self.shape), 0, -1)
            values: Tensor = inner.permute(0, *last)
            return values
        if fills(self.op):
            first = torch.empty(count, *self.shape, dtype=self.dtype, device=self.device)
            if not any(isinstance(value, Tensor) for value in self.args[1:]):
                filled: Tensor = self.op(first, *self.args[1:], **self.kwargs)
                return filled
        return torch.stack([self.once() for _ in range(count)])

    @property
    def num_bytes(self) -> int:
        """Memory of one draw."""
        return self.shape.numel() * self.dtype.itemsize


class Replay(TorchDispatchMode):
    """Hand a function draws made before, in the order in which it asks.

    Args:
        draws: One value for each random operation.

    Raises:
        RuntimeError: If the function asks for more, or for another shape.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()
        self._draws: Iterator[Tensor] = iter(draws)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_random(op):
            return op(*args, **(kwargs or {}))
        value = next(self._draws, None)
        if value is None:
            raise RuntimeError("the function draws more random numbers than when it was recorded")
        if fills(op) and args[0].shape != value.shape:
            raise RuntimeError(f"the function draws numbers of shape {tuple(args[0].shape)} where "
                               f"it drew {tuple(value.shape)} when it was recorded")
        return args[0].copy_(value) if fills(op) else _row_major(value)


def _row_major(value: Tensor) -> Tensor:
    """A copy in the memory order that the operation itself would have chosen."""
    return value.clone(memory_format=torch.contiguous_format)


def is_random(op: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in op.tags


def fills(op: Any) -> bool:
    """Whether an operation writes into its first argument."""
    return bool(op._schema.is_mutable)
