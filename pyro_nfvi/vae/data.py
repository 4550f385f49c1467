"""Data as a VAE takes them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pyro_nfvi._shapes import type_name
from pyro_nfvi.inference import minibatches

if TYPE_CHECKING:
    from pyro_nfvi.vae.likelihoods import Likelihood

Data = tuple[Tensor, Tensor | None]  # data and what of them was seen


def shaped_data(x: Any, mask: Any, likelihood: Likelihood, like: Tensor) -> Data:
    """Data and mask of the right shape, in the type and place of ``like``, zero where unseen.

    Raises:
        ValueError: If a shape or type is another.
    """
    x, mask = _with_lengths(x, mask, likelihood)
    shape = tuple(likelihood.event_shape)
    wanted = f"(num_data, {', '.join(map(str, shape))})" if shape else "(num_data,)"
    if not isinstance(x, Tensor):
        way_out = "New data come from vae.generate(100)." if x is None else \
            "Convert it: torch.as_tensor(x)."
        raise ValueError(f"VAE expected `x` to be a tensor of shape {wanted}, got {type_name(x)}. "
                         f"{way_out}")
    if x.dim() != 1 + len(shape) or tuple(x.shape[1:]) != shape:
        sizes = ", ".join(map(str, (-1, *shape)))
        fits = shape and x.numel() and not x.numel() % likelihood.event_shape.numel()
        raise ValueError(f"VAE expected `x` of shape {wanted}, got {tuple(x.shape)}."
                         + (f" If these are the same data: x.reshape({sizes})." if fits else ""))
    x = x.to(like)
    if mask is None:
        return x, None
    if isinstance(mask, Tensor) and 0 < mask.dim() < x.dim() \
            and mask.shape == x.shape[:mask.dim()]:  # of whole steps of a sequence, say
        mask = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())).expand(x.shape)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type_name(mask)
        raise ValueError(f"VAE expected `mask` to be a boolean tensor of shape {tuple(x.shape)}, "
                         f"true where x was seen, got {got}.")
    mask = mask.to(like.device)
    return x.where(mask, x.new_zeros(())), mask


def checked_data(x: Any, mask: Any, likelihood: Likelihood, like: Tensor) -> Data:
    """The same, after a look at the values.

    Raises:
        ValueError: If there are no data, a row has nothing seen, or a seen value is outside the
            support of the likelihood.
    """
    x, mask = shaped_data(x, mask, likelihood, like)
    if not len(x):
        raise ValueError("VAE expected `x` to hold at least one datum, got none.")
    if mask is not None and not (some := mask.reshape(len(mask), -1).any(1)).all():
        raise ValueError(f"VAE expected every datum to have something seen; that at "
                         f"{int((~some).nonzero()[0])} has nothing. Leave such data out: "
                         f"seen = mask.reshape(len(mask), -1).any(1); x[seen], mask[seen].")
    likelihood.check("VAE", x, mask)
    return x, mask


class Minibatches(minibatches.Minibatches):
    """Data in random order, batch by batch and epoch by epoch: the feed of a training loop.

    Args:
        data: Data and mask.
        batch_size: Size of a batch.
        weight: Weight of the KL divergence at a step.

    Attributes:
        live: Data, mask (if any), which of them count, and the weight.
    """

    def __init__(self, data: Data, batch_size: int, weight: Callable[[int], float]) -> None:
        super().__init__([part for part in data if part is not None], batch_size)
        self.weight = weight
        self.live.append(data[0].new_ones(()))

    def take(self, count: int) -> list[Tensor]:
        """The next batches: each tensor of ``live`` with a first dimension of steps."""
        weights = [self.weight(step) for step in range(self.step, self.step + count)]
        return [*super().take(count), self.live[-1].new_tensor(weights)]


def _with_lengths(x: Any, mask: Any, likelihood: Likelihood) -> tuple[Any, Any]:
    """Packed sequences, padded, with a mask."""
    if not isinstance(x, PackedSequence):
        return x, mask
    if mask is not None:
        raise ValueError("VAE takes no `mask` with a packed sequence, which knows its lengths. "
                         "Leave it out, or pad: pad_packed_sequence(x, batch_first=True).")
    longest = likelihood.event_shape[0] if likelihood.event_shape else 0
    if len(x.batch_sizes) > longest:
        raise ValueError(f"VAE expected sequences of at most {longest} steps, as `event_shape` "
                         f"says, got up to {len(x.batch_sizes)}. Build the likelihood with more.")
    padded, lengths = pad_packed_sequence(x, batch_first=True, total_length=longest)
    seen = torch.arange(longest) < lengths.unsqueeze(-1)
    seen = seen.reshape(*seen.shape, *[1] * (padded.dim() - 2)).expand(padded.shape)
    return padded, seen
