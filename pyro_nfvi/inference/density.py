"""A flow fitted to data, or to an unnormalised density, as a distribution."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import (
    check_flag,
    check_positive_float,
    check_positive_int,
    check_seconds,
    check_seed,
    type_name,
)
from pyro_nfvi.engine import check_tier
from pyro_nfvi.flows import Bijection, Flow
from pyro_nfvi.guides.pyro_dist import ConstantFlow
from pyro_nfvi.inference.checkpoint import Checkpoint
from pyro_nfvi.inference.density_data import (
    Rows,
    as_rows,
    checked_samples,
    concerns_about,
    held_out_rows,
)
from pyro_nfvi.inference.density_loops import DensityHistory, DensityLoop, LikelihoodLoop
from pyro_nfvi.inference.density_start import data_start, density_start
from pyro_nfvi.inference.identity import described, sampled
from pyro_nfvi.inference.importance import NUM_SAMPLES, ImportanceSample, importance_sample
from pyro_nfvi.inference.kept import keeping, way_on
from pyro_nfvi.inference.log_density import NUM_COMPARED, LogDensity, shown
from pyro_nfvi.inference.loop import Stage
from pyro_nfvi.inference.objectives import ELBO

NUM_PROBES = 100  # points at which a log density is tried
MAX_PARETO_K = 0.7  # above, the draws miss part of the density
MAX_EXCESS = 3.0  # nats by which the density may exceed the flow's at a mode


class FittedFlow(ConstantFlow):
    """A flow that was fitted: a Pyro distribution, with the story of its fit.

    Use it as a prior, ``pyro.sample("z", fitted)``, or as a likelihood,
    ``pyro.sample("x", fitted.condition(c), obs=x)``; in plates it is expanded as any other.
    ``fitted.flow`` is the :class:`~pyro_nfvi.flows.Flow`, with frozen parameters.

    Args:
        flow: The flow.
        context: Contexts, or None.
        batch_shape: Shape of the batch of independent copies.
        history: What happened during the fit.

    Example:
        >>> from pyro_nfvi.flows import planar
        >>> fitted = FittedFlow(Flow(planar(2)))
        >>> fitted.sample((3,)).shape, fitted.expand([4]).batch_shape
        (torch.Size([3, 2]), torch.Size([4]))
    """

    def __init__(self, flow: Flow, context: Tensor | None = None, batch_shape: Any = None,
                 validate_args: bool | None = None, history: DensityHistory | None = None) -> None:
        super().__init__(flow, context, batch_shape, validate_args)
        self.history = DensityHistory() if history is None else history

    def _like(self, flow: Flow, context: Tensor | None, batch_shape: Any) -> FittedFlow:
        return type(self)(flow, context, batch_shape, self._validate_args, self.history)

    def plot(self, ax: Any = None) -> Any:
        """Plot the fit over its steps; returns matplotlib axes."""
        return self.history.plot(ax)

    def __repr__(self) -> str:
        given = f", given {self.flow.context_dim}" if self.flow.context_dim else ""
        return (f"FittedFlow({self.flow.input_dim} coordinates{given}, batch_shape="
                f"{tuple(self.batch_shape)}, {self.history!r})")


def fit_density(flow: Flow | Bijection | FittedFlow | Callable[..., Bijection], *,
                samples: Any = None, context: Any = None,
                log_density: Callable[[Tensor], Tensor] | None = None,
                validation: Any = 0.1, patience: int = 10, batch_size: int = 256,
                standardize: bool = True, objective: Callable | None = None,
                num_particles: int = 256, annealing: float = 0.5, num_steps: int = 3000,
                lr: float = 0.02, max_seconds: float = math.inf, seed: int | None = None,
                dtype: torch.dtype | None = None, compile: str = "auto", progress: bool = True,
                checkpoint: Checkpoint | str | PathLike | None = None) -> FittedFlow:
    r"""Fit a flow to data by maximum likelihood, or to a density by reverse Kullback-Leibler.

    .. math:: \max_\phi\ \textstyle\sum_n \log q_\phi(x_n \mid c_n) \qquad\text{or}\qquad
              \min_\phi\ \mathbb E_{q_\phi}\left[\log q_\phi(z) - \log \tilde p(z)\right]

    The flow that is passed stays as it is: a copy is trained, from coordinates in which the data
    or the density have zero mean and unit covariance, unless the flow fits better as it is (one
    that is trained goes on from where it is). Ctrl-C ends the fit with the best so far.

    With data, the rate falls after half of the steps. Once the likelihood of held-out rows has not
    risen for ``patience`` checks, of 50 steps or more, the fit goes back to the best and on at a
    third of the rate, three times at most; the best is what is returned. A flow whose inverse is a
    root to be found, such as :func:`~pyro_nfvi.planar`, learns from data much faster when it is
    turned round: ``Inverse(planar(2))``.

    With a density, the fit goes through its powers, from nearly flat to the density itself, so
    that no mode is lost before it is found.

    Args:
        flow: A flow; a bijection, for one on Gaussian noise; a fitted flow to go on with, all of
            it thawed; or, with data, a recipe such as :func:`~pyro_nfvi.nsf`.
        samples: Data ``(num_rows, input_dim)``, a tensor or an array.
        context: Contexts ``(num_rows, context_dim)`` of a conditional flow.
        log_density: Log of a density up to a constant, a function of points
            ``(n, input_dim) -> (n,)`` or of one point ``(input_dim,) -> ()``.
        validation: Fraction of the rows to hold out, 10,000 at most; or held-out samples, with
            their contexts as a pair; None for none.
        patience: Checks without a better held-out likelihood until the fit goes back to the best.
        batch_size: Rows of each step.
        standardize: Whether data are standardized first.
        objective: What is maximised with ``log_density``. Default: the ELBO by its path gradient.
        num_particles: Draws of each step with ``log_density``.
        annealing: Fraction of the steps with ``log_density`` in which its power rises from 0.01
            to 1; 0 for none.
        num_steps: Largest number of steps.
        lr: Largest learning rate.
        max_seconds: Time for the steps; the rate falls before it is up.
        seed: Makes the fit reproducible, and leaves the global random state as it was. Default:
            the global random state.
        dtype: Floating-point type of the fit. Default: the flow's own.
        compile: How the steps are computed: ``"auto"`` or one of
            :data:`pyro_nfvi.engine.TIERS`.
        progress: Whether to show a progress bar.
        checkpoint: Folder in which to keep the state of the fit, every minute and when a signal
            ends it; :class:`~pyro_nfvi.Checkpoint` sets how often. The same call, run again, goes
            on from there, bit for bit on the same machine; once the fit is complete it returns
            without a step what was found. Default: nothing is kept.

    Returns:
        The fitted flow, a Pyro distribution.

    Raises:
        ValueError: If there are neither samples nor a log density, or both, if data are bad,
            an option is of another kind, or the checkpoints are of another fit.

    Example:
        >>> from pyro_nfvi.flows import nsf
        >>> x = 5 + torch.randn(1000, 1).abs() * torch.tensor([1.0, -2.0])
        >>> fitted = fit_density(nsf(2), samples=x, num_steps=50, seed=0, progress=False)
        >>> fitted.sample((3,)).shape, fitted.log_prob(x).shape
        (torch.Size([3, 2]), torch.Size([1000]))

    References:
        Papamakarios et al. (2021), Normalizing Flows for Probabilistic Modeling and Inference,
        arXiv:1912.02762, section 2.3; Rezende & Mohamed (2015), arXiv:1505.05770, section 6.1
        (annealing).
    """
    _check_options(num_steps=num_steps, patience=patience, batch_size=batch_size,
                   num_particles=num_particles)
    check_positive_float("fit_density", "lr", lr)
    deadline = time.monotonic() + check_seconds("fit_density", "max_seconds", max_seconds)
    check_seed("fit_density", seed)
    check_flag("fit_density", "progress", progress)
    check_flag("fit_density", "standardize", standardize)
    options: dict[str, Any] = {
        "num_steps": num_steps, "lr": lr, "progress": progress, "deadline": deadline,
        "compile": check_tier("fit_density", compile)}
    checkpoint = Checkpoint.of("fit_density", checkpoint)
    if (samples is None) == (log_density is None):
        raise ValueError("fit_density expected either `samples` or `log_density`, got "
                         f"{'neither' if samples is None else 'both'}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("fit_density needs gradients, which torch.inference_mode() forbids. Call "
                         "it outside.")
    same = {"the kinds of fit": "samples" if log_density is None else "log_density",
            "`num_steps`": num_steps, "`lr`": lr, "`seed`": seed, "`patience`": patience,
            "`batch_size`": batch_size, "`standardize`": standardize,
            "`num_particles`": num_particles, "`annealing`": annealing,
            "the fitted flows": sampled(parameters_to_vector(flow.flow.parameters()))
            if isinstance(flow, FittedFlow) else None}
    keep = partial(_keeping, checkpoint, same)
    with forked_rng(seed) if seed is not None else nullcontext(), torch.enable_grad():
        if log_density is not None:
            _refuse_context(context)
            fitted, history = _fit_to_density(
                partial(_copied, flow, None, 0, dtype), log_density, keep,
                _checked_objective(objective), num_particles=num_particles,
                annealing=_checked_annealing(annealing, num_steps), **options)
        else:
            x = as_rows("samples", samples)
            c = None if context is None else as_rows("context", context)
            size = 0 if c is None else c.shape[-1]
            fitted, history = _fit_to_samples(
                partial(_copied, flow, x.shape[-1], size, dtype), x, c, validation, keep,
                batch_size=batch_size, patience=patience, standardize=standardize, **options)
    _warn(history, checkpoint)
    return FittedFlow(fitted, history=history)


def _keeping(checkpoint: Checkpoint | None, same: Mapping[str, Any], flow: Callable[[], Flow],
             identity: Callable[[Flow], Mapping[str, Any]]) -> AbstractContextManager:
    """Keep a fit of this flow to what the identity tells from others."""
    def whole() -> dict[str, Any]:
        with forked_rng(0):
            own = flow()
            return {**same, "the flows": described(own), **identity(own)}
    return keeping(checkpoint, "fit_density", whole)


def _fit_to_samples(flow: Callable[[], Flow], x: Tensor, context: Tensor | None, validation: Any,
                    keep: Callable, *, batch_size: int, patience: int, standardize: bool,
                    **options: Any) -> tuple[Flow, DensityHistory]:
    def parts(flow: Flow) -> tuple[Rows, Rows | None]:
        return held_out_rows(flow, checked_samples(flow, x, context), validation)

    def identity(flow: Flow) -> dict[str, Any]:
        held_out = parts(flow)[1] or (None, None)
        return {"`samples.shape`": list(x.shape), "the samples": sampled(x),
                "the contexts": sampled(context), "the held-out rows": sampled(held_out[0]),
                "the held-out contexts": sampled(held_out[1])}
    with keep(flow, identity) as kept:
        own = flow()
        rows, held_out = parts(own)
        start = data_start(own, *rows, standardize=standardize)
        loop = LikelihoodLoop(start, rows, held_out, batch_size=batch_size, patience=patience,
                              **options, **kept)
        _run(start, loop)
        if not loop.complete:
            loop.history.concerns += concerns_about(x)
        loop.finish()
    return start, loop.history


def _fit_to_density(flow: Callable[[], Flow], function: Callable[[Tensor], Tensor],
                    keep: Callable, objective: Callable, *, num_particles: int, **options: Any
                    ) -> tuple[Flow, DensityHistory]:
    def identity(flow: Flow) -> dict[str, Any]:
        points = torch.randn(NUM_COMPARED, flow.input_dim).to(flow.base.zeros)
        return {"`objective`": described(objective),
                "the log densities": sampled(_log_density(flow, function)(points))}
    with keep(flow, identity) as kept:
        own = flow()
        log_density = _log_density(own, function)
        if log_density.reason:
            warnings.warn(f"fit_density calls `log_density` once for each of {num_particles} "
                          f"particles, which is slow: {log_density.reason}.", stacklevel=3)
        start, centres = density_start(own, log_density)
        loop = DensityLoop(start, log_density, objective, num_particles=num_particles, **options,
                           **kept)
        _run(start, loop)
        if not loop.complete:
            _judge(start, log_density, loop.history, num_particles, centres)
        loop.finish()
    return start, loop.history


@torch.no_grad()
def _log_density(flow: Flow, function: Callable[[Tensor], Tensor]) -> LogDensity:
    """The function, tried at draws of the flow."""
    count = max(NUM_PROBES, flow.input_dim + NUM_COMPARED)
    return LogDensity(function, flow.rsample_and_log_prob((count,))[0])


def _run(flow: Flow, loop: LikelihoodLoop | DensityLoop) -> None:
    history = loop.run()
    if not history.elbo and not history.interrupted:
        raise ValueError(f"fit_density: the fit is not finite at its first step; to blame is "
                         f"{history.rollbacks[-1][1] if history.rollbacks else 'the clock'}. Take "
                         "a smaller lr, or another flow.")
    flow.eval()


def _judge(flow: Flow, log_density: LogDensity, history: DensityHistory, num_particles: int,
           centres: Tensor) -> None:
    """Weigh draws of the flow by the density, look for it where there is mass, and note both."""
    sample = importance_sample(flow, log_density, NUM_SAMPLES)
    count = len(history.elbo)
    history.stages = [Stage("fit_density", count, sample.pareto_k, sample.ess / NUM_SAMPLES,
                            sample.elbo[0], count * num_particles)]
    if sample.pareto_k > MAX_PARETO_K:
        history.concerns.append(
            f"k-hat of its draws is {sample.pareto_k:.2f} (above {MAX_PARETO_K}): it misses part "
            "of the density. Take more steps, more layers, or another flow")
    with torch.no_grad():
        excess = log_density(centres) - flow.log_prob(centres) - _log_normalizer(sample)
    if len(centres) > 1 and bool((excess > MAX_EXCESS).any()):
        place = shown(centres[int(excess.argmax())])
        history.concerns.append(f"it misses a mode at {place}. Take more steps, a longer "
                                "annealing, or more layers")


def _log_normalizer(sample: ImportanceSample) -> float:
    """Log of the integral of the density, as far as draws reach."""
    ratios = (sample.log_p - sample.log_q)[sample.finite]
    return (torch.logsumexp(ratios, 0) - math.log(sample.num_samples)).item()


def _copied(flow: Any, input_dim: int | None, context_dim: int, dtype: torch.dtype | None) -> Flow:
    """A flow of one's own, to be trained."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError("fit_density expected `dtype` to be a floating-point torch.dtype such as "
                         f"torch.float64, got {dtype!r}.")
    wanted = "fit_density expected `flow` to be a Flow, a bijection such as nsf(2) or a fitted flow"
    if isinstance(flow, FittedFlow):
        flow = copy.deepcopy(flow.flow).requires_grad_()
    elif isinstance(flow, Flow):
        flow = copy.deepcopy(flow)
    elif isinstance(flow, Bijection):
        flow = Flow(copy.deepcopy(flow)).to(next(flow.parameters(), torch.empty(0)))
    elif callable(flow) and not isinstance(flow, (type, torch.nn.Module)):
        if input_dim is None:
            raise ValueError(f"{wanted}, got a recipe, which with `log_density` has no dimension. "
                             "Call it: nsf(2).")
        flow = Flow(flow(input_dim, context_dim) if context_dim else flow(input_dim))
    else:
        raise ValueError(f"{wanted}, got {type_name(flow)}.")
    flow = flow.to(dtype)
    if not any(p.requires_grad for p in flow.parameters()):
        raise ValueError("fit_density expected a flow with parameters to train, got only frozen "
                         "ones. Thaw some: flow.requires_grad_().")
    return flow


def _warn(history: DensityHistory, checkpoint: Checkpoint | None) -> None:
    if history.interrupted:
        warnings.warn(f"fit_density was interrupted after {len(history.elbo)} steps; this is the "
                      f"best so far.{way_on(checkpoint)}", stacklevel=3)
    problems = [history.stopped] if history.stopped and not history.patience_lost else []
    for problem in [*problems, *history.concerns]:
        warnings.warn(f"fit_density: {problem}.", stacklevel=3)


def _check_options(**counts: Any) -> None:
    for name, count in counts.items():
        check_positive_int("fit_density", name, count)


def _checked_objective(objective: Any) -> Callable:
    if objective is None:
        return ELBO()
    if not callable(objective) or isinstance(objective, type):
        raise ValueError("fit_density expected `objective` to be one such as ELBO(), got "
                         f"{objective!r}.")
    checked: Callable = objective
    return checked


def _checked_annealing(annealing: Any, num_steps: int) -> int:
    """Number of steps."""
    ok = isinstance(annealing, (int, float)) and not isinstance(annealing, bool)
    if not ok or not 0 <= annealing < 1:
        raise ValueError("fit_density expected `annealing` to be a fraction of the steps, at least "
                         f"0 and below 1, got {annealing!r}.")
    return round(annealing * num_steps)


def _refuse_context(context: Any) -> None:
    if context is not None:
        raise ValueError("fit_density takes no `context` with `log_density`, which is one density. "
                         "Fit a conditional flow to samples.")
