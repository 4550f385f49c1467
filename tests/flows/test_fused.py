"""Splines and chains of ridges as one operation: the plain twin is the truth."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.engine import record
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.flows import Compose, Planar, RationalQuadraticSpline
from pyro_nfvi.flows.fused import ridge_heights, spline_pass
from pyro_nfvi.flows.planar import plain_heights

DOUBLE = torch.float64
SHAPES = {"one particle": (1, 3), "a batch": (37, 3), "two batch dims": (2, 5, 4),
          "one coordinate": (16, 1)}


def spline_case(shape, num_bins=5, dtype=DOUBLE, spread=3.0):
    """Values in all bins and both tails, their parameters, and gradients from above."""
    torch.manual_seed(0)
    x = torch.linspace(-8, 8, torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    params = spread * torch.randn(*shape, 3 * num_bins + 3, dtype=dtype)
    return x, params, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def plain(x, params, gy, gl, num_bins, inverse):
    """Value, log-derivative and gradients of the plain spline, by autograd."""
    spline = RationalQuadraticSpline(num_bins)
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    value, log_slope = spline.inverse(x, params) if inverse else spline.forward(x, params)
    return [value, log_slope, *torch.autograd.grad((value, log_slope), (x, params), (gy, gl))]


def fused(x, params, gy, gl, num_bins, inverse):
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    value, log_slope = spline_pass(x, params, num_bins, 5.0, inverse=inverse)
    return [value, log_slope, *torch.autograd.grad((value, log_slope), (x, params), (gy, gl))]


def assert_same(values, expected, tolerance=1e-9):
    """Errors are small beside the largest entry: steep bins amplify the rounding of flat ones."""
    for value, truth in zip(values, expected, strict=True):
        assert value.shape == truth.shape
        assert (value - truth).abs().max() <= tolerance * (1e-3 + truth.abs().max())


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_operation_has_the_values_and_gradients_of_the_spline(shape, inverse):
    case = spline_case(shape)
    assert_same(fused(*case, 5, inverse), plain(*case, 5, inverse))


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_generated_code_has_the_values_and_gradients_of_the_spline(inverse, dtype, tolerance):
    cases = [spline_case(shape, 8, dtype, spread=1.0) for shape in SHAPES.values()]
    # the same again with the batch innermost in memory, as the compiled loop has it
    cases += [tuple(t.transpose(0, -1).contiguous().transpose(0, -1) for t in case)
              for case in cases]
    inputs = [tensor for case in cases for tensor in case]
    recording = record(lambda: [r for case in cases for r in fused(*case, 8, inverse)], inputs)
    names = {node.name for node in recording.graph.graph.nodes}
    assert any("spline" in name for name in names)
    values = CProgram(recording, inputs, [])(inputs, [])
    expected = [r for case in cases for r in plain(*(t.to(DOUBLE) for t in case), 8, inverse)]
    assert_same(values, expected, tolerance)


def test_the_spline_offers_itself_as_one_operation_when_recorded():
    x, params, *_ = spline_case((4, 3))
    spline = RationalQuadraticSpline(5)
    recording = record(lambda: spline.forward(x, params), [x, params])
    assert [str(n.target) for n in recording.graph.graph.nodes if "spline" in n.name] \
        == ["pyro_nfvi.spline_forward.default"]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_operation_runs_under_vmap(inverse):
    x, params, *_ = spline_case((7, 3))

    def one(x, params):
        return spline_pass(x, params, 5, 5.0, inverse=inverse)
    batched = torch.func.vmap(one)(x, params)
    assert_same(batched, one(x, params))
    shared = torch.func.vmap(one, in_dims=(0, None))(x, params[0])
    assert_same(shared, one(x, params[:1]))


# ------------------------------------------------------------------ chains of planar layers

def chain(num_layers, dim, dtype=DOUBLE):
    torch.manual_seed(1)
    layers = [Planar(dim).to(dtype) for _ in range(num_layers)]
    for layer in layers:
        torch.nn.init.normal_(layer.params.value)
    return layers


@pytest.mark.parametrize("num_layers", [2, 3, 8])
def test_a_chain_is_its_layers_one_after_the_other(num_layers):
    layers = chain(num_layers, 4)
    u = torch.randn(9, 4, dtype=DOUBLE)
    z, log_det = Compose(layers)(u)
    x, total = u, 0
    for layer in layers:
        x, term = layer(x)
        total = total + term
    assert_same([z, log_det], [x, total])
    parameters = [p for layer in layers for p in layer.parameters()]
    assert_same(torch.autograd.grad((z.square().sum() + log_det.sum()), parameters),
                torch.autograd.grad((x.square().sum() + total.sum()), parameters))


@pytest.mark.parametrize("batch", [(), (1,), (33,), (2, 3)], ids=str)
def test_heights_as_one_operation_have_the_values_and_gradients_of_the_recurrence(batch):
    torch.manual_seed(2)
    a, g = torch.randn(*batch, 6, dtype=DOUBLE), torch.randn(6, 6, dtype=DOUBLE)
    a, g, gt = a.requires_grad_(), g.requires_grad_(), torch.randn(*batch, 6, dtype=DOUBLE)

    def both(function):
        t = function(a, g)
        return [t, *torch.autograd.grad(t, (a, g), gt)]
    expected = both(plain_heights)
    assert_same(both(ridge_heights), expected)
    recording = record(lambda: both(ridge_heights), [a, g])
    assert_same(CProgram(recording, [a, g], [])([a, g], []), expected)
