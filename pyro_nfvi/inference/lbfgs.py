"""L-BFGS from many starts at once, which keeps the whole path."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreFn = Callable[[Tensor], tuple[Tensor, Tensor]]  # points -> log densities, gradients
Step = tuple[Tensor, Tensor, Tensor]  # point, log density, gradient

ARMIJO, WOLFE = 1e-4, 0.9
MAX_TRIALS = 25  # of step lengths, a line search
WORKING = 8  # arrays of points at work at the same time
COSTLY = 1e6  # numbers a score of all points, above which points at rest are left out
TINY_GAIN = 1e-10  # relative gain of a step below which a path has arrived


@dataclass(frozen=True)
class Path:
    """Where L-BFGS went from one start.

    Attributes:
        z: Points ``(num_points, D)``, the start first.
        log_p: Their log densities.
        gradient: Their gradients.
    """

    z: Tensor
    log_p: Tensor
    gradient: Tensor


class _Memory:
    """The last changes of point and gradient of every start.

    Args:
        starts: Points ``(S, D)``.
        size: How many changes to keep.
    """

    def __init__(self, starts: Tensor, size: int) -> None:
        self.changes: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=size)
        self.scale = starts.new_ones(len(starts))

    def push(self, s: Tensor, y: Tensor) -> None:
        """Remember changes ``(S, D)`` of those starts whose curvature is positive."""
        curvature, size = (s * y).sum(-1), y.square().sum(-1)
        good = (curvature > 1e-12 * size) & (curvature > 0)
        rho = (1 / curvature.where(good, size + 1)).where(good, curvature.new_zeros(()))
        self.changes.append((s, y, rho))  # rho = 1 / (s . y), zero where there is no change
        self.scale = (curvature / size).where(good, self.scale)

    def forget(self, which: Tensor) -> None:
        """Start again at the gradient for these starts."""
        for _, _, rho in self.changes:
            rho[which] = 0
        self.scale = self.scale.where(~which, self.scale.new_ones(()))

    def direction(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian times the gradient, by the two loops."""
        q, alphas = gradient, []
        for s, y, rho in reversed(self.changes):
            alpha = (rho * (s * q).sum(-1)).unsqueeze(-1)
            q = q - alpha * y
            alphas.append(alpha)
        q = self.scale.unsqueeze(-1) * q
        for (s, y, rho), alpha in zip(self.changes, reversed(alphas), strict=True):
            beta = (rho * (y * q).sum(-1)).unsqueeze(-1)
            q = q + (alpha - beta) * s
        return q


@torch.no_grad()
def maximize(score: ScoreFn, starts: Tensor, num_steps: int = 200, memory: int = 10
             ) -> list[Path]:
    r"""Climb a log density from every start, all of them in one batch.

    Step lengths are sought by the weak Wolfe conditions; a point without a density is a step
    too far.

    Args:
        score: Log densities and gradients of points.
        starts: Points ``(S, D)``.
        num_steps: Largest number of steps.
        memory: Number of changes that the inverse Hessian is made of.

    Returns:
        The paths of those starts that have a density.

    References:
        Nocedal & Wright (2006), Numerical Optimization, algorithms 7.4-7.5; Lewis & Overton
        (2013), Nonsmooth optimization via quasi-Newton methods, section 2 (the line search).
    """
    z = starts
    log_p, gradient = score(z)
    alive = fresh = log_p.isfinite()
    past = _Memory(starts, memory)
    steps: list[list[Step]] = [[] for _ in starts]  # of each start, which end at their own time
    _keep(steps, (z, log_p, gradient), alive)
    for _ in range(num_steps if alive.any() else 0):
        direction = _ascent(past, gradient)
        new = _line_search(score, z, log_p, gradient, direction, alive, fresh)
        moved = alive & (new[1] - log_p > TINY_GAIN * (1 + log_p.abs()))
        alive = moved | (alive & ~fresh)  # one that is stuck forgets its past, once
        if not alive.any():
            break
        past.push((new[0] - z).where(moved.unsqueeze(-1), z.new_zeros(())),
                  (gradient - new[2]).where(moved.unsqueeze(-1), z.new_zeros(())))
        fresh = alive & ~moved
        past.forget(fresh)
        z, log_p, gradient = (a.where(moved.reshape(-1, *[1] * (a.dim() - 1)), b)
                              for a, b in zip(new, (z, log_p, gradient), strict=True))
        _keep(steps, (z, log_p, gradient), moved)
    paths = []
    while steps:  # each leaves as its path is made, so that few are held twice
        own = steps.pop(0)
        if own:
            paths.append(_path(own))
    return paths


def _ascent(past: _Memory, gradient: Tensor) -> Tensor:
    direction = past.direction(gradient)
    uphill = ((direction * gradient).sum(-1, keepdim=True) > 0) & direction.isfinite().all(
        -1, keepdim=True)
    return direction.where(uphill, gradient)


def _line_search(score: ScoreFn, z: Tensor, log_p: Tensor, gradient: Tensor, direction: Tensor,
                 alive: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = (direction * gradient).sum(-1)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    unit = (1 / gradient.norm(dim=-1).clamp(min=1e-300)).clamp(max=1.0)
    length = unit.where(fresh, torch.ones_like(unit))
    best = z, log_p, gradient
    open_ = alive.clone()
    for _ in range(MAX_TRIALS):
        new_z = z + length.unsqueeze(-1) * direction
        new_log_p, new_gradient = _scored(score, new_z, open_, z, log_p, gradient)
        enough = new_log_p >= log_p + ARMIJO * length * slope
        flat = (direction * new_gradient).sum(-1) <= WOLFE * slope
        better = open_ & enough & (new_log_p > best[1])
        best = (new_z.where(better.unsqueeze(-1), best[0]), new_log_p.where(better, best[1]),
                new_gradient.where(better.unsqueeze(-1), best[2]))
        open_ = open_ & ~(enough & flat)
        if not open_.any():
            break
        high, low = length.where(~enough, high), length.where(enough, low)
        length = torch.where(high.isinf(), 2 * low, (low + high) / 2)
    return best


def _scored(score: ScoreFn, new_z: Tensor, open_: Tensor, z: Tensor, log_p: Tensor,
            gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Score of the open points; of a costly one in batches of few sizes, each of them recorded."""
    rows = open_.nonzero().flatten()
    size = next(size for size in (-(-len(z) // 4), -(-len(z) // 2), len(z)) if size >= len(rows))
    if size == len(z) or getattr(score, "work", 0.0) * len(z) < COSTLY:
        return score(new_z.where(open_.unsqueeze(-1), z))
    padded = torch.cat([rows, rows[-1:].expand(size - len(rows))])
    few_log_p, few_gradient = score(new_z[padded])
    return (log_p.index_copy(0, rows, few_log_p[:len(rows)]),
            gradient.index_copy(0, rows, few_gradient[:len(rows)]))


def _keep(steps: list[list[Step]], new: Step, moved: Tensor) -> None:
    """Remember where those starts are that have moved."""
    for start in moved.nonzero().flatten().tolist():
        z, log_p, gradient = (part[start].clone() for part in new)  # not the whole batch
        steps[start].append((z, log_p, gradient))


def _path(steps: list[Step]) -> Path:
    """The steps of one start."""
    return Path(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
