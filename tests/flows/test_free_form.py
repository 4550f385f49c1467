"""FreeForm: checks that a module is what its user says, and inverts what has no inverse."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pyro_nfvi import testing
from pyro_nfvi.flows import (
    Autoregressive,
    Bijection,
    Compose,
    Coupling,
    Flow,
    FreeForm,
    LowRankUpdate,
    Planar,
    RationalQuadraticSpline,
)
from pyro_nfvi.flows.roots import NotConverged
from pyro_nfvi.testing import perturb
from tests.flows import modules


class Of(nn.Module):
    """A function as a module, with whatever other methods it is given."""

    def __init__(self, function: Callable[..., Tensor], **methods: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, method in methods.items():
            setattr(self, name, method)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Values(nn.Module):
    """A bijection of this package without its log-determinants, and its inverse."""

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bijection(u, context)[0]


class WithInverse(Values):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bijection.inverse(z, context)[0]


def shear(u: Tensor) -> Tensor:
    """Lower triangular: the second coordinate is moved by the first."""
    return torch.stack([u[..., 0], u[..., 1] + 0.25 * u[..., 0], u[..., 2]], -1)


# ------------------------------------------------------------------ the structure is true

def says(message: str) -> object:
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return pytest.raises(ValueError, match=f"(?s)^{pattern}$")


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: FreeForm(3, Of(shear), structure="diagonal"),
     "FreeForm expected `module` to have a Jacobian of structure 'diagonal', got entry (1, 0) "
     "that is not zero (by 0.25) at u = (...). Name the structure it has: structure='full' is "
     "always true."),
    (lambda: FreeForm(3, Of(lambda u: shear(u) + 0.125 * u.roll(1, -1)), structure="triangular"),
     "FreeForm expected `module` to have a Jacobian of structure 'triangular', got entry (0, 2) "
     "that is not zero (by 0.125) at u = (...)...."),
    (lambda: FreeForm(3, Of(shear, diagonal=lambda u: torch.ones_like(u) + u.new_tensor(
        [0, 0, 0.5])), structure="triangular"),
     "FreeForm expected `module` to have a Jacobian of structure 'triangular', got entry (2, 2) "
     "that its method `diagonal` misses (by -0.5) at u = (...)...."),
    (lambda: FreeForm(3, Of(shear, inner=lambda u: u[..., :1], outer=lambda h: h.expand(
        *h.shape[:-1], 3) * h.new_tensor([0, 0.25, 0.125])), structure="low-rank"),
     "FreeForm expected `module` to have a Jacobian of structure 'low-rank', got entry (2, 0) "
     "that its parts miss (by -0.125) at u = (...)...."),
    (lambda: FreeForm(3, LowRankUpdate(lambda u: u[..., :1], lambda h: h * h.new_tensor([0, 1, 1]),
                                       shear), structure="low-rank"),
     "FreeForm expected `module` to have a Jacobian of structure 'low-rank', got entry (...) "
     "that its parts miss (by ...) at u = (...)...."),
    (lambda: FreeForm(3, Of(shear), structure="low-rank"),
     "FreeForm expected a map of structure 'low-rank' to have `inner` and `outer`, got Of without "
     "inner and outer. Make it of its parts: LowRankUpdate(inner, outer)."),
    (lambda: FreeForm(3, Of(shear), structure="dense"),
     "FreeForm expected `structure` to be one of full, diagonal, triangular, low-rank, "
     "got 'dense'."),
])
def test_a_wrong_structure_is_named_with_its_worst_entry(mistake, message):
    with says(message):
        mistake()


def test_a_structure_that_breaks_far_out_is_found_by_a_check_there():
    def far_shear(u: Tensor) -> Tensor:
        return u + torch.relu(u.roll(1, -1) - 50) * 0.5
    layer = FreeForm(2, Of(far_shear), structure="diagonal")
    layer.check(torch.zeros(5, 2))
    with says("FreeForm expected ... entry (0, 1) that is not zero (by 0.5) at u = (0, 60)...."):
        layer.check(torch.tensor([[[0.0, 0.0], [0.0, 60.0]]]))


@pytest.mark.parametrize("structure", ["full", "triangular"])
def test_a_tiny_entry_is_found_and_a_rounding_error_is_none(structure):
    def leaky(size: float) -> nn.Module:
        return Of(lambda u: u + size * u.roll(1, -1).sin())
    FreeForm(2, leaky(1e-12), structure="triangular")
    if structure == "triangular":
        with says("FreeForm expected ... 'triangular', got entry ..."):
            FreeForm(2, leaky(1e-6), structure=structure)
    else:
        FreeForm(2, leaky(1e-6), structure=structure)


# ------------------------------------------------------------------ the module is invertible

class Cube(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return u**3


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: FreeForm(2, lambda u: u),
     "FreeForm expected `module` to be an nn.Module, got function. Hold a function in one: its "
     "forward method."),
    (lambda: FreeForm(2, nn.Linear(3, 2)),
     "FreeForm expected `module` to map float64 points (16, 2) to points (16, 2), got "
     "RuntimeError: ..."),
    (lambda: FreeForm(2, nn.Linear(2, 3)),
     "FreeForm expected `module` to map float64 points (16, 2) to points (16, 2), got (16, 3)."),
    (lambda: FreeForm(2, nn.Identity(), context_dim=3),
     "FreeForm expected `module` to map float64 points (16, 2) and contexts (16, 3) to points "
     "(16, 2), got TypeError: ..."),
    (lambda: FreeForm(2, Planar(2)),
     "FreeForm expected `module` to map float64 points (16, 2) to points (16, 2), got tuple."),
    (lambda: FreeForm(2, Of(lambda u: u.float())),
     "FreeForm expected `module` to map ... got torch.float32. Register its tensors as buffers."),
    (lambda: FreeForm(2, Of(torch.log)),
     "FreeForm expected `module` to map all of space, got (...nan...) at u = (...)."),
    (lambda: FreeForm(2, nn.BatchNorm1d(2)),
     "FreeForm expected `module` to map each row by itself, the same at every call, got ...eval "
     "mode, or leave them out."),
    (lambda: FreeForm(4, nn.Dropout(0.5)), "FreeForm expected `module` to map each row by itself, "
     "the same at every call, got another image of a row alone (by ...)...."),
    (lambda: FreeForm(2, nn.ReLU()),
     "FreeForm expected `module` to be invertible, got a singular Jacobian at u = (...)."),
    (lambda: FreeForm(2, Of(lambda u: u.sum(-1, keepdim=True).expand_as(u))),
     "FreeForm expected `module` to be invertible, got a singular Jacobian at u = (...)."),
    (lambda: FreeForm(1, Of(torch.square), structure="diagonal"),
     "FreeForm expected `module` to be invertible, got determinants of opposite signs at "
     "u = (...) and u = (...): it folds."),
    (lambda: FreeForm(2, Of(torch.abs)), "FreeForm expected `module` to be invertible, got "
     "determinants of opposite signs at u = (...) and u = (...): it folds."),
    (lambda: FreeForm(2, Of(lambda u: torch.stack([u[..., 0]**2 - u[..., 1]**2,
                                                   2 * u[..., 0] * u[..., 1]], -1))),
     "FreeForm expected `module` to be invertible, got back (...) for u = (...): both have the "
     "same image."),
    (lambda: FreeForm(2, Of(torch.sinh), torch.sinh),
     "FreeForm expected `module` to be invertible, got back (...) for u = (...): `inverse` does "
     "not undo `module`."),
    (lambda: FreeForm(2, Of(torch.sinh, inverse=lambda z: z.asinh()[..., :1])),
     "FreeForm expected `inverse` to map points (16, 2) to points (16, 2), got (16, 1)."),
    (lambda: FreeForm(2, Of(torch.sinh), "asinh"),
     "FreeForm expected `inverse` to be a callable such as the module, got str."),
    (lambda: FreeForm(2, Of(torch.sinh), max_bytes=0),
     "FreeForm expected `max_bytes` to be an integer >= 1, got 0."),
    (lambda: FreeForm(2, Of(torch.sinh)).check([0.0, 0.0]),
     "FreeForm expected `u` to be a tensor of shape (*batch, 2), got list."),
    (lambda: FreeForm(2, Cube(), structure="diagonal").check(torch.zeros(1, 2)),
     "FreeForm expected `module` to be invertible, got a singular Jacobian at u = (0, 0)."),
])
def test_a_mistake_is_named(mistake, message):
    with says(message):
        mistake()


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_a_point_out_of_range_is_named(structure):
    layer = FreeForm(2, Of(torch.exp), structure=structure)
    z = torch.tensor([[1.0, 2.0], [1.0, -3.0], [-1.0, 1.0]])
    with pytest.raises(NotConverged, match=re.escape(
            "FreeForm found no u that its module maps to (1, -3), nor for 1 more of 3 points")):
        layer.inverse(z)
    torch.testing.assert_close(layer.inverse(z[:1])[0], z[:1].log())


def test_a_sign_may_differ_between_contexts():
    def signed(u: Tensor, context: Tensor) -> Tensor:
        return torch.where(context > 0, 1.0, -1.0) * torch.sinh(u)
    layer = FreeForm(1, Of(signed), structure="diagonal", context_dim=1)
    u, context = torch.randn(6, 1), torch.tensor([[1.0], [-1.0]] * 3)
    z, _ = layer(u, context)
    torch.testing.assert_close(layer.inverse(z, context)[0], u)


def test_construction_leaves_no_trace():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    FreeForm(2, module)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())


# ------------------------------------------------------------------ the search

BENT = {"bend": ("diagonal", modules.Bend), "steer": ("triangular", modules.Steer),
        "steer-up": ("triangular", modules.SteerUp), "mix": ("full", modules.Mix),
        "ridges": ("low-rank", modules.Ridges),
        "ridges-bend": ("low-rank", partial(modules.Ridges, bend=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", BENT)
def test_the_search_inverts_far_from_the_identity(name, dtype):
    structure, make = BENT[name]
    layer = perturb(FreeForm(5, make(5), structure=structure), 2.0).to(dtype)
    u = 3 * torch.randn(1000, 5, dtype=dtype)
    z, log_det = layer(u)
    back, log_det_back = layer.inverse(z)
    half_the_digits = torch.finfo(dtype).eps**0.5
    torch.testing.assert_close(layer(back)[0], z, rtol=half_the_digits, atol=half_the_digits)
    if dtype == torch.float64:
        torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(-log_det_back, log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [
    lambda: Autoregressive(4), lambda: Coupling(4, transformer=RationalQuadraticSpline()),
    lambda: Compose([Planar(4) for _ in range(4)]),
    lambda: Compose([Coupling(4), Autoregressive(4, reverse=True)])],
    ids=["autoregressive", "spline-coupling", "planar-stack", "mixed-stack"])
def test_the_search_finds_the_inverse_that_a_layer_knows(make):
    bijection = perturb(make().double(), 1.0)
    layer, known = FreeForm(4, Values(bijection)), FreeForm(4, WithInverse(bijection))
    z = 2 * torch.randn(200, 4, dtype=torch.float64)
    for one, other in zip(layer.inverse(z), bijection.inverse(z), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(known.inverse(z), bijection.inverse(z), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("structure", ["diagonal", "full"])
@pytest.mark.parametrize("function", [
    lambda u: -u - u**3, lambda u: u + 0.999 * u.sin(), lambda u: 50 * torch.tanh(u) + 0.01 * u,
    lambda u: torch.where(u > 0, 1e3 * u, 1e-3 * u), lambda u: torch.sinh(u) * 1e4,
    lambda u: u + 1e6], ids=["falling", "nearly-flat", "steep-step", "corner", "growing", "far"])
def test_the_search_halves_and_brackets_where_newton_alone_fails(function, structure):
    layer = FreeForm(2, Of(function), structure=structure)
    u = 4 * torch.randn(300, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(u)[0])[0], u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["steer-up", "ridges"])
def test_cases_beside_the_table_keep_the_contract(name):
    structure, make = BENT[name]
    for check in (testing.check_inverse, testing.check_log_det, testing.check_gradients,
                  testing.check_path_inverse):
        check(lambda: FreeForm(3, make(3), structure=structure))


def test_the_search_takes_its_derivatives_at_the_root():
    layer = perturb(FreeForm(3, modules.Mix(3))).double()
    z = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    u, log_det = layer.inverse(z)
    matrix = torch.func.vmap(torch.func.jacrev(lambda v: layer.module(v)))(u.detach())
    slope, = torch.autograd.grad(u.sum(), z, retain_graph=True)
    torch.testing.assert_close(slope, torch.linalg.inv(matrix).sum(-2))
    torch.testing.assert_close(-log_det, torch.linalg.slogdet(matrix)[1])


# ------------------------------------------------------------------ in use

def test_an_inverse_may_be_given():
    layer = FreeForm(3, Of(torch.sinh), torch.asinh, structure="diagonal")
    z = torch.randn(5, 3)
    torch.testing.assert_close(layer.inverse(z)[0], z.asinh())
    module = modules.Turn(3)
    layer = perturb(FreeForm(3, module, module.inverse))
    twin = perturb(copy.deepcopy(layer))  # its inverse is that of its own module
    torch.testing.assert_close(twin.inverse(twin(z)[0])[0], z)
    assert not torch.equal(twin(z)[0], layer(z)[0])


@pytest.mark.parametrize("name", ["bend", "mix", "ridges-bend"])
def test_the_forward_compiles_in_one_graph(name):
    structure, make = BENT[name]
    layer = perturb(FreeForm(3, make(3), structure=structure))
    u = torch.randn(5, 3)
    run = torch.compile(lambda u: layer(u), fullgraph=True, backend="eager")
    for got, expected in zip(run(u), layer(u), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_bound_on_memory_changes_no_result():
    module = modules.Mix(4, 2)
    whole = perturb(FreeForm(4, module, context_dim=2))
    parts = FreeForm(4, module, context_dim=2, max_bytes=20_000)
    u, context = torch.randn(2, 50, 4), torch.randn(50, 2)
    for one, other in zip(parts(u, context), whole(u, context), strict=True):
        torch.testing.assert_close(one, other)


def test_a_module_sees_rows_whatever_the_batch():
    class Rows(modules.Bend):
        def forward(self, u, context=None):
            assert u.dim() == 2
            return super().forward(u)
    layer = FreeForm(3, Rows(3), structure="diagonal")
    for shape in ((), (4,), (2, 4)):
        z, log_det = layer(torch.randn(*shape, 3))
        assert (z.shape, log_det.shape) == ((*shape, 3), shape)
        assert layer.inverse(z)[0].shape == (*shape, 3)


@pytest.mark.parametrize("name", BENT)
def test_a_flow_of_a_module_learns_a_density(name):
    structure, make = BENT[name]
    flow = Flow(FreeForm(2, make(2), structure=structure))
    data = torch.randn(64, 2) * torch.tensor([1.5, 0.7])
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-2


def test_its_repr_names_the_structure():
    assert repr(FreeForm(2, modules.Bend(2), structure="diagonal")).startswith(
        "FreeForm(\n  2, structure='diagonal'\n  (module): Bend(")
