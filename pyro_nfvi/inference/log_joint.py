"""A Pyro model as one batched function of the flat unconstrained latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_nfvi._random import forked_rng, one_by_one
from pyro_nfvi._shapes import check_tensor
from pyro_nfvi.guides.layout import LatentLayout
from pyro_nfvi.guides.prototype import is_subsampled
from pyro_nfvi.inference.factors import FactorsOrNan


class LogJoint:
    r"""Log joint density of a model and its data, over a batch of latents at once.

    .. math:: z \mapsto \log p(x, \text{values}(z))
              + \textstyle\sum_{\text{sites}} \log|d\,\text{value}/dz|

    The model runs once under ``torch.func.vmap`` for all particles, written as it is: it needs
    no room for a particle dimension. A model that vmap cannot batch (Python control flow on a
    latent, say) runs particle by particle; ``reason`` says why. A subsampled plate draws one
    minibatch for all particles.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: Its latent sites.
        dtype: Default dtype while the model runs. Default: torch's own.

    Shape:
        z: ``(*particles, layout.size)``; result: ``(*particles,)``.

    Attributes:
        batched: Whether one run serves all particles.
        reason: Why not, or an empty string.
        num_rows: Number of rows, if they come from a loader.
        all_at_once: Whether it is best asked about all latents at once, and takes them part by part
            itself.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.tensor(0.3)
        >>> layout = LatentLayout.from_trace(poutine.trace(model).get_trace(y))
        >>> LogJoint(model, (y,), {}, layout)(torch.zeros(7, 1)).shape
        torch.Size([7])
    """

    all_at_once = False
    num_rows: int | None = None

    def __init__(self, model: Callable, args: tuple, kwargs: dict, layout: LatentLayout,
                 dtype: torch.dtype | None = None) -> None:
        self.model, self.args, self.kwargs, self.layout = model, args, kwargs, layout
        self.dtype = dtype
        self.batched, self.reason = True, ""

    @property
    def given(self) -> tuple[Callable, tuple, dict]:
        """The user's model and arguments, without those of a minibatch."""
        return self.model, self.args, self.kwargs

    def of_set_rows(self) -> LogJoint | None:
        """That of some rows of a loader, always the same; None if it has an order of its own."""
        return self

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint density of every particle."""
        z = check_tensor("LogJoint", "z", z, self.layout.size)
        flat = z.reshape(-1, self.layout.size)
        return self._map(self._log_density, flat).reshape(z.shape[:-1])

    @torch.no_grad()
    def try_batched(self, z: Tensor) -> None:
        """Find out, on a few particles, whether one batched run gives what single runs give."""
        def seeded(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
            with forked_rng(0):  # models that draw latents of their own, or rows, draw the same
                return function(points)
        with self.surroundings():
            single = torch.stack([seeded(self._log_density, row) for row in z])
        try:
            batched = seeded(self, z)
        except RuntimeError as error:
            self.batched, self.reason = False, str(error).splitlines()[0]
            return
        same = torch.allclose(single, batched, rtol=1e-3, atol=1e-3, equal_nan=True)
        if not same and not self.subsamples(z[0]):
            self.batched, self.reason = False, "batched and single runs of the model differ"

    def trace(self, z: Tensor) -> Trace:
        """Trace of the model at one point ``(layout.size,)``."""
        return self._trace_at(self.layout.constrain(z)[0])

    def _trace_at(self, values: dict[str, Tensor]) -> Trace:
        conditioned = poutine.condition(self.model, data=values)
        return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)

    def prior_draw(self) -> Tensor | None:
        """One draw of all latents from their priors; None if some prior cannot be drawn from."""
        try:
            with self.surroundings(), torch.no_grad():
                nodes = poutine.trace(self.model).get_trace(*self.args, **self.kwargs).nodes
                return self.layout.pack({site.name: nodes[site.name]["value"]
                                         for site in self.layout})
        except (NotImplementedError, ValueError, RuntimeError):  # improper, or on the edge
            return None

    def parameters(self, z: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of the model's own ``pyro.param`` statements, by name."""
        with self.surroundings():
            nodes = self.trace(z).nodes
        return {name: node["value"].unconstrained() for name, node in nodes.items()
                if node["type"] == "param"}

    def deterministic(self, z: Tensor) -> dict[str, Tensor]:
        """Values ``(num_points, *shape)`` of the model's deterministic sites."""
        def values(row: Tensor) -> dict[str, Tensor]:
            return {name: node["value"] for name, node in self.trace(row).nodes.items()
                    if is_deterministic(node)}
        return self._map(values, z)

    def first_bad_site(self, z: Tensor) -> str:
        """Name the first site whose value or log-density at ``z`` is not finite."""
        values, _ = self.layout.constrain(z)
        with self.surroundings(), torch.no_grad():
            trace = self._trace_at(values)
            trace.compute_log_prob()
        name = first_bad(trace)
        if name is None:
            return "none alone: their sum overflows"
        return f"{name!r} ({_shown(values[name]) if name in values else 'observed'})"

    def _log_density(self, z: Tensor) -> Tensor:
        values, log_det = self.layout.constrain(z)
        return self._trace_at(values).log_prob_sum() + log_det

    def _map(self, function: Callable[[Tensor], Any], rows: Tensor) -> Any:
        """Apply a function of one point to all of them, at once if the model allows."""
        with self.surroundings():
            if self.batched:
                return torch.func.vmap(function, randomness="same")(rows)
            return one_by_one(function, rows)

    def subsamples(self, z: Tensor) -> bool:
        """Whether the model draws minibatches, and so differs from run to run."""
        with self.surroundings():
            nodes = self.trace(z).nodes.values()
        return any(is_subsampled(frame) for node in nodes if node["type"] == "sample"
                   for frame in node["cond_indep_stack"])

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """The model's surroundings: its dtype, and no checks of arguments or of factors.

        Checks read values, which a batch does not have.
        """
        with default_dtype(self.dtype), pyro.validation_enabled(False), FactorsOrNan():
            yield


def is_deterministic(node: dict[str, Any]) -> bool:
    """Whether a node of a trace follows from others.

    It is a ``pyro.deterministic`` statement, or a reparametrized site, which Pyro turns into an
    observed point mass.
    """
    if node["type"] != "sample":
        return False
    distribution = node["fn"]
    point = isinstance(getattr(distribution, "base_dist", None), dist.Delta)
    hidden = point and getattr(distribution, "_mask", None) is False
    return bool(node["infer"].get("_deterministic")) or (node["is_observed"] and hidden)


def is_data(node: dict[str, Any]) -> bool:
    """Whether a node is a tensor the user observed: no deterministic site, factor or minibatch."""
    return (node["type"] == "sample" and node["is_observed"] and not is_deterministic(node)
            and not site_is_subsample(node) and not site_is_factor(node)
            and torch.is_tensor(node["value"]))


def converted(values: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    """Arguments of a model with their tensors of this floating-point type, on this device."""
    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype=dtype if value.is_floating_point() else None, device=device)
    return tree_map(convert, values)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Make ``dtype`` torch's default inside, and put the old one back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def first_bad(trace: Trace) -> str | None:
    """Name of the first site of a scored trace whose log-density is not finite."""
    return next((name for name, node in trace.nodes.items()
                 if node["type"] == "sample" and not _finite(node["log_prob"])), None)


def _finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _shown(value: Tensor) -> str:
    bad = value[~value.isfinite()] if not _finite(value) else value
    return f"value {bad.flatten()[0].item():.4g}"
