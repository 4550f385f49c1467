"""From simulated data to draws of a posterior: by a refit, or by an amortized guide."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_nfvi._random import map_random_or_loop
from pyro_nfvi._shapes import type_name
from pyro_nfvi.calibration.simulation import OWNER, SimulatedModel, Values
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference.parallel import fresh_process


@dataclass(frozen=True, eq=False)
class Amortized:
    """A trained guide that reads the data: nothing is fitted."""

    guide: Callable

    def __call__(self, data: Values, args: tuple, kwargs: dict) -> Any:
        """The guide itself."""
        return self.guide

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """The guide in eval mode."""
        modules = list(self.guide.modules()) if isinstance(self.guide, nn.Module) else []
        modes = [module.training for module in modules]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


@dataclass(frozen=True, eq=False)
class Refit:
    """A function that fits a model.

    Attributes:
        function: Function of a model and its arguments that returns what was fitted.
        model: The model.
    """

    function: Callable
    model: Callable

    def __call__(self, data: Values, args: tuple, kwargs: dict) -> Any:
        """Fit the model to these data."""
        return self.function(SimulatedModel(self.model, data), *args, **kwargs)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """An empty param store, and one thread, whatever process this is."""
        with fresh_process():
            yield


class _Run:
    """Calls ``run`` of a copy of NFVI, or the like, with another model.

    It has no seed, as draws of one seed would be the same noise each time, no progress bar, no
    checkpoints, as those of another simulation are of another fit, and no other processes to share
    the fit with, as these may be at another simulation.

    Args:
        fit: The object, which stays as it is.
    """

    def __init__(self, fit: Any) -> None:
        self.fit = copy.copy(fit)
        guide = getattr(fit, "guide", None)
        self.guide_model = None if guide is None else guide.model  # left out of a pickled guide

    def __call__(self, model: SimulatedModel, *args: Any, **kwargs: Any) -> Any:
        fit = copy.copy(self.fit)
        fit.model = model
        for name, value in (("seed", None), ("progress", False), ("checkpoint", None),
                            ("distributed", None)):
            if hasattr(fit, name):
                setattr(fit, name, value)
        if self.guide_model is not None:
            fit.guide = copy.deepcopy(fit.guide)
            fit.guide._model = (SimulatedModel(self.guide_model, model.data),)
        return fit.run(*args, **kwargs)


def as_refit(fit: Any, model: Callable, amortized: bool | None) -> Amortized | Refit:
    """What a user passes as ``fit``, as a function of simulated data and arguments.

    Raises:
        ValueError: If it is none of the kinds.
    """
    if isinstance(fit, AutoFlow):
        raise ValueError(f"{OWNER} expected `fit` to be an amortized guide, got {type_name(fit)}, "
                         "which does not read data. Let it be fitted: NFVI(model, guide).")
    if amortized or (amortized is None and isinstance(fit, nn.Module)):
        if not callable(fit):
            raise ValueError(f"{OWNER} expected an amortized guide to be callable, got "
                             f"{type_name(fit)}.")
        return Amortized(fit)
    if hasattr(fit, "run") and callable(getattr(fit, "model", None)):
        return Refit(_Run(fit), fit.model)
    if not callable(fit):
        raise ValueError(
            f"{OWNER} expected `fit` to be NFVI(model), a trained amortized guide, or a function "
            f"of a model and its arguments that fits it, got {type_name(fit)}. For MCMC: a "
            "function that runs it and returns get_samples().")
    return Refit(fit, model)


# ------------------------------------------------------------------ draws

@torch.no_grad()
def posterior_draws(posterior: Any, names: Mapping[str, Any], num_draws: int, args: tuple,
                    kwargs: dict, weighted: bool = False) -> Values:
    """Draws ``(num_draws, *shape)`` of a posterior, by site.

    Args:
        posterior: A :class:`~pyro_nfvi.Posterior`, any Pyro guide, or draws by site.
        names: Sites to draw.
        num_draws: Number of draws; of more that are given, so many evenly spaced ones.
        args: Arguments of the model, which a guide gets.
        kwargs: Likewise.
        weighted: Whether to take the draws of a Posterior by their importance weights.

    Raises:
        ValueError: If it is of another kind, or there are no such draws.
    """
    drawn = _drawn(posterior, names, num_draws, args, kwargs, weighted)
    for name in names:
        if name not in drawn:
            raise ValueError(f"the fit has no draws of {name!r}; choose others: sites=[...]")
    return {name: _thinned(name, torch.as_tensor(drawn[name]), num_draws) for name in names}


def _drawn(posterior: Any, names: Mapping[str, Any], num_draws: int, args: tuple, kwargs: dict,
           weighted: bool) -> Mapping[str, Any]:
    if weighted:
        if not hasattr(posterior, "resample"):
            raise ValueError(f"weighted draws are those of a Posterior, got {type_name(posterior)}")
        return dict(posterior.resample(num_draws))
    if isinstance(posterior, Mapping):
        return posterior
    if hasattr(posterior, "sample_posterior"):
        if _takes_arguments(posterior.sample_posterior):
            return dict(posterior.sample_posterior(num_draws, *args, **kwargs))
        return dict(posterior.sample_posterior(num_draws))
    if hasattr(posterior, "sample"):
        return dict(posterior.sample(num_draws))
    if callable(posterior):
        return _draws_of_guide(posterior, names, num_draws, args, kwargs)
    raise ValueError("the fit is expected to give a Posterior, a Pyro guide, or a dict of draws, "
                     f"got {type_name(posterior)}")


def _takes_arguments(method: Callable) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(method).parameters.values())


def _draws_of_guide(guide: Callable, names: Mapping[str, Any], num_draws: int, args: tuple,
                    kwargs: dict) -> Values:
    """All draws by one run of the guide under vmap; draw by draw where vmap cannot."""
    def one(_: Tensor) -> Values:
        trace = poutine.block(poutine.trace(guide).get_trace)(*args, **kwargs)
        return {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}
    blank = torch.empty(num_draws, 0)
    with pyro.validation_enabled(False):  # checks read values, which a batch does not have
        drawn: Values = map_random_or_loop(one, blank)
    return drawn


def _thinned(name: str, draws: Tensor, num_draws: int) -> Tensor:
    if draws.dim() == 0 or len(draws) < num_draws:
        raise ValueError(f"the fit is expected to give {num_draws} draws of {name!r}, got shape "
                         f"{tuple(draws.shape)}; ask for fewer: num_draws")
    places = torch.arange(num_draws, device=draws.device) * len(draws) // num_draws
    return draws[places]
