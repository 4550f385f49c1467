"""Layers of encoders and decoders, and the checks of their options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.nets import check_network


def dense(in_dim: int, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers, each followed by an activation."""
    return nn.Sequential(*[layer for a, b in pairwise([in_dim, *sizes])
                           for layer in (nn.Linear(a, b), activation())])


def nonlinear(kind: Callable[..., nn.Module], in_dim: int, out_dim: int, *args: Any, gated: bool,
              activation: Callable[[], nn.Module], **options: Any) -> list[nn.Module]:
    r"""A linear layer and its activation, or twice as wide and its gates: :math:`a\,\sigma(b)`."""
    if not gated:
        return [kind(in_dim, out_dim, *args, **options), activation()]
    return [kind(in_dim, 2 * out_dim, *args, **options), nn.GLU(-1 if kind is nn.Linear else -3)]


def map_sizes(sides: Sequence[int], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Sides of an image before and after each convolution with padding ``kernel_size // 2``."""
    sizes = [tuple(sides)]
    for stride in strides:
        sizes.append(tuple(-(-side // stride) for side in sizes[-1]))
    return sizes


def check_event_shape(owner: str, event_shape: Any, *forms: str) -> tuple[int, ...]:
    """Return the shape of one observation if it is one of the forms, such as ``"(T, F)"``.

    Raises:
        ValueError: If it is anything else.
    """
    if not forms:
        return check_sizes(owner, "event_shape", event_shape)
    is_one = isinstance(event_shape, Sequence) and not isinstance(event_shape, str)
    if not is_one or len(event_shape) not in [form.count(",") + 1 for form in forms]:
        raise ValueError(f"{owner} expected `event_shape` to be {' or '.join(forms)}, "
                         f"got {event_shape!r}.")
    return check_sizes(owner, "event_shape", event_shape)


def check_sizes(owner: str, argument: str, sizes: Any) -> tuple[int, ...]:
    """Return ``sizes`` if it is a sequence of positive integers.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise ValueError(f"{owner} expected `{argument}` to be a sequence of integers, "
                         f"got {sizes!r}. For one: {argument}=(64,).")
    return tuple(check_positive_int(owner, argument, size) for size in sizes)


def check_convolutions(owner: str, channels: Any, kernel_size: Any, activation: Any) -> None:
    """Check the options of a stack of convolutions.

    Raises:
        ValueError: If the channels are no sequence of positive integers, the kernel has no
            middle, or the activation builds no module.
    """
    check_sizes(owner, "channels", channels)
    check_network(owner, (), activation)
    if check_positive_int(owner, "kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"{owner} expected `kernel_size` to be odd, so that a kernel has a "
                         f"middle, got {kernel_size}. Take {kernel_size + 1}.")


def check_strides(owner: str, strides: Any, count: int, which: str) -> tuple[int, ...]:
    """Return one stride for each of ``count`` convolutions.

    Raises:
        ValueError: If they are of another number, or no positive integers.
    """
    each = (strides,) * count if isinstance(strides, int) else strides
    if not isinstance(each, Sequence) or isinstance(each, str) or len(each) != count:
        raise ValueError(f"{owner} expected `strides` to be an integer or a sequence of {count}, "
                         f"{which}, got {strides!r}.")
    return check_sizes(owner, "strides", each)
