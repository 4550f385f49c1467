"""Files of tensors, numbers and names, never code; written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

from pyro_nfvi._shapes import type_name


def write_file(path: str | PathLike, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, by way of a temporary file beside it."""
    with _whole(path) as file:
        torch.save(content, file)


def write_text(path: str | PathLike, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, by way of a temporary file beside it."""
    with _whole(path) as file:
        file.write(text.encode("utf-8", "replace"))


def check_path(owner: str, path: Any) -> Path:
    """Return ``path`` if a file can have it: its folder is there, and it is none itself.

    Raises:
        ValueError: If it cannot.
    """
    if not isinstance(path, (str, PathLike)) or not str(path):
        raise ValueError(f"{owner} expected `path` to be the path of a file, got {path!r}.")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{owner} expected `path` to be the path of a file, got the folder "
                         f"{str(path)!r}. Name a file in it.")
    if not path.parent.is_dir():
        raise ValueError(f"{owner} found no folder {str(path.parent)!r} for {path.name!r}. Make it "
                         "first, or choose another path.")
    return path


@contextmanager
def _whole(path: str | PathLike) -> Iterator[BinaryIO]:
    """A file that is there only once all of it is written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_file(path: str | PathLike, owner: str, form: str, version: int, parts: set[str]
              ) -> dict[str, Any]:
    """Read what :func:`write_file` wrote.

    Args:
        path: Where it is.
        owner: Class whose ``load`` reads what its ``save`` wrote.
        form: What the file says it is, under ``"format"``.
        version: The newest version that can be read.
        parts: Names of what has to be there.

    Raises:
        ValueError: If there is no file, or it is damaged, foreign or newer.
    """
    wanted = f"{owner}.load expected a file of {owner}.save, got {str(path)!r}"
    if not Path(path).exists():
        raise ValueError(f"{owner}.load found no file {str(path)!r}.")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{wanted}, which is damaged or foreign ({type_name(error)}).") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{wanted}, which holds something else.")
    if content.get("version", version) > version:
        raise ValueError(f"{owner}.load reads files up to version {version}, got version "
                         f"{content['version']}: update pyro_nfvi.")
    if missing := parts - content.keys():
        raise ValueError(f"{wanted}, which is damaged or foreign (no {min(missing)}).")
    return content
