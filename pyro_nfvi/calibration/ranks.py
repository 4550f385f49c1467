"""Ranks of a true value among draws: below it, and by how central it is."""

from __future__ import annotations

import numpy as np

NUM_WINDOWS = 100  # highest-density intervals compared: every percent


def ranks_of(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number of draws below the truth; among draws equal to it, at random.

    If truth and draws are of one distribution, the rank is uniform on ``0..num_draws``, for
    discrete values too.

    Args:
        draws: Independent draws ``(num_draws, *shape)``.
        truth: The value ``(*shape)`` that gave the data.
        rng: Numbers for ties.
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return np.asarray(below + rng.integers(0, equal, endpoint=True))


def hdi_ranks_of(draws: np.ndarray, truth: np.ndarray, ranks: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:
    r"""Number of draws that enter highest-density intervals before the truth does.

    .. math:: R_k = \bigcap_{j \ge k} W_j

    :math:`W_j` is the narrowest interval of :math:`j` of the draws and the truth together;
    the intersections are nested, the narrowest intervals themselves need not be. As truth and
    draws enter alike, the rank is uniform on ``0..num_draws`` if they are of one
    distribution: intervals found in the draws alone would be too narrow, by their search.

    Args:
        draws: Independent draws ``(num_draws, *shape)``.
        truth: The value ``(*shape)`` that gave the data.
        ranks: Its rank among them.
        rng: Numbers for ties.
    """
    pooled = np.sort(np.concatenate([draws, truth[None]]).reshape(len(draws) + 1, -1), axis=0)
    sizes, inside = _nested_windows(pooled, ranks.reshape(-1))
    level = inside.sum(0)  # the truth is in this many of the nested intervals, the widest first
    sizes = np.concatenate([sizes, np.zeros_like(sizes[:1])])
    column = np.arange(len(level))
    inner, outer = sizes[level, column], sizes[level - 1, column]
    return (inner + rng.integers(0, outer - inner)).reshape(ranks.shape)


def central_ranks_of(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Number of possible ranks that enter central intervals before this one does.

    The interval of ``m`` ranks starts at ``(num_draws + 1 - m) // 2``; each holds the one before.
    """
    sizes = np.arange(1, num_draws + 2)
    starts = (num_draws + 1 - sizes) // 2
    moved = np.r_[True, starts[1:] < starts[:-1]]  # the new rank is the first, or else the last
    entering = np.where(moved, starts, starts + sizes - 1)
    return np.asarray(np.argsort(entering)[ranks])


def _nested_windows(pooled: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the nested intervals, the widest first, and whether a place is in each.

    Args:
        pooled: Sorted values ``(n, num_columns)``.
        places: A row for each column.

    Returns:
        Both ``(num_windows, num_columns)``.
    """
    count = len(pooled)
    windows = np.unique(np.ceil(np.linspace(1, count, NUM_WINDOWS)).astype(int))[::-1]
    low, high = np.zeros_like(places), np.full_like(places, count - 1)
    sizes, inside = [], []
    for size in windows:
        starts = (pooled[size - 1:] - pooled[:count - size + 1]).argmin(0)
        low, high = np.maximum(low, starts), np.minimum(high, starts + size - 1)
        sizes.append(np.maximum(high - low + 1, 0))
        inside.append((low <= places) & (places <= high))
    return np.stack(sizes), np.stack(inside)
