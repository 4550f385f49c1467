"""Snapshots of a fit in files, and the way back to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyro_nfvi._random import rng_state, set_rng_state
from pyro_nfvi.inference.checkpoint import Checkpoint, CheckpointStore
from pyro_nfvi.inference.identity import difference


class Kept:
    """Keeps snapshots of one fit, and finds the last.

    Args:
        store: Where; None in a process that keeps none.
        identity: What must be the same for the fit to go on.
        owner: Whose fit it is.

    Attributes:
        begin: The random state with which the fit began.
    """

    def __init__(self, store: CheckpointStore | None, identity: Mapping[str, Any],
                 owner: str = "NFVI") -> None:
        self.store, self.owner, self.begin = store, owner, rng_state()
        self.identity = {"the kinds of fit": owner, **identity}

    def due(self, step: int) -> bool:
        """Whether it is time for one, this many steps into the fit."""
        return self.store is not None and self.store.due(step)

    def left(self, step: int) -> float:
        """Number of steps until it is time by their count."""
        return math.inf if self.store is None else self.store.left(step)

    def keep(self, snapshot: Mapping[str, Any]) -> None:
        """Keep one."""
        if self.store is not None:
            self.store.write({"fit": self.identity, "begin": self.begin, **snapshot})

    def latest(self) -> dict[str, Any] | None:
        """The last one, or None.

        Raises:
            ValueError: If it is of another fit.
        """
        content = None if self.store is None else self.store.latest()
        if content is not None:
            self._check(content["fit"])
            self.begin = content["begin"]
        return content

    def _check(self, found: Mapping[str, Any]) -> None:
        if what := difference(found, self.identity):
            assert self.store is not None
            raise ValueError(f"{self.owner} found checkpoints of another fit in "
                             f"{str(self.store.folder)!r}: {what}. Choose another folder, or "
                             "remove that one to start anew.")


class StageKeeper:
    """Keeps snapshots of the loop of one stage, with what that stage started from.

    Args:
        kept: Keeps those of the whole fit.
        boundary: What the stage started from.
        before: Number of steps before it.
        seconds: Tells how long the fit has taken so far.
    """

    def __init__(self, kept: Kept, boundary: Mapping[str, Any], before: int,
                 seconds: Callable[[], float]) -> None:
        self.kept, self.boundary, self.before, self.seconds = kept, boundary, before, seconds

    def due(self, step: int) -> bool:
        """Whether it is time for a snapshot at this step of the loop."""
        return self.kept.due(self.before + step)

    def left(self, step: int) -> float:
        """Number of steps until it is time for a snapshot by their count."""
        return self.kept.left(self.before + step)

    def keep(self, snapshot: Mapping[str, Any]) -> None:
        """Keep a snapshot of the loop."""
        self.kept.keep({**self.boundary, "loop": snapshot, "seconds": self.seconds()})


@contextmanager
def keeping(checkpoint: Checkpoint | None, owner: str, identity: Callable[[], Mapping[str, Any]]
            ) -> Iterator[dict[str, Any]]:
    """What a loop takes to keep snapshots and to go on from the last: nothing without a checkpoint.

    The random state is then that with which the fit began.

    Raises:
        ValueError: If the checkpoints are of another fit.
    """
    if checkpoint is None:
        yield {}
        return
    with CheckpointStore(checkpoint, owner) as store:
        kept = Kept(store, identity(), owner)
        snapshot = kept.latest()
        set_rng_state(kept.begin)
        yield {"keeper": kept, "snapshot": snapshot}


def way_on(checkpoint: Checkpoint | None) -> str:
    """What to say of a fit that was interrupted."""
    return "" if checkpoint is None else " The same call goes on from its checkpoint."
