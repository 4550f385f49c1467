"""Pyro's ELBO, recorded once and compiled: for any guide, in Pyro's own SVI."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import is_identically_zero
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_nfvi._random import forked_rng
from pyro_nfvi.engine import Compiled, check_tier, try_record
from pyro_nfvi.engine.draws import Replay
from pyro_nfvi.engine.programs import PythonProgram

MAX_PROGRAMS = 8  # kinds of arguments before compiling anew costs more than it saves
FIRST_CHECK = 3  # calls until the program is compared with the model again; then thrice as many
PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device)


class CompiledTrace_ELBO(Trace_ELBO):
    """:class:`pyro.infer.Trace_ELBO` that runs as one compiled graph, for any guide.

    The first step runs as Pyro does, with its checks and its errors; the second is recorded. Sites
    without a reparametrized sampler get their score-function term as in Pyro. Tensors among the
    arguments may change from step to step; a new number or shape starts a new recording. What else
    changes the model (an attribute, a tensor it finds outside) is found out only now and then: make
    it an argument. Later data are not validated. A model or guide that cannot be recorded runs as
    Pyro runs it, and ``reason`` says why.

    Several particles are computed at once by ``torch.func.vmap``, also without
    ``vectorize_particles``.

    Args:
        num_particles: Draws of each step.
        compile: ``"auto"``, ``"c"`` (generated C code), ``"inductor"``, ``"cuda_graph"``,
            ``"fx"`` or ``"eager"``.
        **kwargs: Options of :class:`pyro.infer.Trace_ELBO`.

    Attributes:
        tier: The tier of the last step.
        reason: Why not a faster one, or an empty string.

    Raises:
        ValueError: If ``compile`` is something else.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}),
        ...           loss=CompiledTrace_ELBO())
        >>> svi.step(torch.zeros(5)) > 0
        True
    """

    def __init__(self, num_particles: int = 1, *, compile: str = "auto", **kwargs: Any) -> None:
        super().__init__(num_particles=num_particles, **kwargs)
        self.compile = check_tier("CompiledTrace_ELBO", compile)
        self.tier, self.reason = "eager", ""
        self._calls: dict[Any, _Call] = {}
        self._seen: dict[tuple[int, int], tuple[Callable, Callable]] = {}

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the ELBO; its gradients are added to those of the parameters."""
        pair = (id(model), id(guide))
        if pair not in self._seen or self.compile == "eager":  # Pyro's checks, lazy parameters
            self._seen[pair] = model, guide
            return self._plainly(model, guide, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if strange := [leaf for leaf in leaves if not isinstance(leaf, PLAIN)]:
            self.tier = "eager"
            self.reason = (f"an argument is a {type(strange[0]).__name__}, whose contents may "
                           "change unseen: pass tensors and numbers")
            return self._plainly(model, guide, args, kwargs)
        key = (*pair, spec, tuple(_kind(leaf) for leaf in leaves))
        call = self._calls.get(key)
        if call is not None and call.runs and not call.fits(leaves):
            del self._calls[key]  # parameters or indices are new: as at the first step
            return self._plainly(model, guide, args, kwargs)
        if call is None:
            if len(self._calls) >= MAX_PROGRAMS:
                self.tier = "eager"
                self.reason = (f"the arguments changed {MAX_PROGRAMS} times: what changes from "
                               "step to step should be a tensor")
                return self._plainly(model, guide, args, kwargs)
            call = self._calls[key] = _Call(self, model, guide, leaves, spec)
        if not call.runs:
            self.tier, self.reason = "eager", call.reason
            return self._plainly(model, guide, args, kwargs)
        loss = call(leaves)
        self.tier, self.reason = (call.compiled.tier if call.runs else "eager"), call.reason
        warn_if_nan(loss, "loss")
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle starts without compiled code."""
        return {**self.__dict__, "_calls": {}, "_seen": {}}

    def _loss_and_surrogate(self, model_trace: Trace, guide_trace: Trace
                            ) -> tuple[Tensor, Tensor]:
        """Loss of one pair of traces, and what has its gradient."""
        return _surrogate(model_trace, guide_trace)

    def _plainly(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> float:
        loss: float = super().loss_and_grads(model, guide, *args, **kwargs)
        return loss


class CompiledTraceMeanField_ELBO(CompiledTrace_ELBO, TraceMeanField_ELBO):
    """:class:`pyro.infer.TraceMeanField_ELBO` that runs as one compiled graph.

    It takes Kullback-Leibler divergences in closed form where there are any, as for the Gaussian
    posteriors of a :class:`~pyro_nfvi.vae.VAE`. In all else it is :class:`CompiledTrace_ELBO`.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_nfvi.vae import VAE, Bernoulli
        >>> vae = VAE(Bernoulli((4,)), latent_dim=2)
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}),
        ...           loss=CompiledTraceMeanField_ELBO())
        >>> svi.step(torch.rand(20, 4).round()) > 0
        True
    """

    def _loss_and_surrogate(self, model_trace: Trace, guide_trace: Trace
                            ) -> tuple[Tensor, Tensor]:
        elbo = model_trace.log_prob_sum(lambda name, node: node["is_observed"])
        for name, node in guide_trace.nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                elbo = elbo - _divergence(node, model_trace.nodes.get(name))
        elbo = torch.as_tensor(elbo)
        return -elbo, -elbo


class _Call:
    """One kind of call, recorded: model, guide, and the shapes of the arguments.

    One particle is recorded as it runs; all particles and the gradient are then a second
    recording, of the first.
    """

    def __init__(self, elbo: CompiledTrace_ELBO, model: Callable, guide: Callable,
                 leaves: list[Any], spec: Any) -> None:
        self.elbo, self.model, self.guide = elbo, model, guide
        self.leaves, self.spec, self.count, self.next_check = leaves, spec, 0, FIRST_CHECK
        self.batch = 1 if elbo.vectorize_particles else elbo.num_particles
        self.parameters = self._find_parameters()
        self.runs, self.reason = False, "there is no parameter to learn"
        if self.parameters:
            self._compile()

    def __call__(self, leaves: list[Any]) -> float:
        """One step: the loss; gradients go to the parameters."""
        self.leaves = leaves
        parameters = [pyro.param(name).unconstrained() for name in self.parameters]
        inputs = [*parameters, *self._tensors(), *self._noise()]
        self._check(inputs)
        if not self.runs:
            args, kwargs = tree_unflatten(leaves, self.spec)
            return self.elbo._plainly(self.model, self.guide, args, kwargs)
        loss, *gradients = self.compiled.program([t.detach() for t in inputs], [])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss.item()

    def fits(self, leaves: list[Any]) -> bool:
        """Whether parameters are those recorded, and integers within the recorded range.

        Integers may be indices, which generated code does not check.
        """
        store = pyro.get_param_store()
        known = all(name in store and _is_alike(store[name].unconstrained(), value)
                    for name, value in self.parameters.items())
        within = all(low >= lowest and high <= highest for (low, high), (lowest, highest)
                     in zip(_ranges(leaves), self.ranges, strict=True))
        return known and within and self.modes == self._modes()

    def _modes(self) -> list[bool]:
        """Training mode of every module that model and guide belong to."""
        owners = [getattr(part, "__self__", part) for part in (self.model, self.guide)]
        return [module.training for owner in owners if isinstance(owner, nn.Module)
                for module in owner.modules()]

    def _compile(self) -> None:
        self.modes = self._modes()
        self.ranges = _ranges(self.leaves)
        if not self.fits(self.leaves):
            self.reason = "the parameters are not in the param store (module_local_params)"
            return
        if any(leaf.requires_grad for leaf in self._tensors()):
            self.reason = "an argument requires a gradient"
            return
        given = [*self.parameters.values(), *self._tensors()]
        particle, self.reason = try_record(self._particle, given)
        if particle is None:
            return
        if particle.freezes:
            self.reason = "a tensor that requires a gradient is not in the param store"
            return
        self.draws, self.graph = particle.draws, particle.graph
        with forked_rng():
            self.inputs = [*given, *self._noise()]
        self.compiled = Compiled(self._all_particles, self.inputs, self.elbo.compile,
                                 python=_Truth(self, self.inputs))
        self.runs, self.reason = self.compiled.tier != "eager", self.compiled.reason

    def _check(self, inputs: list[Tensor]) -> None:
        """Every now and then: is the model still the one that was recorded?"""
        self.count += 1
        if self.count < self.next_check:
            return
        self.next_check *= 3
        self.compiled.python.live = inputs
        if problem := self._difference():
            warnings.warn(f"the model changed since it was compiled ({problem}); it runs as it is "
                          "from now on.", stacklevel=5)
            self.compiled.give_up(problem)
            self.runs, self.reason = False, problem

    def _difference(self) -> str:
        """How model and guide differ from what was recorded; an empty string if they do not."""
        try:
            if self._find_parameters().keys() != self.parameters.keys():
                return "other parameters are to be learned"
            return self.compiled.agrees()
        except RuntimeError as error:  # it draws other numbers, say
            return str(error).split("\n")[0]

    def _noise(self) -> list[Tensor]:
        """Random numbers of one step."""
        if self.batch == 1:
            return [draw.once() for draw in self.draws]
        return [draw.many(self.batch) for draw in self.draws]

    def _particle(self) -> list[Tensor]:
        """Minus the ELBO of one particle, and its surrogate, by Pyro."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        elbo = self.elbo if self.elbo.vectorize_particles else \
            Trace_ELBO(max_plate_nesting=self.elbo.max_plate_nesting)
        with pyro.validation_enabled(False), poutine.block():
            traces, = elbo._get_traces(self.model, self.guide, args, kwargs)
            loss, surrogate = self.elbo._loss_and_surrogate(*traces)
        scale = self.elbo.num_particles if self.elbo.vectorize_particles else 1
        return [loss / scale, surrogate / scale]

    def _all_particles(self) -> list[Tensor]:
        """Mean loss of all particles, and its gradients, by the graph of one."""
        count = len(self.inputs) - len(self.draws)
        graph: Callable = self.graph
        if self.batch > 1 and self.draws:  # without noise all particles are one
            graph = torch.func.vmap(graph, in_dims=(None,) * count + (0,) * len(self.draws))
        loss, surrogate = graph(*self.inputs)
        return _with_gradients(loss.mean(), surrogate.mean(), list(self.parameters.values()))

    def _find_parameters(self) -> dict[str, Tensor]:
        """Unconstrained parameters of guide and model, by name in the param store."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        with forked_rng(), poutine.block(), poutine.trace(param_only=True) as seen, \
                torch.no_grad():
            self.elbo.loss(self.model, self.guide, *args, **kwargs)
        values = {name: node["value"].unconstrained() for name, node in seen.trace.nodes.items()
                  if node["type"] == "param"}
        return {name: value for name, value in values.items() if value.requires_grad}

    def _tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


class _Truth(PythonProgram):
    """What a call should give: the model and guide themselves, particle by particle."""

    def __init__(self, call: _Call, live: list[Tensor]) -> None:
        super().__init__(call._particle, live)
        self.call = call

    def __call__(self, inputs: Any, draws: Any = None) -> list[Tensor]:
        """The noise is the last of the inputs."""
        noise = list(inputs)[len(inputs) - len(self.call.draws):]
        batch = self.call.batch
        parts = [[n[i] for n in noise] for i in range(batch)] if batch > 1 else [noise]
        losses, surrogates = [], []
        for part in parts:
            with Replay(part):
                loss, surrogate = self.function()
            losses.append(loss)
            surrogates.append(surrogate)
        parameters = self.live[:len(self.call.parameters)]
        values = _with_gradients(torch.stack(losses).mean(), torch.stack(surrogates).mean(),
                                 parameters)
        return [value.detach() for value in values]


def _with_gradients(loss: Tensor, surrogate: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [loss, *torch.autograd.grad(surrogate, parameters, materialize_grads=True)]


def _surrogate(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """Minus the ELBO of one pair of traces, and its surrogate, as ``Trace_ELBO`` has them."""
    log_p = model_trace.log_prob_sum()
    elbo, surrogate = log_p - guide_trace.log_prob_sum(), log_p
    log_r = None
    for node in guide_trace.nodes.values():
        if node["type"] != "sample":
            continue
        _, score, entropy = node["score_parts"]
        if not is_identically_zero(entropy):
            surrogate = surrogate - entropy.sum()
        if not is_identically_zero(score):
            log_r = _compute_log_r(model_trace, guide_trace) if log_r is None else log_r
            surrogate = surrogate + (log_r.sum_to(node["cond_indep_stack"]) * score).sum()
    return -elbo, -surrogate


def _divergence(q: dict[str, Any], p: dict[str, Any] | None) -> Tensor | float:
    """What a guide's site adds to the KL divergence, in closed form if there is one."""
    if p is not None:
        try:
            return scale_and_mask(kl_divergence(q["fn"], p["fn"]), q["scale"], q["mask"]).sum()
        except NotImplementedError:
            pass
    entropy = q["score_parts"].entropy_term
    if not is_identically_zero(entropy):
        entropy = entropy.sum()
    return entropy if p is None else entropy - p["log_prob_sum"]


def _is_alike(parameter: Tensor, recorded: Tensor) -> bool:
    return parameter.requires_grad and _kind(parameter) == _kind(recorded)


def _kind(leaf: Any) -> Any:
    """What a recording depends on in an argument."""
    if isinstance(leaf, Tensor):
        return Tensor, leaf.shape, leaf.dtype, leaf.device
    return type(leaf), leaf


def _ranges(leaves: list[Any]) -> list[tuple[int, int]]:
    """Smallest and largest entry of every tensor of integers."""
    return [(int(leaf.min()), int(leaf.max())) for leaf in leaves if isinstance(leaf, Tensor)
            and leaf.numel() and not leaf.is_floating_point() and not leaf.is_complex()]
