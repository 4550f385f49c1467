"""compare: fits of one model side by side; and the seconds of a fit."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_nfvi import NFVI, AutoFlow, AutoGaussian, AutoPlanar, Posterior, compare, nsf
from pyro_nfvi.flows import Triangular
from pyro_nfvi.inference import History, LogJoint
from pyro_nfvi.inference.log_joint import default_dtype

DOUBLE = torch.float64
Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])
COLUMNS = ["elbo", "elbo_se", "pareto_k", "ess", "seconds", "trusted"]


def conjugate(y, deviation=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, deviation))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


MEAN, DEVIATION = Y.sum().item() / 6, 6 ** -0.5


def gaussian(mean=MEAN, deviation=DEVIATION, *, model=conjugate, args=(Y,), kind=AutoGaussian,
             seconds=0.0, dtype=torch.float32, **kwargs):
    """A posterior whose guide is this Gaussian, whatever the true one is."""
    with default_dtype(dtype):
        guide = kind(model).setup(*args, **kwargs).to(dtype=dtype)
        affine = guide._modules["flow"].bijection.layers[-1]
        with torch.no_grad():
            affine.shift.value.fill_(mean)
            affine.log_scale.value.fill_(math.log(deviation))
    return Posterior(guide, LogJoint(model, args, kwargs, guide.layout, dtype),
                     History([0.0], seconds=seconds))


# ------------------------------------------------------------------ the table

def test_the_table_holds_what_the_fits_say_the_best_first():
    fits = {"wide": gaussian(deviation=2 * DEVIATION, seconds=1.5), "good": gaussian(seconds=3.0),
            "off": gaussian(MEAN + 1.5)}
    table = compare(fits)
    assert list(table.columns) == COLUMNS
    assert list(table.index) == ["good", "wide", "off"]
    for name, fit in fits.items():
        row = table.loc[name]
        assert (row.elbo, row.elbo_se) == fit.elbo
        assert (row.pareto_k, row.ess) == (fit.pareto_k, fit.ess)
        assert row.trusted == fit.summary().trusted
    assert table.trusted.tolist() == [True, True, False]
    assert table.seconds.tolist()[:2] == [3.0, 1.5]
    assert math.isnan(table.seconds["off"])


def test_a_point_mass_has_no_elbo_and_comes_last():
    table = compare({"point": Posterior.of(conjugate, AutoDelta(conjugate), Y), "good": gaussian()})
    assert list(table.index) == ["good", "point"]
    assert math.isnan(table.elbo["point"])
    assert not table.trusted["point"]


def test_the_elbos_differ_by_the_divergences_from_the_posterior():
    fits = {"good": gaussian(), "wide": gaussian(deviation=2 * DEVIATION)}
    table = compare(fits)
    divergence = (4 - 1) / 2 - math.log(2)
    error = math.hypot(*table.elbo_se)
    assert abs(table.elbo["good"] - table.elbo["wide"] - divergence) < 4 * error


def test_a_fit_that_is_finite_nowhere_comes_last():
    def positive(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(mu > 0, 0.0, -torch.inf))
    nowhere = gaussian(-50.0, 0.1, model=positive)
    table = compare({"nowhere": nowhere, "good": gaussian(1.0, 0.1, model=positive)})
    assert list(table.index) == ["good", "nowhere"]
    assert table.elbo["nowhere"] == -math.inf
    assert not table.trusted["nowhere"]


def test_one_fit_makes_a_table_too():
    assert list(compare([gaussian()]).index) == ["AutoGaussian"]


# ------------------------------------------------------------------ names

def test_fits_are_called_by_their_guides():
    kinds = [AutoGaussian, partial(AutoPlanar, num_layers=1), partial(AutoPlanar, num_layers=2),
             partial(AutoFlow, recipe=partial(nsf, num_layers=1), num_bins=4), AutoFlow]
    table = compare(gaussian(kind=kind) for kind in kinds)
    assert set(table.index) == {"AutoGaussian", "AutoPlanar(num_layers=1)",
                                "AutoPlanar(num_layers=2)", "AutoFlow(nsf, num_layers=1, "
                                "num_bins=4)", "AutoFlow"}


def test_fits_of_like_guides_get_numbers_in_the_order_given():
    table = compare([gaussian(deviation=2 * DEVIATION), gaussian(kind=AutoPlanar), gaussian()])
    assert list(table.index[1:]) in (["AutoGaussian 2", "AutoGaussian 1"],
                                     ["AutoPlanar", "AutoGaussian 1"])
    assert set(table.index) == {"AutoGaussian 1", "AutoGaussian 2", "AutoPlanar"}


def test_guides_of_pyros_and_functions_have_names_too():
    def by_hand(y):
        pyro.sample("mu", dist.Normal(MEAN, DEVIATION))
    table = compare([Posterior.of(conjugate, AutoNormal(conjugate), Y),
                     Posterior.of(conjugate, by_hand, Y)])
    assert list(table.index) == ["by_hand", "AutoNormal"]


# ------------------------------------------------------------------ what cannot be compared

def shared(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y[0])


def other_site(y):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y[0])


def other_likelihood(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.1), obs=y)


def other_name(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(("other", "words"), [
    (partial(gaussian, model=other_site), r"one model, but 'one' has the sites mu \(\) and 'two' "
                                          r"has theta \(\)"),
    (partial(gaussian, model=shared), r"one model, but 'one' has the sites mu \(\) and 'two' has "
                                      r"mu \(2,\)"),
    (partial(gaussian, args=(Y + 0.01,)), "the same data, but 'one' and 'two' observed different "
                                          "values of 'y'"),
    (partial(gaussian, args=(Y[:4],)), "the same data, but .* values of 'y'"),
    (partial(gaussian, model=other_name), "the same data, but .* values of 'x'"),
    (partial(gaussian, model=other_likelihood), "one model, but the log joint at one place is "
                                                r"-[\d.]+ for 'one' and -[\d.]+ for 'two'"),
    (partial(gaussian, deviation=DEVIATION, args=(Y, 1.01)), "one model, but the log joint"),
])
def test_fits_of_other_models_or_data_are_refused(other, words):
    with pytest.raises(ValueError, match=f"compare expected fits (of|to) {words}.*Compare fits of "
                                         "one model to the same data."):
        compare({"one": gaussian(), "two": other()})


def test_one_stranger_among_many_is_named():
    with pytest.raises(ValueError, match="'AutoGaussian 1' and 'AutoPlanar' observed different"):
        compare([gaussian(), gaussian(), gaussian(kind=AutoPlanar, args=(Y + 1,))])


def test_fits_in_single_and_double_precision_may_be_compared():
    double = gaussian(args=(Y.double(),), dtype=DOUBLE)
    assert len(compare([gaussian(), double])) == len(compare([double, gaussian()])) == 2


def test_a_model_that_learns_or_draws_minibatches_is_taken_at_its_word():
    def learns(y):
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale), obs=y[0])

    def minibatch(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=4) as chosen:
            pyro.factor("y", dist.Normal(mu, 1.0).log_prob(y[chosen]))
    assert len(compare([gaussian(model=learns), gaussian(model=learns)])) == 2
    assert len(compare([gaussian(model=minibatch), gaussian(model=minibatch)])) == 2


@pytest.mark.parametrize(("wrong", "words"), [
    ([], "hold at least one Posterior, got none"), ({}, "hold at least one Posterior, got none"),
    (3.0, "be a list or dict of Posteriors, got float"), ([1], "hold Posteriors, .* got int"),
    ({"a": "b"}, "hold Posteriors, .* got str")], ids=str)
def test_what_is_no_fit_is_refused(wrong, words):
    with pytest.raises(ValueError, match=f"compare expected `posteriors` to .*{words}"):
        compare(wrong)


def test_a_fit_outside_of_a_list_is_refused():
    with pytest.raises(ValueError, match="a list or dict of Posteriors, got Posterior. Put it in"):
        compare(gaussian())


# ------------------------------------------------------------------ seconds

def fit(**options):
    guide = AutoPlanar(conjugate, num_layers=1, affine=Triangular)
    return NFVI(conjugate, guide, num_particles=16, num_steps=20, progress=False, **options)


def test_the_seconds_of_a_fit_are_those_of_the_clock():
    run = fit()
    start = time.monotonic()
    posterior = run.run(Y)
    elapsed = time.monotonic() - start
    assert 0 < posterior.history.seconds <= elapsed
    start = time.monotonic()
    again = run.run(Y)  # the guide goes on from where it is
    elapsed = time.monotonic() - start
    assert again.history.stages[0].name == "flow"
    assert 0 < again.history.seconds <= elapsed
    assert compare([posterior]).seconds.iloc[0] == posterior.history.seconds


def test_the_seconds_of_two_stages_add_up_and_do_not_tell_fits_apart():
    assert (History(seconds=1.0) + History(seconds=2.5)).seconds == 3.5
    assert History(seconds=1.0) == History(seconds=2.0)


def test_the_seconds_of_a_fit_come_back_from_a_file(tmp_path):
    posterior = fit().run(Y)
    posterior.save(tmp_path / "fit.pt")
    loaded = Posterior.load(tmp_path / "fit.pt", conjugate)
    assert loaded.history.seconds == posterior.history.seconds > 0


def test_an_older_file_has_no_seconds():
    content = asdict(History([1.0], seconds=3.0))
    del content["seconds"]
    assert History.of(content).seconds == 0.0


def test_the_training_of_a_vae_has_seconds():
    from pyro_nfvi.vae import VAE, Bernoulli
    vae = VAE(Bernoulli((4,)), latent_dim=1)
    assert vae.fit(torch.rand(20, 4).round(), num_epochs=1, progress=False).seconds > 0
