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
from pyro_nfvi.flows.block_autoregressive import BlockAutoregressive
from pyro_nfvi.flows.circular import (
    AngularDiagonal,
    CircularSpline,
    PeriodicMLP,
    UniformAngles,
)
from pyro_nfvi.flows.compose import Compose
from pyro_nfvi.flows.continuous import Continuous
from pyro_nfvi.flows.contractive import LipSwish, Residual
from pyro_nfvi.flows.coupling import Coupling
from pyro_nfvi.flows.dequantization import Dequantization
from pyro_nfvi.flows.elementwise import Elementwise, LeakyReLU, SinhArcsinh
from pyro_nfvi.flows.fixed import FixedLinear, FixedLowRank
from pyro_nfvi.flows.flow import Flow, FlowDistribution, PartOfNoise
from pyro_nfvi.flows.free_form import FreeForm
from pyro_nfvi.flows.image import ConvNet, channel_mask, checkerboard_mask
from pyro_nfvi.flows.jacobian import LowRankUpdate
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
from pyro_nfvi.flows.monotone import MonotoneIntegral
from pyro_nfvi.flows.multiscale import Pixelwise, Split, Squeeze
from pyro_nfvi.flows.nets import MLP, MaskedMLP
from pyro_nfvi.flows.planar import Planar, Radial
from pyro_nfvi.flows.recipes import (
    auto,
    bnaf,
    cnf,
    ffjord,
    glow,
    householder_sylvester,
    iaf,
    maf,
    naf,
    ncsf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
    realnvp_image,
    residual,
    sylvester,
    triangular_sylvester,
    umnn,
)
from pyro_nfvi.flows.recurrent import RecurrentNet
from pyro_nfvi.flows.sigmoids import DeepSigmoid
from pyro_nfvi.flows.spline import LinearSpline, RationalQuadraticSpline
from pyro_nfvi.flows.sylvester import (
    CoordinateFrame,
    HouseholderFrame,
    OrthogonalFrame,
    Sylvester,
)
from pyro_nfvi.flows.transform import BijectionTransform, FromTransform
from pyro_nfvi.flows.transformers import Additive, Affine, Multiplicative, Transformer

__all__ = [
    "MLP",
    "Additive",
    "Affine",
    "Amortized",
    "AngularDiagonal",
    "Autoregressive",
    "Base",
    "BaseDistribution",
    "Bijection",
    "BijectionTransform",
    "BlockAutoregressive",
    "CircularSpline",
    "Compose",
    "Continuous",
    "ConvNet",
    "CoordinateFrame",
    "Coupling",
    "DeepSigmoid",
    "Dequantization",
    "Diagonal",
    "Elementwise",
    "FixedLinear",
    "FixedLowRank",
    "Flow",
    "FlowDistribution",
    "FreeForm",
    "FromTransform",
    "Gaussian",
    "Householder",
    "HouseholderFrame",
    "Identity",
    "Inverse",
    "LULinear",
    "LeakyReLU",
    "LinearSpline",
    "LipSwish",
    "LowRank",
    "LowRankUpdate",
    "MaskedMLP",
    "Mixture",
    "MixtureOfFlows",
    "MonotoneIntegral",
    "Multiplicative",
    "MultivariateStudentT",
    "OrthogonalFrame",
    "PartOfNoise",
    "PeriodicMLP",
    "Permutation",
    "Pixelwise",
    "Planar",
    "Radial",
    "RationalQuadraticSpline",
    "RecurrentNet",
    "Residual",
    "SinhArcsinh",
    "Split",
    "Squeeze",
    "StudentT",
    "Sylvester",
    "Transformer",
    "Triangular",
    "UniformAngles",
    "auto",
    "bnaf",
    "channel_mask",
    "checkerboard_mask",
    "cnf",
    "ffjord",
    "glow",
    "householder_sylvester",
    "iaf",
    "maf",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "realnvp_image",
    "residual",
    "sylvester",
    "triangular_sylvester",
    "umnn",
]
