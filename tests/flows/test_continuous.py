"""Continuous flows: equations are solved to the tolerance, or a sentence says why not."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_nfvi import NFVI, AutoFlow, cnf, ffjord
from pyro_nfvi.engine.record import NotRecordable, record
from pyro_nfvi.flows import Compose, Continuous, Diagonal, Flow, Inverse, LipSwish
from pyro_nfvi.flows.continuous import ADAPTIVE, FIXED, _Field
from pyro_nfvi.flows.nets import OUTPUT_SCALE
from pyro_nfvi.flows.roots import NotConverged
from pyro_nfvi.testing import perturb
from tests.flows.banana import banana, elbo_at_the_end, elbo_by_svi, fitted, log_evidence

FINE = {"rtol": 1e-9, "atol": 1e-9, "hidden_dims": (8,)}


def linear_field(matrix: Tensor, end_time: float = 1.0, **options) -> Continuous:
    r"""The flow of :math:`\dot z = A z`."""
    dim = len(matrix)
    layer = Continuous(dim, end_time=end_time, hidden_dims=(), **options).to(matrix.dtype)
    with torch.no_grad():
        layer.network.output.weight.zero_()
        layer.network.output.weight[:, :dim] = matrix / OUTPUT_SCALE
    return layer


def one_layer(input_dim: int, context_dim: int = 0, **options) -> Continuous:
    return Continuous(input_dim, context_dim, **options)


def steep(layer: Continuous, factor: float = 1e6) -> Continuous:
    perturb(layer)
    with torch.no_grad():
        layer.network.output.weight.mul_(factor)
    return layer


# ------------------------------------------------------------------ solutions

@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_the_flow_of_a_linear_field_is_the_exponential_of_its_matrix(method):
    matrix = torch.tensor([[0.3, -1.0, 0.2], [1.0, 0.1, 0.0], [0.5, 0.0, -0.7]]).double()
    layer = linear_field(matrix, 2.0, method=method, rtol=1e-6, atol=1e-6, num_steps=100)
    order = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}.get(method, 4)
    allowed = 20 * max(0.02 ** order, 1e-6)
    u = torch.randn(10, 3).double()
    z, log_det = layer(u)
    flow = torch.linalg.matrix_exp(2 * matrix)
    torch.testing.assert_close(z, u @ flow.mT, rtol=0, atol=allowed)
    torch.testing.assert_close(log_det, torch.full_like(log_det, 2 * matrix.trace().item()))
    back, log_det_back = layer.inverse(z)
    torch.testing.assert_close(back, u, rtol=0, atol=3 * allowed)
    torch.testing.assert_close(log_det_back, -log_det)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
def test_every_row_of_a_batch_keeps_to_the_tolerance(tolerance):
    layer = perturb(Continuous(2, rtol=tolerance, atol=tolerance).double(), 1.0)
    exact = Continuous(2, rtol=1e-11, atol=1e-11, method="dopri8").double()
    exact.load_state_dict(layer.state_dict())
    u = 0.01 * torch.randn(500, 2).double()
    u[7] = torch.tensor([3.0, -2.0])  # one that drifts further than the crowd
    with torch.no_grad():
        for got, right in zip(layer(u), exact(u), strict=True):
            assert (got - right).abs().max() <= 30 * tolerance
            assert (got - right).abs().max() > 0


def test_a_tolerance_finer_than_the_dtype_is_raised_to_it():
    layer = perturb(Continuous(2, rtol=1e-14, atol=1e-14))
    u = torch.randn(5, 2)
    back, _ = layer.inverse(layer(u)[0])
    torch.testing.assert_close(back, u, rtol=1e-4, atol=1e-4)


def test_a_longer_time_is_more_of_the_same_drift():
    matrix = torch.tensor([[0.2, -1.0], [1.0, 0.0]]).double()
    once, twice = (linear_field(matrix, end_time, rtol=1e-9, atol=1e-9) for end_time in (1, 2))
    u = torch.randn(4, 2).double()
    torch.testing.assert_close(twice(u)[0], once(once(u)[0])[0], rtol=0, atol=1e-7)


def test_nan_stays_in_its_row():
    layer = perturb(Continuous(2, 1))
    u, context = torch.randn(5, 2), torch.randn(5, 1)
    u[1, 0], u[2, 1], context[3] = math.nan, math.inf, math.nan
    z, log_det = layer(u, context)
    rows = [0, 4]
    for got, right in zip((z, log_det), layer(u[rows], context[rows]), strict=True):
        torch.testing.assert_close(got[rows], right, rtol=1e-4, atol=1e-4)
        assert got[1:4].isnan().all()


def test_a_fresh_layer_asks_its_field_few_times(monkeypatch):
    calls, call = [], _Field.__call__
    monkeypatch.setattr(_Field, "__call__", lambda *args: calls.append(1) or call(*args))
    Continuous(2)(torch.randn(5, 2))
    assert len(calls) <= 15


# ------------------------------------------------------------------ traces

def test_probes_estimate_the_trace_without_bias():
    torch.manual_seed(0)
    exact = perturb(Continuous(4, **FINE).double(), 1.0)
    layer = Continuous(4, num_probes=2000, **FINE).double()
    layer.load_state_dict(exact.state_dict())
    u = torch.randn(4).double()
    with torch.no_grad():
        single = Continuous(4, num_probes=1, **FINE).double()
        single.load_state_dict(exact.state_dict())
        spread = single(u.expand(300, 4))[1].std()
        error = spread / 2000 ** 0.5
        assert (layer(u)[1] - exact(u)[1]).abs() <= 4 * error
        assert spread > 0.05  # so that a probe alone would fail


def test_noise_is_fixed_while_an_equation_is_solved():
    layer = perturb(Continuous(3, num_probes=1, **FINE).double(), 1.0)
    u = torch.randn(5, 3).double()
    torch.manual_seed(1)
    z, log_det = layer(u)
    torch.manual_seed(1)
    back, log_det_back = layer.inverse(z)  # the same noise, and the same path backwards
    torch.testing.assert_close(-log_det_back, log_det, rtol=0, atol=1e-6)
    assert (layer(u)[1] - log_det).abs().max() > 1e-3  # new noise
    torch.testing.assert_close(back, u, rtol=0, atol=1e-6)


def test_a_layer_says_whether_its_log_det_is_random():
    exact, noisy = Continuous(3), Continuous(3, num_probes=2)
    assert not exact.log_det_is_random
    assert noisy.log_det_is_random
    assert Compose([Diagonal(3), Inverse(noisy)]).log_det_is_random


# ------------------------------------------------------------------ gradients

@pytest.mark.parametrize("activation", [nn.Tanh, LipSwish])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_gradients_are_those_through_the_solver(method, activation):
    options = {**FINE, "method": method, "num_steps": 60, "activation": activation}
    direct = perturb(Continuous(2, 1, **options).double())
    adjoint = Continuous(2, 1, adjoint=True, **options).double()
    adjoint.load_state_dict(direct.state_dict())
    points = [torch.randn(3, size).double().requires_grad_() for size in (2, 1)]
    weights = torch.randn(3, 2).double()

    def gradients(layer: Continuous, direction: str) -> tuple[Tensor, ...]:
        z, log_det = getattr(layer, direction)(*points)
        loss = (weights * z).sum() + log_det.square().sum()
        return torch.autograd.grad(loss, [*points, *layer.parameters()])
    for direction in ("forward", "inverse"):
        for got, right in zip(gradients(adjoint, direction), gradients(direct, direction),
                              strict=True):
            torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6 * right.abs().max())


@pytest.mark.parametrize("activation", [nn.Tanh, LipSwish])
def test_adjoint_gradients_are_of_the_parameters_that_were_called(activation):
    layer = Continuous(2, adjoint=True, activation=activation, **FINE).double()
    state = {name: p.detach().clone().requires_grad_()
             for name, p in perturb(layer).named_parameters()}
    u = torch.randn(3, 2).double()
    expected = torch.autograd.grad(layer(u)[1].sum(), [*layer.parameters()])
    log_det = functional_call(layer, state, (u,))[1]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()  # between the way there and back
    for got, right in zip(torch.autograd.grad(log_det.sum(), [*state.values()]), expected,
                          strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-8)


def test_there_are_no_second_derivatives_of_the_adjoint():
    layer = perturb(Continuous(2, adjoint=True))
    u = torch.randn(3, 2).requires_grad_()
    with pytest.raises(NotImplementedError, match="^Continuous has no second derivatives with "
                       "adjoint=True, so take first ones without create_graph, or build it with "
                       "adjoint=False.$"):
        torch.autograd.grad(layer(u)[1].sum(), u, create_graph=True)


def test_path_gradients_by_the_adjoint_are_those_through_the_solver():
    direct = Flow(perturb(Continuous(2, **FINE).double()))
    adjoint = Flow(Continuous(2, adjoint=True, **FINE).double())
    adjoint.load_state_dict(direct.state_dict())
    gradients = []
    for flow in (direct.double(), adjoint.double()):
        torch.manual_seed(3)
        z, log_q = flow.rsample_and_path_log_prob((4,))
        gradients.append(torch.autograd.grad((z.square().sum(-1) + log_q).sum(),
                                             [*flow.parameters()]))
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------ graphs

def test_equal_steps_are_recorded_as_one_graph():
    layer = perturb(Continuous(2, method="rk4", num_steps=3, hidden_dims=(8,)))
    u, parameters = torch.randn(5, 2), [*layer.parameters()]

    def function() -> list[Tensor]:
        z, log_det = layer(u)
        loss = (z.sum(-1) + log_det).sum()
        return [loss, *torch.autograd.grad(loss, parameters)]
    recording = record(function, parameters)
    for got, right in zip(recording.graph(*parameters), function(), strict=True):
        torch.testing.assert_close(got, right)


def test_adaptive_steps_are_not_recorded_as_if_they_were_fixed():
    layer = perturb(Continuous(2))
    u, parameters = torch.randn(5, 2), [*layer.parameters()]
    with pytest.raises(NotRecordable, match="Python reads a number"):
        record(lambda: [layer(u)[1].sum()], parameters)


# ------------------------------------------------------------------ failures

SENTENCE = (r"^Continuous did not solve its equation by method='{method}' with {kept}: {how}; its "
            "field is too steep or not finite, so use a lower learning rate, {finer}, or fewer "
            r"layers\.$")
ADAPTED = {"method": "dopri5", "kept": "rtol=1e-05 and atol=1e-05", "finer": "looser tolerances"}


def test_too_many_steps_are_named():
    layer = steep(Continuous(2, max_num_steps=50))
    how = r"max_num_steps=50 steps ended at t=\S+"
    with pytest.raises(NotConverged, match=SENTENCE.format(how=how, **ADAPTED)):
        layer(torch.randn(5, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_named(value):
    layer = perturb(Continuous(2))
    with torch.no_grad():
        layer.network.output.bias[0] = value
    how = "no step was small enough at t=0"
    with pytest.raises(NotConverged, match=SENTENCE.format(how=how, **ADAPTED)):
        layer(torch.randn(5, 2))


def test_a_failure_of_the_adjoint_equation_is_named():
    layer = perturb(Continuous(2, adjoint=True))
    z, log_det = layer(2 * torch.randn(50, 2))
    loss = (z.sum(-1) + log_det).sum()
    layer.max_num_steps = 3  # the way there took more, the way back may not
    how = r"max_num_steps=3 steps ended at t=\S+ on the way back"
    with pytest.raises(NotConverged, match=SENTENCE.format(how=how, **ADAPTED)):
        loss.backward(retain_graph=True)
    layer.max_num_steps = 40
    for _ in range(20):  # each pass counts its own steps
        loss.backward(retain_graph=True)


def test_an_overflow_at_equal_steps_is_named():
    layer = linear_field(1e8 * torch.eye(2), method="rk4")
    named = {"method": "rk4", "kept": "num_steps=10", "finer": "more steps"}
    with pytest.raises(NotConverged, match=SENTENCE.format(how="its solution overflows", **named)):
        layer(torch.randn(5, 2))


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "adams"}, "`method` to be one of dopri5, .*, rk4, got 'adams'."),
    ({"method": None}, "`method` to be one of dopri5, .*, rk4, got None."),
    ({"rtol": 0.0}, "`rtol` to be a positive number, got 0.0."),
    ({"atol": -1e-5}, "`atol` to be a positive number, got -1e-05."),
    ({"end_time": math.inf}, "`end_time` to be a positive number, got inf."),
    ({"num_steps": 0}, "`num_steps` to be an integer >= 1, got 0."),
    ({"max_num_steps": 1.5}, "`max_num_steps` to be an integer >= 1, got 1.5."),
    ({"num_probes": 0}, "`num_probes` to be an integer >= 1, got 0."),
    ({"activation": nn.Tanh()}, r"`activation` to be a constructor .*, got Tanh\(\)."),
])
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=f"^Continuous expected {message}$"):
        Continuous(2, **options)


def test_a_layer_shows_its_solver():
    assert "end_time=4, method='dopri5', rtol=1e-05, atol=1e-05, num_probes=2" in repr(
        Continuous(2, num_probes=2))
    assert "method='rk4', num_steps=7" in repr(Continuous(2, method="rk4", num_steps=7))


# ------------------------------------------------------------------ fits

@pytest.mark.slow
def test_a_compiled_fit_comes_near_the_evidence():
    posterior = fitted(partial(cnf, hidden_dims=(32, 32), method="rk4", num_steps=8), 600)
    assert posterior.engine.tier == "c"
    assert elbo_at_the_end(posterior) > log_evidence() - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [cnf, ffjord])
def test_svi_with_an_adaptive_solver_comes_near_the_evidence(recipe):
    loose = partial(recipe, hidden_dims=(32, 32), rtol=1e-3, atol=1e-3)
    assert elbo_by_svi(loose, num_steps=200) > log_evidence() - 0.5


@pytest.mark.slow
def test_a_fit_rolls_back_from_an_equation_that_is_not_solved():
    recipe = partial(one_layer, max_num_steps=6, hidden_dims=(8,))
    posterior = NFVI(banana, AutoFlow(banana, recipe), num_steps=100, num_particles=16, lr=0.5,
                     progress=False).run()
    assert "did not solve its equation" in posterior.history.rollbacks[0][1]
    assert math.isfinite(posterior.elbo[0])
