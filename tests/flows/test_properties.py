"""Every property of a bijection, on every case of the table, with and without context."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Collection
from functools import partial

import pytest
import torch
from torch import nn

from pyro_nfvi import flows, testing
from pyro_nfvi.flows import (
    Base,
    Bijection,
    Coupling,
    Diagonal,
    Flow,
    LowRank,
    Planar,
    Radial,
    RationalQuadraticSpline,
    Sylvester,
    Transformer,
    iaf,
    planar,
    realnvp,
)
from pyro_nfvi.testing import perturb
from tests.cases import (
    BASES,
    BIJECTIONS,
    LENGTHY,
    NOT_PROMISED,
    RECIPES,
    REPETITIVE,
    TOLERANCES,
    TRANSFORMERS,
    WITHOUT_CONTEXT,
)

INPUT_DIM, CONTEXT_DIM = 3, 2
CASES = [(name, context_dim) for name in BIJECTIONS for context_dim in (0, CONTEXT_DIM)
         if not (context_dim and name in WITHOUT_CONTEXT)]


def over(cases: list[tuple[str, int]], slow: Collection[str] = REPETITIVE
         ) -> pytest.MarkDecorator:
    """One test a case, those of the names in ``slow`` being slow."""
    return pytest.mark.parametrize(("name", "context_dim"), [
        pytest.param(name, context_dim, id=f"{name}-context" if context_dim else name,
                     marks=pytest.mark.slow if name in slow else ())
        for name, context_dim in cases])


def promising(check: Callable[..., None], slow: Collection[str] = REPETITIVE
              ) -> pytest.MarkDecorator:
    """The cases that promise the property of ``check``."""
    return over([case for case in CASES if check not in NOT_PROMISED.get(case[0], ())], slow)


# Densities whose jumps a grid cannot follow.
ROUGH = {"from-pyro-spline", "from-pyro-inverse",
         *(f"{layer}-{name}" for layer in ("coupling", "autoregressive")
           for name in ("linear-spline", "leaky-relu"))}
LONG = REPETITIVE | LENGTHY
every_case = over(CASES)
every_case_in_time = over(CASES, slow=LONG)
every_case_with_context = over([case for case in CASES if case[1]])


def maker(name: str, context_dim: int, device: torch.device, input_dim: int = INPUT_DIM
          ) -> Callable[[], Bijection]:
    return lambda: BIJECTIONS[name](input_dim, context_dim).to(device)


# ------------------------------------------------------------------ each property, each case

@every_case
def test_inverse_undoes_forward(name, context_dim, device):
    testing.check_inverse(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@every_case
def test_log_det_matches_autograd(name, context_dim, device):
    testing.check_log_det(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@every_case
def test_a_batch_equals_its_rows(name, context_dim, device):
    testing.check_batch(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@promising(testing.check_empty_batch)
def test_a_batch_may_be_empty(name, context_dim, device):
    testing.check_empty_batch(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@every_case_with_context
def test_context_broadcasts(name, context_dim, device):
    testing.check_context_broadcasts(maker(name, context_dim, device),
                                     tolerance=TOLERANCES.get(name))


@every_case_with_context
def test_context_is_used(name, context_dim, device):
    testing.check_context_is_used(maker(name, context_dim, device))


@promising(testing.check_identity_at_start)
def test_it_starts_as_the_identity(name, context_dim, device):
    testing.check_identity_at_start(maker(name, context_dim, device),
                                    tolerance=TOLERANCES.get(name))


@every_case
def test_float32_and_float64_agree(name, context_dim, device):
    testing.check_dtypes(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@promising(testing.check_gradients, slow=LONG)
def test_first_and_second_derivatives_match_differences(name, context_dim, device):
    testing.check_gradients(maker(name, context_dim, device))


@every_case_in_time
def test_copies_give_the_same_results(name, context_dim, device):
    testing.check_copies(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@promising(testing.check_compiles, slow=LONG)
def test_it_compiles_in_one_graph(name, context_dim, device):
    testing.check_compiles(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@every_case
def test_inverse_at_a_known_preimage_is_the_inverse(name, context_dim, device):
    testing.check_path_inverse(maker(name, context_dim, device), tolerance=TOLERANCES.get(name))


@every_case
def test_shape_mistakes_are_named(name, context_dim, device):
    testing.check_shape_errors(maker(name, context_dim, device))


@every_case_in_time
def test_one_coordinate_is_enough(name, context_dim, device):
    make = maker(name, context_dim, device, input_dim=1)
    for check in (testing.check_inverse, testing.check_log_det, testing.check_batch,
                  testing.check_path_inverse):
        check(make, tolerance=TOLERANCES.get(name))


@over([case for case in CASES if case[0] not in ROUGH], slow=LONG)
def test_a_density_over_one_coordinate_integrates_to_one(name, context_dim, device):
    flow = Flow(perturb(maker(name, context_dim, device, input_dim=1)())).to(device).double()
    context = torch.randn(context_dim, device=device).double() if context_dim else None
    with torch.no_grad():
        ends, _ = flow.bijection(torch.tensor([[-8.0], [8.0]], device=device).double(), context)
        z = torch.linspace(float(ends.min()), float(ends.max()), 8001, device=device).double()
        density = flow.log_prob(z.unsqueeze(-1), context).exp()
    assert torch.trapezoid(density, z).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
    for name in BIJECTIONS if name not in ROUGH])
def test_a_density_over_two_coordinates_integrates_to_one(name, device):
    flow = Flow(perturb(maker(name, 0, device, input_dim=2)())).to(device).double()
    angle = torch.linspace(0, 2 * math.pi, 200, device=device).double()
    circle = 6 * torch.stack([angle.cos(), angle.sin()], -1)  # holds all but 1e-8 of the mass
    with torch.no_grad():
        border, _ = flow.bijection(circle)
        sides = [torch.linspace(float(x.min()), float(x.max()), 201, device=device).double()
                 for x in border.mT]
        density = flow.log_prob(torch.cartesian_prod(*sides)).exp().reshape(201, 201)
    mass = torch.trapezoid(torch.trapezoid(density, sides[1]), sides[0])
    assert mass.item() == pytest.approx(1, abs=2e-3)


# ------------------------------------------------------------------ far from the start

def scatter(bijection: Bijection) -> Bijection:
    """Every parameter moved by five times a standard normal."""
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter.add_(5 * torch.randn_like(parameter))
    return bijection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_spline_with_extreme_parameters_stays_finite(dtype, device):
    spline = RationalQuadraticSpline()
    params = 5 * torch.randn(100_000, 1, spline.params_per_dim, dtype=dtype, device=device)
    points = 4 * torch.randn(100_000, 1, dtype=dtype, device=device)
    for direction in (spline.forward, spline.inverse):
        value, log_slope = direction(points, params)
        assert value.isfinite().all()
        assert log_slope.isfinite().all()


@pytest.mark.parametrize("num_bins", [2, 8, 32])
def test_a_spline_with_extreme_parameters_inverts_in_float64(num_bins, device):
    spline = RationalQuadraticSpline(num_bins)
    params = 5 * torch.randn(100_000, 1, spline.params_per_dim, device=device).double()
    u = 4 * torch.randn(100_000, 1, device=device).double()
    z, log_slope = spline.forward(u, params)
    back, log_slope_back = spline.inverse(z, params)
    torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-log_slope_back, log_slope, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("layer", [Coupling, flows.Autoregressive])
def test_a_spline_layer_with_extreme_weights_stays_finite_in_float32(layer, device):
    bijection = scatter(layer(4, transformer=RationalQuadraticSpline()).to(device))
    with torch.no_grad():
        for direction in (bijection, bijection.inverse):
            for result in direction(torch.randn(100_000, 4, device=device)):
                assert result.isfinite().all()


@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["no-context", "context"])
@pytest.mark.parametrize("layer", [LowRank, Planar, Radial, Sylvester])
def test_a_low_rank_layer_with_extreme_parameters_inverts_in_float64(layer, context_dim, device):
    for _ in range(20):
        bijection = layer(5, context_dim).to(device).double()
        if context_dim:  # networks: 5 * randn in each of three layers would be 1e5 at the output
            perturb(bijection, 5.0)
        else:
            scatter(bijection)
        u = 3 * torch.randn(200, 5, device=device).double()
        context = torch.randn(200, 2, device=device).double() if context_dim else None
        z, log_det = bijection(u, context)
        back, log_det_back = bijection.inverse(z, context)
        torch.testing.assert_close(back, u, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(-log_det_back, log_det, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("u", [-1e3, 1e3])
def test_a_spline_inverts_far_out_in_its_tails(u, dtype, device):
    spline = RationalQuadraticSpline()
    params = torch.randn(1000, 1, spline.params_per_dim, dtype=dtype, device=device)
    u = torch.full((1000, 1), u, dtype=dtype, device=device)
    z, log_slope = spline.forward(u, params)
    back, log_slope_back = spline.inverse(z, params)
    half_the_digits = torch.finfo(dtype).eps ** 0.5
    torch.testing.assert_close(back, u, rtol=half_the_digits, atol=0)
    torch.testing.assert_close(-log_slope_back, log_slope, rtol=0, atol=half_the_digits)


DEEP = {"realnvp-32": partial(realnvp, num_layers=32), "iaf-8": partial(iaf, num_layers=8),
        "planar-64": partial(planar, num_layers=64)}


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_stack_stays_finite_in_500_dimensions(name, device):
    flow = Flow(perturb(DEEP[name](500))).to(device)
    z, log_prob = flow.rsample_and_log_prob((8,))
    assert z.isfinite().all()
    assert log_prob.isfinite().all()
    log_prob.mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    with torch.no_grad():
        assert flow.log_prob(torch.randn(8, 500, device=device)).isfinite().all()


# ------------------------------------------------------------------ structure

@pytest.mark.parametrize("input_dim", [2, 3, 5, 8])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lets_every_coordinate_move_every_other(name, input_dim, device):
    bijection = perturb(getattr(flows, name)(input_dim)).to(device).double()
    points = torch.randn(20, input_dim, device=device).double()
    slopes = torch.autograd.functional.jacobian(lambda u: bijection(u)[0].sum(0), points)
    assert (slopes.abs().sum(1) > 0).all()


@pytest.mark.parametrize("num_passes", [1, 2, 3, 5])
def test_an_autoregressive_layer_is_exact_after_its_passes(num_passes, device):
    testing.check_inverse(lambda: flows.Autoregressive(5, num_passes=num_passes).to(device))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["no-context", "context"])
def test_an_autoregressive_layer_sees_only_and_all_coordinates_before(context_dim, reverse):
    layer = perturb(flows.Autoregressive(5, context_dim, reverse=reverse)).double()
    context = torch.randn(context_dim).double() if context_dim else None
    points = torch.randn(20, 5).double()
    slopes = sum(torch.func.jacrev(lambda u: layer(u, context)[0])(u).abs() for u in points)
    allowed = torch.ones(5, 5).triu() if reverse else torch.ones(5, 5).tril()
    assert torch.equal(slopes > 0, allowed.bool())


# ------------------------------------------------------------------ the table is complete

def concrete(kind: type) -> list[str]:
    """Names in ``flows.__all__`` of the classes of a kind that can be built."""
    return [name for name in flows.__all__ if inspect.isclass(getattr(flows, name))
            and issubclass(getattr(flows, name), kind)
            and not inspect.isabstract(getattr(flows, name))]


def missing_line(name: str, table: str) -> str:
    return f"flows.__all__ lists {name!r}, but tests/cases.py has no line for it in {table}."


@pytest.mark.parametrize("name", concrete(Bijection))
def test_every_bijection_has_a_case(name):
    built = {type(module).__name__ for make in BIJECTIONS.values()
             for context_dim in (0, 2) for module in make(INPUT_DIM, context_dim).modules()}
    assert name in built, missing_line(name, "BIJECTIONS")


@pytest.mark.parametrize("name", concrete(Transformer))
def test_every_transformer_has_a_case(name):
    assert name in {type(make()).__name__ for make in TRANSFORMERS.values()}, (
        missing_line(name, "TRANSFORMERS"))


@pytest.mark.parametrize("name", concrete(Base))
def test_every_base_has_a_case(name):
    assert name in {type(make(INPUT_DIM)).__name__ for make in BASES.values()}, (
        missing_line(name, "BASES"))


def test_every_recipe_has_a_case():
    for name in flows.__all__:
        value = getattr(flows, name)
        if inspect.isfunction(value) and "input_dim" in inspect.signature(value).parameters:
            assert name in RECIPES, missing_line(name, "RECIPES")


def test_every_case_of_the_helper_tables_exists():
    named = (WITHOUT_CONTEXT | REPETITIVE | LENGTHY | ROUGH | set(NOT_PROMISED)
             | set(TOLERANCES))
    assert named <= set(BIJECTIONS)


# ------------------------------------------------------------------ the checks themselves

class WrongInverse(Diagonal):
    def _inverse(self, z, context):
        u, log_det = super()._inverse(z, context)
        return u + 1e-6, log_det


class WrongLogDet(Diagonal):
    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z, 2 * log_det

    def _inverse(self, z, context):
        u, log_det = super()._inverse(z, context)
        return u, 2 * log_det


class MixesRows(Diagonal):
    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z + u.sum() - u.detach().sum(-1, keepdim=True), log_det


class FailsOnEmpty(Diagonal):
    def _forward(self, u, context):
        return super()._forward(u.reshape(len(u), -1), context)


class KeepsBatches(Coupling):
    def _checked(self, argument, value, context):
        return value, context


class IgnoresContext(Diagonal):
    def __init__(self, input_dim, context_dim):
        super().__init__(input_dim)
        self.context_dim = context_dim


class StartsElsewhere(Diagonal):
    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z + 1, log_det


class LeavesFloat64(Diagonal):
    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z, log_det.float()


class DropsGradient(Planar):
    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z, log_det.detach()


class DropsSecondDerivative(Diagonal):
    def _forward(self, u, context):
        scale = self.log_scale(context).exp()
        return self.shift(context) + u * scale, FirstDerivativeOnly.apply(scale).sum(-1).expand(
            u.shape[:-1])


class FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = 1 / x
        return x.log()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope.detach()


class HoldsLambda(Diagonal):
    def __init__(self, input_dim, context_dim=0):
        super().__init__(input_dim, context_dim)
        self.twist = lambda u: u


class RemembersItsLastCall(Diagonal):
    def _forward(self, u, context):
        self.last, log_det = super()._forward(u, context)
        return self.last, log_det


class ForgetsItsConstants(Diagonal):
    def __init__(self, input_dim, context_dim=0):
        super().__init__(input_dim, context_dim)
        self.offset = torch.randn(())

    def _forward(self, u, context):
        z, log_det = super()._forward(u, context)
        return z + self.offset, log_det


class Branches(Diagonal):
    def _forward(self, u, context):
        return super()._forward(u if u.sum() > 0 else 1 * u, context)


class DetachesThePath(Diagonal):
    def _inverse_at(self, u, z, context):
        return u, self._inverse(z, context)[1]


class ChecksNothing(Diagonal):
    def forward(self, u, context=None):
        return self._forward(torch.as_tensor(u), context)


BROKEN = {
    testing.check_inverse: [WrongInverse],
    testing.check_log_det: [WrongLogDet],
    testing.check_batch: [MixesRows],
    testing.check_empty_batch: [FailsOnEmpty],
    testing.check_context_broadcasts: [KeepsBatches],
    testing.check_context_is_used: [IgnoresContext],
    testing.check_identity_at_start: [StartsElsewhere],
    testing.check_dtypes: [LeavesFloat64],
    testing.check_gradients: [DropsGradient, DropsSecondDerivative],
    testing.check_copies: [HoldsLambda, RemembersItsLastCall, ForgetsItsConstants],
    testing.check_compiles: [Branches],
    testing.check_path_inverse: [DetachesThePath],
    testing.check_shape_errors: [ChecksNothing],
}


@pytest.mark.parametrize(("check", "broken"), [(check, broken) for check in BROKEN
                                               for broken in BROKEN[check]])
def test_a_check_names_the_broken_bijection(check, broken):
    with pytest.raises(AssertionError, match=f"^{broken.__name__} fails the check that "):
        check(lambda: broken(3, 2))


def test_every_check_is_tested_on_a_broken_bijection():
    assert set(BROKEN) == set(testing.BIJECTION_CHECKS)


def test_check_bijection_runs_every_check():
    testing.check_bijection(lambda: Planar(2, 1), context_dim=1)
    with pytest.raises(AssertionError, match="Expected context_dim=2, got 1"):
        testing.check_bijection(lambda: Planar(2, 1), context_dim=2)
    with pytest.raises(AssertionError, match="StartsElsewhere"):
        testing.check_bijection(lambda: StartsElsewhere(2))


def test_a_check_allows_the_error_that_is_stated():
    def make():
        return WrongInverse(3)
    testing.check_bijection(make, tolerance=1e-4, skip=[testing.check_compiles])
    with pytest.raises(AssertionError, match="the inverse undoes the forward"):
        testing.check_bijection(make, tolerance=1e-7)


def test_a_check_wants_a_bijection():
    with pytest.raises(ValueError, match="expected `make` to return a Bijection, got Linear"):
        testing.check_inverse(lambda: nn.Linear(2, 2))


def test_the_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    testing.check_bijection(lambda: Planar(2), skip=[testing.check_compiles])
    assert torch.equal(torch.get_rng_state(), before)


def test_imports_leave_the_random_state_and_the_defaults_alone():
    code = ("import torch, pyro; torch.manual_seed(0); before = torch.get_rng_state()\n"
            "state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(),\n"
            "                 torch.get_num_threads(), torch.get_float32_matmul_precision())\n"
            "defaults = state()\n"
            "import pyro_nfvi.flows, pyro_nfvi.testing\n"
            "assert torch.equal(torch.get_rng_state(), before) and state() == defaults")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
