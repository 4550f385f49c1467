"""Argument checks, and the one wording of the errors they raise.

Every message names the owner, the argument, what was expected, what came, and the way out.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

MAX_INT = 2 ** 31  # no count is as large; torch's own limit is 2 ** 63


def type_name(value: Any) -> str:
    """Name of the type of ``value``, as error messages print it."""
    return type(value).__name__


def check_positive_int(owner: str, argument: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{owner} expected `{argument}` to be an integer >= {minimum}, "
                         f"got {value!r}.")
    if value >= MAX_INT:
        raise ValueError(f"{owner} expected `{argument}` to be an integer below 2**31, got "
                         f"{value!r}.")
    return value


def check_file_name(owner: str, path: Any) -> None:
    """Check that ``path`` is of a kind that names a file.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"{owner} expected `path` to be the path of a file, got {path!r}.")


def check_callables(owner: str, **arguments: Any) -> None:
    """Check that every argument is a function, and what builds a part no built part.

    Raises:
        ValueError: If one is not.
    """
    for name, value in arguments.items():
        if not callable(value):
            raise ValueError(f"{owner} expected `{name}` to be a function, got "
                             f"{type_name(value)}.")
        if name in ("recipe", "base", "affine") and isinstance(value, (nn.Module, Transform)):
            raise ValueError(f"{owner} expected `{name}` to be a function of the number of "
                             f"latents, got {type_name(value)}. Pass what builds it.")


def check_flag(owner: str, argument: str, value: Any) -> bool:
    """Return ``value`` if it is true or false.

    Raises:
        ValueError: If it is anything else.
    """
    if type_name(value) not in ("bool", "bool_") and not (isinstance(value, int)
                                                          and value in (0, 1)):
        raise ValueError(f"{owner} expected `{argument}` to be True or False, got {value!r}.")
    return bool(value)


def check_names(owner: str, argument: str, names: Any) -> list[str]:
    """Return ``names``, one string or several, as a list.

    Raises:
        ValueError: If it is anything else.
    """
    listed = [names] if isinstance(names, str) else \
        list(names) if isinstance(names, (list, tuple, set, frozenset, range)) else [names]
    if not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{owner} expected `{argument}` to be a list of names, got "
                         f"{names!r}.")
    return listed


def check_axes(owner: str, ax: Any) -> None:
    """Check that ``ax`` is None or something to draw on.

    Raises:
        ValueError: If it is neither.
    """
    if ax is not None and not hasattr(ax, "plot"):
        raise ValueError(f"{owner} expected `ax` to be matplotlib axes or None, got "
                         f"{type_name(ax)}. Make some: matplotlib.pyplot.subplots()[1].")


def check_positive_float(owner: str, argument: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number above zero.

    Raises:
        ValueError: If it is anything else.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not 0 < value < float("inf"):
        raise ValueError(f"{owner} expected `{argument}` to be a positive number, got {value!r}.")
    return float(value)


def check_seed(owner: str, seed: Any) -> int | None:
    """Return ``seed`` if it is an integer or None.

    Raises:
        ValueError: If it is anything else.
    """
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"{owner} expected `seed` to be an integer or None, got {seed!r}.")
    return seed


def check_seconds(owner: str, argument: str, value: Any) -> float:
    """Return ``value`` as a float if it is a number above zero, or infinity.

    Raises:
        ValueError: If it is anything else.
    """
    endless = isinstance(value, float) and value == float("inf")
    return value if endless else check_positive_float(owner, argument, value)


def check_tensor(owner: str, argument: str, value: Any, size: int) -> Tensor:
    """Return ``value`` if it is a floating-point tensor of shape ``(*batch, size)``.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{owner} expected `{argument}` to be a tensor of shape "
                         f"(*batch, {size}), got {type_name(value)}.")
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{owner} expected `{argument}` of shape (*batch, {size}), "
                         f"got {tuple(value.shape)}.")
    if not value.is_floating_point():
        raise ValueError(f"{owner} expected `{argument}` to hold floating-point numbers, "
                         f"got {value.dtype}. Convert it: {argument}.double().")
    return value


def check_context(owner: str, context: Any, context_dim: int) -> Tensor | None:
    """Return ``context`` if it fits a flow built with ``context_dim``.

    Raises:
        ValueError: If a context is missing, unexpected, or of another shape.
    """
    if context_dim == 0:
        if context is not None:
            raise ValueError(f"{owner} takes no `context` (it was built with context_dim=0). "
                             f"Build it with context_dim={_last_size(context)}.")
        return None
    if context is None:
        raise ValueError(f"{owner} expected `context` of shape (*batch, {context_dim}), got None. "
                         f"Pass it: {owner.lower()}(u, context).")
    return check_tensor(owner, "context", context, context_dim)


def check_dtype(owner: str, argument: str, value: Tensor, reference: Tensor | None) -> None:
    """Check that ``value`` has the dtype of ``reference``, a parameter; autocast converts itself.

    Raises:
        ValueError: If the dtypes differ.
    """
    if reference is None or value.dtype == reference.dtype or torch.is_autocast_enabled():
        return
    raise ValueError(f"{owner} expected `{argument}` of dtype {reference.dtype}, as its "
                     f"parameters, got {value.dtype}. Convert one: "
                     f"{argument}.to({reference.dtype}), or {owner.lower()}.to({value.dtype}).")


def check_sample_shape(owner: str, sample_shape: Any, argument: str = "sample_shape"
                       ) -> torch.Size:
    """Return ``sample_shape`` as a ``torch.Size``.

    Raises:
        ValueError: If it is no sequence of integers.
    """
    try:
        shape = torch.Size(sample_shape)
    except (TypeError, OverflowError):
        shape = None
    if shape is None or any(size < 0 for size in shape):
        raise ValueError(f"{owner} expected `{argument}` to be a tuple such as (100,), "
                         f"got {sample_shape!r}.")
    return shape


def broadcast_batch(owner: str, argument: str, value: Tensor, context: Tensor | None
                    ) -> tuple[Tensor, Tensor | None]:
    """Broadcast the batch shapes of ``value`` and ``context`` against each other.

    Raises:
        ValueError: If the batch shapes do not broadcast.
    """
    if context is None or value.shape[:-1] == context.shape[:-1]:
        return value, context
    try:
        batch = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{owner} expected the batch shapes of `{argument}` and `context` to broadcast, got "
            f"{tuple(value.shape)} and {tuple(context.shape)}.") from None
    return value.expand(*batch, value.shape[-1]), context.expand(*batch, context.shape[-1])


def _last_size(value: Any) -> Any:
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else "..."
