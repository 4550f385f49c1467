"""k-hat of each site, the worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyro_nfvi._shapes import check_axes
from pyro_nfvi.diagnostics.checks import GOOD_K, MAX_K
from pyro_nfvi.plots.components import badness
from pyro_nfvi.plots.figures import MUTED, new_axes, set_text
from pyro_nfvi.plots.text import WORST, left_out, short

MAX_SITES = 24


def plot_pareto_k(site_pareto_k: Mapping[str, float], threshold: float = MAX_K, ax: Any = None, *,
                  most: int = MAX_SITES) -> Any:
    """Plot k-hat of each site, the worst on top.

    Args:
        site_pareto_k: k-hat by site.
        threshold: The bar for k-hat.
        ax: Matplotlib axes to draw on. Default: new ones.
        most: Largest number of sites to show; the title says how many are left out.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no site.

    Example:
        >>> axes = plot_pareto_k({"mu": 0.1, "tau": 0.8})
        >>> len(axes.get_yticks())
        2
    """
    if not site_pareto_k:
        raise ValueError("plot_pareto_k expected `site_pareto_k` with at least one site, got none.")
    check_axes("plot_pareto_k", ax)
    ranked = ranked_sites(site_pareto_k)
    shown = ranked[:most]
    ax = new_axes(sites_height(len(shown))) if ax is None else ax
    low, high = _k_limits([k for _, k in shown], threshold)
    for row, (_, k) in enumerate(shown):
        _plot_k(ax, row, k, threshold, low, high)
    _plot_bars(ax, threshold)
    set_text(ax.set_yticks, range(len(shown)), labels=[short(name) for name, _ in shown])
    ax.set(xlabel="Pareto k-hat", ylim=(len(shown) - 0.4, -0.6), xlim=(low, high))
    ax.set_title(left_out(len(ranked) - len(shown), "sites", WORST), fontsize="medium")
    return ax


def sites_height(num_sites: int) -> float:
    """Height of the picture of so many sites, in inches."""
    return 0.9 + 0.28 * num_sites


def ranked_sites(site_pareto_k: Mapping[str, float]) -> list[tuple[str, float]]:
    """Sites with their k-hat, the worst first; one that is not known is the worst."""
    return sorted(site_pareto_k.items(), key=lambda item: -badness(site_pareto_k, item[0]))


def _k_limits(values: list[float], threshold: float) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)]
    return max(min([0.0, *known]) - 0.1, -0.5), min(max([threshold, 1.0, *known]) + 0.4, 3.0)


def _plot_k(ax: Any, row: int, k: float, threshold: float, low: float, high: float) -> None:
    """One row: a dot, a square between the bars, or a cross above, and the number."""
    color, marker = _k_style(k, threshold)
    place = min(max(math.inf if math.isnan(k) else k, low + 0.05), high - 0.3)
    ax.plot([min(0.0, place), max(0.0, place)], [row, row], color=MUTED, lw=1, alpha=0.6)
    ax.plot([place], [row], marker=marker, color=color, ms=7, ls="none")
    ax.annotate(k_words(k), (high, row), ha="right", va="center")


def _k_style(k: float, threshold: float) -> tuple[str, str]:
    if k <= GOOD_K:
        return "C0", "o"
    return ("C0", "s") if k < threshold else ("C1", "X")


def k_words(k: float) -> str:
    """A k-hat in words."""
    if math.isfinite(k):
        return f"{k:.2f}"
    return "unknown" if math.isnan(k) else "no tail" if k < 0 else "infinite"


def _plot_bars(ax: Any, threshold: float) -> None:
    for bar, style in ((GOOD_K, ":"), (threshold, "--")):
        ax.axvline(bar, color=MUTED, ls=style, lw=1.2, zorder=0)
