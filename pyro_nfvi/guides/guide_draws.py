"""Any Pyro guide, read as a distribution of the flat unconstrained latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_nfvi._random import forked_rng, map_random_or_loop
from pyro_nfvi._shapes import type_name
from pyro_nfvi.guides.layout import LatentLayout

CHUNK = 2000  # draws made at a time
WAY_OUT = "Pass the model and the arguments that the guide was fitted with."


def guide_name(guide: Any) -> str:
    """What a guide is called: a function by its name, an object by its class."""
    return str(getattr(guide, "__name__", type_name(guide)))


class GuideDraws:
    r"""Draws of a fitted Pyro guide on the flat latent, with their log densities.

    .. math:: \log q(z) = \log q(\text{values})
              + \textstyle\sum_{\text{sites}} \log|d\,\text{value}/dz|

    The guide runs once under ``torch.func.vmap`` for all draws; one that vmap cannot batch runs
    draw by draw. Whatever Pyro's ``SVI`` accepts will do: an ``AutoGuide``, a function, a
    module, an amortized guide at the rows it is given.

    Args:
        guide: The guide.
        layout: Latent sites of the model.
        args: Arguments of the guide and the model.
        kwargs: Likewise.

    Shape:
        z: ``(n, layout.size)``; log densities: ``(n,)``.

    Raises:
        ValueError: If the guide leaves out a latent site of the model, gives it another shape,
            or draws what the model does not have.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> layout = LatentLayout.from_trace(poutine.trace(model).get_trace())
        >>> z, log_q = GuideDraws(model, layout, (), {}).rsample_and_log_prob((5,))  # its own guide
        >>> torch.allclose(log_q, dist.Normal(0.0, 1.0).log_prob(z).squeeze(-1), atol=1e-5)
        True
    """

    def __init__(self, guide: Callable, layout: LatentLayout, args: tuple, kwargs: dict) -> None:
        self.guide, self.layout, self.args, self.kwargs = guide, layout, args, kwargs
        with torch.no_grad(), forked_rng():
            trace = self._trace()
        self._check(trace)
        latent = {site.name for site in layout}
        self.hidden = {name: tuple(node["value"].shape) for name, node
                       in trace.iter_stochastic_nodes()
                       if name not in latent and not site_is_subsample(node)}

    @torch.no_grad()
    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()
                             ) -> tuple[Tensor, Tensor]:
        """Draws, nan where a value is outside the model's support, and their log densities."""
        count = torch.Size(sample_shape).numel()
        with pyro.validation_enabled(False):
            parts = [self._draw(min(CHUNK, count - done)) for done in range(0, count, CHUNK)]
        z, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
        return z.reshape(*sample_shape, -1), log_q.reshape(sample_shape)

    @torch.no_grad()
    def log_prob(self, z: Tensor) -> Tensor:
        """Log densities ``(*sample,)`` of any points ``(*sample, layout.size)``.

        Raises:
            NotImplementedError: If the guide draws its latents by way of other numbers in a way
                that is not Pyro's.
        """
        flat = z.reshape(-1, self.layout.size)
        with pyro.validation_enabled(False):
            log_q: Tensor = map_random_or_loop(self._density, flat)
        return log_q.reshape(z.shape[:-1])

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        drawn: tuple[Tensor, Tensor] = map_random_or_loop(self._one, torch.empty(count, 0))
        return drawn

    def _one(self, row: Tensor) -> tuple[Tensor, Tensor]:
        trace = self._trace()
        z = self.layout.unconstrain({s.name: trace.nodes[s.name]["value"] for s in self.layout})
        return z, self._log_q(trace, z)

    def _density(self, z: Tensor) -> Tensor:
        guide = poutine.condition(self.guide, data=self._given(z))
        return self._log_q(poutine.block(poutine.trace(guide).get_trace)(
            *self.args, **self.kwargs), z)

    def _log_q(self, trace: Trace, z: Tensor) -> Tensor:
        for node in trace.nodes.values():  # densities without a minibatch's scale
            if node["type"] == "sample":
                node["scale"] = 1.0
        return trace.log_prob_sum() + self.layout.constrain(z)[1]

    def _given(self, z: Tensor) -> dict[str, Tensor]:
        """Values of what the guide draws, if the latents are at ``z``."""
        values, parts = self.layout.constrain(z)[0], self.layout.split(z)
        if not self.hidden:
            return values
        if list(self.hidden.values()) == [(self.layout.size,)]:
            return {next(iter(self.hidden)): z}
        by_site = {f"{name}_unconstrained": part for name, part in parts.items()}
        if {name: tuple(part.shape) for name, part in by_site.items()} == self.hidden:
            return by_site
        raise NotImplementedError(f"{guide_name(self.guide)} gives densities of its own draws "
                                  "only; an AutoFlow knows the density of any value.")

    def _trace(self) -> Trace:
        return poutine.block(poutine.trace(self.guide).get_trace)(*self.args, **self.kwargs)

    def _check(self, trace: Trace) -> None:
        """Whether these are the sites of the model."""
        name = guide_name(self.guide)
        for site in self.layout:
            if site.name not in trace.nodes:
                raise ValueError(f"{name} is not a guide for this model: it draws no "
                                 f"{site.name!r}. {WAY_OUT}")
            shape = tuple(trace.nodes[site.name]["value"].shape)
            if shape != tuple(site.shape):
                raise ValueError(f"{name} does not fit this model and data: it draws {site.name!r} "
                                 f"of shape {shape}, the model {tuple(site.shape)}. {WAY_OUT}")
        _check_surplus(name, self.layout, trace, isinstance(self.guide, AutoGuide))


def _check_surplus(name: str, layout: LatentLayout, trace: Trace, automatic: bool) -> None:
    """Refuse sites that the model does not have, if they leave the guide's density unknown.

    Where all latents are functions of one auxiliary vector of as many numbers, as in Pyro's own
    guides, the density is that of the vector.
    """
    latent = {site.name for site in layout}
    surplus = {key: node for key, node in trace.iter_stochastic_nodes()
               if key not in latent and not site_is_subsample(node)}
    if not surplus:
        return
    hidden = all(node["infer"].get("is_auxiliary") for node in surplus.values())
    functions = all(_is_delta(trace.nodes[key]["fn"]) for key in latent)
    size = sum(node["value"].numel() for node in surplus.values())
    if not hidden or (not automatic and not (functions and size == layout.size)):
        raise ValueError(f"{name} draws {min(surplus)!r}, which the model does not have; the "
                         f"density of its latents is unknown. {WAY_OUT}")


def _is_delta(distribution: Any) -> bool:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)
