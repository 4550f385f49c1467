"""Elementary functions of generated code: accurate to units in the last place, everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.record import record

Function = Callable[[Tensor], Tensor]
special = torch.special
softplus = torch.nn.functional.softplus
NUM_POINTS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code goes to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_NFVI_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


def compiled(function: Function, x: Tensor) -> Tensor:
    value, = CProgram(record(lambda: [function(x)], [x]), [x], [])([x], [])
    return value


def spread(low: float, high: float) -> Tensor:
    """Points spread evenly."""
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(NUM_POINTS, generator=generator, dtype=torch.float64)


def scaled(low: float, high: float) -> Tensor:
    """Points of every order of magnitude between two powers of ten, of both signs."""
    sign = torch.ones(NUM_POINTS, dtype=torch.float64)
    sign[::2] = -1
    return sign * 10 ** spread(low, high)


def positive(low: float, high: float) -> Tensor:
    return scaled(low, high).abs()


def near(center: float) -> Tensor:
    return center + scaled(-16, -1)


def errors(actual: Tensor, exact: Tensor) -> Tensor:
    """Errors in units of the last place, or of the smallest number that has all its digits."""
    info = torch.finfo(actual.dtype)
    exact = torch.where(exact.abs() > info.max, exact.sign() * math.inf, exact)
    same = (actual.double() == exact) | (actual.isnan() & exact.isnan())
    error = (actual.double() - exact).abs() / (exact.abs() * info.eps + info.tiny * info.eps)
    return torch.where(same, 0, error)


# Function, points, and the largest error allowed in float32 and in float64; where torch itself is
# less accurate in float64, identities below take over and the bound is None.
ACCURACY: dict[str, tuple[Function, Callable[[], list[Tensor]], float, float | None]] = {
    "exp": (torch.exp, lambda: [spread(-760, 720), spread(-2, 2), scaled(-30, 0),
                                spread(-110, 95)], 1, 2),
    "expm1": (torch.expm1, lambda: [spread(-50, 720), spread(-2, 2), scaled(-45, 0),
                                    spread(-20, 95)], 2, 2),
    "log": (torch.log, lambda: [positive(-323, 308), near(1).abs(), spread(0, 3),
                                positive(-45, 38)], 1, 2),
    "log1p": (torch.log1p, lambda: [positive(-45, 308), scaled(-20, -1), spread(-1, 2),
                                    -1 + positive(-16, -1), positive(-45, 38)], 2, 2),
    "tanh": (torch.tanh, lambda: [scaled(-45, 2), spread(-3, 3), spread(-25, 25)], 2, 3),
    "sigmoid": (torch.sigmoid, lambda: [spread(-709, 50), spread(-5, 5), spread(-104, 20)], 2, 3),
    "softplus": (softplus, lambda: [spread(-740, 60), spread(-5, 5), spread(-104, 20)], 2, 3),
    "softplus beta": (lambda x: softplus(x, 2.0, 10.0), lambda: [spread(-300, 9)], 3, 4),
    "erf": (torch.erf, lambda: [scaled(-20, 1), spread(-6, 6)], 2, 3),
    "erfc": (torch.erfc, lambda: [spread(-6, 26), scaled(-20, 0)], 2, 4),
    "lgamma": (torch.lgamma, lambda: [positive(-20, 10), spread(3, 50)], 4, 4),
    "digamma": (torch.digamma, lambda: [positive(-20, 10), spread(2, 50)], 1, 4),
    "trigamma": (lambda x: torch.polygamma(1, x), lambda: [spread(0, 9)], 1, None),
    "polygamma": (lambda x: torch.polygamma(3, x), lambda: [positive(-5, 5), spread(0, 9)], 1, 16),
    "erfinv": (torch.erfinv, lambda: [spread(-1, 1), scaled(-20, -1),
                                      1 - positive(-16, -1)], 1, 3),
    "erfcx": (special.erfcx, lambda: [spread(-9, 30), positive(-20, 10)], 1, None),
    "ndtri": (special.ndtri, lambda: [positive(-300, 0), spread(0, 0.49), spread(0.51, 1)], 1, 8),
    "i0": (torch.i0, lambda: [scaled(-5, 2.8), spread(-60, 60)], 1, 16),
    "i0e": (special.i0e, lambda: [scaled(-5, 10), spread(-60, 60)], 1, 16),
    "i1": (special.i1, lambda: [scaled(-5, 2.8), spread(-60, 60)], 1, 16),
    "i1e": (special.i1e, lambda: [scaled(-5, 10), spread(-60, 60)], 1, 16),
    "sqrt": (torch.sqrt, lambda: [positive(-300, 300)], 0.6, 1),
    "rsqrt": (torch.rsqrt, lambda: [positive(-300, 300), positive(-37, 38)], 2, 2),
    "pow": (lambda x: x ** 2.75, lambda: [positive(-14, 14)], 2, 2),
}


@pytest.mark.parametrize(("name", "dtype", "bound"), [
    (name, dtype, bound) for name, (*_, single, double) in ACCURACY.items()
    for dtype, bound in ((torch.float32, single), (torch.float64, double)) if bound is not None],
    ids=str)
def test_a_function_is_accurate_to_units_in_the_last_place(name, dtype, bound):
    function, points, *_ = ACCURACY[name]
    x = torch.cat(points()).to(dtype)
    error = errors(compiled(function, x), function(x.double()))
    worst = error.argmax()
    assert error[worst] <= bound, f"{error[worst]} units at {x[worst]!r}"


INF, NAN = math.inf, math.nan
SPECIAL = [
    (torch.exp, [0.0, -0.0, INF, -INF, NAN, 1e300, -1e300], [1, 1, INF, 0, NAN, INF, 0]),
    (torch.expm1, [0.0, -0.0, INF, -INF, NAN, 1e300, -1e300], [0, -0.0, INF, -1, NAN, INF, -1]),
    (torch.log, [0.0, -0.0, INF, -INF, NAN, 1, -1], [-INF, -INF, INF, NAN, NAN, 0, NAN]),
    (torch.log1p, [0.0, -0.0, INF, -INF, NAN, -1, -2], [0, -0.0, INF, NAN, NAN, -INF, NAN]),
    (torch.tanh, [0.0, -0.0, INF, -INF, NAN, 1e300, -1e300], [0, -0.0, 1, -1, NAN, 1, -1]),
    (torch.sigmoid, [0.0, -0.0, INF, -INF, NAN, 1e300, -1e300], [0.5, 0.5, 1, 0, NAN, 1, 0]),
    (softplus, [INF, -INF, NAN, 1e300, -1e300], [INF, 0, NAN, 1e300, 0]),
    (torch.digamma, [0.0, -0.0, INF, -INF, NAN, -1, -2.0], [-INF, INF, INF, NAN, NAN, NAN, NAN]),
    (lambda x: torch.polygamma(1, x), [0.0, INF, NAN, -1.0], [INF, 0, NAN, INF]),
    (torch.lgamma, [0.0, 1.0, 2.0, INF, -INF, NAN, -1.0], [INF, 0, 0, INF, INF, NAN, INF]),
    (torch.erfinv, [0.0, -0.0, 1, -1, 2, NAN], [0, -0.0, INF, -INF, NAN, NAN]),
    (special.ndtri, [0.0, 1.0, 0.5, 2, -1, NAN], [-INF, INF, 0, NAN, NAN, NAN]),
    (special.erfcx, [0.0, INF, -INF, NAN], [1, 0, INF, NAN]),
    (torch.i0, [0.0, INF, -INF, NAN], [1, INF, INF, NAN]),
    (special.i1e, [0.0, -0.0, INF, NAN], [0, -0.0, 0, NAN]),
    (torch.sgn, [0.0, INF, -INF, 3], [0, 1, -1, 1]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "points", "expected"), SPECIAL, ids=range(len(SPECIAL)))
def test_special_values_are_exact(function, points, expected, dtype):
    x, exact = torch.tensor(points, dtype=dtype), torch.tensor(expected, dtype=dtype)
    made = compiled(function, x)
    torch.testing.assert_close(made, exact, equal_nan=True, rtol=0, atol=0)
    zero = exact == 0
    assert torch.equal(made[zero].signbit(), exact[zero].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_too_small_for_all_their_digits_keep_those_they_have(dtype):
    info = torch.finfo(dtype)
    x = info.smallest_normal * torch.linspace(0, 2, 1001, dtype=dtype)
    for function in (torch.expm1, torch.log1p, torch.tanh, torch.log, torch.sqrt):
        assert (errors(compiled(function, x), function(x.double())) <= 2).all()
    low = math.log(info.smallest_normal) - torch.linspace(-1, 15, 1001, dtype=dtype)
    assert (errors(compiled(torch.exp, low), low.double().exp()) <= 2).all()


def test_digamma_and_trigamma_satisfy_their_recurrences_and_reflections():
    x = spread(0.05, 20)
    for order, sign in ((0, 1), (1, -1)):
        def f(x: Tensor, order: int = order) -> Tensor:
            return compiled(lambda x: torch.polygamma(order, x) if order else torch.digamma(x), x)
        step = sign / x ** (order + 1)
        torch.testing.assert_close(f(x + 1), f(x) + step, rtol=1e-13, atol=1e-12)
    angle = torch.pi * (x - x.round())
    y = compiled(lambda x: torch.polygamma(1, x), -x) + compiled(
        lambda x: torch.polygamma(1, x), 1 + x)
    torch.testing.assert_close(y, torch.pi ** 2 / angle.sin() ** 2, rtol=1e-12, atol=0)
    y = compiled(torch.digamma, 1 + x) - compiled(torch.digamma, -x)
    torch.testing.assert_close(y, -torch.pi / angle.tan(), rtol=1e-11, atol=1e-10)
    known = torch.tensor([torch.pi ** 2 / 2, torch.pi ** 2 / 6], dtype=torch.float64)
    torch.testing.assert_close(compiled(lambda x: torch.polygamma(1, x), torch.tensor(
        [0.5, 1.0], dtype=torch.float64)), known, rtol=1e-15, atol=0)


def test_scaled_erfc_is_erfc_scaled():
    x = spread(-5, 5)
    torch.testing.assert_close(compiled(special.erfcx, x) * (-x.square()).exp(), torch.erfc(x),
                               rtol=2e-14, atol=0)
    x = spread(20, 1e4)  # beyond, its continued fraction
    fraction = x
    for k in range(40, 0, -1):
        fraction = x + k / 2 / fraction
    torch.testing.assert_close(compiled(special.erfcx, x), 1 / (fraction * math.sqrt(torch.pi)),
                               rtol=1e-15, atol=0)


def test_inverses_undo_what_they_invert():
    x = torch.cat([spread(-5, 5), scaled(-10, 0)])
    torch.testing.assert_close(compiled(torch.erfinv, torch.erf(x[x.abs() < 2])), x[x.abs() < 2],
                               rtol=1e-13, atol=0)
    y = spread(-37, 0)
    torch.testing.assert_close(compiled(special.ndtri, torch.erfc(-y / math.sqrt(2)) / 2), y,
                               rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(compiled(lambda x: x.exp().log(), x), x, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(compiled(lambda x: x.expm1().log1p(), x), x, rtol=1e-13, atol=0)
