"""Fits that several processes share: ``torchrun --nproc-per-node=4 script.py``."""

from __future__ import annotations

import atexit
import builtins
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_nfvi._shapes import type_name
from pyro_nfvi.inference.signals import deferred_signals, outer_signals

LIMIT = 300.0  # seconds without an answer after which a process counts as lost
BEAT = 0.5  # seconds between two signs of life of the process for which the others wait
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


class LostProcess(RuntimeError):
    """A process of a distributed fit has died, or hangs.

    Example:
        >>> try:
        ...     raise LostProcess("NFVI: process 2 of 4 has died.")
        ... except RuntimeError as error:
        ...     print(error)
        NFVI: process 2 of 4 has died.
    """


class DistributedTeam:
    """The processes that share one fit, connected by ``torch.distributed``.

    All of them call the same methods in the same order. If one has died, the others raise
    :class:`LostProcess` at once; if one hangs, within the time limit: 300 s, unless the script has
    called ``torch.distributed.init_process_group`` itself, whose limit then holds. They trust each
    other: what they say is pickled.

    Args:
        owner: Who asks, for error messages.
        rank: Number of this process, from 0.
        size: How many there are.
        limit: Seconds without an answer after which CUDA kernels are no longer waited for.

    Raises:
        LostProcess: By each method, if a process does not answer.

    Example:
        >>> DistributedTeam.of("NFVI", "auto") is None  # torchrun has not started this one
        True
    """

    _group: ClassVar[Any] = None  # what was made here, and is destroyed at exit

    def __init__(self, owner: str, rank: int, size: int, limit: float = math.inf) -> None:
        self.owner, self.rank, self.size, self.limit = owner, rank, size, limit

    @classmethod
    def of(cls, owner: str, distributed: Any, device: torch.device | str | None = None
           ) -> DistributedTeam | None:
        """The team this process is in, or None if it is alone.

        Args:
            owner: Who asks.
            distributed: None to be alone, or ``"auto"``: all processes that ``torch.distributed``
                connects; if it connects none yet, those that torchrun has started.
            device: Where the fit runs. Of the processes that ``"cuda"`` is given to, each takes
                a GPU of its own, by ``LOCAL_RANK``, if torchrun has started them.

        Raises:
            ValueError: If ``distributed`` is anything else, half of torchrun's environment is
                missing, or the script has chosen a backend that has no CPU tensors.
        """
        if check_distributed(owner, distributed) is None:
            return None
        if not dist.is_available():
            return None
        if not dist.is_initialized():
            if _launched(owner) < 2:
                return None
            cls._join(owner)
        return cls._member(owner, device)

    @classmethod
    def _join(cls, owner: str) -> None:
        begin = time.monotonic()
        try:
            dist.init_process_group(_backend(), timeout=timedelta(seconds=LIMIT))
        except RuntimeError as error:
            raise LostProcess(
                f"{owner}: process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find "
                f"the others (waited {time.monotonic() - begin:.1f} s).") from error
        cls._group = dist.group.WORLD
        atexit.register(cls._leave)

    @classmethod
    def _leave(cls) -> None:
        if cls._group is not None and dist.is_initialized() and dist.group.WORLD is cls._group:
            dist.destroy_process_group()

    @classmethod
    def _member(cls, owner: str, device: torch.device | str | None) -> DistributedTeam | None:
        own = dist.group.WORLD is cls._group
        if dist.get_world_size() < 2:
            return None
        if "cpu:" not in dist.get_backend_config():
            raise ValueError(f"{owner} expected a backend of torch.distributed that has CPU "
                             f"tensors, got {dist.get_backend()!r}. Take both: "
                             "init_process_group('cpu:gloo,cuda:nccl').")
        if own and device is not None and torch.device(device) == torch.device("cuda"):
            place = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
            torch.cuda.set_device(place % max(1, torch.cuda.device_count()))
        return cls(owner, dist.get_rank(), dist.get_world_size(), LIMIT if own else math.inf)

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all: it shows bars and writes files."""
        return self.rank == 0

    # ------------------------------------------------------------------ tensors and numbers

    def sum_(self, flat: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place.

        All of them get the same bits. NCCL promises that; Gloo adds each piece up at one process,
        from which the others copy it. The order of the terms, and so the rounding, depends on the
        number of processes.

        Args:
            flat: A contiguous tensor, of the same shape and type in all processes.
        """
        with self._answers():
            self._finish(dist.all_reduce(flat, async_op=True), flat)
        return flat

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The largest of each number, none of which is nan: a flag, if one process raises it."""
        largest = torch.tensor([float(number) for number in numbers], dtype=torch.float64,
                               device="cpu")
        with self._answers():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def first(self, text: str) -> str:
        """The first text, by rank, that is not empty."""
        nearest = -int(self.agree([-self.rank if text else -self.size])[0])
        return "" if nearest == self.size else self._bytes(text.encode(), nearest).decode()

    # ------------------------------------------------------------------ objects

    def share(self, value: Any) -> Any:
        """The leader's value, in all processes.

        Tensors inside dicts, lists and tuples travel as they are, and arrive detached, those of a
        GPU on the GPU of each process; all else is pickled.

        Args:
            value: What the leader has; of other processes it is ignored.
        """
        if not self.leads:
            return self._receive()
        self._send(_packed(value))
        return value

    def lead(self, function: Callable[[], Any]) -> Any:
        """What a function returns, or raises, that only the leader calls.

        The others wait as long as the leader lives, without work. They raise errors of Python's
        own types as they are, others as the nearest of these. Ctrl-C at one process is raised at
        all of them: at the leader it ends the function, at others it waits until the end.

        Args:
            function: What to call; its result is shared as by :meth:`share`.
        """
        fresh = outer_signals() is None  # else it is for others to hear the signals
        outcome = self._work(function) if self.leads else _Outcome()
        with deferred_signals() as signals:
            if self.leads:
                self._tell(working=False)
                self._send(outcome.packet)
            else:
                while self._tell():
                    pass
                outcome = _Outcome.told(self._receive())
            asked, = self.agree([bool(fresh and signals.requested)])
        if outcome.error is not None:
            raise outcome.error
        if asked:
            raise KeyboardInterrupt
        return outcome.value

    def _work(self, function: Callable[[], Any]) -> _Outcome:
        with _SignsOfLife(self):
            try:
                value = function()
                return _Outcome(value, packet=_packed((None, value)))
            except BaseException as error:
                return _Outcome(error=error, packet=_packed((_portable(error), None)))

    # ------------------------------------------------------------------ messages

    def _tell(self, working: bool = True) -> bool:
        """What the leader says of itself."""
        return bool(self._sent(torch.tensor([working], dtype=torch.uint8, device="cpu")).item())

    def _send(self, packet: _Packet) -> None:
        self._bytes(packet.outline)
        for tensor in packet.tensors:
            self._sent(tensor)

    def _receive(self) -> Any:
        def filled(leaf: Any) -> Any:
            return leaf.shaped(self._sent(leaf.memory())) if isinstance(leaf, _Outline) else leaf
        return tree_map(filled, pickle.loads(self._bytes(b"")))

    def _bytes(self, data: bytes, source: int = 0) -> bytes:
        size = self._sent(torch.tensor([len(data)], device="cpu"), source)
        content = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        if self.rank == source:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self._sent(content, source).numpy().tobytes()

    def _sent(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of one process, in place."""
        if tensor.numel():
            with self._answers():
                self._finish(dist.broadcast(tensor, source, async_op=True), tensor)
        return tensor

    def _finish(self, work: Any, tensor: Tensor) -> None:
        """Wait; for a GPU within the limit, as kernels would wait for a dead process forever."""
        end = time.monotonic() + self.limit
        while tensor.is_cuda and not work.is_completed():
            if time.monotonic() > end:
                raise RuntimeError("a CUDA kernel waits for another process")
        work.wait()

    @contextmanager
    def _answers(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            who = f" (rank {1 - self.rank})" if self.size == 2 else ""
            raise LostProcess(
                f"{self.owner}: a process of the distributed fit{who} has died or does not answer "
                f"(waited {time.monotonic() - begin:.1f} s); start again with the same command."
            ) from error


class _SignsOfLife:
    """A thread of the leader that tells the others, while it works, that it does.

    Args:
        team: The processes.
    """

    def __init__(self, team: DistributedTeam) -> None:
        self.team, self.done = team, threading.Event()
        self.lost: LostProcess | None = None
        self.thread = threading.Thread(target=self._tell, daemon=True)

    def _tell(self) -> None:
        while not self.done.wait(BEAT):
            try:
                self.team._tell()
            except LostProcess as error:
                self.lost = error
                return

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        if self.lost is not None:
            raise self.lost


# ---------------------------------------------------------------------- what travels

@dataclass(frozen=True)
class _Outline:
    """A tensor without its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: str

    def memory(self) -> Tensor:
        """Bytes, to be filled."""
        return torch.empty(self.shape.numel() * self.dtype.itemsize, dtype=torch.uint8,
                           device=self.device)

    def shaped(self, memory: Tensor) -> Tensor:
        """The tensor whose bytes these are."""
        return memory.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class _Packet:
    """A value, its tensors apart."""

    outline: bytes = b""
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    """What a function returned or raised."""

    value: Any = None
    error: BaseException | None = None
    packet: _Packet = _Packet()

    @classmethod
    def told(cls, message: tuple[tuple[str, tuple] | None, Any]) -> _Outcome:
        """That of the leader."""
        raised, value = message
        if raised is None:
            return cls(value)
        return cls(error=getattr(builtins, raised[0])(*raised[1]))


def _packed(value: Any) -> _Packet:
    outline = tree_map(lambda leaf: _Outline(leaf.shape, leaf.dtype, leaf.device.type)
                       if _travels(leaf) else leaf, value)
    tensors = [leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
               for leaf in tree_leaves(value) if _travels(leaf)]
    return _Packet(pickle.dumps(outline), tuple(t.view(torch.uint8) for t in tensors))


def _travels(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided \
        and leaf.device.type in ("cpu", "cuda")


def _portable(error: BaseException) -> tuple[str, tuple]:
    """The nearest type of Python's own, and its arguments: numbers and texts."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    plain = all(isinstance(arg, (str, int, float, type(None))) for arg in error.args)
    args = error.args if plain and kind is type(error) else (str(error) or type_name(error),)
    try:
        kind(*args)
    except TypeError:  # one that wants more, as UnicodeDecodeError does
        return "RuntimeError", (f"{type_name(error)}: {error}",)
    return kind.__name__, args


# ---------------------------------------------------------------------- torchrun

def check_distributed(owner: str, distributed: Any) -> str | None:
    """Return ``distributed`` if it is None or ``"auto"``.

    Raises:
        ValueError: If it is anything else.
    """
    if distributed is not None and not (isinstance(distributed, str) and distributed == "auto"):
        raise ValueError(f"{owner} expected `distributed` to be None or 'auto', got "
                         f"{distributed!r}. Several processes share a fit by 'auto' and "
                         "torchrun --nproc-per-node=4 script.py.")
    return distributed


def _launched(owner: str) -> int:
    """How many processes torchrun, or who speaks as it does, has started."""
    text = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in LAUNCHED if name not in os.environ]
    if text == "1":
        return 1
    if missing or not text.isdecimal():
        wrong = f"no {missing[0]}" if missing else f"WORLD_SIZE={text!r}"
        raise ValueError(f"{owner}(distributed='auto') expected all that torchrun sets in the "
                         f"environment, or nothing, got {wrong}. Start with torchrun "
                         "--nproc-per-node=4 script.py, or pass distributed=None.")
    return int(text)


def _backend() -> str:
    """Gloo for CPU tensors; NCCL for CUDA tensors, unless processes share a GPU."""
    if not torch.cuda.is_available():
        return "cpu:gloo"
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
    return "cpu:gloo,cuda:gloo" if shared or not dist.is_nccl_available() else "cpu:gloo,cuda:nccl"
