"""The two loops that fit a density: to rows, and to a log density."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nfvi._shapes import check_axes
from pyro_nfvi.engine import Stepper
from pyro_nfvi.flows import Flow
from pyro_nfvi.inference.checks import check_estimates
from pyro_nfvi.inference.density_data import Rows
from pyro_nfvi.inference.density_start import NUM_SCORED, mean_log_prob
from pyro_nfvi.inference.log_density import LogDensity
from pyro_nfvi.inference.loop import History
from pyro_nfvi.inference.minibatches import Minibatches
from pyro_nfvi.inference.module_loop import ModuleLoop
from pyro_nfvi.inference.stopping import LONGEST_HOLD, LOOK_EVERY, OneCycle, UntilFlat

NUM_CHECKS = 20  # looks at the data, at least
CUT, MAX_CUTS = 0.3, 3  # of the rate, when patience is lost
COLDEST = 0.01  # power of the density at which annealing starts


@dataclass(repr=False)
class DensityHistory(History):
    """What happened while a density was fitted.

    Attributes:
        elbo: Of each step: mean log-likelihood of its rows, or the ELBO (annealed, at first).
        checks: Steps after which there was a look at the data.
        train: Mean negative log-likelihood of the rows trained on, since the check before.
        validation: That of the held-out rows at each check.
        best_step: The step whose parameters were kept, if rows were held out.
        patience_lost: Whether the fit ended because held-out rows did not gain any more.
    """

    checks: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_step: int = 0
    patience_lost: bool = False

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of what was kept: of held-out rows, if there are any."""
        return min(self.validation, default=self.train[-1] if self.train else math.nan)

    def __repr__(self) -> str:
        parts = [f"{len(self.elbo)} steps"]
        if self.validation:
            parts += [f"held-out NLL {self.nll:.3f} at step {self.best_step}"]
        elif self.train:
            parts += [f"NLL {self.nll:.3f}"]
        elif self.stages:
            parts += [f"ELBO {self.stages[-1].elbo:.3f}, k-hat {self.stages[-1].pareto_k:.2f}"]
        return f"DensityHistory({', '.join([*parts, *self.concerns])})"

    def plot(self, ax: Any = None) -> Any:
        """Plot the negative log-likelihood over the steps, or minus the ELBO.

        Args:
            ax: Matplotlib axes to draw on. Default: new ones.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        check_axes("DensityHistory", ax)
        ax = plt.subplots(figsize=(7, 3.5), layout="constrained")[1] if ax is None else ax
        if self.checks:
            ax.plot(self.checks, self.train, label="train")
        else:
            ax.plot([-value for value in self.elbo], lw=0.7, label="each step")
        if self.validation:
            ax.plot(self.checks, self.validation, label="held out")
            ax.axvline(self.best_step, color="0.6", ls=":", lw=1)
        ax.set(xlabel="step", ylabel="NLL (nats a row)" if self.checks else "-ELBO (nats)")
        ax.legend(frameon=False)
        return ax


class UntilHalf(UntilFlat):
    """Full rate for half of the steps, then down to zero: held-out rows are the judge of more.

    Args:
        num_steps: Largest number of steps.
    """

    def rates(self, start: int, count: int) -> list[float]:
        """Fractions of the largest rate, up to the half."""
        left = count if self.hold is not None else self._half - start
        return super().rates(start, min(count, left))

    def look(self, elbo: Sequence[float]) -> None:
        """Let the rate fall after half of the steps."""
        if len(elbo) >= self._half:
            self.hurry(len(elbo))

    @property
    def _half(self) -> int:
        return math.ceil(LONGEST_HOLD * self.budget)


class LikelihoodLoop(ModuleLoop):
    """Maximum likelihood on minibatches, with a look at held-out rows now and then.

    Args:
        flow: The flow to train.
        rows: Samples and contexts.
        held_out: The same, to judge by, or None.
        batch_size: Rows of each step.
        patience: Checks without a better one until the fit goes back to that with a smaller rate,
            or ends.
        num_steps: Largest number of steps.
        **options: Those of :class:`~pyro_nfvi.inference.Loop`.
    """

    def __init__(self, flow: Flow, rows: Rows, held_out: Rows | None, *, batch_size: int,
                 patience: int, num_steps: int, **options: Any) -> None:
        self.minibatches = Minibatches([part for part in rows if part is not None], batch_size)
        schedule = UntilFlat(num_steps) if held_out is None else UntilHalf(num_steps)
        self.history: DensityHistory
        super().__init__(flow, self._estimates, self._blame, schedule, DensityHistory(),
                         name="fit_density", feed=self.minibatches, **options)
        self.flow, self.held_out, self.patience = flow, held_out, patience
        self.every = max(LOOK_EVERY, min(self.minibatches.num_batches, num_steps // NUM_CHECKS))
        self.trusted: tuple[Tensor, int] | None = None  # the optimiser then
        self.waited = self.cuts = 0  # checks since the best one, and times it was gone back to

    def run(self) -> DensityHistory:
        """Make the steps, and go back to the best check."""
        self.flow.train()
        super().run()
        self.flow.eval()
        return self.history

    def _estimates(self) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each row of the live minibatch, and it; nan where it does not count."""
        x, *context, counts = self.minibatches.live
        log_prob = self.flow.log_prob(x, *context)
        nothing = log_prob.new_tensor(torch.nan)
        return log_prob.where(counts, nothing), x.where(counts.unsqueeze(-1), nothing)

    def _blame(self, x: Tensor) -> str:
        if x.isnan().any():  # of those that do not count
            return "the gradient"
        return f"`samples` (a row with values up to {x.abs().max().item():.4g})"

    @property
    def _next_check(self) -> int:
        return min(self.history.checks[-1] + self.every, self.num_steps)

    def _optimise(self, stepper: Stepper, bar: tqdm) -> None:
        """The start is looked at first: it may be the best."""
        if not self.history.checks:
            x, *context = (part[:NUM_SCORED] for part in self.minibatches.parts)
            self._check(stepper, 0, mean_log_prob(self.flow, x, *(context or [None])))
        super()._optimise(stepper, bar)

    def _snapshot(self, stepper: Stepper) -> dict[str, Any]:
        return {**super()._snapshot(stepper), "trusted": self.trusted, "waited": self.waited,
                "cuts": self.cuts}

    def _restore(self, stepper: Stepper, snapshot: Mapping[str, Any]) -> None:
        super()._restore(stepper, snapshot)
        self.trusted, self.waited = snapshot["trusted"], snapshot["waited"]
        self.cuts = snapshot["cuts"]

    def _chunk(self, stepper: Stepper) -> int:
        """No further than the next check."""
        return max(1, min(super()._chunk(stepper), self._next_check - len(self.history.elbo)))

    def _look(self, stepper: Stepper) -> None:
        super()._look(stepper)
        elbo, last = self.history.elbo, self.history.checks[-1]
        if len(elbo) > last and len(elbo) >= self._next_check:
            self._check(stepper, len(elbo), statistics.fmean(elbo[last:]))

    def _check(self, stepper: Stepper, step: int, log_likelihood: float) -> None:
        self.history.checks.append(step)
        self.history.train.append(-log_likelihood)
        if self.held_out is not None:
            stepper.state.write_back()
            self._validate(stepper, *self.held_out)

    @torch.no_grad()
    def _validate(self, stepper: Stepper, x: Tensor, context: Tensor | None) -> None:
        history = self.history
        self.flow.eval()
        value = -mean_log_prob(self.flow, x, context)
        self.flow.train()
        history.validation.append(value if math.isfinite(value) else math.inf)
        self.waited += 1
        if self.best is None or value < history.validation[history.checks.index(history.best_step)]:
            history.best_step, self.waited = history.checks[-1], 0
            self._note_best()
            self.trusted = stepper.state.live.clone(), stepper.state.step
        elif self.waited >= self.patience:
            self._lose_patience(stepper)

    def _lose_patience(self, stepper: Stepper) -> None:
        """Go on from the best with a smaller rate, or end."""
        assert self.trusted is not None
        self.history.patience_lost = self.cuts == MAX_CUTS
        if self.history.patience_lost:
            self.history.stopped = (f"the held-out likelihood has not risen for {self.patience} "
                                    f"checks at any of {MAX_CUTS + 1} rates")
            return
        self.waited, self.cuts, self.cut = 0, self.cuts + 1, self.cut * CUT
        live, stepper.state.saved_step = self.trusted
        stepper.state.saved.copy_(live)
        stepper.state.roll_back()

    def _show(self, bar: Any) -> None:
        super()._show(bar)
        if self.history.train:
            shown = f"NLL {self.history.train[-1]:.3f}"
            if self.history.validation:
                shown += f", held out {self.history.validation[-1]:.3f}"
            bar.set_postfix_str(shown, refresh=False)


class Annealing:
    """Power of the density at each step: from ``COLDEST`` to 1 in equal parts, then 1.

    Args:
        num_steps: Steps in which it rises; 0 for none.
        like: A tensor of the type and in the place of the fit.
    """

    most = 2 ** 12
    epoch = None

    def __init__(self, num_steps: int, like: Tensor) -> None:
        self.num_steps, self.step = num_steps, 0
        self.live = [like.new_tensor(self._power(0))]

    def take(self, count: int) -> list[Tensor]:
        """Powers of the next steps."""
        powers = [self._power(step) for step in range(self.step, self.step + count)]
        self.step += count
        return [self.live[0].new_tensor(powers)]

    def rewind(self, step: int) -> None:
        """Go back to a step."""
        self.step = step
        self.live[0].fill_(self._power(step))

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where it is at a step, as a file holds it."""
        return {"step": step, "num_steps": self.num_steps}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.num_steps = snapshot["num_steps"]
        self.rewind(snapshot["step"])

    def _power(self, step: int) -> float:
        return min(1.0, COLDEST + (1 - COLDEST) * step / self.num_steps) if self.num_steps else 1.0


class DensityLoop(ModuleLoop):
    """Reverse Kullback-Leibler divergence to a density, by its powers.

    Args:
        flow: The flow to train.
        log_density: The density.
        objective: What is maximised.
        num_particles: Draws of each step.
        annealing: Steps in which the power rises.
        num_steps: Number of steps.
        **options: Those of :class:`~pyro_nfvi.inference.Loop`.
    """

    def __init__(self, flow: Flow, log_density: LogDensity, objective: Callable, *,
                 num_particles: int, annealing: int, num_steps: int, **options: Any) -> None:
        self.annealing = Annealing(annealing, flow.base.zeros)
        self.share = annealing / num_steps
        power, = self.annealing.live

        def estimates() -> tuple[Tensor, Tensor]:
            return check_estimates("fit_density", objective(
                flow, lambda z: power * log_density(z), num_particles))
        self.history: DensityHistory
        super().__init__(flow, estimates, log_density.first_bad_site, OneCycle(num_steps),
                         DensityHistory(), name="fit_density", feed=self.annealing, **options)

    def _keep_to_time(self) -> None:
        """Plan no more steps than there is time for."""
        assert self.stepper is not None
        now, made = time.monotonic(), len(self.history.elbo)
        if now >= self.deadline and made < self.num_steps:
            self.history.stopped = "its time was up"
        elif self.deadline < math.inf and self.stepper.made:
            each = self.stepper.seconds / self.stepper.made
            possible = made + int((self.deadline - now) / each)
            self.schedule.num_steps = min(self.num_steps, possible)
            self.annealing.num_steps = int(self.share * self.num_steps)
