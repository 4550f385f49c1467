"""Normalizing flows in pure torch: bijections, bases, and the flows they make.

A :class:`Bijection` maps noise ``u`` to a latent ``z`` and back, each way with its
log-determinant; a :class:`Flow` adds a :class:`Base` and is a distribution; a recipe such as
:func:`nsf` stacks layers under their paper's name. Nothing here knows Pyro.
"""

from pyro_nfvi.flows.amortized import Amortized
from pyro_nfvi.flows.autoregressive import Autoregressive
from pyro_nfvi.flows.base import (
    Base,
    BaseDistribution,
    Gaussian,
    Mixture,
    MultivariateStudentT,
    StudentT,
)
from pyro_nfvi.flows.bijection import Bijection, Inverse
from pyro_nfvi.flows.compose import Compose
from pyro_nfvi.flows.coupling import Coupling
from pyro_nfvi.flows.fixed import FixedLinear, FixedLowRank
from pyro_nfvi.flows.flow import Flow, FlowDistribution
from pyro_nfvi.flows.linear import (
    Diagonal,
    Householder,
    Identity,
    LowRank,
    LULinear,
    Permutation,
    Triangular,
)
from pyro_nfvi.flows.mixture import MixtureOfFlows
from pyro_nfvi.flows.nets import MLP, MaskedMLP
from pyro_nfvi.flows.planar import Planar, Radial, Sylvester
from pyro_nfvi.flows.recipes import (
    auto,
    iaf,
    maf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
    sylvester,
)
from pyro_nfvi.flows.spline import RationalQuadraticSpline
from pyro_nfvi.flows.transform import BijectionTransform, FromTransform
from pyro_nfvi.flows.transformers import Additive, Affine, Transformer

__all__ = [
    "MLP",
    "Additive",
    "Affine",
    "Amortized",
    "Autoregressive",
    "Base",
    "BaseDistribution",
    "Bijection",
    "BijectionTransform",
    "Compose",
    "Coupling",
    "Diagonal",
    "FixedLinear",
    "FixedLowRank",
    "Flow",
    "FlowDistribution",
    "FromTransform",
    "Gaussian",
    "Householder",
    "Identity",
    "Inverse",
    "LULinear",
    "LowRank",
    "MaskedMLP",
    "Mixture",
    "MixtureOfFlows",
    "MultivariateStudentT",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadraticSpline",
    "StudentT",
    "Sylvester",
    "Transformer",
    "Triangular",
    "auto",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "sylvester",
]
