"""The log joint of all rows of a loader: what a fit to minibatches is to be judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm

from pyro_nfvi._shapes import check_tensor
from pyro_nfvi.engine.compiled import Compiled, try_record
from pyro_nfvi.engine.record import NotRecordable, is_recording
from pyro_nfvi.guides.layout import LatentLayout
from pyro_nfvi.inference.batch_stream import counted
from pyro_nfvi.inference.checks import check_data
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.scaling import GivenRows, check_others, check_scaling
from pyro_nfvi.inference.score import value_and_gradient

MOST_POINTS = 256  # scored at once
MOST_NUMBERS = 2 ** 22  # in the largest tensor that is made at once
MOST_ROWS = 2 ** 14
FEW_CALLS = 20  # of the model, which compilation is not worth
SMALL = 8  # rows, and points, that tell how large tensors become

Evaluate = Callable[[Tensor, Sequence[Tensor]], Tensor]  # points and rows -> columns of values


class AllData(LogJoint):
    r"""Log joint density of a model and all rows of a loader, over a batch of latents at once.

    .. math:: \log p(x, z) = \sum_b \frac{n_b}{N} \log p_b(z), \qquad
              \log p_b(z) = \log p(z) + \frac{N}{n_b} \log p(x_b \mid z)

    for batches :math:`b` of :math:`n_b` rows out of :math:`N`, which is exact. Each row is read
    once a call, however many latents there are. Sums are in double precision. The model is
    compiled once for each number of latents, if there are many rows.

    It has a gradient, which reads all rows too. What else a log joint tells, such as a trace, is
    that of the first batch.

    Args:
        model: The Pyro model of a minibatch.
        args: Its positional arguments before those of a batch.
        kwargs: Its keyword arguments beside those of a batch.
        layout: Its latent sites.
        feed: The loader.
        dtype: Default dtype while the model runs. Default: torch's own.
        progress: Whether to show a progress bar.

    Shape:
        z: ``(*particles, layout.size)``; result: ``(*particles,)`` in double precision.

    Raises:
        ValueError: If the model does not scale its likelihood from batches of any size to all
            rows, or the loader does not give them all.

    Attributes:
        num_rows: Number of rows, as the model says.
    """

    all_at_once = True
    num_rows: int

    def __init__(self, model: Callable, args: tuple, kwargs: dict, layout: LatentLayout,
                 feed: LoaderFeed, dtype: torch.dtype | None = None, progress: bool = False
                 ) -> None:
        self.feed, self.progress = feed, progress
        self._given = model, args, kwargs
        passes = feed.passes()
        self.example = [rows.clone() for rows in next(passes)]
        size, num_rows = len(self.example[0]), feed.num_rows
        if num_rows is None and next(passes, None) is None:  # a single batch
            num_rows = size
        super().__init__(model, *feed.arguments(args, kwargs, self.example), layout, dtype)
        plate = check_scaling(self, size, num_rows)
        self.num_rows = plate.full_size
        self._compiled: dict[tuple, Compiled] = {}
        self._width: float | None = None  # numbers made for a row and a point, at most
        self._checked = False  # whether all rows have been looked at
        self.whole = not self._follows(plate)  # whether rows come all at once only
        self.model = GivenRows(plate.name)(model)

    @property
    def given(self) -> tuple[Callable, tuple, dict]:
        """The user's model and arguments, without those of a minibatch."""
        return self._given

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint density of every particle."""
        if is_recording():
            raise NotRecordable("it reads all data, batch by batch")
        z = check_tensor("AllData", "z", z, self.layout.size)
        flat = z.reshape(-1, self.layout.size)
        if torch.is_grad_enabled() and z.requires_grad:
            result: Tensor = _WithGradient.apply(flat, self)
        else:
            result = self.total(flat.detach(), False)[:, 0]
        return result.reshape(z.shape[:-1])

    @torch.no_grad()
    def try_batched(self, z: Tensor) -> None:
        """Find out, on a few particles and a batch, whether one run gives what single runs give."""
        one = self.of_batch(self.example)
        one.try_batched(z)
        self.batched, self.reason = one.batched, one.reason

    def total(self, z: Tensor, gradient: bool) -> Tensor:
        """Log joint ``(n, 1)`` of points ``(n, D)``, or with its gradient ``(n, 1 + D)``."""
        chunks = _chunks(z)
        result = z.new_zeros(len(z), 1 + gradient * z.shape[1], dtype=torch.float64)
        if not len(z):
            return result
        num_rows = self._rows_at_once(chunks[0])
        num_calls = len(chunks) * self.num_rows // num_rows
        for batch in self._passed(num_rows):
            evaluate = self._compiled_for(chunks[0], batch, gradient, num_calls) \
                if num_calls > FEW_CALLS and len(batch[0]) == num_rows else self._plainly(gradient)
            values = torch.cat([evaluate(points, batch) for points in chunks])[:len(z)]
            if not self._checked:
                self._check(batch, z[0], values)
            result.add_(values, alpha=len(batch[0]) / self.num_rows)
        self._checked = True
        return result

    def _check(self, batch: Sequence[Tensor], point: Tensor, values: Tensor) -> None:
        """Refuse rows that no step of a fit may have seen, and none should."""
        one = self.of_batch(batch)
        check_data("NFVI", one, point)
        if values[:, 0].isnan().all():
            raise ValueError("NFVI expected rows of `loader` to have a log density, got NaN at "
                             f"site {one.first_bad_site(point)}. Look for NaN in the data.")

    def _passed(self, batch_size: int) -> Iterator[list[Tensor]]:
        """All rows once, with a progress bar, and counted."""
        with tqdm(total=self.num_rows, desc="all data", unit=" rows",
                  disable=not self.progress,
                  leave=False) as bar:
            for batch in counted(self.feed.passes(batch_size), self.num_rows):
                yield batch
                bar.update(len(batch[0]))

    def _plainly(self, gradient: bool) -> Evaluate:
        """What evaluates points and rows as they come."""
        def evaluate(points: Tensor, batch: Sequence[Tensor]) -> Tensor:
            return _columns(self.of_batch(batch), points, gradient)[1]
        return evaluate

    def _compiled_for(self, points: Tensor, batch: Sequence[Tensor], gradient: bool,
                      num_calls: int) -> Evaluate:
        """What evaluates so many points and rows; compiled once."""
        key = (len(points), points.dtype, len(batch[0]), gradient)
        if key not in self._compiled:
            live = [tensor.detach().clone() for tensor in (points, *batch)]
            log_joint = self.of_batch(live[1:])
            self._compiled[key] = Compiled(lambda: _columns(log_joint, live[0], gradient), live,
                                           num_calls=num_calls)
        compiled = self._compiled[key]

        def evaluate(points: Tensor, batch: Sequence[Tensor]) -> Tensor:
            if compiled.recording is None:
                return compiled.python([points, *batch])[1]
            draws = [draw[0] for draw in compiled.draws(1)]
            return compiled.program([points, *batch], draws)[1]
        return evaluate

    def of_set_rows(self) -> LogJoint | None:
        """That of some rows from all over; None if the loader has an order of its own."""
        rows = self.feed.opening()
        return None if rows is None else self.of_batch(rows)

    def of_batch(self, batch: Sequence[Tensor]) -> LogJoint:
        """The log joint that a batch stands for."""
        one = LogJoint(self.model, *self.feed.arguments(*self._given[1:], batch), self.layout,
                       self.dtype)
        one.batched, one.reason = self.batched, self.reason
        return one

    def _rows_at_once(self, points: Tensor) -> int:
        """So many rows that the tensors the model makes of them do not become too large."""
        if self.whole:
            return self.num_rows
        if self._width is None:
            few = [rows[:SMALL] for rows in self.example]
            live = [tensor.detach().clone() for tensor in (points[:SMALL], *few)]
            log_joint = self.of_batch(live[1:])
            recording, _ = try_record(lambda: _columns(log_joint, live[0], True), live)
            nodes = () if recording is None else recording.graph.graph.nodes
            sizes = [math.prod(node.meta["shape"]) for node in nodes if "shape" in node.meta]
            small = len(live[0]) * len(live[1])
            self._width = max([*sizes, *(small * rows[0].numel() for rows in few)]) / small
        return int(min(MOST_ROWS, max(1, MOST_NUMBERS / (self._width * len(points)))))

    def _follows(self, plate: Any) -> bool:
        """Whether the plate of the data has the size of the batch, as the last may be smaller."""
        size = len(self.example[0])
        num = max(1, size // 2)
        few = [rows[:num] for rows in self.example]
        half, twice = self.of_batch(few), self.of_batch([torch.cat([rows, rows]) for rows in few])
        try:
            follows = all(check_scaling(one, count, self.num_rows)
                          for one, count in ((half, num), (twice, 2 * num)))
        except ValueError:  # Pyro's, that plate and data differ, or ours
            follows = False
        if follows:
            check_others(half, twice, num, plate)
            return True
        if self.feed.num_own == size == self.num_rows:
            return False
        raise ValueError(f"NFVI expected plate {plate.name!r} to have as many rows as the batch, "
                         f"of whatever size. Write: with pyro.plate({plate.name!r}, "
                         f"{self.num_rows}, subsample_size=len(x)):")


class _WithGradient(torch.autograd.Function):
    """The log joint of all rows, whose gradient is summed over the batches on the way."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, all_data: AllData) -> Tensor:
        both = all_data.total(z.detach(), True)
        ctx.save_for_backward(both[:, 1:])
        ctx.dtype = z.dtype
        return both[:, 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        gradient, = ctx.saved_tensors
        return (outer.unsqueeze(-1) * gradient).to(ctx.dtype), None


def _chunks(z: Tensor) -> Sequence[Tensor]:
    """Points in pieces of one size; the last is filled up."""
    count = max(1, -(-len(z) // MOST_POINTS))
    size = -(-len(z) // count)
    return torch.cat([z, z[:1].expand(count * size - len(z), -1)]).split(max(1, size))


def _columns(log_joint: LogJoint, points: Tensor, gradient: bool) -> list[Tensor]:
    """A sum, and side by side the log joint of each point and, if asked for, its gradient."""
    if not gradient:
        with torch.no_grad():
            log_p = log_joint(points)
        return [log_p.sum(), log_p.unsqueeze(-1)]
    log_p, score = value_and_gradient(log_joint, points)
    return [log_p.sum(), torch.cat([log_p.unsqueeze(-1), score], -1)]
