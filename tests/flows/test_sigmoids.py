"""Layers of sigmoids: the paper's formula, its tails, and a start that tells units apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_nfvi.flows import Autoregressive, DeepSigmoid, Flow, naf
from pyro_nfvi.flows.sigmoids import MIN_SLOPE, SPREAD

KINDS = {"one": DeepSigmoid(), "two": DeepSigmoid(4, 2), "dense": DeepSigmoid(3, 3, dense=True)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(sigmoids: DeepSigmoid, count: int, scale: float, reach: float,
           dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    params = scale * torch.randn(count, 1, sigmoids.params_per_dim, dtype=dtype)
    return reach * torch.randn(count, 1, dtype=dtype), params


def mixed(u: Tensor, log_a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """The deep sigmoidal flow of the paper, as it is written there."""
    inside = torch.sigmoid((3 * torch.tanh(log_a / 3)).exp() * u + b)
    return torch.logit((w.softmax(-1) * inside).sum(-1, keepdim=True))


def test_one_layer_is_the_formula_of_the_paper():
    u, params = random(KINDS["one"], 200, 1.0, 2.0)
    log_a, b, w, shift, raw = params.squeeze(1).split([8, 8, 8, 1, 1], -1)
    spread = torch.linspace(-SPREAD, SPREAD, 8).double()
    start = mixed(u, torch.zeros(8).double(), spread, torch.zeros(8).double())
    moved = mixed(u, log_a, b + spread, w) - start
    expected = shift + (3 * torch.tanh(raw / 3)).exp() * (u + (1 - MIN_SLOPE) * moved)
    torch.testing.assert_close(KINDS["one"].forward(u, params)[0], expected)


def test_two_layers_are_the_formula_twice():
    u, params = random(KINDS["two"], 200, 1.0, 2.0)
    *layers, shift, raw = params.squeeze(1).split([4] * 6 + [1, 1], -1)
    spread = torch.linspace(-SPREAD, SPREAD, 4).double()
    zeros, learned, start = torch.zeros(4).double(), u, u
    for log_a, b, w in (layers[:3], layers[3:]):
        learned = mixed(learned, log_a, b + spread, w)
        start = mixed(start, zeros, spread, zeros)
    moved = u + (1 - MIN_SLOPE) * (learned - start)
    expected = shift + (3 * torch.tanh(raw / 3)).exp() * moved
    torch.testing.assert_close(KINDS["two"].forward(u, params)[0], expected)


def test_a_dense_layer_has_the_parameters_of_the_paper():
    k = 3
    first, hidden, last = 2 * k + k * k, k * k + 2 * k + k * k, k * k + 2 * k + k
    assert KINDS["dense"].params_per_dim == first + hidden + last + 2


@every_kind
def test_slopes_stay_above_their_floor(kind):
    u, params = random(KINDS[kind], 20_000, 10.0, 10.0)
    _, log_slope = KINDS[kind].forward(u, params)
    raw = params[..., -1]
    least = 3 * torch.tanh(raw / 3) + torch.tensor(MIN_SLOPE).double().log()
    assert (log_slope >= least - 1e-6).all()


@every_kind
@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("reach", [4.0, 1000.0])
def test_any_parameters_invert_in_float64(kind, scale, reach):
    u, params = random(KINDS[kind], 3000, scale, reach)
    z, log_slope = KINDS[kind].forward(u, params)
    back, log_slope_back = KINDS[kind].inverse(z, params)
    torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-log_slope_back, log_slope, rtol=1e-6, atol=1e-5)


@every_kind
@pytest.mark.parametrize("u", [-1e4, -100.0, 100.0, 1e4])
def test_the_tails_are_right_in_float32(kind, u):
    _, params = random(KINDS[kind], 500, 0.5, 1.0, torch.float32)
    u = torch.full((500, 1), u)
    z, log_slope = KINDS[kind].forward(u, params)
    exact, exact_slope = KINDS[kind].forward(u.double(), params.double())
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-4)
    rounding = 20 * torch.finfo(torch.float32).eps * u[0].abs().item()  # of the sigmoids' inputs
    torch.testing.assert_close(log_slope.double(), exact_slope, rtol=0, atol=1e-5 + rounding)
    assert (z.sign() == u.sign()).all()
    back, _ = KINDS[kind].inverse(z, params)
    torch.testing.assert_close(back, u, rtol=1e-4, atol=0)


@every_kind
def test_it_is_onto_with_linear_tails(kind):
    _, params = random(KINDS[kind], 200, 1.0, 1.0)
    for sign in (1, -1):
        u = torch.full((200, 1), sign * 1e6).double()
        (z, log_slope), (further, same) = (KINDS[kind].forward(x, params) for x in (u, 2 * u))
        assert (sign * z > 10).all()
        torch.testing.assert_close(same, log_slope, rtol=0, atol=1e-3)
        torch.testing.assert_close((further - z) / u, log_slope.exp(), rtol=1e-3, atol=0)


@every_kind
def test_extreme_parameters_stay_finite_in_float32(kind):
    u, params = random(KINDS[kind], 5000, 20.0, 100.0, torch.float32)
    for direction in (KINDS[kind].forward, KINDS[kind].inverse):
        for result in direction(u, params):
            assert result.isfinite().all()


@every_kind
def test_gradients_at_the_start_tell_the_units_apart(kind):
    sigmoids = KINDS[kind]
    u = torch.randn(2000, 1).double()
    params = torch.zeros(1, sigmoids.params_per_dim).double().requires_grad_()
    z, log_slope = sigmoids.forward(u, params.expand(2000, 1, -1))
    slopes, = torch.autograd.grad((z**4 / 10 - log_slope).mean(), params)
    units = slopes[0, -2 - 3 * sigmoids.num_units:-2].unflatten(0, (3, -1))  # of the last layer
    for row in units:
        gaps = (row[:, None] - row)[~torch.eye(len(row)).bool()].abs()
        assert gaps.min() > 1e-3 * row.abs().max()


@pytest.mark.slow
def test_it_bends_where_affine_layers_cannot():
    torch.manual_seed(0)

    def log_density(z: Tensor) -> Tensor:
        modes = torch.stack([-2 * (z - 2).square(), -2 * (z + 2).square()])
        return torch.logsumexp(modes, 0).squeeze(-1) - torch.tensor(2 * torch.pi).sqrt().log()
    flow = Flow(naf(1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(600):
        z, log_q = flow.rsample_and_log_prob((256,))
        optimizer.zero_grad()
        (log_q - log_density(z)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        z, log_q = flow.rsample_and_log_prob((20_000,))
    assert 0 <= (log_q - log_density(z)).mean() < 0.1  # the best Gaussian has 0.69
    assert 0.4 < (z > 0).float().mean() < 0.6


def test_it_searches_only_in_the_inverse(monkeypatch):
    layer = Autoregressive(3, transformer=DeepSigmoid(3))
    monkeypatch.setattr("pyro_nfvi.flows.transformers.increasing_root", None)
    u = torch.randn(5, 3)
    z, _ = layer(u)
    layer._inverse_at(u, z, None)
    with pytest.raises(TypeError):
        layer.inverse(z)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_units": 0}, "`num_units` to be an integer >= 1, got 0"),
    ({"num_layers": 0}, "`num_layers` to be an integer >= 1, got 0"),
    ({"num_layers": 1.5}, "`num_layers` to be an integer >= 1, got 1.5"),
])
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=f"^DeepSigmoid expected {message}.$"):
        DeepSigmoid(**options)


def test_one_unit_is_enough():
    sigmoids = DeepSigmoid(1, 2, dense=True)
    u, params = random(sigmoids, 100, 1.0, 2.0)
    back, _ = sigmoids.inverse(sigmoids.forward(u, params)[0], params)
    torch.testing.assert_close(back, u)
