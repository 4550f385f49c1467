"""Pictures of a fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_nfvi.inference import History


def plot_elbo(history: History, ax: Any = None) -> Any:
    """Plot the ELBO estimate of each step, a running median over it, and the stages.

    Args:
        history: What happened during the fit.
        ax: Matplotlib axes to draw on. Default: new ones.

    Returns:
        The axes.
    """
    import matplotlib.pyplot as plt

    ax = plt.subplots(figsize=(7, 3.5), layout="constrained")[1] if ax is None else ax
    elbo = np.asarray(history.elbo)
    width = max(1, len(elbo) // 50)
    ax.plot(elbo, lw=0.5, alpha=0.4, label="each step")
    ax.plot(*_running_median(elbo, width), lw=1.8, label=f"median of {width} steps")
    for end in np.cumsum([stage.num_steps for stage in history.stages]):
        if 0 < end < len(elbo):
            ax.axvline(end, color="0.6", ls=":", lw=1)
    ax.set(xlabel="step", ylabel="ELBO (nats)", ylim=_limits(elbo) if len(elbo) else None)
    ax.legend(frameon=False, loc="lower right")
    return ax


def _running_median(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(values) // width
    blocks = values[: count * width].reshape(count, width)
    return (np.arange(count) + 0.5) * width, np.median(blocks, axis=1)


def _limits(elbo: np.ndarray) -> tuple[float, float]:
    """From the level after the first tenth of the fit to the top: the start hides the rest."""
    late = elbo[len(elbo) // 10:]
    low, high = np.quantile(late, 0.01), late.max()
    margin = 0.05 * (high - low) + 1e-9
    return low - margin, high + margin
