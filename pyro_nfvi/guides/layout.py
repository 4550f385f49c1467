"""Named latent sites as slices of one flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_nfvi._shapes import check_tensor, type_name


@dataclass(frozen=True)
class LatentSite:
    """One latent sample statement of a model, as its prototype trace showed it.

    Attributes:
        name: Name of the site.
        support: Constraint its values satisfy.
        shape: Shape of a value, plates first.
        unconstrained_shape: Shape of the value mapped to the reals.
        event_dim: Number of rightmost dimensions of ``shape`` that are one draw.
        plates: Names of the plates, by the dimension of ``shape`` they own, from the left.
        start: Where its slice of the flat vector begins.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> layout = LatentLayout.from_trace(pyro.poutine.trace(model).get_trace())
        >>> site = layout.at(0)
        >>> site.name, site.support, site.shape, site.plates
        ('scale', GreaterThan(lower_bound=0.0), torch.Size([]), ())
    """

    name: str
    support: Any
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    plates: tuple[str | None, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return math.prod(self.unconstrained_shape)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the plates."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def transform(self) -> Transform:
        """Map from the reals onto the support."""
        return biject_to(self.support)

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-Jacobian, the latter summed over the event dimensions."""
        transform = self.transform
        value = transform(unconstrained)
        log_det = transform.log_abs_det_jacobian(unconstrained, value)
        extra = log_det.dim() - (value.dim() - self.event_dim)
        return value, sum_rightmost(log_det, extra)


class LatentLayout:
    r"""The map between named constrained values and one flat unconstrained vector.

    .. math:: \log p(\text{values}) = \log p(z)
              - \textstyle\sum_{\text{sites}} \log|d\,\text{value}/dz|

    Args:
        sites: The sites, in the order of the vector.

    Shape:
        z: ``(*sample, size)``; value of a site: ``(*sample, *site.shape)``, sample dimensions
        to the left of the site's plates.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        ...     with pyro.plate("rows", 4):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> layout = LatentLayout.from_trace(pyro.poutine.trace(model).get_trace())
        >>> values, log_det = layout.constrain(torch.zeros(7, layout.size))
        >>> layout.size, values["weights"].shape, values["x"].shape
        (6, torch.Size([7, 3]), torch.Size([7, 4]))
    """

    def __init__(self, sites: tuple[LatentSite, ...]) -> None:
        self.sites = sites
        self.size = sum(site.size for site in sites)

    @classmethod
    def from_trace(cls, trace: Trace) -> LatentLayout:
        """Layout of the latent sites of a model's trace, in the order they ran.

        Raises:
            ValueError: If a site's support has no map from the reals.
        """
        sites: list[LatentSite] = []
        for _, node in trace.iter_stochastic_nodes():
            if site_is_subsample(node):
                continue
            start = sites[-1].start + sites[-1].size if sites else 0
            sites.append(_site(node, start))
        return cls(tuple(sites))

    def __iter__(self) -> Iterator[LatentSite]:
        return iter(self.sites)

    def at(self, coordinate: int) -> LatentSite:
        """The site that a coordinate of the flat vector belongs to."""
        return next(site for site in self.sites if coordinate < site.start + site.size)

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Unconstrained values ``(*sample, *site.unconstrained_shape)`` of every site."""
        z = check_tensor("LatentLayout", "z", z, self.size)
        return {site.name: z[..., site.start:site.start + site.size].reshape(
            z.shape[:-1] + site.unconstrained_shape) for site in self.sites}

    def unpack(self, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Constrained value and log-Jacobian ``(*sample, *site.batch_shape)`` of every site."""
        parts = self.split(z)
        return {site.name: site.constrain(parts[site.name]) for site in self.sites}

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All constrained values, and the total log-Jacobian ``(*sample,)``."""
        unpacked = self.unpack(z)
        total = sum((sum_rightmost(log_det, log_det.dim() - (z.dim() - 1))
                     for _, log_det in unpacked.values()), z.new_zeros(z.shape[:-1]))
        return {name: value for name, (value, _) in unpacked.items()}, total

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Flat vector ``(*sample, size)`` of constrained values.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"LatentLayout expected `values` to be a dict of tensors by site, "
                             f"got {type_name(values)}.")
        return self.unconstrain({site.name: self._value(site, values) for site in self.sites})

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`pack`, of values that are not checked: nan where one is outside."""
        parts = [self._flat(site, values[site.name]) for site in self.sites]
        sample_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*sample_shape, -1) for part in parts], -1)

    def _value(self, site: LatentSite, values: Mapping[str, Tensor]) -> Tensor:
        if site.name not in values:
            raise ValueError(f"LatentLayout expected `values` to hold every latent site, "
                             f"{site.name!r} is missing; got {sorted(values)}.")
        value = as_values("LatentLayout", site.name, values[site.name])
        if value.shape[value.dim() - len(site.shape):] != site.shape:
            raise ValueError(f"LatentLayout expected site {site.name!r} of shape "
                             f"(*sample, {', '.join(map(str, site.shape))}), "
                             f"got {tuple(value.shape)}.")
        if not bool(site.support.check(value).all()):
            raise ValueError(f"LatentLayout expected site {site.name!r} within its support "
                             f"{site.support}, got a value outside it.")
        return value

    @staticmethod
    def _flat(site: LatentSite, value: Tensor) -> Tensor:
        sample_shape = value.shape[: value.dim() - len(site.shape)]
        return site.transform.inv(value).reshape(*sample_shape, site.size)

    def __repr__(self) -> str:
        inside = ", ".join(f"{site.name}: {tuple(site.shape)}" for site in self.sites)
        return f"{type_name(self)}({inside})"


def as_values(owner: str, name: str, given: Any) -> Tensor:
    """Values of a site as a tensor.

    Raises:
        ValueError: If they are no numbers.
    """
    try:
        value = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{owner} expected site {name!r} to have a tensor of values, got "
                         f"{type_name(given)}.") from None
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def _site(node: dict[str, Any], start: int) -> LatentSite:
    distribution, value = node["fn"], node["value"]
    with helpful_support_errors(node):
        unconstrained = biject_to(distribution.support).inv(value)
    return LatentSite(
        name=node["name"], support=distribution.support, shape=value.shape,
        unconstrained_shape=unconstrained.shape, event_dim=distribution.event_dim,
        plates=plate_names(node), start=start)


def plate_names(node: dict[str, Any]) -> tuple[str | None, ...]:
    """Name of the plate of each batch dimension of a trace's node, None where there is none."""
    by_dim = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
    num_batch = node["value"].dim() - node["fn"].event_dim
    return tuple(by_dim.get(dim - num_batch) for dim in range(num_batch))
