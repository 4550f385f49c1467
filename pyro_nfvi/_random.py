"""Random numbers: without a trace in the caller's random state, and many at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Put the random state of the CPU and the current GPU back afterwards.

    Args:
        seed: Seed to start from inside. Default: the state as it is.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def rng_state() -> list[Tensor]:
    """The random state of the CPU and, once it is in use, of the current GPU."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_rng_state(state: list[Tensor]) -> None:
    """Go back to what :func:`rng_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def map_random(function: Callable, rows: Tensor, randomness: str = "different") -> Any:
    """``torch.func.vmap`` of a function that draws random numbers, over the rows of a tensor.

    Raises:
        RuntimeError: If the function is one that vmap cannot batch.
    """
    with OutOfPlaceRandom(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.func.vmap(function, randomness=randomness)(rows)


def one_by_one(function: Callable, rows: Tensor) -> Any:
    """Results of a function at each row, stacked."""
    return tree_map(lambda *parts: torch.stack(parts), *[function(row) for row in rows])


def map_random_or_loop(function: Callable, rows: Tensor, randomness: str = "different") -> Any:
    """As :func:`map_random`, or row by row if the function is one that vmap cannot batch."""
    try:
        return map_random(function, rows, randomness)
    except (RuntimeError, ValueError):
        return one_by_one(function, rows)


class OutOfPlaceRandom(TorchFunctionMode):
    """Let distributions draw under ``torch.func.vmap``.

    Several of them fill an empty tensor in place, which vmap refuses, as the tensor has room for
    one draw only. What they get here is a new tensor.

    Example:
        >>> draw = lambda loc: torch.distributions.Normal(loc, 1.0).rsample()
        >>> with OutOfPlaceRandom():
        ...     torch.func.vmap(draw, randomness="different")(torch.zeros(3)).shape
        torch.Size([3])
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
                           ) -> Any:
        """Run a function of torch's; one that fills a tensor with random numbers, out of place."""
        fill: Callable | None = _FILLS.get(func)
        if fill is None or (kwargs or {}).get("generator") is not None:
            return func(*args, **(kwargs or {}))
        return fill(*args, **(kwargs or {}))


def _normal(like: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device) * std + mean


def _uniform(like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(like.shape, dtype=like.dtype, device=like.device) * (high - low) + low


def _exponential(like: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log1p(-_uniform(like)) / lambd


def _cauchy(like: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(torch.pi * (_uniform(like) - 0.5))


def _binomial(count: Tensor, prob: Tensor, generator: Any = None) -> Tensor:
    """Both with room for all draws: torch resizes a tensor that has not, with a warning."""
    return torch.binomial(count + torch.zeros_like(prob), prob, generator)


_FILLS: dict[Any, Callable] = {torch.Tensor.normal_: _normal, torch.Tensor.uniform_: _uniform,
          torch.Tensor.exponential_: _exponential, torch.Tensor.cauchy_: _cauchy,
          torch.binomial: _binomial}
