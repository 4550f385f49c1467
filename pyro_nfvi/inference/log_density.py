"""A user's log density as one batched function, checked before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_nfvi._shapes import type_name

NUM_COMPARED = 3  # rows beyond D, so that rows and coordinates are not mistaken for each other


class LogDensity:
    """An unnormalised log density of rows, from a function of rows or of one row.

    A function of one row is batched by ``torch.func.vmap``, or row by row if that fails.

    Args:
        function: Takes points ``(n, D)`` and returns ``(n,)``, or takes ``(D,)`` and returns one
            number; made of torch operations.
        z: Some points to try it at, ``(n, D)``; ``n`` is at least ``D + NUM_COMPARED``.

    Attributes:
        reason: Why it is computed row by row, or an empty string.

    Raises:
        ValueError: If it is no such function, or is finite at none of the points.

    Example:
        >>> log_density = LogDensity(lambda z: -(z * z).sum(), torch.randn(5, 2))
        >>> log_density(torch.zeros(7, 2)).shape
        torch.Size([7])
    """

    def __init__(self, function: Callable[[Tensor], Any], z: Tensor) -> None:
        if not callable(function) or isinstance(function, Distribution):
            raise ValueError("fit_density expected `log_density` to be a function of points, got "
                             f"{type_name(function)}. Of a distribution, take its method log_prob.")
        self.function, self.reason = function, ""
        self.batched = _is_batched(function, z[:z.shape[-1] + NUM_COMPARED])
        if not self.batched:
            self._try_vmap(z[:NUM_COMPARED])
        self._check(z)

    def __call__(self, z: Tensor) -> Tensor:
        """Log density of points ``(*batch, D)``."""
        rows = z.reshape(-1, z.shape[-1])
        with pyro.validation_enabled(False):  # checks read values, which a batch does not have
            if self.batched:
                values = self.function(rows)
            elif not self.reason:
                values = torch.func.vmap(self.function)(rows)
            else:
                values = torch.stack([self.function(row) for row in rows])
        return values.to(z.dtype).reshape(z.shape[:-1])

    def first_bad_site(self, z: Tensor) -> str:
        """What the loop names when a particle ``(D,)`` has no finite log density."""
        return f"`log_density` at {shown(z)}"

    def _try_vmap(self, z: Tensor) -> None:
        single = torch.stack([self.function(row) for row in z])
        try:
            same = torch.allclose(self(z), single.to(z.dtype), rtol=1e-3, atol=1e-3, equal_nan=True)
            self.reason = "" if same else "torch.func.vmap of it gives other numbers"
        except RuntimeError as error:
            self.reason = str(error).split("\n")[0] or "torch.func.vmap fails on it"

    def _check(self, z: Tensor) -> None:
        """Refuse a function without a gradient, or without a finite value."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            values = self(z)
        if not values.requires_grad:
            raise ValueError("fit_density expected `log_density` to be made of torch operations on "
                             "its argument: its result has no gradient.")
        if not values.isfinite().any():
            raise ValueError(f"fit_density expected `log_density` to be finite where the flow "
                             f"starts, got {values[0].item():g} at {shown(z[0])} and no finite "
                             f"value at {len(z)} points. Start elsewhere: a flow whose last layer "
                             "is FixedLinear(loc, factor).")


@torch.no_grad()
def _is_batched(function: Callable[[Tensor], Any], z: Tensor) -> bool:
    """Whether the function takes rows; if not, it has to take one row."""
    value, error = _tried(function, z)
    if error is None and _is_real(value) and value.shape == (len(z),):
        parts = [_tried(function, row.unsqueeze(0))[0] for row in z]
        if all(_is_real(part) and part.shape == (1,) for part in parts):
            _check_alone(value, torch.cat(parts))
            return True
    single, single_error = _tried(function, z[0])
    if single_error is None and _is_real(single) and single.shape == ():
        return False
    wanted = (f"fit_density expected `log_density` to return real numbers of shape ({len(z)},) for "
              f"points {tuple(z.shape)}, or () for one point ({z.shape[-1]},)")
    if error is not None and single_error is not None:
        raise ValueError(f"{wanted}; it raised {type_name(error)}: {error}") from error
    got = value if error is None else single
    hint = " Squeeze it: .squeeze(-1)." if getattr(got, "shape", None) == (len(z), 1) else ""
    raise ValueError(f"{wanted}, got {_described(got)}.{hint}")


def _check_alone(together: Tensor, alone: Tensor) -> None:
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
        worst = int((together - alone).abs().nan_to_num().argmax())
        raise ValueError("fit_density expected `log_density` to give a row the same value alone "
                         f"and among others, got {alone[worst].item():g} and "
                         f"{together[worst].item():g}. Sum over coordinates only: .sum(-1).")


def _tried(function: Callable[[Tensor], Any], z: Tensor) -> tuple[Any, Exception | None]:
    try:
        with pyro.validation_enabled(False):
            return function(z), None
    except Exception as error:  # the user's own, which is shown if nothing else works
        return None, error


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type_name(value)


def shown(z: Tensor) -> str:
    """The first few coordinates of a point."""
    numbers = [f"{value:.3g}" for value in z.detach().flatten()[:4].tolist()]
    return f"({', '.join(numbers)}{', ...' if z.numel() > 4 else ''})"
