"""Draws as ArviZ data: every group, named dimensions, statistics of the fit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from pyro_nfvi import _arviz
from pyro_nfvi._shapes import type_name
from pyro_nfvi.guides.layout import plate_names
from pyro_nfvi.inference import LogJoint
from pyro_nfvi.inference.log_joint import is_data, is_deterministic
from pyro_nfvi.inference.predictive import (
    PriorError,
    data_shape,
    latent_names,
    log_likelihood,
    posterior_predictive,
    prior_predictive,
)

GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior",
          "prior_predictive", "observed_data", "constant_data")
RESERVED = ("chain", "draw")  # dimensions that all variables have
MAX_PRIOR = 1000  # draws of the prior
MAX_NUMBERS = 1e8  # in a group of as many numbers as there are draws times observations

Arrays = dict[str, np.ndarray]


@torch.no_grad()
def to_inference_data(log_joint: LogJoint, z: Tensor, stats: Mapping[str, Tensor], *,
                      groups: Sequence[str] = GROUPS, coords: Mapping[str, Any] | None = None,
                      dims: Mapping[str, Sequence[str]] | None = None,
                      attrs: Mapping[str, Any] | None = None) -> Any:
    """InferenceData (ArviZ 0.x) or DataTree (1.x) of chains of draws.

    Plates give dimensions their names. A group that cannot be had is left out, and the attribute
    ``left_out`` of the posterior says why: an improper prior has no draws, a minibatch is not
    the data.

    Args:
        log_joint: The model and its data.
        z: Draws ``(num_chains, num_draws, D)`` of the flat latent.
        stats: Statistics ``(num_chains, num_draws)`` of the draws.
        groups: Names of the groups to make, the posterior among them.
        coords: Values along dimensions, by name.
        dims: Names of the rightmost dimensions of a site or of an argument of the model.
        attrs: Attributes of the posterior.

    Raises:
        ValueError: If ``groups``, ``coords`` or ``dims`` do not fit the model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nfvi.guides import LatentLayout
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> layout = LatentLayout.from_trace(pyro.poutine.trace(model).get_trace())
        >>> data = to_inference_data(LogJoint(model, (), {}, layout), torch.randn(2, 50, 1), {},
        ...                          groups=("posterior",))
        >>> data.posterior["scale"].shape, bool((data.posterior["scale"] > 0).all())
        ((2, 50), True)
    """
    _check_groups(groups)
    _check_mappings(coords=coords, dims=dims)
    converter = _Converter(log_joint, z.to(_device(log_joint)), stats)
    names = converter.dims(dims or {})
    made = converter.made(groups)
    sizes = converter.sizes(made, names)
    _check_coords(coords or {}, sizes)
    index = {dim: np.asarray((coords or {}).get(dim, np.arange(size)))
             for dim, size in sizes.items()}
    return _arviz.inference_data(made, names, index,
                                 {**(attrs or {}), **_notes(converter.left_out)})


def _notes(left_out: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """An attribute that says what is not there, and a warning if data are not."""
    notes = {why: f"{', '.join(groups)}: {why}" for why, groups in left_out.items()}
    if of_data := [note for why, note in notes.items() if left_out[why] != ["prior"]]:
        warnings.warn(f"to_arviz leaves out {'; '.join(of_data)}.", stacklevel=4)
    return {"left_out": "; ".join(notes.values())} if notes else {}


class _Converter:
    """Makes the groups of one set of draws."""

    def __init__(self, log_joint: LogJoint, z: Tensor, stats: Mapping[str, Tensor]) -> None:
        self.log_joint, self.stats = log_joint, stats
        self.shape, self.z = z.shape[:2], z.reshape(-1, z.shape[-1])
        with log_joint.surroundings():
            nodes = log_joint.trace(self.z[0]).nodes
        latent = latent_names(log_joint)
        self.nodes = {name: _widened(node) for name, node in nodes.items()
                      if node["type"] == "sample"
                      and (name in latent or is_deterministic(node) or is_data(node))}
        self.observed = [name for name, node in self.nodes.items()
                         if name not in latent and is_data(node)]
        constants = _constants(log_joint, [nodes[name]["value"] for name in self.observed])
        self.constants = {name: array for name, array in constants.items()
                          if name not in self.nodes}
        self.left_out: dict[str, list[str]] = {}  # groups by why they are

    def made(self, names: Sequence[str]) -> dict[str, Arrays]:
        """The groups of these names that have something in them."""
        groups = {name: getattr(self, name)() for name in GROUPS if name in names
                  and name not in ("prior", "prior_predictive")}
        if {"prior", "prior_predictive"} & set(names):
            both = self._both_priors()
            groups.update({name: both[name] for name in names if name in both})
        return {name: groups[name] for name in GROUPS if groups.get(name)}

    def dims(self, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Names of the dimensions of every site and argument."""
        shapes = self._shapes()
        plates = {name: _plates(node) for name, node in self.nodes.items()}
        _check_dims(given, shapes)
        names = {name: _named(name, len(shape), plates.get(name, ()), given.get(name, ()),
                              set(shapes)) for name, shape in shapes.items()}
        _check_sizes(names, shapes)
        return names

    def sizes(self, made: Mapping[str, Arrays], dims: Mapping[str, list[str]]) -> dict[str, int]:
        """Size of every dimension of what is in the groups."""
        shown = {name for content in made.values() for name in content}
        return {dim: size for name, shape in self._shapes().items() if name in shown
                for dim, size in zip(dims[name], shape, strict=True)}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(node["value"].shape) for name, node in self.nodes.items()}
        return {**shapes, **{name: array.shape for name, array in self.constants.items()}}

    # ------------------------------------------------------------------ groups

    def posterior(self) -> Arrays:
        """Latent and deterministic sites."""
        values = {**self.log_joint.layout.constrain(self.z)[0],
                  **self.log_joint.deterministic(self.z)}
        return self._chains({name: values[name] for name in self.nodes if name in values})

    def posterior_predictive(self) -> Arrays:
        """Data simulated at each draw."""
        there = self._has_data("posterior_predictive", len(self.z))
        return self._chains(posterior_predictive(self.log_joint, self.z)) if there else {}

    def log_likelihood(self) -> Arrays:
        """Log-likelihood of each observation, at each draw."""
        there = self._has_data("log_likelihood", len(self.z))
        return self._chains(log_likelihood(self.log_joint, self.z)) if there else {}

    def sample_stats(self) -> Arrays:
        """Statistics of the draws."""
        return {name: _arviz.as_array(stat) for name, stat in self.stats.items()}

    def observed_data(self) -> Arrays:
        """What was observed."""
        names = self.observed if self._has_data("observed_data", 1) else []
        return {name: _arviz.as_array(self.nodes[name]["value"]) for name in names}

    def constant_data(self) -> Arrays:
        """Arguments of the model that it does not observe."""
        return self.constants

    def _both_priors(self) -> dict[str, Arrays]:
        """Draws of the prior: of latents, and of data."""
        number = min(len(self.z), MAX_PRIOR)
        try:
            values = prior_predictive(self.log_joint, number)
        except PriorError as error:
            self.left_out[f"the prior cannot be drawn from ({error})"] = ["prior"]
            return {}
        arrays = {name: _arviz.as_array(value)[None] for name, value in values.items()}
        data = {name: arrays.pop(name) for name in self.observed if name in arrays}
        return {"prior": arrays,
                "prior_predictive": data if self._has_data("prior_predictive", number) else {}}

    def _has_data(self, group: str, num_draws: int) -> bool:
        """Whether there are data for a group; if not for all of them, that is noted."""
        why = ""
        count = num_draws * sum(self.nodes[name]["value"].numel() for name in self.observed)
        if self.observed and self.log_joint.subsamples(self.z[0]):
            why = "the model draws minibatches, which are not the data"
        elif count > MAX_NUMBERS:
            why = f"they would hold {count:.0e} numbers each; ask for fewer draws (num_samples)"
        if why:
            self.left_out.setdefault(why, []).append(group)
        return bool(self.observed) and not why

    def _chains(self, values: Mapping[str, Tensor]) -> Arrays:
        return {name: _arviz.as_array(value).reshape(*self.shape, *value.shape[1:])
                for name, value in values.items()}


def _widened(node: dict[str, Any]) -> dict[str, Any]:
    """A site whose value is as wide as its distribution, with which it broadcasts."""
    if is_deterministic(node):
        return node
    return {**node, "value": node["value"].expand(data_shape(node["fn"], node["value"]))}


# ---------------------------------------------------------------------- constants

def _constants(log_joint: LogJoint, observed: Sequence[Tensor]) -> Arrays:
    """Numbers among the model's arguments, by name, that are not what it observes."""
    return {name: _arviz.as_array(value)
            for name, value in _arguments(log_joint).items()
            if _numeric(value) and not any(_same(value, other) for other in observed)}


def _arguments(log_joint: LogJoint) -> dict[str, Any]:
    """The model's arguments by name, those of ``*args`` and ``**kwargs`` one by one."""
    model, args, kwargs = log_joint.given
    try:
        signature = inspect.signature(model.forward if isinstance(model, Module) else model)
        bound = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a callable that hides its arguments
        return dict(kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}_{i}": item for i, item in enumerate(value)})
        else:
            arguments.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return arguments


def _numeric(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return torch.is_tensor(value) or isinstance(value, (bool, int, float))


def _same(value: Any, observed: Tensor) -> bool:
    if not torch.is_tensor(value) and not isinstance(value, np.ndarray):
        return False
    array = _arviz.as_array(torch.as_tensor(value))
    return np.array_equal(array, _arviz.as_array(observed), equal_nan=array.dtype.kind in "fc")


# ---------------------------------------------------------------------- dimensions

def _plates(node: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Name of the plate of each dimension, also of a deterministic site that fills its plates.

    Pyro takes such a site as one event unless told otherwise (``event_dim``).
    """
    names, shape = plate_names(dict(node)), node["value"].shape
    if names or not is_deterministic(dict(node)):
        return names
    frames = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
    filled = [frames[dim].name for dim in range(-len(shape), 0)
              if dim in frames and frames[dim].size == shape[dim]]
    return tuple(filled) if len(filled) == len(shape) else ()


def _named(name: str, count: int, plates: Sequence[str | None], given: Sequence[str],
           variables: set[str]) -> list[str]:
    """Names of one variable's dimensions: its plates, what the user says, what ArviZ would."""
    names = [plates[dim] if dim < len(plates) else None for dim in range(count)]
    names[count - len(given):] = given
    return [_unlike(dim, variables) if dim else f"{name}_dim_{place}"
            for place, dim in enumerate(names)]


def _unlike(dim: str, variables: set[str]) -> str:
    """A dimension's name; one that a variable has already is no name for both."""
    return f"{dim}_dim" if dim in variables or dim in RESERVED else dim


def _check_groups(groups: Sequence[str]) -> None:
    if not isinstance(groups, Iterable) or isinstance(groups, str) or (
            not {"posterior"} <= set(groups) <= set(GROUPS)):
        raise ValueError(f"to_arviz expected `groups` to be some of {', '.join(GROUPS)}, with "
                         f"posterior among them, got {groups!r}.")


def _check_dims(given: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, names in given.items():
        if name not in shapes:
            raise ValueError(f"to_arviz expected `dims` to name sites or arguments of the model "
                             f"({', '.join(sorted(shapes))}), got {name!r}.")
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or len(names) > len(shapes[name]):
            raise ValueError(f"to_arviz expected dims[{name!r}] to be a list of at most "
                             f"{len(shapes[name])} names, got {names!r}.")


def _check_sizes(names: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
                 ) -> None:
    """Whether each name stands for one dimension of a variable, and for one size."""
    sizes: dict[str, int] = {}
    for name, dims in names.items():
        if len(set(dims)) < len(dims):
            raise ValueError(f"to_arviz expected dims[{name!r}] to differ from one another, got "
                             f"{list(dims)}. Rename one.")
        for dim, size in zip(dims, shapes[name], strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"to_arviz expected `dims` to give one name to dimensions of one "
                                 f"size, got {dim!r} for {sizes[dim]} and, at {name!r}, for "
                                 f"{size}. Rename one.")


def _check_mappings(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"to_arviz expected `{name}` to be a dict, got {type_name(value)}.")


def _check_coords(coords: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(f"to_arviz expected `coords` to name dimensions of the model "
                             f"({', '.join(sorted(sizes))}), got {dim!r}.")
        if np.shape(values)[:1] != (sizes[dim],):
            got = len(values) if np.ndim(values) else repr(values)
            raise ValueError(f"to_arviz expected coords[{dim!r}] of length {sizes[dim]}, "
                             f"got {got}.")


def _device(log_joint: LogJoint) -> torch.device:
    tensors = [value for value in [*log_joint.args, *log_joint.kwargs.values()]
               if torch.is_tensor(value)]
    return tensors[0].device if tensors else torch.device("cpu")
