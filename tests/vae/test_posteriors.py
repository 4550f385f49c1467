"""Posteriors: divergences, gradients and densities against independent estimates."""

from __future__ import annotations

import copy
import math
import pickle
import re
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_nfvi import iaf, nsf, planar, radial, sylvester
from pyro_nfvi.flows.planar import ZERO
from pyro_nfvi.vae import (
    AmortizedPosterior,
    DiagonalGaussian,
    FlowPosterior,
    FullGaussian,
    StandardGaussian,
)
from pyro_nfvi.vae.objective import divergence
from pyro_nfvi.vae.posteriors import LEAST_SCALE, CorrelatedNormal

DOUBLE = torch.float64
NUM_DRAWS = 4000
POSTERIORS = {
    "diagonal": DiagonalGaussian,
    "full": FullGaussian,
    "planar": partial(FlowPosterior, recipe=planar, num_layers=2),
    "radial": partial(FlowPosterior, recipe=radial, num_layers=2),
    "iaf": partial(FlowPosterior, recipe=iaf, num_layers=1),
    "sylvester": partial(FlowPosterior, recipe=sylvester, num_layers=2),
    "nsf": partial(FlowPosterior, recipe=nsf, num_layers=1, context_dim=4),
    "realnvp": FlowPosterior,
}
GAUSSIAN = ["diagonal", "full"]
FLOWS = [name for name in POSTERIORS if name not in GAUSSIAN]
each = pytest.mark.parametrize("name", POSTERIORS)


def built(name, latent_dim=3, feature_dim=5, spread=0.3):
    """A posterior of that kind away from its start, in double precision."""
    posterior = POSTERIORS[name](feature_dim, latent_dim).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return posterior


def as_multivariate(distribution):
    """Torch's own multivariate normal of a Gaussian posterior."""
    if isinstance(distribution, CorrelatedNormal):
        return MultivariateNormal(distribution.loc, distribution.covariance_matrix)
    return MultivariateNormal(distribution.mean, distribution.variance.diag_embed())


def standard_error(draws):
    return draws.std(0) / len(draws) ** 0.5


# ------------------------------------------------------------------ what they are

@each
def test_draws_have_the_shape_of_the_features_and_carry_gradients(name):
    posterior, features = built(name), torch.randn(4, 2, 5, dtype=DOUBLE, requires_grad=True)
    q = posterior(features)
    assert (q.batch_shape, q.event_shape) == ((4, 2), (3,))
    z = q.rsample((7,))
    assert z.shape == (7, 4, 2, 3)
    assert q.log_prob(z).shape == (7, 4, 2)
    for value in (z.sum(), q.log_prob(z.detach()).sum()):
        gradients = torch.autograd.grad(value, [features, *posterior.parameters()],
                                        retain_graph=True, allow_unused=True)
        assert gradients[0].abs().sum() > 0
        assert all(g is None or g.isfinite().all() for g in gradients)


@each
def test_posteriors_copy_and_pickle(name):
    posterior, features = built(name), torch.randn(4, 5, dtype=DOUBLE)
    z = torch.randn(4, 3, dtype=DOUBLE)
    expected = posterior(features).log_prob(z)
    for other in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert torch.equal(other(features).log_prob(z), expected)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_as_a_diagonal_gaussian_that_depends_on_the_features(name):
    posterior = POSTERIORS[name](5, 3).double()
    z, features = torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, 5, dtype=DOUBLE)
    loc, raw = posterior.flow.bijection.units(features).chunk(2, -1)
    scale = torch.nn.functional.softplus(raw + ZERO)
    expected = torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)
    torch.testing.assert_close(posterior(features).log_prob(z), expected, rtol=1e-4, atol=1e-4)
    assert loc.std(0).min() > 0


def test_the_gaussians_start_with_scales_near_one_and_without_correlation():
    features = torch.zeros(1, 5)
    for name in GAUSSIAN:
        posterior = POSTERIORS[name](5, 3)
        with torch.no_grad():
            posterior.scale.bias.zero_()
        q = posterior(features)
        torch.testing.assert_close(q.stddev, torch.ones(1, 3), rtol=0, atol=1e-5)
    correlation = FullGaussian(5, 3)(torch.randn(7, 5)).covariance_matrix
    assert torch.equal(correlation, correlation.diagonal(dim1=-2, dim2=-1).diag_embed())


def test_the_numbers_of_a_diagonal_gaussian_are_linear_in_the_features():
    posterior, features = built("diagonal"), torch.randn(4, 5, dtype=DOUBLE)
    q = posterior(features)
    torch.testing.assert_close(q.mean, posterior.loc(features))
    raw = posterior.scale(features) + ZERO
    torch.testing.assert_close(q.stddev, LEAST_SCALE + raw.exp().log1p())


def test_the_covariance_of_a_full_gaussian_is_that_of_its_factor_and_of_its_draws():
    torch.manual_seed(1)
    posterior, features = built("full"), torch.randn(2, 5, dtype=DOUBLE)
    q = posterior(features)
    lower = posterior.lower(features).view(2, 3, 3)
    for row in range(2):
        factor = torch.tril(lower[row], -1) + torch.diag(q.scale_tril[row].diagonal())
        covariance = factor @ factor.T
        torch.testing.assert_close(q.covariance_matrix[row], covariance)
        assert covariance[1, 0].abs() > 1e-3
        draws = q.sample((NUM_DRAWS,))[:, row]
        variance = covariance.diagonal()
        error = ((covariance ** 2 + torch.outer(variance, variance)) / NUM_DRAWS) ** 0.5
        assert ((draws.T.cov() - covariance).abs() < 4 * error).all()


@pytest.mark.parametrize("size", [1e3, -1e3, 0.0])
@each
def test_scales_stay_positive_for_features_of_any_size(name, size):
    posterior = POSTERIORS[name](5, 3)  # in single precision
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = torch.full((2, 5), size, requires_grad=True)
    q = posterior(features)
    z = q.rsample()
    log_q = q.log_prob(z)
    assert z.isfinite().all()
    assert log_q.isfinite().all()
    if name in GAUSSIAN:
        assert (q.stddev >= LEAST_SCALE).all()
    for gradient in torch.autograd.grad(log_q.sum() + z.sum(), posterior.parameters(),
                                        allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


# ------------------------------------------------------------------ KL divergence

@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_divergence_from_the_standard_prior_is_torchs_and_monte_carlos(name):
    posterior, prior = built(name), StandardGaussian(3).double()
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([0.5, -1.0, 2.0]))  # any independent Gaussian
        prior.scale.copy_(torch.tensor([0.5, 2.0, 1.0]))
    q, p = posterior(torch.randn(6, 5, dtype=DOUBLE)), prior(None)
    z = q.sample((NUM_DRAWS,))
    ours = divergence(q, p, z[:0])  # without any draws: it is in closed form
    assert ours.shape == (6, 3 if name == "diagonal" else 1)
    ours = ours.sum(-1)
    exact = kl_divergence(as_multivariate(q),
                          MultivariateNormal(prior.loc, prior.scale.square().diag()))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    draws = q.log_prob(z) - p.log_prob(z)
    assert ((draws.mean(0) - ours).abs() < 4 * standard_error(draws)).all()


def test_the_divergence_of_a_diagonal_gaussian_is_told_coordinate_by_coordinate():
    q, p = built("diagonal")(torch.randn(6, 5, dtype=DOUBLE)), StandardGaussian(3).double()(None)
    mean, scale = q.mean, q.stddev
    terms = 0.5 * (mean.square() + scale.square() - 1) - scale.log()
    torch.testing.assert_close(divergence(q, p, q.sample()), terms)


@pytest.mark.parametrize("name", FLOWS)
def test_the_divergence_of_a_flow_is_the_mean_at_the_draws(name):
    q, p = built(name)(torch.randn(6, 5, dtype=DOUBLE)), StandardGaussian(3).double()(None)
    z = q.rsample((11,))
    expected = (q.log_prob(z.clone()) - p.log_prob(z)).mean(0)
    torch.testing.assert_close(divergence(q, p, z), expected.unsqueeze(-1))


def test_a_divergence_between_unlike_shapes_has_no_closed_form():
    q = CorrelatedNormal(torch.zeros(3), scale_tril=torch.eye(3))
    for p in (torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(3), 1.0), 1),
              torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)


# ------------------------------------------------------------------ gradients and densities

@pytest.mark.parametrize("name", GAUSSIAN)
def test_reparametrized_gradients_are_those_of_the_closed_form(name):
    # E[(a'z)^2] = (a'm)^2 + a'Sa, whose gradient autograd knows.
    posterior, features = built(name), torch.randn(1, 5, dtype=DOUBLE, requires_grad=True)
    a = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    q = posterior(features)
    exact, = torch.autograd.grad(
        ((as_multivariate(q).loc @ a) ** 2 + a @ as_multivariate(q).covariance_matrix @ a).sum(),
        features)
    many = features.detach().expand(NUM_DRAWS, 5).clone().requires_grad_()
    each_one, = torch.autograd.grad((posterior(many).rsample() @ a).square().sum(), many)
    assert ((each_one.mean(0) - exact[0]).abs() < 4 * standard_error(each_one)).all()


@pytest.mark.parametrize("name", FLOWS)
def test_reparametrized_gradients_are_those_of_the_score(name):
    # d/dc E[f(z)] by paths, and by E[f(z) d log q / dc].
    posterior, features = built(name), torch.randn(1, 5, dtype=DOUBLE)
    a = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)

    def f(z):
        return z @ a + torch.sin(z[:, 0])
    many = features.expand(NUM_DRAWS, 5).clone().requires_grad_()
    path, = torch.autograd.grad(f(posterior(many).rsample()).sum(), many)
    with torch.no_grad():
        z = posterior(many).rsample()
    score, = torch.autograd.grad(((f(z) - f(z).mean()) * posterior(many).log_prob(z)).sum(), many)
    error = (standard_error(path) ** 2 + standard_error(score) ** 2) ** 0.5
    assert (path.mean(0).abs() > 4 * standard_error(path)).any()  # it is not all about zero
    assert ((path.mean(0) - score.mean(0)).abs() < 4 * error).all()


@each
def test_the_density_of_draws_is_that_of_the_same_values_given_afresh(name):
    posterior, features = built(name), torch.randn(20, 5, dtype=DOUBLE)
    q = posterior(features)
    z = q.rsample((3,))
    remembered = q.log_prob(z)
    torch.testing.assert_close(posterior(features).log_prob(z.detach().clone()), remembered,
                               rtol=1e-6, atol=1e-6)


@each
def test_the_density_integrates_to_one(name):
    posterior = built(name, latent_dim=2)
    line = torch.linspace(-12, 12, 401, dtype=DOUBLE)
    grid = torch.cartesian_prod(line, line)
    q = posterior(torch.randn(1, 5, dtype=DOUBLE))
    total = q.log_prob(grid.unsqueeze(1)).exp().sum() * (line[1] - line[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=5e-3)


@each
def test_the_entropy_by_draws_is_that_by_the_grid(name):
    # Draws and density belong together.
    posterior = built(name, latent_dim=2)
    line = torch.linspace(-12, 12, 401, dtype=DOUBLE)
    grid = torch.cartesian_prod(line, line)
    q = posterior(torch.randn(1, 5, dtype=DOUBLE))
    log_q = q.log_prob(grid.unsqueeze(1))
    area = (line[1] - line[0]) ** 2
    expected = -(log_q.exp() * log_q).sum() * area
    draws = -q.log_prob(q.sample((NUM_DRAWS,)))
    assert (draws.mean(0) - expected).abs() < 4 * standard_error(draws) + 0.01


# ------------------------------------------------------------------ mistakes

@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: DiagonalGaussian(0, 2), "DiagonalGaussian expected `feature_dim` to be an integer "
                                     ">= 1, got 0."),
    (lambda: FullGaussian(3, 2.5), "FullGaussian expected `latent_dim` to be an integer >= 1, "
                                   "got 2.5."),
    (lambda: FlowPosterior(3, 2, context_dim=0), "FlowPosterior expected `context_dim` to be an "
                                                 "integer >= 1, got 0."),
    (lambda: FlowPosterior(3, 2, planar, num_layers=0), "planar expected `num_layers`"),
    (lambda: DiagonalGaussian(3, 2)(torch.randn(4, 5)),
     "DiagonalGaussian expected `features` of shape (*batch, 3), got (4, 5)."),
    (lambda: FullGaussian(3, 2)([1.0]), "FullGaussian expected `features` to be a tensor of shape "
                                        "(*batch, 3), got list."),
    (lambda: FlowPosterior(3, 2)(torch.ones(4, 3, dtype=torch.int64)),
     "FlowPosterior expected `features` to hold floating-point numbers, got torch.int64."),
], ids=["feature_dim", "latent_dim", "context_dim", "num_layers", "shape", "list", "integers"])
def test_a_mistake_is_named(mistake, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mistake()


def test_a_posterior_of_ones_own_needs_one_method():
    class Laplace(AmortizedPosterior):
        def _distribution(self, features):
            import pyro.distributions as dist
            return dist.Laplace(features[..., :2], 1.0).to_event(1)
    q, p = Laplace(5, 2)(torch.zeros(3, 5)), StandardGaussian(2)(None)
    z = q.rsample((NUM_DRAWS,))
    estimate = divergence(q, p, z).squeeze(-1)
    exact = 2 * (-1 - math.log(2) + 0.5 * math.log(2 * math.pi) + 1)  # -entropy + cross entropy
    draws = q.log_prob(z) - p.log_prob(z)
    assert ((estimate - exact).abs() < 4 * standard_error(draws)).all()


def test_a_flow_posterior_asks_for_a_recipe():
    with pytest.raises(ValueError, match="FlowPosterior expected `recipe` to be a function, got N"):
        FlowPosterior(4, 1, None)
