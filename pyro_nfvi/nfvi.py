"""NFVI: from a model and its data to a posterior, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_float, check_positive_int, type_name
from pyro_nfvi.engine import check_tier
from pyro_nfvi.flows import Flow, Triangular, nsf
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference import ELBO, History, LogJoint, Loop
from pyro_nfvi.inference.log_joint import default_dtype, is_data
from pyro_nfvi.posterior import Posterior

AFFINE_STEPS = 0.3  # fraction of the steps that move the affine map alone
AFFINE_LR = 0.1


class NFVI:
    r"""Variational inference with a normalizing flow, used as ``MCMC(NUTS(model))`` is.

    .. math:: \max_\phi\ \mathbb E_{q_\phi}\left[\log p(x, z) - \log q_\phi(z)\right]

    Two stages of Adam, each with a one-cycle rate, clipped gradients and rollback: the affine
    map of the guide alone, which finds place and scale; then the whole flow by the path
    gradient.

    Args:
        model: A Pyro model whose latents are continuous.
        guide: An :class:`~pyro_nfvi.AutoFlow` to fit; one that is already trained goes on from
            where it is. Default: a neural spline flow under a full affine map.
        objective: What to maximise. Default: the ELBO by its path gradient.
        num_particles: Draws of each step.
        num_steps: Number of steps.
        lr: Largest learning rate of the flow.
        seed: Makes the run reproducible, and leaves the global random state as it was. Default:
            the global random state.
        dtype: Floating-point type of the fit; floating-point arguments are converted to it.
            Default: the model's own.
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
                 num_steps: int = 1000, lr: float = 0.03, seed: int | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 compile: str = "auto", progress: bool = True) -> None:
        self.model, self.guide = _checked_model(model), _checked_guide(guide)
        self.objective = ELBO() if objective is None else _checked_objective(objective)
        self.num_particles = check_positive_int("NFVI", "num_particles", num_particles)
        self.num_steps = check_positive_int("NFVI", "num_steps", num_steps)
        self.lr = check_positive_float("NFVI", "lr", lr)
        self.seed, self.dtype = _checked_seed(seed), _checked_dtype(dtype)
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
        args, kwargs = self._converted(args), self._converted(kwargs)
        random_state = nullcontext() if self.seed is None else forked_rng(self.seed)
        with random_state, default_dtype(self.dtype):
            guide = AutoFlow(self.model, nsf, affine=Triangular) if self.guide is None \
                else self.guide
            fresh = guide.prototype_trace is None
            guide.setup(*args, **kwargs).to(dtype=self.dtype, device=self.device)
            log_joint = self._log_joint(guide, args, kwargs)
            history = self._fit(guide, log_joint, fresh)
            posterior = Posterior(guide, log_joint, history)
            with suppress(KeyboardInterrupt):  # draws can wait, a fit must not be lost
                _ = posterior.draws  # while the seed holds
        _warn(history)
        return posterior

    def _log_joint(self, guide: AutoFlow, args: tuple, kwargs: dict) -> LogJoint:
        log_joint = LogJoint(self.model, args, kwargs, guide.layout, self.dtype)
        z = guide._flow().rsample_and_log_prob((2,))[0].detach()
        _check_data(log_joint, z[0])
        log_joint.try_batched(z)
        if not log_joint.batched:
            warnings.warn(f"NFVI runs the model once for each of {self.num_particles} particles, "
                          f"which is slow: {log_joint.reason}", stacklevel=3)
        return log_joint

    def _fit(self, guide: AutoFlow, log_joint: LogJoint, fresh: bool) -> History:
        flow = guide._flow()
        steps = round(AFFINE_STEPS * self.num_steps) if fresh else 0
        history = History()
        if steps:
            affine = flow.bijection.layers[-1]
            history += self._stage("affine", _without_identity(flow), ELBO(path_gradient=False),
                                   affine, log_joint, steps, AFFINE_LR)
        if not history.interrupted and not history.stopped and steps < self.num_steps:
            history += self._stage("flow", flow, self.objective, flow, log_joint,
                                   self.num_steps - steps, self.lr)
        return history

    def _stage(self, name: str, flow: Flow, objective: Callable, trained: nn.Module,
               log_joint: LogJoint, num_steps: int, lr: float) -> History:
        def estimates() -> tuple[Tensor, Tensor]:
            return objective(flow, log_joint, self.num_particles)
        z = flow.rsample_and_log_prob(())[0].detach()
        parameters = [p for p in trained.parameters() if p.requires_grad]
        parameters += log_joint.parameters(z).values()
        loop = Loop(parameters, estimates, log_joint.first_bad_site, num_steps, lr,
                    self.progress, f"NFVI {name}", self.compile)
        history = loop.run()
        if not history.elbo and not history.interrupted:
            raise ValueError(f"NFVI: the log joint is not finite at the start; first bad site "
                             f"{history.rollbacks[-1][1]}. Start elsewhere: AutoFlow(model, "
                             "init_loc_fn=..., init_scale=...).")
        return history

    def _converted(self, values: Any) -> Any:
        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dtype = self.dtype if value.is_floating_point() else None
            return value.to(dtype=dtype, device=self.device)
        return tree_map(convert, values)


def _without_identity(flow: Flow) -> Flow:
    """The flow less the layers before its affine map, if they still are the identity."""
    *inner, affine = flow.bijection.layers
    u = flow.base.rsample((16,)).detach()
    with torch.no_grad():
        still = all(torch.allclose(layer(u)[0], u, atol=1e-5) for layer in inner)
    return Flow(affine, flow.base) if still else flow


def _check_data(log_joint: LogJoint, z: Tensor) -> None:
    with log_joint.surroundings():
        nodes = log_joint.trace(z).nodes
    latent = {site.name for site in log_joint.layout}
    for name, node in nodes.items():
        if name in latent or not is_data(node):
            continue
        if bad := int(node["value"].isnan().sum()):
            raise ValueError(f"NFVI expected site {name!r} to be observed with numbers, got {bad} "
                             "NaN. Drop them, or hide them: poutine.mask(mask=~y.isnan()) around "
                             "the site and y.nan_to_num() as its value.")


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


def _checked_seed(seed: Any) -> int | None:
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"NFVI expected `seed` to be an integer or None, got {seed!r}.")
    return seed


def _checked_device(device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"NFVI expected `device` to be a torch.device such as 'cuda', got "
                         f"{device!r}.") from None

