"""What every picture asks of matplotlib: axes, panels, legends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

MUTED = "0.5"


def new_axes(height: float = 3.5) -> Any:
    """Axes of a figure of pyplot, so high."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, height), layout="constrained")[1]


def new_figure(width: float = 9.0) -> Any:
    """A figure of pyplot, so wide."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, 3), layout="constrained")


def panels(figure: Any, count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with as many panels, each at least so wide."""
    figure = new_figure(min(9.0, 1.5 * width * count)) if figure is None else figure
    columns = min(count, max(1, int(figure.get_figwidth() / width)))
    rows = math.ceil(count / columns)
    figure.set_figheight(rows * height + 0.45)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def finish(figure: Any, words: str, legend: bool) -> None:
    """The legend above, and below what is left out."""
    if words:
        figure.supxlabel(words)
    if legend:
        by_label = {label: handle for ax in figure.axes
                    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(by_label.values(), by_label.keys(), loc="outside upper right", ncols=2,
                      frameon=False)


def bolden(legend: Any) -> None:
    """Lines of a legend that are seen, also where those of the picture are thin and pale."""
    for line in legend.get_lines():
        line.set(alpha=1, linewidth=max(line.get_linewidth(), 1.5))


def set_text(setter: Callable, *args: Any, **kwargs: Any) -> None:
    """Words of the user as they are: a dollar sign is no formula."""
    setter(*args, parse_math=False, **kwargs)
