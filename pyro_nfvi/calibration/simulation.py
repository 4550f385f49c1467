"""Simulated data: prior draws, the data they give, and the model with those data in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_nfvi._shapes import type_name
from pyro_nfvi.guides.layout import plate_names
from pyro_nfvi.guides.prototype import is_subsampled, quiet_trace
from pyro_nfvi.inference.log_joint import is_deterministic
from pyro_nfvi.inference.predictive import unobserved

OWNER = "calibrate"
Values = dict[str, Tensor]


class Simulator:
    """Draws latents from the prior of a model, and data from what the model says of them.

    Args:
        model: The Pyro model.
        args: Its positional arguments: those that are data matter by their shape alone.
        kwargs: Its keyword arguments, likewise.
        args_fn: Function from data by site to the positional arguments. Default: arguments that
            share memory with an observed value, or equal it, are replaced.

    Attributes:
        latents: Names of the latent sites with the names of their dimensions' plates.
        observed: Names of the sites that are simulated.
        in_place: Whether all of them have their place among the arguments.

    Raises:
        ValueError: If the model has no latent site, observes nothing, draws minibatches, or says
            something of its latents or data that prior draws do not obey.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: dict,
                 args_fn: Callable[[Values], tuple] | None = None) -> None:
        self.model, self.args, self.kwargs, self.args_fn = model, args, kwargs, args_fn
        trace = _checked_trace(model, args, kwargs)
        self.has_params = any(node["type"] == "param" for node in trace.nodes.values())
        self.latents = {name: plate_names(node) for name, node in trace.iter_stochastic_nodes()
                        if not site_is_subsample(node)}
        self.observed = tuple(name for name, node in trace.nodes.items() if is_outcome(node))
        self._places = _places(tree_flatten((args, kwargs))[0],
                               {name: trace.nodes[name]["value"] for name in self.observed})
        self.in_place = args_fn is not None or set(self._places) == set(self.observed)

    @torch.no_grad()
    def draw(self) -> tuple[Values, Values]:
        """One draw of the latents, and data: values by site.

        Raises:
            ValueError: If a value is not finite.
        """
        trace = poutine.block(poutine.trace(unobserved(self.model)).get_trace)(
            *self.args, **self.kwargs)
        values = {name: trace.nodes[name]["value"] for name in (*self.latents, *self.observed)}
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"the model simulated {name!r} with a value that is not finite")
        return ({name: values[name] for name in self.latents},
                {name: values[name] for name in self.observed})

    def arguments(self, data: Mapping[str, Tensor]) -> tuple[tuple, dict]:
        """The model's arguments with these data in place of those they were made for."""
        if self.args_fn is not None:
            args = self.args_fn(dict(data))
            if not isinstance(args, tuple):
                raise ValueError(f"{OWNER} expected `args_fn` to return a tuple, the model's "
                                 f"positional arguments, got {type_name(args)}.")
            return args, self.kwargs
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for name, (leaf, view) in self._places.items():
            leaves[leaf] = _replaced(leaves[leaf], view, data[name])
        args, kwargs = tree_unflatten(leaves, structure)
        return args, kwargs


class SimulatedModel:
    """A model that observes simulated data, whatever its arguments say.

    Args:
        model: The Pyro model.
        data: Values by observed site.
    """

    def __init__(self, model: Callable, data: Mapping[str, Tensor]) -> None:
        self.model, self.data = model, dict(data)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with _Observe(self.data):
            return self.model(*args, **kwargs)


class _Observe(Messenger):
    """As Pyro's condition, with values that follow the dtype and device of those they replace."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.data = data

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.data:
            old, value = msg["value"], self.data[msg["name"]]
            msg["value"] = value.to(old) if isinstance(old, Tensor) else value
            msg["is_observed"] = True


def is_outcome(node: dict[str, Any]) -> bool:
    """Whether a node of a trace is data, of whatever kind: not what follows from latents."""
    return (node["type"] == "sample" and node["is_observed"] and not is_deterministic(node)
            and not site_is_subsample(node) and not site_is_factor(node))


# ------------------------------------------------------------------ what can be simulated

def _checked_trace(model: Callable, args: tuple, kwargs: dict) -> Trace:
    """Trace of the model with its data."""
    if not callable(model):
        raise ValueError(f"{OWNER} expected `model` to be a Pyro model, a function, got "
                         f"{type_name(model)}.")
    store = pyro.get_param_store()
    try:
        with store.scope(store.get_state()):
            trace = quiet_trace(model, args, kwargs)
    except NotImplementedError as error:
        raise ValueError(f"{OWNER} cannot draw from the prior of this model: "
                         f"{str(error).splitlines()[0]}. Give every latent site a proper prior."
                         ) from error
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
    for node in nodes:
        _check_node(node)
    if not any(is_outcome(node) for node in nodes):
        raise ValueError(f"{OWNER} expected a model that observes data, got one without. Pass data "
                         "of the right shape as the model's arguments; what they are does not "
                         "matter.")
    if all(node["is_observed"] or site_is_subsample(node) for node in nodes):
        raise ValueError(f"{OWNER} found no latent site in the model: every pyro.sample is "
                         "observed.")
    return trace


def _check_node(node: dict[str, Any]) -> None:
    """Refuse a statement that prior draws and simulated data do not obey."""
    name = node["name"]
    for frame in node["cond_indep_stack"]:
        if is_subsampled(frame):
            raise ValueError(f"{OWNER} simulates whole data sets; {name!r} is in plate "
                             f"{frame.name!r}, which draws {frame.size} of {frame.full_size}. Use "
                             "the full plate: no subsample_size, no subsample.")
    if site_is_factor(node):
        raise ValueError(f"{OWNER} simulates from the model's distributions; {name!r} is a "
                         "pyro.factor, which simulations do not obey. Write it as a distribution "
                         "of a latent or observed site.")
    if is_deterministic(node) or site_is_subsample(node):
        return
    if bool((torch.as_tensor(node["scale"]) != 1).any()):
        raise ValueError(f"{OWNER} simulates from the model's distributions; {name!r} is scaled by "
                         f"{node['scale']}, which simulations do not obey. Take poutine.scale "
                         "away.")
    masked = node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all())
    if masked and not node["is_observed"]:
        raise ValueError(f"{OWNER} draws latents from their priors; {name!r} has its prior masked "
                         "out. Take poutine.mask away.")


# ------------------------------------------------------------------ data among the arguments

def _places(leaves: list[Any], values: Mapping[str, Any]) -> dict[str, tuple[int, Any]]:
    """Which argument holds each observed value: its number, and where in its memory.

    An argument that is the value, or that the value is a view of, or else the only one that
    equals it, element by element.
    """
    found: dict[str, tuple[int, Any]] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        shared = [k for k, leaf in enumerate(leaves) if _holds(leaf, value)]
        equal = [k for k, leaf in enumerate(leaves) if _equals(leaf, value)]
        if shared:
            view = value.storage_offset(), tuple(value.shape), value.stride()
            found[name] = shared[0], view
        elif len(equal) == 1:
            found[name] = equal[0], None
    return found


def _holds(leaf: Any, value: Tensor) -> bool:
    """Whether a value is all or part of an argument, in the same memory."""
    if not isinstance(leaf, Tensor) or leaf.dtype != value.dtype or not value.numel() or \
            leaf.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return False
    if 0 in value.stride():  # one number shown at many places
        return False
    if leaf.is_set_to(value):
        return True
    inside = _elements(value)
    return bool(torch.isin(inside, _elements(leaf)).all())


def _elements(value: Tensor) -> Tensor:
    """Where in its memory each element of a tensor is."""
    places = torch.tensor(value.storage_offset())
    for size, stride in zip(value.shape, value.stride(), strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size)
    return places.flatten()


def _equals(leaf: Any, value: Tensor) -> bool:
    """Whether an argument has the same elements, which are not all the same number."""
    if not isinstance(leaf, (Tensor, np.ndarray)) or tuple(leaf.shape) != tuple(value.shape):
        return False
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biuf":
        return False
    same = torch.as_tensor(leaf.copy() if isinstance(leaf, np.ndarray) else leaf).to(value)
    return torch.equal(same, value) and bool((value != value.flatten()[0]).any())


def _replaced(leaf: Any, view: Any, data: Tensor) -> Any:
    """A copy of an argument with data in place."""
    if isinstance(leaf, np.ndarray):
        return data.cpu().numpy().astype(leaf.dtype)
    if view is None:
        return data.to(leaf)
    storage = leaf.detach().untyped_storage().clone()
    whole, part = (torch.empty(0, dtype=leaf.dtype, device=leaf.device) for _ in range(2))
    whole.set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())
    part.set_(storage, *view)
    part.copy_(data)
    return whole
