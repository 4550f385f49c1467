"""What the fitted model would observe, beside what was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pyro_nfvi._shapes import check_names
from pyro_nfvi.plots.components import flat_draws, site_values

MAX_DRAWS, MAX_OBSERVATIONS = 500, 2000  # that are looked at
FEW = 40  # observations that have an interval each
MAX_VALUES = 30  # different integers that have a column each
BAND = 0.05, 0.5, 0.95  # ends and middle of an interval that holds 90%


@dataclass(frozen=True)
class Predictive:
    """Observations of a site with draws of their predictive distribution.

    Attributes:
        name: The site.
        observed: The observations ``(num_observations,)``.
        draws: What the model would observe ``(num_draws, num_observations)``.
    """

    name: str
    observed: np.ndarray
    draws: np.ndarray

    @cached_property
    def interval(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower end, median and upper end of the 90% interval of each observation."""
        return band(self.draws)

    @property
    def inside(self) -> np.ndarray:
        """Which observations are within their interval."""
        low, _, high = self.interval
        return (low <= self.observed) & (self.observed <= high)

    @cached_property
    def values(self) -> np.ndarray | None:
        """The different values, if they are few integers."""
        values = np.unique(np.concatenate([self.observed, self.draws.ravel()]))
        whole = len(values) <= MAX_VALUES and (values == np.round(values)).all()
        return values if whole else None

    @property
    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """Fraction of each value: observed, and in each draw ``(num_draws, num_values)``."""
        assert self.values is not None
        return ((self.observed[:, None] == self.values).mean(0),
                np.stack([(self.draws == value).mean(1) for value in self.values], -1))

    @property
    def form(self) -> str:
        """How to show it: ``"columns"`` of values, ``"intervals"``, or ``"densities"``."""
        if self.values is not None and (len(self.values) <= 3 or len(self.observed) > FEW):
            return "columns"
        return "intervals" if len(self.observed) <= FEW else "densities"

    @property
    def words(self) -> str:
        """How well the two agree, in words."""
        if self.form != "columns":
            return (f"{self.inside.sum():,} of {len(self.observed):,} observations are within "
                    "their 90% intervals")
        observed, drawn = self.frequencies
        low, _, high = band(drawn)
        held = ((low <= observed) & (observed <= high)).sum()
        return f"the frequencies of {held} of {len(observed)} values are within 90% intervals"


def band(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower end, median and upper end of 90% of the draws in each column."""
    low, middle, high = np.quantile(draws, BAND, axis=0)
    return low, middle, high


def predictive_sites(data: Any, var_names: Sequence[str] | None = None) -> list[Predictive]:
    """Observed sites with predictive draws, those that agree least first.

    Of many observations or draws some are taken, evenly.

    Args:
        data: InferenceData or DataTree.
        var_names: Observed sites to take. Default: all.

    Raises:
        ValueError: If ``var_names`` are no names.
    """
    observed, drawn = site_values(data, "observed_data"), site_values(data, "posterior_predictive")
    wanted = observed if var_names is None else check_names(
        "plot_predictive", "var_names", var_names)
    names = [name for name in observed if name in drawn and name in wanted]
    found = [_predictive(name, observed[name].values, drawn[name]) for name in names]
    return sorted((one for one in found if one is not None and one.observed.size),
                  key=lambda one: one.inside.mean())


def _predictive(name: str, observed: np.ndarray, variable: Any) -> Predictive | None:
    """One site, without what is missing or not finite; None if the shapes differ."""
    draws = flat_draws(variable)
    if _without_ones(draws.shape[1:]) != _without_ones(observed.shape):
        return None
    draws = _evenly(draws.reshape(len(draws), observed.size), MAX_DRAWS)
    observed = observed.ravel()
    places = _evenly(np.flatnonzero(np.isfinite(observed)), MAX_OBSERVATIONS)
    draws = draws[:, places].astype(np.float64)
    draws = draws[np.isfinite(draws).all(1)]
    observed = observed[places].astype(np.float64)
    return Predictive(name, observed, draws) if len(draws) else None


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    """A shape as it is before ArviZ 0.x makes a vector of a single number."""
    return [size for size in shape if size != 1]


def _evenly(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many rows, evenly apart."""
    return values[:: -(-len(values) // most) or 1]
