"""Variational inference with normalizing flows for Pyro.

:class:`NFVI` fits a model in one call and returns a :class:`Posterior` with a verdict;
:class:`AutoFlow` and its named children are drop-in Pyro guides; :mod:`pyro_nfvi.flows` holds
the flows, which need no Pyro.
"""

from pyro_nfvi.flows import iaf, maf, nice, nsf, planar, radial, realnvp
from pyro_nfvi.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoSpline
from pyro_nfvi.inference import ELBO
from pyro_nfvi.nfvi import NFVI
from pyro_nfvi.posterior import Posterior

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "NFVI",
    "AutoFlow",
    "AutoIAF",
    "AutoPlanar",
    "AutoRadial",
    "AutoSpline",
    "Posterior",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
]
