"""NFVI: from a model and its data to a posterior, in one call."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import (
    check_positive_float,
    check_positive_int,
    check_seconds,
    check_seed,
    type_name,
)
from pyro_nfvi.engine import check_tier
from pyro_nfvi.flows import auto
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference import ELBO, History, LogJoint
from pyro_nfvi.inference.checks import check_data, check_sites
from pyro_nfvi.inference.log_joint import default_dtype, first_bad
from pyro_nfvi.inference.stages import Options, Stages
from pyro_nfvi.posterior import Posterior


class NFVI:
    r"""Variational inference with a normalizing flow, used as ``MCMC(NUTS(model))`` is.

    .. math:: \max_\phi\ \mathbb E_{q_\phi}\left[\log p(x, z) - \log q_\phi(z)\right]

    As little as will do, as much as it takes: first Gaussians, found from many starts by
    Pathfinder and batch and match, with heavier tails if the weights ask for them; then the
    flow inside the Gaussian's coordinates, by Adam along the path gradient until the ELBO is
    flat; then the flow with more particles. The fit ends after the first stage whose draws
    pass: k-hat below 0.5, effective draws above 60%, and short Hamiltonian chains that stay.

    Args:
        model: A Pyro model whose latents are continuous.
        guide: An :class:`~pyro_nfvi.AutoFlow` to fit; one that is already trained goes on from
            where it is, with one stage of the flow. Default: the recipe
            :func:`~pyro_nfvi.flows.auto`.
        objective: What to maximise. Default: the ELBO by its path gradient.
        num_particles: Draws of each step.
        num_steps: Largest number of steps of a stage.
        lr: Largest learning rate of the flow.
        max_seconds: Time for the fit. A stage lets its rate fall before it is up, and ends with
            it.
        seed: Makes the run reproducible, and leaves the global random state as it was. Default:
            the global random state.
        dtype: Floating-point type of the fit; floating-point arguments are converted to it.
            Default: double precision on a CPU, unless the model holds tensors of another type
            that do not mix; elsewhere the model's own.
        device: Where to run; tensor arguments are moved there. Default: where they are.
        compile: How the steps are computed: ``"auto"`` takes the fastest way that works, and
            :attr:`Posterior.engine` says which; ``"eager"`` runs the model as it is, step by
            step, for a debugger, say. The others are ``"c"`` (generated C code), ``"inductor"``,
            ``"cuda_graph"`` and ``"fx"``.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If an argument is of another kind.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = NFVI(model, num_steps=300, seed=0, progress=False).run(torch.ones(20))
        >>> bool(abs(posterior.resample(4000)["mu"].mean() - 1) < 0.05)
        True

    References:
        Agrawal, Sheldon & Domke (2020), Advances in Black-Box VI, arXiv:2006.10343.
    """

    def __init__(self, model: Callable, guide: AutoFlow | None = None, *,
                 objective: Callable | None = None, num_particles: int = 256,
                 num_steps: int = 3000, lr: float = 0.03,
                 max_seconds: float = math.inf, seed: int | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 compile: str = "auto", progress: bool = True) -> None:
        self.model, self.guide = _checked_model(model), _checked_guide(guide)
        self.objective = ELBO() if objective is None else _checked_objective(objective)
        self.num_particles = check_positive_int("NFVI", "num_particles", num_particles)
        self.num_steps = check_positive_int("NFVI", "num_steps", num_steps)
        self.lr = check_positive_float("NFVI", "lr", lr)
        self.max_seconds = check_seconds("NFVI", "max_seconds", max_seconds)
        self.seed, self.dtype = check_seed("NFVI", seed), _checked_dtype(dtype)
        self.device, self.compile = _checked_device(device), check_tier("NFVI", compile)
        self.progress = progress

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit the model to these arguments.

        Ctrl-C ends the fit early and returns the posterior so far, with a warning.

        Returns:
            The posterior.

        Raises:
            ValueError: If the guide cannot handle the model, an observed value is NaN, or the
                log joint is not finite at the start.
        """
        random_state = nullcontext() if self.seed is None else forked_rng(self.seed)
        refit = self._refit(args, kwargs)
        with random_state:
            guide, fresh, log_joint = self._prepared(args, kwargs)
            with default_dtype(log_joint.dtype):
                stages = Stages(guide, log_joint, self._options())
                whole = fresh and not guide._flow().base.periodic  # no Gaussian fits a circle
                stages.run() if whole else stages.go_on()
                posterior = Posterior(guide, log_joint, stages.history, stages.sample, refit)
                with suppress(KeyboardInterrupt):  # draws can wait, a fit must not be lost
                    _ = posterior.draws  # while the seed holds
        _warn(stages.history)
        return posterior

    def _refit(self, args: tuple, kwargs: dict) -> Callable[[int], Posterior] | None:
        """The same fit from another seed, unless the guide has been trained before."""
        if self.guide is not None and not self.guide.untouched:
            return None
        template = copy.copy(self)
        template.guide, template.progress = copy.deepcopy(self.guide), False
        return partial(_fit_again, template, args, kwargs)

    def _prepared(self, args: tuple, kwargs: dict) -> tuple[AutoFlow, bool, LogJoint]:
        """The guide, whether it is new, and the log joint, in the type of the fit.

        That is double precision on a CPU, unless the model holds on to another.
        """
        guide = self.guide or AutoFlow(self.model, auto)
        fresh = guide.untouched
        if self.dtype is not None or not self._on_cpu(args, kwargs):
            return guide, fresh, self._set_up(guide, args, kwargs, self.dtype)
        dtype = torch.float64 if fresh else guide._flow().base.zeros.dtype
        store, built = pyro.get_param_store(), guide.prototype_trace is not None
        known = set(store)
        try:
            return guide, fresh, self._set_up(guide, args, kwargs, dtype)
        except RuntimeError:  # single precision inside the model, or an error it has anyway
            if not built:
                guide.prototype_trace = None
            for name in set(store) - known:  # made in the wrong type
                del store[name]
        return guide, fresh, self._set_up(guide, args, kwargs, None)

    def _on_cpu(self, args: tuple, kwargs: dict) -> bool:
        """Whether the fit runs on a CPU."""
        if self.device is not None:
            return self.device.type == "cpu"
        return all(leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs))
                   if isinstance(leaf, Tensor))

    def _set_up(self, guide: AutoFlow, args: tuple, kwargs: dict, dtype: torch.dtype | None
                ) -> LogJoint:
        args, kwargs = self._converted(args, dtype), self._converted(kwargs, dtype)
        with default_dtype(dtype):
            try:
                guide.setup(*args, **kwargs).to(dtype=dtype, device=self.device)
            except ValueError as error:
                _blame(guide, args, kwargs, error)
            return self._log_joint(guide, args, kwargs, dtype)

    def _options(self) -> Options:
        deadline = time.monotonic() + self.max_seconds
        return Options(self.objective, self.num_particles, self.num_steps, self.lr, self.compile,
                       self.progress, deadline)

    def _log_joint(self, guide: AutoFlow, args: tuple, kwargs: dict, dtype: torch.dtype | None
                   ) -> LogJoint:
        log_joint = LogJoint(self.model, args, kwargs, guide.layout, dtype)
        z = guide._flow().rsample_and_log_prob((2,))[0].detach()
        check_sites("NFVI", log_joint)
        check_data("NFVI", log_joint, z[0])
        log_joint.try_batched(z)
        if not log_joint.batched:
            warnings.warn(f"NFVI runs the model once for each of {self.num_particles} particles, "
                          f"which is slow: {log_joint.reason}", stacklevel=5)
        return log_joint

    def _converted(self, values: Any, dtype: torch.dtype | None) -> Any:
        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(dtype=dtype if value.is_floating_point() else None,
                            device=self.device)
        return tree_map(convert, values)


def _fit_again(template: NFVI, args: tuple, kwargs: dict, seed: int) -> Posterior:
    again = copy.copy(template)
    again.guide, again.seed = copy.deepcopy(template.guide), seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first fit has said it
        return again.run(*args, **kwargs)


def _blame(guide: AutoFlow, args: tuple, kwargs: dict, error: ValueError) -> None:
    """Name the site that is not finite where the guide would start, if that is the error."""
    with suppress(Exception), pyro.validation_enabled(False), forked_rng():
        trace = poutine.trace(guide.model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        if (name := first_bad(trace)) is not None:
            error = ValueError(f"NFVI: the log joint is not finite at the start; first bad site "
                               f"{name!r}. Start elsewhere: AutoFlow(model, init_loc_fn=..., "
                               "init_scale=...).")
    raise error


def _warn(history: History) -> None:
    if history.interrupted:
        warnings.warn(f"NFVI was interrupted after {len(history.elbo)} steps; this is the "
                      "posterior so far.", stacklevel=3)
    if history.stopped:
        warnings.warn(f"NFVI: {history.stopped}.", stacklevel=3)


def _checked_model(model: Any) -> Callable:
    if not callable(model):
        raise ValueError(f"NFVI expected `model` to be a Pyro model, a function, got "
                         f"{type_name(model)}.")
    checked: Callable = model
    return checked


def _checked_guide(guide: Any) -> AutoFlow | None:
    if guide is not None and not isinstance(guide, AutoFlow):
        what = guide.__name__ if isinstance(guide, type) else type_name(guide)
        raise ValueError(f"NFVI expected `guide` to be an AutoFlow such as AutoIAF(model), got "
                         f"{what}. Fit other guides with pyro.infer.SVI.")
    return guide


def _checked_objective(objective: Any) -> Callable:
    if not callable(objective) or isinstance(objective, (type, pyro.infer.ELBO)):
        raise ValueError(f"NFVI expected `objective` to be one such as ELBO(), got {objective!r}.")
    checked: Callable = objective
    return checked


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"NFVI expected `dtype` to be a floating-point torch.dtype such as "
                         f"torch.float64, got {dtype!r}.")
    return dtype


def _checked_device(device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"NFVI expected `device` to be a torch.device such as 'cuda', got "
                         f"{device!r}.") from None

