"""Optimisation steps on a compiled function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._random import rng_state, set_rng_state
from pyro_nfvi.engine.adam import AdamState
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.compiled import Compiled, Engine
from pyro_nfvi.engine.programs import CudaGraphProgram

BLOCK_BYTES = 2 ** 20  # random numbers drawn at once


class Stepper(Compiled):
    """Adam steps on a function that returns an ELBO and the gradient of its negative.

    Args:
        function: Returns the ELBO and the gradients, one a parameter.
        parameters: Tensors to optimise, which the function uses.
        tier: One of :data:`TIERS`, or ``"auto"``.
        num_steps: Number of steps planned, which decides how much compilation pays.
        feeds: Other tensors that the function uses, such as a minibatch: each step has its own.
        reduce: Makes of what the function returns, as one flat vector, the ELBO and the gradient:
            an average over processes, say.

    Attributes:
        state: Parameters and moments.
        elbo: The ELBO of each step made.
        failed: Draws of a step that was not finite; None if the function made them itself.
        raised: What it raised, if it did.

    Example:
        >>> x = torch.nn.Parameter(torch.zeros(()))
        >>> stepper = Stepper(lambda: [-(x - 2).square(), 2 * (x - 2)], [x], tier="eager")
        >>> stepper.run([0.1] * 200)
        200
        >>> stepper.state.write_back()
        >>> abs(x.item() - 2) < 0.1
        True
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], parameters: Sequence[Tensor],
                 tier: str = "auto", num_steps: int = 1000, feeds: Sequence[Tensor] = (),
                 reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self.state, self.feeds, self.reduce = AdamState(parameters), list(feeds), reduce
        self.seconds, self.made = 0.0, 0
        self.failed: list[Tensor] | None = None
        self.raised: torch.linalg.LinAlgError | None = None
        self.elbo: list[float] = []
        self.block: list[Tensor] = []  # noise, of which so many steps are used
        self.used = 0
        self.before: list[Tensor] = []  # the random state that the block was drawn from
        super().__init__(function, [*parameters, *feeds], tier, num_steps,
                         len(parameters) if reduce is None else 0)

    @property
    def engine(self) -> Engine:
        """Tier, reason and times so far."""
        each = 1e6 * self.seconds / self.made if self.made else math.nan
        return Engine(self.tier, self.reason, self.build_seconds, each)

    @property
    def draw_bytes(self) -> int:
        """Memory of the random numbers of one step."""
        return sum(d.num_bytes for d in self.recording.draws) if self.recording else 0

    def run(self, rates: Sequence[float], fed: Sequence[Tensor] = ()) -> int:
        """Make one step at each rate; stop before one that is not finite.

        Whatever ends the run, ``elbo`` and ``state`` hold the steps that were made.

        Args:
            rates: Learning rate of each step.
            fed: Values ``(num_steps, *shape)`` of each of the feeds.

        Returns:
            The number of steps made.
        """
        start, before = time.perf_counter(), len(self.elbo)
        self.failed = self.raised = None
        try:
            for part, given, draws in self._parts(rates, fed):
                if not self._make(part, given, draws):
                    break
        finally:
            made = len(self.elbo) - before
            self.seconds += time.perf_counter() - start
            self.made += made
        return made

    def inputs(self) -> list[Tensor]:
        """The present parameters and feeds."""
        return [tensor.detach().clone() for tensor in [*self.state.views(), *self.feeds]]

    def snapshot(self) -> dict[str, Any]:
        """Where the steps are, and their noise, as a file holds it."""
        held = self.recording is not None and 0 < self.used < self._block_size()
        return {"adam": self.state.snapshot(), "tier": self.tier, "rng": rng_state(),
                "elbo": torch.tensor(self.elbo, dtype=torch.float64),
                "block": self.before if held else None, "used": self.used if held else 0}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, bit for bit if the tier is the same."""
        self.state.restore(snapshot["adam"])
        self.elbo[:] = snapshot["elbo"].tolist()
        self.used = 0
        if snapshot["block"] is not None and self.recording is not None:
            set_rng_state(snapshot["block"])
            self._draw_block(self._block_size())
            self.used = snapshot["used"]
        set_rng_state(snapshot["rng"])

    def _block_size(self) -> int:
        """Number of steps whose noise is drawn at once."""
        return max(1, min(self.num_calls, BLOCK_BYTES // max(self.draw_bytes, 1)))

    def _draw_block(self, size: int) -> None:
        self.before = rng_state()
        self.block, self.used = self.draws(size), 0

    def _parts(self, rates: Sequence[float], fed: Sequence[Tensor]
               ) -> Iterator[tuple[Sequence[float], list[Tensor], list[Tensor] | None]]:
        """Pieces of the rates, their feeds and their noise.

        Noise is drawn in blocks of a set size: pieces depend on the clock, results may not.
        """
        if self.recording is None:
            yield rates, list(fed), None
            return
        size = self._block_size()
        while rates:
            if self.used in (0, size):
                self._draw_block(size)
            first, count = self.used, min(size - self.used, len(rates))
            yield (rates[:count], [values[:count] for values in fed],
                   [draw[first:first + count] for draw in self.block])
            rates, fed = rates[count:], [values[count:] for values in fed]

    def _make(self, rates: Sequence[float], fed: list[Tensor], draws: list[Tensor] | None
              ) -> bool:
        """Make the steps of one piece; whether all of them were finite."""
        before = len(self.elbo)
        if isinstance(self.program, CProgram | CudaGraphProgram) and self.reduce is None:
            assert draws is not None
            self.program.steps(self.state, rates, [*fed, *draws], self.elbo)
        else:
            self._steps(rates, fed, draws)
        made = len(self.elbo) - before
        finite = made == len(rates)
        if draws is not None:
            self.used += made + (not finite)
            self.failed = None if finite else [draw[made] for draw in draws]
        return finite

    def _steps(self, rates: Sequence[float], fed: Sequence[Tensor],
               draws: Sequence[Tensor] | None) -> None:
        for i, rate in enumerate(rates):
            given = None if draws is None else [draw[i] for draw in draws]
            elbo, gradient = self._values([values[i] for values in fed], given)
            value, norm = elbo.item(), torch.linalg.vector_norm(gradient).item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                return
            self.state.update(gradient, norm, rate)
            self.elbo.append(value)

    def _values(self, fed: Sequence[Tensor], draws: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """The ELBO and the flat gradient of a step; nan where a matrix has no factor."""
        try:
            outputs = self.program([*self.state.views(), *fed], draws)  # type: ignore[arg-type]
            flat = torch.cat([output.reshape(-1) for output in outputs])
        except torch.linalg.LinAlgError as error:  # a model's Cholesky factor, say
            self.raised = error
            flat = self.state.live.new_full((self.state.size + 1 + (self.reduce is not None),),
                                            torch.nan)
        flat = flat if self.reduce is None else self.reduce(flat)
        return flat[0], flat[1:].to(self.state.live.dtype)
