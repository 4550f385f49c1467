"""Integrals of positive networks: the quadrature, its bounds, and the search for the root."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from pyro_nfvi.flows import MonotoneIntegral, umnn
from pyro_nfvi.flows.monotone import MAX_LOG_SLOPE

INTEGRAL = MonotoneIntegral()


def random(count: int, scale: float, reach: float = 2.5, dtype: torch.dtype = torch.float64
           ) -> tuple[torch.Tensor, torch.Tensor]:
    params = scale * torch.randn(count, 1, INTEGRAL.params_per_dim, dtype=dtype)
    return reach * torch.randn(count, 1, dtype=dtype), params


def slope(x: float, params: torch.Tensor) -> float:
    """The integrand as the class states it, in plain numbers."""
    _, c, a, s, m = (part.numpy() for part in params.split([1, 1, 8, 8, 8]))
    a = a / (1 + np.abs(a).sum() / MAX_LOG_SLOPE)
    s = 5 * np.exp(0.5 * np.tanh(s / 0.5) - 0.5)
    m = m + 5 * (2 * (np.arange(8) + 0.5) / 8 - 1)
    x = min(max(x, -5.0), 5.0)
    return math.exp(3 * math.tanh(c[0] / 3) + (a * np.tanh(s / 5 * (x - m))).sum())


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_sum_is_the_integral_of_adaptive_quadrature(scale):
    u, params = random(20, scale, reach=4.0)
    z, log_slope = INTEGRAL.forward(u, params)
    for k in range(len(u)):
        point = u[k].item()
        exact, _ = quad(slope, 0, point, args=(params[k, 0],), epsabs=0, epsrel=1e-12, limit=200,
                        points=[5.0 * np.sign(point)] if abs(point) > 5 else None)
        shift = params[k, 0, 0].item()
        assert z[k].item() - shift == pytest.approx(exact, rel=1e-11, abs=1e-11)
        assert log_slope[k].item() == pytest.approx(math.log(slope(point, params[k, 0])), abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0, 10.0, 100.0])
def test_the_log_derivative_of_the_sum_is_the_integrand_stated(scale):
    u, params = random(5000, scale)
    u.requires_grad_()
    z, log_slope = INTEGRAL.forward(u, params)
    derivative, = torch.autograd.grad(z.sum(), u)
    error = (derivative.log() - log_slope).abs()
    assert error.max() < 2e-6
    assert error.quantile(0.99) < 1e-10


def test_the_quadrature_holds_for_the_steepest_network_there_is():
    u, place = torch.meshgrid(torch.linspace(-5, 5, 101).double(),
                              torch.linspace(-6, 6, 121).double(), indexing="ij")
    u = u.reshape(-1, 1).requires_grad_()
    params = torch.zeros(len(u), 1, 5).double()  # of one unit: shift, c, a, s, m
    params[..., 2], params[..., 3], params[..., 4] = 1e9, 1e9, place.reshape(-1, 1)
    for sign in (1, -1):
        params[..., 2] *= sign
        z, log_slope = MonotoneIntegral(1).forward(u, params)
        derivative, = torch.autograd.grad(z.sum(), u)
        assert (log_slope.abs().max() - MAX_LOG_SLOPE).abs() < 1e-3
        assert (derivative.log() - log_slope).abs().max() < 2e-6


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("reach", [4.0, 1000.0])
def test_any_parameters_invert_in_float64(scale, reach):
    u, params = random(1000, scale, reach)
    z, log_slope = INTEGRAL.forward(u, params)
    back, log_slope_back = INTEGRAL.inverse(z, params)
    torch.testing.assert_close(back, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-log_slope_back, log_slope, rtol=1e-9, atol=1e-9)


def test_any_parameters_stay_finite_in_float32():
    u, params = random(5000, 20.0, 100.0, torch.float32)
    for direction in (INTEGRAL.forward, INTEGRAL.inverse):
        for result in direction(u, params):
            assert result.isfinite().all()


def test_it_is_onto_with_linear_tails():
    _, params = random(100, 3.0)
    far = torch.full((100, 1), 1e6).double()
    for sign in (1, -1):
        z, log_slope = INTEGRAL.forward(sign * far, params)
        assert (sign * z > 50).all()  # 1e6 times the least slope, exp(-9), less the box
        further, same = INTEGRAL.forward(2 * sign * far, params)
        torch.testing.assert_close(same, log_slope)
        torch.testing.assert_close((further - z) / (sign * far), log_slope.exp())


@pytest.mark.parametrize("bound", [0.5, 50.0])
def test_the_box_only_sets_the_scale(bound):
    u, params = random(50, 1.0)
    params[..., 0] = 0
    params[..., -8:] *= bound / 5  # the centres
    z, log_slope = MonotoneIntegral(bound=bound).forward(u * bound / 5, params)
    params[..., -8:] /= bound / 5
    expected, expected_slope = INTEGRAL.forward(u, params)
    torch.testing.assert_close(z * 5 / bound, expected)
    torch.testing.assert_close(log_slope, expected_slope)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_units": 0}, "`num_units` to be an integer >= 1, got 0"),
    ({"num_units": 2.0}, "`num_units` to be an integer >= 1, got 2.0"),
    ({"bound": -1}, "`bound` to be a positive number, got -1"),
])
def test_a_wrong_option_is_named(options, message):
    for make in (MonotoneIntegral, lambda **options: umnn(3, **options)):
        with pytest.raises(ValueError, match=f"^MonotoneIntegral expected {message}.$"):
            make(**options)
