"""Block neural autoregressive layers: structure, bounds, and roots one after another."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jacrev

from pyro_nfvi.flows import BlockAutoregressive, Flow, Inverse, Triangular, bnaf
from pyro_nfvi.testing import perturb


def random(scale: float, input_dim: int = 4, context_dim: int = 0, **options
           ) -> BlockAutoregressive:
    return perturb(BlockAutoregressive(input_dim, context_dim, **options), scale).double()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_hidden", [1, 3])
def test_a_coordinate_sees_itself_and_all_before(num_hidden, reverse):
    layer = random(1.0, num_hidden=num_hidden, reverse=reverse)
    points = torch.randn(20, 4).double()
    slopes = sum(jacrev(lambda u: layer(u)[0])(u).abs() for u in points)
    allowed = torch.ones(4, 4).triu() if reverse else torch.ones(4, 4).tril()
    assert torch.equal(slopes > 0, allowed.bool())


@pytest.mark.parametrize("scale", [0.5, 3.0, 20.0])
def test_every_derivative_is_within_its_gate(scale):
    layer = random(scale)
    u = (3 * torch.randn(500, 4)).double().requires_grad_()
    z, _ = layer(u)
    gate = torch.nn.functional.softplus(layer.gate() + 0.541324854612918) - 1
    for i in range(4):
        slope = torch.autograd.grad(z[:, i].sum(), u, retain_graph=True)[0][:, i] - 1
        assert (slope * gate[i].sign() >= -1e-12).all()  # the block is monotone
        assert (slope.abs() <= gate[i].abs() + 1e-12).all()  # and no steeper than its bound


def test_the_bound_on_the_slope_is_reached_where_no_unit_saturates():
    layer = BlockAutoregressive(1, block_dim=3, num_hidden=2).double()
    with torch.no_grad():
        layer.gate.value += 2.0
        for below in layer.below:
            below.bias.zero_()
    _, log_det = layer(torch.zeros(1).double())  # every tanh at zero
    gate = (1 - 1e-3) * (torch.nn.functional.softplus(torch.tensor(2.541324854612918)) - 1)
    torch.testing.assert_close(log_det, torch.log1p(gate).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_any_parameters_invert_in_float64(context_dim, scale):
    layer = random(scale, 4, context_dim)
    u = 3 * torch.randn(200, 4).double()
    context = torch.randn(200, 2).double() if context_dim else None
    z, log_det = layer(u, context)
    back, log_det_back = layer.inverse(z, context)
    torch.testing.assert_close(back, u, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(-log_det_back, log_det, rtol=1e-6, atol=1e-6)


def test_extreme_parameters_stay_finite_in_float32():
    layer = perturb(BlockAutoregressive(4), 20.0)
    with torch.no_grad():
        for direction in (layer, layer.inverse):
            for result in direction(100 * torch.randn(2000, 4)):
                assert result.isfinite().all()


def test_it_is_onto():
    layer = random(3.0, 2)
    z = torch.tensor([[1e6, -1e6], [-1e6, 1e6]]).double()
    torch.testing.assert_close(layer(layer.inverse(z)[0])[0], z)


def divergence(flow: Flow) -> float:
    """Least KL divergence from a banana that 400 steps find."""
    def log_density(z: torch.Tensor) -> torch.Tensor:
        x, y = z.unbind(-1)
        return -0.5 * (x.square() + ((y - x.square()) / 0.5).square()) - math.log(math.pi)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 2 - step / 200)
        z, log_q = flow.rsample_and_log_prob((128,))
        optimizer.zero_grad()
        (log_q - log_density(z)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        z, log_q = flow.rsample_and_log_prob((20_000,))
        return (log_q - log_density(z)).mean().item()


@pytest.mark.slow
def test_it_bends_where_a_gaussian_cannot():
    assert 0 <= divergence(Flow(bnaf(2))) < 0.25 < 0.5 < divergence(Flow(Triangular(2)))


def test_its_inverse_draws_the_other_way():
    layer = random(1.0, 3)
    z = torch.randn(5, 3).double()
    torch.testing.assert_close(Inverse(layer)(z)[0], layer.inverse(z)[0])


@pytest.mark.parametrize(("options", "message"), [
    ({"block_dim": 0}, "`block_dim` to be an integer >= 1, got 0"),
    ({"num_hidden": 0}, "`num_hidden` to be an integer >= 1, got 0"),
    ({"num_hidden": 1.5}, "`num_hidden` to be an integer >= 1, got 1.5"),
])
def test_a_wrong_option_is_named(options, message):
    for make in (BlockAutoregressive, bnaf):
        with pytest.raises(ValueError, match=f"^BlockAutoregressive expected {message}.$"):
            make(3, **options)
