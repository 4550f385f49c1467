"""What a fit has built around a guide's flow, as names and sizes, and building it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyro_nfvi import flows
from pyro_nfvi._shapes import type_name
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
from pyro_nfvi.guides.auto_flow import AutoFlow


def flow_state(guide: AutoFlow) -> dict[str, Any]:
    """The guide's flow as tensors, numbers and names."""
    return {"flow": flow_config(guide._flow()), "state": dict(guide.state_dict())}


def load_flow_state(guide: AutoFlow, content: Mapping[str, Any]) -> None:
    """Build the flow of :func:`flow_state` in a guide that is set up, and load its numbers.

    Raises:
        ValueError: If the guide's own flow or noise is of another kind or size.
    """
    state = content["state"]
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    like = guide._flow().base.zeros
    try:
        fit_frame(guide, content["flow"])
        guide.to(dtype=dtypes.pop() if len(dtypes) == 1 else None, device=like.device)
        guide.load_state_dict(state)
    except (RuntimeError, ValueError):
        if difference := first_difference(guide.state_dict(), state):
            raise ValueError(f"{type_name(guide)} is not the guide that was fitted: {difference}. "
                             "Build it as that one.") from None
        raise


def first_difference(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The first parameter that is in one alone, or of other sizes; else an empty string."""
    for name in {**saved, **own}:
        then, now = (f"of shape {list(state[name].shape)}" if name in state else "not there"
                     for state in (saved, own))
        if then != now:
            return f"{name!r} was {then}, now it is {now}"
    return ""


def flow_config(flow: Flow) -> dict[str, Any]:
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
    return known(flows, name)(dim, **({"rank": sizes[1]} if name == "LowRank" else {}))


def fit_frame(guide: AutoFlow, config: dict[str, Any]) -> None:
    """Put the same map, frame and noise around the guide's own flow as in the file."""
    flow = guide._flow()
    inner, affine, *_ = flow.bijection.layers
    affine = affine if config["affine"] is None else _module(config["affine"])
    base = flow.base if config["base"] is None else _module(config["base"])
    layers = [inner, affine, *(_module(frame) for frame in config["frame"])]
    guide.flow = Flow(Compose(layers), base)


def known(module: Any, name: str) -> Any:
    """What a package calls by this name.

    Raises:
        ValueError: If it knows none.
    """
    if name not in module.__all__:
        raise ValueError(f"Posterior.load knows no {name!r}: the file is damaged or foreign.")
    return getattr(module, name)
