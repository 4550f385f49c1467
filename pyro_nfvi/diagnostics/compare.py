"""Fits of one model side by side: which guide is best, and at what price."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import type_name
from pyro_nfvi.diagnostics.checks import spread
from pyro_nfvi.diagnostics.inference_data import _device
from pyro_nfvi.diagnostics.report import verdict
from pyro_nfvi.inference import LogJoint
from pyro_nfvi.inference.chains import is_noisy
from pyro_nfvi.inference.log_joint import is_data

NUM_COMPARED = 3  # latents at which the log joints are compared
WAY_OUT = "Compare fits of one model to the same data."
NEEDED = ("guide", "log_joint", "history")  # what makes a Posterior


@torch.no_grad()
def compare(posteriors: Mapping[str, Any] | Iterable[Any]) -> Any:
    r"""Table of several fits of one model to the same data, the best first.

    The evidence :math:`\log p(x)` is the same for all, so that the ELBO orders them:

    .. math:: \mathrm{ELBO} = \log p(x) - \mathrm{KL}\left[q(z)\,\|\,p(z \mid x)\right]

    Args:
        posteriors: The fits, :class:`~pyro_nfvi.Posterior` each, by name; or a list of them, which
            are then called by their guides, with numbers where these are alike.

    Returns:
        A pandas DataFrame with a row a fit, in falling order of ``elbo``, and the columns
        ``elbo`` with its standard error ``elbo_se`` (nan, and last, where the guide is a point
        mass, which has none), ``pareto_k``, ``ess`` (effective number of 10,000 weighted draws),
        ``seconds`` (wall-clock time of the fit; nan if it is not known) and ``trusted`` (whether
        the verdict is good).

    Raises:
        ValueError: If there is no fit, one is no Posterior, or they are of other sites, other
            data or another density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nfvi import NFVI, AutoIAF, AutoPlanar
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)
        >>> fits = [NFVI(model, guide, num_steps=20, progress=False).run(torch.tensor(1.0))
        ...         for guide in (AutoPlanar(model), AutoIAF(model))]
        >>> sorted(compare(fits).index)
        ['AutoIAF', 'AutoPlanar']
    """
    import pandas

    named = _named(posteriors)
    first, *others = named
    for other in others:
        _check_sites(first, other, named)
        _check_data(first, other, named)
        _check_density(first, other, named)
    table = pandas.DataFrame.from_dict({name: _row(fit) for name, fit in named.items()},
                                       orient="index")
    return table.sort_values("elbo", ascending=False, kind="stable")


def _row(posterior: Any) -> dict[str, Any]:
    point = spread(posterior.draws, posterior.log_joint.layout).failed  # and so no density
    value, error = (math.nan, math.nan) if point else posterior.elbo
    trusted, _ = verdict(posterior.draws, posterior.history, posterior.log_joint.layout)
    return {"elbo": value, "elbo_se": error, "pareto_k": posterior.pareto_k, "ess": posterior.ess,
            "seconds": posterior.history.seconds or math.nan, "trusted": trusted}


# ---------------------------------------------------------------------- names

def _named(posteriors: Any) -> dict[str, Any]:
    """Fits by name.

    Raises:
        ValueError: If one is no Posterior, or there is none.
    """
    if isinstance(posteriors, Tensor) or not isinstance(posteriors, (Mapping, Iterable)):
        raise ValueError("compare expected `posteriors` to be a list or dict of Posteriors, got "
                         f"{type_name(posteriors)}. Put it in a list.")
    fits = list(posteriors.values() if isinstance(posteriors, Mapping) else posteriors)
    for fit in fits:
        if not all(name in dir(fit) for name in NEEDED):
            raise ValueError("compare expected `posteriors` to hold Posteriors, as NFVI(...).run() "
                             f"returns them, got {type_name(fit)}.")
    if not fits:
        raise ValueError("compare expected `posteriors` to hold at least one Posterior, got none.")
    if isinstance(posteriors, Mapping):
        return {str(name): fit for name, fit in posteriors.items()}
    return dict(zip(_numbered([_name(fit.guide) for fit in fits]), fits, strict=True))


def _name(guide: Any) -> str:
    """What a guide is called: its class, and what of its recipe is not the class's own."""
    kind = type_name(guide)
    recipe, options = getattr(guide, "recipe", None), list[str]()
    if recipe is None:
        return str(getattr(guide, "__name__", kind))
    while isinstance(recipe, partial):
        options = [f"{name}={value}" for name, value in recipe.keywords.items()] + options
        recipe = recipe.func
    own = recipe is getattr(type(guide), "default_recipe", None)
    inside = [] if own else [str(getattr(recipe, "__name__", type_name(recipe)))]
    return f"{kind}({', '.join(inside + options)})" if inside + options else kind


def _numbered(names: list[str]) -> list[str]:
    """The names, with numbers where several are alike."""
    total, seen = Counter(names), Counter()  # type: ignore[var-annotated]
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} {seen[name]}" if total[name] > 1 else name)
    return result


# ---------------------------------------------------------------------- one model, one data set

def _check_sites(first: str, other: str, named: Mapping[str, Any]) -> None:
    sites, others = ({s.name: tuple(s.shape) for s in named[name].log_joint.layout}
                     for name in (first, other))
    if sites != others:
        raise ValueError(f"compare expected fits of one model, but {first!r} has the sites "
                         f"{_shown(sites)} and {other!r} has {_shown(others)}. {WAY_OUT}")


def _shown(sites: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sites.items())


def _check_data(first: str, other: str, named: Mapping[str, Any]) -> None:
    ours, theirs = _data(named[first]), _data(named[other])
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs or not _alike(ours[name], theirs[name]):
            raise ValueError(f"compare expected fits to the same data, but {first!r} and {other!r} "
                             f"observed different values of {name!r}. {WAY_OUT}")


def _data(posterior: Any) -> dict[str, Tensor]:
    """Observed values by site."""
    log_joint: LogJoint = posterior.log_joint
    with log_joint.surroundings():
        nodes = log_joint.trace(_latents(posterior, posterior)[0]).nodes
    return {name: node["value"].detach().cpu() for name, node in nodes.items()
            if is_data(node) and name not in {site.name for site in log_joint.layout}}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, up to the coarser of their types."""
    if a.shape != b.shape:
        return False
    kinds = [t.dtype for t in (a, b) if t.is_floating_point()]
    tolerance = max((8 * torch.finfo(kind).eps for kind in kinds), default=0.0)
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=0, equal_nan=True)


def _check_density(first: str, other: str, named: Mapping[str, Any]) -> None:
    """Whether both log joints are the same at the same latents, unless a model has none."""
    ours, theirs = (named[name] for name in (first, other))
    places = [_latents(fit, ours) for fit in (ours, theirs)]
    log_joints = [fit.log_joint for fit in (ours, theirs)]
    if any(log_joint.parameters(z[0]) or is_noisy(log_joint, z)  # learned, or of a minibatch
           for log_joint, z in zip(log_joints, places, strict=True)):
        return
    a, b = (log_joint(z).cpu() for log_joint, z in zip(log_joints, places, strict=True))
    tolerance = max(torch.finfo(t.dtype).eps for t in (a, b)) ** 0.5
    if not torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(f"compare expected fits of one model, but the log joint at one place is "
                         f"{a[0]:.6g} for {first!r} and {b[0]:.6g} for {other!r}: a prior, a "
                         f"likelihood or an argument differs. {WAY_OUT}")


def _latents(posterior: Any, source: Any) -> Tensor:
    """Some draws of ``source``, in the type and on the device of ``posterior``."""
    z = source.draws.z[:NUM_COMPARED]
    like: Tensor = posterior.draws.z
    return z.to(dtype=like.dtype, device=_device(posterior.log_joint))
