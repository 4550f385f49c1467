"""DeviceLoop: the steps of AdamState on tensors alone; its capture needs a GPU."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.engine import Stepper
from pyro_nfvi.engine.adam import SNAPSHOT_EVERY, AdamState
from pyro_nfvi.engine.device_loop import DeviceLoop

DOUBLE = torch.float64


def graph(x, scale, noise):
    """ELBO and gradients of minus it, of a noisy parabola."""
    offset = x - noise
    return -(scale * offset.square()).sum(), 2 * scale * offset, offset.square()


def start():
    return [torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)]


def draws_with(bad_at=None, long_at=None, num_steps=60):
    noise = torch.randn(num_steps, 3, dtype=DOUBLE)
    if bad_at is not None:
        noise[bad_at] = torch.nan
    if long_at is not None:
        noise[long_at] = 1e6
    return noise


def on_the_host(noise, rates):
    """The same steps by AdamState."""
    state = AdamState(start())
    values = []
    for i, rate in enumerate(rates):
        value, *gradients = graph(*state.views(), noise[i])
        gradient = torch.cat(gradients)
        if not value.isfinite():
            break
        state.update(gradient, gradient.norm().item(), rate)
        values.append(value.item())
    return state, values


def on_the_device(noise, rates, chunks=(60,)):
    state = AdamState(start())
    loop, values, done = DeviceLoop(graph, state, [noise[0]], capture=False), [], 0
    for count in chunks:
        loop.run(rates[done:done + count], [noise[done:done + count]], values)
        done += count
    return state, values


def assert_same(one, other):
    (state, values), (truth, expected) = one, other
    assert values == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(state.live, truth.live, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(state.saved, truth.saved, rtol=1e-12, atol=1e-14)
    assert (state.step, state.saved_step) == (truth.step, truth.saved_step)
    assert list(state.norms) == pytest.approx(list(truth.norms), rel=1e-12)


@pytest.mark.parametrize("chunks", [(60,), (1, 2, 57), (30, 30)], ids=str)
@pytest.mark.parametrize("trouble", [{}, {"long_at": 20}], ids=["calm", "a long gradient"])
def test_steps_on_the_device_are_those_of_the_host(chunks, trouble):
    noise, rates = draws_with(**trouble), [0.01 + 0.001 * k for k in range(60)]
    assert_same(on_the_device(noise, rates, chunks), on_the_host(noise, rates))


@pytest.mark.parametrize("bad_at", [0, 1, 26, 40])
def test_a_step_that_is_not_finite_ends_them_with_the_state_before_it(bad_at):
    noise, rates = draws_with(bad_at), [0.05] * 60
    state, values = on_the_device(noise, rates)
    assert len(values) == state.step == bad_at
    assert_same((state, values), on_the_host(noise, rates))
    assert bad_at == 0 or state.saved_step == (bad_at - 1) // SNAPSHOT_EVERY * SNAPSHOT_EVERY + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_loop_gives_the_losses_of_the_graph():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0], device="cuda"))

    def function():
        elbo = -(x - 0.1 * torch.randn(64, 2, device="cuda")).square().sum(-1).mean()
        return [elbo, *torch.autograd.grad(-elbo, [x])]
    losses = []
    for tier in ("cuda_graph", "fx"):
        torch.manual_seed(0)
        stepper = Stepper(function, [x], tier)
        stepper.run([0.01] * 30)
        assert stepper.tier == tier, stepper.reason
        losses.append(torch.tensor(stepper.elbo))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
