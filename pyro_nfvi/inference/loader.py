"""Minibatches from a loader as the feed of a training loop: the same shape at every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_nfvi.inference.array_loader import ArrayLoader, mixed_seed
from pyro_nfvi.inference.batch_stream import BatchStream, share_of, spread

BLOCK_BYTES = 2 ** 26  # of minibatches gathered at once
READ_SECONDS = 0.3  # between two looks at the outside, for a loader that is slow


class Stream(Protocol):
    """Rows of a loader without an end, as one process reads them.

    Attributes:
        batch_size: Number of rows of a batch, over all processes.
        names: Keys of the batches, if they are dicts.
        num_rows: Number of rows of an epoch, None if it is not known.
        example: Rows of this process for some step.
    """

    batch_size: int
    names: tuple[str, ...] | None
    num_rows: int | None
    example: list[Tensor]

    def take(self, step: int, count: int) -> list[Tensor]:
        """Rows ``(count, num_own, *shape)`` of so many steps, from one on."""

    def epoch(self, step: int) -> int:
        """Number of epochs that end at a step or before."""

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where the rows are at one of the steps taken last."""

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go there."""

    def some(self, num_rows: int, total: int | None = None) -> list[Tensor]:
        """So many of all rows, or all if there are fewer; no other order is disturbed."""

    def all(self, batch_size: int) -> Iterator[list[Tensor]]:
        """All rows once, the last batch perhaps smaller; no other order is disturbed."""

    def opening(self) -> list[Tensor] | None:
        """A batch of set rows from all over; None if the loader has an order of its own."""


class LoaderFeed:
    """Minibatches from a loader, all of one shape: the feed of a training loop.

    Rows are one stream across epochs: the last, partial batch of an epoch goes on with the first
    rows of the next, so every row is seen equally often. The order is drawn from random streams
    of the feed's own, seeded once; torch's global random state is left alone, also by a
    ``DataLoader`` whose samplers and datasets use it. What one of those draws by other means, from
    NumPy say, a feed that is rewound or resumed does not draw again.

    Args:
        loader: An :class:`ArrayLoader`, a ``DataLoader``, or anything else that can be iterated
            again and again, over batches: tensors, tuples or lists of tensors, which the model
            takes as positional arguments, or dicts of tensors, which it takes by name.
        dtype: Floating-point type of the fit, to which such tensors are converted. Default: they
            stay as they are.
        device: Where batches are moved. Default: they stay where they are.
        rank: Number of this process, from 0.
        size: Number of processes that share each batch. They need the same ``seed``.
        seed: Seed of the order. Default: drawn from torch's global random state.

    Raises:
        ValueError: If the loader is of another kind, gives no batch or something else than
            tensors, draws rows with replacement, or its batch size is not divisible by the number
            of processes.

    Attributes:
        live: The tensors of one batch, or of this process's part of it.
        names: Keys of the batches, if they are dicts.
        batch_size: Number of rows of a batch, over all processes.
        num_own: Number of them that this process reads.
        step: Number of steps supplied.
    """

    def __init__(self, loader: Any, *, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None, rank: int = 0, size: int = 1,
                 seed: int | None = None) -> None:
        self.dtype = dtype
        self.device = None if device is None else torch.device(device)
        seed = int(torch.randint(2 ** 62, ())) if seed is None else seed
        kind = ArrayStream if isinstance(loader, ArrayLoader) else BatchStream
        # No method of this feed: a circle of references lets workers wait until they are collected.
        self._stream: Stream = kind(loader, partial(_converted, dtype), rank, size, seed)
        self.batch_size, self.names = self._stream.batch_size, self._stream.names
        self.live = [tensor.clone() for tensor in self._moved(self._stream.example)]
        self.num_own = len(self.live[0])
        self.step = self._start = 0
        self._seconds = 0.0  # that a step took to read, at the last call

    @property
    def num_rows(self) -> int | None:
        """Number of rows of an epoch; None if it is not known."""
        return self._stream.num_rows

    @property
    def kind(self) -> str:
        """How the loader is read."""
        return type(self._stream).__name__

    @property
    def row_bytes(self) -> int:
        """Size of a row, as the fit takes it."""
        return max(1, sum(tensor.nbytes for tensor in self.live) // self.num_own)

    @property
    def most(self) -> int:
        """Largest number of steps to supply at once, by the memory and the time that takes."""
        fitting = BLOCK_BYTES / max(1, sum(tensor.nbytes for tensor in self.live))
        return int(max(1, min(fitting, READ_SECONDS / max(self._seconds, 1e-9))))

    @property
    def epoch(self) -> int:
        """Number of epochs completed by the last step supplied."""
        return self._stream.epoch(self._start + self.step)

    def take(self, count: int) -> list[Tensor]:
        """The next batches: each tensor of ``live`` with a first dimension of steps."""
        begin = time.perf_counter()
        taken = self._moved(self._stream.take(self._start + self.step, count))
        self.step, self._seconds = self.step + count, (time.perf_counter() - begin) / count
        return taken

    def rewind(self, step: int) -> None:
        """Go back to one of the steps supplied last, whose batch becomes the live one."""
        values = self._moved(self._stream.take(self._start + step, 1))
        for live, value in zip(self.live, values, strict=True):
            live.copy_(value[0])
        self.step = step

    def restart(self) -> None:
        """Count steps from zero again, as the next stage of a fit does."""
        self._start, self.step = self._start + self.step, 0

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where the supply is at one of the steps supplied last, as a file holds it."""
        return {"step": step, "start": self._start, "batch_size": self.batch_size,
                "num_rows": self.num_rows, **self._stream.snapshot(self._start + step)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot: the next batches are those it would have supplied.

        Raises:
            ValueError: If it is that of another loader.
        """
        for name, now in (("num_rows", self.num_rows), ("batch_size", self.batch_size)):
            if snapshot[name] != now:
                raise ValueError(f"NFVI expected `loader` to be the one that the fit began with, "
                                 f"of {name}={snapshot[name]}, got {name}={now}.")
        self._stream.restore(snapshot)
        self.step, self._start = snapshot["step"], snapshot["start"]

    def first(self, num_rows: int, total: int | None = None) -> list[Tensor]:
        """So many rows to start from, or all if there are fewer: the same for all processes.

        Raises:
            ValueError: If all had to be read, and are not ``total``.
        """
        return self._moved(self._stream.some(num_rows, total))

    def passes(self, batch_size: int | None = None) -> Iterator[list[Tensor]]:
        """All rows once, for each process, batch by batch; the last may be smaller."""
        for batch in self._stream.all(self.batch_size if batch_size is None else batch_size):
            yield self._moved(batch)

    def opening(self) -> list[Tensor] | None:
        """A batch of set rows from all over; None if the loader has an order of its own."""
        rows = self._stream.opening()
        return None if rows is None else self._moved(rows)

    def arguments(self, args: tuple, kwargs: Mapping[str, Any],
                  batch: Sequence[Tensor] | None = None) -> tuple[tuple, dict[str, Any]]:
        """A model's arguments with those of a batch. Default: the live one.

        Raises:
            ValueError: If a keyword is that of a batch, too.
        """
        batch = self.live if batch is None else batch
        if self.names is None:
            return (*args, *batch), dict(kwargs)
        if twice := sorted(set(self.names) & set(kwargs)):
            raise ValueError(f"NFVI expected each argument of the model once, got {twice[0]!r} in "
                             "the call and in the batches of `loader`. Leave it out of the call.")
        return args, {**kwargs, **dict(zip(self.names, batch, strict=True))}

    def _moved(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self.device is not None and self.device.type == "cuda":  # copied while the host goes on
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return [tensor.to(device=self.device, non_blocking=True) for tensor in tensors]


def _converted(dtype: torch.dtype | None, tensor: Tensor) -> Tensor:
    return tensor.to(dtype=dtype) if tensor.is_floating_point() else tensor


class ArrayStream:
    """Rows of an :class:`ArrayLoader` without an end, gathered one block ahead in a thread.

    A thread gathers one block and ends, so that none is left, whatever ends the fit.

    Args:
        loader: The loader.
        convert: What becomes of each tensor.
        rank: Number of this process.
        size: Number of processes that share a batch, of which each gathers its own rows.
        seed: Seed of the order.
    """

    names: tuple[str, ...] | None = None

    def __init__(self, loader: ArrayLoader, convert: Callable[[Tensor], Tensor], rank: int,
                 size: int, seed: int) -> None:
        self.loader, self.convert, self.rank, self.seed = loader, convert, rank, seed
        self.num_rows: int | None = loader.num_rows
        self.batch_size = min(loader.batch_size, loader.num_rows)
        self.num_own = share_of(self.batch_size, size)
        self.order = loader.order(seed, loader.shuffle)
        self.ahead = all(column.on_host for column in loader.columns)
        self.blocks: list[tuple[int, list[Tensor]]] = []  # gathered, by their first step
        self.next: _Later | None = None
        self.example = [values[0] for values in self._gather(0, 1)]

    def take(self, step: int, count: int) -> list[Tensor]:
        """Rows of so many steps, from one on; the same whatever is gathered at once."""
        parts, end = [], step + count
        while step < end:
            parts.append(self._part(step, end))
            step += len(parts[-1][0])
        self.blocks = [(first, block) for first, block in self.blocks
                       if first <= step < first + len(block[0])]
        first = max([step, *(first + len(block[0]) for first, block in self.blocks)])
        if self.ahead and self.next is None and first - step < count:
            self.next = _Later(first, lambda: self._gather(first, count))
        return parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts,
                                                                                strict=True)]

    def epoch(self, step: int) -> int:
        """Number of epochs that end at a step or before."""
        return step * self.batch_size // self.loader.num_rows

    def snapshot(self, step: int) -> dict[str, Any]:
        """What the order depends on."""
        return {"seed": self.seed, "block_size": self.order.block_size,
                "num_mixed": self.order.num_mixed}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take the order of a snapshot."""
        self.seed, self.blocks, self.next = snapshot["seed"], [], None
        self.order = self.loader.order(self.seed, self.loader.shuffle)
        self.order.block_size = snapshot["block_size"]
        self.order.num_mixed = snapshot["num_mixed"]

    def some(self, num_rows: int, total: int | None = None) -> list[Tensor]:
        """Rows at random: arrays may be sorted."""
        order = self.loader.order(mixed_seed(self.seed, 0))
        return [self.convert(rows) for rows in
                self.loader.gather(order(0, min(num_rows, self.loader.num_rows)))]

    def all(self, batch_size: int) -> Iterator[list[Tensor]]:
        """All rows as they are stored, which is fastest."""
        for start in range(0, self.loader.num_rows, batch_size):
            stop = min(start + batch_size, self.loader.num_rows)
            yield [self.convert(rows) for rows in self.loader.between(start, stop)]

    def opening(self) -> list[Tensor]:
        """Rows from all over the arrays."""
        rows = self.loader.gather(spread(self.loader.num_rows, self.batch_size))
        return [self.convert(values) for values in rows]

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle gathers for itself."""
        return {**self.__dict__, "blocks": [], "next": None}

    def _part(self, step: int, end: int) -> list[Tensor]:
        """Rows of the first of some steps, or of all: those gathered before, if there are any."""
        for first, block in self.blocks:
            if first <= step < first + len(block[0]):
                return [values[step - first:end - first] for values in block]
        if self.next is None:
            return self._gather(step, end - step)
        later, self.next = self.next, None
        self.blocks.append((later.step, later.result()))
        return self._part(step, end)

    def _gather(self, step: int, count: int) -> list[Tensor]:
        rows = self.order(step * self.batch_size, (step + count) * self.batch_size)
        start = self.rank * self.num_own
        own = rows.view(count, self.batch_size)[:, start:start + self.num_own].reshape(-1)
        return [self.convert(values).view(count, self.num_own, *values.shape[1:])
                for values in self.loader.gather(own)]


class _Later:
    """The result of a function, computed in a thread of its own.

    Args:
        step: The step that it is for.
        function: The function.
    """

    def __init__(self, step: int, function: Callable[[], list[Tensor]]) -> None:
        self.step, self.function = step, function
        self.value: list[Tensor] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="pyro_nfvi loader")
        self.thread.start()

    def result(self) -> list[Tensor]:
        """Wait for it; an error of the function is raised as it is."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.value

    def _run(self) -> None:
        try:
            self.value = self.function()
            del self.function  # and with it the circle of references
        except BaseException as error:  # to be raised where it is waited for
            self.error = error
