"""AutoPathfinder: a Gaussian posterior at the first call, and one clear error."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_nfvi import NFVI, AutoPathfinder
from pyro_nfvi.flows import FixedLinear, FixedLowRank, Identity, Triangular
from pyro_nfvi.inference import auto_pathfinder

DOUBLE = torch.float64
MEAN = torch.tensor([1.0, -50.0, 3.0], dtype=DOUBLE)
COVARIANCE = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=DOUBLE)
Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9], dtype=DOUBLE)


def gaussian():
    pyro.sample("w", dist.MultivariateNormal(MEAN, COVARIANCE))


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def found(guide):
    frame = guide._flow().bijection.layers[-1]
    return MultivariateNormal(frame.shift, scale_tril=frame.lower)


def test_match_is_true_or_false():
    with pytest.raises(ValueError, match="AutoPathfinder expected `match` to be True or False"):
        AutoPathfinder(gaussian, match=torch.ones(2, 2))


def test_a_gaussian_posterior_is_near_at_the_first_call():
    divergence = kl_divergence(found(AutoPathfinder(gaussian).setup()),
                               MultivariateNormal(MEAN, COVARIANCE))
    assert divergence < 0.1


def test_with_batch_and_match_a_gaussian_posterior_is_exact():
    pyro.set_rng_seed(1)
    guide = AutoPathfinder(gaussian, match=True).setup()
    torch.testing.assert_close(found(guide).covariance_matrix, COVARIANCE, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found(guide).loc, MEAN, rtol=1e-6, atol=1e-6)
    draws = guide.sample_posterior(4000)["w"]
    assert ((draws.mean(0) - MEAN).abs() < 5 * (COVARIANCE.diagonal() / 4000).sqrt()).all()


def test_the_guide_is_a_fixed_gaussian_under_an_affine_map_that_trains():
    guide = AutoPathfinder(conjugate).setup(Y)
    kinds = [type(layer) for layer in guide._flow().bijection.layers]
    assert kinds == [Identity, Triangular, FixedLinear]
    before = guide.median()["mu"].item()
    svi = SVI(conjugate, guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(Y) for _ in range(20)]
    assert torch.tensor(losses).isfinite().all()
    assert guide.median()["mu"].item() != before
    assert guide.median()["mu"].item() == pytest.approx(Y.sum().item() / 6, abs=0.4)


def test_many_latents_get_a_low_rank_covariance(monkeypatch):
    start = auto_pathfinder.gaussian_start
    monkeypatch.setattr(auto_pathfinder, "gaussian_start",
                        lambda *args, **kwargs: start(*args, **kwargs, max_full=2))
    guide = AutoPathfinder(gaussian).setup()
    frame = guide._flow().bijection.layers[-1]
    assert type(frame) is FixedLowRank
    factor = frame.factor()
    divergence = kl_divergence(
        MultivariateNormal(frame.shift, factor @ factor.mT), MultivariateNormal(MEAN, COVARIANCE))
    assert divergence < 0.1


def test_init_loc_fn_is_a_start_and_not_what_the_model_draws():
    seen = []

    def model(y):
        seen.append(pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(seen[-1], 1.0), obs=y)
    values = {"mu": torch.tensor(300.0, dtype=DOUBLE)}
    guide = AutoPathfinder(model, init_loc_fn=init_to_value(values=values)).setup(Y)
    assert guide.median()["mu"].item() == pytest.approx(Y.sum().item() / 6, abs=0.3)
    assert sum(mu is values["mu"] for mu in seen) < 5


def test_the_log_joint_is_batched_and_recorded(monkeypatch):
    scores, start = [], auto_pathfinder.gaussian_start

    def spy(score, *args, **kwargs):
        scores.append(score)
        return start(score, *args, **kwargs)
    monkeypatch.setattr(auto_pathfinder, "gaussian_start", spy)

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones((), dtype=DOUBLE)))
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=DOUBLE), scale).to_event(1))
    AutoPathfinder(model).setup()
    (score,) = scores
    assert (score.log_joint.batched, score.log_joint.reason) == (True, "")
    assert all(compiled.recording is not None for _, compiled, _ in score._compiled.values())


def test_a_copy_and_a_pickle_have_the_same_density():
    guide = AutoPathfinder(conjugate).setup(Y)
    draws = guide.sample_posterior(5)
    loaded = pickle.loads(pickle.dumps(guide))
    assert torch.equal(loaded.log_prob(draws), guide.log_prob(draws))
    assert guide.model is not None


def test_nfvi_fits_it_as_any_guide():
    guide = AutoPathfinder(conjugate)
    posterior = NFVI(conjugate, guide, seed=0, progress=False).run(Y)
    assert posterior.summary().trusted
    assert posterior.resample(2000)["mu"].mean().item() == pytest.approx(Y.sum().item() / 6,
                                                                         abs=0.05)


def test_a_model_that_is_finite_nowhere_is_refused_and_may_be_tried_again():
    walls = [-torch.inf]

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        pyro.factor("wall", 0 * mu + walls[0])
    guide = AutoPathfinder(model)
    with pytest.raises(ValueError, match="AutoPathfinder: the log joint is finite at none of the "
                                         "starts; first bad site 'wall'.*init_loc_fn"):
        guide()
    walls[0] = 0.0
    assert abs(guide.setup().median()["mu"].item()) < 0.3


# ------------------------------------------------------------------ a Pyro guide in all else

def narrow():
    pyro.sample("x", dist.Normal(100.0, 0.01))


def called(model, *args, **kwargs):
    """A guide that was set up by a call, inside a step of Pyro's."""
    guide = AutoPathfinder(model, **kwargs)
    guide(*args)
    return guide


def is_at_the_posterior(guide, share=0.5):
    draws = guide.sample_posterior(4000)["mu"]
    deviation = 6 ** -0.5
    return bool(abs(draws.mean() - Y.sum() / 6) < share * deviation
                and abs((draws.std() / deviation).log()) < share)


@pytest.mark.parametrize("seed", range(3))
def test_a_first_call_finds_a_narrow_posterior_far_away(seed):
    pyro.set_rng_seed(seed)
    draws = called(narrow).sample_posterior(2000)["x"].double()
    assert abs(draws.mean() - 100) < 0.01
    assert 0.005 < draws.std() < 0.02


def test_a_first_call_leaves_no_parameters_of_another_start_in_pyros_store():
    guide = called(conjugate, Y, match=True)
    for _ in range(2):
        guide(Y)  # what the store holds comes back at each call
        assert abs(guide.median()["mu"] - Y.sum() / 6) < 0.05 * 6 ** -0.5
    low, high = guide.quantiles([0.16, 0.84])["mu"].unbind(0)
    assert abs((high - low) / 2 - 6 ** -0.5) < 0.1 * 6 ** -0.5


def test_svi_goes_on_from_the_posterior():
    guide = AutoPathfinder(conjugate)
    svi = SVI(conjugate, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(Y) for _ in range(20)]
    evidence = MultivariateNormal(torch.zeros(5, dtype=DOUBLE), torch.eye(5) + 1.0).log_prob(Y)
    assert abs(sum(losses) / 20 + evidence) < 0.5
    assert is_at_the_posterior(guide)


def test_predictive_draws_data_from_it():
    def model(count, y=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("data", count):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    guide = called(model, 5, Y)
    draws = Predictive(model, guide=guide, num_samples=2000)(5)["y"]
    assert draws.shape == (2000, 5)
    error = (7 / 6 / 2000) ** 0.5
    assert ((draws.mean(0) - Y.sum() / 6).abs() < 4.5 * error + 0.1).all()


def test_it_searches_once(monkeypatch):
    calls, search = [], auto_pathfinder.gaussian_start
    monkeypatch.setattr(auto_pathfinder, "gaussian_start",
                        lambda *args, **kwargs: calls.append(1) or search(*args, **kwargs))
    guide = called(conjugate, Y)
    guide(Y)
    guide.sample_posterior(5)
    assert calls == [1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))],
                         ids=["deepcopy", "pickle"])
def test_copies_draw_the_same_and_do_not_search_again(monkeypatch, duplicate):
    guide = called(conjugate, Y, match=True)
    monkeypatch.setattr(auto_pathfinder, "gaussian_start", None)
    other = duplicate(guide)
    assert other.match is True
    draws = []
    for each in (guide, other):
        torch.manual_seed(1)
        draws.append(each(Y)["mu"])
    torch.testing.assert_close(*draws)
    assert is_at_the_posterior(other)


def test_a_copy_before_the_first_call_searches_for_itself():
    guide = copy.deepcopy(AutoPathfinder(conjugate, match=True))
    guide(Y)
    assert is_at_the_posterior(guide)
