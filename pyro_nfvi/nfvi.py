"""NFVI: from a model and its data to a posterior, in one call."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from os import PathLike
from typing import Any

import pyro
import torch

from pyro_nfvi._random import forked_rng, rng_state, set_rng_state
from pyro_nfvi._shapes import (
    check_flag,
    check_positive_float,
    check_positive_int,
    check_seconds,
    check_seed,
    type_name,
)
from pyro_nfvi.engine import check_tier
from pyro_nfvi.flows import auto
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference import ELBO, Checkpoint, History
from pyro_nfvi.inference.checkpoint import CheckpointStore
from pyro_nfvi.inference.distributed import DistributedTeam, LostProcess, check_distributed
from pyro_nfvi.inference.identity import described, difference, identity
from pyro_nfvi.inference.kept import Kept, way_on
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.problem import Problem, Setup
from pyro_nfvi.inference.stages import Options, Stages
from pyro_nfvi.inference.team import Alone, Team
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
        max_seconds: Time for the steps of the fit, all runs of a checkpoint together. A stage lets
            its rate fall before it is up, and ends with it. The Gaussian stage, and the draws that
            judge the fit, take what they take.
        seed: Makes the run reproducible, on one machine with one ``compile``, and leaves the
            global random state as it was; ``pyro.param`` values of the model start where the
            param store has them. Default: the global random state.
        dtype: Floating-point type of the fit; floating-point arguments are converted to it.
            Default: double precision on a CPU, unless the model holds tensors of another type
            that do not mix; elsewhere the model's own.
        device: Where to run; tensor arguments are moved there. Default: where they are.
        compile: How the steps are computed: ``"auto"`` takes the fastest way that works, and
            :attr:`Posterior.engine` says which; ``"eager"`` runs the model as it is, step by
            step, for a debugger, say. The others are ``"c"`` (generated C code), ``"inductor"``,
            ``"cuda_graph"`` and ``"fx"``.
        progress: Whether to show progress bars.
        checkpoint: Folder in which to keep the state of the fit, every minute and when a signal
            ends it; :class:`~pyro_nfvi.Checkpoint` sets how often. The same call, run again, goes
            on from there, bit for bit on the same machine; once the fit is complete it returns at
            once what was found. Default: nothing is kept.
        distributed: ``"auto"`` shares the fit between the processes that ``torchrun`` has
            started: each estimates a part of the particles, or of the rows of every minibatch.
            The result is that of one process, to rounding. Default: this process alone.

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
                 compile: str = "auto", progress: bool = True,
                 checkpoint: Checkpoint | str | PathLike | None = None,
                 distributed: str | None = None) -> None:
        self.model, self.guide = _checked_model(model), _checked_guide(guide)
        self.objective = ELBO() if objective is None else _checked_objective(objective)
        self.num_particles = check_positive_int("NFVI", "num_particles", num_particles)
        self.num_steps = check_positive_int("NFVI", "num_steps", num_steps)
        self.lr = check_positive_float("NFVI", "lr", lr)
        self.max_seconds = check_seconds("NFVI", "max_seconds", max_seconds)
        self.seed, self.dtype = check_seed("NFVI", seed), _checked_dtype(dtype)
        self.device, self.compile = _checked_device(device), check_tier("NFVI", compile)
        self.progress = check_flag("NFVI", "progress", progress)
        self.checkpoint = Checkpoint.of("NFVI", checkpoint)
        self.distributed = check_distributed("NFVI", distributed)

    def run(self, *args: Any, loader: Iterable | None = None, **kwargs: Any) -> Posterior:
        """Fit the model to these arguments.

        Ctrl-C ends the fit early and returns the posterior so far, with a warning.

        Args:
            *args: Arguments of the model.
            loader: Minibatches, by a :class:`~pyro_nfvi.ArrayLoader` or a
                ``torch.utils.data.DataLoader``. Their tensors follow the arguments; a dict of
                tensors joins the keyword arguments. The model says by its plate how many rows
                there are: ``pyro.plate("data", num_rows, subsample_size=len(x))``. Draws are
                weighted by all rows at the end.
            **kwargs: Keyword arguments of the model.

        Returns:
            The posterior.

        Raises:
            ValueError: If the guide cannot handle the model, an observed value is NaN, the log
                joint is not finite at the start, the model does not scale minibatches to all
                rows, the fit would not go into memory, or the checkpoints are of another fit.
            LostProcess: If another process of the fit has died, or is silent.
        """
        random_state = nullcontext() if self.seed is None else forked_rng(self.seed)
        refit = self._refit(args, kwargs, loader)
        with torch.enable_grad(), random_state, self._team() as team, self._store(team) as store:
            problem = self._setup(team)(args, kwargs, loader)
            with default_dtype(problem.log_joint.dtype):
                stages = self._stages(problem, team, store)
                stages.run()
                posterior = Posterior(problem.guide, problem.whole, stages.history, stages.sample,
                                      refit)
                with suppress(KeyboardInterrupt):  # draws can wait, a fit must not be lost
                    posterior.draws, state = team.lead(  # while the seed holds
                        lambda: (posterior.draws, rng_state()))
                    set_rng_state(state)
                    stages.finish(posterior.draws)
        if team.leads:
            _warn(stages.history, self.checkpoint)
        return posterior

    @contextmanager
    def _team(self) -> Iterator[Team]:
        """The processes that share the fit, from the same random state on."""
        team: Team = DistributedTeam.of("NFVI", self.distributed, self.device) or Alone()
        if self.num_particles % team.size:
            raise ValueError(f"NFVI expected `num_particles` to be a multiple of the {team.size} "
                             f"processes, got {self.num_particles}.")
        try:
            if team.size > 1:
                set_rng_state(team.share(rng_state()))
            yield team
        except LostProcess as error:
            if self.checkpoint is None:
                raise
            raise LostProcess(f"{error} It goes on from the last checkpoint in "
                              f"{str(self.checkpoint.folder)!r}.") from error

    @contextmanager
    def _store(self, team: Team) -> Iterator[CheckpointStore | None]:
        """Where checkpoints go, in the process that writes them."""
        opened: list[CheckpointStore] = []
        if self.checkpoint is not None:
            checkpoint = self.checkpoint
            team.lead(lambda: opened.append(CheckpointStore(checkpoint, "NFVI")))
        with opened[0] if opened else nullcontext() as store:
            yield store

    def _setup(self, team: Team) -> Setup:
        guide = self.guide or AutoFlow(self.model, auto)
        return Setup(self.model, guide, self.dtype, self.device, self.num_particles,
                     self.progress and team.leads, team)

    def _stages(self, problem: Problem, team: Team, store: CheckpointStore | None) -> Stages:
        """The stages of the fit, at its start or where a checkpoint says it was."""
        deadline = time.monotonic() + self.max_seconds
        options = Options(self.objective, self.num_particles, self.num_steps, self.lr,
                          self.compile, self.progress and team.leads, deadline)
        known = None
        if self.checkpoint is None and team.size == 1:
            stages = Stages(problem, options, team)
        else:
            mine = self._identity(problem)
            _check_alike(team, mine)
            kept = None if self.checkpoint is None else Kept(store, mine)
            stages = Stages(problem, options, team, kept)
            known = None if kept is None else team.lead(kept.latest)
        if known is not None:
            stages.go_on(known)
        elif team.size > 1:  # a guide that was built before may differ
            stages.restore(team.share(stages.snapshot()))
        return stages

    def _identity(self, problem: Problem) -> dict[str, Any]:
        """What must be the same for a fit to go on from a checkpoint."""
        options = ("seed", "num_particles", "num_steps", "lr")
        return {**identity(problem), "`objective`": described(self.objective),
                **{f"`{name}`": getattr(self, name) for name in options}}

    def _refit(self, args: tuple, kwargs: dict, loader: Iterable | None
               ) -> Callable[[int], Posterior] | None:
        """The same fit from another seed, unless the guide has been trained before."""
        if self.guide is not None and not self.guide.untouched:
            return None
        template = copy.copy(self)
        template.guide, template.progress = copy.deepcopy(self.guide), False
        template.checkpoint = template.distributed = None
        guide_model = None if self.guide is None else self.guide.model
        return partial(_fit_again, template, guide_model, args, {**kwargs, "loader": loader})


def _fit_again(template: NFVI, guide_model: Callable | None, args: tuple, kwargs: dict, seed: int
               ) -> Posterior:
    again = copy.copy(template)
    again.guide, again.seed = copy.deepcopy(template.guide), seed
    if again.guide is not None:
        again.guide._model = (guide_model,)  # which a guide that came from another process lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first fit has said it
        return again.run(*args, **kwargs)


def _warn(history: History, checkpoint: Checkpoint | None) -> None:
    if history.interrupted:
        warnings.warn(f"NFVI was interrupted after {len(history.elbo)} steps; this is the "
                      f"posterior so far.{way_on(checkpoint)}", stacklevel=3)
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
    if not any(dtype is kind for kind in (None, torch.float32, torch.float64)):
        raise ValueError(f"NFVI expected `dtype` to be torch.float64 or torch.float32, got "
                         f"{dtype!r}. Half precision has too few digits for log densities.")
    checked: torch.dtype | None = dtype
    return checked


def _check_alike(team: Team, mine: Mapping[str, Any]) -> None:
    """Refuse processes of one fit that were given different models or data."""
    if what := team.first(difference(team.share(mine), mine)):
        raise ValueError(f"NFVI expected the same model and data in all processes of a fit, got "
                         f"others: {what}. Give each of them all rows; a loader shares rows out.")


def _checked_device(device: Any) -> torch.device | None:
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError, OverflowError):
        found = torch.device("meta")
    if found is not None and found.type == "meta":
        raise ValueError(f"NFVI expected `device` to be a torch.device such as 'cuda', got "
                         f"{device!r}.")
    return found
