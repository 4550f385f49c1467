"""Random numbers under vmap: as many draws as rows, each of its own, of the right law."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as dist

from pyro_nfvi._random import OutOfPlaceRandom, map_random

LAWS = {
    "Normal": lambda a: dist.Normal(a, 1.0),
    "LogNormal": lambda a: dist.LogNormal(0 * a, 0.5),
    "Uniform": lambda a: dist.Uniform(a - 1, a + 2),
    "Exponential": lambda a: dist.Exponential(a),
    "Gamma": lambda a: dist.Gamma(3 * a, 2.0),
    "StudentT": lambda a: dist.StudentT(9.0, a, 1.0),
    "Laplace": lambda a: dist.Laplace(a, 1.0),
    "Poisson": lambda a: dist.Poisson(a),
    "Binomial": lambda a: dist.Binomial(10, probs=a / 4),
    "Bernoulli": lambda a: dist.Bernoulli(a / 4),
    "MultivariateNormal": lambda a: dist.MultivariateNormal(a.expand(2), torch.eye(2)),
    "Categorical": lambda a: dist.Categorical(torch.stack([a, 2 * a, a]) / (4 * a)),
}
A, COUNT = 1.5, 20_000


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_draws_under_vmap_have_the_moments_of_the_law(law):
    torch.manual_seed(0)
    draws = map_random(lambda a: law(a).sample(), torch.full((COUNT,), A)).double()
    expected = law(torch.tensor(A)).sample((COUNT,)).double()
    assert draws.shape == expected.shape
    errors = (expected.var(0) / COUNT + draws.var(0) / COUNT).sqrt()
    assert ((draws.mean(0) - expected.mean(0)).abs() < 5 * errors).all()
    spread = (draws - draws.mean(0)).square(), (expected - expected.mean(0)).square()
    errors = sum(s.var(0) / COUNT for s in spread).sqrt()
    assert ((spread[0].mean(0) - spread[1].mean(0)).abs() < 5 * errors).all()


def test_a_cauchy_is_drawn_too():
    torch.manual_seed(0)
    draws = map_random(lambda a: dist.Cauchy(a, 2.0).sample(), torch.full((COUNT,), A))
    assert (draws.median() - A).abs() < 5 * 2 * torch.pi / 2 / COUNT ** 0.5
    inside = ((draws - A).abs() < 2).double().mean().item()
    assert abs(inside - 0.5) < 5 * 0.5 / COUNT ** 0.5


def test_a_generator_of_the_callers_is_used():
    with OutOfPlaceRandom():
        one, other = (torch.empty(4).normal_(generator=torch.Generator().manual_seed(3))
                      for _ in range(2))
    assert torch.equal(one, other)
