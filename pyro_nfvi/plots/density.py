"""Density of draws along a line, and where to look at it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyro_nfvi import _arviz


def view(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where nearly all of the draws are: an end that is near is shown, a far one is not."""
    low, high = zip(*(np.quantile(part, (0.005, 0.995)) for part in parts), strict=True)
    margin = 0.15 * max(high) - 0.15 * min(low)
    low_end, high_end = min(part.min() for part in parts), max(part.max() for part in parts)
    if not margin > max(1e-13 * (abs(low_end) + abs(high_end)), 1e-290):  # all the same
        return float(low_end - 0.5 - abs(low_end) / 2), float(high_end + 0.5 + abs(high_end) / 2)
    return max(low_end, min(low) - margin), min(high_end, max(high) + margin)


def density_of(values: np.ndarray, limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Density of values within limits; that of few different ones are spikes.

    It falls to zero where the values end high, as those of a positive number do.
    """
    inside = values[(values >= limits[0]) & (values <= limits[1])]
    if not len(inside):
        return np.asarray(limits), np.zeros(2)
    different, counts = np.unique(inside, return_counts=True)
    if np.ptp(inside) < 1e-9 * (limits[1] - limits[0]):  # one number, but for rounding
        different, counts = different[:1], counts.sum(keepdims=True)
    if len(different) < 10:
        return _spikes(different, counts / len(values), limits)
    grid, density = (part[::3] for part in _arviz.kde(inside))
    edges = np.where(density[[0, -1]] > 0.1 * density.max(), 0.0, density[[0, -1]])
    grid, density = np.r_[grid[0], grid, grid[-1]], np.r_[edges[0], density, edges[1]]
    return grid, density * len(inside) / len(values)


def _spikes(places: np.ndarray, heights: np.ndarray, limits: tuple[float, float]
            ) -> tuple[np.ndarray, np.ndarray]:
    """A thin column at each place."""
    half = (limits[1] - limits[0]) / 100
    x = places[:, None] + half * np.array([-1, -1, 1, 1])
    return x.ravel(), (heights[:, None] * np.array([0, 1, 1, 0])).ravel()
