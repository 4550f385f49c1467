"""The single numbers of a posterior: their names, their draws, and which to look at first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyro_nfvi import _arviz
from pyro_nfvi._shapes import check_names, type_name

DRAW_DIMS = ("chain", "draw")


@dataclass(frozen=True)
class Component:
    """One number of a posterior.

    Attributes:
        label: The site, and where in it: ``theta[Choate]``.
        draws: Its finite draws ``(num_draws,)``.
        reference: Those of a reference, if there is one.
    """

    label: str
    draws: np.ndarray
    reference: np.ndarray | None = None

    @property
    def gap(self) -> float:
        """Distance of the means in standard deviations of the reference; nan without one."""
        if self.reference is None or not len(self.reference) or not len(self.draws):
            return float("nan")
        return float(_gap(self.draws[:, None], self.reference[:, None])[0])

    @property
    def parts(self) -> list[np.ndarray]:
        """Its draws and those of the reference, if there are any."""
        return [part for part in (self.draws, self.reference) if part is not None and len(part)]


@dataclass(frozen=True)
class _Place:
    """Where a component is, and what says how much it deserves a look."""

    site: str
    index: int
    label: str
    pareto_k: float
    gap: float
    rank: int  # within its site
    still: bool  # whether it is one number, such as the diagonal of a correlation


def components(owner: str, data: Any, reference: Any = None,
               var_names: Sequence[str] | None = None, *,
               pareto_k: Mapping[str, float] | None = None, most: int | None = None,
               spread: bool = False) -> tuple[list[Component], int]:
    """Components of a posterior, and how many were left out.

    Where there are more than ``most``, the worst come first: by k-hat, then by the distance to
    the reference; those that do not vary are last. Otherwise they are in the order of the model.

    Args:
        owner: Whose arguments these are, for error messages.
        data: InferenceData or DataTree with a posterior.
        reference: The same, or draws ``(num_draws, *shape)`` by site.
        var_names: Sites to take. Default: all.
        pareto_k: k-hat by site or by component.
        most: Largest number to take. Default: all.
        spread: Whether to take one of each site before a second of any.

    Raises:
        ValueError: If a site is unknown, or the reference has none of them, or another shape.

    Example:
        >>> draws = {"mu": np.zeros(100), "theta": np.ones((100, 8))}
        >>> chosen, num_left = components("plot", draws, pareto_k={"theta": 0.9}, most=2)
        >>> [one.label for one in chosen], num_left
        (['theta[0]', 'theta[1]'], 7)
    """
    sites = _chosen(owner, site_draws(owner, "data", data), var_names)
    references = _matched(owner, sites, reference)
    places = list(_places(data, sites, references, pareto_k or {}))
    taken = places
    if most is not None and len(places) > most:
        taken = sorted(places, key=_spread_key if spread else _worst_key)[:most]
    made = [Component(place.label, _column(sites[place.site], place.index),
                      _column(references.get(place.site), place.index)) for place in taken]
    return made, len(places) - len(taken)


def site_draws(owner: str, argument: str, source: Any) -> dict[str, np.ndarray]:
    """Draws ``(num_draws, *shape)`` by site, of ArviZ data or of a mapping of arrays.

    Raises:
        ValueError: If there are none.
    """
    group = _group(source, "posterior")
    if group is not None:
        return {str(name): flat_draws(group[name]) for name in group.data_vars}
    if not isinstance(source, Mapping) or not source or not all(map(_is_array, source.values())):
        raise ValueError(f"{owner} expected `{argument}` to be ArviZ data with a posterior, or "
                         f"draws (num_draws, *shape) by site, got {_described(source)}.")
    return {str(name): _arviz.as_array(values) for name, values in source.items()}


def site_values(data: Any, group: str) -> dict[str, Any]:
    """Variables of a group of ArviZ data; none if there is no such group."""
    found = _group(data, group)
    return {} if found is None else {str(name): found[name] for name in found.data_vars}


def flat_draws(variable: Any) -> np.ndarray:
    """Draws ``(num_draws, *shape)`` of all chains of a variable of ArviZ data."""
    values = variable.transpose(*DRAW_DIMS, ...).values
    draws: np.ndarray = values.reshape(math.prod(values.shape[:2]), *values.shape[2:])
    return draws


def attributes(data: Any, group: str) -> dict[str, Any]:
    """Attributes of a group of ArviZ data; none if there is no such group."""
    found = _group(data, group)
    return {} if found is None else dict(found.attrs)


def labels(variable: Any, name: str) -> list[str]:
    """Names of the components of a variable: ``theta[0]``, ``cov[0, 1]``."""
    dims = [dim for dim in variable.dims if dim not in DRAW_DIMS]
    if not dims:
        return [name]
    values = [variable[dim].values for dim in dims]
    return [f"{name}[{', '.join(map(str, place))}]" for place in itertools.product(*values)]


def badness(pareto_k: Mapping[str, float], *names: str) -> float:
    """k-hat under the first of the names that has one: nan is the worst, none the best."""
    k = next((pareto_k[name] for name in names if name in pareto_k), -math.inf)
    return math.inf if math.isnan(k) else k


def finite(values: np.ndarray) -> np.ndarray:
    """The finite ones of some numbers, as float64."""
    values = np.asarray(values, np.float64).ravel()
    return values[np.isfinite(values)]


# ------------------------------------------------------------------ which, and in which order

def _chosen(owner: str, sites: dict[str, np.ndarray], var_names: Sequence[str] | None
            ) -> dict[str, np.ndarray]:
    names = None if var_names is None else check_names(owner, "var_names", var_names)
    if unknown := [name for name in names or () if name not in sites]:
        raise ValueError(f"{owner} expected `var_names` to name sites of the posterior "
                         f"({', '.join(sites)}), got {unknown[0]!r}.")
    return sites if names is None else {name: sites[name] for name in names}


def _matched(owner: str, sites: dict[str, np.ndarray], reference: Any) -> dict[str, np.ndarray]:
    """Draws of the reference for the sites that it has."""
    if reference is None:
        return {}
    given = site_draws(owner, "reference", reference)
    common = {name: given[name] for name in sites if name in given}
    if not common:
        raise ValueError(f"{owner} expected `reference` to have one of the sites "
                         f"{', '.join(sites)}, got {', '.join(given)}.")
    return {name: _reshaped(owner, name, values, sites[name].shape[1:])
            for name, values in common.items()}


def _reshaped(owner: str, name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    lead = values.ndim - len(shape)
    if lead < 1 or values.shape[lead:] != shape:
        wanted = ", ".join(["num_draws", *map(str, shape)])
        raise ValueError(f"{owner} expected the reference's {name!r} of shape ({wanted}), "
                         f"got {values.shape}.")
    return values.reshape(-1, *shape)


def _places(data: Any, sites: dict[str, np.ndarray], references: dict[str, np.ndarray],
            pareto_k: Mapping[str, float]) -> Iterator[_Place]:
    variables = site_values(data, "posterior")
    for site, draws in sites.items():
        names = (labels(variables[site], site) if site in variables
                 else _plain_labels(site, draws.shape[1:]))
        gaps = (_gap(draws, references[site]) if site in references
                else np.zeros(len(names)))
        bad = [badness(pareto_k, name, site) for name in names]
        still = (draws[:1] == draws).all(0).ravel() if len(draws) else np.ones(len(names), bool)
        order = sorted(range(len(names)), key=lambda i: (still[i], -bad[i], -gaps[i], i))
        rank = {index: place for place, index in enumerate(order)}
        yield from (_Place(site, i, name, bad[i], float(gaps[i]), rank[i], bool(still[i]))
                    for i, name in enumerate(names))


def _plain_labels(site: str, shape: tuple[int, ...]) -> list[str]:
    return [f"{site}[{', '.join(map(str, place))}]" if shape else site
            for place in np.ndindex(*shape)]


def _worst_key(place: _Place) -> tuple:
    return place.still, -place.pareto_k, -place.gap, place.rank


def _spread_key(place: _Place) -> tuple:
    return place.still, place.rank, -place.pareto_k, -place.gap


def _gap(draws: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of the means of each column, in standard deviations of the reference."""
    if not len(draws) or not len(reference):
        return np.full(math.prod(draws.shape[1:]), np.inf)
    draws, reference = _matrix(draws), _matrix(reference)
    with np.errstate(all="ignore"):
        scale = np.maximum(reference.std(0, dtype=np.float64), np.finfo(np.float64).tiny)
        gap = np.abs(draws.mean(0, dtype=np.float64)
                     - reference.mean(0, dtype=np.float64)) / scale
    return np.where(np.isnan(gap), np.inf, gap)


# ------------------------------------------------------------------ arrays

def _group(data: Any, name: str) -> Any:
    """A group of ArviZ data, 0.x or 1.x; None if there is none."""
    found = data[name] if isinstance(data, Mapping) and name in data else None
    return found if hasattr(found, "data_vars") else None


def _column(values: np.ndarray | None, index: int) -> Any:
    return None if values is None else finite(_matrix(values)[:, index])


def _matrix(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _is_array(value: Any) -> bool:
    return torch.is_tensor(value) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _described(source: Any) -> str:
    keys = f" of {', '.join(map(str, source))}" if isinstance(source, Mapping) and source else ""
    return type_name(source) + keys
