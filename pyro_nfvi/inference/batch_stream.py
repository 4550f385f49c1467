"""Rows of a DataLoader, or of other batches, as one stream across epochs that can be resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_nfvi._shapes import type_name
from pyro_nfvi.inference.array_loader import mixed_seed

WANTED = "NFVI expected `loader`"
ALL_ROWS = (RandomSampler, SequentialSampler, DistributedSampler)  # of a dataset, or a part
Kind = tuple[tuple[str, ...] | None, tuple[tuple[torch.Size, torch.dtype], ...]]


class BatchStream:
    """Rows of a loader without an end: each epoch goes on where the one before ended.

    Args:
        loader: A ``DataLoader``, or anything else that can be iterated again and again.
        convert: What becomes of each tensor.
        rank: Number of this process.
        size: Number of processes that share a batch; a loader with a ``DistributedSampler``
            shares it out itself.
        seed: Seed of the random streams that take the place of torch's global one.

    Raises:
        ValueError: If it is no such loader, or gives no batch of tensors.
    """

    def __init__(self, loader: Any, convert: Callable[[Tensor], Tensor], rank: int, size: int,
                 seed: int) -> None:
        self.loader, self.convert, self.seed = checked_loader(loader), convert, seed
        self.num_rows = number_of_rows(loader)
        self.random = OwnRandom(loader, seed)
        self.row = self.num_read = 0  # rows handed out; rows read
        self.pending: list[Tensor] = []  # rows of the last batch read, not handed out yet
        self.supplied: tuple[int, list[Tensor]] = (0, [])  # rows handed out last, and which
        self.kind: Kind | None = None
        self.starts: list[_EpochStart] = []
        self._begin(0)
        self._fill()
        assert self.kind is not None
        self.names: tuple[str, ...] | None = self.kind[0]
        self.num_together: int = len(self.pending[0])  # rows that this process reads a step
        shared = 1 if isinstance(_sampler(loader), DistributedSampler) else size
        self.num_own: int = share_of(self.num_together, shared)
        self.batch_size: int = self.num_own * size
        self.place: int = (rank % shared) * self.num_own
        self.example: list[Tensor] = [self._own(rows.unsqueeze(0))[0] for rows in self.pending]

    def take(self, step: int, count: int) -> list[Tensor]:
        """Rows ``(count, num_own, *shape)`` of so many steps, from the next or one taken last."""
        self._go_back(step * self.num_together)
        num_rows, filled = count * self.num_together, 0
        taken = [rows.new_empty(num_rows, *rows.shape[1:]) for rows in self.pending]
        while filled < num_rows:
            self._fill()
            num = min(num_rows - filled, len(self.pending[0]))
            for block, rows in zip(taken, self.pending, strict=True):
                block[filled:filled + num] = rows[:num]
            self.pending, filled = [rows[num:] for rows in self.pending], filled + num
        self.supplied, self.row = (self.row, taken), self.row + num_rows
        self._fill()  # which finds out whether the epoch is over
        while len(self.starts) > 1 and self.starts[1].row <= self.supplied[0]:
            del self.starts[0]
        return [self._own(rows.view(count, -1, *rows.shape[1:])) for rows in taken]

    def epoch(self, step: int) -> int:
        """Number of epochs that end at a step or before."""
        return self._start(step).epoch

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where the rows are at one of the steps taken last: an epoch's start, and how far in."""
        start, row = self._start(step), step * self.num_together
        return {"seed": self.seed, "epoch": start.epoch, "epoch_row": start.row, "row": row,
                "random": start.random}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Begin the epoch of a snapshot once more, and read as far."""
        self.seed, self.row = snapshot["seed"], snapshot["row"]
        self.num_read, self.pending = snapshot["epoch_row"], []
        self.random.states, self.starts = list(snapshot["random"]), []
        self._begin(snapshot["epoch"])
        while self.num_read < self.row:
            self.pending = []
            self._fill()
        unused = self.num_read - self.row
        self.pending = [rows[len(rows) - unused:] for rows in self.pending]
        self._fill()
        self.supplied = (self.row, [rows[:0] for rows in self.pending])

    def some(self, num_rows: int, total: int | None = None) -> list[Tensor]:
        """Rows at random; of a loader with an order of its own, by reading all, and counting."""
        seed = mixed_seed(self.seed, 0)
        order = torch.Generator().manual_seed(seed)
        batches = self._beside(seed, lambda rows: RandomSampler(rows, generator=order))
        if not isinstance(_sampler(self.loader), (*ALL_ROWS, SubsetRandomSampler)):
            return sampled_rows(counted(batches, total), num_rows, order)
        return [rows[:num_rows] for rows in next(regrouped(batches, num_rows))]

    def all(self, batch_size: int) -> Iterator[list[Tensor]]:
        """All rows once, so many at a time; in their order in the dataset if that is random."""
        return regrouped(self._beside(mixed_seed(self.seed, 1), SequentialSampler), batch_size)

    def opening(self) -> list[Tensor] | None:
        """Rows from all over the dataset; None if the loader's order is its own."""
        if not isinstance(_sampler(self.loader), ALL_ROWS):
            return None
        rows = self._beside(0, lambda dataset: spread(len(dataset), self.batch_size).tolist())
        return next(regrouped(rows, self.batch_size))

    def _beside(self, seed: int, order: Callable[[Any], Any]) -> Iterator[list[Tensor]]:
        """One epoch beside the stream: random states, workers and order are its own."""
        loader, sampler = self.loader, _sampler(self.loader)
        if isinstance(loader, DataLoader):
            loader = _other_loader(loader, order(loader.dataset) if isinstance(
                sampler, ALL_ROWS) else sampler)
        batches = _Batches(loader, OwnRandom(loader, seed), 0)
        while (batch := batches.next(self.kind)) is not None:
            yield [self.convert(rows) for rows in batch[1]]

    def _begin(self, epoch: int) -> None:
        sampler = _sampler(self.loader)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        self.starts.append(_EpochStart(epoch, self.num_read, self.random.states))
        self.batches = _Batches(self.loader, self.random, epoch)

    def _fill(self) -> None:
        """Read until there are rows to hand out."""
        while not (self.pending and len(self.pending[0])):
            batch = self.batches.next(self.kind)
            if batch is not None:
                self.kind = self.kind or batch[0]
                self.pending = [self.convert(rows) for rows in batch[1]]
                self.num_read += len(self.pending[0])
                continue
            start = self.starts[-1]
            if self.num_read == start.row:
                raise ValueError(f"{WANTED} to give batches, got none in epoch {start.epoch + 1}." +
                                 (" It must be one that can be iterated again and again."
                                  if start.epoch else ""))
            self._begin(start.epoch + 1)

    def _go_back(self, row: int) -> None:
        """Make rows pending again, from one of those handed out last."""
        first, taken = self.supplied
        assert first <= row <= self.row, "only the last steps can be taken again"
        if row < self.row:
            unused = slice(row - first, self.row - first)
            self.pending = [torch.cat([block[unused], rows]) for block, rows in
                            zip(taken, self.pending, strict=True)]
            self.row = row

    def _start(self, step: int) -> _EpochStart:
        """Start of the epoch that a step's rows begin in."""
        row = step * self.num_together
        return next(start for start in reversed(self.starts) if start.row <= row)

    def _own(self, rows: Tensor) -> Tensor:
        """This process's part of batches ``(count, num_together, *shape)``."""
        return rows[:, self.place:self.place + self.num_own].contiguous()


@dataclass(frozen=True)
class _EpochStart:
    """Where an epoch began.

    Attributes:
        epoch: Its number.
        row: Number of rows read before.
        random: Random states at that point.
    """

    epoch: int
    row: int
    random: list[Tensor]


class OwnRandom:
    """Random states of a loader's own, which take the place of the outer ones while it is read.

    Args:
        loader: The loader; generators it was given begin as they are.
        seed: Seed in place of torch's global random state.

    Attributes:
        states: State of torch's global generator, and of each of the loader's.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        batch_sampler, sampler = getattr(loader, "batch_sampler", None), _sampler(loader)
        owners = loader, batch_sampler, sampler, getattr(loader, "sampler", None)
        found = [getattr(owner, "generator", None) for owner in owners]
        given = {id(one): one for one in found if isinstance(one, torch.Generator)}
        self.generators = [torch.default_generator, *given.values()]
        first = torch.Generator().manual_seed(seed)
        self.states = [first.get_state(), *(one.get_state() for one in given.values())]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Read inside."""
        outer = [generator.get_state() for generator in self.generators]
        self._set(self.states)
        try:
            yield
        finally:
            self.states = [generator.get_state() for generator in self.generators]
            self._set(outer)

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


class _Batches:
    """The batches of one epoch, checked.

    Args:
        loader: The loader.
        random: Random states in which to read it.
        epoch: Number of the epoch, for messages.
    """

    def __init__(self, loader: Iterable, random: OwnRandom, epoch: int) -> None:
        self.loader, self.random, self.epoch, self.number = loader, random, epoch, 0
        self.iterator: Iterator | None = None

    def next(self, kind: Kind | None) -> tuple[Kind, list[Tensor]] | None:
        """The next batch, of a kind if that is known; None if there are no more.

        Raises:
            ValueError: If it is no batch, or one of another kind.
            RuntimeError: If reading it raised an error.
        """
        self.number += 1
        where = f"batch {self.number} of epoch {self.epoch + 1}"
        try:
            with self.random():
                if self.iterator is None:
                    self.iterator = iter(self.loader)
                batch = next(self.iterator)
        except StopIteration:
            return None
        except Exception as error:
            raise RuntimeError(f"NFVI: `loader` raised {type_name(error)} at {where}: "
                               f"{error}") from error
        names, parts = _parts(batch, where)
        now = names, tuple((part.shape[1:], part.dtype) for part in parts)
        if kind is not None and now != kind:
            raise ValueError(f"{WANTED} to give batches that differ in their number of rows only, "
                             f"got {_shown(now)} in {where} after {_shown(kind)}.")
        return now, parts


def checked_loader(loader: Any) -> Any:
    """The loader, with its last, partial batches.

    Raises:
        ValueError: If it cannot be iterated again and again.
    """
    if isinstance(loader, (Tensor, np.ndarray)):
        raise ValueError(f"{WANTED} to give batches, got {type_name(loader)}. Wrap it: "
                         "ArrayLoader(x, batch_size=512).")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(f"{WANTED} to give batches, got {type_name(loader)}, which gives rows. "
                         "Wrap it: DataLoader(dataset, batch_size=512, shuffle=True).")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ValueError(f"{WANTED} to be an ArrayLoader, a DataLoader or another iterable of "
                         f"batches, got {type_name(loader)}.")
    if isinstance(loader, Iterator):
        raise ValueError(f"{WANTED} to be one that can be iterated again and again, got "
                         f"{type_name(loader)}, which is exhausted after one epoch. Wrap it in a "
                         "class whose __iter__ begins anew, or pass a list of its batches.")
    if (name := _replacing(loader)) is not None:
        raise ValueError(f"{WANTED} to give each row once an epoch, got one whose {name} draws "
                         "with replacement. Take DataLoader(dataset, batch_size=512, "
                         "shuffle=True), and weigh rows in the model: poutine.scale.")
    if isinstance(loader, DataLoader) and (loader.drop_last or getattr(
            loader.batch_sampler, "drop_last", False)):  # streams need no full batches
        return _other_loader(loader, _sampler(loader))
    return loader


def _replacing(loader: Any) -> str | None:
    """Type of a sampler that gives rows more than once, unless passes over all leave it out."""
    sampler = _sampler(loader)
    left_out = isinstance(sampler, ALL_ROWS) and type(loader.batch_sampler) is BatchSampler
    samplers = getattr(loader, "sampler", None) if sampler is None else sampler,
    return next((type_name(one) for one in samplers
                 if getattr(one, "replacement", False) and not left_out), None)


def number_of_rows(loader: Any) -> int | None:
    """Number of rows that a loader draws from; None if it is not known."""
    sampler = _sampler(loader)
    try:
        if isinstance(sampler, ALL_ROWS):
            return len(loader.dataset)
    except TypeError:  # a dataset without a length
        return None
    return len(sampler) if isinstance(sampler, SubsetRandomSampler) else None


def regrouped(batches: Iterable[list[Tensor]], batch_size: int) -> Iterator[list[Tensor]]:
    """The same rows in batches of another size, of which the last may be smaller."""
    held: list[Sequence[Tensor]] = []  # batches
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch[0])
        if count > batch_size:
            joined = [torch.cat(rows) for rows in zip(*held, strict=True)]
            *full, rest = zip(*(rows.split(batch_size) for rows in joined), strict=True)
            yield from map(list, full)
            held, count = [rest], len(rest[0])
    if count:
        yield [torch.cat(rows) for rows in zip(*held, strict=True)]


def counted(batches: Iterable[list[Tensor]], num_rows: int | None) -> Iterator[list[Tensor]]:
    """The same batches, which must have so many rows together. Default: any number.

    Raises:
        ValueError: If they have fewer, or as soon as they have more: some loaders never end.
    """
    seen = 0
    for batch in batches:
        seen += len(batch[0])
        if num_rows is not None and seen > num_rows:
            raise ValueError(f"{WANTED} to give all {num_rows} rows once, as the model says, got "
                             "more. Its workers must share the rows, and an epoch must end.")
        yield batch
    if num_rows is not None and seen < num_rows:
        raise ValueError(f"{WANTED} to give all {num_rows} rows once, as the model says, got "
                         f"{seen}.")


def spread(num_rows: int, count: int) -> Tensor:
    """So many row numbers, from the first to the last."""
    return torch.linspace(0, num_rows - 1, min(count, num_rows), dtype=torch.float64).long()


def sampled_rows(batches: Iterable[list[Tensor]], num_rows: int, random: torch.Generator
                 ) -> list[Tensor]:
    """So many of all rows, each as likely as another: those of the smallest random keys.

    References:
        Vitter (1985), Random sampling with a reservoir.
    """
    held: list[list[Tensor]] = []  # batches, with a key for each row
    count = 0
    for batch in batches:
        held.append([*batch, torch.rand(len(batch[0]), generator=random, dtype=torch.float64)])
        count += len(batch[0])
        if count > 2 * num_rows:
            held = [_smallest(held, num_rows)]
            count = num_rows
    return _smallest(held, num_rows)[:-1]


def _smallest(held: list[list[Tensor]], num_rows: int) -> list[Tensor]:
    joined = [torch.cat(rows) for rows in zip(*held, strict=True)]
    chosen = joined[-1].argsort()[:num_rows]
    return [rows[chosen.to(rows.device)] for rows in joined]


def share_of(batch_size: int, size: int) -> int:
    """Number of a batch's rows that each process reads.

    Raises:
        ValueError: If it cannot be shared evenly.
    """
    if batch_size % size:
        raise ValueError(f"{WANTED} to have a batch size divisible by the {size} processes that "
                         f"share a batch, got {batch_size}. Take "
                         f"{max(1, round(batch_size / size)) * size}.")
    return batch_size // size


def _sampler(loader: Any) -> Any:
    """What a DataLoader takes single rows from, if it is one and it batches them itself."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", None)


def _other_loader(loader: DataLoader, sampler: Any) -> DataLoader:
    """A copy of a loader with another order, its last batch, and workers of its own."""
    other = copy.copy(loader)
    given: dict[str, Any] = {"_iterator": None, "drop_last": False}
    batches = loader.batch_sampler
    if not isinstance(loader.dataset, IterableDataset) and type(batches) is BatchSampler:
        given |= {"sampler": sampler,
                  "batch_sampler": BatchSampler(sampler, batches.batch_size, False)}
    other.__dict__.update(given)
    return other


def _parts(batch: Any, where: str) -> tuple[tuple[str, ...] | None, list[Tensor]]:
    """Names, if there are any, and tensors of a batch."""
    names = tuple(batch) if isinstance(batch, Mapping) else None
    parts = [batch] if isinstance(batch, Tensor) else list(batch.values()) \
        if isinstance(batch, Mapping) else list(batch) if isinstance(batch, (tuple, list)) else []
    bad = [part for part in parts if not isinstance(part, Tensor)]
    if bad or not parts:
        got = type_name(batch) if not bad else f"{type_name(bad[0])} inside {type_name(batch)}"
        raise ValueError(f"{WANTED} to give batches that are tensors, or tuples, lists or dicts of "
                         f"them, got {got} in {where}. Convert it: torch.as_tensor.")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(f"{WANTED} to give dicts by the names of the model's arguments, got "
                         f"{names!r} in {where}.")
    rows = {len(part) if part.dim() else 0 for part in parts}
    if len(rows) > 1 or not all(part.dim() for part in parts):
        raise ValueError(f"{WANTED} to give tensors of as many rows each, got shapes "
                         f"{', '.join(str(tuple(part.shape)) for part in parts)} in {where}.")
    return names, parts


def _shown(kind: Kind) -> str:
    names, parts = kind
    shown = [f"(num_rows{''.join(f', {size}' for size in shape)}) of {dtype}"
             for shape, dtype in parts]
    return ", ".join(f"{name} {part}" for name, part in zip(names, shown, strict=True)) \
        if names else ", ".join(shown)
