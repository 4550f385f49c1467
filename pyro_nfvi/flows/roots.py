"""Roots of increasing scalar functions, batched, with implicit gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> value, derivative
NUM_STEPS = 60  # bisection alone then reaches float64 resolution


def increasing_root(residual: Residual, low: Tensor, high: Tensor) -> Tensor:
    r"""Root of an increasing function that changes sign between ``low`` and ``high``.

    Newton steps run while they stay inside the shrinking bracket and it keeps halving;
    otherwise the step is a bisection. The number of steps is fixed: no value steers Python, so
    the search compiles and batches.

    Args:
        residual: Maps ``x`` to the value and the derivative of the function, elementwise.
        low: Point at or below the root.
        high: Point at or above the root.

    Returns:
        The root, twice differentiable in whatever ``residual`` closes over.
    """
    return refine_root(residual, _bracketed(residual, low, high))


def refine_root(residual: Residual, root: Tensor) -> Tensor:
    r"""Attach implicit gradients to a known root.

    Two differentiable Newton steps :math:`x - f(x) / f'(x)` from the constant root: each
    squares the order of the error in the parameters, so two are exact to third derivatives.
    """
    x = root.detach()
    for _ in range(2):
        value, slope = residual(x)
        x = x - value / slope
    return x


@torch.no_grad()
def _bracketed(residual: Residual, low: Tensor, high: Tensor) -> Tensor:
    x = (low + high) / 2
    step = before = high - low
    for _ in range(NUM_STEPS):
        value, slope = residual(x)
        low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
        newton, middle = x - value / slope, (low + high) / 2
        # Newton steps may creep along the bracket or jump back and forth; midpoints never do.
        shrinks = 2 * (newton - x).abs() <= before
        new = torch.where((newton >= low) & (newton <= high) & shrinks, newton, middle)
        x, step, before = new, (new - x).abs(), step
    return x
