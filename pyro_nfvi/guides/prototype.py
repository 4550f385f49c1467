"""Is the model one this guide can handle, and is it still the one it was built for?"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_nfvi._random import forked_rng
from pyro_nfvi.guides.layout import LatentLayout

REBUILD = "Build a new guide, and call it first with the arguments you fit with."
MAX_SIGNATURES = 32  # more kinds of arguments than this are not re-checked: a step counter, say


class NoLatentError(ValueError, RuntimeError):
    """The model has no latent site. A RuntimeError too, as Pyro's guides raise."""


def check_prototype(owner: str, trace: Trace, local: str | None = None) -> None:
    """Refuse what a continuous guide over all latents cannot handle.

    Args:
        owner: Name of the guide, for messages.
        trace: Trace of the model.
        local: Name of the plate, if any, whose latents the guide amortizes.

    Raises:
        ValueError: If there is no latent, a discrete one, or one in a subsampled plate that the
            guide does not amortize.
        NotImplementedError: If there is no map from the reals onto the support of a latent, or it
            is in a sequential plate.
    """
    nodes = dict(trace.iter_stochastic_nodes())
    if not sum(node["value"].numel() for node in nodes.values()):
        raise NoLatentError(f"{owner} found no latent site in the model: every pyro.sample is "
                            "observed. Pass data only to the sites you observe.")
    for name, node in nodes.items():
        if node["fn"].support.is_discrete:
            kind = type(_innermost(node["fn"])).__name__
            raise ValueError(f"{owner} handles continuous sites; {name!r} is {kind}. Hide it: "
                             f"{owner}(poutine.block(model, hide=[{name!r}])). To sum it out: "
                             "https://pyro.ai/examples/enumeration.html.")
        if not has_map(node["fn"]):
            raise NotImplementedError(
                f"{owner} maps the reals onto the support of every site; {name!r} is "
                f"{type(node['fn']).__name__}, onto whose support, {node['fn'].support!r}, there "
                f"is no such map. {_way_out(node['fn'].support)}")
        for frame in node["cond_indep_stack"]:
            if not frame.vectorized:
                raise NotImplementedError(
                    f"{owner} handles vectorized plates; {name!r} is in the sequential plate "
                    f"{frame.name!r}. Use `with pyro.plate(...)`, or loop over a range instead.")
            if is_subsampled(frame) and frame.name != local:
                holds = "holds one value for each latent" if local is None else \
                    f"amortizes one plate, {local!r}"
                raise ValueError(
                    f"{owner} {holds}; {name!r} is local to the subsampled "
                    f"plate {frame.name!r} ({frame.size} of {frame.full_size}). Use the full "
                    f"plate, or hide it here and give it a guide of its own in AutoGuideList.")


def has_map(distribution: Any) -> bool:
    """Whether there is a bijection from the reals onto a distribution's support."""
    try:
        biject_to(distribution.support)
    except NotImplementedError:
        return False
    return True


def _way_out(support: Any) -> str:
    if "sphere" in repr(support).lower():
        return "Use poutine.reparam with a ProjectedNormalReparam."
    if any(kind in type(support).__name__ for kind in ("PositiveDefinite", "LowerCholesky",
                                                       "PositiveSemidefinite")):
        return "Build the matrix from LKJCholesky correlations and positive scales."
    return "Build the value from sites that have one, and add its density by pyro.factor."


class PrototypeCheck:
    """Re-traces the model when arguments of a new kind come, and compares its latent sites.

    Args:
        owner: Name of the guide, for messages.
        layout: Latent sites the guide was built for.
        args: Model arguments it was built with.
        kwargs: Likewise.
    """

    def __init__(self, owner: str, layout: LatentLayout, args: tuple, kwargs: dict) -> None:
        self.owner = owner
        self.layout = layout
        self.seen = {kind_of((args, kwargs))}

    def __call__(self, model: Any, args: tuple, kwargs: dict) -> None:
        """Check these arguments.

        Raises:
            ValueError: If a latent site is gone, observed, or of another shape.
        """
        signature = kind_of((args, kwargs))
        if signature in self.seen or len(self.seen) >= MAX_SIGNATURES or torch.jit.is_tracing():
            return
        trace = quiet_trace(model, args, kwargs)
        for site in self.layout:
            compare_site(self.owner, site.name, site.shape, trace)
        self.seen.add(signature)


def quiet_trace(model: Any, args: tuple, kwargs: dict) -> Trace:
    """Trace of a model that leaves nothing behind: no message, no gradient, no random draw."""
    with torch.no_grad(), forked_rng():
        return poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)


def compare_site(owner: str, name: str, shape: torch.Size, trace: Trace,
                 way_out: str = REBUILD) -> None:
    """Check that a site the guide was built for is still latent, and of this shape.

    Raises:
        ValueError: If it is not.
    """
    if name not in trace.nodes:
        raise ValueError(f"{owner} was built with a latent site {name!r} that the model "
                         f"no longer has. {way_out}")
    node = trace.nodes[name]
    if node["is_observed"]:
        raise ValueError(f"{owner} was built when {name!r} was latent; now it is "
                         f"observed. {way_out}")
    if node["value"].shape != shape:
        raise ValueError(f"{owner} expected site {name!r} of shape {tuple(shape)}, got "
                         f"{tuple(node['value'].shape)}. {way_out}")


def is_subsampled(frame: Any) -> bool:
    """Whether a plate, as a node's ``cond_indep_stack`` holds it, draws minibatches."""
    return frame.full_size is not None and frame.size < frame.full_size


def _innermost(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def kind_of(value: Any) -> Any:
    """What of the model's arguments may change its sites: shapes, types, small constants."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(kind_of(item) for item in value)
    if isinstance(value, dict):
        return tuple((str(key), kind_of(item)) for key, item in sorted(
            value.items(), key=lambda pair: str(pair[0])))
    if isinstance(value, (bool, int, str, type(None))):
        return value
    return (type(value).__name__, getattr(value, "shape", None))
