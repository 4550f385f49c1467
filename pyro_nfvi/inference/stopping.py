"""When to stop: the learning rate over the steps, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WARM_UP = 0.1  # fraction of the steps in which the rate rises
LOOK_EVERY = 50  # steps
FLAT_LOOKS = 2  # in a row, before the rate falls
FEWEST = 400  # steps before the rate may fall
LONGEST_HOLD = 0.5  # fraction of the budget after which it falls in any case
DECAY = 0.6  # steps in which it falls, for every step before


class OneCycle:
    r"""A linear rise, then half a cosine down to zero, over a known number of steps.

    Args:
        num_steps: Number of steps.

    References:
        Smith & Topin (2018), Super-Convergence, arXiv:1708.07120.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def rates(self, start: int, count: int) -> list[float]:
        """Fractions of the largest rate for so many steps, or as many as are left."""
        rise = max(1, round(WARM_UP * self.num_steps))
        return [self._rate(step, rise) for step in
                range(start, min(start + count, self.num_steps))]

    def look(self, elbo: Sequence[float]) -> None:
        """Nothing that has happened changes the plan."""

    def hurry(self, step: int) -> None:
        """Nor does the clock."""

    def snapshot(self) -> dict[str, Any]:
        """What has been decided so far, as a file holds it."""
        return dict(vars(self))

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        vars(self).update(snapshot)

    def _rate(self, step: int, rise: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return _cosine((step - rise) / max(1, self.num_steps - rise))


class UntilFlat(OneCycle):
    r"""Full rate until the ELBO has stopped rising, then down to zero.

    Every ``LOOK_EVERY`` steps a line is fitted to the later half of the ELBO; once its slope is
    below its own standard error twice in a row, or half the budget is spent, the rate falls to
    zero over ``DECAY`` times the steps made.

    .. math:: \hat b < \mathrm{se}(\hat b), \qquad \mathrm{ELBO}_t = a + b t + \epsilon_t

    Args:
        num_steps: Largest number of steps.

    References:
        Dhaka et al. (2020), Robust, Accurate Stochastic Optimization for Variational Inference,
        arXiv:2009.00666 (stationarity first, then a decaying rate).
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.budget = num_steps
        self.hold: int | None = None  # steps before the fall
        self.looked = 0  # step of the last look
        self.flat = 0  # looks in a row at which the ELBO was flat

    def rates(self, start: int, count: int) -> list[float]:
        """Fractions of the largest rate, up to the next look."""
        stop = min(start + count, self.num_steps)
        if self.hold is None:
            stop = min(stop, start - start % LOOK_EVERY + LOOK_EVERY)
        return [self._rate(step, rise=LOOK_EVERY) for step in range(start, stop)]

    def look(self, elbo: Sequence[float]) -> None:
        """Let the rate fall if the ELBO is flat, or half the budget is spent."""
        step = len(elbo)
        if self.hold is not None or step == self.looked or step % LOOK_EVERY:
            return
        self.looked = step
        self.flat = self.flat + 1 if is_flat(elbo[step // 2:]) else 0
        if step >= LONGEST_HOLD * self.budget or (step >= FEWEST and self.flat >= FLAT_LOOKS):
            self.hurry(step)

    def hurry(self, step: int) -> None:
        """Let the rate fall from this step on."""
        if self.hold is None:
            self.hold = step
            self.num_steps = min(self.budget, step + max(LOOK_EVERY, round(DECAY * step)))

    def _rate(self, step: int, rise: int) -> float:
        rate = min(1.0, (step + 1) / rise)
        if self.hold is None or step < self.hold:
            return rate
        return _cosine((step - self.hold) / max(1, self.num_steps - self.hold)) * rate


def is_flat(values: Sequence[float]) -> bool:
    """Whether a line through the values rises by less than the standard error of its slope."""
    y = np.asarray(values)
    y = y.clip(*np.quantile(y, [0.05, 0.95]))  # a few wild ones decide nothing
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = x @ y / (x @ x)
    residual = y - y.mean() - slope * x
    error = math.sqrt(residual @ residual / max(1, len(y) - 2) / (x @ x))
    return bool(slope <= error)


def _cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
