"""A VAE's parameters in a file."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from pyro_nfvi._files import read_file, write_file

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE

FORMAT = "pyro_nfvi vae"
VERSION = 1


def write_state(path: str | PathLike, vae: VAE) -> None:
    """Write parameters and buffers."""
    write_file(path, {"format": FORMAT, "version": VERSION, "state": dict(vae.state_dict())})


def read_state(path: str | PathLike, vae: VAE) -> None:
    """Read them into a VAE of the same parts.

    Raises:
        ValueError: If there is no such file, or it is of other parts.
    """
    content = read_file(path, "VAE", FORMAT, VERSION, {"state"})
    try:
        vae.load_state_dict(content["state"])
    except RuntimeError as error:
        raise ValueError(f"VAE.load: {str(path)!r} is of a VAE of other parts. "
                         f"{_first_difference(error)}") from None


def _first_difference(error: RuntimeError) -> str:
    lines = str(error).split("\n")
    return lines[min(1, len(lines) - 1)].strip()
