"""The optimisation loop: particles, gradient, clip, Adam, and what to do when it breaks."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

WARM_UP = 0.1  # fraction of the steps in which the rate rises
CLIP_FACTOR = 10.0  # gradients longer than this many median lengths are shortened
CLIP_WINDOW = 100
SNAPSHOT_EVERY = 25
MAX_ROLLBACKS = 10

Estimates = Callable[[], tuple[Tensor, Tensor]]  # -> ELBO of each particle, latents


@dataclass
class History:
    """What happened, step by step.

    Attributes:
        elbo: ELBO estimate of each step.
        rollbacks: Steps at which the log joint was not finite, and the site to blame.
        interrupted: Whether Ctrl-C ended the fit.
        stopped: Why the fit ended early, or an empty string.
        stages: Name and number of steps of each stage.
    """

    elbo: list[float] = field(default_factory=list)
    rollbacks: list[tuple[int, str]] = field(default_factory=list)
    interrupted: bool = False
    stopped: str = ""
    stages: list[tuple[str, int]] = field(default_factory=list)

    def __add__(self, later: History) -> History:
        """Two stages as one."""
        shifted = [(step + len(self.elbo), site) for step, site in later.rollbacks]
        return History(self.elbo + later.elbo, self.rollbacks + shifted,
                       self.interrupted or later.interrupted, self.stopped or later.stopped,
                       self.stages + later.stages)


class Loop:
    """Adam on an ELBO, with a one-cycle rate, clipped gradients and rollback.

    Args:
        parameters: Tensors to optimise.
        estimates: Draws particles and returns the ELBO of each, and the particles.
        blame: Names the site to blame for a particle whose ELBO is not finite.
        num_steps: Number of steps.
        lr: Largest learning rate.
        progress: Whether to show a progress bar.
        name: What to call this stage in the bar and the history.

    References:
        Agrawal, Sheldon & Domke (2020), Advances in Black-Box VI, arXiv:2006.10343 (many
        particles, decaying rate); Smith & Topin (2018), arXiv:1708.07120 (one-cycle rate).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], estimates: Estimates,
                 blame: Callable[[Tensor], str], num_steps: int, lr: float,
                 progress: bool = True, name: str = "NFVI") -> None:
        self.parameters, self.estimates, self.blame = list(parameters), estimates, blame
        self.num_steps, self.lr, self.progress = num_steps, lr, progress
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        self.norms: deque[float] = deque(maxlen=CLIP_WINDOW)
        self.cut = 1.0  # shrinks the rate after a rollback
        self.name, self.history = name, History()

    def run(self) -> History:
        """Run to the end, to Ctrl-C, or to the last of too many rollbacks."""
        with tqdm(total=self.num_steps, disable=not self.progress, desc=self.name) as bar:
            self._snapshot()
            try:
                while len(self.history.elbo) < self.num_steps and not self.history.stopped:
                    self._step()
                    self._show(bar)
            except KeyboardInterrupt:
                self.history.interrupted = True
        self.history.stages.append((self.name, len(self.history.elbo)))
        return self.history

    def _step(self) -> None:
        step = len(self.history.elbo)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cut * self.lr * one_cycle(step, self.num_steps)
        try:
            elbo, latents = self.estimates()
        except torch.linalg.LinAlgError as error:  # a model's Cholesky factor, say
            self._roll_back(step, f"one that raised: {error}")
            return
        self.optimizer.zero_grad()
        (-elbo.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_norm())
        if not (math.isfinite(value := elbo.detach().mean().item()) and norm.isfinite()):
            self._roll_back(step, self._site(elbo.detach(), latents.detach()))
            return
        self.optimizer.step()
        self.norms.append(min(norm.item(), self._max_norm()))
        self.history.elbo.append(value)
        if step % SNAPSHOT_EVERY == 0:
            self._snapshot()

    def _max_norm(self) -> float:
        return CLIP_FACTOR * statistics.median(self.norms) if self.norms else math.inf

    def _snapshot(self) -> None:
        self.saved = ([p.detach().clone() for p in self.parameters],
                      copy.deepcopy(self.optimizer.state_dict()))

    def _site(self, elbo: Tensor, latents: Tensor) -> str:
        bad = ~elbo.isfinite()
        return self.blame(latents[bad][0]) if bad.any() else "the gradient"

    def _roll_back(self, step: int, site: str) -> None:
        """Back to the last snapshot, at half the rate."""
        self.history.rollbacks.append((step, site))
        parameters, state = self.saved
        with torch.no_grad():
            for parameter, value in zip(self.parameters, parameters, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.cut /= 2
        if len(self.history.rollbacks) >= MAX_ROLLBACKS:
            self.history.stopped = (
                f"the log joint is not finite at step {step}; first bad site {site}. Rolled back "
                f"and halved the step size {MAX_ROLLBACKS} times; stopped with the last good state")

    def _show(self, bar: tqdm) -> None:
        bar.update(len(self.history.elbo) - bar.n)
        if self.history.elbo and len(self.history.elbo) % 20 == 0:
            bar.set_postfix_str(f"ELBO {statistics.fmean(self.history.elbo[-20:]):.3f}",
                                refresh=False)


def one_cycle(step: int, num_steps: int) -> float:
    """Fraction of the largest rate: a linear rise, then half a cosine down to zero."""
    rise = max(1, round(WARM_UP * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise)))
