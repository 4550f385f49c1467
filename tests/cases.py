"""The single list of what exists: named constructors that the property tests run over.

A new bijection, transformer, base, guide or model gets one line here, and every property test runs
on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import transforms as torch_transforms

from pyro_nfvi import flows, testing
from pyro_nfvi.flows import (
    Additive,
    Affine,
    Amortized,
    Autoregressive,
    Base,
    Bijection,
    Compose,
    Coupling,
    Diagonal,
    FixedLinear,
    FixedLowRank,
    Flow,
    FromTransform,
    Gaussian,
    Householder,
    Identity,
    Inverse,
    LowRank,
    LULinear,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    Permutation,
    Planar,
    Radial,
    RationalQuadraticSpline,
    StudentT,
    Sylvester,
    Transformer,
    Triangular,
    maf,
    nice,
)
from pyro_nfvi.guides import (
    AutoFlow,
    AutoGaussian,
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoSpline,
)
from pyro_nfvi.inference import AutoPathfinder

# ------------------------------------------------------------------ flows

TRANSFORMERS: dict[str, Callable[[], Transformer]] = {
    "additive": Additive,
    "affine": Affine,
    "spline": RationalQuadraticSpline,
}


def mixture_of_flows(input_dim: int) -> MixtureOfFlows:
    """A full and a diagonal Gaussian, away from where they start."""
    flows = [Flow(Triangular(input_dim)), Flow(Diagonal(input_dim))]
    return MixtureOfFlows([testing.perturb(flow, 1.0) for flow in flows], weights=[3.0, 1.0])


BASES: dict[str, Callable[[int], Base]] = {
    "gaussian": Gaussian,
    "student-t": StudentT,
    "student-t-learned": partial(StudentT, df=3.0, learn=True),
    "multivariate-student-t": MultivariateStudentT,
    "mixture": partial(Mixture, num_components=3),
    "mixture-of-flows": mixture_of_flows,
}

RECIPES: dict[str, Callable[..., Bijection]] = {
    name: partial(getattr(flows, name), num_layers=2)
    for name in ("planar", "radial", "iaf", "maf", "nice", "realnvp", "nsf", "sylvester")
}
RECIPES["auto"] = flows.auto


def reversal(input_dim: int, context_dim: int = 0) -> Permutation:
    """The coordinates in reverse order."""
    return Permutation(range(input_dim)[::-1])


def fixed_linear(input_dim: int, context_dim: int = 0) -> FixedLinear:
    """A shift and a lower-triangular matrix, the same at every call."""
    place = torch.linspace(-1, 1, input_dim, dtype=torch.float64)
    factor = torch.outer(place, 1 + place).tril(-1) + (0.5 + place.square()).diag()
    return FixedLinear(2 * place - 0.5, factor)


def fixed_low_rank(input_dim: int, context_dim: int = 0) -> FixedLowRank:
    """Scales, and up to two directions, one stretched and one squeezed."""
    place = torch.linspace(-1, 1, input_dim, dtype=torch.float64)
    rank = min(input_dim, 2)
    columns = torch.stack([torch.ones_like(place), 0.3 + place], -1)[:, :rank]
    directions = torch.linalg.qr(columns).Q
    return FixedLowRank(2 * place - 0.5, 0.5 + place.square(), directions,
                        torch.tensor([2.0, -0.6]).to(place)[:rank])


def mixed_stack(input_dim: int, context_dim: int = 0) -> Compose:
    """Layers of several kinds, of which two take no context; the identity at the start."""
    return Compose([Triangular(input_dim, context_dim), reversal(input_dim),
                    Planar(input_dim, context_dim), reversal(input_dim),
                    Inverse(Coupling(input_dim, context_dim))])


def amortized(input_dim: int, context_dim: int = 0) -> Bijection:
    """A layer in units of the context, which there has to be."""
    return Amortized(Coupling(input_dim, 2), context_dim) if context_dim else Coupling(input_dim)


def alternate(input_dim: int, context_dim: int = 0) -> Coupling:
    """A coupling that moves every other coordinate, by a mask that is no slice of halves."""
    return Coupling(input_dim, context_dim, mask=[k % 2 == 0 for k in range(input_dim)])


def from_torch(input_dim: int, context_dim: int = 0) -> FromTransform:
    """A chain of elementwise torch transforms, one decreasing, one inverted."""
    squash = torch_transforms.SigmoidTransform()
    return FromTransform(torch_transforms.ComposeTransform([
        torch_transforms.AffineTransform(0.5, -0.5), squash,
        torch_transforms.PowerTransform(2.0), squash.inv]), input_dim)


def from_pyro_spline(input_dim: int, context_dim: int = 0) -> FromTransform:
    """Pyro's elementwise spline."""
    return FromTransform(pyro_transforms.spline(input_dim, count_bins=4), input_dim)


def from_pyro_inverse(input_dim: int, context_dim: int = 0) -> FromTransform:
    """The inverse of a Pyro transform."""
    return FromTransform(pyro_transforms.spline(input_dim, count_bins=4).inv, input_dim)


def from_zuko(input_dim: int, context_dim: int = 0) -> FromTransform:
    """Zuko's lazy autoregressive transform."""
    layer = zuko.flows.MaskedAutoregressiveTransform(
        input_dim, context_dim, hidden_features=(16, 16))
    return FromTransform(layer, input_dim, context_dim)


BIJECTIONS: dict[str, Callable[[int, int], Bijection]] = {
    "diagonal": Diagonal,
    "triangular": Triangular,
    "lu": LULinear,
    "low-rank": LowRank,
    "low-rank-one": partial(LowRank, rank=1),
    "householder": Householder,
    "identity": lambda input_dim, context_dim: Identity(input_dim),
    "permutation": reversal,
    "fixed-linear": fixed_linear,
    "fixed-low-rank": fixed_low_rank,
    "planar": Planar,
    "radial": Radial,
    "sylvester": Sylvester,
    "sylvester-one-ridge": partial(Sylvester, num_ridges=1),
    "amortized": amortized,
    "coupling-mask": alternate,
    "autoregressive-reverse": partial(Autoregressive, reverse=True),
    "autoregressive-one-pass": partial(Autoregressive, num_passes=1),
    "inverse": lambda input_dim, context_dim: Inverse(Planar(input_dim, context_dim)),
    "compose": mixed_stack,
    "from-torch": from_torch,
    "from-pyro-spline": from_pyro_spline,
    "from-pyro-inverse": from_pyro_inverse,
    "from-zuko": from_zuko,
}
for _name, _transformer in TRANSFORMERS.items():
    for _layer in (Coupling, Autoregressive):
        BIJECTIONS[f"{_layer.__name__.lower()}-{_name}"] = (
            lambda input_dim, context_dim, layer=_layer, transformer=_transformer:
            layer(input_dim, context_dim, transformer=transformer()))
for _name, _recipe in RECIPES.items():
    BIJECTIONS[f"recipe-{_name}"] = _recipe

# Cases that take no context.
WITHOUT_CONTEXT = {"identity", "permutation", "fixed-linear", "fixed-low-rank", "from-torch",
                   "from-pyro-spline", "from-pyro-inverse"}

# Checks of properties that a case does not promise.
NOT_PROMISED: dict[str, set[Callable[..., None]]] = {
    "permutation": {testing.check_identity_at_start},
    "fixed-linear": {testing.check_identity_at_start},
    "fixed-low-rank": {testing.check_identity_at_start},
    "from-torch": {testing.check_identity_at_start},
    "from-pyro-spline": {testing.check_identity_at_start},
    "from-pyro-inverse": {testing.check_identity_at_start},
    "from-zuko": {testing.check_identity_at_start, testing.check_empty_batch},
}

# ------------------------------------------------------------------ guides

# Functions of the model. Small nets: these are tests of the guide, not of the flow.


def pyro_spline(input_dim: int) -> pyro_transforms.Spline:
    """Pyro's elementwise spline, as a recipe."""
    return pyro_transforms.spline(input_dim, count_bins=4)


def zuko_transform(input_dim: int) -> zuko.flows.MaskedAutoregressiveTransform:
    """Zuko's autoregressive transform, as a recipe."""
    return zuko.flows.MaskedAutoregressiveTransform(input_dim, hidden_features=(8,))


GUIDES: dict[str, Callable[..., AutoFlow]] = {
    "planar": partial(AutoPlanar, num_layers=2),
    "radial": partial(AutoRadial, num_layers=2),
    "iaf": partial(AutoIAF, num_layers=2, hidden_dims=(8,)),
    "spline": partial(AutoSpline, num_layers=2, num_bins=4, hidden_dims=(8,)),
    "default": AutoFlow,
    "maf": partial(AutoFlow, recipe=maf, num_layers=1, hidden_dims=(8,)),
    "nice": partial(AutoFlow, recipe=nice, num_layers=2, hidden_dims=(8,)),
    "gaussian": AutoGaussian,
    "pathfinder": AutoPathfinder,
    "triangular": partial(AutoPlanar, num_layers=1, affine=Triangular),
    "low-rank": partial(AutoPlanar, num_layers=1, affine=LowRank),
    "student-t": partial(AutoPlanar, num_layers=1, base=partial(StudentT, learn=True)),
    "multivariate-student-t": partial(AutoPlanar, num_layers=1, base=MultivariateStudentT),
    "mixture": partial(AutoPlanar, num_layers=1, base=partial(Mixture, num_components=2)),
    "mixture-of-flows": partial(AutoPlanar, num_layers=1, base=mixture_of_flows),
    "from-pyro": partial(AutoFlow, recipe=pyro_spline),
    "from-zuko": partial(AutoFlow, recipe=zuko_transform),
}

# ------------------------------------------------------------------ models

# Every model broadcasts over particles to the left of its plates; arguments are made at the
# default dtype of the moment.


def scalar(data: Tensor) -> None:
    """One latent of size one."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(x, 1.0), obs=data)


def mixed() -> None:
    """Positive, interval, real and vector sites."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    chance = pyro.sample("chance", dist.Beta(2.0, 3.0))
    side = pyro.sample("side", dist.Uniform(-1.0, 2.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    mean = side + chance * x.sum(-1)
    pyro.sample("obs", dist.Normal(mean, scale), obs=torch.tensor(0.7))


def simplex(counts: Tensor) -> None:
    """A Dirichlet prior and counts."""
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.8, 1.0, 2.0])))
    pyro.sample("obs", dist.Multinomial(int(counts.sum()), p), obs=counts)


def correlation(data: Tensor) -> None:
    """An LKJ prior over correlations, with scales."""
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(data)):
        tril = sigma.unsqueeze(-1) * factor
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=data)


def plates(data: Tensor) -> None:
    """A hierarchy: global sites, then one in a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", len(data)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, 1.0), obs=data)


def nested_plates(data: Tensor) -> None:
    """Sites in the outer, the inner, and both plates, at set dimensions."""
    rows = pyro.plate("rows", data.shape[0], dim=-2)
    columns = pyro.plate("columns", data.shape[1], dim=-1)
    with columns:
        column = pyro.sample("column", dist.Exponential(1.0))
    with rows:
        row = pyro.sample("row", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with columns:
            cell = pyro.sample("cell", dist.Normal(row.sum(-1), column))
            pyro.sample("obs", dist.Normal(cell, 1.0), obs=data)


def plate_first(data: Tensor) -> None:
    """The first latent is in a plate, and constrained."""
    with pyro.plate("groups", len(data)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("obs", dist.Normal(rate, 1.0), obs=data)
    pyro.sample("x", dist.Normal(0.0, 1.0))


def subsampled(data: Tensor) -> None:
    """Global latents; the data, which has none of its own, by minibatch."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(data), subsample_size=2) as index:
        pyro.sample("obs", dist.Normal(mu, sigma), obs=data[index])


def funnel() -> None:
    """Neal's funnel."""
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    scale = (y / 2).exp().unsqueeze(-1).expand(y.shape + (2,))
    pyro.sample("x", dist.Normal(torch.zeros(2), scale).to_event(1))


def factor(data: Tensor) -> None:
    """The likelihood is a factor; part of it is masked, part weighted."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
    pyro.factor("bend", -x.square().sum(-1).square())
    with pyro.plate("data", len(data)):
        with poutine.mask(mask=data > 0), poutine.scale(scale=0.5):
            pyro.sample("obs", dist.Normal(x[..., 0], 1.0), obs=data)


def weighted() -> None:
    """The latents themselves are masked and weighted, the first one in a plate."""
    with pyro.plate("groups", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(x, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def deterministic(data: Tensor) -> None:
    """Eight schools' non-centred form, with a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(data)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("obs", dist.Normal(theta, 10.0), obs=data)


class Regression(PyroModule):
    """A Bayesian module: its weights are sample statements."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroSample(lambda self: dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.noise = PyroSample(lambda self: dist.LogNormal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = (x * self.weight).sum(-1)
        noise = self.noise
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, noise), obs=y)


MODELS: dict[str, tuple[Callable[..., None], Callable[[], tuple]]] = {  # model, its arguments
    "scalar": (scalar, lambda: (torch.tensor([0.5, 1.0]),)),
    "mixed": (mixed, tuple),
    "simplex": (simplex, lambda: (torch.tensor([3.0, 1.0, 4.0]),)),
    "correlation": (correlation, lambda: (torch.eye(3),)),
    "plates": (plates, lambda: (torch.tensor([-1.0, 0.0, 2.0]),)),
    "nested-plates": (nested_plates, lambda: (torch.tensor([[0.0, 1.0], [2.0, 0.5], [1.0, 3.0]]),)),
    "plate-first": (plate_first, lambda: (torch.tensor([1.0, 2.0, 0.5]),)),
    "subsampled": (subsampled, lambda: (torch.tensor([0.3, 1.0, -0.5, 2.0]),)),
    "funnel": (funnel, tuple),
    "factor": (factor, lambda: (torch.tensor([1.0, -2.0, 0.5]),)),
    "weighted": (weighted, tuple),
    "deterministic": (deterministic, lambda: (torch.tensor([28.0, 8.0, -3.0, 7.0]),)),
    "pyro-module": (Regression(), lambda: (torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]),
                                           torch.tensor([0.0, 1.5, 2.0]))),
}

# Checks of properties that a model does not let a guide promise: Pyro's mean-field ELBO takes the
# scale and mask of a latent from the guide, which has none.
MODEL_CANNOT: dict[str, set[Callable[..., None]]] = {"weighted": {testing.check_guide_elbos}}
