"""The log joint with its gradient, batched, recorded and counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._memory import computed_bytes
from pyro_nfvi.engine.compiled import Compiled
from pyro_nfvi.inference.importance import bisected, scored

FAILURE_WORK = 1000.0  # times the work, if points have to be told apart one by one
UNKNOWN_WORK = 1e5  # numbers a point, of a model that cannot be recorded
BATCH_BYTES = 5e8  # computed at once, all of which are alive while a batch is recorded
BACKWARD = 3  # times the numbers of the log joint, for its gradient as well


class Score:
    r"""Log joint and its gradient, the score, at a batch of latents.

    .. math:: z \mapsto \log p(x, z),\ \nabla_z \log p(x, z)

    The model is recorded once for every batch size, and the graph runs from then on; a batch
    that takes much memory is computed part by part. Where the
    log joint or its gradient is not finite, the log joint is minus infinity and the gradient
    zero. A model that draws minibatches keeps to one, so that two calls can be compared.

    Args:
        log_joint: The model and its data, or another log density of rows.

    Shape:
        z: ``(n, D)``; result: ``(n,)`` and ``(n, D)``.

    Attributes:
        evaluations: Number of gradients computed so far.
        non_finite: How many of them were not finite.
    """

    def __init__(self, log_joint: Callable[[Tensor], Tensor]) -> None:
        self.log_joint = log_joint
        self.evaluations = self.non_finite = 0
        self._work: float | None = None  # numbers a point of the first batch that was recorded
        self.failed = False  # whether a matrix had no factor somewhere, which takes a search
        self._compiled: dict[int, tuple[Tensor, Compiled, list[Tensor]]] = {}
        self._each: float | None = None  # bytes computed for one point

    @property
    def noisy(self) -> bool:
        """Whether the model draws random numbers of its own, minibatches say."""
        return any(draws for _, _, draws in self._compiled.values())

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and gradient of every point."""
        log_p, gradient = self._in_parts(z)
        finite = log_p.isfinite() & gradient.isfinite().all(-1)
        self.evaluations += len(z)
        self.non_finite += int((~finite).sum())
        return (log_p.where(finite, log_p.new_tensor(-torch.inf)),
                gradient.where(finite.unsqueeze(-1), gradient.new_zeros(())))

    @property
    def work(self) -> float:
        """Numbers computed for the gradient at one point: a measure of cost without a clock."""
        harder = FAILURE_WORK if self.failed else 1.0
        for count, (_, compiled, _) in self._compiled.items():
            if self._work is None and compiled.recording is not None:
                self._work = compiled.recording.num_computed / count
        return UNKNOWN_WORK if self._work is None else harder * self._work

    @property
    def value_work(self) -> float:
        """The same for a value: far more where the model runs for one point after the other."""
        return self.work * self._one_by_one

    @property
    def _one_by_one(self) -> float:
        return FAILURE_WORK if getattr(self.log_joint, "reason", "") else 1.0

    def snapshot(self) -> list[Any]:
        """What later decisions depend on, as a file holds it."""
        _ = self.work
        return [self.evaluations, self.non_finite, self.failed, self._work]

    def restore(self, snapshot: list[Any]) -> None:
        """Go on from a snapshot."""
        self.evaluations, self.non_finite, self.failed, self._work = snapshot

    @torch.no_grad()
    def estimated_work(self, z: Tensor) -> float:
        """What :attr:`work` will be, about, from the values at a few points."""
        return self._one_by_one * self._bytes_each(z) / z.element_size()

    @torch.no_grad()
    def value(self, z: Tensor) -> Tensor:
        """Log joint of every point, without a gradient; minus infinity where there is none."""
        log_p = scored(self.log_joint, z)
        return log_p.where(log_p.isfinite(), log_p.new_tensor(-torch.inf))

    def _in_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As many points at a time as memory holds, in parts of one size: each is recorded."""
        most = self._at_once(z)
        if len(z) <= most:
            return self._raw(z)
        size = -(-len(z) // -(-len(z) // most))
        padded = torch.cat([z, z[-1:].expand(-len(z) % size, -1)])
        parts = [self._raw(part) for part in padded.split(size)]
        log_p, gradient = (torch.cat(values)[:len(z)] for values in zip(*parts, strict=True))
        return log_p, gradient

    def _at_once(self, z: Tensor) -> int:
        return max(1, int(BATCH_BYTES / max(self._bytes_each(z), 1.0)))

    @torch.no_grad()
    def _bytes_each(self, z: Tensor) -> float:
        """Memory computed for the gradient at one point, about."""
        if self._each is None:
            few = z[:2]
            self._each = BACKWARD * computed_bytes(lambda: self._quietly(few)) / max(len(few), 1)
        return self._each

    def _quietly(self, z: Tensor) -> None:
        with suppress(torch.linalg.LinAlgError):
            self.log_joint(z)

    def _raw(self, z: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._batch(z)
        except torch.linalg.LinAlgError:  # at some point a matrix has no factor
            self.failed = True
            return self._split(z)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Find the points without a value, which get nan; the others keep theirs."""
        def side_by_side(part: Tensor) -> Tensor:
            log_p, gradient = value_and_gradient(self.log_joint, part)
            return torch.cat([log_p.unsqueeze(-1), gradient], -1)
        both = bisected(side_by_side, z, z.new_full((1, 1 + z.shape[-1]), torch.nan))
        return both[:, 0], both[:, 1:]

    def _batch(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if len(z) not in self._compiled:
            self._compiled[len(z)] = self._record(z)
        live, compiled, draws = self._compiled[len(z)]
        if compiled.recording is None:
            with torch.no_grad():
                live.copy_(z)
            _, gradient, log_p = compiled.python.function()
        else:
            _, gradient, log_p = compiled.program([z], draws)
        return log_p.detach(), gradient.detach()

    def _record(self, z: Tensor) -> tuple[Tensor, Compiled, list[Tensor]]:
        live = z.detach().clone()

        def function() -> list[Tensor]:
            log_p, gradient = value_and_gradient(self.log_joint, live)
            return [log_p.sum(), gradient, log_p]
        compiled = Compiled(function, [live], "fx")
        return live, compiled, [draw[0] for draw in compiled.draws(1)] \
            if compiled.recording is not None else []


def elbo_of(terms: Tensor, dim: int = -1) -> Tensor:
    r"""ELBO from terms :math:`\log p - \log q` of draws, some of which may have no density.

    It is that of the guide cut down to where there is density, which for weights is the same
    guide: the mean over the finite terms, plus the log of their fraction.
    """
    finite = terms.isfinite()
    count = finite.sum(dim)
    mean = terms.where(finite, terms.new_zeros(())).sum(dim) / count.clamp(min=1)
    return mean + (count / terms.shape[dim]).log()


def value_and_gradient(log_joint: Callable[[Tensor], Tensor], live: Tensor
                       ) -> tuple[Tensor, Tensor]:
    """Log joint density of every particle, and its gradient."""
    with torch.enable_grad():
        z = live.detach().requires_grad_()
        log_p = log_joint(z)
        if not log_p.requires_grad:  # improper: a flat prior, and no data
            return log_p, torch.zeros_like(live)
        gradient, = torch.autograd.grad(log_p.sum(), z, allow_unused=True, materialize_grads=True)
    return log_p.detach(), gradient
