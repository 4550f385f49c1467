"""What was observed beside what the fitted model would observe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyro_nfvi.plots.density import density_of, view
from pyro_nfvi.plots.figures import bolden, finish, panels, set_text
from pyro_nfvi.plots.predictive_checks import Predictive, band, predictive_sites
from pyro_nfvi.plots.text import LEAST, left_out, short

MAX_PREDICTIVE = 6


def plot_predictive(data: Any, var_names: Sequence[str] | None = None, *,
                    most: int = MAX_PREDICTIVE, figure: Any = None) -> Any:
    """Plot what was observed beside what the fitted model would observe.

    A few observations have an interval each, integers a column for each value, others densities.

    Args:
        data: InferenceData or DataTree with ``posterior_predictive`` and ``observed_data``.
        var_names: Observed sites to show. Default: all.
        most: Largest number of panels. The worst come first; the figure says how many are left
            out.
        figure: An empty matplotlib figure to draw on; its height is set. Default: a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If no site has both.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_nfvi import Posterior
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 8):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(0.0, 1.0 / 3.0))
        >>> posterior = Posterior.of(model, guide, torch.zeros(8))
        >>> figure = plot_predictive(posterior.to_arviz(200))
        >>> figure.axes[0].get_title(loc="left")
        'y'
    """
    sites = predictive_sites(data, var_names)
    if not sites:
        raise ValueError("plot_predictive expected data with observed_data and predictive draws "
                         f"(posterior_predictive) of {_wanted(var_names)}, got none: take them "
                         "from posterior.to_arviz().")
    return draw_predictive(sites[:most], left_out(len(sites) - most, "sites", LEAST), figure)


def _wanted(var_names: Sequence[str] | None) -> str:
    return "a site" if var_names is None else repr(list(var_names))


def draw_predictive(sites: Sequence[Predictive], words: str = "", figure: Any = None) -> Any:
    """Draw the predictive checks of sites that have been chosen, with words below."""
    figure, axes = panels(figure, len(sites), 4.0, 2.7)
    draw: dict[str, Callable] = {"columns": _plot_columns, "intervals": _plot_intervals,
                                 "densities": _plot_densities}
    for ax, site in zip(axes, sites, strict=True):
        draw[site.form](ax, site)
        set_text(ax.set_title, short(site.name, 40), loc="left", pad=20)
        bolden(ax.legend(frameon=False, fontsize="small", loc="lower left", ncols=4,
                         bbox_to_anchor=(-0.02, 0.98), borderaxespad=0, handlelength=1.2,
                         columnspacing=1.2))
    finish(figure, words, legend=False)
    return figure


def _plot_intervals(ax: Any, site: Predictive) -> None:
    """The predictive interval of each observation, by their medians."""
    low, middle, high = site.interval
    order = np.argsort(middle)
    x, inside = np.arange(len(order)), site.inside[order]
    ax.vlines(x, low[order], high[order], color="C0", alpha=0.45, lw=4, label="90% predicted")
    ax.plot(x, middle[order], "_", color="C0", ms=7, mew=1.6, label="median")
    ax.plot(x[inside], site.observed[order][inside], "o", color="C1", ms=4.5, label="observed")
    ax.plot(x[~inside], site.observed[order][~inside], "X", color="C1", ms=7,
            label="outside" if not inside.all() else None)
    ax.set(xlabel="observation, sorted by its prediction", xticks=[])


def _plot_columns(ax: Any, site: Predictive) -> None:
    """How often each value was observed, and would be."""
    assert site.values is not None
    observed, drawn = site.frequencies
    low, middle, high = band(drawn)
    ax.bar(site.values, observed, width=0.8, color="C1", alpha=0.45, label="observed")
    ax.errorbar(site.values, middle, [middle - low, high - middle], fmt="o", ms=4, color="C0",
                capsize=3, label="90% predicted")
    ax.set(xlabel="value", ylabel="frequency")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _plot_densities(ax: Any, site: Predictive) -> None:
    """Density of the observations, and of some draws of all of them."""
    limits = view([site.observed, site.draws.ravel()])
    for i, draw in enumerate(site.draws[:40]):
        ax.plot(*density_of(draw, limits), color="C0", lw=0.6, alpha=0.35,
                label=None if i else "predicted")
    ax.plot(*density_of(site.observed, limits), color="C1", lw=2, label="observed")
    ax.set(xlabel="value", yticks=[], xlim=limits, ylim=(0, None))
