"""A picture of a flow over two coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_context, check_positive_int, type_name
from pyro_nfvi.flows import Bijection, Compose, Flow, FlowDistribution, Inverse
from pyro_nfvi.guides.pyro_dist import ConstantFlow
from pyro_nfvi.inference.density_start import ContextUnits

NUM_GRID = 200  # points along each side of a density's picture
REACH, NUM_LINES, NUM_POINTS = 2.5, 21, 200  # standard deviations, lines, points of a line
INSIDE = (0.002, 0.998)  # quantiles of the draws that are shown
MARGIN = 0.15  # of their range, on either side
SHOWN = 20_000  # dots of a picture
COLOURS = ("#1f5fa8", "#d1662b")  # of lines along the first and the second coordinate of the noise

Panel = tuple[str, Callable[[Any], None]]  # a title, and what draws it
Step = tuple[str, Bijection, Tensor | None]


@torch.no_grad()
def plot_flow(flow: Flow | FlowDistribution | ConstantFlow, *, context: Tensor | None = None,
              samples: Any = None, log_density: Callable[[Tensor], Tensor] | None = None,
              num_samples: int = 2000, num_layers: int = 5,
              limits: tuple[float, float, float, float] | None = None) -> Any:
    """Plot the density of a flow, draws from it, and a grid of noise carried layer by layer.

    Drawing leaves the random state as it was.

    Args:
        flow: A flow over two coordinates, or a fitted one.
        context: Context ``(context_dim,)`` of a conditional flow. Default: what it is given.
        samples: Data ``(n, 2)`` to show beside it.
        log_density: Log of the density it stands for, up to a constant, to show beside it.
        num_samples: Number of draws.
        num_layers: Number of pictures of the grid after the first, evenly chosen layers.
        limits: Left, right, bottom and top. Default: where the draws and the data are.

    Returns:
        The axes, in an array: densities and dots, then grids.

    Raises:
        ValueError: If the flow is over another number of coordinates, or an argument does not fit.

    Example:
        >>> from pyro_nfvi.flows import planar
        >>> axes = plot_flow(Flow(planar(2, num_layers=2)), num_samples=100)
        >>> [ax.get_title(loc="left") for ax in axes]
        ['density of the flow', 'draws', 'noise', '1: Planar', '2: Planar']
    """
    flow, context = _checked_flow(flow, context)
    check_positive_int("plot_flow", "num_samples", num_samples)
    check_positive_int("plot_flow", "num_layers", num_layers)
    if log_density is not None and not callable(log_density):
        raise ValueError("plot_flow expected `log_density` to be a function, got "
                         f"{type_name(log_density)}.")
    data = None if samples is None else _checked_samples(samples)
    with forked_rng(seed=0):
        draws = flow(context).sample((num_samples,)).cpu().numpy()
    limits = _limits(draws, data) if limits is None else _checked_limits(limits)
    panels: list[Panel] = [("density of the flow", lambda ax: _draw_density(
        ax, lambda z: flow.log_prob(z, context), limits, flow.base.zeros))]
    panels += [("target density", lambda ax: _draw_density(
        ax, log_density, limits, flow.base.zeros))] if log_density is not None else []
    panels += [("draws", lambda ax: _draw_dots(ax, draws, limits))]
    panels += [("data", lambda ax: _draw_dots(ax, data, limits))] if data is not None else []
    grids = _chosen(_carried(flow, context), num_layers)
    panels += [(name, partial(_draw_grid, lines=lines)) for name, lines in grids]
    return _figure(panels, len(panels) - len(grids))


def _figure(panels: list[Panel], num_above: int) -> Any:
    import matplotlib.pyplot as plt

    counts = num_above, len(panels) - num_above
    columns = max(counts)
    figure = plt.figure(figsize=(2.6 * columns, 5.6), layout="constrained")
    rows: Any = figure.subfigures(2, 1)
    axes = [ax for row, count in zip(rows, counts, strict=True)
            for ax in row.subplots(1, columns, squeeze=False)[0][:count]]
    for row, count in zip(rows, counts, strict=True):
        for ax in row.axes[count:]:
            ax.remove()
    for ax, (title, draw) in zip(axes, panels, strict=True):
        draw(ax)
        ax.set_title(title, loc="left", fontsize=9)
        ax.tick_params(labelsize=7)
    return np.array(axes)


# ------------------------------------------------------------------ what is drawn

def _draw_density(ax: Any, log_density: Callable[[Tensor], Tensor],
                  limits: tuple[float, float, float, float], like: Tensor) -> None:
    left, right, bottom, top = limits
    x, y = np.linspace(left, right, NUM_GRID), np.linspace(bottom, top, NUM_GRID)
    z = torch.from_numpy(np.stack(np.meshgrid(x, y), -1)).to(like)
    value = log_density(z.reshape(-1, 2)).double().nan_to_num(-torch.inf)
    density = (value - value[value < torch.inf].max()).exp().reshape(NUM_GRID, NUM_GRID)
    ax.pcolormesh(x, y, density.cpu().numpy(), cmap="viridis", shading="gouraud", rasterized=True)


def _draw_dots(ax: Any, points: np.ndarray, limits: tuple[float, float, float, float]) -> None:
    points = points[:SHOWN]
    size = float(np.clip(4000 / len(points), 0.5, 8))
    ax.scatter(*points.T, s=size, c="0.2", alpha=0.5, lw=0, rasterized=True)
    ax.set(xlim=limits[:2], ylim=limits[2:])


def _draw_grid(ax: Any, lines: np.ndarray) -> None:
    for family, colour in zip(lines, COLOURS, strict=True):
        for line in family:
            ax.plot(*line.T, c=colour, lw=0.6, alpha=0.8)


# ------------------------------------------------------------------ the grid

def _carried(flow: Flow, context: Tensor | None) -> list[tuple[str, np.ndarray]]:
    """Lines ``(2, NUM_LINES, NUM_POINTS, 2)`` of the noise, and after each layer."""
    place, along = np.linspace(-REACH, REACH, NUM_LINES), np.linspace(-REACH, REACH, NUM_POINTS)
    across = np.stack(np.meshgrid(place, along, indexing="ij"), -1)
    u = torch.from_numpy(np.stack([across[..., ::-1], across])).to(flow.base.zeros)
    scale = flow.base.variance.sqrt()
    usual = scale.isfinite().all()
    u = flow.base.mean + scale * u if usual else u
    found = [("noise", u.cpu().numpy())]
    for name, layer, inner in _steps(flow.bijection, context):
        u, _ = layer(u, inner)
        found.append((name, u.cpu().numpy()))
    return found


def _steps(bijection: Bijection, context: Tensor | None) -> Iterator[Step]:
    """The layers a bijection is made of, in the direction of sampling, each with its context."""
    context = context if bijection.context_dim else None
    if isinstance(bijection, Compose):
        for layer in bijection.layers:
            yield from _steps(layer, context)
    elif isinstance(bijection, ContextUnits):
        yield from _steps(bijection.bijection, bijection._scaled(context))
    elif isinstance(bijection, Inverse):
        for name, layer, inner in reversed(list(_steps(bijection.bijection, context))):
            yield f"{name}, inverted", Inverse(layer), inner
    else:
        yield type(bijection).__name__, bijection, context


def _chosen(grids: list[tuple[str, np.ndarray]], count: int) -> list[tuple[str, np.ndarray]]:
    """The first, and so many of the others, the last among them."""
    last = len(grids) - 1
    places = np.unique(np.linspace(0, last, min(count, last) + 1).round().astype(int))
    return [(f"{i}: {grids[i][0]}" if i else grids[i][0], grids[i][1]) for i in places]


# ------------------------------------------------------------------ checks

def _checked_flow(flow: Any, context: Any) -> tuple[Flow, Tensor | None]:
    if isinstance(flow, FlowDistribution | ConstantFlow):
        flow, context = flow.flow, flow.context if context is None else context
    if not isinstance(flow, Flow):
        raise ValueError("plot_flow expected `flow` to be a Flow or a fitted one, got "
                         f"{type_name(flow)}. Of a bijection make one: Flow(bijection).")
    if flow.input_dim != 2:
        raise ValueError(f"plot_flow draws flows over two coordinates, got {flow.input_dim}. Draw "
                         "samples of it instead, with arviz.plot_pair.")
    context = check_context("plot_flow", context, flow.context_dim)
    if context is not None and context.dim() > 1:
        raise ValueError(f"plot_flow expected one `context` of shape ({flow.context_dim},), got "
                         f"{tuple(context.shape)}. Choose one: context=c[0].")
    return flow, None if context is None else context.to(flow.base.zeros)


def _checked_limits(limits: Any) -> tuple[float, float, float, float]:
    try:
        left, right, bottom, top = (float(limit) for limit in limits)
    except (TypeError, ValueError):
        left = right = bottom = top = math.nan
    if not (-math.inf < left < right < math.inf and -math.inf < bottom < top < math.inf):
        raise ValueError("plot_flow expected `limits` to be four numbers, left below right and "
                         f"bottom below top, got {limits!r}.")
    return left, right, bottom, top


def _checked_samples(samples: Any) -> np.ndarray:
    array = np.asarray(samples.detach().cpu() if isinstance(samples, Tensor) else samples)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"plot_flow expected `samples` to be numbers, got {type_name(samples)}.")
    if array.ndim != 2 or array.shape[1] != 2 or not len(array):
        raise ValueError(f"plot_flow expected `samples` of shape (n, 2), got {array.shape}.")
    return array


def _limits(draws: np.ndarray, data: np.ndarray | None) -> tuple[float, float, float, float]:
    """Where most of the draws and of the data are."""
    ends = np.concatenate([np.quantile(points[np.isfinite(points).all(1)], INSIDE, axis=0)
                           for points in (draws, data) if points is not None])
    low, high = ends.min(0), ends.max(0)
    margin = MARGIN * (high - low) + 1e-9
    (left, bottom), (right, top) = low - margin, high + margin
    return float(left), float(right), float(bottom), float(top)
