"""Any Pyro guide as a density of the flat latent, and as a posterior for ArviZ."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch.distributions import StickBreakingTransform, constraints

from pyro_nfvi import AutoFlow, Posterior, planar, to_arviz
from pyro_nfvi._random import map_random
from pyro_nfvi.guides import GuideDraws, LatentLayout
from pyro_nfvi.guides.prototype import quiet_trace

Y = torch.tensor([0.4, 1.2, 0.7])


def model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", 3):
        mu = pyro.sample("mu", dist.Normal(share[0], scale))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def structured(model):
    kinds = {"scale": "normal", "share": "delta", "mu": "mvn"}
    return AutoStructured(model, conditionals=kinds, dependencies={"mu": {"scale": "linear"}})


SHARE = dist.TransformedDistribution(dist.Normal(torch.tensor([0.2, 0.5]), 0.5).to_event(1),
                                     StickBreakingTransform())


def plain(y):
    scale = pyro.sample("scale", dist.LogNormal(0.3, 0.2))
    pyro.sample("share", SHARE)
    with pyro.plate("row", 3):
        pyro.sample("mu", dist.Normal(0.5 * scale, 0.4))


GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal,
          AutoIAFNormal]


def draws_of(guide, y=Y):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide(y)
    return GuideDraws(guide, LatentLayout.from_trace(quiet_trace(model, (y,), {})), (y,), {})


@pytest.mark.parametrize("kind", GUIDES, ids=lambda kind: kind.__name__)
def test_the_density_of_draws_is_that_of_the_guides_own_trace(kind):
    guide = kind(model)
    draws = draws_of(guide)
    z, log_q = draws.rsample_and_log_prob((5,))
    assert z.shape == (5, draws.layout.size)
    with pyro.validation_enabled(False):  # one run for all
        assert map_random(draws._one, torch.empty(3, 0))[0].shape == z[:3].shape
    torch.testing.assert_close(draws.log_prob(z), log_q, rtol=1e-4, atol=1e-4)
    if kind is not AutoNormal:  # Pyro's own distribution of the flat latent
        own = guide.get_posterior(Y).log_prob(z)
        torch.testing.assert_close(own.detach(), log_q, rtol=1e-4, atol=1e-4)


def test_the_density_of_a_function_is_that_of_its_distributions():
    draws = draws_of(plain)
    z, log_q = draws.rsample_and_log_prob((2, 4))
    assert log_q.shape == (2, 4)
    values, log_det = draws.layout.constrain(z)
    expected = (dist.LogNormal(0.3, 0.2).log_prob(values["scale"])
                + SHARE.log_prob(values["share"])
                + dist.Normal(0.5 * values["scale"].unsqueeze(-1), 0.4)
                .log_prob(values["mu"]).sum(-1) + log_det)
    torch.testing.assert_close(log_q, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draws.log_prob(z), expected, rtol=1e-4, atol=1e-4)


def test_draws_have_the_moments_of_the_guide():
    z, _ = draws_of(plain).rsample_and_log_prob((4000,))
    scale = z[:, 0]
    assert abs(scale.mean() - 0.3) < 5 * 0.2 / 4000 ** 0.5
    assert abs(scale.std() - 0.2) < 5 * 0.2 / 8000 ** 0.5
    assert len(z[:, 0].unique()) > 3900  # every draw has noise of its own


def test_a_guide_with_control_flow_runs_draw_by_draw():
    def surplus(y):
        plain(y)
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def branching(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("share", SHARE)
        loc = 1.0 if scale > 1 else -1.0
        with pyro.plate("row", 3):
            pyro.sample("mu", dist.Normal(loc, 0.1))
    draws = draws_of(branching)
    z, _ = draws.rsample_and_log_prob((50,))
    assert torch.equal(z[:, 0] > 0, z[:, -1] > 0)
    with pytest.raises(ValueError, match="draws 'b', which the model does not have"):
        draws_of(surplus)


def test_density_elsewhere_is_refused_where_the_guide_does_not_tell():
    draws = draws_of(structured(model))
    z, log_q = draws.rsample_and_log_prob((3,))
    assert log_q.isfinite().all()
    with pytest.raises(NotImplementedError, match="AutoStructured gives densities of its own"):
        draws.log_prob(z)


def test_a_point_mass_makes_no_chains():
    pyro.clear_param_store()
    posterior = Posterior.of(model, AutoDelta(model), Y)
    with pytest.raises(ValueError, match="metropolis expected a guide that draws every latent, but "
                                         "the guide is a point mass at site 'scale'"):
        posterior.metropolis(num_draws=10, seed=0)


def test_a_guide_for_another_model_is_named():
    def other(y):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pytest.raises(ValueError, match="other is not a guide for this model: it draws no "
                                         "'share'"):
        Posterior.of(model, other, Y)


def wider(y):
    with pyro.plate("row", 5):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))


def test_a_guide_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"draws 'mu' of shape \(5,\), the model \(3,\)"):
        Posterior.of(model, wider, Y)


def test_missing_observations_are_named():
    with pytest.raises(ValueError, match="Posterior.of expected site 'y' to be observed with "
                                         "numbers, got 1 NaN"):
        Posterior.of(model, plain, torch.tensor([0.1, torch.nan, 0.3]))


@pytest.mark.parametrize("name", ["model", "guide"])
def test_what_is_no_function_is_named(name):
    arguments = {"model": model, "guide": plain, name: 3}
    with pytest.raises(ValueError, match=f"expected `{name}` to be a Pyro {name}, a function, "
                                         "got int"):
        to_arviz(*arguments.values(), Y)


# ------------------------------------------------------------------ posteriors of guides

@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoFlow, structured,
                                   lambda model: plain], ids=["AutoNormal", "AutoMVN", "AutoFlow",
                                                              "AutoStructured", "function"])
def test_any_guide_becomes_arviz_data(guide):
    pyro.clear_param_store()
    built = guide(model)
    built(Y)
    data = to_arviz(model, built, Y, num_samples=50, coords={"row": list("abc")})
    assert data.posterior.mu.dims == ("chain", "draw", "row")
    assert data.log_likelihood.y.shape == (1, 50, 3)
    assert data.posterior_predictive.y.shape == (1, 50, 3)
    assert {"lp", "log_q", "log_weight"} <= set(data.sample_stats.data_vars)
    assert (data.posterior.scale > 0).all()


def test_a_posterior_of_a_guide_weighs_its_draws():
    """Importance weights move a guide that is a little off to the posterior."""
    def conjugate(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def off(y):
        pyro.sample("mu", dist.Normal(0.3, 0.7))
    pyro.set_rng_seed(0)
    posterior = Posterior.of(conjugate, off, Y)
    mean, error = Y.sum() / 4, 0.5 / posterior.ess ** 0.5
    assert abs(posterior.resample(10_000)["mu"].mean() - mean) < 5 * error
    assert posterior.pareto_k < 0.5
    value = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(posterior.log_prob({"mu": value}),
                               dist.Normal(0.3, 0.7).log_prob(value))
    with pytest.raises(ValueError, match="Posterior.save expected an AutoFlow guide"):
        posterior.save("nowhere")


def test_a_point_estimate_is_not_trusted():
    posterior = Posterior.of(model, AutoDelta(model), Y)
    summary = posterior.summary()
    assert not summary.trusted
    assert "the guide is a point mass at site 'scale'" in summary.verdict


def test_a_list_of_guides_is_one_posterior():
    pyro.clear_param_store()
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["mu"])))
    guide.append(AutoFlow(pyro.poutine.block(model, expose=["mu"]), planar, num_layers=1))
    guide(Y)
    assert Posterior.of(model, guide, Y).draws.log_q.isfinite().all()


def test_a_guide_outside_the_support_is_flagged():
    def positive(y):
        pyro.sample("rate", dist.Exponential(1.0))

    def guide(y):
        pyro.sample("rate", dist.Normal(0.2, 0.5))
    summary = Posterior.of(positive, guide, Y).summary()
    assert not summary.trusted
    assert "of the draws have a finite log joint" in summary.verdict


def test_of_an_amortized_guide_the_rows_given_are_drawn():
    def rows(y):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def encoder(y):
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5 ** 0.5), constraint=constraints.positive)
        with pyro.plate("row", len(y)):
            pyro.sample("z", dist.Normal(slope * y, scale))
    pyro.clear_param_store()
    for count in (3, 7):  # the exact posterior
        posterior = Posterior.of(rows, encoder, torch.randn(count))
        assert posterior.draws.z.shape == (10_000, count)
        assert posterior.ess > 9_999


def test_another_model_for_a_posterior_needs_its_arguments():
    pyro.clear_param_store()
    posterior = Posterior.of(model, plain, Y)

    def other(y):
        model(y)
    assert to_arviz(model, posterior, num_samples=5).posterior.sizes["draw"] == 5
    assert to_arviz(other, posterior, 2 * Y, num_samples=5).observed_data.y[0] == 2 * Y[0]
    with pytest.raises(ValueError, match="to_arviz expected the model that the posterior was"):
        to_arviz(other, posterior)
