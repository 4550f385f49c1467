"""Table and verdict: what was found, and whether to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyro_nfvi import _arviz
from pyro_nfvi.inference import History, ImportanceSample

GOOD_K = 0.5  # below: the draws could do without weights
MIN_ESS = 0.1  # fraction of the draws below which the weights rest on too few of them
MIN_ESS_WEIGHTED = 0.3  # the same where k-hat says that the draws need their weights
EQUAL_ESS = 0.999  # weights this equal change nothing, whatever the shape of their tail


@dataclass(frozen=True)
class Summary:
    """Statistics of a posterior with a verdict. Its ``repr`` is the report.

    Attributes:
        table: ArviZ's summary table, a pandas DataFrame.
        verdict: One line: whether to trust the posterior, and what to do if not.
        trusted: Whether the verdict is good.
        pareto_k: k-hat of the importance weights.
        ess: Effective number of draws after weighting.
        num_samples: Number of draws.
        elbo: ELBO and its standard error.
    """

    table: Any
    verdict: str
    trusted: bool
    pareto_k: float
    ess: float
    num_samples: int
    elbo: tuple[float, float]

    def __repr__(self) -> str:
        value, error = self.elbo
        return (f"{self.table.to_string()}\n\n"
                f"ELBO {value:.3f} +- {error:.3f}   Pareto k-hat {self.pareto_k:.2f}   "
                f"ESS {self.ess:,.0f} of {self.num_samples:,} draws\n{self.verdict}")

    def _repr_html_(self) -> str:
        return f"{self.table.to_html()}<pre>{repr(self).split(chr(10) * 2, 1)[1]}</pre>"


def summarize(data: Any, sample: ImportanceSample, history: History) -> Summary:
    """Summary of ArviZ data drawn from a fit.

    Args:
        data: InferenceData or DataTree.
        sample: Draws and weights of the fit.
        history: What happened during the fit.
    """
    trusted, words = verdict(sample, history)
    return Summary(_arviz.summary(data), words, trusted, sample.pareto_k, sample.ess,
                   sample.num_samples, sample.elbo)


def verdict(sample: ImportanceSample, history: History) -> tuple[bool, str]:
    r"""Whether to trust the draws, and one line that says so.

    The bar for k-hat is :math:`\min(1 - 1 / \log_{10} S,\ 0.7)` for :math:`S` draws. k-hat has
    no scale: where the fit is all but exact it is the shape of rounding, and the weights being
    equal decides.

    References:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling, arXiv:1507.02646, section 3.
    """
    bar = min(1 - 1 / math.log10(max(sample.num_samples, 11)), 0.7)
    note = _note(history)
    k, ess = sample.pareto_k, sample.ess
    if history.concerns:
        return False, (f"Verdict: do not trust these draws: {'; '.join(history.concerns)}. "
                       f"{note or _advice()}")
    if math.isfinite(k) and ess > EQUAL_ESS * sample.num_samples:
        return True, f"Verdict: good (the weights are all but equal).{_after(note)}"
    if not k < bar:
        return False, (f"Verdict: do not trust these draws (k-hat {k:.2f}, should be below "
                       f"{bar:.2f}): the guide misses part of the posterior. {note or _advice()}")
    needed = (MIN_ESS if k < GOOD_K else MIN_ESS_WEIGHTED) * sample.num_samples
    if ess < needed:
        return False, (f"Verdict: too few effective draws ({ess:,.0f}, should be at least "
                       f"{needed:,.0f}). {note or _advice()}")
    if k < GOOD_K:
        return True, f"Verdict: good (k-hat below {GOOD_K}).{_after(note)}"
    return True, (f"Verdict: good after weighting (k-hat below {bar:.2f}); "
                  f"the draws above are weighted.{_after(note)}")


def _advice() -> str:
    return ("What helps: a reparametrized model (LocScaleReparam for a hierarchy), a flow of more "
            "layers (guide), more steps (num_steps), or exact draws through this guide: "
            "NeuTraReparam(guide) with NUTS.")


def _note(history: History) -> str:
    if history.interrupted:
        return f"The fit was interrupted after {len(history.elbo)} steps: run it to the end."
    if history.stopped:
        return f"The fit stopped early: {history.stopped}."
    return ""


def _after(note: str) -> str:
    return f" {note}" if note else ""
