"""Score: log joint and gradient of a batch, as autograd has them, and what is not finite."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi.inference.score import FAILURE_WORK, UNKNOWN_WORK, Score, elbo_of
from tests.inference.targets import DOUBLE, log_joint_of

Y = torch.linspace(-1.0, 2.0, 6, dtype=DOUBLE)


def mixed(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, weights[0] - weights[2], scale), obs=y)


def with_control_flow(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = 1.0 if mu[0] > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu[1], scale), obs=y)


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def correlated(z):
    """A density of a correlation, with a Cholesky factor that exists between -1 and 1 only."""
    rho = z[:, 0]
    ones = torch.ones_like(rho)
    matrix = torch.stack([torch.stack([ones, rho], -1), torch.stack([rho, ones], -1)], -2)
    return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def autograd(log_joint, z):
    """Log joint and gradient, point by point."""
    rows = [row.clone().requires_grad_() for row in z]
    values = [log_joint(row.unsqueeze(0))[0] for row in rows]
    gradients = [torch.autograd.grad(value, row)[0] for value, row in zip(values, rows,
                                                                         strict=True)]
    return torch.stack(values).detach(), torch.stack(gradients)


@pytest.mark.parametrize("model", [mixed, with_control_flow], ids=lambda model: model.__name__)
@pytest.mark.parametrize("count", [1, 7])
def test_value_and_gradient_of_a_batch_are_those_of_autograd_point_by_point(model, count):
    log_joint = log_joint_of(model, Y)
    z = torch.randn(count, log_joint.layout.size, dtype=DOUBLE)
    log_joint.try_batched(z)
    score = Score(log_joint)
    score(torch.randn_like(z))  # the second call runs what the first has recorded
    values, gradients = autograd(log_joint, z)
    torch.testing.assert_close(score(z), (values, gradients))
    torch.testing.assert_close(score.value(z), values)
    assert not score(z)[0].requires_grad


def test_a_second_batch_size_does_not_disturb_the_first():
    log_joint = log_joint_of(mixed, Y)
    score, z = Score(log_joint), torch.randn(5, 3, dtype=DOUBLE)
    for count in (5, 2, 5):
        torch.testing.assert_close(score(z[:count]), autograd(log_joint, z[:count]))
    assert score.evaluations == 12


@pytest.mark.parametrize(("function", "bad"), [
    (lambda z: z.log().sum(-1), [-1.0, 1.0]),
    (lambda z: z.sqrt().sum(-1), [0.0, 1.0]),
    (lambda z: z.reciprocal().sum(-1), [0.0, 1.0]),
], ids=["value-nan", "gradient-infinite", "both-infinite"])
def test_what_is_not_finite_gets_no_density_and_no_gradient_and_is_counted(function, bad):
    score = Score(function)
    z = torch.tensor([[1.0, 2.0], bad, [3.0, 4.0]], dtype=DOUBLE)
    log_p, gradient = score(z)
    assert log_p[1] == -torch.inf
    assert torch.equal(gradient[1], torch.zeros(2, dtype=DOUBLE))
    torch.testing.assert_close((log_p[::2], gradient[::2]), autograd(function, z[::2]))
    assert (score.evaluations, score.non_finite) == (3, 1)
    assert score(z[::2])[0].isfinite().all()
    assert (score.evaluations, score.non_finite) == (5, 1)


@pytest.mark.parametrize("recorded", [False, True], ids=["at-the-first-call", "later"])
def test_a_matrix_without_a_factor_spoils_its_own_point_only(recorded):
    score = Score(correlated)
    z = torch.tensor([[0.1], [2.0], [-0.5], [0.9], [-3.0]], dtype=DOUBLE)
    good = z[:, 0].abs() < 1
    if recorded:
        score(z.clamp(-0.9, 0.9))
    log_p, gradient = score(z)
    values, gradients = autograd(correlated, z[good])
    torch.testing.assert_close((log_p[good], gradient[good]), (values, gradients))
    assert (log_p[~good] == -torch.inf).all()
    assert (gradient[~good] == 0).all()
    assert score.non_finite == 2
    torch.testing.assert_close(score.value(z)[good], values)
    assert (score.value(z)[~good] == -torch.inf).all()


def test_minibatches_stay_the_same_from_call_to_call():
    score = Score(log_joint_of(minibatch, Y))
    z = torch.randn(4, 1, dtype=DOUBLE)
    torch.testing.assert_close(score(z), score(z), rtol=0, atol=0)
    assert score.noisy


def test_a_model_without_chance_is_not_noisy():
    score = Score(log_joint_of(mixed, Y))
    score(torch.randn(4, 3, dtype=DOUBLE))
    assert not score.noisy


def test_work_grows_with_the_data_and_with_failures():
    few, many = Score(log_joint_of(mixed, Y)), Score(log_joint_of(mixed, Y.repeat(100)))
    assert few.work == UNKNOWN_WORK
    for score in (few, many):
        score(torch.zeros(10, 3, dtype=DOUBLE))
    assert 10 * few.work < many.work < 200 * few.work
    score = Score(correlated)
    score(torch.zeros(2, 1, dtype=DOUBLE))
    before = score.work
    score(torch.tensor([[0.0], [2.0]], dtype=DOUBLE))
    assert score.work == FAILURE_WORK * before


def test_many_points_are_valued_as_few_are():
    score, z = Score(correlated), torch.linspace(-0.9, 0.9, 4501, dtype=DOUBLE).unsqueeze(-1)
    torch.testing.assert_close(score.value(z), correlated(z))


# ------------------------------------------------------------------ elbo_of

def test_the_elbo_of_finite_terms_is_their_mean_along_a_dimension():
    terms = torch.randn(4, 5, dtype=DOUBLE)
    torch.testing.assert_close(elbo_of(terms), terms.mean(-1))
    torch.testing.assert_close(elbo_of(terms, dim=0), terms.mean(0))


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_the_elbo_is_that_of_the_guide_cut_down_to_where_there_is_density(bad):
    z = torch.randn(1000, dtype=DOUBLE)
    inside = z > 0
    log_p = (-z).where(inside, torch.tensor(bad, dtype=DOUBLE))
    normal = torch.distributions.Normal(0.0, 1.0)
    share = inside.double().mean()
    cut = (log_p - (normal.log_prob(z) - share.log()))[inside].mean()  # q / share, where p is
    torch.testing.assert_close(elbo_of(log_p - normal.log_prob(z)), cut)


def test_the_elbo_without_a_finite_term_is_minus_infinity():
    assert elbo_of(torch.full((3,), -torch.inf)) == -torch.inf
