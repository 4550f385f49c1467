"""What a model and its data must be: the same sites at each call, and numbers to observe."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import type_name
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference.log_joint import LogJoint, is_data

NUM_CALLS = 3  # of the model, to see whether it changes


def check_arguments(owner: str, model: Callable, args: tuple, kwargs: dict) -> None:
    """Refuse arguments that a model does not take, as far as it says what it takes.

    Raises:
        ValueError: If it does not.
    """
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{owner} expected the arguments of the model, {signature}: "
                         f"{error}.") from None


def check_sites(owner: str, log_joint: LogJoint) -> None:
    """Refuse a model whose latent sites are not the same at each call.

    Raises:
        ValueError: If one is gone, new, or of another shape.
    """
    for _ in range(NUM_CALLS):
        try:
            with log_joint.surroundings(), forked_rng(), poutine.trace() as trace:
                log_joint.model(*log_joint.args, **log_joint.kwargs)
        except (NotImplementedError, ValueError, RuntimeError):  # a prior that has no draws, or
            return  # one whose draws are too wild for the model
        _compare_sites(owner, log_joint.layout, trace.trace.nodes)


def _compare_sites(owner: str, layout: LatentLayout, nodes: dict) -> None:
    shapes = {name: tuple(node["value"].shape) for name, node in nodes.items()
              if node["type"] == "sample" and not node["is_observed"]
              and not site_is_subsample(node)}
    for site in layout:
        now = shapes.pop(site.name, None)
        if now != tuple(site.shape):
            raise ValueError(f"{owner} expected the model to have the same latent sites at each "
                             f"call; {site.name!r} was of shape {tuple(site.shape)} and now is "
                             f"{'gone' if now is None else now}. Fix what its shape depends on.")
    if shapes:
        raise ValueError(f"{owner} expected the model to have the same latent sites at each call; "
                         f"{min(shapes)!r} is new. Fix what it depends on.")


def check_estimates(owner: str, estimates: Any) -> tuple[Tensor, Tensor]:
    """Return what an objective returned, if it is the ELBO of each particle, and the latents.

    Raises:
        ValueError: If it is anything else.
    """
    pair = estimates if isinstance(estimates, (tuple, list)) else (estimates,)
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise ValueError(f"{owner} expected `objective` to return two tensors, the ELBO of each "
                         "particle and the latents, as ELBO() does, got "
                         f"{', '.join(type_name(part) for part in pair)}.")
    elbo, z = pair
    return elbo, z


def check_data(owner: str, log_joint: LogJoint, z: Tensor) -> None:
    """Refuse observed values of a shape that does not fit, that are not numbers, or not possible.

    Raises:
        ValueError: If there are any.
    """
    with log_joint.surroundings():
        nodes = log_joint.trace(z).nodes
    latent = {site.name for site in log_joint.layout}
    for name, node in nodes.items():
        if name in latent or not is_data(node):
            continue
        _check_shape(owner, name, node)
        if bad := int(node["value"].isnan().sum()):
            raise ValueError(f"{owner} expected site {name!r} to be observed with numbers, got "
                             f"{bad} NaN. Drop them, or hide them: poutine.mask(mask=~y.isnan()) "
                             "around the site and y.nan_to_num() as its value.")
        if bad := _num_outside(node):
            raise ValueError(f"{owner} expected site {name!r} to be observed within the support of "
                             f"its distribution, {node['fn'].support}, got {bad} outside. Mend the "
                             "data, or choose another likelihood.")


def _check_shape(owner: str, name: str, node: dict) -> None:
    """Refuse values that are no draws, and a column that would pair off with a plate."""
    value, event_dim = node["value"], node["fn"].event_dim
    batch = value.shape[:max(value.dim() - event_dim, 0)]
    plates = {frame.dim: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
    beyond = batch[:min(plates)] if plates else ()
    paired = math.prod(beyond) > 1 and any(
        batch[dim] == 1 < size for dim, size in plates.items())
    if value.shape[len(batch):] != node["fn"].event_shape or paired:
        raise ValueError(f"{owner} expected site {name!r} to be observed with values of shape "
                         f"{tuple(node['fn'].shape())}, got {tuple(value.shape)}. Reshape the "
                         "data, or the plates.")


def _num_outside(node: dict) -> int:
    """Number of observed values that the site's distribution cannot give."""
    mask = node["mask"]
    if not pyro.settings.get("validate_distributions_pyro"):
        return 0
    try:
        outside = ~node["fn"].support.check(node["value"])
    except NotImplementedError:  # no such check
        return 0
    return int((outside if mask is None else outside & mask).sum())
