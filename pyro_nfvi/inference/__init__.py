"""Inference: from a guide and a model to a fitted guide and its importance weights.

:class:`LogJoint` is the model as one batched function of the flat latent, :class:`ELBO` the
objective, :class:`Loop` the optimiser, and :func:`importance_sample` the draws and weights that
tell how good the fit is; :func:`metropolis` and :func:`neutra` make chains through a guide that is
not good enough. :class:`CompiledTrace_ELBO` brings the compiled loop to Pyro's own SVI.
"""

from pyro_nfvi.inference.amortization import AmortizationGap, amortization_gap
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.auto_pathfinder import AutoPathfinder
from pyro_nfvi.inference.chains import Chains
from pyro_nfvi.inference.checkpoint import Checkpoint
from pyro_nfvi.inference.compiled_elbo import CompiledTrace_ELBO, CompiledTraceMeanField_ELBO
from pyro_nfvi.inference.density import FittedFlow, fit_density
from pyro_nfvi.inference.distributed import LostProcess
from pyro_nfvi.inference.importance import ImportanceSample, importance_sample
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.loop import History, Loop, Stage
from pyro_nfvi.inference.metropolis import metropolis
from pyro_nfvi.inference.neutra import neutra
from pyro_nfvi.inference.objectives import ELBO

__all__ = ["ELBO", "AmortizationGap", "ArrayLoader", "AutoPathfinder", "Chains", "Checkpoint",
           "CompiledTraceMeanField_ELBO", "CompiledTrace_ELBO", "FittedFlow", "History",
           "ImportanceSample", "LogJoint", "Loop", "LostProcess", "Stage",
           "amortization_gap", "fit_density", "importance_sample", "metropolis", "neutra"]
