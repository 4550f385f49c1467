"""Data as a density fit takes them, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows import Flow

Rows = tuple[Tensor, Tensor | None]  # samples and their contexts
FEWEST_HELD_OUT, MOST_HELD_OUT = 10, 10_000  # rows by which a fit can be judged, and will be
FEW_VALUES = 0.05  # of the values of a column, if that many are distinct, it is no density
MANY_ROWS = 200  # from which that can be told


def as_rows(argument: str, values: Any) -> Tensor:
    """Finite numbers ``(num_rows, size)`` from a tensor or whatever NumPy reads as an array.

    Raises:
        ValueError: If they are something else.
    """
    owner = f"fit_density expected `{argument}`"
    wanted = f"{owner} to be a tensor or an array of shape (num_rows, size)"
    try:
        rows = values.detach() if isinstance(values, Tensor) else torch.as_tensor(
            np.asarray(values))
    except (TypeError, ValueError, RuntimeError):  # of no use as numbers
        raise ValueError(f"{wanted}, got {type_name(values)}.") from None
    if rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(f"{owner} to hold real numbers, got {rows.dtype}.")
    rows = rows.unsqueeze(-1) if rows.dim() == 1 else rows
    if rows.dim() != 2 or not rows.numel():
        hint = f" Flatten each: {argument}.reshape({len(rows)}, -1)." \
            if rows.dim() > 2 and rows.numel() else ""
        raise ValueError(f"{wanted}, got {tuple(rows.shape)}.{hint}")
    _check_finite(argument, rows)
    return rows


def checked_rows(flow: Flow, x: Tensor, context: Tensor | None, names: tuple[str, str]) -> Rows:
    """Samples and contexts that fit a flow, in its type and place.

    Raises:
        ValueError: If they do not fit.
    """
    for name, rows, size in zip(names, (x, context), (flow.input_dim, flow.context_dim),
                                strict=True):
        if rows is None and size:
            raise ValueError(f"fit_density expected `{name}` of shape ({len(x)}, {size}), as the "
                             f"flow has context_dim={size}, got None.")
        if rows is not None and not size:
            raise ValueError(f"fit_density takes no `{name}` with a flow of context_dim=0. Build "
                             f"it with context_dim={rows.shape[-1]}.")
        if rows is not None and rows.shape[-1] != size:
            raise ValueError(f"fit_density expected `{name}` of shape (num_rows, {size}), as the "
                             f"flow has it, got {tuple(rows.shape)}.")
    if context is not None and len(context) != len(x):
        raise ValueError(f"fit_density expected `{names[1]}` to have a row for each of the "
                         f"{len(x)} of `{names[0]}`, got {len(context)}.")
    like = flow.base.zeros
    x, context = x.to(like), None if context is None else context.to(like)
    for name, rows in zip(names, (x, context), strict=True):
        if rows is not None:  # once more: single precision ends at 3e38
            _check_finite(name, rows)
    return x, context


def checked_samples(flow: Flow, x: Tensor, context: Tensor | None) -> Rows:
    """The same, of data to learn from.

    Raises:
        ValueError: If they do not fit, or have no density.
    """
    given = x
    x, context = checked_rows(flow, x, context, ("samples", "context"))
    if len(x) < 2:
        raise ValueError("fit_density expected `samples` to hold two rows or more, got one.")
    constant = (x == x[0]).all(0)
    if constant.any():
        column = int(constant.nonzero()[0])
        way_out = "Leave it out, or add noise." if (given == given[0]).all(0)[column] else \
            f"In {given.dtype} it has one: dtype={given.dtype}."
        raise ValueError(f"fit_density expected `samples` to vary, got {x[0, column].item():g} in "
                         f"every row of column {column}, which has no density. {way_out}")
    return x, context


def held_out_rows(flow: Flow, rows: Rows, validation: Any) -> tuple[Rows, Rows | None]:
    """Rows to train on, and rows to judge by, if any.

    Raises:
        ValueError: If ``validation`` is neither a fraction, nor samples that fit, nor None.
    """
    if validation is None:
        return rows, None
    if isinstance(validation, (int, float)):
        return _split(rows, validation)
    pair = validation if isinstance(validation, tuple) else (validation, None)
    if len(pair) != 2:
        raise ValueError("fit_density expected `validation` to be a fraction, samples, or samples "
                         f"and their context, got a tuple of {len(pair)}.")
    x, context = (None if part is None else as_rows("validation", part) for part in pair)
    if x is None:
        raise ValueError("fit_density expected `validation` to hold samples, got None.")
    if context is None and flow.context_dim:
        raise ValueError("fit_density expected `validation` to be samples and their context, as a "
                         "pair, got samples alone.")
    return rows, checked_rows(flow, x, context, ("validation", "validation[1]"))


def concerns_about(x: Tensor) -> list[str]:
    """What speaks against data having a density."""
    if len(x) < MANY_ROWS:
        return []
    distinct = torch.tensor([len(column.unique()) for column in x[:10 * MANY_ROWS].T])
    if int(distinct.min()) > FEW_VALUES * min(len(x), 10 * MANY_ROWS):
        return []
    return [f"column {int(distinct.argmin())} takes {int(distinct.min())} values only, on which "
            "a density can be as high as it likes. Leave it out, or add noise of the size of their "
            "distance"]


def _split(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    count = len(rows[0])
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise ValueError("fit_density expected `validation` to be a fraction between 0 and 1, "
                         f"held-out samples, or None, got {fraction!r}.")
    num_held_out = min(round(fraction * count), MOST_HELD_OUT)
    if not FEWEST_HELD_OUT <= num_held_out < count:
        raise ValueError(f"fit_density expected `validation` to hold out {FEWEST_HELD_OUT} rows or "
                         f"more and leave some, got {num_held_out} of {count}. Hold out none: "
                         "validation=None.")
    order = torch.randperm(count).to(rows[0].device)
    held_out, kept = order[:num_held_out], order[num_held_out:]
    x, context = rows
    pairs = [(x[part], None if context is None else context[part]) for part in (kept, held_out)]
    return pairs[0], pairs[1]


def _check_finite(argument: str, rows: Tensor) -> None:
    finite = torch.isfinite(rows).all(-1)
    if not finite.all():
        first, count = int((~finite).nonzero()[0]), int((~finite).sum())
        raise ValueError(f"fit_density expected `{argument}` to hold finite numbers, got NaN or "
                         f"infinity in {count} of {len(rows)} rows, the first at {first}. Leave "
                         f"them out: {argument}[np.isfinite({argument}).all(1)].")
