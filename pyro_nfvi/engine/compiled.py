"""A function compiled by the fastest tier that works, and checked against itself."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.programs import (
    CudaGraphProgram,
    GraphProgram,
    InductorProgram,
    PythonProgram,
)
from pyro_nfvi.engine.record import NotRecordable, Recording, record

log = logging.getLogger("pyro_nfvi")
HIDDEN_STATE = ("run again, the model differs from its recording: it depends on Python state "
                "that changes, on random numbers that are not torch's, or on numbers "
                "read by .tolist() or .numpy()")
#: Ways to compute a step; ``compile="auto"`` takes the fastest that works.
TIERS = ("c", "inductor", "cuda_graph", "fx", "eager")
Program = CProgram | GraphProgram | PythonProgram
ATTEMPTS = 5  # to record, if a factorization fails
NOTICED, SLOWER = 0.01, 1.2  # seconds of a call, and times the model's, that are too slow
WORTH_INDUCTOR = 60.0  # seconds a fit must take before a minute of compilation pays
# Largest differences from Python that rounding explains: of the value, and of its gradient.
TOLERANCES = {torch.float64: (1e-8, 1e-5)}
COARSE = (1e-4, 2e-2)


@dataclass(frozen=True)
class Engine:
    """How a fit was computed.

    Attributes:
        tier: ``"c"`` (generated code), ``"inductor"``, ``"cuda_graph"``, ``"fx"`` (the recorded
            graph, operation by operation) or ``"eager"`` (the model itself, run again each step).
        reason: Why not a faster one, or an empty string.
        build_seconds: Time to record, compile and check.
        microseconds: Time of a step, noise included.

    Example:
        >>> Engine("c", "", build_seconds=0.8, microseconds=9.5).tier
        'c'
    """

    tier: str
    reason: str
    build_seconds: float = field(compare=False)
    microseconds: float = field(compare=False)


class Compiled:
    """A function of tensors, recorded once and compiled by the first tier that works.

    Before it is trusted it is compared with the function itself on fresh noise: one that reads
    changing Python state is found out, and runs as it is.

    Args:
        function: Returns a value and its gradients, and takes its inputs from where they are.
        inputs: The tensors it depends on.
        tier: One of :data:`TIERS`, or ``"auto"``.
        num_calls: Number of calls planned, which decides how much compilation pays.
        num_trained: How many of the inputs, from the first, are parameters that generated code
            is to update itself.
        python: What to compare with. Default: the function.

    Attributes:
        recording: The graph; None if the function runs as it is.
        program: What computes it.
        tier: The tier in use.
        reason: Why not a faster one, or an empty string.

    Example:
        >>> x = torch.ones(3)
        >>> energy = Compiled(lambda: [x.square().sum(), 2 * x], [x], tier="fx")
        >>> energy.tier, energy.program(energy.inputs(), [])[1]
        ('fx', tensor([2., 2., 2.]))
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor],
                 tier: str = "auto", num_calls: int = 1000, num_trained: int = 0,
                 python: PythonProgram | None = None) -> None:
        start = time.perf_counter()
        self.python = PythonProgram(function, inputs) if python is None else python
        self.num_calls, self.num_trained = num_calls, num_trained
        self.recording, self.reason = (None, "") if tier == "eager" \
            else try_record(function, inputs)
        self.trusted, self.worth = False, math.inf  # seconds that compilation may take
        self.tier: str = "eager"
        self.program: Program = self.python
        if self.recording is not None:
            self._choose(tier, self.recording)
        if self.reason:
            log.info("%s tier: %s", self.tier, self.reason)
        self.build_seconds = time.perf_counter() - start

    def inputs(self) -> list[Tensor]:
        """The present values of the inputs, which a comparison may not change."""
        return [tensor.detach().clone() for tensor in self.python.live]

    def draws(self, count: int) -> list[Tensor]:
        """Random numbers for so many calls."""
        assert self.recording is not None
        return [draw.many(count) for draw in self.recording.draws]

    def agrees(self) -> str:
        """Compare the program with Python on fresh noise; an empty string if they agree."""
        if self.program is self.python:
            return ""
        inputs, draws = self._example()
        try:
            expected = self.python(inputs, draws)
            again = self.python(inputs, draws) if self.trusted else expected
        except torch.linalg.LinAlgError:  # the model has no value here, whoever computes it
            return ""
        if _drifts(expected[0], again[0]):
            return HIDDEN_STATE
        problem = _difference(self.program(inputs, draws), expected)
        if problem and self.trusted and self.recording is not None:
            # A model may amplify rounding: what counts then is whether it is still the same.
            return _difference(GraphProgram(self.recording)(inputs, draws), expected)
        return problem

    def give_up(self, reason: str) -> None:
        """Run as Python from now on."""
        self.tier, self.program, self.recording = "eager", self.python, None
        self.reason = reason
        log.info("eager tier: %s", reason)

    def _choose(self, tier: str, recording: Recording) -> None:
        """Take the first candidate that builds and agrees with Python."""
        if tier == "auto":
            self.worth = self.num_calls * self._python_seconds()
        for name in self._candidates(tier):
            try:
                self.tier, self.program = name, self._build(name, recording)
                problem = self.agrees()
                differs = bool(problem)
            except Exception as error:  # whatever fails, a fit goes on with the next tier
                problem, differs = str(error).split("\n")[0] or type(error).__name__, False
            if not problem and tier == "auto" and name == "fx" and self._is_slower():
                problem, differs = "operation by operation is slower than the model itself", False
            if not problem:
                self.trusted = True
                return
            self.reason = HIDDEN_STATE if differs and name == "fx" else \
                f"{self.reason}{'; ' if self.reason else ''}{name}: {problem}"
        self.tier, self.program, self.recording = "eager", self.python, None

    def _candidates(self, tier: str) -> Iterator[str]:
        if tier != "auto":
            yield tier
        elif self.python.live[0].device.type == "cuda":
            yield "cuda_graph"
        else:
            yield "c"
        if tier == "auto" and self._is_long():
            yield "inductor"
        if tier != "fx":
            yield "fx"

    def _is_slower(self) -> bool:
        """Whether the program takes longer than Python: a network of many small steps may."""
        seconds = _seconds(self.program, *self._example())
        return seconds > max(NOTICED, SLOWER * self._python_seconds())

    def _python_seconds(self) -> float:
        """Time of one call without a program, on noise of its own: replayed noise takes longer."""
        with forked_rng():
            return _seconds(self.python, self.inputs(), None)

    def _is_long(self) -> bool:
        """Whether the calls take so long without a compiler that a minute of building pays."""
        assert self.recording is not None
        inputs, draws = self._example()
        start = time.perf_counter()
        try:
            GraphProgram(self.recording)(inputs, draws)
        except RuntimeError:  # nothing to compile
            return False
        return (time.perf_counter() - start) * self.num_calls > WORTH_INDUCTOR

    def _example(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and draws of one call, which leave no trace in the random state.

        The first draws from here are those of the recording, which would prove nothing.
        """
        with forked_rng():
            draws = [draw[1] for draw in self.draws(2)]
        return self.inputs(), draws

    def _build(self, tier: str, recording: Recording) -> Program:
        if tier == "fx":
            return GraphProgram(recording)
        if tier == "inductor":
            return InductorProgram(recording)
        if tier == "cuda_graph":
            return CudaGraphProgram(recording, *self._example(), self.num_trained)
        return CProgram(recording, *self._example(), self.num_trained, self.worth)


def check_tier(owner: str, compile: Any) -> str:
    """A tier or ``"auto"``.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> check_tier("NFVI", "fx")
        'fx'
    """
    if not isinstance(compile, str) or compile not in ("auto", *TIERS):
        raise ValueError(f"{owner} expected `compile` to be one of {('auto', *TIERS)}, got "
                         f"{compile!r}.")
    tier: str = compile
    return tier


def try_record(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]
               ) -> tuple[Recording | None, str]:
    """The recording, or why there is none; errors of the function itself go through.

    Example:
        >>> x = torch.ones(3)
        >>> recording, reason = try_record(lambda: [2 * x if x.sum() > 0 else x], [x])
        >>> recording is None, reason != ""
        (True, True)
    """
    with forked_rng():
        for _ in range(ATTEMPTS):
            try:
                return record(function, inputs), ""
            except NotRecordable as error:
                return None, str(error).split("\n")[0]
            except torch.linalg.LinAlgError as error:  # a model's Cholesky factor: on this noise
                reason = str(error)
            except Exception as error:  # ours or the user's? run it again, as it is
                function()
                reason = str(error)
                break
    return None, f"it cannot be recorded: {reason}".split("\n")[0]


def _seconds(program: Callable, inputs: list[Tensor], draws: list[Tensor] | None) -> float:
    start = time.perf_counter()
    try:
        program(inputs, draws)
    except torch.linalg.LinAlgError:  # it takes as long where a matrix has no factor
        pass
    return time.perf_counter() - start


def _drifts(first: Tensor, again: Tensor) -> bool:
    """Whether two runs on the same noise differ by more than rounding: a slow change shows."""
    a, b = first.item(), again.item()
    return math.isfinite(a) and not abs(a - b) <= 8 * torch.finfo(first.dtype).eps * abs(a)


def _difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    close, similar = TOLERANCES.get(expected[0].dtype, COARSE)
    a, b = values[0].item(), expected[0].item()
    if not math.isfinite(a) and not math.isfinite(b):
        return ""
    if not abs(a - b) <= close * (1 + abs(b)):
        return f"it gives {a:.6g} where Python gives {b:.6g}"
    flat = [torch.cat([t.reshape(-1) for t in side[1:]]) for side in (values, expected)]
    gap, size = (flat[0] - flat[1]).norm().item(), flat[1].norm().item()
    if not gap <= similar * (size + close) and math.isfinite(size):
        return f"the gradient differs by {gap:.3g} of {size:.3g}"
    return ""
