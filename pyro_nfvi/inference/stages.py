"""Stages and gates: as little as will do, as much as it takes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from pyro_nfvi._random import rng_state, set_rng_state
from pyro_nfvi.flows import FixedLinear, Flow, Gaussian, LowRank, PartOfNoise, Triangular
from pyro_nfvi.guides.flow_state import flow_state, load_flow_state
from pyro_nfvi.inference.centring import centred
from pyro_nfvi.inference.checks import check_estimates
from pyro_nfvi.inference.drift import drift
from pyro_nfvi.inference.importance import NUM_SAMPLES, ImportanceSample, importance_sample
from pyro_nfvi.inference.initialization import (
    NUM_STARTS,
    GaussianStart,
    flow_elbo,
    gaussian_start,
    starting_points,
)
from pyro_nfvi.inference.kept import Kept, StageKeeper
from pyro_nfvi.inference.loop import History, Loop, Stage
from pyro_nfvi.inference.memory import check_start_memory, check_step_memory
from pyro_nfvi.inference.modes import mixture_of
from pyro_nfvi.inference.problem import Problem
from pyro_nfvi.inference.score import Score
from pyro_nfvi.inference.stopping import FEWEST, OneCycle, UntilFlat
from pyro_nfvi.inference.tails import heavier_tails
from pyro_nfvi.inference.team import Alone, Team

MAX_TRIANGULAR = 128  # latents up to which the affine map inside the frame is triangular
MORE = 2  # times as many particles, after a gate that stayed shut


@dataclass(frozen=True)
class Gate:
    """What draws must be for a fit to end.

    Attributes:
        pareto_k: k-hat below this.
        ess: Effective fraction above this.
    """

    pareto_k: float
    ess: float

    def lets_through(self, sample: ImportanceSample) -> bool:
        """Whether these draws will do."""
        return (sample.pareto_k < self.pareto_k
                and sample.ess > self.ess * sample.num_samples)


QUICK, THOROUGH = 5e7, 1e9  # numbers that a look for drift may compute, by what was spent before
GOOD = Gate(0.5, 0.6)
RUNAWAY = 1e12  # size of an unconstrained latent that no posterior has
NUM_COMPARED = 4000  # draws that tell a mixture of places from the best place
SPARE = 0.1  # k-hat by which a pilot must be better than the gate asks, as it is noisy
MARGIN = 0.05  # effective fraction by which a fit must be worse to be undone
PASSABLE = Gate(0.7, 0.05)  # what a verdict may still call good
MOST_SCORED, FEWEST_SCORED = 5e8, 1000  # draws times rows that a gate may ask for; draws
NEARLY_EXACT = Gate(math.inf, 0.999)  # k-hat is then the shape of rounding


@dataclass(frozen=True)
class Options:
    """How a flow is trained.

    Attributes:
        objective: What is maximised.
        num_particles: Draws of each step.
        num_steps: Largest number of steps of a stage.
        lr: Largest learning rate.
        compile: How the steps are computed.
        progress: Whether to show progress bars.
        deadline: Time of ``time.monotonic()`` by which to be done.
    """

    objective: Callable
    num_particles: int
    num_steps: int
    lr: float
    compile: str
    progress: bool
    deadline: float = math.inf


class Stages:
    """From a model to a fitted guide: a Gaussian, then a flow on it, then more particles.

    After each stage stands a gate: the fit ends with the first guide whose draws pass. A model
    with parameters of its own, or one that draws minibatches itself, goes through the flow in any
    case, and no gate is asked: its log joint is not one function. Minibatches of a loader are
    another matter: gates read all rows.

    A snapshot is what a file needs to go on: all that a stage starts from, and where its loop is.
    It is also what the processes of a team tell each other, as only the leader looks for Gaussians
    and asks gates; all of them train.

    Args:
        problem: What to fit.
        options: How to train.
        team: The processes that share the work. Default: this one.
        kept: Keeps snapshots. Default: none is kept.

    Attributes:
        history: What happened so far.
        sample: The draws that the last gate saw, or None.
    """

    def __init__(self, problem: Problem, options: Options, team: Team | None = None,
                 kept: Kept | None = None) -> None:
        self.guide, self.log_joint, self.options = problem.guide, problem.log_joint, options
        self.start = problem.log_joint if problem.start is None else problem.start
        self.score = Score(self.start)
        self.feed, self.all_data, self.kept = problem.feed, problem.all_data, kept
        self.team: Team = Alone() if team is None else team
        self.history, self.stage = History(), 0
        self.sample: ImportanceSample | None = None
        flow = self.guide._flow()
        z = flow.rsample_and_log_prob(())[0].detach()
        self.parameters = self.log_joint.parameters(z)
        one = self.all_data is not None or not self.log_joint.subsamples(z)
        self.gated = not self.parameters and one
        self._choose(problem.fresh and not flow.base.periodic)  # no Gaussian fits a circle
        self.begin, self.spent = time.monotonic(), 0.0  # seconds, before this process went on
        self.loop: Mapping[str, Any] | None = None  # where to go on in the loop of a stage
        self.boundary: dict[str, Any] = {}

    def _choose(self, whole: bool) -> None:
        """Make all stages, or train the flow alone."""
        self.plan: tuple[Callable[[], bool], ...] = \
            (self._gaussian, self._flow, self._again) if whole else (self._train_on,)

    def run(self) -> None:
        """Stage after stage, until a gate opens or nothing is left to try; Ctrl-C ends them."""
        try:
            while self.stage < len(self.plan):
                self._mark()
                ended = self.plan[self.stage]()
                if self.history.interrupted:
                    break
                late, = self.team.agree([time.monotonic() > self.options.deadline])
                if late and not ended and self.stage + 1 < len(self.plan):
                    self.history.stopped = self.history.stopped or "its time was up"
                ended = ended or bool(self.history.stopped)
                self.stage = len(self.plan) if ended else self.stage + 1
        except KeyboardInterrupt:
            self.history.interrupted = True
        self.history.seconds = self.seconds  # gates included, unlike the sum

    def finish(self, sample: ImportanceSample | None) -> None:
        """Keep the end of the fit, with the draws that were made of it."""
        self.sample = sample
        if self.kept is not None and not self.history.interrupted:
            self.kept.keep(self.snapshot())

    @property
    def seconds(self) -> float:
        """Time spent so far, also by processes before this one."""
        return self.spent + time.monotonic() - self.begin

    # ------------------------------------------------------------------ snapshots

    def snapshot(self) -> dict[str, Any]:
        """Where the fit is between two stages."""
        sample = None if self.sample is None else vars(self.sample)
        state = {"stage": self.stage, "whole": len(self.plan) > 1, **flow_state(self.guide),
                 "sample": sample, "parameters": self.parameters, "history": asdict(self.history),
                 "score": self.score.snapshot(), "seconds": self.seconds}
        feed = None if self.feed is None else self.feed.snapshot(self.feed.step)
        return {**tree_map(_copied, state), "feed": feed, "rng": rng_state()}

    def go_on(self, snapshot: Mapping[str, Any]) -> None:
        """Be where another process was when it kept a snapshot."""
        self.restore(snapshot)
        self.spent, self.loop = snapshot["seconds"], snapshot.get("loop")
        self.options = replace(self.options, deadline=self.options.deadline - self.spent)

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take over what a stage starts from."""
        self._choose(snapshot["whole"])  # a guide may have been trained by this very fit
        load_flow_state(self.guide, snapshot)
        for name, value in self.parameters.items():
            value.copy_(snapshot["parameters"][name])
        sample = snapshot["sample"]
        self.sample = None if sample is None else ImportanceSample(**sample)
        self.stage, self.history = snapshot["stage"], History.of(snapshot["history"])
        self.score.restore(snapshot["score"])
        if self.feed is not None:
            self.feed.restore(snapshot["feed"])
        set_rng_state(snapshot["rng"])

    def _mark(self) -> None:
        """Keep what the next stage starts from, unless it is under way."""
        if self.kept is None:
            return
        self.boundary = self.snapshot()
        if self.loop is None:
            self.kept.keep(self.boundary)

    def _keeper(self) -> StageKeeper | None:
        """Keeps snapshots of the loop of the stage that is under way."""
        return None if self.kept is None else StageKeeper(
            self.kept, self.boundary, len(self.history.elbo), lambda: self.seconds)

    def _led(self, stage: Callable[[], bool]) -> bool:
        """Let one process do it, and take over what came out."""
        if self.team.size == 1:
            return stage()
        passed, snapshot = self.team.lead(lambda: (stage(), self.snapshot()))
        if not self.team.leads:
            self.restore(snapshot)
        return bool(passed)

    # ------------------------------------------------------------------ stages

    def _gaussian(self) -> bool:
        """Gaussians of all places, and the noise that suits them."""
        return self._led(self._find_gaussian)

    def _train_on(self) -> bool:
        """Train a guide that is already trained from where it is."""
        self._train("flow", self.options)
        return True

    def _find_gaussian(self) -> bool:
        with tqdm(total=3, desc="NFVI Gaussian", disable=not self.options.progress) as bar:
            check_start_memory(self.guide._flow(), self.start)
            points = starting_points(self.log_joint, self.guide._init_loc())
            start = self._checked(gaussian_start(self.score, points))
            bar.update()
            flow = self._mixture(start)
            if self.all_data is not None:
                flow = centred(flow, self.all_data, self.score, self.options.deadline)
            self._install(flow)
            self.history.stages.append(Stage("Gaussian", gradients=self.score.evaluations))
            bar.update()
            passed = self._gate()
            bar.update()
        return passed

    def _checked(self, start: GaussianStart | None) -> GaussianStart:
        """Refuse a log joint that is finite nowhere, or whose scale has no end."""
        if start is None:
            site = self.start.first_bad_site(self.guide._init_loc())
            raise ValueError(f"NFVI: the log joint is not finite at any of {NUM_STARTS} starts; "
                             f"first bad site {site}. Start elsewhere: AutoFlow(model, "
                             "init_loc_fn=..., init_scale=...).")
        scale = start.flow.rsample_and_log_prob((64,))[0].abs().amax(0)
        if not bool((scale < RUNAWAY).all()):
            place = int(scale.nan_to_num(torch.inf).argmax())
            site = self.log_joint.layout.at(place).name
            raise ValueError(f"NFVI: the posterior seems to be improper: the scale of site "
                             f"{site!r} runs away. Give it a proper prior, or data that say "
                             "something about it.")
        return start

    def _mixture(self, start: GaussianStart) -> Flow:
        """All places, if the guide's noise is free to be a mixture."""
        if len(start.places) < 2:
            return start.flow
        full = all(isinstance(place.bijection, FixedLinear) for place in start.places)
        if not full or type(self.guide._flow().base) is not Gaussian:
            self.history.concerns.append(f"it covers one of {len(start.places)} separate modes")
            return start.flow
        flows = (mixture_of(self.score, start.places), start.flow)
        return max(flows, key=lambda flow: flow_elbo(self.score, flow, NUM_COMPARED))

    def _flow(self) -> bool:
        """The guide's own flow, between the noise and the Gaussian."""
        return self._trained("flow", self.options) or not self.gated

    def _again(self) -> bool:
        """The same flow from where it is, with more particles."""
        options = replace(self.options, num_particles=MORE * self.options.num_particles)
        passed = self._trained("more particles", options)
        if not passed and self.sample is not None and PASSABLE.lets_through(self.sample):
            self._led(partial(self._stays, last=True))
        return True

    def _trained(self, name: str, options: Options) -> bool:
        """Train and look; if that made the fit worse, it is undone."""
        before, flow = self.sample, copy.deepcopy(self.guide._flow())
        self._train(name, options)
        passed = self._led(self._gate)
        if not passed and before is not None and _rank(before) > _rank(self.sample) + MARGIN:
            self.sample, self.guide.flow = before, flow
        return passed

    # ------------------------------------------------------------------ what they are made of

    def _install(self, flow: Flow) -> None:
        """Put a Gaussian, or several, under the guide's flow."""
        dim = flow.input_dim
        affine = Triangular(dim) if dim <= MAX_TRIANGULAR else LowRank(dim)
        own = self.guide._flow().base
        base = flow.base if type(own) is Gaussian else own
        self.guide.whiten(flow.bijection, base, affine)

    def _gate(self) -> bool:
        """Draw, look for other noise if the draws do not pass, and note the outcome."""
        if not self.gated:
            return False
        self._draw()
        assert self.sample is not None
        sample, stage = self.sample, self.history.stages[-1]
        self.history.stages[-1] = replace(
            stage, pareto_k=sample.pareto_k, ess=sample.ess / sample.num_samples,
            elbo=sample.elbo[0])
        enough = GOOD.lets_through(sample) or NEARLY_EXACT.lets_through(sample)
        return enough and self._stays(last=stage.num_steps > 0)

    def _stays(self, last: bool) -> bool:
        """Whether short chains stay where the draws are; if not, that is a concern.

        That of a Gaussian only keeps the gate shut: the flow may cure it. That of a flow stays,
        as luck at a later look does not undo it.
        """
        if self.history.concerns or self.all_data is not None:  # chains would read them often
            return not self.history.concerns
        assert self.sample is not None
        found = drift(self.score, self.guide._flow(), self.sample, self.log_joint.layout,
                      THOROUGH if last else QUICK)
        if found.found and last:
            self.history.concerns.append(str(found))
        return not found.found

    def _draw(self) -> None:
        flow = self.guide._flow()
        if self.all_data is not None:
            affordable = max(MOST_SCORED / self.all_data.num_rows, FEWEST_SCORED)
            num_draws = int(min(NUM_SAMPLES, affordable))
            self.sample = importance_sample(flow, self.all_data, num_draws)
            return
        self.sample = importance_sample(flow, self.log_joint, NUM_SAMPLES)
        if GOOD.lets_through(self.sample):
            return
        better = heavier_tails(flow, self.log_joint, self.sample, GOOD.pareto_k - SPARE)
        if better is not flow:
            sample = importance_sample(better, self.log_joint, NUM_SAMPLES)
            passed = GOOD.lets_through(sample) or sample.elbo[0] > self.sample.elbo[0]
            if passed and _rank(sample) > _rank(self.sample):
                self.sample, self.guide.flow = sample, better

    def _share(self, flow: Flow, num_particles: int) -> tuple[Flow, int]:
        """This process's part of the particles; all of them, where it has a part of the rows."""
        if self.team.size == 1 or self.feed is not None:
            return flow, num_particles
        return PartOfNoise(flow, self.team.rank, self.team.size), num_particles // self.team.size

    def _train(self, name: str, options: Options) -> None:
        whole = self.guide._flow()
        flow, num_particles = self._share(whole, options.num_particles)
        self.sample = None  # the flow will not be what it was drawn from

        def estimates() -> tuple[Tensor, Tensor]:
            return check_estimates("NFVI", options.objective(flow, self.log_joint, num_particles))
        parameters = [*(p for p in whole.parameters() if p.requires_grad),
                      *self.parameters.values()]
        check_step_memory(flow, self.log_joint, options.objective, num_particles, parameters,
                          recorded=options.compile != "eager")
        if self.feed is not None and self.loop is None:
            self.feed.restart()
        loop = Loop(parameters, estimates, self.log_joint.first_bad_site,
                    _schedule(options.num_steps), options.lr, options.progress, f"NFVI {name}",
                    options.compile, options.deadline, self.feed, self.team,
                    self._keeper(), self.loop)
        self.loop = None
        history = loop.run()
        if not history.elbo and not history.interrupted:
            raise ValueError(f"NFVI: the log joint is not finite at the start; first bad site "
                             f"{history.rollbacks[-1][1]}. Start elsewhere: AutoFlow(model, "
                             "init_loc_fn=..., init_scale=...).")
        history.stages = [Stage(name, len(history.elbo),
                                gradients=len(history.elbo) * options.num_particles)]
        self.history += history


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _schedule(num_steps: int) -> OneCycle:
    """Until the ELBO is flat, if there are steps enough to tell."""
    return UntilFlat(num_steps) if num_steps > FEWEST else OneCycle(num_steps)


def _rank(sample: ImportanceSample | None) -> float:
    """Which of two fits is the better one: k-hat where it matters, then effective draws."""
    if sample is None:
        return -math.inf
    return sample.ess / sample.num_samples - max(0.0, min(sample.pareto_k, 5.0) - GOOD.pareto_k)
