"""Scalar roots: right on hard monotone functions, and twice differentiable."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_nfvi.flows.roots import NUM_STEPS, increasing_root, refine_root


def ridge(y: Tensor, k: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The equation of the planar flow, s + k tanh s = y; nearly flat at 0 for k near -1."""
    t = torch.tanh(s)
    return s + k * t - y, 1 + k * (1 - t * t)


def cubic(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of slope zero at its inflection: s^3 = y."""
    return s**3 - y, 3 * s**2


def exponential(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Newton from the right crawls, from the left overshoots: e^s = e^y."""
    return s.exp() - y.exp(), s.exp()


def arctangent(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Newton diverges from everywhere but close by: 50 (s - y) under an arctangent."""
    x = 50 * (s - y)
    return torch.atan(x), 50 / (1 + x * x)


def step(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A steep step between flat parts, of slope 1e-6 and 1e4."""
    x = 1e4 * (s - y)
    return torch.tanh(x) + 1e-6 * (s - y), 1e4 * (1 - torch.tanh(x)**2) + 1e-6


def corner(y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Two straight pieces whose Newton steps jump to and fro: slopes 0.01 and 100."""
    right = s > y
    return torch.where(right, 100.0, 0.01) * (s - y), torch.where(right, 100.0, 0.01)


def bisected(residual, low: Tensor, high: Tensor) -> Tensor:
    for _ in range(200):
        middle = (low + high) / 2
        below = residual(middle)[0] < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


POINTS = torch.linspace(-15, 15, 2001).double()


@pytest.mark.parametrize("k", [-1 + 1e-12, -0.999, -0.9, -0.5, 0.0, 0.5, 3.0, 5.0, 6.0, 10.0, 30.0,
                               100.0, 1e4])
def test_the_planar_equation_is_solved_for_any_stretch(k):
    k = torch.full_like(POINTS, k)
    y = POINTS * (1 + k.abs() / 10)
    s = increasing_root(partial(ridge, y, k), y - k.abs(), y + k.abs())
    eps = torch.finfo(y.dtype).eps
    assert (ridge(y, k, s)[0].abs() <= 8 * eps * (y.abs() + k.abs() + 1)).all()


@pytest.mark.parametrize("k", [-0.999, -0.5, 3.0, 6.0, 30.0])
def test_the_planar_equation_is_solved_in_float32(k):
    y = POINTS.float()
    k = torch.full_like(y, k)
    s = increasing_root(partial(ridge, y, k), y - k.abs(), y + k.abs())
    eps = torch.finfo(y.dtype).eps
    assert (ridge(y, k, s)[0].abs() <= 8 * eps * (y.abs() + k.abs() + 1)).all()


@pytest.mark.parametrize("k", [-0.999, -0.5, 0.5, 5.0, 30.0])
def test_it_agrees_with_bisection(k):
    k = torch.full_like(POINTS, k)
    residual = partial(ridge, POINTS, k)
    ends = POINTS - k.abs(), POINTS + k.abs()
    torch.testing.assert_close(increasing_root(residual, *ends), bisected(residual, *ends),
                               rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("function", "solution", "tolerance"), [
    (cubic, lambda y: y.sign() * y.abs()**(1 / 3), 1e-5),  # rounding: the function is flat
    (exponential, lambda y: y, 1e-12),
    (arctangent, lambda y: y, 1e-12),
    (step, lambda y: y, 1e-12),
    (corner, lambda y: y, 1e-12),
], ids=["cubic", "exponential", "arctangent", "step", "corner"])
@pytest.mark.parametrize("reach", [(20.0, 20.0), (1.0, 19.0), (0.001, 40.0)], ids=str)
def test_hard_functions_are_solved(function, solution, tolerance, reach):
    y = POINTS[POINTS != 0]
    truth = solution(y)
    low, high = truth - reach[0], truth + reach[1]
    root = increasing_root(partial(function, y), low, high)
    torch.testing.assert_close(root, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_a_root_at_an_end_of_the_bracket_is_found(end):
    y = POINTS
    root = increasing_root(partial(exponential, y), y - end, y + 1 - end)
    torch.testing.assert_close(root, y, rtol=1e-12, atol=1e-12)


def test_a_bracket_of_no_width_is_its_root():
    root = increasing_root(partial(ridge, POINTS, torch.zeros(())), POINTS, POINTS)
    assert torch.equal(root, POINTS)


def test_the_number_of_calls_does_not_depend_on_the_values():
    calls = []

    def counted(s):
        calls.append(1)
        return ridge(POINTS, torch.ones(()), s)
    increasing_root(counted, POINTS - 1, POINTS + 1)
    assert len(calls) == NUM_STEPS + 2


def test_an_empty_batch_has_no_roots():
    y = POINTS[:0]
    assert increasing_root(partial(exponential, y), y - 1, y + 1).shape == (0,)


@pytest.mark.parametrize("k", [-0.9, -0.5, 0.5, 5.0])
@pytest.mark.parametrize("solve", ["increasing", "refine"])
def test_roots_have_first_and_second_derivatives(k, solve):
    y = torch.tensor([-1.3, 0.4]).double().requires_grad_()
    k = torch.tensor([k, k + 0.05]).double().requires_grad_()

    def root(y, k):
        residual = partial(ridge, y, k)
        ends = (y - k.abs()).detach(), (y + k.abs()).detach()
        if solve == "increasing":
            return increasing_root(residual, *ends)
        return refine_root(residual, bisected(residual, *ends))
    gradcheck(root, (y, k))
    gradgradcheck(root, (y, k))


def test_derivatives_are_those_of_the_closed_form_to_third_order():
    y = torch.tensor([0.3, 2.0, -1.5]).double().requires_grad_()
    root = increasing_root(partial(exponential, y.exp().log1p()), y - 9, y + 9)
    exact = y.exp().log1p()
    for _ in range(4):
        torch.testing.assert_close(root, exact, rtol=1e-9, atol=1e-9)
        root, = torch.autograd.grad(root.sum(), y, create_graph=True)
        exact, = torch.autograd.grad(exact.sum(), y, create_graph=True)


def test_only_the_last_steps_are_in_the_graph():
    y = POINTS.clone().requires_grad_()
    root = refine_root(partial(exponential, y), POINTS.clone().requires_grad_())
    slope, = torch.autograd.grad(root.sum(), y)
    torch.testing.assert_close(slope, torch.ones_like(y))
