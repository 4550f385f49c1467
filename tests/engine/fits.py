"""Small fits, as NFVI sets them up, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_nfvi import ELBO
from pyro_nfvi.engine import Stepper
from pyro_nfvi.guides import AutoFlow, AutoIAF, AutoPlanar, AutoSpline
from pyro_nfvi.inference import LogJoint, Loop
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.stopping import OneCycle
from pyro_nfvi.testing import perturb

FLOWS: dict[str, Callable[..., AutoFlow]] = {
    "planar": partial(AutoPlanar, num_layers=2),
    "iaf": partial(AutoIAF, num_layers=2, hidden_dims=(8,)),
    "spline": partial(AutoSpline, num_layers=2, num_bins=4, hidden_dims=(8,)),
}
NUM_STEPS = 20
RATES = [0.02 * rate for rate in OneCycle(NUM_STEPS).rates(0, NUM_STEPS)]


def make_loop(model: Callable, *args: Any, make: Callable[..., AutoFlow] = FLOWS["planar"],
              num_steps: int = NUM_STEPS, num_particles: int = 8, compile: str = "auto",
              objective: Callable = ELBO(), dtype: torch.dtype | None = None,  # noqa: B008
              device: str = "cpu") -> Loop:
    """The optimisation of a guide away from its start; ``loop.guide`` and ``loop.log_joint``."""
    with default_dtype(dtype):
        guide = make(model).setup(*args).to(dtype=dtype, device=device)
        perturb(guide._flow(), 0.2)
        log_joint = LogJoint(model, args, {}, guide.layout, dtype)
        flow = guide._flow()
        z = flow.rsample_and_log_prob((2,))[0].detach()
        log_joint.try_batched(z)
        parameters = [*flow.parameters(), *log_joint.parameters(z[0]).values()]
    loop = Loop(parameters, lambda: objective(flow, log_joint, num_particles),
                log_joint.first_bad_site, num_steps, 0.02, progress=False, compile=compile)
    loop.guide, loop.log_joint = guide, log_joint
    return loop


class Fit:
    """A loop, compiled, which runs on the same noise by any program.

    Args:
        tier: What to compile it by.
        **options: Of :func:`make_loop`.
    """

    def __init__(self, model: Callable, args: Callable[[], tuple], tier: str = "c",
                 dtype: torch.dtype = torch.float64, **options: Any) -> None:
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        with default_dtype(dtype):
            self.args = tuple(arg.to(options.get("device")) for arg in args())
        self.model = model
        self.build(make_loop(model, *self.args, dtype=dtype, **options), tier)

    def build(self, loop: Loop, tier: str) -> Fit:
        """Compile the steps of a loop."""
        self.loop = loop
        self.stepper = Stepper(loop._loss, loop.parameters, tier, NUM_STEPS)
        self.start = self.stepper.state.live.clone()
        self.program = self.stepper.program
        return self

    def losses(self, program: Callable, rates: list[float] = RATES) -> Tensor:
        """The ELBO of steps from the start, on noise that is always the same."""
        stepper = self.stepper
        state, stepper.program, stepper.used = stepper.state, program, 0
        for part in (state.live, state.saved):
            part.copy_(self.start)
        state.step = state.saved_step = 0
        state.norms.clear()
        stepper.elbo.clear()
        torch.manual_seed(1)
        made = stepper.run(rates)
        assert made == len(rates) == len(stepper.elbo)
        state.write_back()
        return torch.tensor(stepper.elbo, dtype=torch.float64)
