"""Sylvester flows: frames are orthonormal, and do what their papers say."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_nfvi import householder_sylvester, sylvester, triangular_sylvester
from pyro_nfvi.flows import CoordinateFrame, HouseholderFrame, OrthogonalFrame, Sylvester
from pyro_nfvi.testing import perturb
from tests.flows.banana import elbo_at_the_end, elbo_by_svi, fitted, log_evidence

FRAMES = {"orthogonal": OrthogonalFrame, "householder": HouseholderFrame,
          "one-reflection": partial(HouseholderFrame, num_reflections=1),
          "coordinates": CoordinateFrame, "reverse": partial(CoordinateFrame, reverse=True)}


def reflection(v: Tensor) -> Tensor:
    return torch.eye(len(v)).to(v) - 2 * torch.outer(v, v) / (v @ v)


@pytest.mark.parametrize("context_dim", [0, 2], ids=["no-context", "context"])
@pytest.mark.parametrize(("input_dim", "num_ridges"), [(1, 1), (5, 2), (5, 5), (40, 16)])
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_orthonormal(name, input_dim, num_ridges, context_dim):
    frame = perturb(FRAMES[name](input_dim, num_ridges, context_dim)).double()
    q = frame(torch.randn(3, context_dim).double() if context_dim else None)
    assert q.shape[-2:] == (input_dim, num_ridges)
    eye = torch.eye(num_ridges).double()
    torch.testing.assert_close(q.mT @ q, eye.expand_as(q.mT @ q), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_reflections", [1, 2, 3, 8])
def test_a_householder_frame_is_the_product_of_its_reflections(num_reflections):
    frame = HouseholderFrame(4, 3, num_reflections=num_reflections).double()
    product = torch.linalg.multi_dot([torch.eye(4).double(), torch.eye(4).double(),
                                      *map(reflection, frame.vectors.value.detach().mT)])
    torch.testing.assert_close(frame().detach(), product[:, :3], rtol=0, atol=1e-13)


def test_a_reflection_of_no_direction_is_the_identity():
    frame = HouseholderFrame(3, 3, num_reflections=2)
    with torch.no_grad():
        frame.vectors.value.zero_()
    assert torch.equal(frame(), torch.eye(3))


def test_every_context_turns_a_householder_frame_its_own_way():
    frame = perturb(HouseholderFrame(4, 2, 3))
    one, other = frame(torch.randn(2, 3))
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("name", FRAMES)
def test_a_layer_is_the_formula_of_the_paper(name):
    layer = perturb(Sylvester(5, num_ridges=3, frame=FRAMES[name])).double()
    q, outer, inner, bias = layer._weights(None)
    u = torch.randn(7, 5).double()
    for row, image in zip(u, layer(u)[0], strict=True):
        expected = row + q @ outer @ torch.tanh(inner @ q.mT @ row + bias)
        torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FRAMES)
def test_points_move_in_the_frame_only(name):
    layer = perturb(Sylvester(5, num_ridges=2, frame=FRAMES[name])).double()
    u = torch.randn(7, 5).double()
    step, q = layer(u)[0] - u, layer.frame(None)
    assert step.abs().max() > 0.01
    torch.testing.assert_close(step @ q @ q.mT, step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_in_the_frame_of_the_axes_a_layer_is_triangular(reverse):
    layer = perturb(Sylvester(4, frame=partial(CoordinateFrame, reverse=reverse))).double()
    jacobian = torch.autograd.functional.jacobian(lambda u: layer(u)[0], torch.randn(4).double())
    rest = jacobian.triu(1) if reverse else jacobian.tril(-1)
    other = jacobian.tril(-1) if reverse else jacobian.triu(1)
    assert torch.equal(rest, torch.zeros(4, 4).double())
    assert other.abs().max() > 0.01


@pytest.mark.parametrize("name", ["orthogonal", "householder", "coordinates"])
def test_the_inverse_at_a_known_preimage_has_second_derivatives(name):
    layer = perturb(Sylvester(3, frame=FRAMES[name])).double()
    u = torch.randn(2, 3).double()
    z = layer(u)[0].detach().requires_grad_()
    for check in (gradcheck, gradgradcheck):
        check(lambda z: layer._inverse_at(u, z, None), z)


def test_the_parameters_keep_the_names_they_were_saved_under():
    assert set(Sylvester(3).state_dict()) == {"frame.value", "outer.value", "inner.value",
                                              "bias.value"}


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: Sylvester(3, frame="householder"),
     "Sylvester expected `frame` to be a constructor such as HouseholderFrame, "
     "got 'householder'."),
    (lambda: Sylvester(3, frame=OrthogonalFrame(3, 3)),
     r"Sylvester expected `frame` to be a constructor .*, got OrthogonalFrame\(\)."),
    (lambda: HouseholderFrame(3, 2, num_reflections=0),
     "HouseholderFrame expected `num_reflections` to be an integer >= 1, got 0."),
])
def test_mistakes_are_named(mistake, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        mistake()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [sylvester, householder_sylvester, triangular_sylvester])
def test_a_fit_comes_near_the_evidence(recipe):
    posterior = fitted(recipe, num_steps=600)
    assert posterior.engine.tier == "c"
    assert elbo_at_the_end(posterior) > log_evidence() - 0.15
    assert elbo_by_svi(recipe) > log_evidence() - 0.4
