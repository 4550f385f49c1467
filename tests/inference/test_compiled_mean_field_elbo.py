"""CompiledTraceMeanField_ELBO: Pyro's TraceMeanField_ELBO, faster, with the same numbers."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyro_nfvi import AutoPlanar, CompiledTrace_ELBO, CompiledTraceMeanField_ELBO, planar
from pyro_nfvi.vae import VAE, Bernoulli, DiagonalGaussian, FlowPosterior, FullGaussian

POSTERIORS = {"diagonal": DiagonalGaussian, "full": FullGaussian,
              "planar": partial(FlowPosterior, recipe=planar, num_layers=2)}
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


def steps(model, guide, loss, *args, num_steps=12):
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss=loss)
    return torch.tensor([svi.step(*args) for _ in range(num_steps)], dtype=torch.float64)


def of_vae(posterior, loss):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = VAE(Bernoulli((6,)), 2, posterior=posterior)
    x = torch.rand(20, 6).round()
    mask = torch.rand(20, 6) < 0.8
    return steps(vae.model, vae.guide, loss, x, mask, torch.tensor(0.7))


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("tier", ["auto", "fx"])
def test_a_vae_trains_as_with_pyros_step_by_step(name, tier):
    elbo = CompiledTraceMeanField_ELBO(compile=tier)
    ours = of_vae(POSTERIORS[name], elbo)
    theirs = of_vae(POSTERIORS[name], TraceMeanField_ELBO())
    assert elbo.tier == {"auto": "c"}.get(tier, tier), elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def positive(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(mu, tau + 10), obs=y)


@pytest.mark.parametrize("guide", [AutoNormal, AutoPlanar], ids=lambda g: g.__name__)
def test_a_guide_trains_as_with_pyros_step_by_step(guide):
    values = []
    for elbo in (CompiledTraceMeanField_ELBO(), TraceMeanField_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        values.append(steps(positive, guide(positive), elbo, Y))
    assert (values[0] - values[1]).abs().max() < 1e-4 * values[1].abs().max()


def test_closed_forms_leave_less_noise_than_draws():
    spread = {}
    for kind in (CompiledTrace_ELBO, CompiledTraceMeanField_ELBO):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = VAE(Bernoulli((6,)), 8)
        svi = SVI(vae.model, vae.guide, Adam({"lr": 0.0}), loss=kind())
        spread[kind] = torch.tensor([svi.step(torch.ones(20, 6)) for _ in range(60)][2:]).std()
    assert spread[CompiledTraceMeanField_ELBO] < spread[CompiledTrace_ELBO]


def test_particles_have_the_same_mean():
    pyro.set_rng_seed(0)
    vae = VAE(Bernoulli((6,)), 2)
    x = torch.rand(20, 6).round()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.0}), loss=CompiledTraceMeanField_ELBO(16))
    ours = torch.tensor([svi.step(x) for _ in range(60)][2:])
    pyros = TraceMeanField_ELBO()
    theirs = torch.tensor([pyros.loss(vae.model, vae.guide, x) for _ in range(400)])
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)) ** 0.5
    assert (ours.mean() - theirs.mean()).abs() < 4.5 * error
