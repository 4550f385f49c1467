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
    AngularDiagonal,
    Autoregressive,
    Base,
    Bijection,
    BlockAutoregressive,
    CircularSpline,
    Compose,
    Continuous,
    ConvNet,
    CoordinateFrame,
    Coupling,
    DeepSigmoid,
    Diagonal,
    Elementwise,
    FixedLinear,
    FixedLowRank,
    Flow,
    FreeForm,
    FromTransform,
    Gaussian,
    Householder,
    HouseholderFrame,
    Identity,
    Inverse,
    LeakyReLU,
    LinearSpline,
    LowRank,
    LULinear,
    MaskedMLP,
    Mixture,
    MixtureOfFlows,
    MonotoneIntegral,
    Multiplicative,
    MultivariateStudentT,
    Permutation,
    Pixelwise,
    Planar,
    Radial,
    RationalQuadraticSpline,
    RecurrentNet,
    Residual,
    SinhArcsinh,
    Split,
    Squeeze,
    StudentT,
    Sylvester,
    Transformer,
    Triangular,
    UniformAngles,
    checkerboard_mask,
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
from tests.flows import modules

# ------------------------------------------------------------------ flows

TRANSFORMERS: dict[str, Callable[[], Transformer]] = {
    "additive": Additive,
    "affine": Affine,
    "multiplicative": Multiplicative,
    "spline": RationalQuadraticSpline,
    "linear-spline": partial(LinearSpline, num_bins=4),
    "circular-spline": partial(CircularSpline, num_bins=4),
    "sinh-arcsinh": SinhArcsinh,
    "leaky-relu": LeakyReLU,
    "integral": partial(MonotoneIntegral, num_units=4),
    "sigmoids": partial(DeepSigmoid, num_units=4),
    "sigmoids-dense": partial(DeepSigmoid, num_units=3, num_layers=2, dense=True),
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
    "uniform-angles": UniformAngles,
}

RECIPES: dict[str, Callable[..., Bijection]] = {
    name: partial(getattr(flows, name), num_layers=2)
    for name in ("planar", "radial", "iaf", "maf", "nice", "realnvp", "nsf", "sylvester",
                 "realnvp_image", "glow", "householder_sylvester", "triangular_sylvester",
                 "residual")
}
RECIPES["auto"] = flows.auto
FINE = {"end_time": 1.0, "method": "dopri8", "rtol": 1e-9, "atol": 1e-9, "hidden_dims": (8,)}
RECIPES["cnf"] = partial(flows.cnf, **FINE)
RECIPES["ffjord"] = partial(flows.ffjord, num_probes=None, adjoint=False, **FINE)
RECIPES["naf"] = partial(flows.naf, num_layers=2, num_units=3)
RECIPES["umnn"] = partial(flows.umnn, num_layers=2, num_units=3)
RECIPES["bnaf"] = partial(flows.bnaf, num_layers=2, block_dim=3, num_hidden=1)
RECIPES["ncsf"] = partial(flows.ncsf, num_layers=2, num_bins=4)


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


def free_form(structure: str, module: Callable[..., torch.nn.Module], input_dim: int,
              context_dim: int = 0) -> FreeForm:
    """A module of a user's own."""
    return FreeForm(input_dim, module(input_dim, context_dim), structure=structure,
                    context_dim=context_dim)


def in_two_groups(input_dim: int, context_dim: int = 0, **options) -> Autoregressive:
    """An autoregressive layer of as few passes as let coordinates meet, the last going first."""
    return Autoregressive(input_dim, context_dim, num_passes=min(input_dim, 2), reverse=True,
                          **options)


def first_is_angle(input_dim: int) -> list[bool]:
    """The first coordinate is an angle, the others are not."""
    return [k == 0 for k in range(input_dim)]


def on_a_torus(input_dim: int, context_dim: int = 0) -> Autoregressive:
    """An autoregressive layer over angles."""
    network = partial(MaskedMLP, angles=[True] * input_dim)
    return Autoregressive(input_dim, context_dim, transformer=CircularSpline(4),
                          conditioner=network)


def on_a_cylinder(input_dim: int, context_dim: int = 0) -> Compose:
    """A flow over one angle and lines, with its affine map."""
    angles = first_is_angle(input_dim)
    return Compose([flows.ncsf(input_dim, context_dim, num_layers=2, angles=angles, num_bins=4),
                    AngularDiagonal(input_dim, context_dim, angles=angles)])


def convolutional(input_dim: int, context_dim: int = 0) -> Coupling:
    """A coupling of a one-row image by checkerboard, steered by convolutions."""
    shape = (1, 1, input_dim)
    mask = checkerboard_mask(shape) if input_dim > 1 else [True]
    return Coupling(input_dim, context_dim, mask=mask,
                    conditioner=partial(ConvNet, shape, hidden_channels=8))


def pixelwise(input_dim: int, context_dim: int = 0) -> Pixelwise:
    """The same layer at every pixel, of two channels if that is possible."""
    channels = 2 if input_dim % 2 == 0 else 1
    return Pixelwise(Coupling(channels, context_dim), (channels, 1, input_dim // channels))


def squeeze(input_dim: int, context_dim: int = 0) -> Squeeze:
    """A layer of an image of one column, squeezed to one pixel."""
    return Squeeze(Coupling(input_dim, context_dim), (1, input_dim, 1), block=(input_dim, 1))


def split(input_dim: int, context_dim: int = 0) -> Bijection:
    """A layer of all coordinates but one, if there are others."""
    layer = Coupling(max(input_dim - 1, 1), context_dim)
    return Split(layer, input_dim) if input_dim > 1 else layer


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
    "sylvester-householder": partial(Sylvester, frame=HouseholderFrame),
    "sylvester-coordinates": partial(Sylvester, frame=partial(CoordinateFrame, reverse=True)),
    "residual": Residual,
    "residual-deep": partial(Residual, lipschitz=0.97, hidden_dims=(8, 8),
                             activation=torch.nn.Tanh),
    "continuous": partial(Continuous, **FINE),
    "continuous-default": partial(Continuous, hidden_dims=(8,)),
    "continuous-rk4": partial(Continuous, method="rk4", num_steps=8, hidden_dims=(8,)),
    "amortized": amortized,
    "coupling-mask": alternate,
    "coupling-convolutional": convolutional,
    "pixelwise": pixelwise,
    "squeeze": squeeze,
    "split": split,
    "autoregressive-reverse": partial(Autoregressive, reverse=True),
    "autoregressive-one-pass": partial(Autoregressive, num_passes=1),
    "autoregressive-two-passes": partial(in_two_groups, transformer=DeepSigmoid(3)),
    "autoregressive-recurrent": partial(Autoregressive,
                                        conditioner=partial(RecurrentNet, hidden_dim=8)),
    "autoregressive-recurrent-two-passes": partial(
        in_two_groups, conditioner=partial(RecurrentNet, hidden_dim=8)),
    "autoregressive-torus": on_a_torus,
    "block-autoregressive": partial(BlockAutoregressive, block_dim=3),
    "elementwise": Elementwise,
    "cylinder": on_a_cylinder,
    "inverse": lambda input_dim, context_dim: Inverse(Planar(input_dim, context_dim)),
    "compose": mixed_stack,
    "from-torch": from_torch,
    "from-pyro-spline": from_pyro_spline,
    "from-pyro-inverse": from_pyro_inverse,
    "from-zuko": from_zuko,
    "free-form": partial(free_form, "full", modules.Mix),
    "free-form-diagonal": partial(free_form, "diagonal", modules.Bend),
    "free-form-triangular": partial(free_form, "triangular", modules.SteerWithDiagonal),
    "free-form-low-rank": partial(free_form, "low-rank", partial(modules.Ridges, bend=True)),
    "free-form-inverse": partial(free_form, "full", modules.Turn),
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

# Cases that say little beyond others of the table: they wait for the slow tests.
REPETITIVE = {f"autoregressive-{name}" for name in (
    "multiplicative", "linear-spline", "circular-spline", "sinh-arcsinh", "leaky-relu", "integral",
    "sigmoids-dense", "recurrent-two-passes", "torus")} | {
        "sylvester-coordinates", "recipe-cnf", "recipe-ffjord"}

# Cases long to compile, to differentiate or to integrate, most as their inverse is a search.
LENGTHY = {"block-autoregressive", "autoregressive-two-passes", "recipe-naf", "recipe-umnn",
           "recipe-sylvester", "recipe-planar",
           "recipe-bnaf", "recipe-ncsf", "cylinder", "residual-deep", "recipe-residual",
           "continuous-default", "continuous-rk4", "sylvester-householder",
           "recipe-householder_sylvester", "recipe-triangular_sylvester",
           *(f"{layer}-{name}" for layer in ("coupling", "autoregressive")
             for name in ("integral", "sigmoids", "sigmoids-dense"))}

# Errors that a case states for its results: those of a solver of differential equations.
TOLERANCES = {"continuous-default": 1e-3, "continuous-rk4": 3e-3}

# Checks of properties that a case does not promise.
NOT_PROMISED: dict[str, set[Callable[..., None]]] = {
    "permutation": {testing.check_identity_at_start},
    "fixed-linear": {testing.check_identity_at_start},
    "fixed-low-rank": {testing.check_identity_at_start},
    "from-torch": {testing.check_identity_at_start},
    "from-pyro-spline": {testing.check_identity_at_start},
    "from-pyro-inverse": {testing.check_identity_at_start},
    "from-zuko": {testing.check_identity_at_start, testing.check_empty_batch},
    # torchdiffeq steers Python by times and errors; differences would magnify those of a solver.
    **{name: {testing.check_compiles} for name in (
        "continuous", "continuous-rk4", "recipe-cnf", "recipe-ffjord")},
    "continuous-default": {testing.check_compiles, testing.check_gradients},
    # The search for a preimage stops, and complains, by what it finds.
    **{name: {testing.check_compiles} for name in (
        "free-form", "free-form-diagonal", "free-form-triangular", "free-form-low-rank")},
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
