"""What a model of minibatches must be: its likelihood scaled from the batch to all rows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_nfvi._random import forked_rng
from pyro_nfvi.guides.prototype import is_subsampled
from pyro_nfvi.inference.log_joint import LogJoint, is_deterministic

SAME = 0.1  # relative; what is not the same is twice as much


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
    argument = _argument(log_joint, batch_size)
    raise ValueError(_words(batch_size, num_rows, got, name, argument))


@torch.no_grad()
def check_others(half: LogJoint, twice: LogJoint, num_rows: int, plate: Any) -> None:
    r"""Refuse an observed site that is not scaled, though another is.

    A batch that has each row twice stands for the same likelihood, if it is scaled:

    .. math:: \frac{N}{2n} \sum_{i=1}^n 2 \log p(x_i \mid z)
              = \frac{N}{n} \sum_{i=1}^n \log p(x_i \mid z)

    Args:
        half: The model and a minibatch.
        twice: The same with its rows twice.
        num_rows: Number :math:`n` of rows of the first.
        plate: The plate that scales the likelihood, as :func:`check_scaling` returns it.

    Raises:
        ValueError: If there is such a site.
    """
    try:
        with GivenRows(plate.name):
            before, after = (_scored(one) for one in (half, twice))
    except (ValueError, RuntimeError):  # of values that are no draws, which others tell
        return
    for name, node in after.items():
        totals = _totals(before.get(name, node), node, num_rows)
        one_by_one = any(not frame.vectorized and frame.full_size == plate.full_size
                         for frame in node["cond_indep_stack"])
        if totals - {plate.full_size} or (not one_by_one and _changed(before.get(name), node)):
            words = _words(plate.size, plate.full_size, f"site {name!r} that is not",
                           plate.name, _argument(half, num_rows))
            raise ValueError(f"{words} around it, row by row.")


def _scored(log_joint: LogJoint) -> dict[str, dict[str, Any]]:
    """Observed sites at some point, with their densities."""
    trace = _trace(log_joint)
    observed = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"
                and node["is_observed"] and not is_deterministic(node)
                and not site_is_subsample(node)}
    with log_joint.surroundings():
        trace.compute_log_prob(lambda name, _: name in observed)
    return observed


def _totals(before: dict[str, Any], after: dict[str, Any], num_rows: int) -> set[int]:
    """Numbers of rows that plates scale a batch of so many rows to, and one of twice as many."""
    small = {frame.name for frame in before["cond_indep_stack"] if frame.size == num_rows}
    return {frame.full_size for frame in after["cond_indep_stack"] if frame.name in small
            and frame.size == 2 * num_rows and is_subsampled(frame)}


def _changed(before: dict[str, Any] | None, after: dict[str, Any]) -> bool:
    """Whether a site is new, or of another density."""
    if before is None or not before["log_prob_sum"].isfinite():
        return before is None
    allowed = SAME * float(before["log_prob"].abs().sum())
    return not torch.isclose(after["log_prob_sum"], before["log_prob_sum"], 0.0, allowed)


def _words(batch_size: int, num_rows: int | None, found: str, name: str, argument: str) -> str:
    total = "num_rows" if num_rows is None else num_rows
    return (f"NFVI expected the model to scale its likelihood from a batch of {batch_size} rows to "
            f"all {'rows' if num_rows is None else f'{num_rows} rows'}, found {found}. Write: with "
            f"pyro.plate({name!r}, {total}, subsample_size=len({argument})):")


def _nodes(log_joint: LogJoint, batch_size: int) -> dict[str, dict[str, Any]]:
    """Sample statements of the model, at some point."""
    with GivenRows(batch_size=batch_size):
        nodes = _trace(log_joint).nodes
    return {name: node for name, node in nodes.items()
            if node["type"] == "sample" and not site_is_subsample(node)}


def _trace(log_joint: LogJoint) -> Trace:
    """The model at some point; the same random numbers at each call."""
    given = [leaf for leaf in tree_leaves((log_joint.args, log_joint.kwargs))
             if isinstance(leaf, Tensor)]
    device = given[0].device if given else None
    with log_joint.surroundings(), torch.no_grad(), forked_rng(0):
        return log_joint.trace(torch.zeros(log_joint.layout.size, device=device))


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
