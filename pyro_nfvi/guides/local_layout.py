"""The latents of one plate as one flat vector for each of its elements."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_nfvi.guides.layout import LatentLayout, LatentSite, plate_names
from pyro_nfvi.guides.prototype import is_subsampled


@dataclass(frozen=True)
class LocalSite:
    """A latent site of the plate, as one element has it.

    Attributes:
        element: The site of one element: its shape lacks the plate's dimension.
        axis: Where among the batch dimensions, from the left, that dimension goes.
        frames: Names of all the plates the site is in.
    """

    element: LatentSite
    axis: int
    frames: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.element.name

    @property
    def num_batch(self) -> int:
        """Number of batch dimensions, the plate's among them."""
        return len(self.element.batch_shape) + 1

    def shape(self, num_rows: int) -> torch.Size:
        """Shape of the values of ``num_rows`` elements."""
        shape = self.element.shape
        return torch.Size((*shape[:self.axis], num_rows, *shape[self.axis:]))

    def elements_first(self, value: Tensor) -> Tensor:
        """Values with the plate's dimension moved to the front of the batch dimensions."""
        first = -self.num_batch - self.element.event_dim
        return value.movedim(first + self.axis, first)

    def constrain(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-Jacobian, the plate's dimension in its place.

        Args:
            z: Unconstrained vectors ``(*sample, num_rows, size)`` of this site.
        """
        shape = z.shape[:-1] + self.element.unconstrained_shape
        value, log_det = self.element.constrain(z.reshape(shape))
        first = -self.num_batch - self.element.event_dim
        return (value.movedim(first, first + self.axis),
                log_det.movedim(-self.num_batch, self.axis - self.num_batch))


class LocalLayout:
    r"""The map between the values of a plate's sites and a flat vector for each element.

    .. math:: \log p(\text{values}_i) = \log p(z_i)
              - \textstyle\sum_{\text{sites}} \log|d\,\text{value}_i/dz_i|

    Dimensions of plates nested with this one belong to the element's vector.

    Args:
        plate: Name of the plate.
        dim: Its dimension, counted from the right: negative.
        sites: Its sites, in the order of the vector.

    Shape:
        z: ``(*sample, num_rows, size)``; value of a site: ``(*sample, *site.shape(num_rows))``.
    """

    def __init__(self, plate: str, dim: int, sites: tuple[LocalSite, ...]) -> None:
        self.plate, self.dim, self.sites = plate, dim, sites
        self.elements = LatentLayout(tuple(site.element for site in sites))
        self.size = self.elements.size

    @classmethod
    def from_trace(cls, owner: str, trace: Trace, plate: str) -> LocalLayout:
        """Layout of the latent sites of a model's trace that are in the plate.

        Raises:
            ValueError: If the support of a site differs from element to element.
        """
        sites: list[LocalSite] = []
        for node in nodes_inside(trace, plate):
            last = sites[-1].element if sites else None
            sites.append(_local_site(owner, node, plate, last.start + last.size if last else 0))
        dim = next(_frame(node, plate).dim for node in nodes_inside(trace, plate))
        return cls(plate, dim, tuple(sites))

    def __iter__(self) -> Iterator[LocalSite]:
        return iter(self.sites)

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All constrained values, and the total log-Jacobian ``(*sample,)``."""
        values, total = {}, z.new_zeros(z.shape[:-2])
        for site in self.sites:
            values[site.name], log_det = site.constrain(self.part(site, z))
            total = total + sum_rightmost(log_det, site.num_batch)
        return values, total

    def part(self, site: LocalSite, z: Tensor) -> Tensor:
        """A site's coordinates of the vectors."""
        return z[..., site.element.start:site.element.start + site.element.size]

    def pack(self, owner: str, values: Mapping[str, Tensor], num_rows: int) -> Tensor:
        """Vectors ``(*sample, num_rows, size)`` of constrained values.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        return self.elements.pack({site.name: site.elements_first(
            _checked(owner, values, site.name, site.shape(num_rows))) for site in self.sites})

    def aligned(self, site: LocalSite, latent: Tensor) -> Tensor:
        """A site's part ``(*particles, num_rows, site.size)`` of the guide's draw.

        The draw has the plate at the plate's dimension, and particles left of all plates; the
        site itself may have more dimensions between the two.
        """
        right = -1 - self.dim
        batch = latent.shape[:latent.dim() - 1 - right]
        left = batch[:max(0, len(batch) - 1 - site.axis)]
        return self.part(site, latent).reshape(*left, batch[-1], site.element.size)


def choose_plate(owner: str, trace: Trace, plate: str | None) -> str:
    """Name of the plate to amortize: the given, the only subsampled or the only one.

    Raises:
        ValueError: If there is none, or more than one, that holds latents.
        NotImplementedError: If a latent is in a sequential plate.
    """
    frames = latent_frames(owner, trace.iter_stochastic_nodes())
    named = ", ".join(map(repr, sorted(frames)))
    if not frames:
        raise ValueError(f"{owner} amortizes the latents of a plate; no plate of the model holds a "
                         "latent. Use AutoFlow(model).")
    if plate is not None:
        if plate not in frames:
            raise ValueError(f"{owner} expected `plate` to name a plate that holds latents "
                             f"({named}), got {plate!r}.")
        return plate
    subsampled = [name for name, frame in frames.items() if is_subsampled(frame)]
    for candidates in (subsampled, list(frames)):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            break
    raise ValueError(f"{owner} cannot tell which plate to amortize: {named} hold latents. "
                     f"Name it: {owner}(model, encoder, plate={sorted(candidates)[0]!r}).")


def latent_frames(owner: str, nodes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Frames of the plates of these sites, by name.

    Raises:
        NotImplementedError: If a plate is sequential.
    """
    frames = {}
    for name, node in nodes:
        for frame in node["cond_indep_stack"]:
            if not frame.vectorized:
                raise NotImplementedError(
                    f"{owner} needs vectorized plates; {name!r} is in the sequential plate "
                    f"{frame.name!r}. Write `with pyro.plate({frame.name!r}, size):`.")
            frames[frame.name] = frame
    return frames


def nodes_inside(trace: Trace, plate: str) -> list[dict[str, Any]]:
    """Latent nodes of a trace that are in the plate."""
    return [node for _, node in trace.iter_stochastic_nodes()
            if any(frame.name == plate for frame in node["cond_indep_stack"])]


def _frame(node: dict[str, Any], plate: str) -> Any:
    return next(frame for frame in node["cond_indep_stack"] if frame.name == plate)


def _local_site(owner: str, node: dict[str, Any], plate: str, start: int) -> LocalSite:
    fn, value, dim = node["fn"], node["value"], _frame(node, plate).dim
    axis = value.dim() - fn.event_dim + dim
    support = _of_one_element(owner, node["name"], fn.support, dim - fn.event_dim)
    one = value.select(axis, 0)
    with helpful_support_errors(node):
        unconstrained = biject_to(support).inv(one)
    plates = plate_names(node)
    element = LatentSite(
        name=node["name"], support=support, shape=one.shape,
        unconstrained_shape=unconstrained.shape, event_dim=fn.event_dim,
        plates=plates[:axis] + plates[axis + 1:], start=start)
    return LocalSite(element, axis, tuple(f.name for f in node["cond_indep_stack"]))


def _of_one_element(owner: str, site: str, support: Any, dim: int) -> Any:
    """The constraint without the dimension ``dim``, over which it must be the same."""
    changed = {}
    for key, value in getattr(support, "__dict__", {}).items():
        if isinstance(value, constraints.Constraint):
            changed[key] = _of_one_element(owner, site, value, dim)
        elif isinstance(value, Tensor) and value.dim() >= -dim:
            changed[key] = value.select(dim, 0)
            if not torch.equal(value, changed[key].unsqueeze(dim).expand_as(value)):
                raise ValueError(f"{owner} needs one support for all elements; that of {site!r} "
                                 f"({support}) differs between them. Draw the site from a fixed "
                                 "support and transform it, as by pyro.deterministic.")
    if all(value is support.__dict__[key] for key, value in changed.items()):
        return support
    reduced = copy.copy(support)
    reduced.__dict__.update(changed)
    return reduced


def _checked(owner: str, values: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in values:
        raise ValueError(f"{owner} expected `values` to hold every latent site, {name!r} is "
                         f"missing; got {sorted(values)}.")
    value = torch.as_tensor(values[name])
    if value.shape[max(0, value.dim() - len(shape)):] != shape:
        raise ValueError(f"{owner} expected site {name!r} of shape (*sample, "
                         f"{', '.join(map(str, shape))}), got {tuple(value.shape)}.")
    return value
