"""Random numbers drawn without a trace in the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Put the random state of the CPU and the current GPU back afterwards.

    Args:
        seed: Seed to start from inside. Default: the state as it is.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
