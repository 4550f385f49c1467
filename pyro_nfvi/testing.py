"""Property checks for your own bijections: what every bijection promises, one function each.

    from pyro_nfvi.testing import check_bijection

    check_bijection(lambda: MyLayer(3, context_dim=2), context_dim=2)

Each check builds fresh bijections with ``make()``, moves their parameters away from the identity,
and works in float64 on random points. It is silent if the property holds, and otherwise raises an
``AssertionError`` that names the property and the bijection. The random number generators of torch
are left as they were.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection, Inverse
from pyro_nfvi.flows.nets import OUTPUT_SCALE, OutputLinear

__all__ = [
    "BIJECTION_CHECKS",
    "check_batch",
    "check_bijection",
    "check_compiles",
    "check_context_broadcasts",
    "check_context_is_used",
    "check_copies",
    "check_dtypes",
    "check_empty_batch",
    "check_gradients",
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
                    skip: Collection[Callable[..., None]] = ()) -> None:
    """Run every check of this module on one bijection.

    Args:
        make: Builds a fresh bijection; called several times.
        context_dim: The ``context_dim`` the bijection should have.
        seed: Seed of the random parameters and points.
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
            check(make, seed=seed)


def check_inverse(make: Make, *, seed: int = 0) -> None:
    """Forward and inverse undo each other, and their log-determinants cancel.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If they do not.
    """
    with _property("the inverse undoes the forward", make, seed) as case:
        forward, inverse = case.directions.values()
        for there, back in ((forward, inverse), (inverse, forward)):
            image, log_det = there(case.u, case.context)
            point, log_det_back = back(image, case.context)
            _assert_close("the point there and back", point, case.u)
            _assert_close("minus the log-det of the way back", -log_det_back, log_det)


def check_log_det(make: Make, *, seed: int = 0) -> None:
    """Both log-determinants equal those of autograd's Jacobian.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If one of them does not.
    """
    with _property("the log-det matches autograd", make, seed) as case:
        for name, function in case.directions.items():
            _, log_det = function(case.u, case.context)
            _assert_close(f"the log-det of {name}", log_det, _true_log_det(function, case))


def check_batch(make: Make, *, seed: int = 0) -> None:
    """A batch, of one or two dimensions, equals its rows one by one.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If it does not.
    """
    with _property("a batch equals its rows", make, seed) as case:
        u, context = case.folded()
        for name, function in case.directions.items():
            rows = [function(*row) for row in case.rows()]
            batch, folded = function(case.u, case.context), function(u, context)
            for k, what in enumerate(("point", "log-det")):
                expected = torch.stack([row[k] for row in rows])
                _assert_close(f"the {what} of {name} on a batch", batch[k], expected)
                _assert_close(f"the {what} of {name} on a two-dimensional batch", folded[k],
                              expected.unflatten(0, (2, -1)))


def check_empty_batch(make: Make, *, seed: int = 0) -> None:
    """A batch of no rows gives results of no rows.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters.

    Raises:
        AssertionError: If it does not.
    """
    with _property("a batch may be empty", make, seed) as case:
        context = None if case.context is None else case.context[:0]
        for name, function in case.directions.items():
            point, log_det = function(case.u[:0], context)
            _assert_close(f"the point of {name}", point, case.u[:0])
            _assert_close(f"the log-det of {name}", log_det, case.u[:0].sum(-1))


def check_context_broadcasts(make: Make, *, seed: int = 0) -> None:
    """The batch shapes of points and context broadcast; holds trivially without context.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If they do not.
    """
    with _property("the context broadcasts", make, seed) as case:
        if case.context is None:
            return
        pairs = [(case.u, case.context[0]), (case.u[0], case.context),
                 (case.u[:2, None], case.context)]
        for name, function in case.directions.items():
            for u, context in pairs:
                batch = torch.broadcast_shapes(u.shape[:-1], context.shape[:-1])
                full = function(u.expand(*batch, -1), context.expand(*batch, -1))
                for k, what in enumerate(("point", "log-det")):
                    _assert_close(f"the {what} of {name}", function(u, context)[k], full[k])


def check_context_is_used(make: Make, *, seed: int = 0) -> None:
    """Another context gives another map; holds trivially without context.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If the context changes nothing.
    """
    with _property("the context is used", make, seed) as case:
        if case.context is None:
            return
        for name, function in case.directions.items():
            one, other = function(case.u, case.context), function(case.u, case.context + 1)
            _require(not torch.equal(one[0], other[0]), f"Two contexts gave one {name}.")


def check_identity_at_start(make: Make, *, seed: int = 0) -> None:
    """A fresh bijection is the identity, with log-determinant zero.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random points.

    Raises:
        AssertionError: If it is not.
    """
    with _property("a fresh bijection is the identity", make, seed, noise=0.0) as case:
        for name, function in case.directions.items():
            point, log_det = function(case.u, case.context)
            _assert_close(f"the point of {name}", point, case.u)
            _assert_close(f"the log-det of {name}", log_det, torch.zeros_like(log_det))


def check_dtypes(make: Make, *, seed: int = 0) -> None:
    """float32 and float64 stay what they are, and agree to half the digits of float32.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If a result has another dtype, or the two disagree.
    """
    with _property("float32 and float64 agree", make, seed) as case:
        exact = case.results()
        context = None if case.context is None else case.context.float()
        single = _Case(case.bijection.float(), case.u.float(), context)
        for what, got, expected in zip(RESULTS, single.results(), exact, strict=True):
            _require(expected.dtype == torch.float64, f"{what} left float64.")
            _assert_close(f"{what} in float32", got, expected.float())


def check_gradients(make: Make, *, seed: int = 0) -> None:
    """First and second derivatives through both directions match finite differences.

    They are taken in the points, in the context, and along one direction in parameter space.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If they do not.
    """
    with _property("first and second derivatives are right", make, seed) as case:
        for module in (case.bijection, Inverse(case.bijection)):
            function, inputs = _along_parameters(module, case)
            for check in (gradcheck, gradgradcheck):
                check(function, inputs, fast_mode=True)


def check_copies(make: Make, *, seed: int = 0) -> None:
    """Copies give the same results: pickle, deepcopy, and state_dict into a fresh object.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If a copy fails or differs, before or after a backward pass.
    """
    with _property("copies give the same results", make, seed) as case:
        for stage in ("at the start", "after a backward pass"):
            for how, bijection in _copies(case.bijection, make).items():
                twin = _Case(bijection, case.u, case.context)
                for what, got, expected in zip(RESULTS, twin.results(), case.results(),
                                               strict=True):
                    _assert_close(f"{what} of a copy by {how} {stage}", got, expected)
            case.u.requires_grad_()
            torch.stack([result.sum() for result in case.results()]).sum().backward()


def check_compiles(make: Make, *, seed: int = 0) -> None:
    """Both directions compile in one graph, and give the same results.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If ``torch.compile(fullgraph=True)`` fails or changes a result.
    """
    with _property("it compiles in one graph", make, seed) as case:
        compiled = torch.compile(_fresh_code(_both_ways), fullgraph=True, backend="eager")
        results = compiled(case.bijection, case.u, case.context)
        for what, got, expected in zip(RESULTS, results, case.results(), strict=True):
            _assert_close(f"{what}, compiled", got, expected)


def check_path_inverse(make: Make, *, seed: int = 0) -> None:
    """The inverse at a known preimage equals the inverse, in value and first derivatives.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If ``_inverse_at(u, z, context)`` differs from ``inverse(z, context)``.
    """
    with _property("the inverse at a known preimage is the inverse", make, seed) as case:
        z, context = case.bijection(case.u, case.context)[0].detach(), case.context
        inputs = [x.requires_grad_() for x in (z, context) if x is not None]
        inputs += case.bijection.parameters()
        expected = case.bijection.inverse(z, context)
        got = case.bijection._inverse_at(case.u, z, context)
        for k, what in enumerate(("point", "log-det")):
            _assert_close(f"the {what}", got[k], expected[k])
            slopes = zip(_slopes(got[k], inputs), _slopes(expected[k], inputs), strict=True)
            for one, other in slopes:
                _assert_close(f"a first derivative of the {what}", one, other)


def check_shape_errors(make: Make, *, seed: int = 0) -> None:
    """Wrong points and contexts raise a ``ValueError`` that names owner and argument.

    Args:
        make: Builds a fresh bijection.
        seed: Seed of the random parameters and points.

    Raises:
        AssertionError: If a mistake passes, or raises something else.
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
    """
    scaled = {id(p) for layer in module.modules() if isinstance(layer, OutputLinear)
              for p in layer.parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            size = noise / (parameter.shape[-1] if parameter.dim() else 1) ** 0.5
            size = size / OUTPUT_SCALE if id(parameter) in scaled else size
            parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=size)
    return module


BIJECTION_CHECKS: tuple[Callable[..., None], ...] = (
    check_inverse, check_log_det, check_batch, check_empty_batch, check_context_broadcasts,
    check_context_is_used, check_identity_at_start, check_dtypes, check_gradients, check_copies,
    check_compiles, check_path_inverse, check_shape_errors)

# ------------------------------------------------------------------ the setting of a check

RESULTS = ("the point of forward", "the log-det of forward",
           "the point of inverse", "the log-det of inverse")


@dataclass(frozen=True)
class _Case:
    """One bijection, with points ``(n, input_dim)`` and contexts ``(n, context_dim)``."""

    bijection: Bijection
    u: Tensor
    context: Tensor | None

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
def _property(name: str, make: Make, seed: int, noise: float = NOISE) -> Iterator[_Case]:
    """Set up a check, and say what it checked where it fails."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        bijection = perturb(_made(make).double(), noise)
        try:
            yield _Case(bijection, *_points(bijection))
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


def _assert_close(what: str, got: Tensor, expected: Tensor) -> None:
    """Equal shape and dtype, and values equal to half the digits of the dtype."""
    for name in ("shape", "dtype"):
        a, b = getattr(expected, name), getattr(got, name)
        _require(a == b, f"Expected {what} of {name} {a}, got {b}.")
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * (1 + expected.abs())
    wrong = ~((got - expected).abs() <= allowed)  # so that nan is wrong
    if wrong.any():
        pair = f"{expected[wrong][0].item():.8g}, got {got[wrong][0].item():.8g}"
        raise AssertionError(f"Expected {what} to be {pair}.")


def _true_log_det(function: Direction, case: _Case) -> Tensor:
    jacobian = jacrev(lambda u, context: function(u, context)[0])
    matrices = torch.stack([jacobian(u, context) for u, context in case.rows()])
    return torch.linalg.slogdet(matrices).logabsdet


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
