"""Continuous flows: points drift along a learned field for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_nfvi._shapes import check_positive_float, check_positive_int
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.jacobian import rademacher, trace
from pyro_nfvi.flows.linearized import Perceptron, scaled
from pyro_nfvi.flows.nets import HIDDEN_DIMS, MLP, check_network
from pyro_nfvi.flows.roots import NotConverged, any_of

ADAPTIVE = ("dopri5", "dopri8", "bosh3")
FIXED = ("euler", "midpoint", "heun3", "rk4")
FINEST = 16  # times the resolution of the dtype, below which no tolerance goes
FIRST_STEP = 0.2  # of all the time


class Continuous(Bijection):
    r"""Continuous normalizing flow: the solution of an ordinary differential equation.

    .. math:: \dot z(t) = f(t, z(t), \text{context}), \quad z(0) = u, \quad z = z(T), \qquad
              \log|\det J| = \int_0^T \operatorname{tr} \frac{\partial f}{\partial z}\, dt

    :math:`f` is a multilayer perceptron, zero at the start. The inverse integrates backwards.
    Both directions are as exact as the solver. An adaptive one keeps the error of each step below
    ``atol + rtol * size`` at every point of a batch, for coordinates and log-determinant together;
    that of the result is larger by the number of steps, and by how far the field drives points
    apart: forward and inverse agree to some ten times the tolerance for a field that moves points
    by their own size. A tolerance finer than 16 times the resolution of the dtype, 2e-6 in
    float32, is raised to that. Transforms of ``torch.func`` do not pass an adaptive solver.

    The trace is exact unless probes are asked for: from the factors of the network's Jacobian it
    costs about as much as :math:`f` itself, in any dimension. With probes it is Hutchinson's
    estimate, of noise that is drawn anew for every call and fixed while that is solved (see
    ``log_det_is_random``): an ELBO takes it, but importance weights and Pareto k-hat mistake it
    for a poor fit.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        end_time: How long :math:`T` points drift: a field trains about as fast, and moves as far,
            as a stack of so many layers.
        num_probes: Number of random vectors the trace is estimated with. Default: it is exact.
        method: Solver of torchdiffeq: an adaptive one (``"dopri5"``, ``"dopri8"``,
            ``"bosh3"``), or one of ``num_steps`` equal steps (``"euler"``, ``"midpoint"``,
            ``"heun3"``, ``"rk4"``), which a fit compiles, and makes many times faster.
        rtol: Relative tolerance of an adaptive method.
        atol: Absolute tolerance of an adaptive method.
        num_steps: Number of steps of a method of equal steps.
        max_num_steps: Most steps of an adaptive method, before it is given up.
        adjoint: Whether gradients come from a second equation that is solved backwards, in memory
            that does not grow with the number of steps. They are then as exact as that solution,
            and there are no second derivatives.
        hidden_dims: Sizes of the hidden layers of :math:`f`.
        activation: Constructor of its nonlinearity; smooth, or the solver takes tiny steps.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the method is unknown, or a tolerance or number is not positive; at a
            call, if the equation cannot be solved to the tolerance.

    Example:
        >>> layer = Continuous(2)
        >>> u = torch.randn(5, 2)
        >>> torch.allclose(layer.inverse(layer(u)[0])[0], u, atol=1e-4)
        True

    References:
        Chen et al. (2018), Neural Ordinary Differential Equations, arXiv:1806.07366, theorem 1
        and appendix B; Grathwohl et al. (2019), FFJORD, arXiv:1810.01367, eq. 8.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, end_time: float = 4.0,
                 num_probes: int | None = None, method: str = "dopri5", rtol: float = 1e-5,
                 atol: float = 1e-5, num_steps: int = 10, max_num_steps: int = 1000,
                 adjoint: bool = False, hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__(input_dim, context_dim)
        owner = "Continuous"
        self.end_time = check_positive_float(owner, "end_time", end_time)
        self.num_probes, self.method = num_probes, _checked_method(method)
        if num_probes is not None:
            check_positive_int(owner, "num_probes", num_probes)
        self.rtol = check_positive_float(owner, "rtol", rtol)
        self.atol = check_positive_float(owner, "atol", atol)
        self.num_steps = check_positive_int(owner, "num_steps", num_steps)
        self.max_num_steps = check_positive_int(owner, "max_num_steps", max_num_steps)
        self.adjoint = bool(adjoint)
        check_network(owner, hidden_dims, activation)
        _torchdiffeq()  # now rather than in a first step
        self.network = MLP(1 + self.input_dim + self.context_dim, self.input_dim, hidden_dims,
                           activation)

    @property
    def log_det_is_random(self) -> bool:
        """Whether log-determinants are estimates, which differ between calls."""
        return self.num_probes is not None

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(u, context, 0.0, self.end_time)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context, self.end_time, 0.0)

    def _solve(self, x: Tensor, context: Tensor | None, start: float, end: float
               ) -> tuple[Tensor, Tensor]:
        """Where points go in the time from start to end, and the trace on the way."""
        lost = ~x.isfinite().all(-1, keepdim=True)  # would keep the others from being solved
        if context is not None:
            lost = lost | ~context.isfinite().all(-1, keepdim=True)
            context = context.masked_fill(lost, 0)
        x = x.masked_fill(lost, 0)
        field = _Field(self, x, context, end)
        state = self._integrate(field, torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1),
                                x.new_tensor([start, end]))
        state = state.masked_fill(lost, math.nan)
        return state[..., :-1], state[..., -1]

    def _integrate(self, field: _Field, state: Tensor, times: Tensor) -> Tensor:
        if not state.numel():
            return state
        finest = FINEST * torch.finfo(state.dtype).eps
        given = {"rtol": max(self.rtol, finest), "atol": max(self.atol, finest),
                 "method": self.method, "options": self._options(times[1:])}
        library = _torchdiffeq()
        if not self.adjoint:
            end: Tensor = library.odeint(field, state, times, **given)[-1]
        else:
            back = self._options(times[:1])
            back.pop("norm", None)  # torchdiffeq extends that of the state to the adjoint
            end = _FirstDerivatives.apply(library.odeint_adjoint(
                field, state, times, **given, adjoint_options=back,
                adjoint_params=field.tensors)[-1])
        if any_of(~end.isfinite()):
            raise NotConverged(field.failed("its solution overflows"))
        return end

    def _options(self, end: Tensor) -> dict[str, Any]:
        if self.method in FIXED:
            return {"grid_constructor": self._grid}
        return {"first_step": FIRST_STEP * self.end_time, "step_t": end, "norm": _largest_row,
                "max_num_steps": self.max_num_steps + 1}  # ours complains first

    def _grid(self, field: Any, state: Tensor, times: Tensor) -> Tensor:
        steps = torch.arange(self.num_steps + 1, dtype=times.dtype, device=times.device)
        return times[0] + (times[-1] - times[0]) * (steps / self.num_steps)

    def extra_repr(self) -> str:
        """Dimensions and solver."""
        how = f"num_steps={self.num_steps}" if self.method in FIXED else (
            f"rtol={self.rtol:g}, atol={self.atol:g}")
        probes = "" if self.num_probes is None else f", num_probes={self.num_probes}"
        return (f"{super().extra_repr()}, end_time={self.end_time:g}, method={self.method!r}, "
                f"{how}{probes}")


class _Field:
    """The right-hand side of one equation: its weights, context and noise are fixed.

    Args:
        layer: The flow it belongs to.
        x: Points like those it is asked about.
        context: Their contexts.
        end: The time to which it is followed, and from which the adjoint equation comes back.
    """

    def __init__(self, layer: Continuous, x: Tensor, context: Tensor | None, end: float) -> None:
        self.layer, self.end, dim = layer, end, layer.input_dim
        network = layer.network
        linear = [module for module in network.hidden if isinstance(module, nn.Linear)]
        self.activations = [module for module in network.hidden
                            if not isinstance(module, nn.Linear)]
        last, bias = scaled(network.output)
        weights = [*[module.weight for module in linear], last]
        self.biases = [*[module.bias for module in linear], bias]
        of_point, of_time, of_context = weights[0].split([dim, 1, layer.context_dim], -1)
        self.weights = [of_point, *weights[1:]]
        self.drift = of_time.squeeze(-1)
        if context is not None:
            self.biases[0] = self.biases[0] + context @ of_context.mT
        self.noise = None if layer.num_probes is None else rademacher(x, layer.num_probes)
        if layer.adjoint:
            self.activations = [_held(module) for module in self.activations]
        self.num_steps = self.num_steps_back = 0

    @property
    def tensors(self) -> list[Tensor]:
        """What the field depends on, for the adjoint equation to take gradients of."""
        held = [tensor for module in self.activations if isinstance(module, partial)
                for tensor in module.args[1].values()]
        return [*self.weights, *self.biases, self.drift, *held]

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        """Derivatives of point and log-determinant."""
        z, biases = state[..., :-1], [self.biases[0] + t * self.drift, *self.biases[1:]]
        network = Perceptron(self.weights, biases, self.activations)
        if self.noise is not None:
            value, divergence = trace(network, z, noise=self.noise)
        else:
            at = network.at(z)
            value, divergence = at.value, at.trace()
        return torch.cat([value, divergence.unsqueeze(-1)], -1)

    def callback_step(self, t: Tensor, state: Tensor, step: Tensor) -> None:
        """Look at an adaptive solver before each of its steps."""
        self.num_steps += 1
        self._watch(self.num_steps, f"at t={float(t):.3g}", t, step)

    def callback_step_adjoint(self, t: Tensor, state: Any, step: Tensor) -> None:
        """Likewise on the way back, of which there is one for each backward pass."""
        self.num_steps_back = 1 if float(t) == self.end else self.num_steps_back + 1
        self._watch(self.num_steps_back, f"at t={float(t):.3g} on the way back", t, step)

    def _watch(self, num_steps: int, where: str, t: Tensor, step: Tensor) -> None:
        if self.layer.method in FIXED:
            return
        if not bool(t + step > t):
            raise NotConverged(self.failed(f"no step was small enough {where}"))
        if num_steps > self.layer.max_num_steps:
            raise NotConverged(self.failed(f"max_num_steps={self.layer.max_num_steps} steps "
                                           f"ended {where}"))

    def failed(self, how: str) -> str:
        """The sentence of an error."""
        layer = self.layer
        kept = f"num_steps={layer.num_steps}" if layer.method in FIXED else \
            f"rtol={layer.rtol:g} and atol={layer.atol:g}"
        finer = "more steps" if layer.method in FIXED else "looser tolerances"
        return (f"Continuous did not solve its equation by method={layer.method!r} with {kept}: "
                f"{how}; its field is too steep or not finite, so use a lower learning rate, "
                f"{finer}, or fewer layers.")


class _FirstDerivatives(torch.autograd.Function):
    """The identity, through which no second derivative passes: it would be silently zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # by create_graph=True
            raise NotImplementedError("Continuous has no second derivatives with adjoint=True, so "
                                      "take first ones without create_graph, or build it with "
                                      "adjoint=False.")
        return gradient


def _held(activation: nn.Module) -> Any:
    """An activation whose parameters are those of now, whoever swaps them before the way back."""
    parameters = dict(activation.named_parameters())
    return partial(functional_call, activation, parameters) if parameters else activation


def _torchdiffeq() -> ModuleType:
    """The library, which takes a while to import: it brings much of scipy along."""
    with torch.inference_mode(False):  # its tables are tensors
        return import_module("torchdiffeq")


def _largest_row(error: Tensor) -> Tensor:
    """The root mean square of the worst row, so that no point pays for the size of its batch."""
    return error.square().mean(-1).amax().sqrt()


def _checked_method(method: Any) -> str:
    if not isinstance(method, str) or method not in ADAPTIVE + FIXED:
        raise ValueError("Continuous expected `method` to be one of "
                         f"{', '.join(ADAPTIVE + FIXED)}, got {method!r}.")
    return method
