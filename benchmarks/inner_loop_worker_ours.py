"""Worker of ``inner_loop.py`` for ``pyro_nfvi``: its own loop, in any tier."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from inner_loop_worker_common import BINS, BOUND, HIDDEN, INIT_SCALE, Spec, per_step, serve, timed
from inner_loop_worker_pyro import TorchSubject

from pyro_nfvi import AutoFlow
from pyro_nfvi.flows import iaf, nsf, planar
from pyro_nfvi.inference import ELBO, LogJoint, Loop

RECIPES = {"planar": planar, "iaf": partial(iaf, hidden_dims=HIDDEN),
           "nsf": partial(nsf, hidden_dims=HIDDEN, num_bins=BINS, bound=BOUND)}
ALL_CHECKS = 0.5  # seconds of a loop, after which its checks are done


def build_loop(spec: Spec, guide: AutoFlow, log_joint: LogJoint, steps: int) -> Loop:
    """Our optimisation loop of that many steps: the one place that knows its arguments."""
    flow, objective = guide._flow(), ELBO(path_gradient=False)
    return Loop(list(flow.parameters()), lambda: objective(flow, log_joint, spec.particles),
                log_joint.first_bad_site, steps, spec.lr, progress=False, name="bench",
                compile=spec.tier)


class Ours(TorchSubject):
    """The loop of ``pyro_nfvi``."""

    def build(self) -> dict[str, Any]:
        """A new guide and a loop of one step."""
        recipe = partial(RECIPES[self.spec.flow], num_layers=self.spec.depth)
        self.guide = AutoFlow(self.model, recipe, init_scale=INIT_SCALE).setup(*self.data)
        self.log_joint = LogJoint(self.model, tuple(self.data), {}, self.guide.layout)
        return engine_report(self._loop(1))

    def calibrate(self, seconds: float) -> int:
        """Long enough to look at the outside, and check against Python, as often as ever."""
        return super().calibrate(max(seconds, ALL_CHECKS))

    def run(self, steps: int) -> dict[str, Any]:
        """Loops of that many steps and of twice as many; their difference is the steps.

        What a loop does once, checks against Python for one, is ``fixed`` seconds.
        """
        (cpu, wall, _), (cpu_more, wall_more, loop) = self._timed(steps), self._timed(2 * steps)
        result = per_step(cpu_more - cpu, wall_more - wall, steps)
        return {**result, "fixed": 2 * cpu - cpu_more, **engine_report(loop)}

    def quick(self, steps: int) -> float:
        """Microseconds by the engine's own clock."""
        return float(self._loop(steps).engine.microseconds)

    def _timed(self, steps: int) -> tuple[float, float, Loop]:
        """Processor and wall seconds of a loop less its building."""
        cpu, wall, loop = timed(lambda: self._loop(steps))
        build = loop.engine.build_seconds
        return cpu * (1 - build / wall), wall - build, loop

    def _loop(self, steps: int) -> Loop:
        loop = build_loop(self.spec, self.guide, self.log_joint, steps)
        history = loop.run()
        if history.rollbacks or len(history.elbo) < steps:
            raise RuntimeError(f"{len(history.elbo)} of {steps} steps, rolled back at "
                               f"{history.rollbacks}. {history.stopped}")
        return loop

    @torch.no_grad()
    def elbo(self, draws: int) -> float:
        """ELBO by fresh draws."""
        return float(ELBO(path_gradient=False)(self.guide._flow(), self.log_joint, draws)[0].mean())


def engine_report(loop: Loop) -> dict[str, Any]:
    """What our engine says of itself."""
    engine = loop.engine
    return {"tier": engine.tier, "reason": engine.reason, "engine_us": engine.microseconds,
            "engine_build": engine.build_seconds}


if __name__ == "__main__":
    serve(Ours)
