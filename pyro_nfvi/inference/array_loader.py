"""Minibatches of arrays, in memory or mapped from files larger than memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_int, type_name

BLOCK_BYTES = 2 ** 17  # of rows that stay together: what an operating system reads at once
BUFFER_BYTES = 2 ** 27  # of blocks that are shuffled with each other
FITS = 0.5  # of the memory that mapped files may take for random access to be fast
WIDER = {"u2": "i4", "u4": "i8"}  # unsigned integers that torch hardly computes with


class ArrayLoader:
    r"""Minibatches of rows of arrays, which are never copied or converted as a whole.

    A batch is a tuple with the same rows of each array. It serves :class:`~pyro_nfvi.NFVI` and a
    plain loop of Pyro's SVI alike, as a ``DataLoader(TensorDataset(...))`` does, but gathers the
    rows of many batches at once.

    Every row is seen once an epoch and is equally likely at each place of the order. That is a
    permutation of all rows, unless the arrays are mapped from files too large for the memory:
    there, blocks of consecutive rows are read in random order, a thousand at a time, and their
    rows shuffled with each other; where an array begins is random too. In data that are sorted,
    rows of one batch are then alike, as if it had only as many rows as there are blocks at a
    time: shuffle such a file once, or set ``block_size=1`` and wait for the disk.

    Args:
        arrays: Tensors, NumPy arrays or memory-mapped arrays (``np.load(..., mmap_mode="r")``),
            of as many rows each.
        batch_size: Number of rows of a batch.
        shuffle: Whether each epoch has a random order of its own, or that of the arrays.
        block_size: Number of consecutive rows that are read together. Default: 1, but 128 KB if
            the arrays are mapped from files larger than half the memory.

    Raises:
        ValueError: If there is no array, one is of another kind or number of rows or masks some
            numbers, or there is no row.

    Attributes:
        num_rows: Number of rows.

    Example:
        >>> loader = ArrayLoader(np.ones((10, 3)), torch.arange(10), batch_size=4)
        >>> [tuple(x.shape) for x, y in loader], len(loader)
        ([(4, 3), (4, 3), (2, 3)], 3)
    """

    def __init__(self, *arrays: Any, batch_size: int, shuffle: bool = True,
                 block_size: int | None = None) -> None:
        self.columns = [_Column(i, array) for i, array in enumerate(arrays)]
        self.num_rows = _num_rows(self.columns)
        self.batch_size = check_positive_int("ArrayLoader", "batch_size", batch_size)
        if not isinstance(shuffle, bool):
            raise ValueError(f"ArrayLoader expected `shuffle` to be True or False, got "
                             f"{shuffle!r}.")
        self.shuffle = shuffle
        self.row_bytes = max(1, *(column.row_bytes for column in self.columns))
        self.block_size = self._block_size() if block_size is None else \
            check_positive_int("ArrayLoader", "block_size", block_size)

    def __len__(self) -> int:
        """Number of batches of an epoch, with that of the last rows."""
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of one epoch, in an order drawn from torch's random state."""
        order = self.order(int(torch.randint(2 ** 62, ()))) if self.shuffle else None
        for start in range(0, self.num_rows, self.batch_size):
            stop = min(start + self.batch_size, self.num_rows)
            yield tuple(self.between(start, stop) if order is None else
                        self.gather(order(start, stop)))

    def __repr__(self) -> str:
        return (f"ArrayLoader({len(self.columns)} x {self.num_rows:,} rows, "
                f"batch_size={self.batch_size}, shuffle={self.shuffle})")

    def order(self, seed: int, shuffle: bool = True) -> RowOrder:
        """Order of the rows of endless epochs."""
        buffer_size = max(1, BUFFER_BYTES // self.row_bytes)
        return RowOrder(self.num_rows, seed, shuffle, self.block_size, buffer_size)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """New tensors with these rows of each array."""
        return [column.gather(rows) for column in self.columns]

    def between(self, start: int, stop: int) -> list[Tensor]:
        """New tensors with the rows from ``start`` to before ``stop`` of each array."""
        return [column.between(start, stop) for column in self.columns]

    def _block_size(self) -> int:
        mapped = sum(column.num_bytes for column in self.columns if column.is_mapped)
        return 1 if mapped <= FITS * _physical_memory() else max(1, BLOCK_BYTES // self.row_bytes)


class RowOrder:
    """Which row stands where in the order of endless epochs, of which each has all rows once.

    It can be asked for any place, so what was asked before changes nothing.

    Args:
        num_rows: Number of rows.
        seed: Seed of the order.
        shuffle: Whether each epoch has an order of its own.
        block_size: Number of consecutive rows that stay together until blocks are mixed.
        buffer_size: Number of rows whose blocks are mixed with each other.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True, block_size: int = 1,
                 buffer_size: int = 1) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self.block_size = min(block_size, num_rows)
        self.num_mixed = max(1, buffer_size // self.block_size)  # blocks
        self.dtype = torch.int32 if num_rows < 2 ** 31 else torch.int64
        self._held: dict[tuple[int, ...], Tensor] = {}  # the last two permutations of a kind

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows at the places from ``start`` to before ``stop``, counted over all epochs."""
        parts = [torch.empty(0, dtype=self.dtype)]
        while start < stop:
            epoch, place = divmod(start, self.num_rows)
            parts.append(self._within(epoch, place, min(self.num_rows, place + stop - start)))
            start += len(parts[-1])
        return parts[1] if len(parts) == 2 else torch.cat(parts)

    def _within(self, epoch: int, place: int, end: int) -> Tensor:
        """Rows at places of one epoch, from the first of them on; perhaps not all."""
        if not self.shuffle:
            return torch.arange(place, end, dtype=self.dtype)
        if self.block_size == 1:
            return self._permutation(self.num_rows, epoch)[place:end]
        blocks, ends = self._blocks(epoch)
        number = int(torch.searchsorted(ends, place, right=True))
        first = int(ends[number - 1]) if number else 0
        return self._mixed(epoch, number, blocks)[place - first:end - first]

    def _blocks(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order of the blocks of an epoch, and where those mixed with each other end."""
        count = -(-self.num_rows // self.block_size)
        blocks = self._permutation(count, epoch)
        sizes = (self.num_rows - blocks.long() * self.block_size).clamp(max=self.block_size)
        ends = sizes.cumsum(0)
        return blocks, torch.cat([ends[self.num_mixed - 1:-1:self.num_mixed], ends[-1:]])

    def _mixed(self, epoch: int, number: int, blocks: Tensor) -> Tensor:
        """Rows of the blocks that are mixed with each other, in their order."""
        def rows() -> Tensor:
            some = blocks[number * self.num_mixed:(number + 1) * self.num_mixed].long()
            places = (some.unsqueeze(-1) * self.block_size + torch.arange(self.block_size)).view(-1)
            places = places[places < self.num_rows]
            # Where blocks begin is random, so that all rows are alike, those of the last too.
            shift = int(torch.randint(self.num_rows, (), generator=self._generator(epoch, 0)))
            order = torch.randperm(len(places), generator=self._generator(epoch, 1, number))
            return ((places + shift) % self.num_rows)[order].to(self.dtype)
        return self._hold((1, epoch, number), rows)

    def _permutation(self, count: int, epoch: int) -> Tensor:
        return self._hold((0, epoch), lambda: torch.randperm(
            count, dtype=self.dtype, generator=self._generator(epoch)))

    def _hold(self, key: tuple[int, ...], make: Any) -> Tensor:
        """What was made for a key, unless two others of its kind came later."""
        if key not in self._held:
            kept = [other for other in self._held if other[0] == key[0]][-1:]
            self._held = {other: value for other, value in self._held.items()
                          if other in kept or other[0] != key[0]}
            self._held[key] = make()
        return self._held[key]

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, *numbers))


def mixed_seed(*numbers: int) -> int:
    """A seed for each sequence of numbers."""
    numbers = len(numbers), *numbers  # as zeros at the end change nothing
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class _Column:
    """One array, of which rows are read as tensors.

    Args:
        number: Its place among the arrays, for messages.
        array: The array.
    """

    def __init__(self, number: int, array: Any) -> None:
        self.name = f"arrays[{number}]"
        if not isinstance(array, (Tensor, np.ndarray)):
            hint = f" Convert it: {'.to_numpy()' if hasattr(array, 'to_numpy') else 'np.asarray'}."
            raise ValueError(f"ArrayLoader expected `{self.name}` to be a tensor or a NumPy array, "
                             f"got {type_name(array)}.{hint}")
        if np.ma.is_masked(array):
            raise ValueError(f"ArrayLoader expected `{self.name}` without a mask, got "
                             f"{np.ma.count_masked(array)} masked numbers. Fill them with "
                             ".filled(0.0), and pass the mask as an array, for poutine.mask.")
        self.is_mapped = _is_mapped(array)
        self.array = _host_array(self.name, array)
        if not self.array.ndim:
            raise ValueError(f"ArrayLoader expected `{self.name}` of shape (num_rows, ...), got a "
                             "single number.")
        self.dtype = None if isinstance(self.array, Tensor) else _native(self.name, self.array)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.array)

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return int(self.array.nbytes)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.num_bytes // max(1, self.num_rows)

    @property
    def on_host(self) -> bool:
        """Whether the CPU reads it."""
        return not isinstance(self.array, Tensor) or self.array.device.type == "cpu"

    def gather(self, rows: Tensor) -> Tensor:
        """A new tensor with these rows."""
        if isinstance(self.array, Tensor):
            return self.array.index_select(0, rows.to(self.array.device))
        places = rows.numpy()  # take would copy an array that has gaps
        whole = self.array.flags.c_contiguous
        return self._tensor(self.array.take(places, 0) if whole else self.array[places])

    def between(self, start: int, stop: int) -> Tensor:
        """A new tensor with consecutive rows."""
        part = self.array[start:stop]
        return part.clone() if isinstance(part, Tensor) else self._tensor(part.copy())

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(self.dtype, copy=False))


def _host_array(name: str, array: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """The same memory as an array, if NumPy knows its type and the CPU its place."""
    if not isinstance(array, Tensor):
        return np.asarray(array)  # of a memory-mapped array's memory, without its class
    if array.layout is not torch.strided:
        raise ValueError(f"ArrayLoader expected `{name}` to be a dense tensor, got {array.layout}. "
                         "Convert it: .to_dense().")
    array = array.detach()
    try:
        return array.numpy()
    except (TypeError, RuntimeError):  # on a GPU, or of a type such as bfloat16
        return array


def _native(name: str, array: np.ndarray) -> np.dtype:
    """The type that torch has for the numbers of an array.

    Raises:
        ValueError: If there is none.
    """
    dtype = np.dtype(WIDER.get(array.dtype.str[1:], array.dtype.newbyteorder("=")))
    try:
        if dtype != np.uint64:
            torch.from_numpy(np.empty(0, dtype))
            return dtype
    except TypeError:
        pass
    raise ValueError(f"ArrayLoader expected `{name}` to hold numbers of a type that torch computes "
                     f"with, got {array.dtype}. Convert it: .astype(np.float64).")


def _is_mapped(array: Any) -> bool:
    """Whether an array, or what it is a view of, is mapped from a file."""
    while array is not None and not isinstance(array, (np.memmap, mmap.mmap)):
        array = getattr(array, "base", None)
    return array is not None


def _num_rows(columns: list[_Column]) -> int:
    if not columns:
        raise ValueError("ArrayLoader expected one array or more, got none.")
    for column in columns:
        if column.num_rows != columns[0].num_rows:
            raise ValueError(f"ArrayLoader expected `{column.name}` to have as many rows as "
                             f"`arrays[0]`, {columns[0].num_rows}, got {column.num_rows}.")
    if not columns[0].num_rows:
        raise ValueError("ArrayLoader expected one row or more, got none.")
    return columns[0].num_rows


def _physical_memory() -> float:
    """Memory of the machine in bytes; infinite if it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # pragma: no cover - not a Unix
        return float("inf")
