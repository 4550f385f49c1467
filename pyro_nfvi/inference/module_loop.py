"""The loop that trains a module, may end with the best that it was, and can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from pyro_nfvi._random import rng_state, set_rng_state
from pyro_nfvi.engine import Stepper
from pyro_nfvi.inference.loop import Estimates, History, Loop
from pyro_nfvi.inference.stopping import OneCycle


class ModuleLoop(Loop):
    """Adam on the parameters of a module; the best that it was, if that was noted, is the end.

    Args:
        module: What to train.
        estimates: Draws particles and returns the ELBO of each, and the particles.
        blame: Names the site to blame for a particle whose ELBO is not finite.
        schedule: Rates of the steps.
        history: An empty one, of a kind of its own.
        **options: Those of :class:`~pyro_nfvi.inference.Loop`, such as ``keeper`` and ``snapshot``.

    Attributes:
        best: State of the module at its best, or None.
        complete: Whether the fit had come to its end before.
    """

    def __init__(self, module: nn.Module, estimates: Estimates, blame: Callable[[Tensor], str],
                 schedule: OneCycle, history: History, **options: Any) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        super().__init__(parameters, estimates, blame, schedule, **options)
        self.module, self.history = module, history
        self.best: dict[str, Tensor] | None = None
        self.complete = False
        if self.resumed is not None:  # before the module is compiled
            self.module.load_state_dict(self.resumed["module"])
            self.history = type(history).of(self.resumed["history"])
            self.best = self.resumed.get("best")
            self.complete = "stepper" not in self.resumed

    def run(self) -> History:
        """Make the steps, and go back to the best; nothing is left to do if they were made."""
        if self.complete:
            assert self.resumed is not None
            set_rng_state(self.resumed["rng"])
            return self.history
        super().run()
        if self.best is not None:
            self.module.load_state_dict(self.best)
        return self.history

    def finish(self) -> None:
        """Keep the end of the fit, unless it was interrupted or is kept already."""
        if self.keeper is None or self.history.interrupted or self.complete:
            return
        self.keeper.keep({"module": dict(self.module.state_dict()),
                          "history": asdict(self.history), "rng": rng_state()})

    def _note_best(self) -> None:
        self.best = {name: value.clone() for name, value in self.module.state_dict().items()}

    def _snapshot(self, stepper: Stepper) -> dict[str, Any]:
        history = asdict(replace(self.history, elbo=[]))  # which the stepper has
        return {**super()._snapshot(stepper), "module": dict(self.module.state_dict()),
                "best": self.best, "history": history}

    def _restore(self, stepper: Stepper, snapshot: Mapping[str, Any]) -> None:
        self.module.load_state_dict(snapshot["module"])  # a look at the steps may have changed it
        super()._restore(stepper, snapshot)
        self.deadline -= snapshot["seconds"]
