"""Roots of increasing scalar functions, batched, with implicit gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_nfvi.engine.record import is_recording

Residual = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> value, derivative
NUM_STEPS = 60  # bisection alone then reaches float64 resolution
FEW_STEPS = 30  # enough where the function is smooth: refine_root doubles the digits twice


class NotConverged(ValueError, torch.linalg.LinAlgError):
    """A numerical solver of a layer did not get there, at these parameters.

    A fit takes it as it takes a failed factorization: it rolls back to the last good step.
    """


def in_graph() -> bool:
    """Whether operations become a graph, in which no value steers Python."""
    return torch.compiler.is_compiling() or is_recording()


def any_of(flags: Tensor) -> bool | None:
    """Whether a flag is set; None in a graph, or under ``torch.func.vmap``, which cannot say."""
    if in_graph():
        return None
    try:
        return bool(flags.any())
    except RuntimeError:  # vmap
        return None


def increasing_root(residual: Residual, low: Tensor, high: Tensor, num_steps: int = NUM_STEPS
                    ) -> Tensor:
    r"""Root of an increasing function that changes sign between ``low`` and ``high``.

    Newton steps run while they stay inside the shrinking bracket and it keeps halving;
    otherwise the step is a bisection. The number of steps is fixed: no value steers Python, so
    the search compiles and batches.

    Args:
        residual: Maps ``x`` to the value and the derivative of the function, elementwise.
        low: Point at or below the root.
        high: Point at or above the root.
        num_steps: Number of steps, before two of Newton's that carry the gradients.

    Returns:
        The root, twice differentiable in whatever ``residual`` closes over.
    """
    return refine_root(residual, _bracketed(residual, low, high, num_steps))


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
def _bracketed(residual: Residual, low: Tensor, high: Tensor, num_steps: int) -> Tensor:
    x = (low + high) / 2
    step = before = high - low
    for _ in range(num_steps):
        value, slope = residual(x)
        low, high = torch.where(value < 0, x, low), torch.where(value < 0, high, x)
        newton, middle = x - value / slope, (low + high) / 2
        # Newton steps may creep along the bracket or jump back and forth; midpoints never do.
        shrinks = 2 * (newton - x).abs() <= before
        new = torch.where((newton >= low) & (newton <= high) & shrinks, newton, middle)
        x, step, before = new, (new - x).abs(), step
    return x
