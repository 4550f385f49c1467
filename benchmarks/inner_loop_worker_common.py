"""What the workers of ``inner_loop.py`` share: models, data, and the talk with the parent.

A worker fits one model by one flow in one library. It reads commands from stdin, one JSON object
a line, and answers each with one: ``hello``, ``build``, ``calibrate``, ``run``, ``fit``, ``elbo``,
``stop``. Models are written once, for Pyro and NumPyro alike; data are made by the parent and
read by every worker.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = (64, 64)
BINS = 8
BOUND = 5.0
INIT_SCALE = 0.1
MIN_STEPS, MAX_STEPS = 20, 400_000  # of one round
GROUPS = 48  # of the hierarchical regression: 2 x 48 effects and 5 hyperparameters
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Spec:
    """One row of the benchmark, in one library.

    Attributes:
        library: Name of the library.
        model: Name of the model.
        flow: Kind of flow.
        depth: Number of its layers.
        particles: Draws of each step.
        data: File with the model's data.
        tier: Tier of our compiled loop.
        lr: Learning rate.
    """

    library: str
    model: str
    flow: str
    depth: int
    particles: int
    data: str
    tier: str = "auto"
    lr: float = 1e-3


# ---------------------------------------------------------------------- models and data


def make_model(name: str, ppl: Any, dist: Any) -> Callable:
    """The model in Pyro (``ppl`` is the module ``pyro``) or NumPyro."""
    def schools(sigma: Any, y: Any) -> None:
        mu = ppl.sample("mu", dist.Normal(0.0, 5.0))
        tau = ppl.sample("tau", dist.HalfCauchy(5.0))
        with ppl.plate("school", len(sigma)):
            shift = ppl.sample("shift", dist.Normal(0.0, 1.0))
            ppl.sample("obs", dist.Normal(mu + tau * shift, sigma), obs=y)

    def logistic(x: Any, y: Any) -> None:
        intercept = ppl.sample("intercept", dist.Normal(0.0, 5.0))
        with ppl.plate("feature", x.shape[-1]):
            effect = ppl.sample("effect", dist.Normal(0.0, 1.0))
        with ppl.plate("row", len(y)):
            ppl.sample("obs", dist.Bernoulli(logits=intercept + effect @ x.T), obs=y)

    def hierarchical(x: Any, group: Any, y: Any) -> None:
        mean_a = ppl.sample("mean_a", dist.Normal(0.0, 5.0))
        mean_b = ppl.sample("mean_b", dist.Normal(0.0, 5.0))
        scale_a = ppl.sample("scale_a", dist.HalfNormal(1.0))
        scale_b = ppl.sample("scale_b", dist.HalfNormal(1.0))
        noise = ppl.sample("noise", dist.HalfNormal(1.0))
        with ppl.plate("group", GROUPS):
            shift_a = ppl.sample("shift_a", dist.Normal(0.0, 1.0))
            shift_b = ppl.sample("shift_b", dist.Normal(0.0, 1.0))
        a, b = mean_a + scale_a * shift_a, mean_b + scale_b * shift_b
        with ppl.plate("row", len(y)):
            ppl.sample("obs", dist.Normal(a[..., group] + b[..., group] * x, noise), obs=y)

    def normal(y: Any) -> None:
        with ppl.plate("coordinate", len(y)):
            mean = ppl.sample("mean", dist.Normal(0.0, 1.0))
            ppl.sample("obs", dist.Normal(mean, 1.0), obs=y)

    return {"schools": schools, "logistic": logistic, "hierarchical": hierarchical,
            "normal": normal}[name.split("-")[0]]


def make_data(name: str) -> Arrays:
    """Arguments of a model, in order; ``normal-30`` is the normal model with 30 latents."""
    kind, *dim = name.split("-")
    if kind == "normal":
        return {"y": np.random.default_rng(0).normal(size=int(dim[0]))}
    return {"schools": _schools, "logistic": _logistic, "hierarchical": _hierarchical}[kind]()


def _schools() -> Arrays:
    return {"sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
            "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12])}


def _logistic() -> Arrays:
    from sklearn.datasets import load_breast_cancer

    bundle = load_breast_cancer()
    x = (bundle.data - bundle.data.mean(0)) / bundle.data.std(0)
    return {"x": x, "y": 1.0 - bundle.target}


def _hierarchical() -> Arrays:
    rng = np.random.default_rng(0)
    group, x = rng.integers(GROUPS, size=2000), rng.normal(size=2000)
    a, b = 1.0 + 0.5 * rng.normal(size=GROUPS), -0.5 + 0.3 * rng.normal(size=GROUPS)
    return {"x": x, "group": group, "y": a[group] + b[group] * x + 0.7 * rng.normal(size=2000)}


def read_data(spec: Spec) -> list[np.ndarray]:
    """Data of a row, floats in single precision."""
    with np.load(spec.data) as file:
        return [array.astype(np.float32) if array.dtype.kind == "f" else array
                for array in file.values()]


# ---------------------------------------------------------------------- the talk with the parent


class Subject(ABC):
    """One library fitting one row."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what is timed."""

    @abstractmethod
    def build(self) -> dict[str, Any]:
        """From model and data to the first finished step, everything made anew."""

    @abstractmethod
    def run(self, steps: int) -> dict[str, Any]:
        """Time so many further steps, or more; microseconds of one in processor and wall time."""

    def quick(self, steps: int) -> float:
        """Make just so many further steps; about the microseconds of one."""
        return float(self.run(steps)["us"])

    def calibrate(self, seconds: float) -> int:
        """Number of steps, at least 20, that take about so many seconds."""
        steps = MIN_STEPS
        while (taken := 1e-6 * steps * self.quick(steps)) < seconds / 4 and steps < MAX_STEPS:
            steps *= 4
        return max(MIN_STEPS, min(MAX_STEPS, round(steps * seconds / max(taken, 1e-9))))

    @abstractmethod
    def elbo(self, draws: int) -> float:
        """ELBO of the guide as it is."""


def serve(make: Callable[[Spec], Subject]) -> None:
    """Answer the parent's commands to the end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers and libraries print must not look like an answer
    subject = make(Spec(**json.loads(sys.argv[1])))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = _answer(subject, **command)
        except Exception as error:  # whatever a library throws is the row's entry
            answer = {"error": f"{type(error).__name__}: {_last_line(error)}"}
        answers.write(json.dumps(answer) + "\n")
        if command["do"] == "stop":
            return


def _answer(subject: Subject, do: str, **options: Any) -> dict[str, Any]:
    if do == "hello":
        return {"versions": subject.versions(), "peak_mb": peak_mb()}
    if do == "build":
        cpu, wall, result = timed(subject.build)
        return {"cpu": cpu, "wall": wall, **result}
    if do == "calibrate":
        return {"steps": subject.calibrate(**options)}
    if do == "run":
        return subject.run(**options)
    if do == "fit":
        return {"us": subject.quick(**options)}
    if do == "elbo":
        return {"elbo": subject.elbo(**options)}
    return {"peak_mb": peak_mb(), "compiler_mb": peak_mb(resource.RUSAGE_CHILDREN)}


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Processor seconds (children's included) and wall seconds of a call, and its result."""
    gc.collect()
    cpu, wall = _cpu(), time.perf_counter()
    result = function()
    return _cpu() - cpu, time.perf_counter() - wall, result


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


def per_step(cpu: float, wall: float, steps: int) -> dict[str, float]:
    """Seconds of so many steps as microseconds of each."""
    return {"us": 1e6 * cpu / steps, "wall_us": 1e6 * wall / steps}


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident size of this process, or of one it started, so far, in MB."""
    return resource.getrusage(who).ru_maxrss / 1024


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else "")[:200]


def write_data(name: str, folder: Path) -> str:
    """Write the data of a model for the workers; return the file's name."""
    path = folder / f"{name}.npz"
    np.savez(path, **make_data(name))
    return str(path)
