"""Are ranks uniform, are they symmetric? Exact tests, and simultaneous bands around an ECDF."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

MAX_POINTS = 100  # at which an ECDF is compared: every percent
MAX_CACHED = 32  # tests of one size


class UniformityTest:
    r"""Exact test that ranks are uniform, by the largest surprise along their ECDF.

    .. math:: \gamma = \min_i\, 2 \min\{P(B_i \le c_i),\ P(B_i \ge c_i)\}, \qquad
              B_i \sim \mathrm{Binomial}(N, z_i)

    :math:`c_i` of the :math:`N` ranks, of ``0..num_draws``, are below ``points[i]``, the fraction
    :math:`z_i` of all possible ranks. The p-value is the probability that uniform ranks give as
    small a :math:`\gamma`, and the band holds what gives a larger one than a level allows: a curve
    leaves the band of level 0.95 if and only if its p-value is at most 0.05.

    The probability is computed, not simulated: given their number, uniform ranks are a Poisson
    process, and what leaves the band is summed over where it leaves first. So small p-values
    are as accurate as large ones.

    Args:
        num_ranks: Number of ranks :math:`N`.
        num_draws: Largest possible rank.

    Example:
        >>> test = uniformity_test(200, 99)
        >>> lower, upper = test.band(0.95)
        >>> bool(lower[49] < test.points[49] / 100 < upper[49])
        True

    References:
        Säilynoja, Bürkner & Vehtari (2022), Graphical test for discrete uniformity and its
        applications, arXiv:2103.10522, section 2 (the test); Moscovich & Nadler (2017), Fast
        calculation of boundary crossing probabilities for Poisson processes, arXiv:1503.04363.
    """

    def __init__(self, num_ranks: int, num_draws: int) -> None:
        self.num_ranks, self.num_draws = num_ranks, num_draws
        count = min(num_draws + 1, MAX_POINTS)
        self.points = np.round(np.arange(1, count) * ((num_draws + 1) / count)).astype(int)
        self._tails = _binomial_tails(num_ranks, self.points / (num_draws + 1))
        self._known: dict[float, float] = {}
        steps = np.diff(self.points, prepend=0)
        self._steps = [self._poisson(step) for step in steps]
        self._rests = [self._poisson(num_draws + 1 - point)[::-1] for point in self.points]

    def counts(self, ranks: np.ndarray) -> np.ndarray:
        """How many ranks ``(num_ranks, *shape)`` are below each point: ``(num_points, *shape)``."""
        return np.stack([(ranks < point).sum(0) for point in self.points])

    def p_values(self, ranks: np.ndarray) -> np.ndarray:
        """p-values ``(*shape)`` of ranks ``(num_ranks, *shape)``."""
        counts = self.counts(ranks)
        flat = counts.reshape(len(counts), -1)
        least = self._tails[np.arange(len(flat))[:, None], flat].min(0)
        return np.array([self._p_value(gamma) for gamma in least]).reshape(counts.shape[1:])

    def band(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest fraction of ranks below each point that stay inside."""
        inside = self._tails > self._critical(1 - level)
        lower = inside.argmax(1)
        upper = self.num_ranks - inside[:, ::-1].argmax(1)
        return lower / self.num_ranks, upper / self.num_ranks

    def _critical(self, alpha: float) -> float:
        """Largest gamma whose p-value is at most ``alpha``; 0 if there is none."""
        values = np.unique(self._tails)
        low, high = 0, len(values)  # p-values below low are at most alpha, from high on above
        while low < high:
            middle = (low + high) // 2
            if self._p_value(values[middle]) <= alpha:
                low = middle + 1
            else:
                high = middle
        return float(values[low - 1]) if low else 0.0

    def _p_value(self, gamma: float) -> float:
        if gamma not in self._known:
            self._known[gamma] = self._crossing(self._tails > gamma)
        return self._known[gamma]

    def _crossing(self, inside: np.ndarray) -> float:
        """Probability that the counts of uniform ranks are outside at one point at least."""
        alive, start = np.ones(1), 0  # probability of counts, from `start` on, never outside
        total = 0.0
        for step, rest, within in zip(self._steps, self._rests, inside, strict=True):
            alive = np.convolve(alive, step)[: self.num_ranks + 1 - start]
            here = slice(start, start + len(alive))
            total += (alive * rest[here])[~within[here]].sum()
            kept = np.flatnonzero(within[here])
            if not len(kept):
                break
            alive, start = alive[kept[0]:kept[-1] + 1], start + int(kept[0])
        return float(min(total / self._poisson(self.num_draws + 1)[-1], 1.0))

    def _poisson(self, width: int) -> np.ndarray:
        """Probability of each number of ranks among ``width`` possible ones, their total free."""
        rate = self.num_ranks * width / (self.num_draws + 1)
        k = np.arange(self.num_ranks + 1)
        return np.exp(k * np.log(rate) - rate - _log_factorial(self.num_ranks))


@lru_cache(maxsize=MAX_CACHED)
def uniformity_test(num_ranks: int, num_draws: int) -> UniformityTest:
    """The test for so many ranks among so many draws; made once."""
    return UniformityTest(num_ranks, num_draws)


def symmetry_p_values(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    r"""p-values ``(*shape)`` of the symmetry of ranks ``(num_ranks, *shape)`` about their middle.

    .. math:: D = \max_x \left|F(x) + F(1 - x) - 1\right|

    which is the Kolmogorov-Smirnov distance between the fractions :math:`p` of draws below the
    truth and :math:`1 - p`. Its distribution is exact, given the distances from the middle: the
    signs are those of a fair coin.

    Args:
        ranks: Ranks, of ``0..num_draws``.
        num_draws: Largest possible rank.

    References:
        Yao, Vehtari, Simpson & Gelman (2018), Yes, but Did It Work?: Evaluating Variational
        Inference, arXiv:1802.02538, section 4; Butler (1969), A test for symmetry using the
        sample distribution function.
    """
    offsets = 2 * ranks.reshape(len(ranks), -1) - num_draws
    return np.array([_symmetry_p_value(column) for column in offsets.T]).reshape(ranks.shape[1:])


def _symmetry_p_value(offsets: np.ndarray) -> float:
    """That of numbers about zero: a walk by their signs, the largest number first."""
    sizes, groups, num_ties = np.unique(-np.abs(offsets[offsets != 0]), return_inverse=True,
                                        return_counts=True)
    if not len(sizes):
        return 1.0
    signs = np.bincount(groups, np.sign(offsets[offsets != 0]))
    return _walk_leaves(np.abs(signs.cumsum()).max(), num_ties)


def _walk_leaves(distance: float, num_steps: np.ndarray) -> float:
    """Probability that a fair walk is as far from zero after one of these blocks of steps."""
    reach = int(num_steps.sum())
    places = np.arange(-reach, reach + 1)
    alive, total = (places == 0).astype(float), 0.0
    far = np.abs(places) >= distance
    for steps in num_steps:
        for _ in range(steps):
            alive = (np.r_[alive[1:], 0.0] + np.r_[0.0, alive[:-1]]) / 2
        total += alive[far].sum()
        alive[far] = 0.0
    return float(min(total, 1.0))


def _binomial_tails(count: int, chances: np.ndarray) -> np.ndarray:
    """Twice the smaller tail, of each number out of ``count``, ``(len(chances), count + 1)``."""
    k, log_factorial = np.arange(count + 1), _log_factorial(count)
    log_choices = log_factorial[-1] - log_factorial - log_factorial[::-1]
    chance = chances[:, None]
    pmf = np.exp(log_choices + k * np.log(chance) + (count - k) * np.log1p(-chance))
    return 2 * np.minimum(pmf.cumsum(1), pmf[:, ::-1].cumsum(1)[:, ::-1])


@lru_cache(maxsize=MAX_CACHED)
def _log_factorial(count: int) -> np.ndarray:
    """Logarithms of the factorials of ``0..count``."""
    logs: np.ndarray = torch.lgamma(torch.arange(1, count + 2, dtype=torch.float64)).numpy()
    return logs
