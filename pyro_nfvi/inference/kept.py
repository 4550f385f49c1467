"""Snapshots of a fit in files, and whether they are of this fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nfvi._random import forked_rng, rng_state, set_rng_state
from pyro_nfvi.inference.checkpoint import Checkpoint, CheckpointStore
from pyro_nfvi.inference.problem import Problem

SAME = 1e-4  # relative difference of two numbers that rounding explains
FINE = 1e-6  # and of two log densities in double precision
PLACE = 0.1  # size of latents and parameters at which log densities are compared
LINE = 200  # characters of an explanation
NUM_SAMPLED = 1000  # numbers that tell data apart


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
        for name in (*self.identity, *found):
            then, now = found.get(name), self.identity.get(name)
            if not _same(then, now):
                assert self.store is not None
                what = f"its {name} was {then!r}, not {now!r}" if name[0] == "`" else \
                    f"{name} differ{_shown(then, now)}"
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


@torch.no_grad()
def identity(problem: Problem) -> dict[str, Any]:
    """What tells two problems apart: latent sites, the flow, the type, and the log joint.

    None of it depends on the random state, or on what a fit has trained.
    """
    guide, feed = problem.guide, problem.feed
    recipes = guide.recipe, guide._base_recipe, guide._affine_recipe
    return {"the latent sites": {site.name: list(site.shape) for site in guide.layout},
            "the guides": [type(guide).__name__, *map(described, recipes)],
            "the floating-point types": str(problem.log_joint.dtype),
            "the loaders": {} if feed is None else {
                "kind": feed.kind, "rows": feed.num_rows, "batch_size": feed.batch_size},
            "the model or its data": _log_density(problem)}


def _log_density(problem: Problem) -> Tensor:
    """The log joint at a set place; nan if rows of the loader come in an order of their own."""
    rows = () if problem.feed is None else problem.feed.opening()
    log_joint = problem.log_joint if problem.all_data is None or rows is None \
        else problem.all_data.of_batch(rows)
    with forked_rng(0):
        z = PLACE * torch.randn(problem.guide.layout.size)
        z = z.to(problem.guide._init_loc())
        parameters = log_joint.parameters(z).values()
        before = [value.clone() for value in parameters]
        try:
            for value in parameters:
                value.fill_(PLACE)
            density = log_joint(z).cpu()
        finally:
            for value, trained in zip(parameters, before, strict=True):
                value.copy_(trained)
    return torch.full_like(density, torch.nan) if rows is None else density


def described(part: Any) -> str:
    """What tells two functions, objects or modules apart, whatever their numbers."""
    shapes = [tuple(value.shape) for value in part.state_dict().values()
              if isinstance(value, Tensor)] if isinstance(part, nn.Module) else ""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part)) + str(shapes)


def sampled(values: Tensor | None) -> Tensor | None:
    """Some of the numbers of a tensor, which tell it from others."""
    if values is None:
        return None
    flat = values.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(NUM_SAMPLED, len(flat)), dtype=torch.float64)
    return flat[places.long().to(flat.device)].double().cpu()


def _shown(then: Any, now: Any) -> str:
    """What there was and what there is, if it can be read in a line."""
    words = f", {then} then and {now} now"
    plain = not isinstance(then, Tensor) and not isinstance(now, Tensor)
    return words if plain and len(words) < LINE else ""


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, Tensor) and isinstance(now, Tensor):
        close = SAME if then.dim() or then.dtype is torch.float32 else FINE
        return then.shape == now.shape and then.dtype is now.dtype and torch.allclose(
            then, now, close, equal_nan=True)
    if isinstance(then, float) and isinstance(now, float):
        return then == now or math.isclose(then, now, rel_tol=SAME) or then != then != now
    return bool(then == now)
