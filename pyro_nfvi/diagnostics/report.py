"""Table, verdict and report: what was found, and whether to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from pyro_nfvi import _arviz
from pyro_nfvi.diagnostics.checks import (
    EQUAL,
    GOOD_K,
    MAX_K,
    Check,
    all_but_equal,
    max_pareto_k,
    quick_checks,
)
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import History, ImportanceSample


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

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nfvi import Posterior
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> summary = Posterior.of(model, model).summary()  # the prior is its own posterior
        >>> summary.trusted, list(summary.table.index)
        (True, ['x'])
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
        words = escape(repr(self).split("\n\n", 1)[1])
        return f"{self.table.to_html()}<pre>{words}</pre>"


@dataclass(frozen=True)
class Report:
    """What a thorough look at a fit found, line by line. Its ``repr`` is the report.

    Attributes:
        checks: What was looked at; each that fails says what to do.
        verdict: One line: whether to trust the posterior, and what to do if not.
        trusted: Whether no check failed.
        elbo: ELBO and its standard error.
        site_pareto_k: k-hat of each latent site alone: which one is badly fitted.
        max_pareto_k: What k-hat should be below, for so many draws.

    Example:
        >>> from pyro_nfvi.diagnostics import Check
        >>> tails = Check("tails", "fail", "too light", "base=StudentT")
        >>> report = Report((Check("fit", "ok", "ran to its end"), tails), "Verdict: ...", False,
        ...                 (-31.3, 0.1))
        >>> report["tails"].words, [check.name for check in report.failures]
        ('too light', ['tails'])
    """

    checks: tuple[Check, ...]
    verdict: str
    trusted: bool
    elbo: tuple[float, float]
    site_pareto_k: dict[str, float] = field(default_factory=dict)
    max_pareto_k: float = MAX_K

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(c.name for c in self.checks)}")

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.failed)

    def __repr__(self) -> str:
        lines = "\n".join(str(check) for check in self.checks)
        value, error = self.elbo
        return f"{lines}\n\nELBO {value:.3f} +- {error:.3f}\n{self.verdict}"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{check.status}</td><th>{escape(check.name)}</th>"
                       f"<td>{escape(check.words)}</td><td>{escape(check.action)}</td></tr>"
                       for check in self.checks)
        return f"<table>{rows}</table><p>{escape(self.verdict)}</p>"


def summarize(data: Any, sample: ImportanceSample, history: History,
              layout: LatentLayout | None = None) -> Summary:
    """Summary of ArviZ data drawn from a fit.

    Args:
        data: InferenceData or DataTree.
        sample: Draws and weights of the fit.
        history: What happened during the fit.
        layout: Whose coordinates are whose.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nfvi import Posterior
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> posterior = Posterior.of(model, model)
        >>> data = posterior.to_arviz(500, groups=("posterior",))
        >>> summarize(data, posterior.draws, posterior.history).num_samples
        10000
    """
    trusted, words = verdict(sample, history, layout)
    return Summary(_arviz.summary(data), words, trusted, sample.pareto_k, sample.ess,
                   sample.num_samples, sample.elbo)


def verdict(sample: ImportanceSample, history: History, layout: LatentLayout | None = None,
            checks: Sequence[Check] | None = None) -> tuple[bool, str]:
    """Whether to trust the draws, and one line that says so.

    Args:
        sample: Draws and weights of the fit.
        history: What happened during the fit.
        layout: Whose coordinates are whose.
        checks: What was looked at. Default: what draws, weights and history tell.

    Example:
        >>> from pyro_nfvi.flows import Flow, Identity
        >>> from pyro_nfvi.inference import importance_sample
        >>> wide = importance_sample(Flow(Identity(2)), lambda z: -2 * z.square().sum(-1), 1000)
        >>> verdict(wide, History())
        (True, 'Verdict: good (k-hat below 0.5).')
    """
    note = _note(history)
    checks = quick_checks(sample, history, layout) if checks is None else checks
    failed = [check for check in checks if check.failed]
    if failed:
        first = failed[0]
        opening = ("too few effective draws" if first.name == "effective draws"
                   else "do not trust these draws")
        return False, f"Verdict: {opening}: {first.words}. {sentence(note or first.action)}"
    if sample.pareto_k < GOOD_K:
        words = f"good (k-hat below {GOOD_K})"
    elif all_but_equal(sample):
        words = f"good ({EQUAL})"
    else:
        words = (f"good after weighting (k-hat below {max_pareto_k(sample.num_samples):.2f}); "
                 "weighted draws (resample, to_arviz) are the ones to use")
    return True, f"Verdict: {words}.{' ' * bool(note)}{note}"


def sentence(words: str) -> str:
    """Words with a capital and a full stop; nothing if there are none."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}." if words else ""


def _note(history: History) -> str:
    if history.interrupted:
        return f"The fit was interrupted after {len(history.elbo)} steps: run it to the end."
    if history.stopped:
        return f"The fit stopped early: {history.stopped}."
    return ""
