"""Priors: densities, draws and divergences against independent estimates."""

from __future__ import annotations

import math
import re
from functools import partial

import pyro
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from pyro_nfvi import iaf, maf, nsf, planar
from pyro_nfvi.vae import (
    VAE,
    DiagonalGaussian,
    FlowPosterior,
    FlowPrior,
    FullGaussian,
    Gaussian,
    MLPEncoder,
    Poisson,
    Prior,
    StandardGaussian,
    VampPrior,
)
from pyro_nfvi.vae.objective import divergence
from pyro_nfvi.vae.priors import EqualMixture

DOUBLE = torch.float64
NUM_DRAWS = 4000
PRIORS = {
    "standard": StandardGaussian,
    "realnvp": FlowPrior,
    "maf": partial(FlowPrior, recipe=maf, num_layers=2),
    "nsf": partial(FlowPrior, recipe=nsf, num_layers=2),
    "planar": partial(FlowPrior, recipe=planar, num_layers=2),
    "vamp": lambda latent_dim: VampPrior(latent_dim, torch.randn(7, 4)),
}
POSTERIORS = {"diagonal": DiagonalGaussian, "full": FullGaussian,
              "iaf": partial(FlowPosterior, recipe=iaf, num_layers=1)}
each = pytest.mark.parametrize("name", PRIORS)


def built(name, posterior="diagonal", latent_dim=2):
    """A VAE with that prior, away from its start, in double precision."""
    vae = VAE(Gaussian((4,)), latent_dim, encoder=MLPEncoder((4,), (8,)),
              posterior=POSTERIORS[posterior], prior=PRIORS[name](latent_dim)).double()
    with torch.no_grad():
        for part in (vae.prior, vae.posterior):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def prior_of(vae):
    return vae.prior(vae.posterior_of)


@each
def test_the_density_integrates_to_one(name):
    line = torch.linspace(-15, 15, 201, dtype=DOUBLE)
    log_p = prior_of(built(name)).log_prob(torch.cartesian_prod(line, line))
    assert (log_p.exp().sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1.0, abs=1e-3)


@each
def test_draws_follow_the_density(name):
    p = prior_of(built(name))
    assert (p.batch_shape, p.event_shape) == ((), (2,))
    z = p.sample((NUM_DRAWS,))
    assert z.shape == (NUM_DRAWS, 2)
    line = torch.linspace(-15, 15, 201, dtype=DOUBLE)
    grid = torch.cartesian_prod(line, line)
    density = p.log_prob(grid).exp() * (line[1] - line[0]) ** 2
    for feature in (lambda z: z[:, 0], lambda z: z.square().sum(-1), lambda z: z.prod(-1),
                    p.log_prob):
        expected, draws = density @ feature(grid), feature(z)
        assert (draws.mean() - expected).abs() < 4 * draws.std() / NUM_DRAWS ** 0.5 + 1e-3


@each
def test_a_prior_expands_over_data_and_particles(name):
    p = prior_of(built(name))
    z = torch.randn(5, 3, 2, dtype=DOUBLE)
    wide = p.expand((5, 3))
    assert wide.batch_shape == (5, 3)
    assert wide.sample((4,)).shape == (4, 5, 3, 2)
    torch.testing.assert_close(wide.log_prob(z), p.log_prob(z))
    torch.testing.assert_close(p.expand((3,)).log_prob(z), p.log_prob(z))


@pytest.mark.parametrize("posterior", POSTERIORS)
@each
def test_the_divergence_of_any_pair_is_that_of_many_draws(name, posterior):
    vae = built(name, posterior)
    q, p = vae.posterior_of(torch.randn(5, 4, dtype=DOUBLE)), prior_of(vae)
    z, other = q.rsample((NUM_DRAWS,)), q.sample((NUM_DRAWS,))
    ours = divergence(q, p, z)
    closed = name == "standard" and posterior != "iaf"
    assert ours.shape == (5, 2 if closed and posterior == "diagonal" else 1)
    draws = q.log_prob(other) - p.log_prob(other)
    error = draws.std(0) / NUM_DRAWS ** 0.5 * (1 if closed else 2 ** 0.5)
    assert ((ours.sum(-1) - draws.mean(0)).abs() < 4 * error).all()


def test_the_prior_of_pseudo_inputs_is_the_mixture_of_their_posteriors():
    vae = built("vamp")
    q = vae.posterior_of(vae.prior.pseudo_inputs)
    mixture = MixtureSameFamily(Categorical(torch.ones(7, dtype=DOUBLE)),
                                Independent(Normal(q.mean, q.stddev), 1))
    z = torch.randn(50, 2, dtype=DOUBLE)
    torch.testing.assert_close(prior_of(vae).log_prob(z), mixture.log_prob(z))


def test_a_mixture_draws_every_component_as_often_in_every_batch():
    centres = torch.tensor([[-50.0, 0, 50], [-50, 0, 50]]).unsqueeze(-1)
    components = pyro.distributions.Normal(centres, 1.0).to_event(1)
    mixture = EqualMixture(components)
    assert (mixture.batch_shape, mixture.event_shape) == ((2,), (1,))
    draws = mixture.sample((9000,)).squeeze(-1)
    assert draws.shape == (9000, 2)
    for centre in (-50.0, 0, 50):
        share = ((draws - centre).abs() < 10).double().mean(0)
        assert ((share - 1 / 3).abs() < 4 * (2 / 9 / 9000) ** 0.5).all()
    expected = torch.tensor(-math.log(3) - 0.5 * math.log(2 * math.pi)).expand(2)
    torch.testing.assert_close(mixture.log_prob(centres[:, 0]), expected)


@each
def test_the_parameters_of_a_prior_get_gradients(name):
    vae = built(name)
    x = torch.randn(6, 4, dtype=DOUBLE)
    z = vae.posterior_of(x).rsample()
    value = prior_of(vae).log_prob(z).sum()
    parameters = list(vae.prior.parameters())
    assert bool(parameters) == (name != "standard")
    for gradient in torch.autograd.grad(value, parameters) if parameters else ():
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_a_flow_starts_as_the_standard_gaussian():
    z = torch.randn(20, 3)
    for recipe in (maf, nsf, planar):
        torch.testing.assert_close(FlowPrior(3, recipe)(None).log_prob(z),
                                   StandardGaussian(3)(None).log_prob(z), rtol=1e-4, atol=1e-4)


def test_pseudo_inputs_are_a_copy_of_the_data_as_floats():
    x = torch.arange(12).view(3, 4)
    prior = VampPrior(2, x)
    assert prior.pseudo_inputs.dtype == torch.float32
    with torch.no_grad():
        prior.pseudo_inputs.add_(1)
    assert x[0, 0] == 0


def test_pseudo_inputs_that_leave_the_support_of_counts_do_no_harm():
    vae = VAE(Poisson((4,)), 2, prior=VampPrior(2, torch.full((3, 4), -2.0)))
    x = torch.ones(5, 4)
    assert vae.elbo(x).isfinite().all()


@pytest.mark.parametrize(("mistake", "message"), [
    (lambda: StandardGaussian(0), "StandardGaussian expected `latent_dim` to be an integer >= 1, "
                                  "got 0."),
    (lambda: FlowPrior("2"), "FlowPrior expected `latent_dim` to be an integer >= 1, got '2'."),
    (lambda: VampPrior(2, torch.empty(0, 4)), "VampPrior expected `pseudo_inputs` to be a tensor "
                                              "(K, *event_shape), got an empty one. Take some of "
                                              "the data: x[:100]."),
    (lambda: VampPrior(2, 100), "VampPrior expected `pseudo_inputs` to be a tensor "
                                "(K, *event_shape), got int. Take some of the data: x[:100]."),
    (lambda: VAE(Gaussian((4,)), 2, prior=VampPrior(2, torch.randn(3, 5))),
     "VAE expected `pseudo_inputs` of its prior to be of shape (K, 4), got (3, 5). Take some of "
     "the data: x[:100]."),
], ids=["standard", "flow", "empty", "number", "shape"])
def test_a_mistake_is_named(mistake, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake()


def test_a_prior_of_ones_own_needs_one_method():
    class Wide(Prior):
        def forward(self, encode):
            return pyro.distributions.Normal(torch.zeros(self.latent_dim), 3.0).to_event(1)
    vae = VAE(Gaussian((4,)), 2, prior=Wide(2))
    assert vae.elbo(torch.randn(5, 4)).shape == (5,)
    assert vae.generate(1000).shape == (1000, 4)


def test_a_flow_prior_asks_for_a_recipe():
    with pytest.raises(ValueError, match="FlowPrior expected `recipe` to be a function, got int"):
        FlowPrior(2, 0)
