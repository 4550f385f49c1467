"""Log-determinants by structure: right, batched, differentiable, and within their memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from pyro_nfvi.engine.record import NotRecordable, record
from pyro_nfvi.flows import LowRankUpdate
from pyro_nfvi.flows.jacobian import (
    MemoryMeter,
    jacobian,
    log_abs_det,
    low_rank_log_det,
    power_series_log_det,
    rademacher,
    trace,
    value_and_log_abs_det,
)
from pyro_nfvi.testing import perturb
from tests.flows import modules

SHAPES = [(), (3,), (2, 3)]
MAPS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "full": ("full", modules.Mix),
    "diagonal": ("diagonal", modules.Bend),
    "triangular": ("triangular", modules.Steer),
    "upper": ("triangular", modules.SteerUp),
    "known-diagonal": ("triangular", modules.SteerWithDiagonal),
    "low-rank": ("low-rank", modules.Ridges),
    "low-rank-base": ("low-rank", partial(modules.Ridges, bend=True)),
}
every_map = pytest.mark.parametrize("name", MAPS)


def made(name: str, dim: int = 4, context_dim: int = 0) -> tuple[str, nn.Module]:
    structure, make = MAPS[name]
    return structure, perturb(make(dim, context_dim)).double()


def points(shape: tuple[int, ...], dim: int = 4) -> Tensor:
    return torch.randn(*shape, dim, dtype=torch.float64)


def true_log_det(fn: Callable, x: Tensor, *context: Tensor) -> Tensor:
    """By autograd, a row and a coordinate at a time."""
    rows = x.detach().reshape(-1, x.shape[-1])
    others = [c.expand(*x.shape[:-1], -1).reshape(len(rows), -1) for c in context]
    matrices = [torch.autograd.functional.jacobian(fn, tuple(args))
                for args in zip(rows, *others, strict=True)]
    return torch.linalg.slogdet(torch.stack([m[0] for m in matrices]))[1].reshape(x.shape[:-1])


def within_four_standard_errors(draws: Tensor, truth: Tensor) -> bool:
    error = (draws.mean(0) - truth).abs()
    return bool((error <= 4 * draws.std(0) / len(draws)**0.5).all())


# ------------------------------------------------------------------ the value

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [1, 4])
@every_map
def test_a_log_det_matches_autograd(name, dim, shape):
    structure, module = made(name, dim)
    x = points(shape, dim)
    z, log_det = value_and_log_abs_det(module, x, structure=structure)
    torch.testing.assert_close(z, module(x))
    torch.testing.assert_close(log_det, true_log_det(module, x))


@every_map
def test_every_map_is_also_a_full_one(name):
    structure, module = made(name)
    x = points((5,))
    torch.testing.assert_close(log_abs_det(module, x, structure=structure), log_abs_det(module, x))


@pytest.mark.parametrize("max_bytes", [None, 20_000])
@every_map
def test_a_context_broadcasts_to_the_points(name, max_bytes):
    structure, module = made(name, context_dim=2)
    x, context = points((2, 3)), points((3,), 2)
    log_det = log_abs_det(module, x, context, structure=structure, max_bytes=max_bytes)
    torch.testing.assert_close(log_det, true_log_det(module, x, context))


@pytest.mark.parametrize("structure", ["full", "triangular"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_both_modes_agree(mode, structure):
    _, module = made("triangular")
    x = points((5,))
    log_det = log_abs_det(module, x, structure=structure, mode=mode)
    torch.testing.assert_close(log_det, log_abs_det(module, x, structure=structure))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dim", [1, 3, 9])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_a_jacobian_need_not_be_square(mode, out_dim, shape):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out_dim)).double()
    x = points(shape)
    z, matrix = jacobian(net, x, mode=mode)
    assert matrix.shape == (*shape, out_dim, 4)
    torch.testing.assert_close(z, net(x))
    rows = [torch.autograd.functional.jacobian(net, row) for row in x.reshape(-1, 4)]
    torch.testing.assert_close(matrix, torch.stack(rows).reshape(*shape, out_dim, 4))


@pytest.mark.parametrize("with_diagonal", [False, True])
def test_the_determinant_lemma_matches_the_dense_determinant(with_diagonal):
    left, right = points((2, 3, 5), 2), points((2, 3, 2), 5)
    diagonal = points((2, 3), 5) if with_diagonal else None
    base = torch.ones(5).double() if diagonal is None else diagonal
    dense = torch.linalg.slogdet(torch.diag_embed(base) + left @ right)[1]
    torch.testing.assert_close(low_rank_log_det(left, right, diagonal), dense)


def test_parts_make_a_low_rank_map():
    inner, outer = nn.Linear(6, 2).double(), nn.Linear(2, 6).double()
    update = LowRankUpdate(inner, nn.Sequential(nn.Tanh(), outer), torch.sinh)
    x = points((5,), 6)
    torch.testing.assert_close(update(x), x.sinh() + outer(torch.tanh(inner(x))))
    torch.testing.assert_close(log_abs_det(update, x, structure="low-rank"),
                               true_log_det(update, x))


def test_a_conditioner_held_still_makes_a_triangular_map_elementwise():
    weight = points((4,)).tril(-1)

    def shifted(v: Tensor, x: Tensor) -> Tensor:
        return torch.sinh(v) * (x @ weight.mT).exp()
    x = points((5,))
    one_product = log_abs_det(lambda v: shifted(v, x), x, structure="diagonal")
    torch.testing.assert_close(one_product, true_log_det(lambda v: shifted(v, v), x))


def test_a_singular_jacobian_has_log_det_minus_infinity():
    x = torch.zeros(2, 3)
    assert (log_abs_det(lambda v: v**2, x, structure="diagonal") == -torch.inf).all()
    assert (log_abs_det(lambda v: v.sum(-1, keepdim=True).expand(2, 3), x) == -torch.inf).all()


@pytest.mark.parametrize("max_bytes", [None, 10_000])
@every_map
def test_a_batch_may_be_empty(name, max_bytes):
    structure, module = made(name)
    x = torch.zeros(0, 2, 4).double()
    assert log_abs_det(module, x, structure=structure, max_bytes=max_bytes).shape == (0, 2)


@pytest.mark.parametrize("max_bytes", [None, 10_000])
@every_map
def test_a_log_det_stays_in_single_precision(name, max_bytes):
    structure, module = made(name)
    x = points((5,))
    single = log_abs_det(module.float(), x.float(), structure=structure, max_bytes=max_bytes)
    assert single.dtype == torch.float32
    expected = log_abs_det(module.double(), x, structure=structure)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ one sweep for all rows

class Counted(nn.Module):
    """A module that notes the shape of every call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.shapes = module, []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.module(x)


@pytest.mark.parametrize("structure", ["full", "diagonal", "triangular"])
def test_the_map_is_called_once_however_many_rows(structure):
    counted = Counted(modules.Bend(4).double())
    for count in (1, 1000):
        counted.shapes.clear()
        log_abs_det(counted, points((count,)), structure=structure)
        assert counted.shapes == [(count, 4)]


def test_a_known_diagonal_takes_no_products():
    _, module = made("known-diagonal")
    with torch.no_grad():  # products would need derivatives of what has none
        module.forward = lambda x: torch.zeros_like(x).copy_(x.detach())
        assert log_abs_det(module, points((5,)), structure="triangular").isfinite().all()


@pytest.mark.parametrize("name", ["full", "diagonal", "triangular", "low-rank-base"])
def test_it_compiles_in_one_graph(name):
    structure, module = made(name)
    x = points((5,))
    expected = log_abs_det(module, x, structure=structure)
    run = torch.compile(lambda x: log_abs_det(module, x, structure=structure), fullgraph=True,
                        backend="eager")
    torch.testing.assert_close(run(x), expected)


def test_it_nests_in_transforms_of_torch():
    _, module = made("full")
    x = points((5,))
    by_rows = torch.func.vmap(lambda row: log_abs_det(module, row))(x)
    torch.testing.assert_close(by_rows, log_abs_det(module, x))
    slope = torch.func.grad(lambda x: log_abs_det(module, x).sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(log_abs_det(module, x).sum(), x)[0])


# ------------------------------------------------------------------ gradients

@pytest.mark.parametrize("max_bytes", [None, 5_000], ids=["whole", "in-chunks"])
@every_map
def test_first_and_second_derivatives_match_differences(name, max_bytes):
    structure, module = made(name, 3)
    parameters = dict(module.named_parameters())

    def log_det(x: Tensor, *values: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(
                module, dict(zip(parameters, values, strict=True))):
            return log_abs_det(module, x, structure=structure, max_bytes=max_bytes)
    inputs = (points((4,), 3).requires_grad_(), *parameters.values())
    if max_bytes is None:
        assert gradcheck(log_det, inputs, fast_mode=True)
        assert gradgradcheck(log_det, inputs, fast_mode=True)
        return
    # The parts are computed again in the backward pass, from the module as it is then.
    whole = log_abs_det(module, inputs[0], structure=structure)
    parts = log_abs_det(module, inputs[0], structure=structure, max_bytes=max_bytes)
    for got, expected in zip(both_derivatives(parts, inputs), both_derivatives(whole, inputs),
                             strict=True):
        torch.testing.assert_close(got, expected)


def both_derivatives(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    slopes = torch.autograd.grad(value.square().sum(), inputs, create_graph=True,
                                 materialize_grads=True)
    total = sum((slope**2).sum() for slope in slopes)
    return [*slopes, *torch.autograd.grad(total, inputs, materialize_grads=True)]


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_gradients_in_the_smallest_chunks_are_those_of_the_whole(mode):
    _, module = made("full", 6)
    inputs = (points((7,), 6).requires_grad_(), *module.parameters())
    least = least_bytes(module, inputs[0], mode)
    parts = log_abs_det(module, inputs[0], mode=mode, max_bytes=least)
    whole = log_abs_det(module, inputs[0], mode=mode)
    for got, expected in zip(both_derivatives(parts, inputs), both_derivatives(whole, inputs),
                             strict=True):
        torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------ memory

def least_bytes(fn: Callable, x: Tensor, mode: str = "auto", structure: str = "full") -> int:
    """The bound below which the error says nothing fits."""
    with pytest.raises(ValueError, match="expected `max_bytes` of at least") as error:
        log_abs_det(fn, x, mode=mode, structure=structure, max_bytes=1)
    return int(re.search(r"at least ([\d,]+)", str(error.value))[1].replace(",", ""))


class Residual(nn.Module):
    """The points plus a network of them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


@pytest.mark.parametrize("factor", [1, 3, 20])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("with_gradient", [False, True], ids=["value", "gradient"])
def test_memory_stays_under_the_bound(with_gradient, mode, factor):
    fn, x = Residual(8), torch.randn(8 * factor, 8).requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        bound = factor * least_bytes(fn, x, mode)
        with MemoryMeter() as meter:
            log_det = log_abs_det(fn, x, mode=mode, max_bytes=bound)
            if with_gradient:
                torch.autograd.grad(log_det.sum(), [x, *fn.parameters()], allow_unused=True)
    # Images and log-dets are there twice as parts become whole; so are gradients, as they add up.
    results = 2 * (x.nbytes + log_det.nbytes)
    if with_gradient:
        results += 2 * (x.nbytes + sum(p.nbytes for p in fn.parameters()))
    assert meter.peak - results <= bound


@pytest.mark.parametrize("structure", ["full", "triangular", "diagonal", "low-rank"])
def test_a_larger_bound_takes_fewer_and_larger_chunks(structure):
    counted = Counted(modules.Bend(6))
    module = LowRankUpdate(counted, nn.Tanh()) if structure == "low-rank" else counted
    with torch.no_grad():
        x, sizes = torch.randn(500, 6), []
        whole = log_abs_det(module, x, structure=structure)
        least = least_bytes(module, x, structure=structure)
        for bound in (2 * least, 16 * least, 128 * least, 10**8):
            counted.shapes.clear()
            log_det = log_abs_det(module, x, structure=structure, max_bytes=bound)
            torch.testing.assert_close(log_det, whole)
            sizes.append(max(rows for rows, _ in counted.shapes))
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == 500


def test_a_bound_below_one_row_takes_the_products_of_a_row_in_parts():
    counted = Counted(Residual(40))
    with torch.no_grad():
        x = torch.randn(3, 40)
        whole = log_abs_det(counted, x)
        least = least_bytes(counted, x)
        counted.shapes.clear()
        torch.testing.assert_close(log_abs_det(counted, x, max_bytes=least), whole)
    assert set(counted.shapes) == {(1, 40)}
    assert counted.shapes.count((1, 40)) >= 3 * 40  # a product at a time


def test_measuring_leaves_no_trace():
    fn, x = nn.Sequential(Residual(4), nn.Dropout(0.5)), torch.randn(50, 4)
    state = torch.get_rng_state()
    with torch.no_grad():
        log_abs_det(fn.eval(), x, max_bytes=20_000)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in fn.parameters())


def test_a_bound_makes_no_gradient_where_there_is_none():
    x = torch.randn(50, 4)
    z, log_det = value_and_log_abs_det(torch.sinh, x, max_bytes=20_000)
    assert not z.requires_grad
    assert not log_det.requires_grad
    fn = Residual(4)
    assert log_abs_det(fn, x, max_bytes=20_000).requires_grad
    assert not log_abs_det(fn.requires_grad_(False), x, max_bytes=20_000).requires_grad


def test_a_bound_has_no_graph_and_so_runs_between_graphs():
    module = made("full")[1]
    x = points((20,))
    expected = log_abs_det(module, x)

    def bounded(x: Tensor) -> Tensor:
        return log_abs_det(module, x, max_bytes=20_000)
    with torch.no_grad():  # torch warns of itself where a gradient passes between graphs
        torch.testing.assert_close(torch.compile(bounded, backend="eager")(x), expected)


def test_the_meter_counts_what_is_alive_at_once():
    x = torch.zeros(1000)
    with MemoryMeter() as meter:
        y = x + 1
        y = (y * 2).view(10, 100)  # 2 x 4000 bytes for a moment
        z = y.sum(0)
    assert (meter.peak, meter.alive) == (8000, 4000 + z.nbytes)
    with MemoryMeter() as meter:
        x.add_(1)
    assert meter.peak == 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the C library of Linux")
@pytest.mark.parametrize("with_gradient", [False, True], ids=["value", "gradient"])
def test_the_memory_of_the_process_stays_under_the_bound(with_gradient):
    """The Jacobians alone take 96 x 256^2 x 4 bytes = 25 MB; the C library gives all back."""
    code = """
import sys, torch
from torch import nn
from pyro_nfvi.flows.jacobian import log_abs_det
torch.manual_seed(0)
fn = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
x = torch.randn(96, 256)
def memory(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
def peak(bound):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = memory("VmRSS")
    with torch.set_grad_enabled(bool(int(sys.argv[1]))):
        log_det = log_abs_det(fn, x, max_bytes=bound)
        if log_det.requires_grad:
            log_det.sum().backward()
    return memory("VmHWM") - before
peak(8 * 2**20)  # loads code
print(peak(8 * 2**20), peak(None))
"""
    result = subprocess.run([sys.executable, "-c", code, str(int(with_gradient))], check=True,
                            capture_output=True, text=True,
                            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    chunks, whole = map(int, result.stdout.split())
    assert chunks <= 8 * 2**20
    assert whole >= 40 * 2**20


# ------------------------------------------------------------------ estimates

def contraction(dim: int = 4, size: float = 0.5) -> nn.Module:
    """A network whose Jacobian has spectral norm below ``size``."""
    first, second = nn.Linear(dim, 8).double(), nn.Linear(8, dim).double()
    with torch.no_grad():
        for layer in (first, second):
            layer.weight /= torch.linalg.matrix_norm(layer.weight, 2) / size**0.5
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [1, 4])
def test_an_exact_trace_matches_the_jacobian(dim, shape):
    fn, x = contraction(dim), points(shape, dim)
    expected = jacobian(fn, x)[1].diagonal(dim1=-2, dim2=-1).sum(-1)
    for options in ({}, {"mode": "forward"}, {"max_bytes": 20_000}):
        z, got = trace(fn, x, **options)
        torch.testing.assert_close(z, fn(x))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_a_trace_estimate_is_unbiased(noise):
    fn, x = made("full")[1], points((2, 3))
    probes = rademacher(x, 4000) if noise == "rademacher" else points((4000, 2, 3))
    draws = torch.stack([trace(fn, x, noise=probe)[1] for probe in probes[:500]])
    together = trace(fn, x, noise=probes)[1]
    torch.testing.assert_close(trace(fn, x, noise=probes[:500])[1], draws.mean(0))
    exact = trace(fn, x)[1]
    assert within_four_standard_errors(draws, exact)
    assert ((together - exact).abs() <= 4 * draws.std(0) / 4000**0.5).all()


def test_probes_are_signs_of_the_dtype_of_the_points():
    probes = rademacher(points((2, 3)), 1000)
    assert probes.shape == (1000, 2, 3, 4)
    assert probes.dtype == torch.float64
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(probes.mean())) < 4 / probes.numel()**0.5


@pytest.mark.parametrize("num_terms", [1, 3, 10, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_power_series_is_as_near_as_its_bound_says(shape, num_terms):
    fn, x = contraction(), points(shape)
    z, log_det = power_series_log_det(fn, x, num_terms=num_terms)
    torch.testing.assert_close(z, fn(x))
    error = (log_det - true_log_det(lambda v: v + fn(v), x)).abs()
    assert (error <= 4 * 0.5**(num_terms + 1) / (num_terms + 1) / 0.5 + 1e-12).all()


def test_a_cut_series_is_off_by_more_than_chance_and_roulette_mends_it():
    fn, x = contraction(size=0.7), points((6,))
    exact = true_log_det(lambda v: v + fn(v), x)
    cut = power_series_log_det(fn, x, num_terms=1)[1]
    draws = torch.stack([power_series_log_det(fn, x, num_terms=1, roulette=0.6)[1]
                         for _ in range(600)])
    assert within_four_standard_errors(draws, exact)
    assert not within_four_standard_errors(draws, cut)


@pytest.mark.parametrize("num_terms", [1, 3])
def test_a_power_series_with_probes_and_roulette_is_unbiased(num_terms):
    fn, x = contraction(), points((6,))
    exact = true_log_det(lambda v: v + fn(v), x)
    draws = torch.stack([
        power_series_log_det(fn, x, noise=rademacher(x, 2), num_terms=num_terms, roulette=0.5)[1]
        for _ in range(600)])
    assert within_four_standard_errors(draws, exact)


def test_a_neumann_gradient_is_the_gradient_if_the_traces_are_exact():
    fn, x = contraction(), points((6,)).requires_grad_()
    slopes = []
    for neumann in (False, True):
        _, log_det = power_series_log_det(fn, x, num_terms=7, neumann_gradient=neumann)
        slopes.append((log_det, *torch.autograd.grad(log_det.sum(), [x, *fn.parameters()],
                                                     materialize_grads=True)))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("neumann", [False, True], ids=["series", "neumann"])
def test_the_gradient_of_an_estimate_is_unbiased(neumann):
    fn, x = contraction(), points((6,)).requires_grad_()
    exact, = torch.autograd.grad(log_abs_det(lambda v: v + fn(v), x).sum(), x)
    draws = []
    for _ in range(600):
        _, log_det = power_series_log_det(fn, x, noise=rademacher(x), num_terms=2, roulette=0.5,
                                          neumann_gradient=neumann)
        draws.append(torch.autograd.grad(log_det.sum(), x)[0])
    assert within_four_standard_errors(torch.stack(draws), exact)


def test_a_neumann_gradient_holds_the_memory_of_one_product():
    fn, x = contraction(8), points((200,), 8).requires_grad_()
    peaks = {}
    for neumann in (False, True):
        for num_terms in (5, 50):
            with MemoryMeter() as meter:
                _, log_det = power_series_log_det(fn, x, noise=rademacher(x), num_terms=num_terms,
                                                  neumann_gradient=neumann)
                log_det.sum().backward()
            peaks[neumann, num_terms] = meter.peak
    assert peaks[True, 50] <= 1.01 * peaks[True, 5]
    assert peaks[False, 50] >= 3 * peaks[False, 5]


def test_a_second_derivative_of_a_neumann_gradient_is_refused():
    fn, x = contraction(), points((6,)).requires_grad_()
    _, log_det = power_series_log_det(fn, x, neumann_gradient=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(log_det.sum(), x, create_graph=True)


def test_second_derivatives_of_a_power_series_match_differences():
    fn, x = contraction(), points((3,)).requires_grad_()
    noise = rademacher(x, 2)
    for options in ({}, {"noise": noise}):
        log_det = partial(power_series_log_det, fn, num_terms=4, **options)
        assert gradcheck(lambda x, log_det=log_det: log_det(x)[1], x)
        assert gradgradcheck(lambda x, log_det=log_det: log_det(x)[1], x)


# ------------------------------------------------------------------ mistakes

POINT = torch.zeros(5, 3)


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: log_abs_det(torch.sin, POINT, structure="banded"),
     "log_abs_det expected `structure` to be one of full, diagonal, triangular, low-rank, "
     "got 'banded'."),
    (lambda: log_abs_det(torch.sin, POINT, structure=None),
     "log_abs_det expected `structure` to be one of full, diagonal, triangular, low-rank, "
     "got None."),
    (lambda: log_abs_det(torch.sin, POINT, structure="low-rank"),
     "log_abs_det expected a map of structure 'low-rank' to have `inner` and `outer`, got "
     "builtin_function_or_method without inner and outer. Make it of its parts: "
     "LowRankUpdate(inner, outer)."),
    (lambda: log_abs_det(torch.sin, POINT, mode="both"),
     "log_abs_det expected `mode` to be one of auto, forward, reverse, got 'both'."),
    (lambda: log_abs_det(torch.sin, POINT, max_bytes=1e9),
     "log_abs_det expected `max_bytes` to be an integer >= 1, got 1000000000.0."),
    (lambda: log_abs_det(torch.sin, POINT, max_bytes=10), "log_abs_det expected `max_bytes` of at "
     "least ... for one row of 3 coordinates, got 10."),
    (lambda: log_abs_det(POINT, POINT),
     "log_abs_det expected `fn` to be a map of tensors, got Tensor."),
    (lambda: log_abs_det(torch.sin, [0.0]),
     "log_abs_det expected `x` to be a tensor of shape (*batch, 1), got list."),
    (lambda: log_abs_det(torch.sin, torch.tensor(0.0)),
     "log_abs_det expected `x` of shape (*batch, 1), got ()."),
    (lambda: log_abs_det(torch.sin, POINT.long()),
     "log_abs_det expected `x` to hold floating-point numbers, got torch.int64. "
     "Convert it: x.double()."),
    (lambda: log_abs_det(torch.add, POINT, torch.zeros(4, 3)),
     "log_abs_det expected the batch shapes of `x` and `context` to broadcast, got (5, 3) and "
     "(4, 3)."),
    (lambda: log_abs_det(lambda x: x[..., :2], POINT),
     "log|det J| expected `fn` to return a tensor of the shape of x, (5, 3), got (5, 2)."),
    (lambda: log_abs_det(lambda x: x[..., :2], POINT, max_bytes=10**6),
     "log|det J| expected `fn` to return a tensor of the shape of x, (1, 3), got (1, 2)."),
    (lambda: log_abs_det(lambda x: x.sum(-1), POINT, structure="diagonal"),
     "log|det J| expected `fn` to return a tensor of the shape of x, (5, 3), got (5,)."),
    (lambda: LowRankUpdate(nn.Linear(3, 1), None),
     "LowRankUpdate expected `outer` to be a map of tensors, got NoneType."),
    (lambda: trace(torch.sin, POINT, noise=torch.zeros(3)),
     "trace expected `noise` of shape (*probes, 5, 3), got (3,). Draw it: rademacher(x)."),
    (lambda: trace(torch.sin, POINT, noise=4),
     "trace expected `noise` of shape (*probes, 5, 3), got int. Draw it: rademacher(x)."),
    (lambda: trace(torch.sin, POINT, noise=POINT, max_bytes=100),
     "trace expected `max_bytes` to be None beside `noise`, got 100. Pass fewer probes at a time."),
    (lambda: power_series_log_det(torch.sin, POINT, num_terms=0),
     "power_series_log_det expected `num_terms` to be an integer >= 1, got 0."),
    (lambda: power_series_log_det(torch.sin, POINT, roulette=1.0),
     "power_series_log_det expected `roulette` to be a probability between 0 and 1, got 1.0."),
    (lambda: rademacher(POINT, 0),
     "rademacher expected `num_probes` to be an integer >= 1, got 0."),
])
def test_a_mistake_is_named(mistake, message):
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        mistake()


def test_a_recording_refuses_a_bound_so_that_a_fit_runs_without_it():
    x = torch.randn(5, 3)
    with pytest.raises(NotRecordable, match="max_bytes measures memory"):
        record(lambda: [log_abs_det(torch.sin, x, max_bytes=10**6)], [x])
    recording = record(lambda: [log_abs_det(torch.sin, x)], [x])
    torch.testing.assert_close(recording.graph(x)[0], log_abs_det(torch.sin, x))
