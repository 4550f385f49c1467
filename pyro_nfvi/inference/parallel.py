"""Fits beside each other, in other processes through joblib, as they would be in this one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch

from pyro_nfvi._random import forked_rng
from pyro_nfvi.inference.log_joint import default_dtype

ONE_AT_A_TIME = threading.RLock()  # Pyro's handlers, torch's random numbers: one a process


@dataclass(frozen=True, eq=False)  # hashed by Dask, which settings cannot be
class Surroundings:
    """What a fit finds around it, wherever it runs: torch's default type and Pyro's settings."""

    dtype: torch.dtype
    settings: Mapping[str, Any]

    @classmethod
    def here(cls) -> Surroundings:
        """Those of the caller."""
        return cls(torch.get_default_dtype(), pyro.settings.get())

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Be in them, with random numbers from a seed; afterwards all is as it was."""
        numpy_state, python_state = np.random.get_state(), random.getstate()
        try:
            with forked_rng(), default_dtype(self.dtype), pyro.settings.context(**self.settings):
                pyro.set_rng_seed(seed)
                yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def fresh_process(num_threads: int | None = 1) -> Iterator[None]:
    """An empty param store, and so many threads, whatever process this is.

    Args:
        num_threads: Number of threads; None for as many as there are.
    """
    before = torch.get_num_threads()
    with pyro.get_param_store().scope():
        try:
            torch.set_num_threads(before if num_threads is None else num_threads)
            yield
        finally:
            torch.set_num_threads(before)


def is_parallel(n_jobs: int | None) -> bool:
    """Whether joblib would do several things at the same time."""
    from joblib import effective_n_jobs

    return bool(effective_n_jobs(n_jobs) > 1)


def in_parallel(function: Callable, tasks: Sequence[tuple], n_jobs: int | None,
                in_order: bool = True) -> Iterator[Any]:
    """What a function returns for each tuple of arguments, through joblib.

    Args:
        function: The function, which need not be importable.
        tasks: Its arguments.
        n_jobs: Number of processes, as joblib takes it.
        in_order: Whether results come in the order of their arguments, or as they are done.
    """
    from joblib import Parallel, delayed

    try:
        parallel = Parallel(n_jobs=n_jobs, return_as="generator" if in_order else
                            "generator_unordered")
    except ValueError:  # a backend that gives results all at once, as Ray's
        parallel = Parallel(n_jobs=n_jobs)
    yield from parallel(delayed(function)(*task) for task in tasks)


def check_jobs(owner: str, n_jobs: Any) -> int | None:
    """Return ``n_jobs`` if joblib can take it as a number of processes.

    Raises:
        ValueError: If it is neither an integer other than zero nor None.
    """
    whole = isinstance(n_jobs, int) and not isinstance(n_jobs, bool)
    if n_jobs is not None and (not whole or n_jobs == 0):
        raise ValueError(f"{owner} expected `n_jobs` to be a number of processes, -1 for all "
                         f"cores, or None, got {n_jobs!r}.")
    checked: int | None = n_jobs
    return checked
