"""Stages and gates: as little as will do, as much as it takes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nfvi.flows import FixedLinear, Flow, Gaussian, LowRank, Triangular
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference.drift import drift
from pyro_nfvi.inference.importance import NUM_SAMPLES, ImportanceSample, importance_sample
from pyro_nfvi.inference.initialization import (
    NUM_STARTS,
    GaussianStart,
    flow_elbo,
    gaussian_start,
    starting_points,
)
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.loop import History, Loop, Stage
from pyro_nfvi.inference.modes import mixture_of
from pyro_nfvi.inference.score import Score
from pyro_nfvi.inference.stopping import FEWEST, OneCycle, UntilFlat
from pyro_nfvi.inference.tails import heavier_tails

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
    with parameters of its own, or with minibatches, goes through the flow in any case, and no
    gate is asked: its log joint is not one function.

    Args:
        guide: The guide to fit, which is set up.
        log_joint: The model and its data.
        options: How to train.

    Attributes:
        history: What happened so far.
        sample: The draws that the last gate saw, or None.
    """

    def __init__(self, guide: AutoFlow, log_joint: LogJoint, options: Options) -> None:
        self.guide, self.log_joint, self.options = guide, log_joint, options
        self.score = Score(log_joint)
        self.history = History()
        self.sample: ImportanceSample | None = None
        z = guide._flow().rsample_and_log_prob(())[0].detach()
        self.parameters = list(log_joint.parameters(z).values())
        self.gated = not self.parameters and not log_joint.subsamples(z)

    def run(self) -> None:
        """Stage after stage, until a gate opens or nothing is left to try; Ctrl-C ends them."""
        begin = time.monotonic()
        try:
            for stage in (self._gaussian, self._flow, self._again):
                if stage() or self.history.interrupted or self.history.stopped:
                    break
                if time.monotonic() > self.options.deadline:
                    self.history.stopped = "its time was up"
                    break
        except KeyboardInterrupt:
            self.history.interrupted = True
        self.history.seconds = time.monotonic() - begin  # gates included, unlike the sum

    def go_on(self) -> None:
        """Train a guide that is already trained from where it is."""
        self._train("flow", self.options)

    # ------------------------------------------------------------------ stages

    def _gaussian(self) -> bool:
        """Gaussians of all places, and the noise that suits them."""
        with tqdm(total=3, desc="NFVI Gaussian", disable=not self.options.progress) as bar:
            points = starting_points(self.log_joint, self.guide._init_loc())
            start = self._checked(gaussian_start(self.score, points))
            bar.update()
            flow = self._mixture(start)
            self._install(flow)
            self.history.stages.append(Stage("Gaussian", gradients=self.score.evaluations))
            bar.update()
            passed = self._gate()
            bar.update()
        return passed

    def _checked(self, start: GaussianStart | None) -> GaussianStart:
        """Refuse a log joint that is finite nowhere, or whose scale has no end."""
        if start is None:
            site = self.log_joint.first_bad_site(self.guide._init_loc())
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
            self._stays(last=True)
        return True

    def _trained(self, name: str, options: Options) -> bool:
        """Train and look; if that made the fit worse, it is undone."""
        before, flow = self.sample, copy.deepcopy(self.guide._flow())
        self._train(name, options)
        passed = self._gate()
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
        if self.history.concerns:
            return False
        assert self.sample is not None
        found = drift(self.score, self.guide._flow(), self.sample, self.log_joint.layout,
                      THOROUGH if last else QUICK)
        if found.found and last:
            self.history.concerns.append(str(found))
        return not found.found

    def _draw(self) -> None:
        flow = self.guide._flow()
        self.sample = importance_sample(flow, self.log_joint, NUM_SAMPLES)
        if GOOD.lets_through(self.sample):
            return
        better = heavier_tails(flow, self.log_joint, self.sample, GOOD.pareto_k - SPARE)
        if better is not flow:
            sample = importance_sample(better, self.log_joint, NUM_SAMPLES)
            passed = GOOD.lets_through(sample) or sample.elbo[0] > self.sample.elbo[0]
            if passed and _rank(sample) > _rank(self.sample):
                self.sample, self.guide.flow = sample, better

    def _train(self, name: str, options: Options) -> None:
        flow = self.guide._flow()
        self.sample = None  # the flow will not be what it was drawn from

        def estimates() -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = options.objective(
                flow, self.log_joint, options.num_particles)
            return result
        parameters = [p for p in flow.parameters() if p.requires_grad] + self.parameters
        loop = Loop(parameters, estimates, self.log_joint.first_bad_site,
                    _schedule(options.num_steps), options.lr, options.progress, f"NFVI {name}",
                    options.compile, options.deadline)
        history = loop.run()
        if not history.elbo and not history.interrupted:
            raise ValueError(f"NFVI: the log joint is not finite at the start; first bad site "
                             f"{history.rollbacks[-1][1]}. Start elsewhere: AutoFlow(model, "
                             "init_loc_fn=..., init_scale=...).")
        history.stages = [Stage(name, len(history.elbo),
                                gradients=len(history.elbo) * options.num_particles)]
        self.history += history


def _schedule(num_steps: int) -> OneCycle:
    """Until the ELBO is flat, if there are steps enough to tell."""
    return UntilFlat(num_steps) if num_steps > FEWEST else OneCycle(num_steps)


def _rank(sample: ImportanceSample | None) -> float:
    """Which of two fits is the better one: k-hat where it matters, then effective draws."""
    if sample is None:
        return -math.inf
    return sample.ess / sample.num_samples - max(0.0, min(sample.pareto_k, 5.0) - GOOD.pareto_k)
