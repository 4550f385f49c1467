"""The single list of what exists: named constructors that the property tests run over.

A new bijection, transformer or base gets one line here, and every property test runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro.distributions.transforms as pyro_transforms
import zuko
from torch.distributions import transforms as torch_transforms

from pyro_nfvi import flows, testing
from pyro_nfvi.flows import (
    Additive,
    Affine,
    Autoregressive,
    Base,
    Bijection,
    Compose,
    Coupling,
    Diagonal,
    FromTransform,
    Gaussian,
    Householder,
    Inverse,
    LULinear,
    Mixture,
    Permutation,
    Planar,
    Radial,
    RationalQuadraticSpline,
    StudentT,
    Sylvester,
    Transformer,
    Triangular,
)

# ------------------------------------------------------------------ flows

TRANSFORMERS: dict[str, Callable[[], Transformer]] = {
    "additive": Additive,
    "affine": Affine,
    "spline": RationalQuadraticSpline,
}

BASES: dict[str, Callable[[int], Base]] = {
    "gaussian": Gaussian,
    "student-t": StudentT,
    "student-t-learned": partial(StudentT, df=3.0, learn=True),
    "mixture": partial(Mixture, num_components=3),
}

RECIPES: dict[str, Callable[..., Bijection]] = {
    name: partial(getattr(flows, name), num_layers=2)
    for name in ("planar", "radial", "iaf", "maf", "nice", "realnvp", "nsf")
}


def reversal(input_dim: int, context_dim: int = 0) -> Permutation:
    """The coordinates in reverse order."""
    return Permutation(range(input_dim)[::-1])


def mixed_stack(input_dim: int, context_dim: int = 0) -> Compose:
    """Layers of several kinds, of which two take no context; the identity at the start."""
    return Compose([Triangular(input_dim, context_dim), reversal(input_dim),
                    Planar(input_dim, context_dim), reversal(input_dim),
                    Inverse(Coupling(input_dim, context_dim))])


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
    "householder": Householder,
    "permutation": reversal,
    "planar": Planar,
    "radial": Radial,
    "sylvester": Sylvester,
    "sylvester-one-ridge": partial(Sylvester, num_ridges=1),
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
WITHOUT_CONTEXT = {"permutation", "from-torch", "from-pyro-spline", "from-pyro-inverse"}

# Checks of properties that a case does not promise.
NOT_PROMISED: dict[str, set[Callable[..., None]]] = {
    "permutation": {testing.check_identity_at_start},
    "from-torch": {testing.check_identity_at_start},
    "from-pyro-spline": {testing.check_identity_at_start},
    "from-pyro-inverse": {testing.check_identity_at_start},
    "from-zuko": {testing.check_identity_at_start, testing.check_empty_batch},
}

# ------------------------------------------------------------------ guides

# ------------------------------------------------------------------ models
