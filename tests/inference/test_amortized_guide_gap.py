"""The amortization gap of a guide: none where the encoder is exact, all of it where it is blind."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_nfvi import AutoAmortizedFlow
from pyro_nfvi.flows import Identity
from pyro_nfvi.guides import AutoFlow, AutoGaussian
from pyro_nfvi.inference import CompiledTrace_ELBO, amortization_gap

NUM_ROWS = 20


def model(x, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", x.shape[0], subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])


def trained(x):
    """A guide that can be exact, fitted."""
    guide = AutoAmortizedFlow(model, nn.Linear(1, 2), Identity, global_guide=AutoGaussian)
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}),
                         CompiledTrace_ELBO(8))
    for _ in range(600):
        svi.step(x)
    return guide


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    x = 2 + torch.randn(NUM_ROWS, 1)
    return trained(x), x


def test_an_exact_encoder_has_no_gap(fitted):
    guide, x = fitted
    gap = amortization_gap(guide, x, seed=0)
    assert gap.gaps.shape == (NUM_ROWS,)
    assert (gap.gaps >= 0).all()
    assert gap.mean < 0.02


def test_the_terms_of_the_elements_and_the_globals_are_the_elbo(fitted):
    guide, x = fitted
    log_evidence = dist.MultivariateNormal(  # tight at an exact guide
        torch.zeros(NUM_ROWS), 1.25 * torch.eye(NUM_ROWS) + 4.0).log_prob(x[:, 0])
    elements = amortization_gap(guide, x, seed=0).amortized.sum()
    draws = guide.sample_posterior(4000, x)["mu"]
    prior, posterior = dist.Normal(0.0, 2.0), guide.global_guide.log_prob({"mu": draws})
    of_globals = prior.log_prob(draws) - posterior
    error = 4.5 * of_globals.std() / 4000**0.5 + 0.2
    assert abs(elements + of_globals.mean() - log_evidence) < error


def test_a_blind_encoder_loses_what_its_own_features_win_back(fitted):
    guide, x = fitted
    best = amortization_gap(guide, x, seed=0)
    weight = guide.encoder.weight.detach().clone()
    with torch.no_grad():
        guide.encoder.weight.zero_()
    blind = amortization_gap(guide, x, seed=0, num_steps=400, lr=0.1)
    with torch.no_grad():
        guide.encoder.weight.copy_(weight)
    assert blind.mean > 4 * blind.standard_error > 0
    assert blind.mean > 0.1
    assert (blind.optimized - best.amortized).mean().abs() < 0.05


def narrow(x):
    """The same model, with no room for a dimension of particles."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", x.shape[0]):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.sample("x", dist.Normal(z.reshape(NUM_ROWS), 1.0), obs=x[:, 0])


def test_a_model_without_room_for_particles_is_run_draw_by_draw(fitted):
    guide, x = fitted
    wide = amortization_gap(guide, x, seed=0, num_steps=2)
    blocked = AutoAmortizedFlow(narrow, nn.Linear(1, 2), Identity, global_guide=AutoGaussian)
    blocked.setup(x).load_state_dict(guide.state_dict())
    gap = amortization_gap(blocked, x, seed=0, num_steps=2, num_particles=2)
    error = 4.5 * 0.8 / 256**0.5  # of the ELBO of an element, whose terms have a spread of one
    assert (gap.amortized.mean() - wide.amortized.mean()).abs() < error


def test_the_guide_is_left_as_it_was(fitted):
    guide, x = fitted
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    state = torch.get_rng_state()
    amortization_gap(guide, x, seed=0, num_steps=3)
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.given_features is None


def test_minibatches_and_other_guides_are_refused(fitted):
    guide, x = fitted
    with pytest.raises(ValueError, match="draws minibatches. Set its subsample_size"):
        amortization_gap(guide, x, 5)
    with pytest.raises(ValueError, match="expected `guide` to be an AutoAmortizedFlow, got Auto"):
        amortization_gap(AutoFlow(model), x)
