"""Minibatches: rows of data in random order, as a training loop takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2 ** 26  # of minibatches gathered at once


class Minibatches:
    """Rows in random order, batch by batch and epoch by epoch: the feed of a training loop.

    The last batch of an epoch is filled up with other rows, marked as not to count.

    Args:
        parts: Tensors of as many rows each, which belong together.
        batch_size: Size of a batch.

    Attributes:
        live: A batch of each part, and which of its rows count.
        most: Largest number of steps to supply at once.
        step: Number of steps supplied.
    """

    def __init__(self, parts: Sequence[Tensor], batch_size: int) -> None:
        self.parts = [part.contiguous() for part in parts]  # row by row
        self.num_rows = len(self.parts[0])
        self.batch_size = min(batch_size, self.num_rows)
        self.num_batches = -(-self.num_rows // self.batch_size)  # an epoch
        # With a generator of its own: batches are ordered ahead of the noise of other steps, by
        # the clock.
        seed = int(torch.randint(2 ** 62, ()))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = self.supplied = torch.empty(0, self.batch_size, dtype=torch.long)
        self.step = 0
        batch_bytes = self.batch_size * sum(part[0].nbytes for part in self.parts)
        self.most = max(1, BLOCK_BYTES // batch_bytes)
        first = torch.arange(self.batch_size)
        counts = torch.ones(self.batch_size, dtype=torch.bool, device=self.parts[0].device)
        self.live = [*(part[first] for part in self.parts), counts]

    @property
    def epoch(self) -> int:
        """Number of epochs completed by the last step supplied."""
        return self.step // self.num_batches

    def take(self, count: int) -> list[Tensor]:
        """The next batches: each tensor of ``live`` with a first dimension of steps."""
        while len(self.order) < count:
            self.order = torch.cat([self.order, self._epoch()])
        now, self.order = self.order[:count], self.order[count:]
        self.step, self.supplied, device = self.step + count, now, self.parts[0].device
        counts = now >= 0
        place = torch.where(counts, now, -1 - now).to(device)
        rows = [part.index_select(0, place.view(-1)).view(*place.shape, *part.shape[1:])
                for part in self.parts]
        return [*rows, counts.to(device)]

    def rewind(self, step: int) -> None:
        """Go back to one of the steps supplied last, whose batch becomes the live one."""
        self.restore(self.snapshot(step))
        order = self.order
        for live, values in zip(self.live, self.take(1), strict=True):
            live.copy_(values[0])
        self.order, self.step = order, step

    def snapshot(self, step: int) -> dict[str, Any]:
        """The order of the batches from one of the steps supplied last, as a file holds it."""
        unused = self.step - step
        order = torch.cat([self.supplied[len(self.supplied) - unused:], self.order])
        return {"step": step, "order": order, "generator": self.generator.get_state()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.step, self.order = snapshot["step"], snapshot["order"]
        self.supplied = self.order[:0]
        self.generator.set_state(snapshot["generator"])

    def _epoch(self) -> Tensor:
        """Places of one epoch's batches; those that do not count are written as -1 - place."""
        order = torch.randperm(self.num_rows, generator=self.generator)
        extra = self.num_batches * self.batch_size - self.num_rows
        return torch.cat([order, -1 - order[:extra]]).view(self.num_batches, self.batch_size)
