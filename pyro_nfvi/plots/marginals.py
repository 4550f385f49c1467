"""The density of each number of a posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_nfvi.plots.components import Component, components
from pyro_nfvi.plots.density import density_of, view
from pyro_nfvi.plots.figures import finish, panels, set_text
from pyro_nfvi.plots.text import left_out, order_words, short

MAX_MARGINALS = 24


def plot_marginals(data: Any, reference: Any = None, var_names: Sequence[str] | None = None, *,
                   pareto_k: Mapping[str, float] | None = None, most: int = MAX_MARGINALS,
                   figure: Any = None) -> Any:
    """Plot the density of each number of the posterior, beside a reference.

    Args:
        data: InferenceData or DataTree with a posterior, or draws ``(num_draws, *shape)`` by site.
        reference: The same, to compare with, such as draws of NUTS.
        var_names: Sites to show. Default: all.
        pareto_k: k-hat by site. The worst are shown where not all can be.
        most: Largest number of panels; the figure says how many are left out.
        figure: An empty matplotlib figure to draw on; its height is set. Default: a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no draws, a site is unknown, or the reference does not fit.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> draws = {"mu": rng.normal(size=500), "theta": rng.normal(size=(500, 2))}
        >>> figure = plot_marginals(draws)
        >>> [ax.get_title(loc="left") for ax in figure.axes]
        ['mu', 'theta[0]', 'theta[1]']
    """
    chosen, num_left = components("plot_marginals", data, reference, var_names,
                                  pareto_k=pareto_k, most=most)
    if not chosen:
        raise ValueError("plot_marginals expected a posterior with at least one number, got none.")
    words = left_out(num_left, "numbers", order_words(pareto_k, reference))
    return draw_marginals(chosen, words, figure)


def draw_marginals(chosen: Sequence[Component], words: str = "", figure: Any = None) -> Any:
    """Draw the marginals of components that have been chosen, with words below."""
    figure, axes = panels(figure, len(chosen), 1.9, 1.35)
    for ax, component in zip(axes, chosen, strict=True):
        plot_density(ax, component)
        set_text(ax.set_title, short(component.label), loc="left")
        ax.xaxis.get_major_locator().set_params(nbins=4)
    finish(figure, words, legend=any(one.reference is not None for one in chosen))
    return figure


def plot_density(ax: Any, component: Component) -> None:
    """Density of a component as a line, of its reference as a filled shape."""
    ax.set_yticks([])
    if not component.parts:
        ax.set_xticks([])
        ax.text(0.5, 0.5, "no finite draws", ha="center", transform=ax.transAxes)
        return
    limits = view(component.parts)
    if component.reference is not None and len(component.reference):
        ax.fill_between(*density_of(component.reference, limits), color="C1", alpha=0.4, lw=0,
                        label="reference")
    if len(component.draws):
        ax.plot(*density_of(component.draws, limits), color="C0", lw=1.8, label="fit")
    ax.set(xlim=limits, ylim=(0, None))
