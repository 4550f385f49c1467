"""What a VAE is worth: exact likelihoods, latents in use, gaps, ArviZ."""

from __future__ import annotations

import importlib.util
import math
import re

import arviz
import numpy as np
import pytest
import torch

from pyro_nfvi import _arviz
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    DiagonalGaussian,
    FlowPosterior,
    FullGaussian,
    Gaussian,
    LogLikelihood,
    MLPEncoder,
    VampPrior,
    bits_per_dim,
)
from pyro_nfvi.vae import evaluate as module
from tests.vae.parts import exact_vae, linear_gaussian, log_evidence, set_gaussian

NEW = all(importlib.util.find_spec(name) for name in ("arviz_base", "arviz_stats"))
OLD = arviz.__version__.startswith("0.")


# ------------------------------------------------------------------ log-likelihood

@pytest.mark.parametrize("posterior", [FullGaussian, DiagonalGaussian, FlowPosterior],
                         ids=lambda kind: kind.__name__)
def test_the_log_likelihood_of_a_linear_gaussian_vae_is_the_exact_one(posterior):
    weights, shift, x = linear_gaussian(30)
    vae = exact_vae(0.5 * weights, shift, posterior)
    estimate = vae.log_likelihood(x, num_samples=2000)
    exact = log_evidence(0.5 * weights, shift, x)
    if posterior is FullGaussian:  # every weight is the same
        torch.testing.assert_close(estimate.values, exact.double(), rtol=0, atol=1e-4)
        assert (estimate.standard_errors < 1e-5).all()
        return
    score = (estimate.values - exact) / estimate.standard_errors
    assert (score.abs() < 4).all()
    assert abs(estimate.mean - exact.mean().item()) < 4 * estimate.standard_error
    elbo = vae.elbo(x, num_particles=200)
    assert elbo.mean() < estimate.mean + 4 * estimate.standard_error


def test_the_log_likelihood_of_what_was_seen_is_the_marginal():
    weights, shift, x = linear_gaussian(20)
    vae = exact_vae(0.5 * weights, shift, DiagonalGaussian)
    with torch.no_grad():
        vae.encoder.weight.zero_()
        vae.encoder.bias.zero_()
    set_gaussian(vae.posterior, torch.eye(2))  # wide enough, whatever is seen
    mask = torch.zeros(20, 5, dtype=torch.bool)
    mask[:, [0, 3]] = True
    estimate = vae.log_likelihood(x, mask, num_samples=4000)
    exact = log_evidence(0.5 * weights, shift, x, [0, 3])
    assert abs(estimate.mean - exact.mean().item()) < 4 * estimate.standard_error
    assert estimate.num_dims == 2
    assert estimate.bits_per_dim == pytest.approx(-estimate.mean / 2 / math.log(2))


def test_the_standard_error_is_that_of_repeated_estimates():
    weights, shift, x = linear_gaussian(1)
    vae = exact_vae(0.3 * weights, shift, DiagonalGaussian)
    estimates = [vae.log_likelihood(x, num_samples=300) for _ in range(100)]
    spread = torch.stack([e.values for e in estimates]).std().item()
    told = np.mean([e.standard_error for e in estimates])
    assert told == pytest.approx(spread, rel=0.3)  # four times the error of a spread of 100


def test_data_in_several_batches_are_all_there(monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 7)
    weights, shift, x = linear_gaussian(30)
    vae = exact_vae(weights, shift)
    mask = torch.rand(30, 5) > 0.3
    mask[:, 0] = True
    torch.testing.assert_close(vae.log_likelihood(x, num_samples=2).values,
                               log_evidence(weights, shift, x).double(), rtol=0, atol=1e-4)
    assert vae.latents(x, mask, num_samples=3).shape == (3, 30, 2)
    assert vae.reconstruct(x, mask).shape == (30, 5)
    assert vae.elbo(x, mask).shape == (30,)
    assert vae.amortization_gap(x, num_steps=2).gaps.shape == (30,)
    assert vae.to_arviz(x, mask, num_samples=4)["posterior_predictive"]["x"].shape == (1, 4, 30, 5)
    torch.testing.assert_close(vae.reconstruct(x)[8:10], vae.reconstruct(x[8:10]))


def test_an_estimate_prints_as_one_line():
    value = LogLikelihood(torch.tensor([-3.0, -5.0]), torch.tensor([0.3, 0.4]), 4)
    assert value.mean == -4
    assert value.standard_error == pytest.approx(0.25)
    assert repr(value) == (f"LogLikelihood(-4.000 +- 0.250 nats a datum, {1 / math.log(2):.4f} "
                           "bits a dimension, 2 data)")


def test_bits_of_fair_coins_are_one():
    assert bits_per_dim(-8 * math.log(2), 8) == pytest.approx(1.0)
    vae = VAE(Bernoulli((8,)), 2)
    with torch.no_grad():
        vae.decoder.output.weight.zero_()
        vae.decoder.output.bias.zero_()
    x = torch.rand(20, 8).round()
    assert vae.log_likelihood(x, num_samples=500).bits_per_dim == pytest.approx(1.0, abs=0.01)


# ------------------------------------------------------------------ latents in use

def hand_made():
    """Four latents: in use, one whose mean moves too little, noise, and a constant."""
    encoder = torch.nn.Linear(3, 3, bias=False)
    vae = VAE(Gaussian((3,)), 4, encoder=encoder)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(3))
        vae.posterior.scale.weight.zero_()
        vae.posterior.scale.bias.copy_(torch.tensor([0.0, -3.0, 2.0, -8.0]))
        vae.posterior.loc.weight.zero_()
        vae.posterior.loc.bias.copy_(torch.tensor([0.0, 0, 0, 5]))
        vae.posterior.loc.weight[0, 0] = 1.0
        vae.posterior.loc.weight[1, 1] = 0.05
    return vae


def test_active_units_are_those_whose_mean_depends_on_the_data():
    assert hand_made().active_units(torch.randn(400, 3)).tolist() == [True, False, False, False]


def test_active_units_of_a_flow_are_found_too():
    vae = VAE(Gaussian((3,)), 2, encoder=torch.nn.Linear(3, 3, bias=False),
              posterior=FlowPosterior)
    x, units = torch.randn(400, 3), vae.posterior.flow.bijection.units
    with torch.no_grad():
        units.weight.zero_()
    assert vae.active_units(x).tolist() == [False, False]
    with torch.no_grad():
        units.weight[1, 0] = 1.0
    assert vae.active_units(x).tolist() == [False, True]


# ------------------------------------------------------------------ amortization gap

def test_an_exact_encoder_has_no_gap():
    weights, shift, x = linear_gaussian(20)
    gap = exact_vae(0.5 * weights, shift).amortization_gap(x, seed=0)
    torch.testing.assert_close(gap.amortized, log_evidence(0.5 * weights, shift, x),
                               rtol=0, atol=0.3)  # by 256 draws of the fit
    assert (gap.gaps >= 0).all()
    assert gap.mean < 0.01


def test_the_gap_of_a_spoiled_encoder_is_what_the_exact_posterior_has_more():
    weights, shift, x = linear_gaussian(20)
    weights = 0.5 * weights
    vae = exact_vae(weights, shift)
    with torch.no_grad():
        vae.encoder.weight.mul_(0.3)
    exact = log_evidence(weights, shift, x)
    gap = vae.amortization_gap(x, num_steps=400, lr=0.05, seed=0)
    lost = (exact - vae.elbo(x, num_particles=2000)).mean().item()
    assert lost > 0.5
    assert gap.mean == pytest.approx(lost, rel=0.05)
    # On the same noise before and after, but not at the exact ELBO
    assert abs((gap.optimized - exact).mean()) < 0.1
    assert re.fullmatch(r"AmortizationGap\(\d+\.\d{3} \+- \d\.\d{3} nats a datum, 20 data\)",
                        repr(gap))


def test_the_gap_leaves_the_vae_and_the_random_state_alone():
    weights, shift, x = linear_gaussian(10)
    vae = exact_vae(weights, shift)
    before = [p.clone() for p in vae.parameters()]
    state = torch.get_rng_state()
    one = vae.amortization_gap(x, num_steps=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    other = vae.amortization_gap(x, num_steps=5, seed=1)
    assert torch.equal(one.optimized, other.optimized)
    for parameter, value in zip(vae.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_the_gap_of_an_encoder_that_says_the_same_of_all_data_is_found():
    weights, shift, x = linear_gaussian(10)
    vae = exact_vae(weights, shift)
    with torch.no_grad():
        vae.encoder.weight.zero_()
        vae.encoder.bias.zero_()
    assert vae.amortization_gap(x, num_steps=300, lr=0.05, seed=0).mean > 1


# ------------------------------------------------------------------ ArviZ

@pytest.fixture(params=[
    pytest.param("legacy", id="arviz-0.x",
                 marks=pytest.mark.skipif(not OLD, reason="ArviZ 0.x is not installed")),
    pytest.param("parts", id="arviz-1.x",
                 marks=pytest.mark.skipif(not NEW, reason="ArviZ 1.x is not installed"))])
def _api(request, monkeypatch):
    made = _arviz._legacy(arviz) if request.param == "legacy" else _arviz._parts()
    monkeypatch.setattr(_arviz, "_api", lambda: made)


@pytest.mark.usefixtures("_api")
def test_draws_go_to_arviz_with_dimensions_coordinates_and_gaps():
    vae = VAE(Bernoulli((2, 3)), 2, encoder=MLPEncoder((2, 3), masked=True))
    x = torch.rand(7, 2, 3).round()
    mask = torch.rand(7, 2, 3) > 0.3
    mask[:, 0, 0] = True
    idata = vae.to_arviz(x, mask, num_samples=5, coords={"data": list("abcdefg")})
    assert idata["posterior"]["z"].dims == ("chain", "draw", "data", "latent")
    assert idata["posterior"]["z"].shape == (1, 5, 7, 2)
    assert idata["posterior"]["data"].values.tolist() == list("abcdefg")
    drawn = idata["posterior_predictive"]["x"]
    assert drawn.dims == ("chain", "draw", "data", "x_dim_0", "x_dim_1")
    assert set(np.unique(drawn.values)) == {0, 1}
    observed = idata["observed_data"]["x"]
    assert observed.dims == ("data", "x_dim_0", "x_dim_1")
    assert np.array_equal(np.isnan(observed.values), ~mask.numpy())
    assert np.array_equal(observed.values[mask.numpy()], x[mask].numpy())
    fit = idata["log_likelihood"]["x"]
    assert fit.dims == ("chain", "draw", "data")
    z = torch.as_tensor(idata["posterior"]["z"].values)[0]
    with torch.no_grad():
        logits = vae.decoder(z).squeeze(-3)
    expected = torch.where(mask, x * logits - torch.nn.functional.softplus(logits), 0).sum((-1, -2))
    torch.testing.assert_close(torch.as_tensor(fit.values)[0], expected)


def test_data_of_single_numbers_go_to_arviz():
    vae = VAE(Gaussian(()), 2, encoder=MLPEncoder((), (8,)))
    idata = vae.to_arviz(torch.randn(6), torch.arange(6) < 6, num_samples=5)
    assert idata["posterior_predictive"]["x"].shape == (1, 5, 6)


# ------------------------------------------------------------------ modes

def test_looking_at_a_vae_is_without_dropout_and_changes_no_mode():
    encoder = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16),
                                  torch.nn.Dropout(0.5))
    vae = VAE(Gaussian((4,)), 2, encoder=encoder, prior=VampPrior(2, torch.randn(3, 4)))
    x = torch.randn(10, 4)
    encoder[2].eval()  # one that its owner has frozen
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))
    torch.testing.assert_close(vae.reconstruct(x)[:1], vae.reconstruct(x[:1]))
    for look in (vae.elbo, vae.latents, vae.active_units, vae.to_arviz,
                 lambda x: vae.amortization_gap(x, num_steps=2),
                 lambda x: vae.log_likelihood(x, num_samples=2)):
        look(x)
    vae.generate(3)
    assert [m.training for m in (vae, encoder, encoder[1], encoder[2])] == [True] * 3 + [False]
    for name, value in vae.state_dict().items():
        assert torch.equal(value, state[name]), name


# ------------------------------------------------------------------ mistakes

@pytest.mark.parametrize(("mistake", "message"), [
    (lambda vae, x: vae.log_likelihood(x, num_samples=1),
     "VAE.log_likelihood expected `num_samples` to be an integer >= 2, got 1."),
    (lambda vae, x: vae.active_units(x[:1]),
     "VAE.active_units expected at least two data, got one."),
    (lambda vae, x: vae.to_arviz(x, num_samples=0),
     "VAE.to_arviz expected `num_samples` to be an integer >= 1, got 0."),
    (lambda vae, x: vae.amortization_gap(x, num_steps=0),
     "amortization_gap expected `num_steps` to be an integer >= 1, got 0."),
    (lambda vae, x: vae.amortization_gap(x, lr=-1),
     "amortization_gap expected `lr` to be a positive number, got -1."),
    (lambda vae, x: vae.amortization_gap(x, num_particles=2.0),
     "amortization_gap expected `num_particles` to be an integer >= 1, got 2.0."),
    (lambda vae, x: vae.log_likelihood(x.numpy()),
     "VAE expected `x` to be a tensor of shape (num_data, 4), got ndarray. Convert it: "
     "torch.as_tensor(x)."),
], ids=["log_likelihood", "active_units", "to_arviz", "steps", "lr", "particles", "array"])
def test_a_mistake_is_named(mistake, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake(VAE(Gaussian((4,)), 2), torch.randn(5, 4))


def test_a_gaussian_set_by_hand_has_the_covariance_it_was_given():
    posterior = FullGaussian(2, 2)
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]])
    set_gaussian(posterior, covariance)
    torch.testing.assert_close(posterior(torch.zeros(2)).covariance_matrix, covariance,
                               rtol=1e-4, atol=1e-4)
