"""A VAE's parameters in a file."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_nfvi._files import check_path, read_file, write_file
from pyro_nfvi._shapes import check_file_name

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE

FORMAT = "pyro_nfvi vae"
VERSION = 1


def write_state(path: str | PathLike, vae: VAE) -> None:
    """Write parameters and buffers.

    Raises:
        ValueError: If no file can be there.
    """
    check_path("VAE.save", path)
    write_file(path, {"format": FORMAT, "version": VERSION, "state": dict(vae.state_dict())})


def read_state(path: str | PathLike, vae: VAE) -> None:
    """Read them into a VAE of the same parts.

    Raises:
        ValueError: If there is no such file, or it is of other parts.
    """
    check_file_name("VAE.load", path)
    state = read_file(path, "VAE", FORMAT, VERSION, {"state"})["state"]
    theirs, ours = _shapes(state), _shapes(vae.state_dict())
    if theirs != ours:  # found before anything is overwritten
        name = min(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        raise ValueError(f"VAE.load: {str(path)!r} is of a VAE of other parts: {name!r} is "
                         f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} "
                         f"here. Build the VAE with the options it was saved with.")
    vae.load_state_dict(state)


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a state; none of what is no state."""
    items = state.items() if isinstance(state, dict) else ()
    return {str(name): tuple(value.shape) for name, value in items if isinstance(value, Tensor)}
