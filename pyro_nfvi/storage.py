"""Fits in files: tensors, numbers and names, never code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch

from pyro_nfvi import flows, guides
from pyro_nfvi._files import read_file, write_file
from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import type_name
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.guides.flow_state import first_difference, flow_state, known, load_flow_state
from pyro_nfvi.inference import History, LogJoint
from pyro_nfvi.inference.all_data import AllData
from pyro_nfvi.inference.identity import difference, of_model
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import default_dtype

FORMAT = "pyro_nfvi posterior"
VERSION = 3
PARTS = {"version", "guide", "flow", "state", "args", "kwargs", "dtype", "history", "model_params"}
PLAIN = (bool, int, float, str, type(None))


def write(path: str | PathLike, guide: AutoFlow, log_joint: LogJoint, history: History) -> None:
    """Write a fit to ``path``.

    Raises:
        ValueError: If an argument of the model is of a kind that a file cannot hold.
    """
    origin = guide._flow().base.zeros
    _, args, kwargs = log_joint.given
    model = of_model(log_joint, origin)
    content = {
        "format": FORMAT, "version": VERSION,
        "guide": _guide_config(guide), **flow_state(guide),
        "data": model["the data"], "densities": model["the densities of the sites"],
        "args": _encoded(args), "kwargs": _encoded(kwargs), "num_rows": log_joint.num_rows,
        "dtype": log_joint.dtype, "history": asdict(history),
        "model_params": {k: v.detach() for k, v in log_joint.parameters(origin).items()}}
    write_file(path, content)


@forked_rng()
def read(path: str | PathLike, model: Callable, guide: AutoFlow | None,
         loader: Iterable | None = None) -> tuple[AutoFlow, LogJoint, History]:
    """Read what :func:`write` wrote; the random state stays as it is.

    Raises:
        ValueError: If the file is damaged, foreign or newer, or the guide or the loader does not
            fit it.
    """
    content = read_file(path, "Posterior", FORMAT, VERSION, PARTS)
    args, kwargs = tuple(_decoded(content["args"])), _decoded(content["kwargs"])
    built = guide is None
    guide = _built_guide(content["guide"], model) if guide is None else guide
    feed = _feed(content, loader)
    batch = (args, kwargs) if feed is None else feed.arguments(args, kwargs)
    with default_dtype(content["dtype"]):
        guide.setup(*batch[0], **batch[1])
        log_joint = LogJoint(model, args, kwargs, guide.layout, content["dtype"]) \
            if feed is None else AllData(model, args, kwargs, guide.layout, feed, content["dtype"])
    _load_state(guide, content, path, built)
    z = guide._flow().rsample_and_log_prob((2,))[0].detach()
    log_joint.try_batched(z)
    _load_model_params(log_joint, content["model_params"], z[0])
    _compare(log_joint, content, guide._flow().base.zeros)
    return guide, log_joint, History.of(content["history"])


def _compare(log_joint: LogJoint, content: dict[str, Any], origin: torch.Tensor) -> None:
    """Warn of another model or other data than those of the fit, as far as the file tells."""
    if "densities" not in content:
        return
    then = {"the data": content["data"], "the densities of the sites": content["densities"]}
    now = of_model(log_joint, origin)
    if log_joint.num_rows is not None:  # which rows a loader is asked for follows its batches
        names = [site.name for site in log_joint.layout]
        then, now = ({"the densities of the sites": {
            name: model["the densities of the sites"][name] for name in names}}
            for model in (then, now))
    if what := difference(then, now):
        warnings.warn(f"Posterior.load: this is another model than the one that was fitted, or "
                      f"other data: {what}. Weights and verdict are those of the old guide for "
                      "it.", stacklevel=5)


def _feed(content: dict[str, Any], loader: Iterable | None) -> LoaderFeed | None:
    """The minibatches that the fit was to, if it was."""
    num_rows = content.get("num_rows")
    if (num_rows is None) != (loader is None):
        wanted = "to be None, as the fit was to all data at once" if num_rows is None else \
            f"with the {num_rows} rows that were fitted"
        raise ValueError(f"Posterior.load expected `loader` {wanted}, got {type_name(loader)}.")
    if loader is None:
        return None
    return LoaderFeed(loader, dtype=content["dtype"])


def _load_state(guide: AutoFlow, content: dict[str, Any], path: str | PathLike, built: bool
                ) -> None:
    try:
        load_flow_state(guide, content)
    except (RuntimeError, ValueError) as error:
        what, way_out = ("model", "Pass the model that was fitted") if built else (
            "guide", "Leave `guide` out, or build it as the one that was fitted")
        part = first_difference(guide.state_dict(), content["state"]) or error
        raise ValueError(f"Posterior.load: the {what} does not fit {str(path)!r}: {part}. "
                         f"{way_out}.") from None


@torch.no_grad()
def _load_model_params(log_joint: LogJoint, saved: dict[str, Any], z: torch.Tensor) -> None:
    for name, parameter in log_joint.parameters(z).items():
        parameter.copy_(saved[name])


# ---------------------------------------------------------------------- guides by name

def _guide_config(guide: AutoFlow) -> dict[str, Any] | None:
    """How to build this guide again, or None if it takes code from elsewhere."""
    parts = {"recipe": guide.recipe, "base": guide._base_recipe, "affine": guide._affine_recipe}
    config = {name: _function_config(function) for name, function in parts.items()}
    known = getattr(guides, type(guide).__name__, None) is type(guide)
    if not known or any(part is None for part in config.values()):
        return None
    return {"class": type(guide).__name__, **config}


def _function_config(function: Callable) -> dict[str, Any] | None:
    options: dict[str, Any] = {}
    while isinstance(function, partial):
        if function.args:
            return None
        options = {**function.keywords, **options}
        function = function.func
    name = getattr(function, "__name__", "")
    plain = all(isinstance(v, PLAIN) or (isinstance(v, (tuple, list)) and all(
        isinstance(item, PLAIN) for item in v)) for v in options.values())
    known = getattr(flows, name, None) is function
    return {"name": name, "options": options} if known and plain else None


def _built_guide(config: dict[str, Any] | None, model: Callable) -> AutoFlow:
    if config is None:
        raise ValueError("Posterior.load cannot build this fit's guide from its name, because its "
                         "recipe is your own. Pass it: Posterior.load(path, model, guide=...).")
    parts = {name: partial(known(flows, config[name]["name"]), **config[name]["options"])
             for name in ("recipe", "base", "affine")}
    built: AutoFlow = known(guides, config["class"])(model, parts.pop("recipe"), **parts)
    return built


# ---------------------------------------------------------------------- model arguments

def _encoded(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in PLAIN or isinstance(value, (torch.Tensor, torch.Size)):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        with suppress(TypeError):  # no tensor has the type: longdouble
            return {"numpy": torch.from_numpy(value.astype(value.dtype.newbyteorder("="), "C"))}
    if type(value) in (list, tuple):
        return {type_name(value): [_encoded(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {str.__str__(key): _encoded(item) for key, item in value.items()}}
    raise ValueError("Posterior.save expected model arguments of tensors, arrays, numbers, "
                     f"strings, lists and dicts, got {_refused(value)}.")


def _refused(value: Any) -> str:
    """What no file holds, and what to pass instead."""
    name = type_name(value)
    if isinstance(value, dict):
        key = next(key for key in value if not isinstance(key, str))
        return f"{name} with a key of {type_name(key)}. Give it keys that are strings"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{name} of {value.dtype}. Pass it in float64, as a tensor or as a list"
    return f"{name}. Pass the model its parts"


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "numpy":
        return content.numpy()
    if kind == "dict":
        return {key: _decoded(item) for key, item in content.items()}
    items = [_decoded(item) for item in content]
    return tuple(items) if kind == "tuple" else items
