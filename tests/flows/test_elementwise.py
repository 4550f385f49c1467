"""Elementwise maps against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_nfvi.flows import Diagonal, Elementwise, Flow, LeakyReLU, SinhArcsinh
from pyro_nfvi.testing import perturb


@pytest.mark.parametrize("reach", [3.0, 1e3])
def test_sinh_arcsinh_is_what_its_name_says(reach):
    u, params = reach * torch.randn(500, 1).double(), torch.randn(500, 1, 2).double()
    z, log_slope = SinhArcsinh().forward(u, params)
    shift, scale = 5 * torch.tanh(params[..., 0] / 5), torch.tanh(params[..., 1]).exp()
    x = scale * u.asinh() + shift
    torch.testing.assert_close(z, x.sinh())
    torch.testing.assert_close(log_slope, (x.cosh() * scale / (1 + u * u).sqrt()).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("u", [-1e4, 1e4, 0.0])
def test_sinh_arcsinh_inverts_however_extreme_its_parameters(u, dtype):
    params = 5 * torch.randn(500, 1, 2, dtype=dtype)
    u = torch.full((500, 1), u, dtype=dtype)
    z, log_slope = SinhArcsinh().forward(u, params)
    back, log_slope_back = SinhArcsinh().inverse(z, params)
    half_the_digits = torch.finfo(dtype).eps ** 0.5
    torch.testing.assert_close(back, u, rtol=half_the_digits, atol=half_the_digits)
    torch.testing.assert_close(-log_slope_back, log_slope, rtol=0, atol=10 * half_the_digits)


def test_sinh_arcsinh_skews_and_makes_tails():
    u = torch.randn(100_000, 1).double()

    def moments(shift: float, log_scale: float) -> tuple[float, float]:
        params = torch.tensor([[shift, log_scale]]).double().expand(len(u), 1, 2)
        z, _ = SinhArcsinh().forward(u, params)
        z = (z - z.mean()) / z.std()
        return z.pow(3).mean().item(), z.pow(4).mean().item()
    assert moments(0.5, 0.0)[0] > 0.5
    assert moments(-0.5, 0.0)[0] < -0.5
    assert moments(0.0, 0.5)[1] > 5
    assert moments(0.0, -0.5)[1] < 2.5


def test_a_leaky_rectifier_has_two_slopes():
    params = torch.tensor([[-1.0, 0.5]])
    slopes = (3 * torch.tanh(params / 3)).exp().squeeze(0)
    for u, slope in ((-2.0, slopes[0]), (2.0, slopes[1])):
        z, log_slope = LeakyReLU().forward(torch.tensor([u]), params)
        torch.testing.assert_close(z, u * slope[None])
        torch.testing.assert_close(log_slope, slope.log()[None])


def test_the_density_of_a_leaky_rectifier_integrates_to_one():
    flow = perturb(Flow(Elementwise(1, transformer=LeakyReLU())), 2.0).double()
    total = 0.0
    for side in (-1, 1):  # apart, as the density jumps at zero
        z = side * torch.linspace(1e-9, 100, 200_001).double()
        density = flow.log_prob(z.unsqueeze(-1)).exp()
        total += torch.trapezoid(density, z.abs()).item()
    assert total == pytest.approx(1, abs=1e-6)


def test_every_coordinate_has_its_own_parameters():
    layer = perturb(Elementwise(4), 2.0).double()
    jacobian = torch.func.jacrev(lambda u: layer(u)[0])(torch.full((4,), 0.7).double())
    assert torch.equal(jacobian, jacobian.diagonal().diag())
    assert len(jacobian.diagonal().unique()) == 4


def test_it_learns_a_skewed_density():
    flow = Flow(Elementwise(1))
    affine = Flow(Diagonal(1))
    losses = []
    for candidate in (flow, affine):
        optimizer = torch.optim.Adam(candidate.parameters(), lr=0.02)
        for _ in range(300):
            z, log_q = candidate.rsample_and_log_prob((256,))
            loss = (log_q - (z - z.exp()).squeeze(-1)).mean()  # the log of an exponential
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            z, log_q = candidate.rsample_and_log_prob((50_000,))
            losses.append((log_q - (z - z.exp()).squeeze(-1)).mean().item())
    assert -0.01 < losses[0] < 0.04 < losses[1]


def test_a_wrong_transformer_is_named():
    with pytest.raises(ValueError, match="^Elementwise expected `transformer` to be a Transformer"):
        Elementwise(2, transformer="spline")


def test_its_repr_shows_its_transformer():
    assert repr(Elementwise(3, 2)).startswith(
        "Elementwise(\n  3, context_dim=2, transformer=SinhArcsinh()")


def test_sinh_arcsinh_at_zero_parameters_is_exact_far_out():
    u = torch.tensor([[1e-6, 1.0, 30.0, 1e4]]).double().mT
    z, log_slope = SinhArcsinh().forward(u, torch.zeros(4, 1, 2).double())
    torch.testing.assert_close(z, u, rtol=1e-12, atol=0)
    assert (log_slope.abs() < 1e-12).all()
    assert math.isfinite(float(SinhArcsinh().forward(torch.tensor([1e30]), torch.zeros(1, 2))[0]))
