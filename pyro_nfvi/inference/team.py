"""The processes that share a fit, seen from one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Team(Protocol):
    """What a fit asks of the processes that share it.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all: it shows bars and writes files."""

    def sum_(self, flat: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""

    def share(self, value: Any) -> Any:
        """The leader's value, in all processes."""

    def lead(self, function: Callable[[], Any]) -> Any:
        """What a function returns, or raises, that only the leader calls."""

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number."""

    def first(self, text: str) -> str:
        """The first text that is not empty."""


class Alone:
    """A team of one."""

    rank, size, leads = 0, 1, True

    def sum_(self, flat: Tensor) -> Tensor:
        """The tensor."""
        return flat

    def share(self, value: Any) -> Any:
        """The value."""
        return value

    def lead(self, function: Callable[[], Any]) -> Any:
        """What the function returns."""
        return function()

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The numbers."""
        return list(numbers)

    def first(self, text: str) -> str:
        """The text."""
        return text
