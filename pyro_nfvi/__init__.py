"""Variational inference with normalizing flows for Pyro.

:class:`NFVI` fits a model in one call and returns a :class:`Posterior` with a verdict;
:class:`AutoFlow` and its named children are drop-in Pyro guides; :mod:`pyro_nfvi.flows` holds
the flows, which need no Pyro.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_nfvi.calibration import Calibration, calibrate
    from pyro_nfvi.diagnostics.compare import compare
    from pyro_nfvi.flows import (
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
    from pyro_nfvi.guides import (
        AutoAmortizedFlow,
        AutoFlow,
        AutoGaussian,
        AutoIAF,
        AutoPlanar,
        AutoRadial,
        AutoSpline,
    )
    from pyro_nfvi.inference import (
        ELBO,
        ArrayLoader,
        AutoPathfinder,
        Checkpoint,
        CompiledTrace_ELBO,
        CompiledTraceMeanField_ELBO,
        FittedFlow,
        LostProcess,
        fit_density,
    )
    from pyro_nfvi.nfvi import NFVI
    from pyro_nfvi.plots import plot_flow
    from pyro_nfvi.posterior import Posterior, to_arviz

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "NFVI",
    "ArrayLoader",
    "AutoAmortizedFlow",
    "AutoFlow",
    "AutoGaussian",
    "AutoIAF",
    "AutoPathfinder",
    "AutoPlanar",
    "AutoRadial",
    "AutoSpline",
    "Calibration",
    "Checkpoint",
    "CompiledTraceMeanField_ELBO",
    "CompiledTrace_ELBO",
    "FittedFlow",
    "LostProcess",
    "Posterior",
    "bnaf",
    "calibrate",
    "cnf",
    "compare",
    "ffjord",
    "fit_density",
    "glow",
    "householder_sylvester",
    "iaf",
    "maf",
    "naf",
    "ncsf",
    "nice",
    "nsf",
    "planar",
    "plot_flow",
    "radial",
    "realnvp",
    "realnvp_image",
    "residual",
    "sylvester",
    "to_arviz",
    "triangular_sylvester",
    "umnn",
]

_HOMES = {"NFVI": "nfvi", "Posterior": "posterior", "to_arviz": "posterior",
          "Calibration": "calibration", "calibrate": "calibration",
          "compare": "diagnostics", "ELBO": "inference",
          "ArrayLoader": "inference", "AutoPathfinder": "inference",
          "Checkpoint": "inference", "LostProcess": "inference",
          "CompiledTrace_ELBO": "inference",
          "CompiledTraceMeanField_ELBO": "inference", "FittedFlow": "inference",
          "fit_density": "inference", "plot_flow": "plots"}


def __getattr__(name: str) -> Any:
    """Import public names when first asked for: ``pyro_nfvi.flows`` then needs no Pyro."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = _HOMES.get(name, "guides" if name.startswith("Auto") else "flows")
    return getattr(import_module(f"{__name__}.{room}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
