"""Files of tensors, numbers and names, never code; written whole or not at all.

A file of :func:`write_file` is the archive that ``torch.save`` writes, and ``torch.load`` reads it.
The archive's comment, its last bytes, is a seal: the SHA-256 of all bytes before, by which the
reader finds out that some are missing or others.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_nfvi._shapes import check_file_name, type_name

START, END = b"PK\3\4", b"PK\5\6"  # of an archive, and of its last record
END_SIZE = 22  # bytes of the last record, whose last two say how long the comment is
SEAL = b"pyro_nfvi sha256 "
SEAL_SIZE = len(SEAL) + 2 * hashlib.sha256().digest_size
PIECE = 1 << 20  # bytes to read at once
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none


class DamagedFile(ValueError):
    """A file that is not what was once written: cut short, changed, or something else."""


def write_file(path: str | PathLike, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path`` and seal it, by way of a temporary file beside it.

    Of a tensor that is a part of a larger one, the part alone is written.
    """
    content = tree_map(_without_rest, content, is_leaf=lambda part: isinstance(part, torch.Size))
    with _whole(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(content, hashing)
        finally:
            if hashing.error is not None:  # torch makes it a RuntimeError, or loses it
                raise hashing.error
        _seal(file, hashing.hash.hexdigest())


def write_text(path: str | PathLike, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, by way of a temporary file beside it."""
    with _whole(path) as file:
        file.write(text.encode("utf-8", "replace"))


def check_path(owner: str, path: Any) -> Path:
    """Return ``path`` if a file can have it: its folder is there, and it is none itself.

    Raises:
        ValueError: If it cannot.
    """
    check_file_name(owner, path)
    if not str(path):
        raise ValueError(f"{owner} expected `path` to be the path of a file, got {path!r}.")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{owner} expected `path` to be the path of a file, got the folder "
                         f"{str(path)!r}. Name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"{owner} found no folder {str(path.parent)!r} for {path.name!r}. Make it "
                         "first, or choose another path.")
    return path


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files that killed processes left of files named as in a glob."""
    for path in folder.glob(f".{names}." + 32 * "[0-9a-f]"):
        with suppress(OSError):
            path.unlink()


def read_file(path: str | PathLike, owner: str, form: str, version: int, parts: set[str]
              ) -> dict[str, Any]:
    """Read what :func:`write_file` wrote, or what earlier versions did without a seal.

    Args:
        path: Where it is.
        owner: Class whose ``load`` reads what its ``save`` wrote.
        form: What the file says it is, under ``"format"``.
        version: The newest version that can be read.
        parts: Names of what has to be there.

    Raises:
        ValueError: If there is no file, or it is damaged, foreign or newer.
    """
    return read_parts(path, f"{owner}.load", f"a file of {owner}.save", form, version, parts)


def read_parts(path: str | PathLike, reader: str, kind: str, form: str, version: int,
               parts: set[str], sealed: bool = False) -> dict[str, Any]:
    """Read a file, in the words of whoever reads it.

    Args:
        path: Where it is.
        reader: Who reads it.
        kind: What it is expected to be.
        form: What the file says it is, under ``"format"``.
        version: The newest version that can be read.
        parts: Names of what has to be there.
        sealed: Whether a file without a seal is refused.

    Raises:
        DamagedFile: If it is cut short, changed, or something else.
        ValueError: If there is no file, or it is newer.
    """
    wanted = f"{reader} expected {kind}, got {str(path)!r}"
    if not Path(path).exists():
        raise ValueError(f"{reader} found no file {str(path)!r}.")
    content = _opened(path, wanted, sealed)
    found = content.get("version", version) if isinstance(content, dict) else None
    if not isinstance(found, int) or content.get("format") != form:
        raise DamagedFile(f"{wanted}, which holds something else.")
    if found > version:
        raise ValueError(f"{reader} reads files up to version {version}, got version {found}: "
                         f"update pyro_nfvi to read {str(path)!r}.")
    if missing := parts - content.keys():
        raise DamagedFile(f"{wanted}, which is damaged or foreign (no {min(missing)}).")
    return content


def _opened(path: str | PathLike, wanted: str, sealed: bool) -> Any:
    """Content of a file whose seal, if it has one, is whole."""
    try:
        with open(path, "rb") as file:
            whole = _check_seal(file, wanted, sealed)
            return _loaded(file, wanted, whole)
    except OSError as error:
        raise DamagedFile(f"{wanted}, which cannot be read ({type_name(error)}).") from error


def _loaded(file: BinaryIO, wanted: str, whole: bool) -> Any:
    """What torch reads of it, never code; a sealed file that torch refuses is not damaged."""
    file.seek(0)
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if whole:
            raise ValueError(f"{wanted}, which is whole, but holds what torch {torch.__version__} "
                             f"does not read ({type_name(error)}). Write it with this torch, or "
                             "update torch.") from error
        raise DamagedFile(f"{wanted}, which is damaged or foreign ({type_name(error)})."
                          ) from error


# ---------------------------------------------------------------------- whole files

@contextmanager
def _whole(path: str | PathLike) -> Iterator[BinaryIO]:
    """A file that is there only once all of it is written, and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            _to_disk(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _folder_to_disk(path.parent)


def _to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def _folder_to_disk(folder: Path) -> None:
    """Make the new name last, where a folder can be opened; the file itself is there already."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------- tensors

def _without_rest(value: Any) -> Any:
    """A copy of a tensor that is a part of a larger one, of which torch would write all."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return value
    part = value.detach()[tuple(slice(None if step else 1) for step in value.stride())]
    if part.nbytes >= value.untyped_storage().nbytes():
        return value
    return part.clone().expand(value.shape).requires_grad_(value.requires_grad)


# ---------------------------------------------------------------------- seals

class _Hashing:
    """A file whose bytes are hashed on their way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or fail for good."""
        if self.error is not None:
            raise self.error
        try:
            self.hash.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing waits here."""


def _seal(file: BinaryIO, digest: str) -> None:
    """Write the seal as the archive's comment, of which its last record says the length."""
    file.seek(-2, os.SEEK_CUR)
    file.write(_comment(digest))


def _comment(digest: str) -> bytes:
    """The seal, and its length before it."""
    return struct.pack("<H", SEAL_SIZE) + SEAL + digest.encode()


def _check_seal(file: BinaryIO, wanted: str, sealed: bool) -> bool:
    """Whether there is a seal, which is then found to be that of the bytes before.

    Raises:
        DamagedFile: If it is not, or the end is missing, or this is no archive.
    """
    start, size = file.read(len(START)), file.seek(0, os.SEEK_END)
    if not start or not START.startswith(start):
        raise DamagedFile(f"{wanted}, which is damaged or foreign "
                          f"({'no archive of torch' if start else 'empty'}).")
    end = _last(file, size, END_SIZE + SEAL_SIZE)
    if end.startswith(END) and end[END_SIZE:].startswith(SEAL):
        if end[END_SIZE - 2:] != _comment(_digest(file, size - SEAL_SIZE - 2)):
            raise DamagedFile(f"{wanted}, which is damaged: its SHA-256 is not that of its seal.")
        return True
    plain = end[-END_SIZE:]
    if not (plain.startswith(END) and plain.endswith(b"\0\0")):
        raise DamagedFile(f"{wanted}, which is damaged or foreign: after {size} bytes, its end is "
                          "missing.")
    if sealed:
        raise DamagedFile(f"{wanted}, which is foreign (no seal).")
    return False


def _last(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read()


def _digest(file: BinaryIO, count: int) -> str:
    """SHA-256 of an archive that had no comment yet, from all but the length of its comment."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(min(PIECE, count)):
        digest.update(piece)
        count -= len(piece)
    digest.update(b"\0\0")
    return digest.hexdigest()
