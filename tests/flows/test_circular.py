"""Flows of angles: maps of the circle, densities with a period, and a guide of von Mises sites."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_nfvi import NFVI, AutoFlow
from pyro_nfvi.flows import (
    AngularDiagonal,
    Autoregressive,
    CircularSpline,
    Compose,
    Coupling,
    FixedLinear,
    Flow,
    MaskedMLP,
    PeriodicMLP,
    UniformAngles,
    ncsf,
)
from pyro_nfvi.flows.nets import AngleFeatures
from pyro_nfvi.testing import perturb

TURN = 2 * math.pi
SPLINE = CircularSpline()
CYLINDER = [True, False]


def torus(layer: str) -> Flow:
    """A flow over two angles, away from the identity."""
    bijection = ncsf(2) if layer == "coupling" else Compose([
        Autoregressive(2, transformer=SPLINE, reverse=k == 1,
                       conditioner=partial(MaskedMLP, angles=[True, True])) for k in range(2)])
    return perturb(Flow(Compose([bijection, AngularDiagonal(2)]), UniformAngles(2))).double()


# ------------------------------------------------------------------ the spline

def random(count: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    params = scale * torch.randn(count, 1, SPLINE.params_per_dim).double()
    return (TURN * (torch.rand(count, 1) - 0.5)).double(), params


def test_a_turn_of_the_input_is_a_turn_of_the_output():
    u, params = random(2000)
    z, log_slope = SPLINE.forward(u, params)
    back, log_slope_back = SPLINE.inverse(u, params)
    for turns in (-3, 1, 100):
        turned, same = SPLINE.forward(u + turns * TURN, params)
        torch.testing.assert_close(turned, z + turns * TURN)
        torch.testing.assert_close(same, log_slope, rtol=0, atol=1e-9)
        turned, same = SPLINE.inverse(u + turns * TURN, params)
        torch.testing.assert_close(turned, back + turns * TURN)
        torch.testing.assert_close(same, log_slope_back, rtol=0, atol=1e-9)


def test_once_round_the_circle_is_once_round_the_circle():
    _, params = random(50)
    u = torch.linspace(-math.pi, math.pi, 4001).double().expand(50, 4001)
    z, log_slope = SPLINE.forward(u, params.expand(50, 4001, -1))
    assert (z.diff() > 0).all()
    torch.testing.assert_close(z[:, -1] - z[:, 0], torch.full((50,), TURN).double())
    mass = torch.trapezoid(log_slope.exp(), u)
    torch.testing.assert_close(mass, torch.full((50,), TURN).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("turns", [-1, 0, 2])
def test_value_and_slope_are_continuous_where_the_turn_ends(turns):
    _, params = random(500)
    end = torch.full((500, 1), math.pi + turns * TURN).double()
    (left, left_slope), (right, right_slope) = (
        SPLINE.forward(end + step, params) for step in (-1e-9, 1e-9))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    torch.testing.assert_close(left_slope, right_slope, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extreme_parameters_stay_finite_and_invert(dtype):
    u, params = (x.to(dtype) for x in random(20_000, 5.0))
    z, log_slope = SPLINE.forward(u, params)
    back, log_slope_back = SPLINE.inverse(z, params)
    for result in (z, log_slope, back, log_slope_back):
        assert result.isfinite().all()
    if dtype == torch.float64:
        gap = torch.remainder(back - u + math.pi, TURN) - math.pi  # the same place on the circle
        assert gap.abs().max() < 1e-6
        torch.testing.assert_close(-log_slope_back, log_slope, rtol=1e-6, atol=1e-4)


def test_a_phase_alone_is_a_rotation():
    params = torch.zeros(5, 1, SPLINE.params_per_dim)
    params[..., -1] = 0.7
    u = torch.randn(5, 1)
    z, log_slope = SPLINE.forward(u, params)
    torch.testing.assert_close(z, u + 0.7)
    torch.testing.assert_close(log_slope, torch.zeros(5, 1), rtol=0, atol=1e-5)


# ------------------------------------------------------------------ densities

@pytest.mark.parametrize("layer", ["coupling", "autoregressive"])
def test_a_density_on_the_torus_has_its_periods_and_integrates_to_one_over_any(layer):
    flow = torus(layer)
    side = torch.linspace(-math.pi, math.pi, 121)[:-1].double()
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        for shift in (0.0, 1.7):
            mass = flow.log_prob(z + shift).exp().sum() * (TURN / 120) ** 2
            assert mass.item() == pytest.approx(1, abs=1e-3)
        for turns in ([1, 0], [0, -1], [-2, 3]):
            turned = z + TURN * torch.tensor(turns).double()
            torch.testing.assert_close(flow.log_prob(turned), flow.log_prob(z), rtol=0, atol=1e-8)


def test_a_conditioner_without_features_has_no_period():
    layer = perturb(Coupling(2, transformer=SPLINE), 2.0).double()
    flow, z = Flow(layer, UniformAngles(2).double()), torch.tensor([3.0, 0.0]).double()
    turned = z + torch.tensor([TURN, 0.0]).double()
    assert (flow.log_prob(z) - flow.log_prob(turned)).abs() > 1e-3  # why there is PeriodicMLP


def test_a_density_on_the_cylinder_integrates_to_one():
    flow = Flow(Compose([ncsf(2, angles=CYLINDER), AngularDiagonal(2, angles=CYLINDER)]),
                UniformAngles(2, angles=CYLINDER))
    flow = perturb(flow).double()
    angle, real = (torch.linspace(-reach, reach, 401).double() for reach in (math.pi, 15))
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(angle[:-1], real)).exp().reshape(400, 401)
    mass = torch.trapezoid(density, real).sum() * (TURN / 400)
    assert mass.item() == pytest.approx(1, abs=4e-3)


def test_draws_follow_the_density():
    flow = torus("coupling")
    with torch.no_grad():
        z, log_prob = flow.rsample_and_log_prob((30_000,))
        torch.testing.assert_close(flow.log_prob(z), log_prob, rtol=0, atol=1e-6)
        side = torch.linspace(-math.pi, math.pi, 201)[:-1].double()
        grid = torch.cartesian_prod(side, side)
        weight = flow.log_prob(grid).exp() * (TURN / 200) ** 2
    for function in (torch.cos, torch.sin):
        error = function(z).std(0) / len(z) ** 0.5
        expected = weight @ function(grid)
        assert ((function(z).mean(0) - expected).abs() < 4 * error + 1e-4).all()


@pytest.mark.slow
def test_a_flow_on_the_torus_finds_two_modes():
    def log_density(z: Tensor) -> Tensor:
        a, b = z.unbind(-1)
        return 2 * torch.cos(2 * a) + 3 * torch.cos(a - b)
    torch.manual_seed(0)
    flow = Flow(ncsf(2), UniformAngles(2))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, 2 - step / 150)
        z, log_q = flow.rsample_and_log_prob((128,))
        optimizer.zero_grad()
        (log_q - log_density(z)).mean().backward()
        optimizer.step()
    side = torch.linspace(-math.pi, math.pi, 401)[:-1]
    log_mass = torch.logsumexp(log_density(torch.cartesian_prod(side, side)), 0)
    log_mass = log_mass + 2 * math.log(TURN / 400)
    with torch.no_grad():
        z, log_q = flow.rsample_and_log_prob((20_000,))
    divergence = (log_q - log_density(z)).mean() + log_mass
    assert -0.01 < divergence < 0.3  # uniform noise has 3.2
    assert 0.4 < (z[:, 0].cos() > 0).float().mean() < 0.6


# ------------------------------------------------------------------ the guide

def direction(data: Tensor) -> None:
    """A direction and a concentration."""
    mu = pyro.sample("mu", dist.VonMises(torch.tensor(0.0), torch.tensor(0.1)))
    kappa = pyro.sample("kappa", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.VonMises(mu, kappa), obs=data)


def exact(data: Tensor) -> tuple[float, float, float]:
    """Log-evidence, and means of cosine and sine of the direction, by sums over a grid."""
    mu, log_kappa = (torch.linspace(*ends, 401).double() for ends in ((-math.pi, math.pi), (-3, 3)))
    mu, log_kappa = (x.flatten() for x in torch.meshgrid(mu[:-1], log_kappa, indexing="ij"))
    log_joint = dist.VonMises(0 * mu, 0 * mu + 0.1).log_prob(mu) \
        + dist.Normal(0 * mu, 0.5).log_prob(log_kappa) \
        + dist.VonMises(mu[:, None], log_kappa.exp()[:, None]).log_prob(data.double()).sum(-1)
    weight = log_joint.softmax(0)
    evidence = torch.logsumexp(log_joint, 0) + math.log(TURN / 400 * 6 / 400)
    return evidence.item(), (weight @ mu.cos()).item(), (weight @ mu.sin()).item()


def guide_of(model: object) -> AutoFlow:
    return AutoFlow(model, partial(ncsf, angles=CYLINDER, hidden_dims=(32,)),
                    base=partial(UniformAngles, angles=CYLINDER),
                    affine=partial(AngularDiagonal, angles=CYLINDER))


def test_a_guide_of_a_von_mises_site_finds_the_posterior():
    data = torch.tensor([2.6, 3.1, -2.9, 2.2, -2.0])  # about half a turn from zero
    guide = guide_of(direction)
    svi = SVI(direction, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.993}),
              Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(300):
        svi.step(data)
    evidence, cosine, sine = exact(data)
    bound = -sum(svi.evaluate_loss(data) for _ in range(50)) / 50
    mu = guide.sample_posterior(20_000)["mu"]
    assert evidence - 0.15 < bound < evidence + 0.05
    assert mu.cos().mean().item() == pytest.approx(cosine, abs=0.1)
    assert mu.sin().mean().item() == pytest.approx(sine, abs=0.1)


def test_a_fit_of_angles_takes_no_gaussian_and_is_nearly_exact():
    data = torch.tensor([2.6, 3.1, -2.9, 2.2, -2.0]).double()
    posterior = NFVI(direction, guide_of(direction), seed=0, num_steps=400, progress=False
                     ).run(data)
    assert [stage.name for stage in posterior.history.stages] == ["flow"]
    evidence, cosine, _ = exact(data)
    assert posterior.elbo[0] == pytest.approx(evidence, abs=0.03)
    assert posterior.pareto_k < 0.7
    mu = posterior.guide.sample_posterior(20_000)["mu"]
    assert mu.cos().mean().item() == pytest.approx(cosine, abs=0.03)


def test_no_frame_of_reals_is_put_under_angles():
    guide = guide_of(direction).setup(torch.tensor([0.3, 1.0]))
    with pytest.raises(ValueError, match="^AutoFlow.whiten expected noise over the reals, got "
                                         "UniformAngles"):
        guide.whiten(FixedLinear(torch.zeros(2), torch.eye(2)))
    assert not UniformAngles(2, angles=[False, False]).periodic


def test_a_guide_of_angles_gives_an_angle_one_density_at_all_its_numbers():
    guide = guide_of(direction).setup(torch.tensor([0.3, 1.0]))
    perturb(guide._flow())
    values = {"mu": torch.tensor(0.5), "kappa": torch.tensor(2.0)}
    turned = {**values, "mu": values["mu"] + TURN}
    torch.testing.assert_close(guide.log_prob(values), guide.log_prob(turned), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------ parts

def test_features_of_angles_are_cosine_and_sine():
    features = AngleFeatures(torch.tensor([True, False, True]))
    u = torch.tensor([0.3, 5.0, 1.2])
    expected = torch.tensor([5.0, math.cos(0.3), math.cos(1.2), math.sin(0.3), math.sin(1.2)])
    torch.testing.assert_close(features(u), expected)
    assert features.columns == [1, 0, 2, 0, 2]


def test_a_masked_network_of_angles_sees_only_the_coordinates_before():
    net = perturb(MaskedMLP(torch.arange(4), 0, 2, angles=[True, False, True, False])).double()
    slopes = torch.func.jacrev(net)(torch.randn(4).double()).abs().sum(1)
    assert torch.equal(slopes > 0, torch.ones(4, 4).tril(-1).bool())


def test_mixed_noise_is_uniform_here_and_normal_there():
    base = UniformAngles(3, angles=[True, False, True]).double()
    u = base.rsample((100_000,))
    assert (u[:, [0, 2]].abs() <= math.pi).all()
    variance = torch.tensor([math.pi**2 / 3, 1.0, math.pi**2 / 3]).double()
    torch.testing.assert_close(base.variance, variance)
    torch.testing.assert_close(u.var(0), variance, rtol=0.03, atol=0)
    expected = -2 * math.log(TURN) + torch.distributions.Normal(0.0, 1.0).log_prob(u[:, 1])
    torch.testing.assert_close(base.log_prob(u), expected)


def test_an_angular_map_scales_only_reals():
    layer = perturb(AngularDiagonal(3, 2, angles=[True, False, True])).double()
    u, context = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    z, log_det = layer(u, context)
    scale = layer.log_scale(context).exp()
    assert (scale[:, [0, 2]] == 1).all()
    assert (scale[:, 1] != 1).all()
    torch.testing.assert_close(z, layer.shift(context) + scale * u)
    torch.testing.assert_close(log_det, scale[:, 1].log())


@pytest.mark.parametrize("wrong", [[True], [True, False, 2], "abc", 3, [[True, False, True]],
                                   torch.tensor([0.5, 0, 1])], ids=str)
@pytest.mark.parametrize(("owner", "make"), [
    ("ncsf", lambda angles: ncsf(3, angles=angles)),
    ("UniformAngles", lambda angles: UniformAngles(3, angles=angles)),
    ("AngularDiagonal", lambda angles: AngularDiagonal(3, angles=angles)),
    ("PeriodicMLP", lambda angles: Coupling(3, conditioner=partial(PeriodicMLP, angles))),
    ("MaskedMLP", lambda angles: Autoregressive(3, conditioner=partial(MaskedMLP,
                                                                        angles=angles))),
], ids=["ncsf", "base", "affine", "coupling", "autoregressive"])
def test_wrong_angles_are_named(owner, make, wrong):
    with pytest.raises(ValueError, match=f"^{owner} expected `angles` to hold 3 booleans, one a "
                                         "coordinate, got "):
        make(wrong)


def test_a_wrong_number_of_bins_is_named():
    with pytest.raises(ValueError, match="^CircularSpline expected `num_bins` to be an integer"):
        ncsf(3, num_bins=1)
