"""What a model says of its data: log likelihoods, and data simulated from draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import Independent
from torch.utils._pytree import tree_map

from pyro_nfvi._random import map_random_or_loop, one_by_one
from pyro_nfvi.inference.log_joint import LogJoint, is_data, is_deterministic

CHUNK = 500  # draws that the model is run for at a time

Values = dict[str, Tensor]


class Unobserve(UnconditionMessenger):
    """As Pyro's ``uncondition``, but deterministic sites keep their values, and data their shape.

    Deterministic sites drawn from their distribution would be of another shape inside a plate, and
    so would data that a model observes as a vector of one scalar distribution.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if is_deterministic(msg):
            return
        if msg["is_observed"]:
            msg["fn"] = _as_wide(msg["fn"], msg["value"])
        super()._pyro_sample(msg)


def _as_wide(distribution: Any, value: Any) -> Any:
    """A distribution with the batch shape that it has when it observes this value."""
    batch = data_shape(distribution, value)
    batch = batch[:len(batch) - distribution.event_dim]
    return distribution if batch == distribution.batch_shape else distribution.expand(batch)


def data_shape(distribution: Any, value: Any) -> torch.Size:
    """Shape of observations, where they and the batch of their distribution broadcast."""
    shape = torch.as_tensor(value).shape
    split = len(shape) - distribution.event_dim
    return torch.broadcast_shapes(distribution.batch_shape, shape[:split]) + shape[split:]


class PriorError(ValueError):
    """A prior that cannot be drawn from."""


@torch.no_grad()
def log_likelihood(log_joint: LogJoint, z: Tensor) -> Values:
    """Log-likelihood ``(n, *batch_shape)`` of each observation, by observed site.

    It is that of the site's distribution: a ``poutine.scale`` does not enter, and where a mask
    hides an observation it is zero. An event is one observation; where one event is all of the
    data, without a plate, and its elements are independent (``to_event``), each element is one.

    Args:
        log_joint: The model and its data.
        z: Draws ``(n, D)``.
    """
    observed = observed_names(log_joint, z[0])

    def pointwise(row: Tensor) -> Values:
        nodes = log_joint.trace(row).nodes
        return {name: _log_prob(nodes[name]) for name in observed}
    return _mapped(log_joint, pointwise, z)


@torch.no_grad()
def posterior_predictive(log_joint: LogJoint, z: Tensor) -> Values:
    """Data ``(n, *shape)`` simulated at each draw, by observed site.

    Args:
        log_joint: The model and its data.
        z: Draws ``(n, D)``.
    """
    observed = set(observed_names(log_joint, z[0]))
    return _simulated(log_joint, z, lambda name, node: name in observed)


@torch.no_grad()
def predictions(log_joint: LogJoint, z: Tensor) -> Values:
    """What follows from each draw, ``(n, *shape)``: data, observed or not, and deterministic sites.

    Args:
        log_joint: The model and what to predict for.
        z: Draws ``(n, D)``.
    """
    latent = latent_names(log_joint)
    return _simulated(log_joint, z, lambda name, node: name not in latent and is_shown(node))


def _simulated(log_joint: LogJoint, z: Tensor, chosen: Callable[[str, dict], bool]) -> Values:
    def simulate(row: Tensor) -> Values:
        values = log_joint.layout.constrain(row)[0]
        model = poutine.condition(unobserved(log_joint.model), data=values)
        nodes = _run(model, log_joint).nodes
        return {name: node["value"] for name, node in nodes.items() if chosen(name, node)}
    return _mapped(log_joint, simulate, z, randomness="different")


@torch.no_grad()
def prior_predictive(log_joint: LogJoint, num_samples: int) -> Values:
    """Draws ``(n, *shape)`` of the prior, of what follows from it, and of data.

    Returns:
        Values of latent, deterministic and observed sites.

    Raises:
        PriorError: If the prior of a site is improper, or gives no finite values.
    """
    like = torch.zeros(num_samples, log_joint.layout.size, dtype=log_joint.dtype)

    def simulate(row: Tensor) -> Values:
        nodes = _run(unobserved(log_joint.model), log_joint).nodes
        return {name: node["value"] for name, node in nodes.items() if is_shown(node)}
    try:
        values = _mapped(log_joint, simulate, like, randomness="different")
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise PriorError(str(error).splitlines()[0] if str(error) else
                         "its prior cannot be drawn from") from None
    return values


def observed_names(log_joint: LogJoint, z: Tensor) -> list[str]:
    """Names of the sites that are observed."""
    with log_joint.surroundings():
        nodes = log_joint.trace(z).nodes
    latent = latent_names(log_joint)
    return [name for name, node in nodes.items() if name not in latent and is_data(node)]


def latent_names(log_joint: LogJoint) -> set[str]:
    """Names of the latent sites."""
    return {site.name for site in log_joint.layout}


def is_shown(node: dict[str, Any]) -> bool:
    """Whether a node of a trace without observations is one that ArviZ is shown."""
    unobserved = {**node, "is_observed": True}
    return node["type"] == "sample" and (is_deterministic(node) or is_data(unobserved))


def _log_prob(node: dict[str, Any]) -> Tensor:
    distribution = node["fn"]
    while not distribution.batch_shape and isinstance(distribution, Independent):
        distribution = distribution.base_dist
    log_prob: Tensor = distribution.log_prob(node["value"])
    return log_prob if node["mask"] is None else log_prob.where(
        torch.as_tensor(node["mask"]), log_prob.new_zeros(()))


def _run(model: Callable, log_joint: LogJoint) -> Trace:
    return poutine.trace(model).get_trace(*log_joint.args, **log_joint.kwargs)


def unobserved(model: Callable) -> Callable:
    """A model that draws its data instead of observing them."""
    def run(*args: Any, **kwargs: Any) -> Any:
        with Unobserve():
            return model(*args, **kwargs)
    return run


def _mapped(log_joint: LogJoint, function: Callable[[Tensor], Values], z: Tensor,
            randomness: str = "same") -> Values:
    """Apply a function of one draw to all, at once if the model and its random numbers allow."""
    parts = [_map(log_joint, function, rows, randomness) for rows in z.split(CHUNK)]
    return tree_map(lambda *pieces: torch.cat(pieces), *parts)


def _map(log_joint: LogJoint, function: Callable[[Tensor], Values], rows: Tensor,
         randomness: str) -> Values:
    with log_joint.surroundings():
        if log_joint.batched:
            return map_random_or_loop(function, rows, randomness)
        return one_by_one(function, rows)
