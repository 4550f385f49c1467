"""Fits in files: tensors, numbers and names, never code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_nfvi import flows, guides
from pyro_nfvi._files import read_file, write_file
from pyro_nfvi._shapes import type_name
from pyro_nfvi.engine import Engine
from pyro_nfvi.flows import (
    Compose,
    Diagonal,
    FixedLinear,
    FixedLowRank,
    Flow,
    Gaussian,
    LowRank,
    MixtureOfFlows,
    MultivariateStudentT,
    StudentT,
    Triangular,
)
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference import History, LogJoint, Stage
from pyro_nfvi.inference.log_joint import default_dtype

FORMAT = "pyro_nfvi posterior"
VERSION = 2
PARTS = {"version", "guide", "flow", "state", "args", "kwargs", "dtype", "history", "model_params"}
PLAIN = (bool, int, float, str, type(None))


def write(path: str | PathLike, guide: AutoFlow, log_joint: LogJoint, history: History) -> None:
    """Write a fit to ``path``.

    Raises:
        ValueError: If an argument of the model is of a kind that a file cannot hold.
    """
    origin = guide._flow().base.zeros
    content = {
        "format": FORMAT, "version": VERSION,
        "guide": _guide_config(guide), "flow": _flow_config(guide._flow()),
        "state": dict(guide.state_dict()),
        "args": _encoded(log_joint.args), "kwargs": _encoded(log_joint.kwargs),
        "dtype": log_joint.dtype, "history": asdict(history),
        "model_params": {k: v.detach() for k, v in log_joint.parameters(origin).items()}}
    write_file(path, content)


def read(path: str | PathLike, model: Callable, guide: AutoFlow | None
         ) -> tuple[AutoFlow, LogJoint, History]:
    """Read what :func:`write` wrote.

    Raises:
        ValueError: If the file is damaged, foreign or newer, or the guide does not fit it.
    """
    if guide is not None and not isinstance(guide, AutoFlow):
        raise ValueError(f"Posterior.load expected `guide` to be an AutoFlow such as AutoIAF(model)"
                         f", got {guide!r}.")
    content = read_file(path, "Posterior", FORMAT, VERSION, PARTS)
    args, kwargs = tuple(_decoded(content["args"])), _decoded(content["kwargs"])
    guide = _built_guide(content["guide"], model) if guide is None else guide
    with default_dtype(content["dtype"]):
        guide.setup(*args, **kwargs)
    _load_state(guide, content["flow"], content["state"], path)
    log_joint = LogJoint(model, args, kwargs, guide.layout, content["dtype"])
    z = guide._flow().rsample_and_log_prob((2,))[0].detach()
    log_joint.try_batched(z)
    _load_model_params(log_joint, content["model_params"], z[0])
    return guide, log_joint, _history(content["history"])


def _history(content: dict[str, Any]) -> History:
    engines = [Engine(**engine) for engine in content.pop("engines")]
    stages = [Stage(**stage) for stage in content.pop("stages")]
    return History(**content, engines=engines, stages=stages)


def _load_state(guide: AutoFlow, config: dict[str, Any], state: dict[str, Any],
                path: str | PathLike) -> None:
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    try:
        _fit_frame(guide, config)
        guide.to(dtype=dtypes.pop() if len(dtypes) == 1 else None)
        guide.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"Posterior.load: the guide does not fit {str(path)!r}: {error}") from None


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


def _flow_config(flow: Flow) -> dict[str, Any]:
    """What a fit has put around the guide's own flow: its affine map, a frame, other noise."""
    _, affine, *frame = flow.bijection.layers
    return {"affine": _module_config(affine), "frame": [_module_config(f) for f in frame],
            "base": _module_config(flow.base)}


def _module_config(module: nn.Module) -> dict[str, Any] | None:
    """Class and sizes of a map or noise that a fit chose; None for one of the user's."""
    dim, kind = module.input_dim, type(module)
    if kind is MixtureOfFlows:
        flows = [(_module_config(f.bijection), _module_config(f.base)) for f in module.flows]
        if any(part is None for pair in flows for part in pair):
            return None
        sizes: list[Any] = [[list(pair) for pair in flows]]
    elif kind in (FixedLowRank, LowRank):
        sizes = [dim, (module.stretch if kind is FixedLowRank else module.loadings.value).shape[-1]]
    elif kind in (Diagonal, Triangular, FixedLinear, Gaussian, MultivariateStudentT) or (
            kind is StudentT and not any(True for _ in module.parameters())):
        sizes = [dim]
    else:
        return None
    return {"class": kind.__name__, "sizes": sizes}


def _module(config: dict[str, Any]) -> Any:
    """A module of that class and those sizes, whose numbers are still to be loaded."""
    name, sizes = config["class"], config["sizes"]
    if name == "MixtureOfFlows":
        parts = [Flow(_module(bijection), _module(base)) for bijection, base in sizes[0]]
        return MixtureOfFlows(parts, [1.0] * len(parts))
    dim = sizes[0]
    if name == "FixedLinear":
        return FixedLinear(torch.zeros(dim), torch.eye(dim))
    if name == "FixedLowRank":
        return FixedLowRank(torch.zeros(dim), torch.ones(dim), torch.zeros(dim, sizes[1]),
                            torch.zeros(sizes[1]))
    if name == "StudentT":
        return StudentT(dim, [5.0] * dim)
    return _public(flows, name)(dim, **({"rank": sizes[1]} if name == "LowRank" else {}))


def _fit_frame(guide: AutoFlow, config: dict[str, Any]) -> None:
    """Put the same map, frame and noise around the guide's own flow as in the file."""
    flow = guide._flow()
    inner, affine, *_ = flow.bijection.layers
    affine = affine if config["affine"] is None else _module(config["affine"])
    base = flow.base if config["base"] is None else _module(config["base"])
    layers = [inner, affine, *(_module(frame) for frame in config["frame"])]
    guide.flow = Flow(Compose(layers), base)


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
    parts = {name: partial(_public(flows, config[name]["name"]), **config[name]["options"])
             for name in ("recipe", "base", "affine")}
    built: AutoFlow = _public(guides, config["class"])(model, parts.pop("recipe"), **parts)
    return built


def _public(module: Any, name: str) -> Any:
    if name not in module.__all__:
        raise ValueError(f"Posterior.load knows no {name!r}: the file is damaged or foreign.")
    return getattr(module, name)


# ---------------------------------------------------------------------- model arguments

def _encoded(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in PLAIN or isinstance(value, (torch.Tensor, torch.Size)):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"numpy": torch.from_numpy(value.copy())}
    if type(value) in (list, tuple):
        return {type_name(value): [_encoded(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(item) for key, item in value.items()}}
    raise ValueError("Posterior.save expected model arguments of tensors, arrays, numbers, "
                     f"strings, lists and dicts, got {type_name(value)}. Pass the model its parts.")


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
