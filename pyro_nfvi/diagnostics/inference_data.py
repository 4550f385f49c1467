"""Draws as ArviZ data: named dimensions, statistics of the fit, observed data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi.guides.layout import plate_names
from pyro_nfvi.inference import ImportanceSample, LogJoint
from pyro_nfvi.inference.log_joint import is_data, is_deterministic


@torch.no_grad()
def to_inference_data(log_joint: LogJoint, sample: ImportanceSample, chosen: Tensor, *,
                      coords: Mapping[str, Any] | None = None,
                      attrs: Mapping[str, Any] | None = None) -> Any:
    """InferenceData (ArviZ 0.x) or DataTree (1.x) of some of the draws.

    Groups: ``posterior`` (latent and deterministic sites), ``sample_stats`` (``lp``: log joint,
    ``log_q``: log guide density, ``log_weight``: smoothed and normalized), ``observed_data``.
    Plates give dimensions their names.

    Args:
        log_joint: The model and its data.
        sample: The draws.
        chosen: Indices of the draws to take.
        coords: Values along dimensions, by name of the plate.
        attrs: Attributes of the posterior group.

    Raises:
        ValueError: If ``coords`` names no dimension of the model, or is of another length.
    """
    z = sample.z[chosen].to(_device(log_joint))
    values = {**log_joint.layout.constrain(z)[0], **log_joint.deterministic(z)}
    nodes = _shown_nodes(log_joint, z[0])
    observed = {name: _numpy(node["value"]) for name, node in nodes.items()
                if name not in values}
    dims = {name: _dims(name, node) for name, node in nodes.items()}
    _check_coords(coords or {}, nodes, dims)
    stats = {"lp": sample.log_p, "log_q": sample.log_q, "log_weight": sample.log_weights}
    groups = {
        "posterior": {name: _numpy(values[name])[None] for name in nodes if name in values},
        "sample_stats": {name: _numpy(stat[chosen])[None] for name, stat in stats.items()}}
    if observed:
        groups["observed_data"] = observed
    return _arviz.inference_data(groups, dims, _coords(coords or {}, nodes, dims), attrs or {})


def _shown_nodes(log_joint: LogJoint, z: Tensor) -> dict[str, dict[str, Any]]:
    """Latent, deterministic and observed sites of the model, in its order."""
    with log_joint.surroundings():
        nodes = log_joint.trace(z).nodes
    latent = {site.name for site in log_joint.layout}
    return {name: node for name, node in nodes.items() if node["type"] == "sample"
            and (name in latent or is_deterministic(node) or is_data(node))}


def _dims(name: str, node: dict[str, Any]) -> list[str]:
    """Names of the dimensions of a site's value: its plates, then what ArviZ would call them."""
    names = plate_names(node)
    names += (None,) * (node["value"].dim() - len(names))
    return [plate or f"{name}_dim_{dim}" for dim, plate in enumerate(names)]


def _sizes(nodes: Mapping[str, Any], dims: Mapping[str, list[str]]) -> dict[str, int]:
    return {dim: size for name, node in nodes.items()
            for dim, size in zip(dims[name], node["value"].shape, strict=True)}


def _coords(coords: Mapping[str, Any], nodes: Mapping[str, Any], dims: Mapping[str, list[str]]
            ) -> dict[str, Any]:
    return {dim: np.asarray(coords[dim]) if dim in coords else np.arange(size)
            for dim, size in _sizes(nodes, dims).items()}


def _check_coords(coords: Mapping[str, Any], nodes: Mapping[str, Any],
                  dims: Mapping[str, list[str]]) -> None:
    sizes = _sizes(nodes, dims)
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(f"to_arviz expected `coords` to name dimensions of the model "
                             f"({', '.join(sorted(sizes))}), got {dim!r}.")
        if len(values) != sizes[dim]:
            raise ValueError(f"to_arviz expected coords[{dim!r}] of length {sizes[dim]}, "
                             f"got {len(values)}.")


def _device(log_joint: LogJoint) -> torch.device:
    tensors = [value for value in [*log_joint.args, *log_joint.kwargs.values()]
               if torch.is_tensor(value)]
    return tensors[0].device if tensors else torch.device("cpu")


def _numpy(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.detach().cpu().numpy()
    return array
