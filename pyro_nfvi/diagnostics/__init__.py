"""Diagnostics: read a fitted posterior, change nothing.

:func:`to_inference_data` is what ArviZ gets, :func:`summarize` the table with a verdict, and
:func:`plot_elbo` the picture of the fit.
"""

from pyro_nfvi.diagnostics.inference_data import to_inference_data
from pyro_nfvi.diagnostics.plots import plot_elbo
from pyro_nfvi.diagnostics.report import Summary, summarize, verdict

__all__ = ["Summary", "plot_elbo", "summarize", "to_inference_data", "verdict"]
