"""Simulations of a calibration: each of them, and all of them in parallel."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from tqdm.auto import tqdm

from pyro_nfvi._shapes import type_name
from pyro_nfvi.calibration.ranks import hdi_ranks_of, ranks_of
from pyro_nfvi.calibration.refits import Amortized, Refit, posterior_draws
from pyro_nfvi.calibration.simulation import OWNER, Simulator, Values
from pyro_nfvi.inference.parallel import ONE_AT_A_TIME, Surroundings, in_parallel

Arrays = dict[str, np.ndarray]
NUM_TRIED = 5  # simulations that may all fail before it is called off


@dataclass(frozen=True)
class Incident:
    """What happened in one simulation.

    Attributes:
        simulation: Its number, from 0.
        text: What, in one line.
        details: The traceback of an error.
    """

    simulation: int
    text: str
    details: str = ""


# ------------------------------------------------------------------ one simulation

@dataclass(frozen=True)
class Outcome:
    """Ranks by site and by kind, or a failure."""

    simulation: int
    arrays: Mapping[str, Arrays] | None
    failure: Incident | None
    notes: tuple[Incident, ...]


@dataclass(frozen=True, eq=False)  # hashed by Dask, which its parts cannot be
class Simulation:
    """All that a process needs to run simulations."""

    simulator: Simulator
    refit: Amortized | Refit
    names: tuple[str, ...]
    num_draws: int
    weighted: bool
    quantities_fn: Callable[[Values, Values], Values] | None
    caller: Surroundings

    def __call__(self, simulation: int, seed: int) -> Outcome:
        """Run one simulation; only Ctrl-C gets out."""
        arrays, failure = None, None
        with ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with self.surroundings(seed):
                    arrays = self._ranked(np.random.default_rng(seed))
            except Exception as error:  # of the user's model or fit: named in the result
                failure = Incident(simulation, _one_line(error), traceback.format_exc())
        notes = {_one_line(w.message, kind=False): None for w in caught if _is_telling(w)}
        return Outcome(simulation, arrays, failure,
                        tuple(Incident(simulation, text) for text in notes))

    @contextmanager
    def surroundings(self, seed: int) -> Iterator[None]:
        """Those of the calling process, with random numbers from a seed."""
        with self.refit.surroundings(), self.caller.seeded(seed):
            yield

    def _ranked(self, rng: np.random.Generator) -> dict[str, Arrays]:
        truth, data = self.simulator.draw()
        args, kwargs = self.simulator.arguments(data)
        posterior = self.refit(data, args, kwargs)
        if getattr(getattr(posterior, "history", None), "interrupted", False):
            raise KeyboardInterrupt  # a fit that ended early is not what is asked about
        arrays = self._compared(posterior, truth, data, args, kwargs, rng, self.weighted)
        if self.weighted:
            plain = self._compared(posterior, truth, data, args, kwargs, rng, False)
            arrays["unweighted_ranks"] = plain["ranks"]
        return arrays

    def _compared(self, posterior: Any, truth: Values, data: Values, args: tuple, kwargs: dict,
                  rng: np.random.Generator, weighted: bool) -> dict[str, Arrays]:
        draws = posterior_draws(posterior, self.names, self.num_draws, args, kwargs, weighted)
        values = {name: truth[name] for name in self.names}
        if self.quantities_fn is not None:
            draws, values = self._with_quantities(draws, values, data)
        result: dict[str, Arrays] = {"ranks": {}, "hdi_ranks": {}, "prior_draws": {}}
        for name, value in values.items():
            many, one = (_numpy(v) for v in (draws[name], value))
            if many.shape[1:] != one.shape:
                raise ValueError(f"the fit gave draws of {name!r} of shape {many.shape[1:]}, the "
                                 f"model has {one.shape}")
            if np.isnan(many).any() or np.isnan(one).any():
                raise ValueError(f"the fit gave draws of {name!r} that are nan")
            ranks = ranks_of(many, one, rng)
            result["ranks"][name] = ranks
            result["hdi_ranks"][name] = hdi_ranks_of(many, one, ranks, rng)
            result["prior_draws"][name] = one
        result["unweighted_ranks"] = result["ranks"]
        return result

    def _with_quantities(self, draws: Values, truth: Values, data: Values
                         ) -> tuple[Values, Values]:
        assert self.quantities_fn is not None
        many = self.quantities_fn(draws, data)
        one = self.quantities_fn({name: v.unsqueeze(0) for name, v in truth.items()}, data)
        return {**draws, **many}, {**truth, **{name: v[0] for name, v in one.items()}}

    def draws_given(self, data_seed: int, seed: int) -> tuple[Values, Values]:
        """Data of one seed, and draws given them by random numbers of another."""
        with self.surroundings(data_seed):
            _, data = self.simulator.draw()
            args, kwargs = self.simulator.arguments(data)
            pyro.set_rng_seed(seed)
            return data, posterior_draws(self.refit(data, args, kwargs), self.names,
                                         self.num_draws, args, kwargs)


def _numpy(value: torch.Tensor) -> np.ndarray:
    array: np.ndarray = torch.as_tensor(value).detach().cpu().double().numpy()
    return array


def _one_line(error: Any, kind: bool = True) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return f"{type_name(error)}: {text}" if kind and text else text or type_name(error)


def _is_telling(caught: warnings.WarningMessage) -> bool:
    """Whether a warning is about the fit: not about code, nor torch's own about speed."""
    return issubclass(caught.category, (UserWarning, RuntimeWarning)) and \
        "performance drop" not in str(caught.message)


# ------------------------------------------------------------------ all simulations

def collected(simulation: Simulation, seeds: list[int], n_jobs: int | None, progress: bool
               ) -> list[Outcome]:
    """Outcomes in order: of all simulations, or of those done when Ctrl-C came."""
    outcomes: list[Outcome] = []
    with tqdm(total=len(seeds), desc=OWNER, disable=not progress) as bar:
        try:
            for outcome in _outcomes(simulation, seeds, n_jobs):
                outcomes.append(outcome)
                bar.update()
                _check_any(outcomes, len(seeds))
        except KeyboardInterrupt:
            if not any(outcome.arrays for outcome in outcomes):
                raise
            warnings.warn(f"{OWNER} was interrupted after {len(outcomes)} of {len(seeds)} "
                          "simulations; this is the calibration so far.", stacklevel=3)
    return sorted(outcomes, key=lambda outcome: outcome.simulation)


def _outcomes(simulation: Simulation, seeds: list[int], n_jobs: int | None) -> Iterator[Outcome]:
    if isinstance(simulation.refit, Amortized):  # a pass is faster than its way elsewhere
        yield from (simulation(k, seed) for k, seed in enumerate(seeds))
        return
    yield from in_parallel(simulation, list(enumerate(seeds)), n_jobs, in_order=False)


def _check_any(outcomes: list[Outcome], num_planned: int) -> None:
    """Call it off if none of the first simulations gave draws."""
    if len(outcomes) < min(NUM_TRIED, num_planned) or any(o.arrays is not None for o in outcomes):
        return
    first = next(o.failure for o in outcomes if o.failure is not None)
    raise ValueError(f"{OWNER}: all of the first {len(outcomes)} simulations failed, the first "
                     f"with {first.text}.") from RuntimeError(f"\n\n{first.details}")


def check_reads(simulation: Simulation, seeds: list[int]) -> None:
    """Refuse a guide whose draws do not depend on the data."""
    try:
        first, draws = simulation.draws_given(seeds[0], seeds[0])
        other, same = simulation.draws_given(seeds[0] ^ 1, seeds[0])
    except Exception as error:
        raise ValueError(f"{OWNER}: the guide gave no draws for simulated data: "
                         f"{_one_line(error)}.") from error
    if any(not torch.equal(first[name], other[name]) for name in first) and all(
            torch.equal(draws[name], same[name]) for name in draws):
        raise ValueError(f"{OWNER} expected `fit` to be an amortized guide, got one whose draws "
                         "are the same whatever the data. Pass a function that fits it to a model "
                         "and its arguments, or NFVI(model).")
