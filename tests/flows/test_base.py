"""Bases: densities against torch's own, moments and gradients against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pyro.distributions as pd
import pytest
import torch
from torch import distributions as td

from pyro_nfvi.flows import (
    BaseDistribution,
    Gaussian,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    StudentT,
    UniformAngles,
)
from pyro_nfvi.testing import perturb
from tests.cases import BASES

NUM_SAMPLES = 200_000
every_base = pytest.mark.parametrize("base", BASES)


def make(name: str, input_dim: int = 3, device="cpu"):
    base = Mixture(input_dim, 3, spread=1.0) if name == "mixture" else BASES[name](input_dim)
    return perturb(base).to(device).double()


class OnTheCircle(td.Uniform):
    """Uniform over one turn, at any number that stands for an angle."""

    def log_prob(self, value):
        return super().log_prob((value + math.pi) % (2 * math.pi) - math.pi)


def truth(base) -> td.Distribution:
    """The same base, of torch's and Pyro's own parts."""
    if isinstance(base, Gaussian):
        return td.Independent(td.Normal(base.zeros, base.zeros + 1), 1)
    if isinstance(base, StudentT):
        return td.Independent(td.StudentT(base.df), 1)
    if isinstance(base, MultivariateStudentT):
        eye = torch.eye(base.input_dim).to(base.zeros)
        return pd.MultivariateStudentT(base.df, base.zeros, eye)
    if isinstance(base, UniformAngles):
        return td.Independent(OnTheCircle(base.zeros - math.pi, base.zeros + math.pi), 1)
    if isinstance(base, MixtureOfFlows):
        layers = [flow.bijection for flow in base.flows]
        parts = td.MultivariateNormal(torch.stack([layer.shift() for layer in layers]),
                                      scale_tril=torch.stack([layer.factor() for layer in layers]))
        return td.MixtureSameFamily(td.Categorical(base.weights), parts)
    parts = td.Independent(td.Normal(base.locs, base.log_scales.exp()), 1)
    return td.MixtureSameFamily(td.Categorical(logits=base.logits), parts)


def assert_means(values: torch.Tensor, expected: torch.Tensor) -> None:
    """The mean of independent rows lies within four standard errors of what is expected."""
    error = values.std(0) / len(values) ** 0.5
    assert (error > 0).any()
    assert ((values.mean(0) - expected).abs() <= 4 * error + 1e-10).all()


# ------------------------------------------------------------------ every base

@every_base
@pytest.mark.parametrize("batch", [(), (5,), (4, 5)], ids=str)
def test_log_density_is_the_one_of_torch(base, batch, device):
    base = make(base, device=device)
    u = 3 * torch.randn(*batch, 3, device=device).double()
    torch.testing.assert_close(base.log_prob(u), truth(base).log_prob(u))


@every_base
@pytest.mark.parametrize("input_dim", [1, 3])
def test_draws_have_the_moments_of_the_base(base, input_dim, device):
    base = make(base, input_dim, device)
    if isinstance(base, StudentT):
        base = StudentT(input_dim, df=9.0).to(device).double()  # a finite fourth moment
    if isinstance(base, MultivariateStudentT):
        base = MultivariateStudentT(input_dim, df=9.0).to(device).double()
    with torch.no_grad():
        u = base.rsample((NUM_SAMPLES,))
        assert_means(u, base.mean)
        assert_means((u - base.mean).square(), base.variance)
        torch.testing.assert_close(base.mean, truth(base).mean)
        torch.testing.assert_close(base.variance, truth(base).variance)


@every_base
@pytest.mark.parametrize("batch", [(), (5,), (4, 5), (0,)], ids=str)
def test_draws_have_the_shape_asked_for(base, batch):
    base = make(base)
    assert base.rsample(batch).shape == (*batch, 3)
    assert base.log_prob(base.rsample(batch)).shape == batch
    with torch.no_grad():
        assert base.rsample(batch).shape == (*batch, 3)


@every_base
def test_draws_are_the_same_with_and_without_gradients(base):
    base = make(base)
    torch.manual_seed(1)
    u = base.rsample((50,))
    with torch.no_grad():
        torch.manual_seed(1)
        torch.testing.assert_close(base.rsample((50,)), u)


@every_base
def test_only_a_learned_base_has_gradients(base):
    built = make(base)
    learned = any(p.requires_grad for p in built.parameters())
    assert learned == (base in ("student-t-learned", "mixture"))
    assert built.rsample().requires_grad == learned
    assert built.log_prob(torch.zeros(3).double()).requires_grad == learned


@every_base
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])
def test_a_base_copies_and_reloads(base, how):
    built = make(base)
    u = torch.randn(4, 3).double()
    torch.testing.assert_close(how(built).log_prob(u), built.log_prob(u))
    fresh = make(base)
    fresh.load_state_dict(built.state_dict())
    torch.testing.assert_close(fresh.log_prob(u), built.log_prob(u))


@every_base
def test_a_symmetric_base_says_so(base):
    built = make(base)
    u = torch.randn(4, 3).double()
    same = torch.allclose(built.log_prob(u), built.log_prob(-u))
    assert built.symmetric == same


@every_base
def test_it_is_a_torch_distribution(base):
    built = make(base)
    q = built().expand((4, 5))
    assert isinstance(q, BaseDistribution)
    assert (q.batch_shape, q.event_shape, q.has_rsample) == ((4, 5), (3,), True)
    assert q.mean.shape == q.variance.shape == q.rsample().shape == q.sample().shape == (4, 5, 3)
    assert q.rsample((7,)).shape == (7, 4, 5, 3)
    u = torch.randn(3).double()
    torch.testing.assert_close(q.log_prob(u), built.log_prob(u).expand(4, 5))
    with pytest.raises(ValueError, match="event|shape"):
        built().log_prob(torch.zeros(2).double())


# ------------------------------------------------------------------ Student-t

@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("df", [1.001, 2.0, 5.0, 40.0, 1e4])
def test_degrees_of_freedom_are_what_was_set(df, learn):
    base = StudentT(3, df, learn=learn)
    torch.testing.assert_close(base.df, torch.full((3,), df), rtol=1e-4, atol=0,
                               check_dtype=False)
    assert base.log_prob(torch.randn(5, 3)).isfinite().all()


def test_learned_degrees_of_freedom_move_apart():
    base = StudentT(2, df=4.0, learn=True)
    data = torch.cat([td.StudentT(1.5).sample((5000, 1)), td.Normal(0., 1.).sample((5000, 1))], 1)
    optimizer = torch.optim.Adam(base.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-base.log_prob(data).mean()).backward()
        optimizer.step()
    heavy, light = base.df.tolist()
    assert heavy < 2
    assert light > 8


def test_draws_of_student_t_carry_the_gradient_of_its_degrees_of_freedom():
    df = torch.tensor(9.0).double().requires_grad_()
    expected, = torch.autograd.grad(df / (df - 2), df)  # the variance
    base = StudentT(1, df=9.0, learn=True).double()
    slope, = torch.autograd.grad(base.df.sum(), base.raw_df)
    gradients = []
    for _ in range(50):
        loss = base.rsample((10_000,)).square().mean()
        gradients.append(torch.autograd.grad(loss, base.raw_df)[0] / slope)
    assert_means(torch.stack(gradients), expected)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("how", [list, tuple, np.array, torch.tensor], ids=lambda how: how.__name__)
def test_degrees_of_freedom_may_be_one_a_coordinate(how, learn):
    df = [1.5, 5.0, 1e4]
    base = StudentT(3, how(df), learn=learn)
    torch.testing.assert_close(base.df, torch.tensor(df), rtol=1e-4, atol=0)
    assert base.df.dtype == base.rsample().dtype == torch.float32
    u = torch.randn(5, 3)
    alone = [StudentT(1, value).log_prob(u[:, k:k + 1]) for k, value in enumerate(df)]
    torch.testing.assert_close(base.log_prob(u), sum(alone))


# ------------------------------------------------------------------ multivariate Student-t

def test_the_coordinates_of_a_multivariate_student_t_share_their_tail():
    base = MultivariateStudentT(2, df=9.0).double()
    u = base.rsample((NUM_SAMPLES,))
    squares = u.square()
    assert_means(u[:, 0] * u[:, 1], torch.tensor(0.0).double())
    # E[u_0^2 u_1^2] = nu^2 / (nu - 2) / (nu - 4), where independent coordinates have no factor
    assert_means(squares[:, 0] * squares[:, 1], torch.tensor(81 / 35).double())
    ratio = squares.sum(-1) / 2  # F(2, nu)
    level = 2.0
    share = (ratio > level).double().mean().item()
    expected = (1 + 2 * level / 9) ** -4.5
    assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / NUM_SAMPLES)


@pytest.mark.parametrize("df", [1.5, 2.0, 5.0, 1e4])
def test_a_multivariate_student_t_of_one_coordinate_is_the_student_t(df):
    elliptical, plain = MultivariateStudentT(1, df).double(), td.StudentT(torch.tensor(df).double())
    u = 10 * torch.randn(50, 1).double()
    torch.testing.assert_close(elliptical.log_prob(u), plain.log_prob(u).squeeze(-1), rtol=1e-6,
                               atol=1e-6)  # torch rounds less at df=1e4
    torch.testing.assert_close(elliptical.variance, plain.variance.expand(1))
    assert elliptical.df.item() == df


@pytest.mark.parametrize("base", [MultivariateStudentT(1, 3.0), MultivariateStudentT(2, 3.0),
                                  StudentT(1, [2.5]), StudentT(2, [2.5, 8.0])], ids=repr)
def test_a_heavy_tailed_density_integrates_to_one(base):
    base = base.double()
    half = torch.linspace(-math.pi / 2, math.pi / 2, 1003)[1:-1].double()
    sides = [half.tan() for _ in range(base.input_dim)]  # the whole line, by u = tan a
    jacobian = torch.cartesian_prod(*[1 / half.cos().square() for _ in sides])
    density = base.log_prob(torch.cartesian_prod(*sides).reshape(-1, base.input_dim)).exp()
    weighted = density * jacobian.reshape(-1, base.input_dim).prod(-1)
    step = (half[1] - half[0]) ** base.input_dim
    assert (weighted.sum() * step).item() == pytest.approx(1, abs=1e-4)


# ------------------------------------------------------------------ mixture

MOMENTS = {
    "E[u]": (lambda u: u.sum(-1),
             lambda weights, locs, scales: (weights @ locs).sum()),
    "E[u^2]": (lambda u: u.square().sum(-1),
               lambda weights, locs, scales: (weights @ (locs**2 + scales**2)).sum()),
    "E[u_0 u_1]": (lambda u: u[..., 0] * u[..., 1],
                   lambda weights, locs, scales: (weights * locs[:, 0] * locs[:, 1]).sum()),
    "E[cos(u_0 + 2 u_1)]": (
        lambda u: torch.cos(u[..., 0] + 2 * u[..., 1]),
        lambda weights, locs, scales: (
            weights * torch.cos(locs[:, 0] + 2 * locs[:, 1])
            * torch.exp(-0.5 * (scales[:, 0]**2 + 4 * scales[:, 1]**2))).sum()),
}


@pytest.mark.parametrize("input_dim", [2, 4])
@pytest.mark.parametrize("moment", MOMENTS)
def test_draws_of_a_mixture_carry_the_gradients_of_its_moments(moment, input_dim):
    base = make("mixture", input_dim)
    function, exact = MOMENTS[moment]
    value = exact(base.logits.softmax(-1), base.locs, base.log_scales.exp())
    parameters = list(base.parameters())
    expected = torch.autograd.grad(value, parameters, materialize_grads=True)
    gradients = []
    for _ in range(40):
        loss = function(base.rsample((2500,))).mean()
        gradients.append(torch.autograd.grad(loss, parameters))
    for batch, slope in zip(zip(*gradients, strict=True), expected, strict=True):
        assert_means(torch.stack(batch), slope)


def test_a_mixture_of_one_component_is_the_usual_reparametrization():
    base = perturb(Mixture(3, 1)).double()
    u = base.rsample((5,))
    weight = torch.randn(5, 3).double()
    got = torch.autograd.grad((weight * u).sum(), list(base.parameters()), materialize_grads=True)
    noise = (u - base.locs) * (-base.log_scales).exp()
    noise = noise.detach()
    usual = base.locs + base.log_scales.exp() * noise
    expected = torch.autograd.grad((weight * usual).sum(), list(base.parameters()),
                                   materialize_grads=True, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_a_mixture_draws_its_components_in_proportion():
    base = Mixture(1, 3).double()
    with torch.no_grad():
        base.locs.copy_(torch.tensor([[-100.0], [0.0], [100.0]]))
        base.logits.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
        u = base.rsample((NUM_SAMPLES,)).squeeze(-1)
    for centre, weight in ((-100, 0.2), (0, 0.3), (100, 0.5)):
        share = ((u - centre).abs() < 50).double().mean().item()
        assert abs(share - weight) <= 4 * math.sqrt(weight * (1 - weight) / NUM_SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_mixture_of_far_components_has_finite_gradients(dtype):
    base = Mixture(2, 4, spread=100.0).to(dtype)
    u = base.rsample((5000,))
    for result in (u.square().mean(), base.log_prob(u).mean()):
        for slope in torch.autograd.grad(result, list(base.parameters()), retain_graph=True):
            assert slope.isfinite().all()
