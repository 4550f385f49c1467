"""How large a model's plates are for the arguments of the moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_nfvi.guides.layout import LatentLayout
from pyro_nfvi.guides.local_layout import LocalLayout, latent_frames
from pyro_nfvi.guides.prototype import compare_site, kind_of, quiet_trace

MAX_KINDS = 64  # kinds of arguments to remember; the oldest is forgotten first


@dataclass(frozen=True)
class Sizes:
    """Plates of the latent sites, for one kind of arguments.

    Attributes:
        frames: Size, full size and dimension of every plate, by name.
        drawn_by_user: For a plate whose subsample the model is given, which of its arguments
            (flattened) that is; None if it is none of them.
    """

    frames: dict[str, Any]
    drawn_by_user: dict[str, int | None] = field(default_factory=dict)

    def add_plates(self, plates: dict[str, pyro.plate], args: tuple, kwargs: dict) -> None:
        """Add the plates whose subsample is an argument, unless they are there."""
        leaves = tree_leaves((args, kwargs))
        for name, place in self.drawn_by_user.items():
            if name not in plates and place is not None:
                frame = self.frames[name]
                plates[name] = pyro.plate(name, full_size(frame), subsample=leaves[place],
                                          dim=frame.dim)

    def resized(self, plate: str, size: int) -> Sizes:
        """The same with another size of a full plate."""
        frame = self.frames[plate]._replace(size=size, full_size=size)
        return Sizes({**self.frames, plate: frame})


class PlateSizes:
    """Looks up the plates of a model, which it traces once for each new kind of arguments.

    Args:
        owner: Name of the guide, for messages.
        shared: Latent sites outside the local plate, which keep their shapes; or None.
        local: Latent sites of the local plate, which change along it only.
    """

    def __init__(self, owner: str, shared: LatentLayout | None, local: LocalLayout) -> None:
        self.owner, self.shared, self.local = owner, shared, local
        self.seen: dict[Any, Sizes] = {}
        self.last: Sizes | None = None

    def __call__(self, model: Any, args: tuple, kwargs: dict) -> Sizes:
        """Plates of the model called with these arguments.

        Raises:
            ValueError: If a latent site is gone, observed, or of a shape the guide cannot have.
        """
        if self.last is not None and torch.jit.is_tracing():
            return self.last  # the same arguments just ran untraced, and sizes are tensors now
        kind = kind_of((args, kwargs))
        if kind not in self.seen:
            self.remember(kind, self._look(quiet_trace(model, args, kwargs), args, kwargs))
        self.last = self.seen[kind]
        return self.last

    def remember(self, kind: Any, sizes: Sizes) -> None:
        """Keep the plates for this kind of arguments."""
        if len(self.seen) >= MAX_KINDS:
            del self.seen[next(iter(self.seen))]
        self.seen[kind] = sizes

    def _look(self, trace: Trace, args: tuple, kwargs: dict) -> Sizes:
        for site in self.shared or ():
            compare_site(self.owner, site.name, site.shape, trace)
        names = [*(site.name for site in self.shared or ()), *(site.name for site in self.local)]
        frames = latent_frames(self.owner, [(name, trace.nodes[name]) for name in names
                                            if name in trace.nodes])
        plate = frames.get(self.local.plate)
        for local in self.local:
            compare_site(self.owner, local.name, local.shape(plate.size if plate else 0), trace)
        return Sizes(frames, self._drawn_by_user(trace, frames, tree_leaves((args, kwargs))))

    def _drawn_by_user(self, trace: Trace, frames: dict, leaves: list) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name in set(frames) & set(trace.nodes):
            node = trace.nodes[name]
            place = next((i for i, leaf in enumerate(leaves) if leaf is node["value"]), None)
            if place is not None or _is_given(node):
                found[name] = place
        return found


def full_size(frame: Any) -> int:
    """Number of elements of the whole plate."""
    size: int = frame.full_size or frame.size
    return size


def _is_given(node: dict[str, Any]) -> bool:
    """Whether a plate's indices are not those it would draw."""
    indices, draws = node["value"], node["fn"]
    if draws.subsample_size is not None:
        return False  # as many as it would draw: no telling
    indices = torch.as_tensor(indices)
    return not torch.equal(indices, torch.arange(draws.size).to(indices))


def rows_of_plate(owner: str, rows: tuple[Tensor, ...], plate: pyro.plate) -> tuple[Tensor, ...]:
    """The rows of a plate's elements of the moment.

    Args:
        owner: Name of the guide, for messages.
        rows: Tensors whose first dimension runs over the plate, or over its minibatch.
        plate: The plate.

    Raises:
        ValueError: If they are neither as many as the plate's elements nor as the minibatch's.
    """
    num_rows = rows[0].shape[0]
    if num_rows == plate.size:
        return tuple(row[plate.indices.to(row.device)] for row in rows)
    if num_rows == plate.subsample_size:
        return rows
    minibatch = "" if plate.size == plate.subsample_size else \
        f" or of its minibatch of {plate.subsample_size}"
    raise ValueError(f"{owner} expected one row for each of the {plate.size} elements of plate "
                     f"{plate.name!r}{minibatch}, got {num_rows}. Let `inputs` return a tensor "
                     "whose first dimension runs over the plate.")
