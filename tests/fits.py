"""Small fits of several kinds, what is compared of them, and copies of their checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_nfvi import NFVI, AutoFlow, Posterior, planar
from pyro_nfvi.flows import Triangular
from pyro_nfvi.inference import loop, stages
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.checkpoint import CheckpointStore

Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])
X = torch.linspace(-1.0, 1.0, 90).reshape(30, 3).sin()


def bent(y):
    """A posterior along a parabola, which no Gaussian follows."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(b + a ** 2, 0.5), obs=y[0])


def with_parameter(y):
    sigma = pyro.param("sigma", lambda: torch.tensor(2.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(3.0, mu, sigma), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=4) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def broken_off(y):
    """Beyond an edge that draws of the flow cross now and then there is no log joint."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    pyro.factor("edge", torch.where(mu > 1.1, torch.nan, 0.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, log_scale.exp()), obs=y)


def of_rows(x):
    """Logistic regression of the sign of the first column on the others, row by row."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 30, subsample_size=len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1).tanh(), 0.5), obs=x[..., 0])


def guide_of(model, num_layers=1):
    return AutoFlow(model, partial(planar, num_layers=num_layers), affine=Triangular)


def trained(model):
    """A guide that a fit has trained already, by a few steps."""
    guide = guide_of(model)
    NFVI(model, guide, num_particles=4, num_steps=3, seed=3, progress=False).run(Y)
    return guide


def small(model, guide=None, **options):
    guide = guide_of(model) if guide is None else guide
    return NFVI(model, guide, **{"num_particles": 8, "num_steps": 20, "progress": False,
                                 **options})


def data_loader():
    return DataLoader(TensorDataset(X), batch_size=8, shuffle=True)


def array_loader():
    return ArrayLoader(X, batch_size=8)


KINDS: dict[str, Callable[..., tuple[NFVI, tuple, dict[str, Any]]]] = {
    "c": lambda **options: (small(bent, compile="c", **options), (Y,), {}),
    "fx": lambda **options: (small(bent, compile="fx", **options), (Y,), {}),
    "eager": lambda **options: (small(bent, compile="eager", **options), (Y,), {}),
    "auto": lambda **options: (small(bent, **options), (Y,), {}),
    "parameter": lambda **options: (small(with_parameter, **options), (Y,), {}),
    "subsampled": lambda **options: (small(subsampled, **options), (Y,), {}),
    "rollbacks": lambda **options: (small(broken_off, **{"num_particles": 1, **options}), (Y,), {}),
    "trained": lambda **options: (small(bent, trained(bent), **options), (Y,), {}),
    "float32": lambda **options: (small(bent, dtype=torch.float32, **options), (Y,), {}),
    "array-loader": lambda **options: (small(of_rows, **options), (), {"loader": array_loader()}),
    "data-loader": lambda **options: (small(of_rows, **options), (), {"loader": data_loader()}),
    "array-loader-eager": lambda **options: (small(of_rows, compile="eager", **options), (),
                                             {"loader": array_loader()}),
}


def fit(kind: str, **options: Any) -> Posterior:
    """A fit of some kind, from the same random state on."""
    pyro.clear_param_store()
    nfvi, args, kwargs = KINDS[kind](**options)
    torch.manual_seed(11)
    return nfvi.run(*args, **kwargs)


def outcome(posterior: Posterior) -> dict[str, Any]:
    """All that two fits have to agree in, bit for bit."""
    history = asdict(posterior.history)
    history = {name: value for name, value in history.items() if name not in ("seconds", "engines")}
    return {"parameters": dict(posterior.guide.state_dict()),
            "store": {name: pyro.param(name).detach() for name in pyro.get_param_store()},
            "history": history, "tiers": [engine.tier for engine in posterior.history.engines],
            "draws": vars(posterior.draws), "random state": torch.get_rng_state()}


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of all that is not the same bit for bit; nan is the same as nan."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [text for key in one for text in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) \
            and len(one) == len(other):
        return [text for i, pair in enumerate(zip(one, other, strict=True))
                for text in differences(*pair, f"{name}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape \
            and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same else [name]
    both_nan = isinstance(one, float) and isinstance(other, float) and \
        math.isnan(one) and math.isnan(other)
    return [] if both_nan or one == other else [f"{name}: {one!r} != {other!r}"[:300]]


@contextmanager
def copied_checkpoints(monkeypatch: Any, folder: Path) -> Iterator[list[Path]]:
    """Copy the folder of checkpoints after each write, as it would be if the fit died there."""
    copies: list[Path] = []
    write = CheckpointStore.write

    def write_and_copy(store: CheckpointStore, state: dict[str, Any]) -> bool:
        written = write(store, state)
        copies.append(folder / f"{len(copies):03d}")
        shutil.copytree(store.folder, copies[-1])
        return written
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", write_and_copy)
        yield copies


def never_satisfied(monkeypatch: Any) -> None:
    """Let every stage of a fit be made, however good its draws are."""
    monkeypatch.setattr(stages, "GOOD", stages.Gate(-math.inf, 2.0))
    monkeypatch.setattr(stages, "NEARLY_EXACT", stages.Gate(-math.inf, 2.0))


def step_by_step(monkeypatch: Any) -> None:
    """Let a loop look at the outside after each step, and write a checkpoint if asked to."""
    monkeypatch.setattr(loop, "FIRST_CHUNK", 1)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)
