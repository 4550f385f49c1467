"""The one place that knows ArviZ 0.x from ArviZ 1.x (and 1.x's parts without the umbrella)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Dims = Mapping[str, list[str]]
MIN_DRAWS = 25  # fewer have no five draws in their tail, which is a fifth of them


@cache
def _api() -> SimpleNamespace:
    """The functions in use, under one set of names."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ArviZ 0.x announces 1.x at import
            import arviz
    except ImportError:
        return _parts()
    return _legacy(arviz) if int(arviz.__version__.split(".")[0]) == 0 else _parts()


def _legacy(arviz: Any) -> SimpleNamespace:
    return SimpleNamespace(
        psislw=arviz.psislw, summary=arviz.summary, kde=arviz.kde,
        from_dict=lambda groups, **kwargs: arviz.from_dict(**groups, **kwargs))


def _parts() -> SimpleNamespace:
    import arviz_base
    import arviz_stats
    from arviz_stats.base import array_stats

    def psislw(log_ratios: np.ndarray) -> Any:
        """ArviZ 1.x's, which takes minus the log ratios, and gives NaN where some are equal."""
        relative = log_ratios - log_ratios.max()
        rank = np.argsort(np.argsort(relative))
        return array_stats.psislw(-(relative + 1e-12 * rank))
    return SimpleNamespace(psislw=psislw, summary=arviz_stats.summary,
                           kde=array_stats.kde, from_dict=arviz_base.from_dict)


def psis(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed, normalized log weights and k-hat of importance ratios.

    Too few to have a tail stay as they are, with k-hat infinity; so do those whose tail is flat,
    with k-hat minus infinity.
    """
    unsmoothed = log_ratios - np.logaddexp.reduce(log_ratios)
    if len(log_ratios) < MIN_DRAWS:
        return unsmoothed, float("inf")
    tail = np.sort(log_ratios)[-tail_length(len(log_ratios)):]
    if tail[0] == tail[-1]:
        return unsmoothed, float("-inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bad fit is reported by k-hat, not by a warning
        log_weights, pareto_k = _api().psislw(np.asarray(log_ratios, np.float64).copy())
    return np.asarray(log_weights), float(pareto_k)


def tail_length(count: int) -> int:
    """How many of so many draws are in the tail that is smoothed."""
    return math.ceil(min(count / 5, 3 * count ** 0.5))


def kde(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid from the least to the largest of different, finite values, and their density on it."""
    values = np.asarray(values, np.float64)
    low, span = values.min(), np.ptp(values)
    grid, density = _api().kde((values - low) / span)[:2]  # of any scale
    return low + span * grid, density / span


def as_array(value: Any) -> np.ndarray:
    """A tensor as the array that ArviZ's data hold; what is an array stays one."""
    array: np.ndarray = (value.detach().cpu().numpy() if torch.is_tensor(value)
                         else np.asarray(value))
    return array


def inference_data(groups: Mapping[str, Mapping[str, np.ndarray]], dims: Dims,
                   coords: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """InferenceData (0.x) or DataTree (1.x) of arrays ``(chain, draw, *shape)`` by group."""
    data = _api().from_dict(groups, dims=dict(dims), coords=dict(coords))
    for group in {"posterior", "sample_stats"} & set(groups):
        data[group].attrs.update(attrs)
    return data


def summary(data: Any) -> Any:
    """ArviZ's table of means, standard deviations and intervals."""
    return _api().summary(data, kind="stats")

