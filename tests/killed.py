"""Fits that are killed on their way, and run again."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import asdict

from pyro_nfvi.inference import Checkpoint
from pyro_nfvi.inference.checkpoint import CheckpointStore
from tests.fits import step_by_step


class Killed(BaseException):
    """What ends a fit without a last word."""


def run_again(monkeypatch, folder, fit, kills, every_steps=1):
    """The fit, killed right after these of its checkpoints, and run again each time.

    Args:
        monkeypatch: Pytest's.
        folder: Of the checkpoints.
        fit: A function of a checkpoint, which begins the same fit anew at each call.
        kills: Number of checkpoints written until it is killed, for each of the times.
        every_steps: Steps between two checkpoints.

    Returns:
        What the last call returned, and the states from which each went on.
    """
    checkpoint = Checkpoint(folder, every_steps=every_steps)
    write, latest, states = CheckpointStore.write, CheckpointStore.latest, []
    step_by_step(monkeypatch)

    def look(store):
        states.append(copy.deepcopy(latest(store)))
        return states[-1]
    monkeypatch.setattr(CheckpointStore, "latest", look)
    for kill in kills:
        left = [kill]

        def write_and_die(store, state, left=left):
            write(store, state)
            left[0] -= 1
            if not left[0]:
                raise Killed
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(CheckpointStore, "write", write_and_die)
            fit(checkpoint)
            raise AssertionError("the fit was not killed")
    return fit(checkpoint), states


def told(history):
    """All of a history but the time it took."""
    return {name: value for name, value in asdict(history).items()
            if name not in ("seconds", "engines")}
