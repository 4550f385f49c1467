"""The tail of the importance weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_nfvi import _arviz
from pyro_nfvi._shapes import check_axes
from pyro_nfvi.diagnostics.checks import MAX_K
from pyro_nfvi.plots.components import finite
from pyro_nfvi.plots.figures import MUTED, new_axes

LEAST_LOG = -500.0  # of a ratio: less would be zero


@dataclass(frozen=True)
class WeightTail:
    r"""Largest importance ratios with the generalized Pareto that ArviZ fits to them.

    .. math:: P(r > c + t \mid r > c) = (1 + k t / \sigma)^{-1 / k}

    Attributes:
        ratios: The largest ratios, falling, as multiples of their mean over all draws.
        exceed: Fraction of the draws above each.
        fitted: Quantiles of the fitted tail at the same fractions.
        pareto_k: The shape :math:`k`; infinite where there is no tail to fit.
        scale: :math:`\sigma`, and where the tail starts.
        start: :math:`c`.
        num_draws: Number of draws with a finite ratio.
    """

    ratios: np.ndarray
    exceed: np.ndarray
    fitted: np.ndarray
    pareto_k: float
    scale: float
    start: float
    num_draws: int

    def quantiles(self, pareto_k: float) -> np.ndarray:
        """Those of a tail of another shape, from the same start and with the same scale."""
        inside = self.exceed[: len(self.fitted)] * self.num_draws / max(len(self.fitted), 1)
        return self.start + self.scale * _excess(inside, pareto_k)


def weight_tail(log_ratios: Any) -> WeightTail:
    """Tail of importance ratios.

    Args:
        log_ratios: Log importance ratios ``(num_draws,)``, not normalized, not smoothed.

    Raises:
        ValueError: If none of them is finite.

    Example:
        >>> tail = weight_tail(-0.5 * np.log(np.random.default_rng(0).uniform(size=10_000)))
        >>> len(tail.fitted), abs(tail.pareto_k - 0.5) < 0.2  # draws of a Pareto of shape 0.5
        (300, True)
    """
    logs = np.sort(finite(log_ratios))[::-1]
    if not len(logs):
        raise ValueError("plot_weights expected `log_ratios` with finite values, got "
                         f"none in {len(log_ratios)}.")
    smoothed, pareto_k = _arviz.psis(logs)
    mean = np.logaddexp.reduce(logs) - math.log(len(logs))
    num_tail = _arviz.tail_length(len(logs)) if math.isfinite(pareto_k) else 0
    ratios = np.exp(np.maximum(logs - mean, LEAST_LOG))
    fitted = np.exp(np.maximum(smoothed[:num_tail] - smoothed[-1] + logs[-1] - mean, LEAST_LOG))
    exceed = (np.arange(len(logs)) + 0.5) / len(logs)
    shown = max(2 * num_tail, min(len(logs), 50))
    start = float(ratios[num_tail]) if num_tail else math.nan
    return WeightTail(ratios[:shown], exceed[:shown], fitted, pareto_k,
                      _scale(fitted, start, pareto_k), start, len(logs))


def _scale(fitted: np.ndarray, start: float, pareto_k: float) -> float:
    """Scale of the generalized Pareto whose quantiles were given, from their median."""
    middle = len(fitted) // 2
    if not len(fitted):
        return math.nan
    inside = np.asarray((middle + 0.5) / len(fitted))
    return float((fitted[middle] - start) / _excess(inside, pareto_k))


def _excess(exceed: np.ndarray, pareto_k: float) -> np.ndarray:
    """Quantiles of a generalized Pareto of scale one at fractions above."""
    if abs(pareto_k) < 1e-8:
        return -np.log(exceed)
    return np.expm1(-pareto_k * np.log(exceed)) / pareto_k


def plot_weights(log_ratios: Any, ax: Any = None, *, threshold: float = MAX_K) -> Any:
    """Plot the tail of the importance ratios, the fitted Pareto, and the heaviest good one.

    Both axes are logarithmic: a tail of shape ``k`` falls with slope ``-1 / k``. A tail below the
    dashed line is lighter than the bar.

    Args:
        log_ratios: Log importance ratios ``(num_draws,)``: log joint minus log guide density.
        ax: Matplotlib axes to draw on. Default: new ones.
        threshold: The bar for k-hat.

    Returns:
        The axes.

    Raises:
        ValueError: If no ratio is finite.

    Example:
        >>> log_ratios = np.random.default_rng(0).normal(size=1000)
        >>> axes = plot_weights(log_ratios)
        >>> axes.get_xscale(), axes.get_yscale()
        ('log', 'log')

    References:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling, arXiv:1507.02646.
    """
    check_axes("plot_weights", ax)
    tail = weight_tail(log_ratios)
    ax = new_axes() if ax is None else ax
    ax.plot(tail.ratios, tail.exceed, ".", ms=4, color="C0", label="draws")
    if len(tail.fitted):
        _plot_fitted(ax, tail, threshold)
    ax.set(xlabel="importance ratio / its mean", ylabel="fraction of draws above", yscale="log",
           title=tail_words(tail))
    if tail.ratios[0] > 3 * tail.ratios[-1]:  # else a logarithmic axis is a linear one
        ax.set_xscale("log")
        _plain_log_ticks(ax.xaxis)
    _plain_log_ticks(ax.yaxis)
    ax.legend(frameon=False, loc="lower left")
    return ax


def _plot_fitted(ax: Any, tail: WeightTail, threshold: float) -> None:
    exceed = tail.exceed[: len(tail.fitted)]
    inner = tail.fitted < tail.ratios[0]  # the others are cut at the largest ratio
    ax.plot(tail.fitted[inner], exceed[inner], color="C1", lw=2,
            label=f"fitted Pareto, k-hat {tail.pareto_k:.2f}")
    bar = tail.quantiles(threshold)
    ax.plot(bar, exceed, color=MUTED, ls="--", lw=1.4, label=f"the bar, {threshold:.2f}")
    ax.set_xlim(max(tail.ratios[-1], 1e-8), max(tail.ratios[0], bar[len(bar) // 20]) * 1.05)


def tail_words(tail: WeightTail) -> str:
    """Why no tail was fitted; nothing if one was."""
    if math.isfinite(tail.pareto_k):
        return ""
    return ("the weights are equal: no tail" if tail.pareto_k < 0 else "too few draws for a tail")


def _plain_log_ticks(axis: Any) -> None:
    """Powers of ten as plain numbers: 0.01, 1, 100."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
