"""Property checks for your own bijections and guides: what each promises, one function a promise.

    from pyro_nfvi.testing import check_bijection, check_guide

    check_bijection(lambda: MyLayer(3, context_dim=2), context_dim=2)
    check_guide(AutoPlanar, my_model, data)

Each check builds fresh bijections with ``make()``, moves their parameters away from the identity,
and works in float64 on random points. It is silent if the property holds, and otherwise raises an
``AssertionError`` that names the property and the bijection. The random number generators of torch
are left as they were. Checks of a guide go likewise, in the dtype of the model, and leave Pyro's
param store as it was.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.distributions import biject_to
from torch.func import functional_call

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection, Inverse
from pyro_nfvi.flows.nets import OUTPUT_SCALE, OutputLinear
from pyro_nfvi.guides import AutoFlow

__all__ = [
    "BIJECTION_CHECKS",
    "GUIDE_CHECKS",
    "check_batch",
    "check_bijection",
    "check_compiles",
    "check_context_broadcasts",
    "check_context_is_used",
    "check_copies",
    "check_dtypes",
    "check_empty_batch",
    "check_gradients",
    "check_guide",
    "check_guide_arbitrary_log_prob",
    "check_guide_copies",
    "check_guide_draws",
    "check_guide_elbos",
    "check_guide_log_prob",
    "check_guide_neutra",
    "check_guide_particles",
    "check_guide_predictive",
    "check_guide_quantiles",
    "check_guide_random_state",
    "check_guide_trains",
    "check_identity_at_start",
    "check_inverse",
    "check_log_det",
    "check_path_inverse",
    "check_shape_errors",
    "perturb",
]

Make = Callable[[], Bijection]
Direction = Callable[..., tuple[Tensor, Tensor]]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
NOISE = 0.5  # size of the perturbation: large enough that no layer stays near the identity


def check_bijection(make: Make, context_dim: int = 0, *, seed: int = 0,
                    tolerance: float | None = None,
                    skip: Collection[Callable[..., None]] = ()) -> None:
    """Run every check of this module on one bijection.

    Args:
        make: Builds a fresh bijection; called several times.
        context_dim: The ``context_dim`` the bijection should have.
        seed: Seed of the random parameters and points.
        tolerance: Error, absolute and relative, that the bijection states for its results: that
            of a solver, say. Derivatives are held to the usual one all the same: finite
            differences would magnify any other, so skip them or tighten the solver. Default: half
            the digits.
        skip: Checks of properties that the bijection does not promise.

    Raises:
        AssertionError: If a property fails; the message names it and the bijection.

    Example:
        >>> from pyro_nfvi.flows import Permutation
        >>> check_bijection(lambda: Permutation([2, 0, 1]), skip=[check_identity_at_start])
    """
    with _property("it has the context_dim asked for", make, seed) as case:
        got = case.bijection.context_dim
        _require(got == context_dim, f"Expected context_dim={context_dim}, got {got}.")
    for check in BIJECTION_CHECKS:
        if check not in skip:
            check(make, seed=seed, **({"tolerance": tolerance} if check in COMPARISONS else {}))


def check_inverse(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Forward and inverse undo each other, and their log-determinants cancel.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If they do not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_inverse(lambda: Planar(2))
    """
    with _property("the inverse undoes the forward", make, seed, tolerance) as case:
        forward, inverse = case.directions.values()
        for there, back in ((forward, inverse), (inverse, forward)):
            image, log_det = there(case.u, case.context)
            point, log_det_back = back(image, case.context)
            case.assert_close("the point there and back", point, case.u)
            case.assert_close("minus the log-det of the way back", -log_det_back, log_det)


def check_log_det(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Both log-determinants equal those of autograd's Jacobian.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If one of them does not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_log_det(lambda: Planar(2))
    """
    with _property("the log-det matches autograd", make, seed, tolerance) as case:
        for name, function in case.directions.items():
            _, log_det = function(case.u, case.context)
            case.assert_close(f"the log-det of {name}", log_det, _true_log_det(function, case))


def check_batch(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """A batch, of one or two dimensions, equals its rows one by one.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If it does not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_batch(lambda: Planar(2))
    """
    with _property("a batch equals its rows", make, seed, tolerance) as case:
        u, context = case.folded()
        for name, function in case.directions.items():
            rows = [function(*row) for row in case.rows()]
            batch, folded = function(case.u, case.context), function(u, context)
            for k, what in enumerate(("point", "log-det")):
                expected = torch.stack([row[k] for row in rows])
                case.assert_close(f"the {what} of {name} on a batch", batch[k], expected)
                case.assert_close(f"the {what} of {name} on a two-dimensional batch", folded[k],
                              expected.unflatten(0, (2, -1)))


def check_empty_batch(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """A batch of no rows gives results of no rows.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If it does not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_empty_batch(lambda: Planar(2))
    """
    with _property("a batch may be empty", make, seed, tolerance) as case:
        context = None if case.context is None else case.context[:0]
        for name, function in case.directions.items():
            point, log_det = function(case.u[:0], context)
            case.assert_close(f"the point of {name}", point, case.u[:0])
            case.assert_close(f"the log-det of {name}", log_det, case.u[:0].sum(-1))


def check_context_broadcasts(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """The batch shapes of points and context broadcast; holds trivially without context.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If they do not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_context_broadcasts(lambda: Planar(2, context_dim=3))
    """
    with _property("the context broadcasts", make, seed, tolerance) as case:
        if case.context is None:
            return
        pairs = [(case.u, case.context[0]), (case.u[0], case.context),
                 (case.u[:2, None], case.context)]
        for name, function in case.directions.items():
            for u, context in pairs:
                batch = torch.broadcast_shapes(u.shape[:-1], context.shape[:-1])
                full = function(u.expand(*batch, -1), context.expand(*batch, -1))
                for k, what in enumerate(("point", "log-det")):
                    case.assert_close(f"the {what} of {name}", function(u, context)[k], full[k])


def check_context_is_used(make: Make, *, seed: int = 0) -> None:
    """Another context gives another map; holds trivially without context.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If the context changes nothing.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_context_is_used(lambda: Planar(2, context_dim=3))
    """
    with _property("the context is used", make, seed) as case:
        if case.context is None:
            return
        for name, function in case.directions.items():
            one, other = function(case.u, case.context), function(case.u, case.context + 1)
            _require(not torch.equal(one[0], other[0]), f"Two contexts gave one {name}.")


def check_identity_at_start(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """A fresh bijection is the identity, with log-determinant zero.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If it is not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_identity_at_start(lambda: Planar(2))
    """
    with _property("a fresh bijection is the identity", make, seed, tolerance, 0.0) as case:
        for name, function in case.directions.items():
            point, log_det = function(case.u, case.context)
            case.assert_close(f"the point of {name}", point, case.u)
            case.assert_close(f"the log-det of {name}", log_det, torch.zeros_like(log_det))


def check_dtypes(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """float32 and float64 stay what they are, and agree to half the digits of float32.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If a result has another dtype, or the two disagree.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_dtypes(lambda: Planar(2))
    """
    with _property("float32 and float64 agree", make, seed, tolerance) as case:
        exact = case.results()
        context = None if case.context is None else case.context.float()
        single = _Case(case.bijection.float(), case.u.float(), context)
        for what, got, expected in zip(RESULTS, single.results(), exact, strict=True):
            _require(expected.dtype == torch.float64, f"{what} left float64.")
            case.assert_close(f"{what} in float32", got, expected.float())


def check_gradients(make: Make, *, seed: int = 0) -> None:
    """First and second derivatives through both directions match finite differences.

    They are taken in the points, in the context, and along one direction in parameter space.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If they do not.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_gradients(lambda: Planar(2))
    """
    with _property("first and second derivatives are right", make, seed) as case:
        for module in (case.bijection, Inverse(case.bijection)):
            function, inputs = _along_parameters(module, case)
            for check in (gradcheck, gradgradcheck):
                check(function, inputs, fast_mode=True)


def check_copies(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Copies give the same results: pickle, deepcopy, and state_dict into a fresh object.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If a copy fails or differs, before or after a backward pass.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_copies(lambda: Planar(2))
    """
    with _property("copies give the same results", make, seed, tolerance) as case:
        for stage in ("at the start", "after a backward pass"):
            for how, bijection in _copies(case.bijection, make).items():
                twin = _Case(bijection, case.u, case.context)
                for what, got, expected in zip(RESULTS, twin.results(), case.results(),
                                               strict=True):
                    case.assert_close(f"{what} of a copy by {how} {stage}", got, expected)
            case.u.requires_grad_()
            torch.stack([result.sum() for result in case.results()]).sum().backward()


def check_compiles(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """Both directions compile in one graph, and give the same results.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If ``torch.compile(fullgraph=True)`` fails or changes a result.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_compiles(lambda: Planar(2))
    """
    with _property("it compiles in one graph", make, seed, tolerance) as case:
        compiled = torch.compile(_fresh_code(_both_ways), fullgraph=True, backend="eager")
        results = compiled(case.bijection, case.u, case.context)
        for what, got, expected in zip(RESULTS, results, case.results(), strict=True):
            case.assert_close(f"{what}, compiled", got, expected)


def check_path_inverse(make: Make, *, seed: int = 0, tolerance: float | None = None) -> None:
    """The inverse at a known preimage equals the inverse, in value and first derivatives.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.
        tolerance: Allowed error, absolute and relative. Default: half the digits.

    Raises:
        AssertionError: If ``_inverse_at(u, z, context)`` differs from ``inverse(z, context)``.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_path_inverse(lambda: Planar(2))
    """
    with _property("the inverse at a known preimage is the inverse", make, seed, tolerance) as case:
        z, context = case.bijection(case.u, case.context)[0].detach(), case.context
        inputs = [x.requires_grad_() for x in (z, context) if x is not None]
        inputs += case.bijection.parameters()
        expected = case.bijection.inverse(z, context)
        got = case.bijection._inverse_at(case.u, z, context)
        for k, what in enumerate(("point", "log-det")):
            case.assert_close(f"the {what}", got[k], expected[k])
            slopes = zip(_slopes(got[k], inputs), _slopes(expected[k], inputs), strict=True)
            for one, other in slopes:
                case.assert_close(f"a first derivative of the {what}", one, other)


def check_shape_errors(make: Make, *, seed: int = 0) -> None:
    """Wrong points and contexts raise a ``ValueError`` that names owner and argument.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If a mistake passes, or raises something else.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> check_shape_errors(lambda: Planar(2, context_dim=3))
    """
    with _property("shape mistakes are named", make, seed) as case:
        for argument, function in zip("uz", case.directions.values(), strict=True):
            for mistake, point, context, name in _mistakes(case, argument):
                message = _error_message(function, point, context)
                _require(message != "", f"No ValueError for {mistake}.")
                for word in (type_name(case.bijection), f"`{name}`"):
                    _require(word in message, f"{word} is not in the error for {mistake}: "
                                              f"{message}")


def perturb(module: ModuleT, noise: float = NOISE) -> ModuleT:
    """Add noise of standard deviation ``noise / sqrt(last dim)`` to every parameter, in place.

    The output layers of conditioners scale their output down, and get as much more.

    Args:
        module: The bijection, or other module, to move away from where it starts.
        noise: Size of the noise.

    Returns:
        The same module.

    Example:
        >>> from pyro_nfvi.flows import Planar
        >>> u = torch.randn(5, 2)
        >>> torch.equal(Planar(2)(u)[0], u), torch.equal(perturb(Planar(2))(u)[0], u)
        (True, False)
    """
    scales: dict[int, Any] = {}
    for layer in module.modules():
        if isinstance(layer, OutputLinear) and layer.weight is not None:
            scales[id(layer.weight)] = scales[id(layer.bias)] = OUTPUT_SCALE
            if layer.blind is not None:
                scales[id(layer.bias)] = torch.where(layer.blind, 1.0, OUTPUT_SCALE)
    with torch.no_grad():
        for parameter in module.parameters():
            size = noise / (parameter.shape[-1] if parameter.dim() else 1) ** 0.5
            shift = torch.randn(parameter.shape).to(parameter) * size
            parameter.add_(shift / scales.get(id(parameter), 1.0))
    return module


#: What :func:`check_bijection` runs, in this order.
BIJECTION_CHECKS: tuple[Callable[..., None], ...] = (
    check_inverse, check_log_det, check_batch, check_empty_batch, check_context_broadcasts,
    check_context_is_used, check_identity_at_start, check_dtypes, check_gradients, check_copies,
    check_compiles, check_path_inverse, check_shape_errors)

# Those that compare results, and take a tolerance.
COMPARISONS: tuple[Callable[..., None], ...] = (
    check_inverse, check_log_det, check_batch, check_empty_batch, check_context_broadcasts,
    check_identity_at_start, check_dtypes, check_copies, check_compiles, check_path_inverse)

# ------------------------------------------------------------------ the setting of a check

RESULTS = ("the point of forward", "the log-det of forward",
           "the point of inverse", "the log-det of inverse")


@dataclass(frozen=True)
class _Case:
    """One bijection, with points ``(n, input_dim)`` and contexts ``(n, context_dim)``."""

    bijection: Bijection
    u: Tensor
    context: Tensor | None
    tolerance: float | None = None

    def assert_close(self, what: str, got: Tensor, expected: Tensor) -> None:
        _assert_close(what, got, expected, self.tolerance)

    @property
    def directions(self) -> dict[str, Direction]:
        return {"forward": self.bijection, "inverse": self.bijection.inverse}

    def results(self) -> tuple[Tensor, ...]:
        return _both_ways(self.bijection, self.u, self.context)

    def rows(self) -> list[tuple[Tensor, Tensor | None]]:
        contexts = [None] * len(self.u) if self.context is None else list(self.context)
        return list(zip(self.u, contexts, strict=True))

    def folded(self) -> tuple[Tensor, Tensor | None]:
        context = None if self.context is None else self.context.unflatten(0, (2, -1))
        return self.u.unflatten(0, (2, -1)), context


@contextmanager
def _property(name: str, make: Make, seed: int, tolerance: float | None = None,
              noise: float = NOISE) -> Iterator[_Case]:
    """Set up a check, and say what it checked where it fails."""
    with forked_rng(seed):
        bijection = perturb(_made(make).double(), noise)
        try:
            yield _Case(bijection, *_points(bijection), tolerance)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type_name(error)}: "
            raise AssertionError(f"{type_name(bijection)} fails the check that {name}. "
                                 f"{kind}{error}\n{bijection!r}") from error


def _made(make: Make) -> Bijection:
    bijection = make()
    if not isinstance(bijection, Bijection):
        raise ValueError("pyro_nfvi.testing expected `make` to return a Bijection, got "
                         f"{type_name(bijection)}.")
    return bijection


def _points(bijection: Bijection, count: int = 4) -> tuple[Tensor, Tensor | None]:
    device = next((x.device for x in bijection.state_dict().values()), torch.device("cpu"))
    u = 2 * torch.randn(count, bijection.input_dim, dtype=torch.float64)
    if not bijection.context_dim:
        return u.to(device), None
    return u.to(device), torch.randn(count, bijection.context_dim, dtype=torch.float64).to(device)


def _both_ways(bijection: Bijection, u: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    return *bijection(u, context), *bijection.inverse(u, context)


def _require(condition: bool, message: str) -> None:
    """An ``assert`` that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


def _assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float | None = None
                  ) -> None:
    """Equal shape and dtype, and values equal to half the digits of the dtype, or as told."""
    for name in ("shape", "dtype"):
        a, b = getattr(expected, name), getattr(got, name)
        _require(a == b, f"Expected {what} of {name} {a}, got {b}.")
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 if tolerance is None else tolerance
    allowed = tolerance * (1 + expected.abs())
    wrong = ~((got - expected).abs() <= allowed)  # so that nan is wrong
    if wrong.any():
        pair = f"{expected[wrong][0].item():.8g}, got {got[wrong][0].item():.8g}"
        raise AssertionError(f"Expected {what} to be {pair}.")


def _true_log_det(function: Direction, case: _Case) -> Tensor:
    """By plain autograd, which also passes through solvers that ``torch.func`` does not know."""
    matrices = [jacobian(lambda u, context=context: function(u, context)[0], u)
                for u, context in case.rows()]
    return torch.linalg.slogdet(torch.stack(matrices)).logabsdet


def _along_parameters(module: Bijection, case: _Case) -> tuple[Direction, tuple[Tensor, ...]]:
    """The module as a function of two points, a step in parameter space, and their contexts."""
    start = {name: p.detach() for name, p in module.named_parameters()}
    steps = {name: torch.randn(p.shape).to(p) for name, p in start.items()}

    def function(u: Tensor, t: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = {name: start[name] + t * steps[name] for name in start}
        point, log_det = functional_call(module, state, (u, context))
        zero = 0 * (u.sum() + t)  # gradcheck skips results that hang on nothing: make them hang
        return point + zero, log_det + zero

    inputs = [case.u[:2], torch.zeros_like(case.u[0, 0])]
    inputs += [] if case.context is None else [case.context[:2]]
    return function, tuple(x.clone().requires_grad_() for x in inputs)


def _slopes(result: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of one linear functional of the result; zeros where it is a constant."""
    if not result.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    weight = torch.linspace(1, 2, result.numel()).to(result).reshape(result.shape)
    return torch.autograd.grad((weight * result).sum(), inputs, retain_graph=True,
                               materialize_grads=True)


def _copies(bijection: Bijection, make: Make) -> dict[str, Bijection]:
    reloaded = _made(make).double()
    reloaded.load_state_dict(bijection.state_dict())
    return {"pickle": pickle.loads(pickle.dumps(bijection)),
            "deepcopy": copy.deepcopy(bijection), "state_dict": reloaded}


def _fresh_code(function: Any) -> Callable[..., Any]:
    """The same function as a new one to torch.compile, whose caches count recompilations."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _error_message(function: Callable[..., Any], *args: Any) -> str:
    """What the ``ValueError`` of a call says; empty if it raises none."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def _mistakes(case: _Case, argument: str) -> list[tuple[str, Any, Any, str]]:
    """What is wrong, the point, the context, and the argument the message should name."""
    u, context = case.u, case.context
    extra = torch.cat([u, u[:, :1]], -1)
    mistakes = [("a point too long", extra, context, argument),
                ("a scalar point", u[0, 0], context, argument),
                ("a list for a point", u.tolist(), context, argument),
                ("integer points", u.long(), context, argument)]
    if context is None:
        return [*mistakes, ("a context none was built for", u, u, "context")]
    return [*mistakes, ("a missing context", u, None, "context"),
            ("a context too long", u, torch.cat([context, context], -1), "context"),
            ("a context of another batch", u, context[:3], "context")]


# ------------------------------------------------------------------ guides

MakeGuide = Callable[[Callable[..., Any]], AutoFlow]
LEVELS = (0.05, 0.5, 0.95)
GUIDE_NOISE = 0.2  # smaller than for bijections: constrained values must stay off their bounds


def check_guide(make_guide: MakeGuide, model: Callable[..., Any], *args: Any, **kwargs: Any
                ) -> None:
    """Run every check of a guide on one model.

    Args:
        make_guide: Builds a fresh guide of a model; called several times.
        model: A Pyro model that broadcasts over particles, with a name that pickle finds.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If a property fails; the message names it and the guide.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi.guides import AutoPlanar
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> check_guide(AutoPlanar, model)
    """
    for check in GUIDE_CHECKS:
        check(make_guide, model, *args, **kwargs)


def check_guide_trains(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                       **kwargs: Any) -> None:
    """SVI moves every parameter the density hangs on, of the first guide and of the second.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If a parameter stays where it was.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_trains(AutoPlanar, model)
    """
    with _guide_property("SVI trains it", make_guide, model, args, kwargs) as case:
        first, second = case.guide, make_guide(model).setup(*args, **kwargs)
        for which, guide in (("the first", first), ("the second", second)):
            # The second guide of a name starts where the param store says: at the first.
            before = {name: p.detach().clone() for name, p in first.named_parameters()}
            alive = _parameters_that_matter(first)
            _require(len(alive) > 0, "The guide has no parameter.")
            _svi_step(case, guide)
            for name, parameter in guide.named_parameters():
                _require(name not in alive or not torch.equal(parameter, before[name]),
                         f"Parameter {name} of {which} guide did not move.")


def check_guide_log_prob(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                         **kwargs: Any) -> None:
    """``log_prob`` of the guide's own draw is the density its trace records.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If it is not.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_log_prob(AutoPlanar, model)
    """
    with _guide_property("log_prob of a draw is its traced density", make_guide, model, args,
                         kwargs) as case:
        trace = poutine.trace(case.guide).get_trace(*args, **kwargs)
        _assert_close("log_prob", case.guide.log_prob(case.values_in(trace)),
                      trace.log_prob_sum())


def check_guide_arbitrary_log_prob(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                                   **kwargs: Any) -> None:
    """``log_prob`` of points the guide did not draw follows from autograd's Jacobian.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If it does not.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_arbitrary_log_prob(AutoPlanar, model)
    """
    with _guide_property("log_prob holds at any point", make_guide, model, args, kwargs) as case:
        layout, (base, transform) = case.guide.layout, case.parts()
        drawn = layout.pack(case.guide.sample_posterior(4))
        z = (drawn + 0.1 * torch.randn_like(drawn)).detach()
        values = layout.constrain(z)[0]
        u = transform.inv(z)
        jacobians = torch.stack([jacobian(lambda point: transform.with_cache(0)(point), row)
                                 for row in u.detach()])
        expected = base.log_prob(u) - torch.linalg.slogdet(jacobians).logabsdet
        expected = expected - case.log_det_of_supports(z)
        _assert_close("log_prob", case.guide.log_prob(values), expected)
        folded = {name: value.unflatten(0, (2, 2)) for name, value in values.items()}
        _assert_close("log_prob of two sample dimensions", case.guide.log_prob(folded),
                      expected.unflatten(0, (2, 2)))


def check_guide_draws(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                      **kwargs: Any) -> None:
    """Draws have the sites' names, shapes, dtype and supports, whichever way they are made.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If they do not, or one seed gives two draws.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_draws(AutoPlanar, model)
    """
    with _guide_property("draws fit their sites", make_guide, model, args, kwargs) as case:
        torch.manual_seed(1)
        traced = case.values_in(poutine.trace(case.guide).get_trace(*args, **kwargs))
        torch.manual_seed(1)
        one = case.guide.sample_posterior(1) if not _draws_plates(case) else None
        many = case.guide.sample_posterior(5)
        _require(set(many) == set(case.sites), f"Expected sites {sorted(case.sites)}, got "
                                               f"{sorted(many)}.")
        for name, node in case.sites.items():
            value, support = node["value"], node["fn"].support
            _require(many[name].shape == (5, *value.shape),
                     f"Expected {name} of shape {(5, *value.shape)}, got {many[name].shape}.")
            _require(many[name].dtype == value.dtype, f"{name} changed its dtype.")
            _require(not many[name].requires_grad, f"{name} carries a graph.")
            _require(bool(support.check(many[name]).all()), f"{name} left {support}.")
            if one is not None:
                _assert_close(f"{name} of sample_posterior", one[name][0], traced[name].detach())


def check_guide_quantiles(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                          **kwargs: Any) -> None:
    """Quantiles are those of the draws, and the median is the one of level a half.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If they are not, to five standard errors.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_quantiles(AutoPlanar, model)
    """
    with _guide_property("quantiles are those of the draws", make_guide, model, args,
                         kwargs) as case:
        layout, count = case.guide.layout, 2000
        quantiles = case.guide.quantiles(LEVELS)
        for name, median in case.guide.median(*args, **kwargs).items():
            _require(torch.equal(median, quantiles[name][1]),
                     f"The median of {name} is not its quantile 0.5.")
        z = layout.pack(case.guide.sample_posterior(count))
        for k, level in enumerate(LEVELS):
            below = (z < layout.pack({name: q[k] for name, q in quantiles.items()}))
            error = (below.to(z.dtype).mean(0) - level).abs().max().item()
            standard = (level * (1 - level) * (1 / count + 1 / 4000)) ** 0.5
            _require(error < 5 * standard,
                     f"Quantile {level} of a coordinate holds {error / standard:.1f} standard "
                     "errors more or fewer of the draws.")


def check_guide_random_state(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                             **kwargs: Any) -> None:
    """Median, quantiles and scales repeat themselves and leave the random state as it was.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If they do not.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_random_state(AutoPlanar, model)
    """
    with _guide_property("summaries leave the random state alone", make_guide, model, args,
                         kwargs) as case:
        before = torch.get_rng_state()
        results = [[*case.guide.median(*args, **kwargs).values(),
                    *case.guide.quantiles(LEVELS, *args, **kwargs).values(),
                    *case.guide._loc_scale(*args, **kwargs)] for _ in range(2)]
        _require(torch.equal(before, torch.get_rng_state()), "The random state changed.")
        for one, other in zip(*results, strict=True):
            _require(torch.equal(one, other), "Two calls gave two results.")
            _require(not one.requires_grad, "A summary carries a graph.")


def check_guide_copies(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                       **kwargs: Any) -> None:
    """Copies are exact: deepcopy, pickle, and state_dict into a fresh guide.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If a copy differs, or copying harms the guide, before or after a step.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_copies(AutoPlanar, model)
    """
    with _guide_property("copies are exact", make_guide, model, args, kwargs) as case:
        for stage in ("at the start", "after a step"):
            copies, results = case.copies(), case.results(case.guide)
            for how, guide in copies.items():
                for name, got in case.results(guide).items():
                    _require(torch.equal(got, results[name]),
                             f"{name} of a copy by {how} {stage} differ.")
            _svi_step(case, case.guide)


def check_guide_elbos(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                      **kwargs: Any) -> None:
    """``Trace_ELBO`` and ``TraceMeanField_ELBO`` are equal, draw by draw.

    A model that scales or masks its latents cannot promise this: Pyro's mean-field ELBO reads
    both from the guide.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If they are not.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_elbos(AutoPlanar, model)
    """
    with _guide_property("the ELBOs agree", make_guide, model, args, kwargs) as case:
        losses = []
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
            torch.manual_seed(1)
            loss = elbo.differentiable_loss(model, case.guide, *args, **kwargs)
            slopes = torch.autograd.grad(loss, [*case.guide.parameters()], allow_unused=True,
                                         materialize_grads=True)
            losses.append((loss, *slopes))
        for one, other in zip(*losses, strict=True):
            _assert_close("the mean-field ELBO, or its gradient,", other, one)


def check_guide_particles(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                          **kwargs: Any) -> None:
    """Vectorized particles are draws of their own, to the left of every plate.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If shapes or densities are others, or the loss is not finite.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_particles(AutoPlanar, model)
    """
    with _guide_property("particles are draws of their own", make_guide, model, args,
                         kwargs) as case:
        nesting = case.max_plate_nesting()
        with pyro.plate("particles", 3, dim=-1 - nesting):
            trace = poutine.trace(case.guide).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        latent = next(node for node in trace.nodes.values()
                      if node.get("infer", {}).get("is_auxiliary"))
        shape = (3, *[1] * nesting)
        _require(latent["log_prob"].shape == shape, f"Expected the latent's log_prob of shape "
                                                    f"{shape}, got {latent['log_prob'].shape}.")
        total, values = latent["log_prob"].reshape(3), {}
        for name, node in case.sites.items():
            value, log_prob = trace.nodes[name]["value"], trace.nodes[name]["log_prob"]
            event = node["fn"].event_dim
            batch = node["value"].shape[:node["value"].dim() - event]
            shape = (3, *[1] * (nesting - len(batch)), *node["value"].shape)
            _require(value.shape == shape,
                     f"Expected {name} of shape {shape}, got {tuple(value.shape)}.")
            values[name] = value.reshape(3, *node["value"].shape)
            total = total + log_prob.reshape(3, -1).sum(-1)
        _assert_close("the density of the particles", total, case.guide.log_prob(values))
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=nesting)
        loss = torch.tensor(elbo.loss(model, case.guide, *args, **kwargs))
        _require(bool(loss.isfinite()), "The loss of three particles is not finite.")


def check_guide_predictive(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                           **kwargs: Any) -> None:
    """``Predictive`` gets the guide's draws, in parallel or one by one, from model or guide.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If a site is missing, of another shape, or outside its support.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_predictive(AutoPlanar, model)
    """
    with _guide_property("Predictive works", make_guide, model, args, kwargs) as case:
        nesting = case.max_plate_nesting()
        for parallel in (False, True):
            options = {"num_samples": 3, "parallel": parallel}
            from_model = Predictive(model, guide=case.guide, return_sites=list(case.sites),
                                    **options)(*args, **kwargs)
            from_guide = Predictive(case.guide, **options)(*args, **kwargs)
            for samples in (from_model, from_guide):
                for name, node in case.sites.items():
                    value, batch = node["value"], node["value"].dim() - node["fn"].event_dim
                    shapes = ((3, *value.shape), (3, *[1] * (nesting - batch), *value.shape))
                    _require(samples[name].shape in shapes,
                             f"Expected {name} of shape {shapes[0]}, got {samples[name].shape}.")
                    _require(bool(node["fn"].support.check(samples[name]).all()),
                             f"{name} left its support.")


def check_guide_neutra(make_guide: MakeGuide, model: Callable[..., Any], *args: Any,
                       **kwargs: Any) -> None:
    """``NeuTraReparam`` gives the model's density at the guide's draw, times its Jacobian.

    A model that scales or masks constrained latents cannot promise this: Pyro scales the
    Jacobian of the constraint along with the density.

    Args:
        make_guide: Builds a fresh guide of a model.
        model: A Pyro model.
        *args: Arguments of the model.
        **kwargs: Likewise.

    Raises:
        AssertionError: If the density differs from the one computed here.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPlanar
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> check_guide_neutra(AutoPlanar, model)
    """
    with _guide_property("NeuTra's density is the model's", make_guide, model, args,
                         kwargs) as case:
        neutra = poutine.trace(NeuTraReparam(case.guide).reparam(model))
        trace = neutra.get_trace(*args, **kwargs)
        latent = next(name for name in trace.nodes if name.endswith("_shared_latent"))
        u, transform = trace.nodes[latent]["value"], case.parts()[1]
        z = transform(u)
        log_det = torch.linalg.slogdet(jacobian(transform.with_cache(0), u)).logabsdet
        values = case.guide.layout.constrain(z)[0]
        plates = poutine.trace(lambda: None).get_trace()
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample":
                plates.add_node(name, **node)
        conditioned = poutine.condition(poutine.replay(model, trace=plates), data=values)
        expected = poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum()
        expected = expected + log_det + case.log_det_of_supports(z)
        _assert_close("the log-density", trace.log_prob_sum(), expected)


#: What :func:`check_guide` runs, in this order.
GUIDE_CHECKS: tuple[Callable[..., None], ...] = (
    check_guide_trains, check_guide_log_prob, check_guide_arbitrary_log_prob, check_guide_draws,
    check_guide_quantiles, check_guide_random_state, check_guide_copies, check_guide_elbos,
    check_guide_particles, check_guide_predictive, check_guide_neutra)


@dataclass(frozen=True)
class _GuideCase:
    """One guide, built for one model and moved away from where it starts."""

    make_guide: MakeGuide
    guide: AutoFlow
    model: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]

    @property
    def sites(self) -> dict[str, Any]:
        """Latent sites of the model, as its prototype trace holds them."""
        return dict(self.guide.prototype_trace.iter_stochastic_nodes())

    def values_in(self, trace: Any) -> dict[str, Tensor]:
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def parts(self) -> tuple[Any, Any]:
        return self.guide.get_base_dist(), self.guide.get_transform()

    def log_det_of_supports(self, z: Tensor) -> Tensor:
        """Log-Jacobian of all constraints, written without the layout."""
        total = z.new_zeros(z.shape[:-1])
        for name, node in self.sites.items():
            transform = biject_to(node["fn"].support)
            part = self.guide.layout.split(z)[name]
            log_det = transform.log_abs_det_jacobian(part, transform(part))
            total = total + log_det.reshape(*z.shape[:-1], -1).sum(-1)
        return total

    def max_plate_nesting(self) -> int:
        trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        return max((-frame.dim for node in trace.nodes.values()
                    for frame in node.get("cond_indep_stack", ())), default=0)

    def results(self, guide: AutoFlow) -> dict[str, Tensor]:
        """What a copy must get right: draws under one seed, and densities of given points."""
        torch.manual_seed(1)
        draws = guide.sample_posterior(3)
        z = torch.linspace(-1, 1, guide.latent_dim).to(next(guide.parameters()))
        log_prob = guide.log_prob(guide.layout.constrain(z)[0])
        medians = {f"Medians of {name}": value for name, value in guide.median().items()}
        return {**{f"Draws of {name}": value for name, value in draws.items()}, **medians,
                "Densities": log_prob.detach()}

    def copies(self) -> dict[str, AutoFlow]:
        reloaded = self.make_guide(self.model).setup(*self.args, **self.kwargs)
        reloaded.load_state_dict(self.guide.state_dict())
        return {"pickle": pickle.loads(pickle.dumps(self.guide)),
                "deepcopy": copy.deepcopy(self.guide), "state_dict": reloaded}


@contextmanager
def _guide_property(name: str, make_guide: MakeGuide, model: Callable[..., Any], args: tuple,
                    kwargs: dict[str, Any]) -> Iterator[_GuideCase]:
    """Set up a check of a guide in a parameter store of its own; say what it checked."""
    with forked_rng(seed=0), pyro.get_param_store().scope():
        guide = make_guide(model)
        if not isinstance(guide, AutoFlow):
            raise ValueError("pyro_nfvi.testing expected `make_guide` to return an AutoFlow, got "
                             f"{type_name(guide)}.")
        perturb(guide.setup(*args, **kwargs), GUIDE_NOISE)
        try:
            yield _GuideCase(make_guide, guide, model, args, kwargs)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type_name(error)}: "
            model_name = getattr(model, "__name__", type_name(model))
            raise AssertionError(f"{type_name(guide)} of {model_name} fails the check that {name}. "
                                 f"{kind}{error}") from error


def _svi_step(case: _GuideCase, guide: AutoFlow) -> None:
    svi = SVI(case.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*case.args, **case.kwargs)


def _parameters_that_matter(guide: AutoFlow) -> set[str]:
    """Names of the parameters in which a draw, or its density, has a gradient."""
    named = dict(guide.named_parameters())
    z, log_prob = guide._flow().rsample_and_log_prob((4,))
    weight = torch.linspace(1, 2, z.numel()).to(z).reshape(z.shape)
    slopes = torch.autograd.grad((weight * z).sum() + log_prob.sum(), [*named.values()],
                                 materialize_grads=True, allow_unused=True)
    return {name for name, slope in zip(named, slopes, strict=True) if slope.any()}


def _draws_plates(case: _GuideCase) -> bool:
    """Whether calling the guide also draws a subsample, and so uses the seed otherwise."""
    return any(plate.subsample_size < plate.size for plate in case.guide.plates.values())
