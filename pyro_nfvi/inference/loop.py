"""The optimisation loop: how many steps, at which rate, and what to do when it breaks."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from signal import SIGINT
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_nfvi.engine import Engine, Stepper
from pyro_nfvi.engine.draws import Replay
from pyro_nfvi.inference.signals import DeferredSignals, deferred_signals
from pyro_nfvi.inference.stopping import OneCycle
from pyro_nfvi.inference.team import Alone, Team

MAX_ROLLBACKS = 10
FIRST_CHUNK = 5  # steps, to learn what one takes
CHUNK_SECONDS = 0.1  # between two looks at the outside: progress, Ctrl-C
NUM_CHECKS = 4  # times that the compiled loop is compared with the model while it runs

class Feed(Protocol):
    """Supplies every step with tensors of its own, such as a minibatch."""

    @property
    def live(self) -> Sequence[Tensor]:
        """The tensors the estimates read, filled as for some step."""

    @property
    def epoch(self) -> int | None:
        """Number of epochs completed by the last step supplied; None if there are none."""

    @property
    def most(self) -> int:
        """Largest number of steps to supply at once."""

    def take(self, count: int) -> list[Tensor]:
        """Values ``(count, *shape)`` of each of the tensors for the next steps."""

    def rewind(self, step: int) -> None:
        """Go back to one of the steps supplied last, whose values become the live ones."""

    def snapshot(self, step: int) -> dict[str, Any]:
        """Where the supply is at one of the steps supplied last, as a file holds it."""

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot: the next values are those it would have supplied."""


class Keeper(Protocol):
    """Keeps snapshots of a loop, in files say."""

    def due(self, step: int) -> bool:
        """Whether it is time for one."""

    def left(self, step: int) -> float:
        """Number of steps until it is time for one whatever the clock says."""

    def keep(self, snapshot: dict[str, Any]) -> None:
        """Keep it."""


H = TypeVar("H", bound="History")
Estimates = Callable[[], tuple[Tensor, Tensor]]  # -> ELBO of each particle, latents


@dataclass(frozen=True)
class Stage:
    """One stage of a fit.

    Attributes:
        name: What it is called.
        num_steps: Number of optimisation steps.
        pareto_k: k-hat at its end, nan if it was not looked at.
        ess: Effective fraction of the draws, likewise.
        elbo: ELBO, likewise.
        gradients: Number of gradients of the log joint.

    Example:
        >>> Stage("Gaussian", pareto_k=0.2, ess=0.9, gradients=5000).num_steps
        0
    """

    name: str
    num_steps: int = 0
    pareto_k: float = math.nan
    ess: float = math.nan
    elbo: float = math.nan
    gradients: int = 0


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        elbo: ELBO estimate of each step.
        rollbacks: Steps at which the log joint was not finite, and the site to blame.
        interrupted: Whether Ctrl-C ended the fit.
        stopped: Why the fit ended early, or an empty string.
        stages: The stages in order, each with what its gate saw.
        engines: How each stage was computed.
        concerns: What speaks against the fit, beyond its weights.
        seconds: Wall-clock time of the fit.

    Example:
        >>> first = History([-5.0, -4.0], stages=[Stage("flow", 2, gradients=512)])
        >>> both = first + History([-3.9], stages=[Stage("more particles", 1, gradients=512)])
        >>> both.elbo, both.gradients
        ([-5.0, -4.0, -3.9], 1024)
    """

    elbo: list[float] = field(default_factory=list)
    rollbacks: list[tuple[int, str]] = field(default_factory=list)
    interrupted: bool = False
    stopped: str = ""
    stages: list[Stage] = field(default_factory=list)
    engines: list[Engine] = field(default_factory=list)
    concerns: list[str] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)

    @property
    def gradients(self) -> int:
        """Number of gradients of the log joint, over all stages."""
        return sum(stage.gradients for stage in self.stages)

    @classmethod
    def of(cls: type[H], content: Mapping[str, Any]) -> H:
        """The history that ``dataclasses.asdict`` has turned into dicts and lists."""
        engines = [Engine(**engine) for engine in content["engines"]]
        stages = [Stage(**stage) for stage in content["stages"]]
        rollbacks = [(step, site) for step, site in content["rollbacks"]]
        return cls(**{**content, "engines": engines, "stages": stages, "rollbacks": rollbacks})

    def __add__(self, later: History) -> History:
        """Two stages as one."""
        shifted = [(step + len(self.elbo), site) for step, site in later.rollbacks]
        return History(self.elbo + later.elbo, self.rollbacks + shifted,
                       self.interrupted or later.interrupted, self.stopped or later.stopped,
                       self.stages + later.stages, self.engines + later.engines,
                       self.concerns + later.concerns, self.seconds + later.seconds)


class Loop:
    """Adam on an ELBO, with a one-cycle rate, clipped gradients and rollback.

    The estimates are recorded and compiled (see :class:`~pyro_nfvi.engine.Stepper`), and many
    steps run between two looks at the outside.

    Args:
        parameters: Tensors to optimise.
        estimates: Draws particles and returns the ELBO of each, and the particles.
        blame: Names the site to blame for a particle whose ELBO is not finite.
        schedule: Rates of the steps, as fractions of the largest; a number of steps stands for
            :class:`~pyro_nfvi.inference.stopping.OneCycle`.
        lr: Largest learning rate.
        progress: Whether to show a progress bar.
        name: What to call this stage in the bar and the history.
        compile: Which tier computes the steps: ``"auto"`` or one of
            :data:`pyro_nfvi.engine.TIERS`.
        deadline: Time of ``time.monotonic()`` by which to be done; the rate falls before.
        feed: What the estimates read beside the parameters, new at each step.
        team: The processes that share the work; each estimates its own particles, or reads its
            own rows.
        keeper: Keeps snapshots on the way, and when a signal ends the loop.
        snapshot: Where to go on from. Default: the start.

    Example:
        >>> loc = nn.Parameter(torch.zeros(()))
        >>> def estimates():  # a Gaussian of unit variance, fitted to one at 3
        ...     z = loc + torch.randn(100)
        ...     return -0.5 * (z - 3).square() + 0.5 * (z - loc).square(), z.unsqueeze(-1)
        >>> loop = Loop([loc], estimates, lambda z: "z", 200, lr=0.1, progress=False,
        ...             compile="eager")
        >>> history = loop.run()
        >>> len(history.elbo), abs(loc.item() - 3) < 0.2
        (200, True)

    References:
        Agrawal, Sheldon & Domke (2020), Advances in Black-Box VI, arXiv:2006.10343 (many
        particles, decaying rate); Smith & Topin (2018), arXiv:1708.07120 (one-cycle rate).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], estimates: Estimates,
                 blame: Callable[[Tensor], str], schedule: OneCycle | int, lr: float,
                 progress: bool = True, name: str = "fit", compile: str = "auto",
                 deadline: float = math.inf, feed: Feed | None = None,
                 team: Team | None = None, keeper: Keeper | None = None,
                 snapshot: Mapping[str, Any] | None = None) -> None:
        self.parameters, self.estimates, self.blame = list(parameters), estimates, blame
        self.schedule = OneCycle(schedule) if isinstance(schedule, int) else schedule
        self.lr, self.progress, self.name = lr, progress, name
        self.compile, self.deadline, self.start = compile, deadline, time.monotonic()
        self.feed, self.history, self.cut = feed, History(), 1.0
        self.team: Team = Alone() if team is None else team
        self.keeper, self.resumed, self.checks = keeper, snapshot, 0
        self.stepper: Stepper | None = None

    @property
    def num_steps(self) -> int:
        """Number of steps, as far as it is known."""
        return self.schedule.num_steps

    @property
    def engine(self) -> Engine:
        """How the steps are computed; known once the loop runs."""
        assert self.stepper is not None
        return self.stepper.engine

    def run(self) -> History:
        """Make the steps; Ctrl-C ends them early, with the parameters as they are."""
        with tqdm(total=self.num_steps, desc=self.name, disable=not self.progress) as bar:
            try:
                self.stepper = self._stepper()
                self.history.elbo = self.stepper.elbo
                if self.resumed is not None:
                    self._restore(self.stepper, self.resumed)
                self._optimise(self.stepper, bar)
            except KeyboardInterrupt:
                self.history.interrupted = True
            finally:
                if self.stepper is not None:
                    self.stepper.state.write_back()
                    self.history.engines.append(self.stepper.engine)
        self.history.stages.append(Stage(self.name, len(self.history.elbo)))
        self.history.seconds = time.monotonic() - self.start
        return self.history

    def _stepper(self) -> Stepper:
        tier = self.compile if self.resumed is None else self.resumed["stepper"]["tier"]
        feeds = () if self.feed is None else self.feed.live
        reduce = None if self.team.size == 1 else self._mean_of_all
        return Stepper(self._loss, self.parameters, tier, self.num_steps, feeds, reduce)

    def _loss(self) -> list[Tensor]:
        """The ELBO and the gradients of its negative: the sums and their number, if shared."""
        elbo, latents = self.estimates()
        self.last = elbo.detach(), latents.detach()
        finite = elbo.isfinite()  # the others are left out, unless there are only others
        total, count = elbo.where(finite, elbo.new_zeros(())).sum(), finite.sum()
        shared = self.team.size > 1
        value = total if shared else total / count
        gradients = torch.autograd.grad(-value, self.parameters, materialize_grads=True)
        return [value, *gradients, *([count.to(value.dtype)] if shared else [])]

    def _mean_of_all(self, flat: Tensor) -> Tensor:
        """The mean over the particles of all processes, from the sums of one and their number."""
        flat = self.team.sum_(flat)
        return flat[:-1] / flat[-1]

    def _optimise(self, stepper: Stepper, bar: tqdm) -> None:
        elbo, trusted = self.history.elbo, self._trust(stepper)
        bar.initial = len(elbo)
        if self.keeper is not None:
            self.keeper.due(len(elbo))  # from here on
        with deferred_signals(sigterm=self.keeper is not None) as signals:
            while len(elbo) < self.num_steps and not self.history.stopped:
                try:
                    self._steps(stepper)
                except RuntimeError:  # workers of a loader hear signals too, and end at once
                    if not signals.requested or self.team.size > 1:
                        raise
                    self._heed(stepper, signals)
                self._look(stepper)
                if len(elbo) * NUM_CHECKS >= self.checks * self.num_steps:  # the last at the end
                    self.checks += 1
                    trusted = self._checked(stepper, trusted)
                self._show(bar)
                self._heed(stepper, signals)

    def _heed(self, stepper: Stepper, signals: DeferredSignals) -> None:
        """Keep a snapshot if it is time for one, and do what any of the processes is asked for."""
        asked, = self.team.agree([signals.requested or 0])
        self._keep(stepper, ended=bool(asked))
        if asked:
            signals.raise_requested()
            if self.team.size > 1:
                raise KeyboardInterrupt if asked == SIGINT else SystemExit(128 + int(asked))

    def _steps(self, stepper: Stepper) -> None:
        """So many steps as fit between two looks at the outside."""
        count = -int(self.team.agree([-self._chunk(stepper)])[0])  # the fewest of all
        rates = [self.cut * self.lr * rate for rate in
                 self.schedule.rates(len(self.history.elbo), count)]
        fed = () if self.feed is None else self.feed.take(len(rates))
        if stepper.run(rates, fed) < len(rates):
            self._roll_back(stepper)

    def _keep(self, stepper: Stepper, ended: bool) -> None:
        """Keep a snapshot if it is time for one, or the last."""
        step = len(self.history.elbo)
        if self.keeper is not None and (ended or self.keeper.due(step)):
            self.keeper.keep(self._snapshot(stepper))

    def _snapshot(self, stepper: Stepper) -> dict[str, Any]:
        """Where the loop is, as a file holds it."""
        feed = None if self.feed is None else self.feed.snapshot(len(self.history.elbo))
        return {"stepper": stepper.snapshot(), "schedule": self.schedule.snapshot(), "feed": feed,
                "cut": self.cut, "checks": self.checks, "rollbacks": self.history.rollbacks,
                "seconds": time.monotonic() - self.start}

    def _restore(self, stepper: Stepper, snapshot: Mapping[str, Any]) -> None:
        stepper.restore(snapshot["stepper"])
        self.schedule.restore(snapshot["schedule"])
        if self.feed is not None:
            self.feed.restore(snapshot["feed"])
        self.cut, self.checks = snapshot["cut"], snapshot["checks"]
        self.history.rollbacks[:] = [(step, site) for step, site in snapshot["rollbacks"]]
        self.start -= snapshot["seconds"]

    def _look(self, stepper: Stepper) -> None:
        """Look at what has happened, and at the clock."""
        self.schedule.look(self.history.elbo)
        self._keep_to_time()

    def _keep_to_time(self) -> None:
        """Two thirds of the time are for steps at full rate; at its end the loop stops."""
        now = time.monotonic()
        hurried = now > self.start + (self.deadline - self.start) * 2 / 3
        up, late = self.team.agree([now >= self.deadline, hurried])
        if up:
            self.history.stopped = "its time was up"
        elif late:
            self.schedule.hurry(len(self.history.elbo))

    def _chunk(self, stepper: Stepper) -> int:
        """Number of steps until the next look at the outside."""
        if not stepper.made:
            count = FIRST_CHUNK
        else:
            count = max(1, int(CHUNK_SECONDS * stepper.made / max(stepper.seconds, 1e-9)))
        if self.keeper is not None:
            count = int(min(count, self.keeper.left(len(self.history.elbo))))
        return count if self.feed is None else min(count, self.feed.most)

    def _trust(self, stepper: Stepper) -> tuple[Tensor, int, int]:
        return stepper.state.live.clone(), stepper.state.step, len(self.history.elbo)

    def _checked(self, stepper: Stepper, trusted: tuple[Tensor, int, int]
                 ) -> tuple[Tensor, int, int]:
        """Compare with the model; if it has changed, go back to where it had not."""
        problem = self.team.first(stepper.agrees())
        if not problem:
            return self._trust(stepper)
        live, step, count = trusted
        warnings.warn(f"the model changed while the compiled loop ran ({problem}); going back to "
                      f"step {count} and on without compilation.", stacklevel=2)
        stepper.give_up(problem)
        stepper.state.saved.copy_(live)
        stepper.state.saved_step = step
        stepper.state.roll_back()
        del self.history.elbo[count:]
        return self._trust(stepper)

    def _roll_back(self, stepper: Stepper) -> None:
        """Back to the last snapshot, at half the rate."""
        step = len(self.history.elbo)
        if self.feed is not None:
            self.feed.rewind(step)
        site = self.team.first(self._site(stepper)) or "the gradient"
        self.history.rollbacks.append((step, site))
        stepper.state.roll_back()
        self.cut /= 2
        if len(self.history.rollbacks) >= MAX_ROLLBACKS:
            self.history.stopped = (
                f"the log joint is not finite at step {step}; first bad site {site}. Rolled back "
                f"and halved the step size {MAX_ROLLBACKS} times; stopped with the last good state")

    def _site(self, stepper: Stepper) -> str:
        """Whom to blame for the step that failed, which is computed once more."""
        stepper.state.write_back()
        try:
            if stepper.raised is not None:
                raise stepper.raised
            if stepper.failed is not None:
                with Replay(stepper.failed):
                    self._loss()
        except torch.linalg.LinAlgError as error:
            return f"one that raised: {error}".split("\n")[0]
        elbo, latents = self.last
        bad = ~elbo.isfinite()
        return self.blame(latents[bad][0]) if bad.any() else ""  # the gradient

    def _show(self, bar: tqdm) -> None:
        if self.history.elbo:
            number = None if self.feed is None else self.feed.epoch
            epoch = "" if number is None else f"epoch {number + 1}, "
            bar.set_postfix_str(f"{epoch}ELBO {statistics.fmean(self.history.elbo[-20:]):.3f}",
                                refresh=False)
        bar.total = self.num_steps
        bar.update(len(self.history.elbo) - bar.n)
