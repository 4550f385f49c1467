"""Residual flows: contractions stay contractions, and their log-determinants are right."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian

from pyro_nfvi import residual
from pyro_nfvi.engine.record import record
from pyro_nfvi.flows import Compose, Diagonal, Flow, Inverse, LipSwish, Residual
from pyro_nfvi.flows.contractive import contracted
from pyro_nfvi.flows.linearized import Linearized, Perceptron, value_and_slope
from pyro_nfvi.flows.roots import NotConverged
from pyro_nfvi.testing import perturb
from tests.flows.banana import elbo_at_the_end, elbo_by_svi, fitted, log_evidence

ACTIVATIONS = [LipSwish, nn.Tanh, nn.ELU, nn.Softplus, nn.ReLU]


def scattered(layer: Residual, size: float = 5.0) -> Residual:
    """Large weights throughout: the bound is reached in many directions."""
    return perturb(layer, size * layer.input_dim ** 0.5)


# ------------------------------------------------------------------ the bound

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 3), (64, 64), (30, 200)], ids=str)
@pytest.mark.parametrize("bound", [0.3, 0.999])
def test_a_contracted_matrix_keeps_to_the_bound(shape, bound, dtype):
    noise = torch.randn(shape, dtype=dtype)
    equal = torch.linalg.qr(noise.T if shape[0] < shape[1] else noise).Q  # all singular values 1
    for matrix in (noise, equal):
        for size in (0.0, 1e-30, 0.01, 1.0, 1e3, 1e15):
            norm = torch.linalg.matrix_norm(contracted(size * matrix, bound), 2)
            assert norm <= bound * (1 + 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (64, 64)], ids=str)
def test_a_contracted_matrix_comes_near_the_bound(shape):
    matrix = 100 * torch.randn(shape).double()
    norm = torch.linalg.matrix_norm(contracted(matrix, 0.9), 2)
    assert norm >= 0.9 * (1 + min(shape)) ** (-1 / 64)


def test_a_matrix_well_inside_the_bound_stays():
    matrix = torch.randn(64, 3).double()
    matrix = 0.4 * matrix / torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(contracted(matrix, 0.9), matrix, rtol=1e-12, atol=0)


@pytest.mark.parametrize("matrix", [torch.zeros(3, 2), 2 * torch.eye(3), torch.randn(2, 4)],
                         ids=["zero", "equal-values", "random"])
def test_contraction_has_second_derivatives_everywhere(matrix):
    matrix = matrix.double().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        check(lambda w: contracted(w, 0.9), matrix)


@pytest.mark.parametrize("raw_beta", [-20.0, -1.0, 0.5, 5.0, 100.0])
def test_lipswish_has_slopes_of_at_most_one(raw_beta):
    activation = LipSwish().double()
    with torch.no_grad():
        activation.raw_beta.fill_(raw_beta)
    x = torch.linspace(-50, 50, 20_001).double()
    slope = activation.value_and_slope(x)[1]
    assert slope.abs().max() <= 1
    assert slope.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_of_an_activation_is_that_of_autograd(activation):
    x = torch.linspace(-3, 3, 100).double().requires_grad_()
    module = activation().double()
    value, slope = value_and_slope(module, x)
    torch.testing.assert_close(value, module(x))
    torch.testing.assert_close(slope, torch.autograd.grad(module(x).sum(), x)[0])


@pytest.mark.parametrize("context_dim", [0, 2], ids=["no-context", "context"])
@pytest.mark.parametrize("hidden_dims", [(), (64,), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("activation", [LipSwish, nn.Tanh, nn.ELU])
def test_a_network_is_a_contraction_whatever_its_weights_and_context(activation, hidden_dims,
                                                                    context_dim):
    layer = scattered(Residual(4, context_dim, lipschitz=0.8, hidden_dims=hidden_dims,
                               activation=activation).double())
    context = 10 * torch.randn(context_dim).double() if context_dim else None
    a, b = 3 * torch.randn(2, 500, 4).double()
    near = a + 1e-4 * b
    for other in (b, near):
        moved = layer.network(a, context) - layer.network(other, context)
        assert (moved.norm(dim=-1) <= 0.8 * (a - other).norm(dim=-1) * (1 + 1e-9)).all()


def test_a_layer_can_stretch_and_squeeze_nearly_to_its_bound():
    for sign in (1, -1):
        layer = Residual(1, lipschitz=0.9, activation=nn.ReLU, hidden_dims=(8,)).double()
        with torch.no_grad():
            layer.network.hidden[0].weight.fill_(100.0)
            layer.network.hidden[0].bias.fill_(1000.0)
            layer.network.output.weight.fill_(sign * 1e4)
        slope = layer(torch.zeros(1).double())[1].exp()
        assert abs(slope - 1) > 0.85
        assert (slope > 1) == (sign > 0)


# ------------------------------------------------------------------ the network at a point

@pytest.mark.parametrize("widths", [(3,), (3, 5), (3, 5, 4), (5, 3, 4), (5, 6, 2, 7),
                                    (4, 5, 6, 7, 8), (1, 3), (2, 4, 4), (6, 1)], ids=str)
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)
def test_what_is_read_off_the_factors_is_what_autograd_says(widths, batch):
    dims, dim = [*widths, widths[0]], widths[0]
    network = Perceptron(
        [0.5 * torch.randn(b, a).double() / a ** 0.5 for a, b in zip(dims, dims[1:], strict=False)],
        [torch.randn(b).double() for b in dims[1:]], [nn.Tanh() for _ in widths[1:]])
    x, v = torch.randn(2, *batch, dim).double()
    at: Linearized = network.at(x)
    j = torch.stack([jacobian(network, row) for row in x.reshape(-1, dim)])
    j = j.reshape(*batch, dim, dim)
    eye = torch.eye(dim).double()
    torch.testing.assert_close(at.value, network(x))
    torch.testing.assert_close(at.trace(), j.diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(at.log_det(), torch.linalg.slogdet(eye + j).logabsdet)
    torch.testing.assert_close(at.solver()(v),
                               torch.linalg.solve(eye + j, v.unsqueeze(-1)).squeeze(-1))


# ------------------------------------------------------------------ the inverse

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("activation", [LipSwish, nn.Tanh, nn.ELU])
@pytest.mark.parametrize("lipschitz", [0.5, 0.99])
def test_extreme_weights_and_far_points_invert(lipschitz, activation, dtype):
    for input_dim, hidden_dims in ((1, (64,)), (5, (64,)), (5, (16, 16)), (20, (8,))):
        layer = scattered(Residual(input_dim, lipschitz=lipschitz, activation=activation,
                                   hidden_dims=hidden_dims)).to(dtype)
        u = torch.cat([torch.randn(50, input_dim), 1e3 * torch.randn(50, input_dim)]).to(dtype)
        with torch.no_grad():
            z, log_det = layer(u)
            back, log_det_back = layer.inverse(z)
        # A slope of 1 - L magnifies rounding by as much.
        allowed = 64 * torch.finfo(dtype).eps / (1 - lipschitz) * (1 + u.abs().amax())
        assert (back - u).abs().max() <= allowed
        error = (log_det_back + log_det)[:50].abs().max()
        assert error <= (0.05 if dtype == torch.float32 else 1e-8)


def test_a_search_takes_few_steps(monkeypatch):
    layer = scattered(Residual(5, lipschitz=0.99).double())
    steps = []
    better = Residual._better
    monkeypatch.setattr(Residual, "_better",
                        staticmethod(lambda *args: steps.append(1) or better(*args)))
    layer.inverse(3 * torch.randn(1000, 5).double())
    assert 0 < len(steps) <= 8


def test_the_inverse_at_a_known_preimage_has_second_derivatives():
    layer = perturb(Residual(3).double())
    u = torch.randn(2, 3).double()
    z = layer(u)[0].detach().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        check(lambda z: layer._inverse_at(u, z, None), z)


def test_the_inverse_passes_vmap():
    layer = perturb(Residual(3).double())
    z = torch.randn(7, 3).double()
    u, log_det = torch.func.vmap(layer.inverse)(z)
    expected = layer.inverse(z)
    torch.testing.assert_close(u, expected[0])
    torch.testing.assert_close(log_det, expected[1])


def test_nan_stays_in_its_row():
    layer = perturb(Residual(3))
    z = torch.randn(4, 3)
    expected = layer.inverse(z)
    z[1, 0], z[2, 1] = math.nan, math.inf
    u, log_det = layer.inverse(z)
    for got, right in ((u, expected[0]), (log_det, expected[1])):
        torch.testing.assert_close(got[[0, 3]], right[[0, 3]])
        assert got[1:3].isnan().any(-1).all()


class Kinked(nn.Module):
    """A sine, whose slope somebody may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.slope * x)


def no_contraction() -> Residual:
    layer = scattered(Residual(2, activation=Kinked))
    with torch.no_grad():
        layer.network.activations[0].slope.fill_(300.0)
    return layer


def test_a_network_that_is_no_contraction_is_named():
    with pytest.raises(NotConverged, match=r"^Residual found no inverse of \d+ points in \d+ "
                       "steps, so its network is no contraction: use an `activation` whose slope "
                       "stays at most 1, such as LipSwish, nn.Tanh or nn.ELU.$"):
        no_contraction().inverse(torch.randn(100, 2))


def test_in_a_graph_a_point_without_inverse_is_nan():
    layer, z = no_contraction(), torch.randn(100, 2)
    weight = layer.network.output.weight
    u, = record(lambda: [layer.inverse(z)[0]], [weight]).graph(weight)
    assert u.isnan().any()


def test_not_converged_is_an_error_of_the_user_and_of_linear_algebra():
    assert issubclass(NotConverged, ValueError)
    assert issubclass(NotConverged, torch.linalg.LinAlgError)


# ------------------------------------------------------------------ the series

def strong(input_dim: int = 3, lipschitz: float = 0.7, **options) -> Residual:
    """A layer whose Jacobian is near the bound, so that a series has something to miss."""
    layer = Residual(input_dim, lipschitz=lipschitz, activation=nn.ReLU, hidden_dims=(16,),
                     **options).double()
    with torch.no_grad():
        q = torch.linalg.qr(torch.randn(16, input_dim)).Q.double()
        layer.network.hidden[0].weight.copy_(1e3 * q)
        layer.network.hidden[0].bias.fill_(1e3)
        layer.network.output.weight.copy_(-1e5 * q.mT)  # J is nearly -0.7 I
    return layer


@pytest.mark.parametrize("num_terms", [1, 2, 5, 20])
def test_a_truncated_series_keeps_to_its_bound(num_terms):
    torch.manual_seed(0)
    exact = strong()
    layer = Residual(3, lipschitz=0.7, num_terms=num_terms, num_probes=4000, activation=nn.ReLU,
                     hidden_dims=(16,)).double()
    layer.load_state_dict(exact.state_dict())
    u = torch.randn(5, 3).double()
    gap = (layer(u)[1] - exact(u)[1]).abs().max()
    noise = 5 * 3 / 4000 ** 0.5  # standard errors of probes, whose products are at most 3
    assert gap <= layer.log_det_bias + noise
    assert gap >= layer.log_det_bias / 2 - noise  # the bound is not empty: J is nearly -L I


def test_the_stated_bias_is_the_rest_of_the_series():
    bias = Residual(3, lipschitz=0.5, num_terms=2).log_det_bias
    assert bias == pytest.approx(3 * (math.log(2) - 0.5 - 0.125))
    assert Residual(3).log_det_bias == 0
    assert Residual(3, num_terms=2, roulette=0.9).log_det_bias == 0
    assert 0 <= Residual(3, lipschitz=0.5, num_terms=200).log_det_bias <= 1e-15


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_roulette_makes_the_series_unbiased(direction):
    torch.manual_seed(0)
    exact = strong()
    layer = Residual(3, lipschitz=0.7, num_terms=2, roulette=0.75, activation=nn.ReLU,
                     hidden_dims=(16,)).double()
    layer.load_state_dict(exact.state_dict())
    u = torch.randn(3).double()
    with torch.no_grad():
        points = u.expand(20, 3)
        function, truth = ((layer.forward, exact(u)[1]) if direction == "forward"
                           else (layer.inverse, exact.inverse(u)[1]))
        draws = torch.stack([function(points)[1].mean() for _ in range(400)])
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - truth).abs() <= 4 * error
    assert 8 * error < Residual(3, lipschitz=0.7, num_terms=2).log_det_bias  # it could fail


def test_a_series_draws_anew_and_follows_the_seed():
    layer = perturb(Residual(3, num_terms=3, roulette=0.9))
    u = torch.randn(4, 3)
    torch.manual_seed(1)
    first, second = layer(u)[1], layer(u)[1]
    torch.manual_seed(1)
    assert torch.equal(layer(u)[1], first)
    assert not torch.equal(second, first)
    torch.testing.assert_close(layer(u)[0], layer(u)[0], rtol=0, atol=0)


def test_a_layer_says_whether_its_log_det_is_random():
    exact, series = Residual(3), Residual(3, num_terms=3)
    assert not exact.log_det_is_random
    assert series.log_det_is_random
    assert Compose([Diagonal(3), Inverse(series)]).log_det_is_random
    assert not Compose([Diagonal(3), exact]).log_det_is_random


def slopes(layer: Residual, u: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(u)[1].sum(), [*layer.parameters()], materialize_grads=True)


def test_gradients_through_a_series_are_near_those_of_the_exact_one():
    torch.manual_seed(0)
    exact = perturb(Residual(3, hidden_dims=(8,)).double())
    layer = Residual(3, num_terms=40, num_probes=4000, hidden_dims=(8,)).double()
    layer.load_state_dict(exact.state_dict())
    u = torch.randn(2, 3).double()
    for one, other in zip(slopes(layer, u), slopes(exact, u), strict=True):
        assert (one - other).norm() <= 0.1 * (0.05 + other.norm())


# ------------------------------------------------------------------ options

@pytest.mark.parametrize(("options", "message"), [
    ({"lipschitz": 1.0}, r"`lipschitz` to be a number between 0 and 1, .* got 1.0."),
    ({"lipschitz": 0}, r"`lipschitz` to be a number between 0 and 1, .* got 0."),
    ({"lipschitz": "0.9"}, r"`lipschitz` to be a number between 0 and 1, .* got '0.9'."),
    ({"num_terms": 0}, "`num_terms` to be an integer >= 1, got 0."),
    ({"num_probes": 0}, "`num_probes` to be an integer >= 1, got 0."),
    ({"roulette": 0.9}, "`num_terms` beside `roulette`, got None. Say how many terms are always "
                        "there: num_terms=5."),
    ({"num_terms": 5, "roulette": 0.5}, r"`roulette` to be a probability above lipschitz\*\*2 = "
                                        "0.81, for a variance that is finite, got 0.5."),
    ({"activation": nn.SiLU}, "`activation` to have a slope of at most 1, got SiLU, whose slope "
                              "reaches 1.1: use LipSwish, nn.Tanh or nn.ELU."),
    ({"activation": nn.Tanh()}, r"`activation` to be a constructor .*, got Tanh\(\)."),
    ({"hidden_dims": 64}, "`hidden_dims` to be a sequence of integers, got 64. .*"),
])
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=f"^Residual expected {message}$"):
        Residual(2, **options)


def test_a_layer_shows_its_options():
    assert "lipschitz=0.9, num_terms=5, roulette=0.85" in repr(
        Residual(2, num_terms=5, roulette=0.85))


def test_in_many_dimensions_the_matrix_is_as_small_as_the_network():
    layer = perturb(Residual(3000, hidden_dims=(8,)))
    z, log_prob = Flow(layer).rsample_and_log_prob((4,))
    assert z.shape == (4, 3000)
    assert log_prob.isfinite().all()
    assert layer.network.given(None).at(z)._narrow()[1].shape == (4, 8, 8)


@pytest.mark.slow
def test_a_fit_reaches_the_evidence():
    posterior = fitted(residual)
    assert elbo_at_the_end(posterior) > log_evidence() - 0.02
    assert elbo_by_svi(residual) > log_evidence() - 0.1


@pytest.mark.slow
def test_svi_on_an_unbiased_series_comes_near_the_evidence():
    series = partial(residual, num_layers=4, num_terms=4, roulette=0.9)
    assert elbo_by_svi(series) > log_evidence() - 0.2
