"""Random models, guides, data and arguments, and a judge of what becomes of them.

The promise: every model and every argument gives finite numbers, or one clear sentence. A case is
a frozen record whose ``repr`` is the code that makes it again: ``judge(<what is printed>)``.
"""

from __future__ import annotations

import inspect
import io
import math
import pkgutil
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
)
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_nfvi
from pyro_nfvi import flows, inference, vae

SECONDS = 120.0  # of computing; a case that takes longer hangs
SLOW, SLOWER = "stable", 10.0  # a prior that integrates at each look, and how much more it may take
WAITING = 10  # times as long, on a machine that is busy

# ---------------------------------------------------------------------- models

ODD_SCALES = (1.0, 1.0, 1.0, 2.0, 0.1, 1e-3, 1e3, 1e-30, 1e30)
LOWER = dist.transforms.LowerCholeskyTransform()
ORDERED = dist.transforms.OrderedTransform()

# Priors by a location, a scale, and a size of what has one.
PRIORS: dict[str, Callable[[Any, Any, int], Any]] = {
    "real": lambda loc, scale, n: dist.Normal(loc, scale),
    "student": lambda loc, scale, n: dist.StudentT(3.0, loc, scale),
    "cauchy": lambda loc, scale, n: dist.Cauchy(loc, scale),
    "laplace": lambda loc, scale, n: dist.Laplace(loc, scale),
    "positive": lambda loc, scale, n: dist.LogNormal(loc, scale),
    "half": lambda loc, scale, n: dist.HalfCauchy(scale),
    "gamma": lambda loc, scale, n: dist.Gamma(0.5 + n, scale),
    "inverse-gamma": lambda loc, scale, n: dist.InverseGamma(2.0, scale),
    "exponential": lambda loc, scale, n: dist.Exponential(scale),
    "unit": lambda loc, scale, n: dist.Beta(0.5, 2.0),
    "interval": lambda loc, scale, n: dist.Uniform(loc - scale, loc + scale),
    "pareto": lambda loc, scale, n: dist.Pareto(scale, 3.0),
    "logistic": lambda loc, scale, n: dist.Logistic(loc, scale),
    "mixture": lambda loc, scale, n: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)),
    "vector": lambda loc, scale, n: dist.Normal(loc, scale).expand([n]).to_event(1),
    "empty": lambda loc, scale, n: dist.Normal(loc, scale).expand([0]).to_event(1),
    "matrix": lambda loc, scale, n: dist.Normal(loc, scale).expand([n, 2]).to_event(2),
    "normals": lambda loc, scale, n: dist.MultivariateNormal(torch.zeros(n), torch.eye(n)),
    "simplex": lambda loc, scale, n: dist.Dirichlet(torch.ones(n + 1)),
    "one-simplex": lambda loc, scale, n: dist.Dirichlet(torch.ones(1)),
    "ordered": lambda loc, scale, n: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([n]).to_event(1), [ORDERED]),
    "correlation": lambda loc, scale, n: dist.LKJCholesky(n + 1, 1.0),
    "lower-cholesky": lambda loc, scale, n: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([n, n]).to_event(2), [LOWER]),
    "covariance": lambda loc, scale, n: dist.Wishart(torch.tensor(n + 1.0), torch.eye(n)),
    "angle": lambda loc, scale, n: dist.VonMises(0.0, 2.0),
    "sphere": lambda loc, scale, n: dist.ProjectedNormal(torch.ones(n + 1)),
    "improper": lambda loc, scale, n: dist.ImproperUniform(constraints.real, (), ()),
    "stable": lambda loc, scale, n: dist.Stable(1.5, 0.0, scale, loc),
    "point": lambda loc, scale, n: dist.Delta(torch.tensor(0.5)),
    "mixed-support": lambda loc, scale, n: dist.LogNormal(loc, scale).expand([n]).to_event(1),
    "relaxed": lambda loc, scale, n: dist.RelaxedBernoulli(torch.tensor(0.5), probs=0.3),
}
SUBTLE = {"improper", "stable", "point", "empty", "sphere", "relaxed", "one-simplex", "mixture",
          "covariance", "lower-cholesky"}  # taken less often


@dataclass(frozen=True)
class Site:
    """One latent: its prior, how it hangs on the one before, its plates, what is around it."""

    prior: str = "real"
    size: int = 2
    scale: float = 1.0
    on: str = ""
    plates: tuple[int, ...] = ()
    around: str = ""

    def sample(self, name: str, before: list[Tensor], plates: list[Any]) -> Tensor:
        loc, scale = 0.0, self.scale
        if before and self.on == "loc":
            loc = before[-1].sum()
        elif before and self.on == "scale":
            scale = before[-1].sum().exp()
        with _all(*[plates[i] for i in self.plates], *AROUND[self.around]()):
            value: Tensor = pyro.sample(name, PRIORS[self.prior](loc, scale, self.size))
        return value


AROUND: dict[str, Callable[[], list[Any]]] = {
    "": list,
    "mask": lambda: [poutine.mask(mask=torch.tensor(True))],
    "no-mask": lambda: [poutine.mask(mask=False)],
    "scale": lambda: [poutine.scale(scale=0.5)],
    "zero-scale": lambda: [poutine.scale(scale=1e-12)],
    "block": lambda: [poutine.block()],
    "reparam": lambda: [poutine.reparam(config=lambda site: LocScaleReparam(0.0) if isinstance(
        site["fn"], dist.Normal) and not site["is_observed"] else None)],
}


@contextmanager
def _all(*contexts: Any) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _all(*contexts[1:]):
        yield


def _in_plate(name: str, y: Any, make: Callable[[], Any]) -> None:
    with pyro.plate("data", 3 if y is None else len(y)):
        pyro.sample(name, make(), obs=y)


LIKELIHOODS: dict[str, Callable[[Tensor, Any], Any]] = {
    "none": lambda eta, y: None,
    "normal": lambda eta, y: _in_plate("y", y, lambda: dist.Normal(eta, 1.0)),
    "learned-scale": lambda eta, y: _in_plate("y", y, lambda: dist.Normal(0.0, eta.exp())),
    "any-scale": lambda eta, y: _in_plate("y", y, lambda: dist.Normal(0.0, eta)),
    "student": lambda eta, y: _in_plate("y", y, lambda: dist.StudentT(3.0, eta, 1.0)),
    "bernoulli": lambda eta, y: _in_plate("y", y, lambda: dist.Bernoulli(logits=eta)),
    "probability": lambda eta, y: _in_plate("y", y, lambda: dist.Bernoulli(eta)),
    "poisson": lambda eta, y: _in_plate("y", y, lambda: dist.Poisson(eta.exp())),
    "binomial": lambda eta, y: _in_plate("y", y, lambda: dist.Binomial(10, logits=eta)),
    "categorical": lambda eta, y: _in_plate("y", y, lambda: dist.Categorical(
        logits=torch.stack([eta, 0 * eta, -eta], -1))),
    "normals": lambda eta, y: pyro.sample("y", dist.MultivariateNormal(
        eta.expand(3), torch.eye(3)), obs=y),
    "covariance": lambda eta, y: pyro.sample("y", dist.MultivariateNormal(
        torch.zeros(3), torch.eye(3) + eta), obs=y),
    "event": lambda eta, y: pyro.sample("y", dist.Normal(eta, 1.0).expand([3]).to_event(1), obs=y),
    "no-plate": lambda eta, y: pyro.sample("y", dist.Normal(eta, 1.0), obs=y),
    "gamma": lambda eta, y: _in_plate("y", y, lambda: dist.Gamma(2.0, eta.exp())),
    "zero-inflated": lambda eta, y: _in_plate("y", y, lambda: dist.ZeroInflatedPoisson(
        eta.exp(), gate=torch.tensor(0.2))),
    "cubic": lambda eta, y: _in_plate("y", y, lambda: dist.Normal((eta ** 3).exp(), 1e-3)),
    "minibatch": lambda eta, y: _minibatch(eta, y),
    "masked": lambda eta, y: _masked(eta, y),
}


def _minibatch(eta: Tensor, y: Any) -> None:
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(eta, 1.0), obs=y[index])


def _masked(eta: Tensor, y: Any) -> None:
    with pyro.plate("data", len(y)), poutine.mask(mask=~torch.isnan(y)):
        pyro.sample("y", dist.Normal(eta, 1.0), obs=y.nan_to_num())


DATA: dict[str, Callable[[], Any]] = {
    "usual": lambda: torch.tensor([0.0, 1.0, 1.0]),
    "double": lambda: torch.tensor([0.0, 1.0, 2.0]).double(),
    "half": lambda: torch.tensor([0.0, 1.0, 2.0]).half(),
    "ints": lambda: torch.tensor([0, 1, 2]),
    "bools": lambda: torch.tensor([True, False, True]),
    "numpy": lambda: np.array([0.0, 1.0, 1.0]),
    "list": lambda: [0.0, 1.0, 1.0],
    "scalar": lambda: torch.tensor(1.0),
    "float": lambda: 1.0,
    "nan": lambda: torch.tensor([0.0, math.nan, 1.0]),
    "inf": lambda: torch.tensor([0.0, math.inf, 1.0]),
    "outside": lambda: torch.tensor([-1.5, 0.3, 70.0]),
    "empty": lambda: torch.zeros(0),
    "one": lambda: torch.ones(1),
    "constant": lambda: torch.ones(3),
    "tiny": lambda: torch.tensor([1e-30, -1e-30, 0.0]),
    "huge": lambda: torch.tensor([1e30, -1e30, 1e30]),
    "far": lambda: torch.tensor([1e6, 1e6, 1e6 + 1]),
    "column": lambda: torch.ones(3, 1),
    "wanting gradients": lambda: torch.ones(3, requires_grad=True),
    "string": lambda: "abc",
    "none": lambda: None,
}


def _raise(kind: type[Exception]) -> None:
    raise kind("mine")


def _sometimes(eta: Tensor) -> None:
    if eta > 0:
        _raise(RuntimeError)


def _branch(eta: Tensor) -> None:
    if eta > 0:
        pyro.factor("positive", -eta)


def _twice() -> None:
    pyro.sample("twice", dist.Normal(0.0, 1.0))
    pyro.sample("twice", dist.Normal(0.0, 1.0))


def _changing() -> None:
    size = int(torch.randint(1, 4, ()))
    pyro.sample("changing", dist.Normal(0.0, 1.0).expand([size]).to_event(1))


def _sequential() -> None:
    for i in pyro.plate("sequential", 2):
        pyro.sample(f"step{i}", dist.Normal(0.0, 1.0))


def _factor(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    return lambda eta: pyro.factor("factor", value(eta))


NAN_SITE = "undefined"
TWISTS: dict[str, Callable[[Tensor], Any]] = {
    "factor": _factor(lambda eta: -eta ** 2),
    "factor nan": _factor(lambda eta: eta * math.nan),
    "factor inf": _factor(lambda eta: eta * 0 + math.inf),
    "factor -inf": _factor(lambda eta: eta * 0 - math.inf),
    "factor vector": _factor(lambda eta: eta.expand(3)),
    "factor int": _factor(lambda eta: torch.tensor(3)),
    "factor overflow": _factor(lambda eta: -(eta ** 2).exp().exp()),
    "factor unbounded": _factor(lambda eta: eta ** 2),
    "factor log": _factor(lambda eta: eta.log()),
    "factor sqrt": _factor(lambda eta: eta.sqrt()),
    "factor half": _factor(lambda eta: torch.where(eta > 0, 0.0, -math.inf)),
    "factor step": _factor(lambda eta: torch.floor(eta)),
    "factor numpy": _factor(lambda eta: torch.tensor(float(np.sin(eta.detach().numpy())))),
    "factor item": _factor(lambda eta: torch.tensor(-eta.item() ** 2)),
    "factor detached": _factor(lambda eta: -eta.detach() ** 2),
    "factor noise": _factor(lambda eta: torch.randn(()) * eta),
    "factor complex": _factor(lambda eta: torch.fft.fft(eta.expand(4)).abs().sum()),
    "factor single": _factor(lambda eta: -eta.float() ** 2),
    "factor float32 data": _factor(lambda eta: (torch.ones(3, 3, dtype=torch.float32)
                                                @ eta.expand(3)).sum()),
    "factor cholesky": _factor(lambda eta: torch.linalg.cholesky(
        torch.eye(2) * eta).diagonal().sum()),
    "raises": lambda eta: _raise(KeyError),
    "raises ValueError": lambda eta: _raise(ValueError),
    "raises AssertionError": lambda eta: _raise(AssertionError),
    "raises sometimes": _sometimes,
    "branches": _branch,
    "asserts finite": lambda eta: None if math.isfinite(float(eta)) else _raise(ValueError),
    "discrete": lambda eta: pyro.sample("k", dist.Categorical(torch.ones(3))),
    "count": lambda eta: pyro.sample("k", dist.Poisson(2.0)),
    "enumerated": lambda eta: pyro.sample("k", dist.Bernoulli(0.5),
                                          infer={"enumerate": "parallel"}),
    "twice": lambda eta: _twice(),
    "changes": lambda eta: _changing(),
    "sequential": lambda eta: _sequential(),
    "deterministic": lambda eta: pyro.deterministic("d", eta.expand(3), event_dim=1),
    "deterministic nan": lambda eta: pyro.deterministic(NAN_SITE, eta * math.nan),
    "param": lambda eta: pyro.factor("p", -(pyro.param("p", torch.tensor(1.0)) - eta) ** 2),
    "param positive": lambda eta: pyro.factor("p", -(pyro.param(
        "p", torch.tensor(1.0), constraint=constraints.positive) - eta) ** 2),
    "observes latent": lambda eta: pyro.sample("o", dist.Normal(0.0, 1.0), obs=eta),
    "observes float": lambda eta: pyro.sample("o", dist.Normal(eta, 1.0), obs=0.5),
    "observes int": lambda eta: pyro.sample("o", dist.Normal(eta, 1.0), obs=torch.tensor(1)),
    "warns": lambda eta: warnings.warn("mine", stacklevel=1),
    "odd name": lambda eta: pyro.sample("a b/c.d[0]", dist.Normal(eta, 1.0)),
    "chain": lambda eta: pyro.sample("draw", dist.Normal(eta, 1.0)),
    "prints": lambda eta: print("mine"),
    "no grad": lambda eta: pyro.factor("quiet", torch.no_grad()(lambda: -eta ** 2)()),
    "in place": lambda eta: pyro.factor("zeros", torch.zeros(2).index_fill_(
        0, torch.tensor([0]), 1.0).sum() * eta),
}


@dataclass(frozen=True)
class Model:
    """A model and its data."""

    sites: tuple[Site, ...] = (Site(),)
    plates: tuple[tuple[int, int | None], ...] = ()
    likelihood: str = "none"
    data: str = "usual"
    twists: tuple[str, ...] = ()

    def __call__(self, y: Any = None, *, shift: float = 0.0) -> None:
        plates = [pyro.plate(f"plate{i}", size, subsample_size=part, dim=-1 - i)
                  for i, (size, part) in enumerate(self.plates)]
        values: list[Tensor] = []
        for i, site in enumerate(self.sites):
            values.append(site.sample(f"x{i}", values, plates))
        eta = sum((value.sum() for value in values), torch.tensor(shift))
        for twist in self.twists:
            TWISTS[twist](eta)
        LIKELIHOODS[self.likelihood](eta, y)

    def args(self) -> tuple[Any, ...]:
        return () if self.likelihood == "none" else (DATA[self.data](),)


# ---------------------------------------------------------------------- code

def raising(*args: Any, **kwargs: Any) -> Any:
    """A user's function that fails."""
    raise KeyError("mine")


def nothing(*args: Any, **kwargs: Any) -> None:
    """A user's function that forgot to return."""


def simple(y: Tensor) -> None:
    """The model that calls are about: two latents, one of them positive."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def local(x: Tensor) -> None:
    """A model with one latent a row."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.squeeze(-1))


def normal_density(z: Tensor) -> Tensor:
    """Log-density of a standard normal, up to a constant."""
    return -0.5 * z.square().sum(-1)


def _fitted() -> Any:
    fit = pyro_nfvi.NFVI(simple, num_steps=5, num_particles=8, seed=0, compile="fx",
                         progress=False)
    return fit.run(torch.tensor([1.0, 2.0, 0.5]))


def _mean_field() -> Any:
    pyro.clear_param_store()
    guide = AutoNormal(simple)
    guide(torch.ones(3))
    return pyro_nfvi.Posterior.of(simple, guide, torch.ones(3))


def _autoencoder() -> Any:
    made = vae.VAE(vae.Gaussian((3,)), 2)
    made.fit(torch.randn(8, 3), num_epochs=1, compile="eager", seed=0, progress=False)
    return made


def _amortized() -> Any:
    guide = pyro_nfvi.AutoAmortizedFlow(local, nn.Linear(1, 4), num_layers=1)
    return guide.setup(torch.randn(4, 1))


def _density() -> Any:
    return pyro_nfvi.fit_density(flows.nsf(2, num_layers=1), samples=torch.randn(200, 2),
                                 num_steps=3, seed=0, compile="eager", progress=False)


def _calibration() -> Any:
    return pyro_nfvi.calibrate(simple, _amortized_by_hand, torch.ones(3), amortized=True,
                               num_simulations=5, num_draws=19, seed=0, progress=False)


def _amortized_by_hand(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(0.5 * y.mean(), 1.0))
    pyro.sample("sigma", dist.LogNormal(0.1 * y.mean(), 1.0))


PARTS = {name: cache(make) for name, make in {
    "posterior": _fitted, "mean_field": _mean_field, "autoencoder": _autoencoder,
    "amortized": _amortized, "density": _density, "calibration": _calibration}.items()}


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    (folder / "damaged.pt").write_bytes(b"PK\x03\x04 not a fit")
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"a": 1}, folder / "foreign.pt")
    return folder


@cache
def _names() -> dict[str, Any]:
    """What the code of cases may name."""
    public = {name: getattr(room, name) for room in (pyro_nfvi, inference, flows)
              for name in room.__all__}
    return {**public, **{name: value for name, value in globals().items()
                         if not name.startswith("_")}, "Path": Path}


def run_code(code: str) -> Any:
    """What an expression gives; parts such as ``posterior`` are made when it names them."""
    names = dict(_names())
    names.update({name: make() for name, make in PARTS.items() if re.search(rf"\b{name}\b", code)})
    if "folder" in code:
        names["folder"] = _folder()
    if "fitted_file" in code:
        names["fitted_file"] = _fitted_file()
    return eval(code, names)


@cache
def _fitted_file() -> Path:
    path = _folder() / "fit.pt"
    PARTS["posterior"]().save(path)
    return path


ODD = ("None", "True", "False", "0", "-1", "1", "1.5", "-0.5", "0.0", "1e-30", "1e30", "math.nan",
       "math.inf", "-math.inf", "10**30", "'x'", "''", "b'x'", "[]", "()", "{}", "object()",
       "torch.zeros(0)", "torch.full((3,), math.nan)", "torch.tensor(1.0)", "torch.ones(2, 2)",
       "torch.tensor([True, False])", "np.zeros(3)", "np.array(['a'])", "np.float64(2.0)",
       "np.int64(2)", "nothing", "raising", "torch.float16", "torch.int32", "...", "[1, 2]",
       "('a', 'b')", "{'a': 1}", "{1: 2}", "Gaussian", "nn.Linear(2, 2)", "int", "range(3)",
       "iter([1])", "{'mu'}", "1j", "posterior")

USUAL = {  # of arguments, by name
    "input_dim": ("2", "1", "3", "5"), "context_dim": ("0", "0", "2"), "num_layers": ("1", "2"),
    "hidden_dims": ("(4,)", "(4, 3)", "()"), "activation": ("nn.ReLU", "nn.Softplus"),
    "num_ridges": ("1", "2"), "num_reflections": ("1", "3"), "num_passes": ("1", "2"),
    "conditioner": ("None", "RecurrentNet"), "num_bins": ("2", "4", "1"),
    "bound": ("3.0", "0.1", "100.0"), "num_units": ("1", "4"), "dense": ("True",),
    "block_dim": ("1", "3"), "num_hidden": ("0", "1"), "angles": ("[True, False]", "None"),
    "lipschitz": ("0.5", "0.99", "1.0"), "num_terms": ("1", "5"), "roulette": ("0.5", "1.0"),
    "end_time": ("1.0",), "method": ("'rk4'", "'dopri5'", "'euler'"), "rtol": ("1e-3",),
    "atol": ("1e-3",), "num_steps": ("3", "1", "10"), "adjoint": ("True",), "num_probes": ("1",),
    "image_shape": ("(1, 2, 2)", "(2, 1, 1)"), "num_scales": ("1", "2"), "hidden_channels": ("4",),
    "num_blocks": ("0", "1"), "transformer": ("Additive()", "RationalQuadraticSpline(3)"),
    "mask": ("[True, False]", "None"), "reverse": ("True",), "rank": ("1", "2"),
    "bijection": ("Coupling(2)", "Planar(2)", "Identity(3)"), "layers": ("[Planar(2), Radial(2)]",),
    "order": ("[1, 0]", "range(3)"), "max_log_scale": ("1.0",), "df": ("3.0", "1.0", "100.0"),
    "learn": ("True",), "num_components": ("1", "3"), "spread": ("1.0",),
    "weights": ("[0.5, 0.5]",), "flows": ("[Flow(Planar(2)), Flow(Diagonal(2))]",),
    "shift": ("torch.zeros(2)",), "factor": ("torch.eye(2)",), "scale": ("torch.ones(2)", "0.5"),
    "directions": ("torch.eye(2)",), "stretch": ("torch.zeros(2)",),
    "transform": ("dist.transforms.ExpTransform()",), "base": ("Gaussian(2)", "StudentT(2)"),
    "module": ("nn.Linear(2, 2)", "nn.Tanh()"), "structure": ("'full'", "'diagonal'"),
    "model": ("simple",), "guide": ("None", "AutoPlanar(simple)", "AutoGaussian(simple)"),
    "recipe": ("planar", "partial(nsf, num_layers=1)"), "init_scale": ("0.1", "10.0"),
    "init_loc_fn": ("init_to_sample", "init_to_mean"), "affine": ("Triangular", "LowRank"),
    "objective": ("None", "ELBO()", "ELBO(path_gradient=False)"), "num_particles": ("4", "1"),
    "lr": ("0.01", "1.0"), "max_seconds": ("1.0", "math.inf"), "seed": ("0", "3"),
    "dtype": ("torch.float32", "torch.float64", "None"), "device": ("'cpu'", "None"),
    "compile": ("'eager'", "'fx'"), "progress": ("False",), "num_samples": ("1", "5", "3000"),
    "weighted": ("True", "False"), "groups": ("('posterior',)", "('prior', 'posterior')"),
    "coords": ("{'data': list('abc')}",), "dims": ("{'mu': []}",), "restarts": ("0",),
    "losses": ("[3.0, 2.0, 1.0]", "None"), "num_chains": ("1", "2"), "num_draws": ("4", "20"),
    "warmup": ("1", "5"), "target_accept_prob": ("0.8",), "max_tree_depth": ("3",), "ax": ("None",),
    "reference": ("{'mu': np.zeros(20)}", "None"), "var_names": ("['mu']", "None"),
    "values": ("{'mu': torch.zeros(()), 'sigma': torch.ones(())}",),
    "path": ("folder / 'a.pt'", "str(folder / 'b.pt')"), "title": ("'T'",),
    "samples": ("torch.randn(50, 2)", "np.random.randn(40, 2)"), "context": ("None",),
    "log_density": ("None", "normal_density"), "validation": ("0.2", "None"), "patience": ("1",),
    "batch_size": ("10",), "standardize": ("False",), "annealing": ("0.0", "0.5"),
    "flow": ("planar(2, num_layers=1)", "Flow(nsf(2, num_layers=1))", "density"),
    "posteriors": ("[posterior]", "{'a': posterior, 'b': posterior}"),
    "fit": ("NFVI(simple, num_steps=2, num_particles=2, compile='eager', progress=False)",),
    "num_simulations": ("2",), "n_jobs": ("None", "1"), "amortized": ("None",),
    "sites": ("['mu']", "None"), "args_fn": ("None",), "quantities_fn": ("None",),
    "limits": ("(-3.0, 3.0)",), "encoder": ("nn.Linear(1, 4)",), "plate": ("'rows'", "None"),
    "inputs": ("None",), "global_guide": ("AutoPlanar",), "create_plates": ("None",),
    "likelihood": ("vae.Gaussian((3,))", "vae.Bernoulli((3,))"), "latent_dim": ("1", "2"),
    "decoder": ("None",), "posterior": ("vae.DiagonalGaussian", "vae.FullGaussian"),
    "prior": ("None", "vae.StandardGaussian(2)"), "name": ("'vae'",), "x": ("torch.ones(4, 3)",),
    "num_epochs": ("1",), "beta": ("1.0", "0.5"), "warm_up": ("0", "1"), "free_bits": ("0.1",),
    "mean": ("True",), "z": ("torch.zeros(2, 2)",), "event_shape": ("(3,)", "(2, 2)"),
    "num_classes": ("3",), "num_levels": ("4", "256"), "margin": ("0.1",), "min_scale": ("0.01",),
    "per_dimension": ("True",), "levels": ("(0.5, 0.9)",), "kind": ("'central'", "'hdi'"),
    "quantiles": ("[0.1, 0.5]",), "sample_shape": ("(3,)", "()"), "u": ("torch.zeros(2)",),
    "match": ("True", "False"), "path_gradient": ("True",), "feature_dim": ("4",),
    "value": ("torch.zeros(2)", "torch.zeros(4, 2)"), "nats": ("1.0",), "num_dims": ("3",),
    "pseudo_inputs": ("torch.zeros(4, 3)",), "out_dim": ("2",), "in_dim": ("2",),
    "channels": ("(4,)",), "strides": ("2",), "kernel_size": ("3",), "hidden_dim": ("4",),
    "gated": ("True",), "masked": ("True",), "output_dims": ("(4,)",), "num_params": ("1", "2"),
    "flip": ("True",), "block": ("(1, 2)", "(2, 1)"), "cache_size": ("1",), "frame": (
        "HouseholderFrame", "CoordinateFrame"), "inverse": ("None",), "max_bytes": ("None",),
    "max_num_steps": ("100",),
}

FIXED = {  # arguments that a case always has, so that it is short
    "NFVI": {"num_steps": "3", "num_particles": "4", "compile": "'eager'", "progress": "False"},
    "fit_density": {"num_steps": "3", "num_particles": "4", "compile": "'eager'",
                    "progress": "False"},
    "calibrate": {"num_simulations": "2", "num_draws": "9", "progress": "False", "seed": "0"},
    "posterior.diagnose": {"progress": "False"}, "posterior.metropolis": {"num_draws": "20"},
    "posterior.neutra": {"num_chains": "1", "num_draws": "4", "warmup": "3", "progress": "False"},
    "posterior.report": {"progress": "False"}, "posterior.to_arviz": {"num_samples": "20"},
    "autoencoder.fit": {"x": "torch.randn(6, 3)", "num_epochs": "1", "compile": "'eager'",
                        "progress": "False"},
    "autoencoder.amortization_gap": {"num_steps": "2", "num_particles": "2"},
    "autoencoder.log_likelihood": {"num_samples": "5"},
    "amortization_gap": {"num_steps": "2", "num_particles": "2"},
    "to_arviz": {"model": "simple", "guide": "posterior", "num_samples": "20"},
    "Posterior.load": {"path": "fitted_file"},
    "plot_flow": {"num_samples": "50"},
}
TAIL = {"NFVI": ".run(torch.tensor([1.0, 2.0, 0.5]))"}  # what a case goes on with
AFTER = {"calibrate": ["torch.tensor([1.0, 2.0, 0.5])"],  # further positional arguments
         "amortization_gap": ["torch.randn(4, 1)"]}
USUAL_OF = {  # where a name means something else
    "AutoAmortizedFlow": {"model": ("local",), "recipe": ("iaf", "planar")},
    "amortization_gap": {"guide": ("amortized",)},
    "AutoFlow": {"base": ("StudentT", "Gaussian", "partial(Mixture, num_components=2)")},
    "FlowDistribution": {"base": ("None",), "flow": ("Flow(Planar(2))",)},
    "density.log_prob": {"value": ("torch.zeros(2)", "torch.zeros(3, 2)")},
    "Posterior.load": {"path": ("fitted_file", "folder / 'damaged.pt'", "folder / 'empty.pt'",
                                "folder / 'foreign.pt'", "folder / 'none.pt'", "folder"),
                       "guide": ("None", "AutoIAF(simple)")},
    "Flow": {"bijection": ("Planar(2)", "nsf(2, num_layers=1)", "Planar(2, 2)")},
    "plot_flow": {"flow": ("density", "Flow(Planar(2))", "Flow(Planar(1))", "Flow(Planar(3))"),
                  "samples": ("None", "torch.randn(20, 2)")},
    "Squeeze": {"bijection": ("Coupling(4)",), "image_shape": ("(1, 2, 2)",)},
    "Pixelwise": {"bijection": ("Coupling(2)",), "image_shape": ("(2, 1, 2)",)},
    "Split": {"input_dim": ("4",)}, "Amortized": {"context_dim": ("3",)},
    "autoencoder.fit": {"mask": ("torch.ones(6, 3).bool()",), "validation": ("None",
                                                                           "torch.randn(4, 3)")},
}
for _method in ("encode", "reconstruct", "latents", "elbo", "log_likelihood", "active_units"):
    USUAL_OF[f"autoencoder.{_method}"] = {"mask": ("torch.ones(4, 3).bool()", "None"), "x": (
        "torch.ones(4, 3)", "torch.zeros(0, 3)", "torch.ones(1, 3)", "torch.ones(4, 2)")}

RECIPES = tuple(name for name in flows.__all__ if name[0].islower()
                and name not in ("channel_mask", "checkerboard_mask"))
LAYERS = ("Diagonal", "Triangular", "LULinear", "LowRank", "Householder", "Planar", "Radial",
          "Sylvester", "Coupling", "Autoregressive", "BlockAutoregressive", "Elementwise",
          "AngularDiagonal", "Continuous", "Residual", "Identity", "Permutation", "Compose",
          "Inverse", "FromTransform", "FreeForm", "FixedLinear", "FixedLowRank", "Amortized",
          "Pixelwise", "Squeeze", "Split")
TRANSFORMERS = ("Affine", "Multiplicative", "RationalQuadraticSpline", "LinearSpline",
                "CircularSpline", "MonotoneIntegral", "DeepSigmoid")
BASES = ("Gaussian", "StudentT", "MultivariateStudentT", "Mixture", "MixtureOfFlows",
         "UniformAngles")
GUIDES = ("AutoFlow", "AutoGaussian", "AutoPlanar", "AutoRadial", "AutoIAF", "AutoSpline",
          "AutoPathfinder", "AutoAmortizedFlow")
POSTERIOR = tuple(f"posterior.{name}" for name in (
    "sample", "resample", "log_prob", "summary", "to_arviz", "diagnose", "metropolis", "neutra",
    "plot_elbo", "plot_weights", "plot_pareto_k", "plot_marginals", "plot_pairs",
    "plot_predictive", "report", "save"))
OTHERS = ("NFVI", "NFVI", "NFVI", "fit_density", "fit_density", "calibrate", "compare",
          "to_arviz", "plot_flow", "Posterior.load", "Flow", "FlowDistribution", "density.log_prob",
          "density.sample", "density.condition", "density.expand", "amortization_gap",
          "posterior.guide.sample_posterior", "posterior.guide.log_prob",
          "posterior.guide.quantiles", "calibration.coverage", "calibration.plot_ecdf",
          "mean_field.sample", "mean_field.log_prob", "mean_field.to_arviz", "Dequantization",
          "ELBO", "CompiledTrace_ELBO", "CompiledTraceMeanField_ELBO", "checkerboard_mask",
          "channel_mask", "MLP")
AUTOENCODERS = ("vae.VAE", *(f"autoencoder.{name}" for name in (
    "fit", "encode", "decode", "reconstruct", "generate", "latents", "elbo", "log_likelihood",
    "active_units", "amortization_gap", "save", "load")), *(f"vae.{name}" for name in (
        "Bernoulli", "Categorical", "Gaussian", "LearnedGaussian", "HeteroscedasticGaussian",
        "DiscretizedLogistic", "Poisson", "NegativeBinomial", "ContinuousBernoulli",
        "MLPEncoder", "MLPDecoder", "ConvEncoder", "ConvDecoder", "RecurrentEncoder",
        "RecurrentDecoder", "SetEncoder", "DiagonalGaussian", "FullGaussian", "FlowPosterior",
        "FlowPrior", "VampPrior", "StandardGaussian", "bits_per_dim")))
TARGETS = (RECIPES, LAYERS, TRANSFORMERS, BASES, GUIDES, POSTERIOR, POSTERIOR, OTHERS, OTHERS,
           AUTOENCODERS)


@dataclass(frozen=True)
class Call:
    """A call of something public, as code."""

    code: str

    def run(self) -> None:
        use(run_code(self.code))


# ---------------------------------------------------------------------- fits

FIT_GUIDES: dict[str, Callable[[Model], Any]] = {
    "default": lambda model: None,
    "gaussian": lambda model: pyro_nfvi.AutoGaussian(model),
    "low-rank": lambda model: pyro_nfvi.AutoGaussian(model, affine=flows.LowRank),
    "student": lambda model: pyro_nfvi.AutoGaussian(model, base=flows.StudentT),
    "mixture": lambda model: pyro_nfvi.AutoPlanar(model, num_layers=1, base=flows.Mixture),
    "pathfinder": lambda model: pyro_nfvi.AutoPathfinder(model),
    "from draws": lambda model: pyro_nfvi.AutoIAF(model, init_loc_fn=init_to_sample, num_layers=1),
    "from means": lambda model: pyro_nfvi.AutoPlanar(model, init_loc_fn=init_to_mean),
    "uniform": lambda model: pyro_nfvi.AutoPlanar(model, init_loc_fn=init_to_uniform),
    "feasible": lambda model: pyro_nfvi.AutoPlanar(model, init_loc_fn=init_to_feasible),
    "narrow": lambda model: pyro_nfvi.AutoFlow(model, init_scale=1e-30),
    "wide": lambda model: pyro_nfvi.AutoFlow(model, init_scale=1e30),
    "of nothing": lambda model: pyro_nfvi.AutoFlow(model, nothing),
    "raising": lambda model: pyro_nfvi.AutoFlow(model, raising),
    "too large": lambda model: pyro_nfvi.AutoFlow(model, lambda dim: flows.nsf(dim + 1)),
    "start nan": lambda model: pyro_nfvi.AutoPlanar(model, init_loc_fn=lambda site: torch.full_like(
        init_to_sample(site), math.nan)),
    "start nowhere": lambda model: pyro_nfvi.AutoPlanar(model, init_loc_fn=nothing),
    "spline transform": lambda model: pyro_nfvi.AutoFlow(model, dist.transforms.spline),
    "angles": lambda model: pyro_nfvi.AutoFlow(model, flows.ncsf, base=flows.UniformAngles,
                                               affine=flows.AngularDiagonal),
    "mean field": lambda model: AutoNormal(model),
    "delta": lambda model: AutoDelta(model),
    **{name: partial(lambda model, name: pyro_nfvi.AutoFlow(model, getattr(flows, name),
                                                            num_layers=1), name=name)
       for name in RECIPES if name not in ("auto",)},
}

READS = (  # what users do with a fit
    "posterior.sample(3)", "posterior.resample(7)", "posterior.log_prob(posterior.sample(4))",
    "posterior.summary()", "repr(posterior)", "posterior.to_arviz(50)",
    "posterior.to_arviz(20, weighted=False)", "posterior.diagnose(progress=False)",
    "posterior.metropolis(num_chains=2, num_draws=20, warmup=5, seed=0)",
    "posterior.neutra(num_chains=1, num_draws=4, warmup=4, seed=0, progress=False)",
    "posterior.plot_elbo()", "posterior.plot_weights()", "posterior.plot_pareto_k()",
    "posterior.plot_marginals()", "posterior.plot_pairs()", "posterior.plot_predictive()",
    "posterior.save(folder / 'case.pt')", "compare([posterior, posterior])",
    "posterior.guide.median()", "posterior.guide.sample_posterior(3)",
    "posterior.report(folder / 'case.html', progress=False)",
)


@dataclass(frozen=True)
class Fit:
    """A fit of a model by NFVI, and what is read off it."""

    model: Model
    guide: str = "default"
    options: str = ""
    shift: float = 0.0
    reads: tuple[str, ...] = ()

    def run(self) -> None:
        options = {"num_steps": 4, "num_particles": 4, "seed": 0, "compile": "eager",
                   "progress": False, **eval(f"dict({self.options})", dict(_names()))}
        keywords = {"shift": self.shift} if self.shift else {}
        fit = pyro_nfvi.NFVI(self.model, FIT_GUIDES[self.guide](self.model), **options)
        posterior = fit.run(*self.model.args(), **keywords)
        check_posterior(posterior)
        for read in self.reads:
            names = {**_names(), "posterior": posterior, "folder": _folder()}
            check_finite(eval(read, names), read)


class NotFinite(Exception):
    """A result that is not a number, without a word."""


def check_posterior(posterior: Any) -> None:
    """A fit that was returned has draws in their supports, and an honest account of them."""
    draws = posterior.sample(50)
    for site in posterior.log_joint.layout:
        if not draws[site.name].isfinite().all():
            raise NotFinite(f"draws of {site.name} are not finite")
    value, error = posterior.elbo
    numbers = {"ELBO": value, "k-hat": posterior.pareto_k, "ESS": posterior.ess}
    for name, number in numbers.items():
        if math.isnan(number):
            raise NotFinite(f"{name} is nan")
    summary = posterior.summary()
    if not math.isfinite(value) and summary.trusted:
        raise NotFinite(f"an ELBO of {value} is trusted")
    check_finite(summary, "summary", allowed=("r_hat",))


def check_finite(value: Any, what: str, allowed: tuple[str, ...] = ()) -> None:
    """No nan anywhere in a result."""
    for path, leaf in leaves(value, what):
        if any(name in path for name in (*allowed, *MAY_BE_NAN)):
            continue
        if leaf.isnan().any() if isinstance(leaf, Tensor) else np.isnan(leaf).any():
            raise NotFinite(f"nan in {path}")


MAY_BE_NAN = ("r_hat", "history", "elbo_se", "seconds", "standard_error", "p_value", "ess_tail",
              "ess_bulk", "mcse", "observed_data", "constant_data", "figure",
              "compare([posterior, posterior]).elbo")  # of point masses


def leaves(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The floating-point numbers in a result, with where they are."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value.detach()
    elif isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            yield path, value
    elif isinstance(value, float):
        yield path, value
    elif isinstance(value, Mapping) and depth < 4:
        for name, item in value.items():
            yield from leaves(item, f"{path}[{name!r}]", depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 4:
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]", depth + 1)
    elif hasattr(value, "table"):
        yield from leaves(value.table, f"{path}.table", depth)
    elif hasattr(value, "select_dtypes"):  # a data frame, less a site that the model makes nan
        of_model = value.index.astype(str).str.match(rf"{NAN_SITE}(\[|$)")
        for name, column in value[~of_model].select_dtypes("float").items():
            yield f"{path}.{name}", column.to_numpy()
    elif hasattr(value, "groups"):
        yield from _arviz_leaves(value, path)


def _arviz_leaves(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    names = data.groups() if callable(data.groups) else data.groups
    for group in names:
        with suppress(AttributeError):
            for name, variable in data[group].data_vars.items():
                if variable.dtype.kind == "f" and name != NAN_SITE:
                    yield f"{path}.{group}.{name}", variable.values


def use(made: Any) -> None:
    """Use what a call returned: it must work, and give finite numbers."""
    if isinstance(made, flows.Bijection):
        context = torch.randn(3, made.context_dim) if made.context_dim else None
        u = torch.randn(3, made.input_dim).to(next(made.parameters(), torch.empty(0)))
        z, log_det = made(u, context)
        check_finite((z, log_det), "forward")
        check_finite(made.inverse(z.detach(), context), "inverse")
    elif isinstance(made, flows.Transformer):
        u = torch.linspace(-3, 3, 5).reshape(1, 5)
        params = torch.zeros(1, 5, made.params_per_dim)
        check_finite((made.forward(u, params), made.inverse(u, params)), "transformer")
    elif isinstance(made, flows.Base):
        u = made.rsample((3,))
        check_finite((u, made.log_prob(u)), "base")
    elif isinstance(made, flows.Flow):
        context = torch.randn(made.context_dim) if made.context_dim else None
        check_finite(made.rsample_and_log_prob((3,), context), "flow")
    elif isinstance(made, pyro_nfvi.AutoAmortizedFlow):
        check_finite(made(torch.randn(4, 1)), "guide")
    elif isinstance(made, pyro_nfvi.AutoFlow):
        check_finite(made(torch.ones(3)), "guide")
        check_finite(made.sample_posterior(2), "guide")
    elif isinstance(made, pyro_nfvi.Posterior):
        check_posterior(made)
    elif isinstance(made, vae.VAE):
        x = torch.ones(2, *made.event_shape)
        check_finite((made.elbo(x), made.generate(2)), "autoencoder")
    elif isinstance(made, pyro.distributions.Distribution):
        check_finite(made.sample(), "sample")
    else:
        check_finite(made, "result")


# ---------------------------------------------------------------------- the judge

@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    kind: str  # "finite", "clear error", "the model's own error", "failure"
    words: str = ""
    seconds: float = 0.0
    details: str = ""

    @property
    def failed(self) -> bool:
        return self.kind == "failure"


class _Hang(BaseException):
    """It takes too long."""


def judge(case: Fit | Call, seconds: float = SECONDS) -> Outcome:
    """Run a case, and say whether the promise was kept."""
    start = time.process_time()
    seconds *= SLOWER if isinstance(case, Fit) and any(
        site.prior == SLOW for site in case.model.sites) else 1.0
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    settings = (torch.get_default_dtype(), pyro.settings.get(), torch.is_grad_enabled())
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(io.StringIO()), \
            redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        try:
            with _alarm(seconds):
                for name, make in PARTS.items():  # made outside of the case's warnings
                    if isinstance(case, Call) and re.search(rf"\b{name}\b", case.code):
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            make()
                case.run()
            kind, words, details = "finite", "", ""
        except _Hang:
            kind, words, details = "failure", f"hangs: more than {seconds:.0f} s", ""
        except Exception as error:
            kind, words = _of_error(case, error)
            details = "".join(traceback.format_exception(error)) if kind == "failure" else ""
    _close_figures()
    if kind != "failure" and (stray := _stray(case, caught)):
        kind, words = "failure", f"warns in words not ours: {stray}"
    if settings != (torch.get_default_dtype(), pyro.settings.get(), torch.is_grad_enabled()):
        kind, words = "failure", "leaves torch's or Pyro's settings changed"
        torch.set_default_dtype(settings[0])
        pyro.settings.set(**settings[1])
    return Outcome(kind, words, time.process_time() - start, details)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End what computes for so long, or waits for ten times as long."""
    def ring(*_: Any) -> None:
        raise _Hang
    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds),
              (signal.SIGALRM, signal.ITIMER_REAL, WAITING * seconds))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _of_error(case: Fit | Call, error: Exception) -> tuple[str, str]:
    words = str(error)
    if is_clear(error):
        return "clear error", words
    of_model = _first_words(error) in plain_errors(case) if isinstance(case, Fit) else \
        "Trace Shapes:" in words and "simple" not in case.code  # Pyro's words on errors in models
    if "mine" in words or of_model:
        return "the model's own error", words.split("\n")[0]
    return "failure", f"{type(error).__name__}: {words}"[:400]


@cache
def owners() -> frozenset[str]:
    """Names of all our classes, functions and methods."""
    names = set()
    for module in pkgutil.walk_packages(pyro_nfvi.__path__, "pyro_nfvi."):
        for name, value in vars(import_module(module.name)).items():
            if (getattr(value, "__module__", "") or "").startswith("pyro_nfvi") and callable(value):
                names |= {name, *(vars(value) if inspect.isclass(value) else ())}
    return frozenset(names)


def is_clear(error: Exception) -> bool:
    """Whether an error is one of ours: names its owner, and is a sentence or two."""
    words = str(error).split("Trace Shapes:")[0].strip()  # which Pyro adds where a model runs
    first = re.match(r"\w+", words)
    ours = first is not None and first.group() in owners()
    whole = words.endswith((".", ")", "...")) and len(words.split()) > 4
    kinds = (ValueError, NotImplementedError)
    if isinstance(error, RuntimeError) and not isinstance(error, kinds):
        return ours and "is built at its first call" in words
    return isinstance(error, kinds) and ours and whole and len(words) < 900


def plain_errors(fit: Fit) -> set[tuple[str, str]]:
    """What the model says for itself when it is traced and scored."""
    found = set()
    keywords = {"shift": fit.shift} if fit.shift else {}
    for number in range(30):
        pyro.clear_param_store()
        pyro.set_rng_seed(number)
        for validate in (True, False):
            try:
                with pyro.validation_enabled(validate):
                    trace = poutine.trace(fit.model).get_trace(*fit.model.args(), **keywords)
                    trace.compute_log_prob()
            except Exception as error:
                found.add(_first_words(error))
    return found


def _first_words(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)[:30]


def _stray(case: Fit | Call, caught: list[warnings.WarningMessage]) -> str:
    """The first warning that is neither ours nor the model's."""
    for warning in caught:
        words = str(warning.message)
        first = re.match(r"\w+", words)
        ours = first is not None and first.group() in owners()
        if ours or "mine" in words or any(known in words for known in KNOWN_WARNINGS):
            continue
        if isinstance(case, Fit) and words[:30] in _plain_warnings(case):
            continue
        return f"{type(warning.message).__name__}: {words[:300]} ({warning.filename})"
    return ""


KNOWN_WARNINGS = (  # torch's, on models that take numbers out of tensors, or that vmap slows down
    "Converting a tensor with requires_grad=True to a scalar",
    "There is a performance drop because we have not yet implemented the batching rule")


def _plain_warnings(fit: Fit) -> set[str]:
    keywords = {"shift": fit.shift} if fit.shift else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(10):
            pyro.set_rng_seed(number)
            with suppress(Exception):
                poutine.trace(fit.model).get_trace(*fit.model.args(), **keywords).compute_log_prob()
    return {str(warning.message)[:30] for warning in caught}


def _close_figures() -> None:
    from matplotlib import pyplot

    pyplot.close("all")


# ---------------------------------------------------------------------- strategies

def _mostly(usual: Any, *others: Any, times: int = 4) -> st.SearchStrategy[Any]:
    return st.sampled_from((usual,) * times + others)


COMMON = tuple(name for name in PRIORS if name not in SUBTLE)


ONE_BY_ONE = {"factor numpy", "factor item", "raises sometimes", "branches", "asserts finite"}
ANY_TWIST = 4 * tuple(name for name in TWISTS if name not in ONE_BY_ONE) + tuple(
    sorted(ONE_BY_ONE))
ODDITIES = ("scale", "prior", "around", "data", "twist", "plate")


@st.composite
def _sites(draw: Any, num_plates: int, odd: frozenset[str]) -> Site:
    prior = draw(st.sampled_from(tuple(PRIORS) if "prior" in odd else COMMON))
    scale = draw(st.sampled_from(ODD_SCALES if "scale" in odd else (1.0, 1.0, 2.0, 0.1)))
    plates = tuple(i for i in range(num_plates) if draw(st.booleans()))
    return Site(prior, draw(st.integers(1, 3)), scale,
                draw(st.sampled_from(("", "", "loc", "scale"))), plates,
                draw(st.sampled_from(tuple(AROUND))) if "around" in odd else "")


@st.composite
def models(draw: Any) -> Model:
    """Models with one to five latents, up to two plates, a likelihood, and up to two oddities."""
    odd = frozenset(draw(st.lists(st.sampled_from(ODDITIES), max_size=2)))
    plates = tuple(draw(st.lists(st.sampled_from(
        ((4, 2), (0, None), (1, None)) if "plate" in odd else ((2, None), (3, None))), max_size=2)))
    sites = tuple(draw(_sites(len(plates), odd)) for _ in range(draw(st.integers(1, 4))))
    likelihood = draw(st.sampled_from(tuple(LIKELIHOODS)))
    data = draw(st.sampled_from(tuple(DATA) if "data" in odd else ("usual", "usual", "constant")))
    twists = draw(st.lists(st.sampled_from(ANY_TWIST), min_size=1, max_size=2, unique=True)) \
        if "twist" in odd else ()
    return Model(sites, plates, likelihood, data, tuple(twists))


FIT_OPTIONS = ("num_steps=1", "num_steps=20", "num_steps=60", "num_particles=1",
               "num_particles=16", "lr=1e-30", "lr=1e30", "lr=1.0", "seed=None", "max_seconds=1e-9",
               "max_seconds=0.5", "dtype=torch.float32", "dtype=torch.float64",
               "dtype=torch.float16", "dtype=torch.bfloat16", "compile='fx'", "compile='auto'",
               "compile='c'", "objective=ELBO(path_gradient=False)", "objective=nothing",
               "device='cpu'", "device='meta'")


@st.composite
def fits(draw: Any) -> Fit:
    """Fits of random models by random guides, and what is read off them."""
    options = draw(st.lists(st.sampled_from(FIT_OPTIONS), max_size=2,
                            unique_by=lambda option: option.split("=")[0])) \
        if draw(st.booleans()) else []
    return Fit(draw(models()), draw(st.sampled_from(("default",) * 20 + tuple(FIT_GUIDES))),
               ", ".join(options), draw(_mostly(0.0, 0.5, 1e30, math.inf, times=12)),
               (draw(st.sampled_from(READS)),))


def _parameters(target: str) -> dict[str, inspect.Parameter]:
    return _signatures(target)


@cache
def _signatures(target: str) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(run_code(target))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in signature.parameters.items()
            if parameter.kind not in variadic and name not in ("self", "args", "kwargs")}


def drawn(strategy: st.SearchStrategy[Any], number: int, count: int) -> list[Any]:
    """Different examples of a strategy, always the same for a number."""
    found: dict[Any, None] = {}

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def keep(case: Any) -> None:
        found[case] = None
    keep()
    return list(found)


@st.composite
def calls(draw: Any) -> Call:
    """Calls of something public, most with one or two odd arguments."""
    target = draw(st.sampled_from(draw(st.sampled_from(TARGETS))))
    parameters = _parameters(target)
    required = [name for name, parameter in parameters.items()
                if parameter.default is inspect.Parameter.empty]
    optional = [name for name in parameters if name not in required]
    chosen = draw(st.lists(st.sampled_from(optional), max_size=2, unique=True)) if optional else []
    fixed = dict(FIXED.get(target, {}))
    given = [*required, *[name for name in fixed if name not in required],
             *[name for name in chosen if name not in fixed]]
    odd = set(draw(st.lists(st.sampled_from(given), max_size=2))) if given else set()
    code = {name: draw(st.sampled_from(ODD)) if name in odd else fixed.get(name) or
            draw(st.sampled_from(_usual(target, name))) for name in given}
    positional = [code.pop(name) for name in list(required)] if target in AFTER else []
    arguments = [*positional, *AFTER.get(target, []),
                 *[f"{name}={value}" for name, value in code.items()]]
    return Call(f"{target}({', '.join(arguments)}){TAIL.get(target, '')}")


def _usual(target: str, name: str) -> tuple[str, ...]:
    special = USUAL_OF.get("AutoFlow" if target in GUIDES and target not in USUAL_OF else target,
                           {})
    return special.get(name) or USUAL.get(name) or ODD


def cases() -> st.SearchStrategy[Fit | Call]:
    """Everything: four calls for each fit."""
    return st.one_of(fits(), calls(), calls(), calls(), calls())
