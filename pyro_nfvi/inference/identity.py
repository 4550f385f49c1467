"""What tells two fits apart: latents, guide, loader, the density of every site, and the data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_nfvi._random import forked_rng
from pyro_nfvi.inference.log_joint import LogJoint, is_data
from pyro_nfvi.inference.problem import Problem

SAME = 1e-4  # relative difference of two numbers that rounding explains, in single precision
FINE = 1e-6  # and in double precision
PLACE = 0.1  # size of latents and parameters at which log densities are compared
LINE = 200  # characters of an explanation
NUM_SAMPLED = 1000  # numbers that tell data apart


@torch.no_grad()
def identity(problem: Problem) -> dict[str, Any]:
    """What tells two problems apart: latent sites, the flow, the type, the data, and the model.

    None of it depends on the random state, or on what a fit has trained.
    """
    guide, feed = problem.guide, problem.feed
    recipes = guide.recipe, guide._base_recipe, guide._affine_recipe
    return {"the latent sites": {site.name: list(site.shape) for site in guide.layout},
            "the guides": [type(guide).__name__, *map(described, recipes)],
            "the floating-point types": str(problem.log_joint.dtype),
            "the loaders": {} if feed is None else {
                "kind": feed.kind, "rows": feed.num_rows, "batch_size": feed.batch_size},
            **of_model(problem.whole, guide._init_loc())}


@torch.no_grad()
def of_model(log_joint: LogJoint, like: Tensor) -> dict[str, dict[str, Any]]:
    """Some numbers of the data, and the log density of every site at a set place, by name.

    Of latents alone, if the rows of a loader come in an order of their own.

    Args:
        log_joint: The model and its data, all of them or those of a loader.
        like: An unconstrained latent, of the type and device of all.
    """
    some = log_joint.of_set_rows()
    sites = _sites(log_joint if some is None else some, like)
    latent = [site.name for site in log_joint.layout]
    densities = {name: node["log_prob_sum"].detach().cpu() for name, node in sites.items()
                 if some is not None or name in latent}
    data = {} if some is None else {name: sampled(node["value"]) for name, node in sites.items()
                                    if name not in latent and is_data(node)}
    numbers = {f"argument {i}": _numbers(leaf)
               for i, leaf in enumerate(tree_leaves(log_joint.given[1:]))
               if isinstance(leaf, (Tensor, np.ndarray, np.generic, int, float))}
    return {"the data": {**data, **numbers}, "the densities of the sites": densities}


def _sites(log_joint: LogJoint, like: Tensor) -> dict[str, dict[str, Any]]:
    with forked_rng(0):
        z = (PLACE * torch.randn(log_joint.layout.size)).to(like)
        with _set_parameters(log_joint, z), log_joint.surroundings():
            trace = log_joint.trace(z)
            trace.compute_log_prob()
    return {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}


@contextmanager
def _set_parameters(log_joint: LogJoint, z: Tensor) -> Iterator[None]:
    """All ``pyro.param`` values of the model are the same number inside."""
    parameters = log_joint.parameters(z).values()
    before = [value.clone() for value in parameters]
    try:
        for value in parameters:
            value.fill_(PLACE)
        yield
    finally:
        for value, trained in zip(parameters, before, strict=True):
            value.copy_(trained)


def described(part: Any) -> str:
    """What tells two functions, objects or modules apart, whatever their numbers."""
    shapes = [tuple(value.shape) for value in part.state_dict().values()
              if isinstance(value, Tensor)] if isinstance(part, nn.Module) else ""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part)) + str(shapes)


def _numbers(value: Any) -> Tensor | None:
    """Some of the numbers of an argument; None if it holds no real ones."""
    array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
    if array.is_complex() if isinstance(array, Tensor) else array.dtype.kind not in "biuf":
        return None
    return sampled(array if isinstance(array, Tensor) else
                   torch.from_numpy(np.array(array, np.float64)))


def sampled(values: Tensor | None) -> Tensor | None:
    """Some of the numbers of a tensor, which tell it from others."""
    if values is None:
        return None
    flat = values.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(NUM_SAMPLED, len(flat)), dtype=torch.float64)
    return flat[places.long().to(flat.device)].double().cpu()


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What the first difference between two identities is, in words; empty if there is none."""
    for name in (*now, *(set(then) - set(now))):
        if not _same(then.get(name), now.get(name)):
            return f"its {name} was {then.get(name)!r}, not {now.get(name)!r}" if name[0] == "`" \
                else f"{name} differ{_shown(then.get(name), now.get(name))}"
    return ""


def _shown(then: Any, now: Any) -> str:
    """What there was and what there is, if it can be read in a line; else where they differ."""
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves((then, now))):
        if not isinstance(then, Mapping) or not isinstance(now, Mapping):
            return ""
        return f", first {next(n for n in {**now, **then} if not _same(then.get(n), now.get(n)))!r}"
    words = f", {then} then and {now} now"
    return words if len(words) < LINE else ""


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, Tensor) and isinstance(now, Tensor):
        close = SAME if then.dtype is torch.float32 else FINE
        return then.shape == now.shape and then.dtype is now.dtype and torch.allclose(
            then, now, close, equal_nan=True)
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return then.keys() == now.keys() and all(_same(then[name], now[name]) for name in now)
    if isinstance(then, float) and isinstance(now, float):
        return then == now or math.isclose(then, now, rel_tol=FINE) or then != then != now
    return bool(then == now)
