"""What a model of minibatches must be: its likelihood scaled from the batch to all rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_nfvi._random import forked_rng
from pyro_nfvi.guides.prototype import is_subsampled
from pyro_nfvi.inference.log_joint import LogJoint, is_deterministic


class GivenRows(Messenger):
    """The rows of a minibatch are those given: the plate of the data draws none.

    Pyro's ``plate("data", 1_000_000, subsample_size=512)`` permutes a million numbers at each run
    of the model, to choose rows that a model of minibatches does not look at.

    Args:
        name: Name of the plate. Default: any.
        batch_size: Number of rows that the plate chooses. Default: any.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     with pyro.plate("data", 1_000_000, subsample_size=len(x)) as rows:
        ...         return rows
        >>> GivenRows("data")(model)(torch.zeros(3))
        tensor([0, 1, 2])
    """

    def __init__(self, name: str | None = None, batch_size: int | None = None) -> None:
        super().__init__()
        self.name, self.batch_size = name, batch_size

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is None and self.name in (None, msg["name"]):
            plate = msg["fn"]
            count = plate.subsample_size
            if count is not None and count < plate.size and self.batch_size in (None, count):
                msg["value"] = torch.arange(count, device=plate.device)


def check_scaling(log_joint: LogJoint, batch_size: int, num_rows: int | None) -> Any:
    """The plate that scales the likelihood of a minibatch to all rows, as a trace holds it.

    Args:
        log_joint: The model and a minibatch.
        batch_size: Number of rows of the minibatch.
        num_rows: Number of rows of all data; None if it is not known.

    Returns:
        The plate: its ``name``, its ``size`` and its ``full_size``.

    Raises:
        ValueError: If there is no such plate, or a latent inside it.
    """
    nodes = _nodes(log_joint, batch_size)
    plates = [frame for node in nodes.values() if node["is_observed"] and not is_deterministic(node)
              for frame in node["cond_indep_stack"] if frame.full_size is not None]
    fitting = [frame for frame in plates if frame.size == batch_size]
    for frame in fitting:
        if frame.full_size == num_rows or (num_rows is None and is_subsampled(frame)):
            _check_latents(log_joint, nodes, frame)
            return frame
    found = max(fitting or plates, key=is_subsampled, default=None)
    name = "data" if found is None else found.name
    got = "no plate around observed sites" if found is None else \
        f"plate {found.name!r}, of {found.size} of {found.full_size} rows"
    total = "num_rows" if num_rows is None else num_rows
    raise ValueError(
        f"NFVI expected the model to scale its likelihood from a batch of {batch_size} rows to "
        f"all {'rows' if num_rows is None else f'{num_rows} rows'}, found {got}. Write: with "
        f"pyro.plate({name!r}, {total}, subsample_size=len({_argument(log_joint, batch_size)})):")


def _nodes(log_joint: LogJoint, batch_size: int) -> dict[str, dict[str, Any]]:
    """Sample statements of the model, at some point."""
    given = [leaf for leaf in tree_leaves((log_joint.args, log_joint.kwargs))
             if isinstance(leaf, Tensor)]
    drawn = GivenRows(batch_size=batch_size)
    with log_joint.surroundings(), torch.no_grad(), forked_rng(), drawn:
        device = given[0].device if given else None
        nodes = log_joint.trace(torch.zeros(log_joint.layout.size, device=device)).nodes
    return {name: node for name, node in nodes.items()
            if node["type"] == "sample" and not site_is_subsample(node)}


def _check_latents(log_joint: LogJoint, nodes: dict[str, dict[str, Any]], plate: Any) -> None:
    for site in log_joint.layout:
        frames = nodes[site.name]["cond_indep_stack"]
        if is_subsampled(plate) and any(frame.name == plate.name for frame in frames):
            raise ValueError(f"NFVI fits latents that all rows share; {site.name!r} is local to "
                             f"the plate {plate.name!r} of minibatches. Amortize it: "
                             f"AutoAmortizedFlow with pyro.infer.SVI.")


def _argument(log_joint: LogJoint, batch_size: int) -> str:
    """What the model calls the first of its arguments that has a batch's rows."""
    try:
        bound = inspect.signature(log_joint.model).bind(*log_joint.args, **log_joint.kwargs)
    except (TypeError, ValueError):
        return "x"
    return next((name for name, value in bound.arguments.items() if isinstance(value, Tensor)
                 and value.dim() and len(value) == batch_size), "x")
