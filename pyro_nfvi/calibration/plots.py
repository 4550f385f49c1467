"""Pictures of calibration: lines that ought to stay within a band."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_nfvi._shapes import check_axes
from pyro_nfvi.calibration.ecdf import UniformityTest

MAX_PANELS = 24
MAX_NAMED = 3  # lines outside the band that a legend names one by one
BAND, MUTED = "0.85", "0.5"


def plot_panels(owner: str, panels: Mapping[str, Mapping[str, np.ndarray]], test: UniformityTest,
                level: float, axes: Any, *, difference: bool, xlabel: str, ylabel: str) -> Any:
    """Plot the ECDF of uniform ranks: a panel for each site, a line for each of its numbers.

    Args:
        owner: Name of the method, for messages.
        panels: Ranks ``(num_ranks,)`` by label, by site.
        test: The test whose band is drawn.
        level: Probability that all lines of a panel are within its band.
        axes: Matplotlib axes, or None for new ones.
        difference: Whether to subtract the uniform distribution.
        xlabel: What the ranks are.
        ylabel: What their ECDF is.

    Returns:
        An array of axes.

    Raises:
        ValueError: If there are fewer axes than sites.
    """
    panels = {name: lines for name, lines in panels.items() if lines}
    axes = _new_axes(panels) if axes is None else np.asarray(axes, dtype=object).ravel()
    shown = list(panels)[:MAX_PANELS] if len(panels) > MAX_PANELS else list(panels)
    if len(axes) < len(shown):
        raise ValueError(f"{owner} expected {len(shown)} axes, one for each site, got {len(axes)}.")
    for ax in axes:
        check_axes(owner, ax)
    for ax, name in zip(axes, shown, strict=False):
        _plot_panel(ax, panels[name], test, level, difference)
        ax.set_title(_title(name, panels[name]), fontsize="medium")
        ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1))
    if len(shown) < len(panels):
        axes[0].figure.supxlabel(f"{len(panels) - len(shown)} more sites are not shown: choose "
                                 "by var_names=[...]", fontsize="small")
    return axes


def _new_axes(panels: Mapping[str, Any]) -> np.ndarray:
    import matplotlib.pyplot as plt

    count = max(1, min(len(panels), MAX_PANELS))
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4.2, 3.6 * columns), 2.9 * rows),
                                squeeze=False, layout="constrained")
    for ax in axes.ravel()[count:]:
        figure.delaxes(ax)
    flat: np.ndarray = axes.ravel()[:count]
    return flat


def _plot_panel(ax: Any, lines: Mapping[str, np.ndarray], test: UniformityTest, level: float,
                difference: bool) -> None:
    """The band, and the lines: those that leave it in another colour, and named."""
    x = np.r_[0.0, test.points / (test.num_draws + 1), 1.0]
    lower, upper = test.band(1 - (1 - level) / len(lines))
    zero = x * difference
    ax.fill_between(x, np.r_[0, lower, 1] - zero, np.r_[0, upper, 1] - zero, color=BAND, lw=0,
                    label=f"{level:.0%} band" + (f" of {len(lines)} lines" * (len(lines) > 1)))
    ax.plot([0, 1], [0, 0 if difference else 1], color=MUTED, lw=1, ls="--")
    counts = test.counts(np.stack(list(lines.values()), -1)) / test.num_ranks
    outside = ((counts < lower[:, None]) | (counts > upper[:, None])).any(0)
    names = [label for label, out in zip(lines, outside, strict=True) if out]
    for label, fractions, out in zip(lines, counts.T, outside, strict=True):
        ax.plot(x, np.r_[0, fractions, 1] - zero, color="C1" if out else "C0", lw=1.4,
                alpha=1.0 if out or len(lines) < 4 else 0.5, zorder=3 if out else 2,
                label=_named(names) if names and label == names[0] else None)
    if difference:  # room for the legend, below what it explains
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.3 * (high - low), high)
    ax.legend(frameon=False, fontsize="small", loc="lower left" if difference else "upper left")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return _plain(f"outside: {', '.join(names[:MAX_NAMED])}{more}")


def _title(name: str, lines: Mapping[str, Any]) -> str:
    return _plain(f"{name} ({len(lines)} numbers)" if len(lines) > 1 else next(iter(lines)))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which is no formula
