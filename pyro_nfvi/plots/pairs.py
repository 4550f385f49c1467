"""Numbers of a posterior against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyro_nfvi.plots.components import Component, components
from pyro_nfvi.plots.density import view
from pyro_nfvi.plots.figures import finish, new_figure, set_text
from pyro_nfvi.plots.marginals import plot_density
from pyro_nfvi.plots.text import left_out, order_words, short

MAX_PAIRS = 4
NUM_DOTS = 400  # of a scatter plot
MASSES = 0.9, 0.5  # inside the contours


def plot_pairs(data: Any, reference: Any = None, var_names: Sequence[str] | None = None, *,
               pareto_k: Mapping[str, float] | None = None, most: int = MAX_PAIRS,
               figure: Any = None) -> Any:
    """Plot each pair of some numbers of the posterior, beside a reference.

    Dots are draws; the lines hold 50% and 90% of them.

    Args:
        data: InferenceData or DataTree with a posterior, or draws ``(num_draws, *shape)`` by site.
        reference: The same, to compare with, such as draws of NUTS.
        var_names: Sites to show. Default: all.
        pareto_k: k-hat by site. The worst are shown where not all can be.
        most: Largest number of rows. One of each site comes before a second of any; the figure
            says how many are left out.
        figure: An empty matplotlib figure to draw on; its height is set. Default: a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no draws, a site is unknown, or the reference does not fit.

    Example:
        >>> import numpy as np
        >>> figure = plot_pairs({"theta": np.random.default_rng(0).normal(size=(500, 2))})
        >>> len(figure.axes)
        3
    """
    chosen, num_left = components("plot_pairs", data, reference, var_names,
                                  pareto_k=pareto_k, most=most, spread=True)
    words = left_out(num_left, "numbers", order_words(pareto_k, reference))
    return draw_pairs(chosen, words, figure)


def draw_pairs(chosen: Sequence[Component], words: str = "", figure: Any = None) -> Any:
    """Draw the pairs of components that have been chosen, with words below."""
    chosen = [component for component in chosen if len(component.draws)]
    if not chosen:
        raise ValueError("plot_pairs expected finite draws, got none.")
    figure = new_figure() if figure is None else figure
    figure.set_figheight(figure.get_figwidth() * 0.9 * max(len(chosen), 2) / MAX_PAIRS + 0.4)
    axes = figure.subplots(len(chosen), len(chosen), squeeze=False)
    for row, below in enumerate(chosen):
        for column, left in enumerate(chosen):
            ax = axes[row, column]
            if column > row:
                ax.remove()
                continue
            plot_density(ax, below) if row == column else _plot_pair(ax, left, below)
            _label_pair(ax, left, below, row, column, len(chosen))
    finish(figure, words, legend=any(one.reference is not None for one in chosen))
    return figure


def _label_pair(ax: Any, left: Component, below: Component, row: int, column: int, count: int
                ) -> None:
    """Names and ticks on the outside only."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis)[: 1 + (row != column)]:  # a density has no scale
        axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    ax.tick_params(labelbottom=row == count - 1, labelleft=column == 0 and row > 0,
                   labelsize="small")
    if row == count - 1:
        set_text(ax.set_xlabel, short(left.label, 12), fontsize="small")
    if column == 0:
        set_text(ax.set_ylabel, short(below.label, 12), fontsize="small")


def _plot_pair(ax: Any, left: Component, below: Component) -> None:
    """Draws of two components as dots, and lines around most of them."""
    limits = [view(one.parts) for one in (left, below)]
    if len(left.draws) == len(below.draws):  # none had to be left out
        some = slice(None, None, -(-len(left.draws) // NUM_DOTS))
        ax.plot(left.draws[some], below.draws[some], ".", ms=3, mew=0, alpha=0.4, color="C0",
                rasterized=True)
        _plot_contours(ax, left.draws, below.draws, limits, colors="C0", linewidths=1.5)
    if _comparable(left.reference, below.reference):
        _plot_contours(ax, left.reference, below.reference, limits, colors="C1", linewidths=1.2,
                       linestyles="--")
    ax.set(xlim=limits[0], ylim=limits[1])


def _comparable(x: np.ndarray | None, y: np.ndarray | None) -> bool:
    return x is not None and y is not None and len(x) == len(y) > 0


def _plot_contours(ax: Any, x: Any, y: Any, limits: Sequence[tuple[float, float]], **style: Any
                   ) -> None:
    """Lines around the densest cells that hold 90% and 50% of the points."""
    density = _density_2d(x, y, limits)
    falling = np.sort(density.ravel())[::-1]
    held = falling.cumsum() * falling.sum() / max(falling.sum(), 1e-300) ** 2
    levels = [falling[min(np.searchsorted(held, mass), len(falling) - 1)] for mass in MASSES]
    if 0 < levels[0] < levels[1]:
        places = [np.linspace(*limit, 2 * len(density) + 1)[1::2] for limit in limits]
        ax.contour(*places, density.T, levels=levels, **style)


def _density_2d(x: np.ndarray, y: np.ndarray, limits: Sequence[tuple[float, float]],
                num_bins: int = 50) -> np.ndarray:
    """Smoothed histogram; nothing is smoothed over an edge."""
    counts = np.histogram2d(x, y, num_bins, limits)[0]
    across, along = (_smoother(values, limit, num_bins)
                     for values, limit in zip((x, y), limits, strict=True))
    density: np.ndarray = across @ counts @ along.T
    return density


def _smoother(values: np.ndarray, limits: tuple[float, float], num_bins: int) -> np.ndarray:
    """Gaussian of Scott's width in two dimensions, between bins."""
    inside = values[(values >= limits[0]) & (values <= limits[1])] / (limits[1] - limits[0])
    deviation = inside.std() * len(inside) ** (-1 / 6) if len(inside) else 0.0
    width = max(deviation * num_bins, 0.5)
    bins = np.arange(num_bins)
    weights = np.exp(-0.5 * ((bins[:, None] - bins) / width) ** 2)
    smoother: np.ndarray = weights / weights.sum(0)
    return smoother
