"""Pictures with their words: what is drawn, what to look for, and what somebody sees who cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pyro_nfvi.diagnostics.checks import GOOD_K, MAX_K
from pyro_nfvi.diagnostics.report import sentence
from pyro_nfvi.inference import History
from pyro_nfvi.plots.components import Component, attributes, components, finite, site_values
from pyro_nfvi.plots.elbo import plot_elbo
from pyro_nfvi.plots.marginals import MAX_MARGINALS, draw_marginals
from pyro_nfvi.plots.pairs import MAX_PAIRS, draw_pairs
from pyro_nfvi.plots.pareto_k import MAX_SITES, k_words, plot_pareto_k, ranked_sites, sites_height
from pyro_nfvi.plots.predictive import MAX_PREDICTIVE, draw_predictive
from pyro_nfvi.plots.predictive_checks import Predictive, predictive_sites
from pyro_nfvi.plots.text import LEAST, WORST, left_out, order_words
from pyro_nfvi.plots.weights import WeightTail, plot_weights, tail_words, weight_tail


@dataclass(frozen=True)
class Picture:
    """A picture of a page, or why it is missing.

    Attributes:
        title: Its heading.
        caption: What it shows and what to look for, or why it is missing.
        alt: What is seen, for somebody who does not see it.
        draw: Draws it on an empty matplotlib figure; None if it is missing.
        wide: Whether it takes a row of its own where there is room for two.

    Example:
        >>> picture = Picture("Weights", "The tail of the weights.", draw=lambda fig: None)
        >>> picture.title, picture.wide
        ('Weights', False)
    """

    title: str
    caption: str
    alt: str = ""
    draw: Callable[[Any], Any] | None = None
    wide: bool = False


def fit_pictures(*, history: History | None = None, log_ratios: Any = None,
                 site_pareto_k: Mapping[str, float] | None = None, data: Any = None,
                 reference: Any = None, threshold: float = MAX_K) -> list[Picture]:
    """Pictures of a fit, each of which may be missing.

    Args:
        history: What happened during the fit.
        log_ratios: Log importance ratios ``(num_draws,)``: log joint minus log guide density.
        site_pareto_k: k-hat by site.
        data: InferenceData or DataTree.
        reference: Draws to compare with, as :func:`plot_marginals` takes them.
        threshold: The bar for k-hat.

    Raises:
        ValueError: If the reference does not fit.

    Example:
        >>> import numpy as np
        >>> log_ratios = np.random.default_rng(0).normal(size=1000)
        >>> [picture.title for picture in fit_pictures(log_ratios=log_ratios) if picture.draw]
        ['Tail of the weights']
    """
    site_pareto_k = site_pareto_k or {}
    return [_marginals(data, reference, site_pareto_k), _pairs(data, reference, site_pareto_k),
            _predictive(data), _weights(log_ratios, threshold),
            _pareto_k(site_pareto_k, threshold), _elbo(history)]


# ------------------------------------------------------------------ the posterior

def _marginals(data: Any, reference: Any, pareto_k: Mapping[str, float]) -> Picture:
    title = "Marginals"
    if not site_values(data, "posterior"):
        return Picture(title, "There are no draws of the posterior.")
    chosen, num_left = components("Posterior.report", data, reference, pareto_k=pareto_k,
                                  most=MAX_MARGINALS)
    if not chosen:
        return Picture(title, "The posterior has no number to show.")
    words = left_out(num_left, "numbers", order_words(pareto_k, reference))
    return Picture(title, _joined("Density of each number.", _gap_words(chosen), sentence(words)),
                   _marginals_alt(chosen),
                   lambda figure: draw_marginals(chosen, figure=figure),
                   wide=len(chosen) > 2)


def _marginals_alt(chosen: Sequence[Component]) -> str:
    each = [f"{one.label} {_mean(one.draws)}" + ("" if one.reference is None else
            f" (reference {_mean(one.reference)})") for one in chosen]
    return f"Density curves. Mean and standard deviation: {'; '.join(each)}."


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3g} ± {values.std():.2g}" if len(values) else "not finite"


def _gap_words(chosen: Sequence[Component]) -> str:
    """How far the fit is from the reference, where it is farthest."""
    compared = [one for one in chosen if not math.isnan(one.gap)]
    if not compared:
        return ""
    worst = max(compared, key=lambda one: one.gap)
    return ("The filled shape is the reference; the means are at most "
            f"{worst.gap:.2g} of its standard deviations away ({worst.label}).")


def _pairs(data: Any, reference: Any, pareto_k: Mapping[str, float]) -> Picture:
    title = "Pairs"
    if not site_values(data, "posterior"):
        return Picture(title, "There are no draws of the posterior.")
    chosen, num_left = components("Posterior.report", data, reference, pareto_k=pareto_k,
                                  most=MAX_PAIRS, spread=True)
    chosen = [one for one in chosen if len(one.draws)]
    if len(chosen) < 2:
        return Picture(title, "The posterior has no two numbers to show beside each other.")
    words = left_out(num_left, "numbers", order_words(pareto_k, reference))
    dashed = any(one.reference is not None for one in chosen)
    return Picture(title, _joined("Dots are draws; the lines hold 50% and 90% of them" +
                                  (", the dashed ones of the reference." if dashed else "."),
                                  sentence(words)),
                   _pairs_alt(chosen), lambda figure: draw_pairs(chosen, figure=figure))


def _pairs_alt(chosen: Sequence[Component]) -> str:
    each = [f"{one.label} and {other.label} {_rank_correlation(one.draws, other.draws):.2f}"
            for i, one in enumerate(chosen) for other in chosen[:i]
            if len(one.draws) == len(other.draws)]
    return f"Scatter plots of {len(chosen)} numbers. Rank correlations: {'; '.join(each)}."


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [values.argsort().argsort() for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if len(x) > 1 else math.nan


# ------------------------------------------------------------------ the data

def _predictive(data: Any) -> Picture:
    title = "Predictive checks"
    sites = predictive_sites(data)
    if not sites:
        return Picture(title, _joined("There are no predictive draws to compare observations with.",
                                      _why_left_out(data, "posterior_predictive")))
    shown = sites[: MAX_PREDICTIVE]
    left = left_out(len(sites) - len(shown), "sites", LEAST)
    words = "; ".join(f"{site.name}: {site.words}" for site in shown)
    return Picture(title, _joined("What was observed beside what the fitted model would observe.",
                                  _agreement(shown), sentence(left)),
                   f"Observed beside predicted values. {words}.",
                   partial(_draw_predictive, shown), wide=len(shown) > 1)


def _why_left_out(data: Any, group: str) -> str:
    """What the data say about a group that they lack."""
    notes = str(attributes(data, "posterior").get("left_out", "")).split("; ")
    return sentence("; ".join(note.partition(": ")[2] for note in notes
                               if note.startswith(f"{group}: ")))


def _agreement(sites: Sequence[Predictive]) -> str:
    return sentence(sites[0].words) if len(sites) == 1 else ""


def _draw_predictive(sites: Sequence[Predictive], figure: Any) -> None:
    draw_predictive(sites, figure=figure)


# ------------------------------------------------------------------ the fit

def _weights(log_ratios: Any, threshold: float) -> Picture:
    title = "Tail of the weights"
    if log_ratios is None:
        return Picture(title, "The draws have no importance weights.")
    if not len(finite(log_ratios)):
        return Picture(title, "No draw has a finite importance weight.")
    tail = weight_tail(log_ratios)
    return Picture(title, "A tail that falls below the dashed line is light enough for the "
                          "weights to be used.", _weights_alt(tail, threshold),
                   partial(_draw_weights, log_ratios, threshold))


def _draw_weights(log_ratios: Any, threshold: float, figure: Any) -> None:
    plot_weights(log_ratios, _axes(figure), threshold=threshold)


def _weights_alt(tail: WeightTail, threshold: float) -> str:
    seen = (f"The largest {len(tail.ratios):,} of {tail.num_draws:,} importance ratios, from "
            f"{tail.ratios[-1]:.3g} to {tail.ratios[0]:.3g} times their mean, against the fraction "
            "of draws above them.")
    if not len(tail.fitted):
        return f"{seen} {sentence(tail_words(tail))}"
    side = "lighter" if tail.pareto_k < threshold else "heavier"
    return (f"{seen} The fitted Pareto tail has k-hat {tail.pareto_k:.2f}, {side} than the bar, "
            f"{threshold:.2f}.")


def _pareto_k(site_pareto_k: Mapping[str, float], threshold: float) -> Picture:
    title = "k-hat by site"
    if not site_pareto_k:
        return Picture(title, "k-hat was not computed for single sites.")
    ranked = ranked_sites(site_pareto_k)
    shown = ranked[: MAX_SITES]
    each = "; ".join(f"{name} {k_words(k)}" for name, k in shown)
    words = left_out(len(ranked) - len(shown), "sites", WORST)
    return Picture(title, _joined(f"Below {GOOD_K} (dotted) a site is well fitted, below "
                                  f"{threshold:.2f} (dashed) its weighted draws are.",
                                  sentence(words)),
                   f"k-hat of each site, the worst first: {each}.",
                   partial(_draw_pareto_k, dict(shown), threshold))


def _draw_pareto_k(shown: Mapping[str, float], threshold: float, figure: Any) -> None:
    plot_pareto_k(shown, threshold, _axes(figure, sites_height(max(len(shown), 5))))


def _elbo(history: History | None) -> Picture:
    title = "ELBO of each step"
    if history is None or not (history.stages or history.elbo):
        return Picture(title, "There is no trace: the guide was trained elsewhere.")
    elbo = finite(history.elbo)
    if not len(elbo):
        return Picture(title, "The fit made no step by the gradient of the ELBO.")
    stages = [stage for stage in history.stages if stage.num_steps]
    names = ", ".join(f"{stage.name} {stage.num_steps:,}" for stage in stages)
    return Picture(title, _joined("A good fit ends flat.", sentence(f"steps by stage: {names}")
                                  if len(stages) > 1 else ""), _elbo_alt(elbo),
                   lambda figure: plot_elbo(history, _axes(figure, 2.8)), wide=True)


def _elbo_alt(elbo: np.ndarray) -> str:
    part = max(len(elbo) // 10, 1)
    first, last = np.median(elbo[:part]), np.median(elbo[-part:])
    return (f"ELBO over {len(elbo):,} steps: the median of the first tenth is {first:.4g}, of the "
            f"last {last:.4g} nats.")


# ------------------------------------------------------------------ words

def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


def _axes(figure: Any, height: float = 3.0) -> Any:
    figure.set_figheight(height)
    return figure.subplots()
