"""Data as a VAE takes them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pyro_nfvi._shapes import type_name
from pyro_nfvi.inference import ArrayLoader, minibatches
from pyro_nfvi.inference.loader import LoaderFeed

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


def checked_loader(loader: ArrayLoader, mask: Any, checked: Callable[..., Data]) -> ArrayLoader:
    """A loader whose rows, all of them read once, are data, or data and mask.

    Raises:
        ValueError: If they are not.
    """
    if mask is not None or len(loader.columns) > 2:
        got = f"{len(loader.columns)} arrays" if mask is None else "a mask beside it"
        raise ValueError(f"VAE expected a loader of data, or of data and mask, got {got}. Say: "
                         "ArrayLoader(x, mask, batch_size=128).")
    size = max(1, minibatches.BLOCK_BYTES // loader.row_bytes)
    for start in range(0, loader.num_rows, size):
        rows = loader.between(start, min(start + size, loader.num_rows))
        checked(*(*rows, None)[:2])
    return loader


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

    def some(self, num_data: int) -> Data:
        """The first data and their mask, so many or all."""
        x, mask = (*(part[:num_data] for part in self.parts), None)[:2]
        return x, mask

    def take(self, count: int) -> list[Tensor]:
        """The next batches: each tensor of ``live`` with a first dimension of steps."""
        weights = [self.weight(step) for step in range(self.step, self.step + count)]
        return [*super().take(count), self.live[-1].new_tensor(weights)]


class LoadedMinibatches:
    """The same from a loader, whose batches go on from one epoch into the next.

    Args:
        loader: Rows of data, or of data and mask.
        shaped: Gives them the type and place of the VAE.
        weight: Weight of the KL divergence at a step.

    Attributes:
        live: Data, mask (if any), which of them count (all do), and the weight.
        num_batches: Number of batches of an epoch.
    """

    def __init__(self, loader: ArrayLoader, shaped: Callable[..., Data],
                 weight: Callable[[int], float]) -> None:
        self.feed, self.num_batches = LoaderFeed(loader), len(loader)
        self.shaped, self.weight = shaped, weight
        self.live = [values[0].clone() for values in self._one(0)]

    @property
    def epoch(self) -> int:
        """Number of epochs completed by the last step supplied."""
        return self.feed.epoch

    @property
    def most(self) -> int:
        """Largest number of steps to supply at once."""
        return self.feed.most

    def take(self, count: int) -> list[Tensor]:
        """The next batches: each tensor of ``live`` with a first dimension of steps."""
        step = self.feed.step
        return self._batches(self.feed.take(count), step)

    def rewind(self, step: int) -> None:
        """Go back to one of the steps supplied last, whose batch becomes the live one."""
        self.feed.rewind(step)
        for live, values in zip(self.live, self._one(step), strict=True):
            live.copy_(values[0])

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where the rows are at one of the steps supplied last, as a file holds it."""
        return self.feed.snapshot(step)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.feed.restore(snapshot)

    def some(self, num_data: int) -> Data:
        """So many data and their mask, or all if there are fewer."""
        return self.shaped(*(*self.feed.first(num_data), None)[:2])

    def _one(self, step: int) -> list[Tensor]:
        return self._batches([rows.unsqueeze(0) for rows in self.feed.live], step)

    def _batches(self, rows: Sequence[Tensor], step: int) -> list[Tensor]:
        count, size = rows[0].shape[:2]
        data = self.shaped(*(*(part.flatten(0, 1) for part in rows), None)[:2])
        batches = [part.unflatten(0, (count, size)) for part in data if part is not None]
        counts = torch.ones(count, size, dtype=torch.bool, device=data[0].device)
        weights = [self.weight(first) for first in range(step, step + count)]
        return [*batches, counts, data[0].new_tensor(weights)]


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
