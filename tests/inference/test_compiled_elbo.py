"""CompiledTrace_ELBO: Pyro's Trace_ELBO, faster, with the same numbers."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_nfvi import AutoIAF, AutoPlanar, AutoSpline, CompiledTrace_ELBO
from pyro_nfvi.vae import VAE, Bernoulli

SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal,
          AutoDelta, AutoPlanar, AutoIAF, AutoSpline]


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def losses(model, guide_of, loss, args=(SIGMA, Y), num_steps=20):
    """Losses of a few SVI steps, from the same start and the same random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide_of(model), Adam({"lr": 0.02}), loss=loss)
    values = [svi.step(*args) for _ in range(num_steps)]
    return torch.tensor(values, dtype=torch.float64), torch.get_rng_state()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: g.__name__)
def test_every_guide_trains_as_with_trace_elbo_step_by_step(guide):
    elbo = CompiledTrace_ELBO()
    ours, state = losses(schools, guide, elbo)
    theirs, their_state = losses(schools, guide, Trace_ELBO())
    assert elbo.tier == "c", elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(state, their_state)  # building and checking left no trace


def test_double_precision_agrees_to_rounding():
    args = SIGMA.double(), Y.double()
    torch.set_default_dtype(torch.float64)
    try:
        ours, _ = losses(schools, AutoMultivariateNormal, CompiledTrace_ELBO(), args)
        theirs, _ = losses(schools, AutoMultivariateNormal, Trace_ELBO(), args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("tier", ["c", "fx", "eager"])
def test_a_tier_may_be_chosen(tier):
    elbo = CompiledTrace_ELBO(compile=tier)
    ours, _ = losses(schools, AutoNormal, elbo)
    theirs, _ = losses(schools, AutoNormal, Trace_ELBO())
    assert elbo.tier == tier
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_an_unknown_tier_is_refused():
    with pytest.raises(ValueError, match=r"CompiledTrace_ELBO expected `compile` .* 'fast'"):
        CompiledTrace_ELBO(compile="fast")


def test_the_mean_over_particles_has_the_mean_of_single_ones():
    elbo = CompiledTrace_ELBO(num_particles=64)
    pyro.set_rng_seed(2)
    guide = AutoNormal(schools)
    svi = SVI(schools, guide, Adam({"lr": 0.0}), loss=elbo)
    ours = torch.tensor([svi.step(SIGMA, Y) for _ in range(62)][2:])
    single = torch.tensor([Trace_ELBO().loss(schools, guide, SIGMA, Y) for _ in range(800)])
    assert elbo.tier == "c", elbo.reason
    error = math.hypot(ours.std() / len(ours) ** 0.5, single.std() / len(single) ** 0.5)
    assert abs(ours.mean() - single.mean()) < 4 * error
    # 64 particles are independent: a 64th of the variance, whose own error is some 20 %
    assert 0.5 < 64 * ours.var() / single.var() < 2


def test_particles_may_be_vectorized_as_in_pyro():
    elbo = CompiledTrace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    plain = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    ours, _ = losses(schools, AutoNormal, elbo)
    theirs, _ = losses(schools, AutoNormal, plain)
    assert elbo.tier == "c", elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_data_may_change_from_step_to_step():
    pyro.set_rng_seed(0)
    guide, elbo, plain = AutoNormal(schools), CompiledTrace_ELBO(), Trace_ELBO()
    guide(SIGMA, Y)
    for shift in (0.0, 1.0, -3.0, 10.0):
        rng = torch.get_rng_state()
        expected = plain.loss_and_grads(schools, guide, SIGMA, Y + shift)
        torch.set_rng_state(rng)
        assert elbo.loss_and_grads(schools, guide, SIGMA, Y + shift) \
            == pytest.approx(expected, rel=1e-5)
    assert elbo.tier == "c"


def test_minibatches_are_drawn_anew_each_step():
    data = torch.linspace(-3, 9, 50)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 50, subsample_size=7) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data[index])
    elbo = CompiledTrace_ELBO()
    ours, state = losses(model, AutoNormal, elbo, ())
    theirs, their_state = losses(model, AutoNormal, Trace_ELBO(), ())
    assert elbo.tier == "c", elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(state, their_state)


def test_parameters_of_the_model_are_learned_too():
    def model(y):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)
    ours, _ = losses(model, AutoNormal, CompiledTrace_ELBO(), (Y,))
    learned = pyro.param("scale").item()
    theirs, _ = losses(model, AutoNormal, Trace_ELBO(), (Y,))
    assert learned != 3.0
    assert learned == pytest.approx(pyro.param("scale").item(), rel=1e-5)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_guide_written_by_hand_works():
    def guide_of(_):
        def guide(sigma, y):
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("mu", dist.Normal(loc[0], 1.0))
            pyro.sample("tau", dist.LogNormal(loc[1], 0.5))
            with pyro.plate("school", len(y)):
                pyro.sample("theta", dist.Normal(pyro.param("t", torch.zeros(8)), 1.0))
        return guide
    elbo = CompiledTrace_ELBO()
    ours, _ = losses(schools, guide_of, elbo)
    theirs, _ = losses(schools, guide_of, Trace_ELBO())
    assert elbo.tier == "c", elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_guide_of_parts_works():
    def guide_of(model):
        guide = AutoGuideList(model)
        guide.append(AutoDiagonalNormal(pyro.poutine.block(model, expose=["mu", "tau"])))
        guide.append(AutoIAF(pyro.poutine.block(model, expose=["theta"])))
        return guide
    elbo = CompiledTrace_ELBO()
    ours, _ = losses(schools, guide_of, elbo)
    theirs, _ = losses(schools, guide_of, Trace_ELBO())
    assert elbo.tier == "c", elbo.reason
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def coin(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def beta_guide(_):
    def guide(y):
        pyro.sample("p", dist.Beta(*pyro.param("ab", torch.tensor([3.0, 4.0]),
                                               constraint=constraints.positive)))
    return guide


def test_a_sampler_that_depends_on_parameters_runs_as_pyro_runs_it_and_says_why():
    y, elbo = torch.tensor([1.0, 0, 1, 1]), CompiledTrace_ELBO()
    ours, _ = losses(coin, beta_guide, elbo, (y,))
    theirs, _ = losses(coin, beta_guide, Trace_ELBO(), (y,))
    assert elbo.tier == "eager"
    assert "random numbers whose distribution depends" in elbo.reason
    assert torch.equal(ours, theirs)


def test_a_model_that_is_not_torch_s_alone_runs_as_pyro_runs_it_and_says_why():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(100 * random.random(), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
    elbo = CompiledTrace_ELBO()
    losses(model, AutoNormal, elbo, (Y,))
    assert elbo.tier == "eager"
    assert "Python state" in elbo.reason


def test_a_model_that_changes_later_is_found_out():
    strength = [1.0]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.poutine.scale(scale=strength[0]):
            pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
    elbo = CompiledTrace_ELBO()
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), loss=elbo)
    for _ in range(3):
        svi.step(Y)
    strength[0] = 10.0
    with pytest.warns(UserWarning, match="the model changed since it was compiled"):
        _ = [svi.step(Y) for _ in range(20)]
    assert elbo.tier == "eager"


def test_numbers_that_change_every_step_end_the_recording_and_it_says_why():
    def model(y, strength):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.poutine.scale(scale=strength):
            pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
    elbo = CompiledTrace_ELBO(compile="fx")
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), loss=elbo)
    for step in range(12):
        svi.step(Y, 0.1 + step)
    assert elbo.tier == "eager"
    assert "should be a tensor" in elbo.reason


def test_errors_of_the_model_are_pyro_s_own():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, -1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    for loss in (Trace_ELBO(), CompiledTrace_ELBO()):
        pyro.clear_param_store()
        with pytest.raises(ValueError, match="Expected parameter scale"):
            SVI(model, AutoNormal(model), Adam({"lr": 0.01}), loss=loss).step(Y)


def test_a_loss_that_is_nan_warns_as_in_pyro():
    elbo = CompiledTrace_ELBO()
    svi = SVI(schools, AutoNormal(schools), Adam({"lr": 0.01}), loss=elbo)
    svi.step(SIGMA, Y)
    svi.step(SIGMA, Y)
    pyro.enable_validation(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(SIGMA, Y * float("nan"))
    assert any("nan" in str(w.message).lower() for w in caught)


# ------------------------------------------------------------------ what may change unseen

def groups(y, index):
    with pyro.plate("group", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(level[index], 1.0), obs=y)


def test_an_index_out_of_range_is_pyro_s_error_not_a_wild_read():
    elbo = CompiledTrace_ELBO()
    svi = SVI(groups, AutoNormal(groups), Adam({"lr": 0.01}), loss=elbo)
    index = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for _ in range(3):
        svi.step(Y, index)
    assert elbo.tier == "c", elbo.reason
    with pytest.raises(IndexError):
        svi.step(Y, index + 500_000_000)


def test_an_argument_with_contents_runs_as_pyro_runs_it_and_says_why():
    def model(box):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand((3,)).to_event(1),
                    obs=torch.as_tensor(box))
    box, elbo, plain = np.zeros(3, dtype="float32"), CompiledTrace_ELBO(), Trace_ELBO()
    guide = AutoNormal(model)
    guide(box)
    for value in (1.0, 5.0, 20.0):
        box[:] = value
        rng = torch.get_rng_state()
        expected = plain.loss(model, guide, box)
        torch.set_rng_state(rng)
        assert elbo.loss_and_grads(model, guide, box) == pytest.approx(expected, rel=1e-5)
    assert elbo.tier == "eager"
    assert "ndarray" in elbo.reason


def test_a_cleared_param_store_starts_anew():
    elbo, guide = CompiledTrace_ELBO(), AutoNormal(schools)
    svi = SVI(schools, guide, Adam({"lr": 0.01}), loss=elbo)
    for _ in range(3):
        svi.step(SIGMA, Y)
    pyro.clear_param_store()
    for _ in range(4):
        assert math.isfinite(svi.step(SIGMA, Y))


def test_gradients_outside_the_param_store_are_not_lost():
    elbo = CompiledTrace_ELBO()
    guide = AutoNormal(schools)
    guide(SIGMA, Y)
    sigma = SIGMA.clone().requires_grad_()
    for _ in range(3):
        sigma.grad = None
        elbo.loss_and_grads(schools, guide, sigma, Y)
        assert sigma.grad is not None
    assert elbo.reason == "an argument requires a gradient"


def test_a_guide_with_a_network_of_its_own_still_trains():
    net = torch.nn.Linear(2, 1)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(mu, pyro.param("s", torch.tensor(1.0))).to_event(2),
                    obs=torch.ones(3, 1))

    def guide(x):
        pyro.sample("mu", dist.Normal(net(x), 1.0).to_event(2))
    elbo, x = CompiledTrace_ELBO(), torch.randn(3, 2)
    for _ in range(3):
        net.zero_grad()
        elbo.loss_and_grads(model, guide, x)
        assert net.weight.grad is not None
    assert "not in the param store" in elbo.reason


def test_two_models_may_share_one_loss():
    shared = CompiledTrace_ELBO()

    def shifted(sigma, y):
        schools(sigma, y + 5)
    for model in (schools, shifted):
        ours, _ = losses(model, AutoNormal, shared)
        theirs, _ = losses(model, AutoNormal, Trace_ELBO())
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert shared.tier == "c", shared.reason


def test_a_used_loss_copies_and_pickles():
    elbo = CompiledTrace_ELBO(num_particles=2)
    svi = SVI(schools, AutoNormal(schools), Adam({"lr": 0.01}), loss=elbo)
    for _ in range(3):
        svi.step(SIGMA, Y)
    for again in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert again.num_particles == 2
        assert math.isfinite(again.loss_and_grads(schools, svi.guide, SIGMA, Y))


PRIOR = dist.Normal(0.0, 1.0).expand([3]).to_event(1)


def test_a_prior_made_outside_the_model_compiles():
    def model(y):
        w = pyro.sample("w", PRIOR)
        pyro.sample("y", dist.Normal(w.sum(), 1.0).expand(y.shape).to_event(1), obs=y)
    elbo = CompiledTrace_ELBO()
    losses(model, AutoNormal, elbo, (Y,))
    assert elbo.tier == "c", elbo.reason


def of_a_net():
    """A model and a guide that share a network, as methods of a module."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = VAE(Bernoulli((6,)), 2, encoder=torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(0.5)))
    elbo = CompiledTrace_ELBO()
    return vae, elbo, SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=elbo)


def test_parameters_frozen_on_the_way_stay_as_they_are():
    vae, elbo, svi = of_a_net()
    x = torch.rand(20, 6).round()
    for _ in range(4):
        svi.step(x)
    vae.decoder.requires_grad_(False)
    before = [p.clone() for p in vae.decoder.parameters()]
    for _ in range(12):
        svi.step(x)
    assert elbo.tier == "c", elbo.reason
    assert all(map(torch.equal, vae.decoder.parameters(), before))


def test_parameters_thawed_on_the_way_are_found_at_the_next_check():
    vae, _, svi = of_a_net()
    x = torch.rand(20, 6).round()
    vae.decoder.requires_grad_(False)
    svi.step(x)
    svi.step(x)
    vae.decoder.requires_grad_(True)
    before = [p.clone() for p in vae.decoder.parameters()]
    with pytest.warns(UserWarning, match="other parameters are to be learned"):
        _ = [svi.step(x) for _ in range(10)]
    assert not any(map(torch.equal, vae.decoder.parameters(), before))


def test_a_module_put_into_another_mode_is_recorded_anew():
    vae, elbo, svi = of_a_net()
    x = torch.rand(20, 6).round()
    for _ in range(4):
        svi.step(x)
    vae.eval()
    for _ in range(12):
        svi.step(x)
    assert elbo.tier == "c", elbo.reason
    pyro.set_rng_seed(3)
    ours = svi.step(x)
    pyro.set_rng_seed(3)
    theirs = Trace_ELBO().loss(vae.model, vae.guide, x)
    assert abs(ours - theirs) < 0.05 * abs(theirs)  # one step apart, but no unit dropped


def test_several_particles_of_a_guide_without_noise_are_one():
    def model():
        pyro.sample("x", dist.Normal(1.0, 2.0))
    pyro.clear_param_store()
    guide = AutoDelta(model)
    guide()
    losses = [elbo(num_particles=4).loss_and_grads(model, guide)
              for elbo in (Trace_ELBO, CompiledTrace_ELBO)]
    assert losses[0] == pytest.approx(losses[1])
