"""Diagnostics: read a fitted posterior, change nothing.

:func:`to_inference_data` is what ArviZ gets, :func:`summarize` the table with a verdict,
:func:`diagnose` the thorough look, and :func:`compare` several fits side by side.
"""

from pyro_nfvi.diagnostics.checks import Check
from pyro_nfvi.diagnostics.compare import compare
from pyro_nfvi.diagnostics.diagnose import diagnose
from pyro_nfvi.diagnostics.inference_data import to_inference_data
from pyro_nfvi.diagnostics.report import Report, Summary, summarize, verdict

__all__ = ["Check", "Report", "Summary", "compare", "diagnose", "summarize", "to_inference_data",
           "verdict"]
