"""Where a long fit writes down how far it is, and finds it again."""

from __future__ import annotations

import errno
import math
import os
import platform
import re
import time
import warnings
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pyro_nfvi._files import DamagedFile, read_parts, remove_leftovers, write_file
from pyro_nfvi._shapes import check_positive_int, check_seconds, type_name

try:
    import fcntl as _fcntl
    fcntl: ModuleType | None = _fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "pyro_nfvi checkpoint"
VERSION = 1
NAME = re.compile(r"checkpoint-(\d{8,})\.pt")
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.Size, Tensor, nn.Parameter)
_LOCKED: set[Path] = set()  # folders, by this process


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a fit writes down how far it is, to go on from there if it is killed.

    Args:
        folder: Folder of the checkpoints of one fit; made if it is missing.
        every_seconds: Time between two checkpoints; infinity for none but at the end of a stage
            and when the fit is interrupted.
        every_steps: Number of steps between two checkpoints, whichever comes first. Default: the
            time alone decides.
        keep: Number of checkpoints that are kept, the newest.

    Raises:
        ValueError: If an argument is of another kind.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> temporary = TemporaryDirectory()
        >>> checkpoint = Checkpoint(temporary.name, every_seconds=30.0, keep=2)
        >>> with CheckpointStore(checkpoint) as store:  # as a fit does
        ...     store.write({"step": 7, "loc": torch.ones(2)})
        True
        >>> with CheckpointStore(checkpoint) as store:  # as it does when it is run again
        ...     store.latest()
        {'step': 7, 'loc': tensor([1., 1.])}
        >>> temporary.cleanup()
    """

    folder: str | PathLike
    every_seconds: float = 60.0
    every_steps: int | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        _check_folder("Checkpoint", "folder", self.folder)
        check_seconds("Checkpoint", "every_seconds", self.every_seconds)
        if self.every_steps is not None:
            check_positive_int("Checkpoint", "every_steps", self.every_steps)
        check_positive_int("Checkpoint", "keep", self.keep)

    @classmethod
    def of(cls, owner: str, value: Any) -> Checkpoint | None:
        """Return what an owner's ``checkpoint`` stands for: a folder, itself, or none.

        Raises:
            ValueError: If it is anything else.
        """
        if value is None or isinstance(value, cls):
            return value
        return cls(_check_folder(owner, "checkpoint", value, " or a Checkpoint"))


class CheckpointStore:
    """The checkpoints of one fit: numbered files in a folder, each of them whole or not there.

    The folder is locked until :meth:`close`, the end of a ``with`` block, or that of the process,
    however it ends; where there are no locks, other processes are not kept out.

    Args:
        checkpoint: Which folder, how often, and how many.
        owner: Whose fit it is, in messages.

    Raises:
        ValueError: If the folder cannot be made or written to, or another fit uses it.
    """

    def __init__(self, checkpoint: Checkpoint, owner: str = "NFVI") -> None:
        self.checkpoint, self.owner = checkpoint, owner
        self.folder = Path(checkpoint.folder).resolve()
        self._unlock = weakref.finalize(self, _unlock, self.folder, self._locked())
        remove_leftovers(self.folder, "checkpoint-*.pt")
        self._step: int | None = None  # of the last write, or the first look
        self._seen, self._time = 0, time.monotonic()
        self._damaged: list[Path] = []
        self._warned = False

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        self._unlock()

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, this many steps into the fit."""
        self._seen = step
        if self._step is None or step < self._step:  # the first look, or steps were undone
            self._step = step
        every = self.checkpoint.every_steps or math.inf
        return (step - self._step >= every
                or time.monotonic() - self._time >= self.checkpoint.every_seconds)

    def left(self, step: int) -> float:
        """Number of steps, at this one, until it is time by their count alone."""
        every = self.checkpoint.every_steps
        if every is None:
            return math.inf
        return max(every - (step - (step if self._step is None else self._step)), 1)

    def write(self, state: dict[str, Any]) -> bool:
        """Write a checkpoint, and remove those that are too old.

        Returns:
            Whether it was written. If the disk is full, say, the last ones stay, the first such
            failure is a warning, and the fit goes on.

        Raises:
            TypeError: If the state holds more than tensors, numbers, strings, None, dtypes, and
                lists, tuples and dicts of them.
        """
        _check_plain(state, "state")
        written = self._written({"format": FORMAT, "version": VERSION, "state": state})
        self._step, self._time = self._seen, time.monotonic()
        return written

    def latest(self) -> dict[str, Any] | None:
        """Content of the newest checkpoint that can be read, or None if there is none.

        One that is cut short or changed is named in a warning.

        Raises:
            ValueError: If there are some, but none of them can be read, or the newest is of a
                newer version.
        """
        self._damaged = []
        for path in reversed(self._paths()):
            try:
                return self._read(path)
            except DamagedFile as error:
                self._damaged.append(path)
                warnings.warn(f"{error} Looking for the one before.", stacklevel=2)
        if self._damaged:
            raise ValueError(f"{self.owner} can read none of the {len(self._damaged)} checkpoints "
                             f"in {str(self.folder)!r}. Remove them to start anew, or choose "
                             "another folder.")
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_parts(path, self.owner, "a checkpoint", FORMAT, VERSION, {"state"},
                             sealed=True)
        state: dict[str, Any] = content["state"]
        return state

    def _written(self, content: dict[str, Any]) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self._next(), content)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self.owner} could not write a checkpoint to {str(self.folder)!r} "
                              f"({error}). The fit goes on, and tries again.", stacklevel=3)
            self._warned = True
            return False
        self._tidy()
        return True

    def _paths(self) -> list[Path]:
        """Files of checkpoints, the oldest first."""
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)),
                      key=_number)

    def _next(self) -> Path:
        """A file above all others, whether or not they can be read."""
        number = 1 + max(map(_number, self._paths()), default=0)
        return self.folder / f"checkpoint-{number:08d}.pt"

    def _tidy(self) -> None:
        """Put aside what was found damaged, and remove what is too old."""
        for path in self._damaged:
            with suppress(OSError):
                path.replace(path.with_name(f"{path.name}.damaged"))
        self._damaged = []
        for path in self._paths()[:-self.checkpoint.keep]:
            with suppress(OSError):
                path.unlink()

    # ------------------------------------------------------------------ one fit at a time

    def _locked(self) -> int:
        """Lock the folder, made if need be; the lock is that of an open file in it."""
        if self.folder in _LOCKED:  # the file is not opened again: closing it would unlock it
            self._refuse("another fit of this process")
        descriptor = self._lock_file()
        if not _lock(descriptor):
            user = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            self._refuse(user or "another process")
        _LOCKED.add(self.folder)
        with suppress(OSError):  # for the message alone
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        return descriptor

    def _refuse(self, user: str) -> NoReturn:
        raise ValueError(f"{self.owner} found the checkpoints in {str(self.folder)!r} in use by "
                         f"{user}. Wait until it is done, or choose another folder.")

    def _lock_file(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileExistsError as error:
            raise ValueError(f"{self.owner} expected the checkpoints' folder, got the file "
                             f"{str(self.folder)!r}. Choose another path.") from error
        except OSError as error:
            raise ValueError(f"{self.owner} cannot write to {str(self.folder)!r}, the folder of "
                             f"its checkpoints ({error.strerror}). Choose another one.") from error


def _lock(descriptor: int) -> bool:
    """Whether no other process has locked it; the system unlocks what a killed one has."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # else: no locks here
    return True


def _unlock(folder: Path, descriptor: int) -> None:
    _LOCKED.discard(folder)
    os.close(descriptor)


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _check_folder(owner: str, argument: str, folder: Any, others: str = "") -> str | PathLike:
    ok = isinstance(folder, (str, PathLike)) and isinstance(os.fspath(folder), str)
    if not ok or not os.fspath(folder):
        raise ValueError(f"{owner} expected `{argument}` to be the path of a folder{others}, got "
                         f"{folder!r}.")
    checked: str | PathLike = folder
    return checked


def _check_plain(value: Any, name: str) -> None:
    """Check that a file can hold this without code; exact types, as others are written as code.

    Raises:
        TypeError: If it cannot.
    """
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {name}")
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif type(value) not in PLAIN:
        raise TypeError(f"CheckpointStore.write expected tensors, numbers, strings, None, dtypes "
                        f"and lists, tuples and dicts of them, got {type_name(value)} at {name}.")
