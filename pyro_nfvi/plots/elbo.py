"""The ELBO over the steps of a fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_nfvi._shapes import check_axes
from pyro_nfvi.inference import History
from pyro_nfvi.plots.components import finite
from pyro_nfvi.plots.figures import bolden, new_axes

MANY_STEPS = 5000  # more make a line too long for a vector graphic


def plot_elbo(history: History, ax: Any = None) -> Any:
    """Plot the ELBO estimate of each step, a running median over it, and the stages.

    Args:
        history: What happened during the fit.
        ax: Matplotlib axes to draw on. Default: new ones.

    Returns:
        The axes.

    Raises:
        ValueError: If ``ax`` is nothing to draw on.

    Example:
        >>> axes = plot_elbo(History([-5.0, -4.0, -3.5, -3.2]))
        >>> axes.get_xlabel()
        'step'
    """
    check_axes("plot_elbo", ax)
    ax = new_axes() if ax is None else ax
    elbo = np.asarray(history.elbo)
    width = max(1, len(elbo) // 50)
    ax.plot(elbo, lw=0.5, alpha=0.4, label="each step", rasterized=len(elbo) > MANY_STEPS)
    ax.plot(*_running_median(elbo, width), lw=1.8, label=f"median of {width} steps")
    for end in np.cumsum([stage.num_steps for stage in history.stages]):
        if 0 < end < len(elbo):
            ax.axvline(end, color="0.6", ls=":", lw=1)
    ax.set(xlabel="step", ylabel="ELBO (nats)", ylim=_limits(elbo))
    bolden(ax.legend(frameon=False, loc="lower right"))
    return ax


def _running_median(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(values) // width
    blocks = values[: count * width].reshape(count, width)
    return (np.arange(count) + 0.5) * width, np.median(blocks, axis=1)


def _limits(elbo: np.ndarray) -> tuple[float, float] | None:
    """From the level after the first tenth of the fit to the top: the start hides the rest."""
    late = finite(elbo[len(elbo) // 10:])
    if not len(late):
        return None
    low, high = np.quantile(late, 0.01), late.max()
    margin = 0.05 * (high - low) + 1e-9 * max(abs(high), 1.0)  # some, however large they are
    return low - margin, high + margin
