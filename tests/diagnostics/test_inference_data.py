"""ArviZ data: groups, named dimensions, coordinates, statistics, files."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import NFVI, AutoPlanar
from pyro_nfvi.flows import Triangular

DOUBLE = torch.float64
X = torch.arange(12.0).reshape(4, 3) / 12


def schools(y, count):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
    pyro.deterministic("odds", share[0] / share[1])
    with pyro.plate("feature", 3, dim=-1):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("school", 4, dim=-2):
            theta = pyro.sample("theta", dist.LogNormal(mu / 5, 1.0))
            pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("doubled", 2 * theta + slope, event_dim=0)
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
            pyro.sample("count", dist.Poisson(1.0), obs=count)
    pyro.factor("nothing", torch.tensor(0.5))


COUNT = torch.ones(4, 3)


def fit(model, *args, **kwargs):
    guide = AutoPlanar(model, num_layers=1, affine=Triangular)
    return NFVI(model, guide, num_particles=8, num_steps=10, seed=0, progress=False,
                dtype=DOUBLE, **kwargs).run(*args)


@pytest.fixture(scope="module")
def posterior():
    return fit(schools, X, COUNT)


@pytest.fixture(scope="module")
def data(posterior):
    return posterior.to_arviz(500)


# ------------------------------------------------------------------ groups and dimensions

def test_there_is_a_group_for_draws_statistics_and_data(data):
    assert set(data.groups()) == {"posterior", "sample_stats", "observed_data"}
    assert set(data.posterior.data_vars) == {"mu", "share", "odds", "slope", "theta", "pair",
                                             "doubled"}
    assert set(data.sample_stats.data_vars) == {"lp", "log_q", "log_weight"}
    assert set(data.observed_data.data_vars) == {"y", "count"}


@pytest.mark.parametrize(("name", "dims"), [
    ("mu", ()),
    ("share", ("share_dim_0",)),
    ("odds", ()),
    ("slope", ("feature",)),
    ("theta", ("school", "feature")),
    ("pair", ("school", "feature", "pair_dim_2")),
    ("doubled", ("school", "feature")),
])
def test_plates_name_the_dimensions(data, name, dims):
    assert data.posterior[name].dims == ("chain", "draw", *dims)
    assert data.posterior.sizes["chain"] == 1
    assert data.posterior.sizes["draw"] == 500


@pytest.mark.parametrize("name", ["y", "count"])
def test_plates_name_the_dimensions_of_the_data(data, name):
    assert data.observed_data[name].dims == ("school", "feature")
    np.testing.assert_array_equal(data.observed_data[name], {"y": X, "count": COUNT}[name])


def test_a_plate_without_coords_counts_from_zero(data):
    np.testing.assert_array_equal(data.posterior.school, np.arange(4))


def test_coords_label_the_plates_everywhere(posterior):
    labels = ["Ayr", "Bath", "Cork", "Deal"]
    data = posterior.to_arviz(10, coords={"school": labels, "pair_dim_2": [1, -1]})
    assert data.posterior.school.values.tolist() == labels
    assert data.observed_data.school.values.tolist() == labels
    assert data.posterior.pair_dim_2.values.tolist() == [1, -1]
    np.testing.assert_array_equal(data.observed_data.y.sel(school="Cork"), X[2])
    assert "theta[Ayr, 0]" in arviz.summary(data, kind="stats").index


@pytest.mark.parametrize(("coords", "words"), [
    ({"town": ["a"]}, r"to_arviz expected `coords` to name dimensions of the model "
                      r"\(feature, pair_dim_2, school, share_dim_0\), got 'town'"),
    ({"school": ["a", "b"]}, r"to_arviz expected coords\['school'\] of length 4, got 2"),
    ({"school": []}, r"coords\['school'\] of length 4, got 0"),
], ids=["name", "length", "empty"])
def test_wrong_coords_are_named(posterior, coords, words):
    with pytest.raises(ValueError, match=words):
        posterior.to_arviz(10, coords=coords)


def test_a_model_without_data_has_no_group_for_it():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
    assert set(fit(model).to_arviz(5).groups()) == {"posterior", "sample_stats"}


def test_a_scalar_observation_is_kept():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    data = fit(model, torch.tensor(0.5)).to_arviz(5)
    assert data.observed_data.y.item() == 0.5


def test_a_subsampled_plate_shows_a_minibatch_and_no_index_site():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as chosen:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])
    data = fit(model, torch.arange(6.0)).to_arviz(5)
    assert list(data.posterior.data_vars) == ["mu"]
    assert data.observed_data.y.dims == ("rows",)
    assert data.observed_data.sizes["rows"] == 2


def test_a_model_that_runs_particle_by_particle_gives_the_same_groups():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("sign", torch.tensor(1.0 if mu > 0 else -1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    with pytest.warns(UserWarning, match="control flow"):
        data = fit(model, torch.tensor(0.5)).to_arviz(50)
    np.testing.assert_array_equal(data.posterior.sign, np.sign(data.posterior.mu))


# ------------------------------------------------------------------ values

def test_unweighted_draws_are_those_of_the_guide_in_order(posterior):
    data = posterior.to_arviz(30, weighted=False)
    z = posterior.draws.z[:30]
    values = posterior.log_joint.layout.constrain(z)[0]
    for name, value in values.items():
        np.testing.assert_array_equal(data.posterior[name][0], value)
    share = values["share"]
    np.testing.assert_allclose(data.posterior.odds[0], share[:, 0] / share[:, 1])
    np.testing.assert_allclose(data.posterior.doubled[0],
                               2 * values["theta"] + values["slope"].unsqueeze(1))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_statistics_equal_direct_computation(posterior, weighted):
    data = posterior.to_arviz(40, weighted=weighted)
    values = {name: torch.from_numpy(data.posterior[name].values[0])
              for name in ("mu", "share", "slope", "theta", "pair")}
    z = posterior.log_joint.layout.pack(values)
    stats = {name: torch.from_numpy(data.sample_stats[name].values[0])
             for name in ("lp", "log_q", "log_weight")}
    torch.testing.assert_close(stats["lp"], posterior.log_joint(z), rtol=1e-9, atol=1e-9)
    log_q = posterior.guide._flow().log_prob(z).detach()
    torch.testing.assert_close(stats["log_q"], log_q, rtol=1e-6, atol=1e-6)
    kept = set(posterior.log_weights.tolist())
    assert set(stats["log_weight"].tolist()) <= kept
    if not weighted:
        torch.testing.assert_close(stats["log_weight"], posterior.log_weights[:40])


def test_attributes_say_whether_draws_are_weighted(posterior):
    for weighted, words in ((True, "importance-resampled"), (False, "none: see log_weight")):
        attrs = posterior.to_arviz(10, weighted=weighted).posterior.attrs
        assert attrs["weighting"] == words
        assert attrs["inference_library"] == "pyro_nfvi"
        assert attrs["pareto_k"] == posterior.pareto_k
        assert attrs["ess"] == posterior.ess


def test_unweighted_draws_are_no_more_than_there_are(posterior):
    assert posterior.to_arviz(20_000, weighted=False).posterior.sizes["draw"] == 10_000
    assert posterior.to_arviz(20_000).posterior.sizes["draw"] == 20_000


# ------------------------------------------------------------------ what ArviZ does with it

def test_a_file_of_arviz_comes_back(data, tmp_path):
    path = tmp_path / "fit.nc"
    data.to_netcdf(str(path), engine="h5netcdf")
    back = arviz.from_netcdf(str(path), engine="h5netcdf")
    assert set(back.groups()) == set(data.groups())
    for group in data.groups():
        for name, value in data[group].data_vars.items():
            np.testing.assert_array_equal(back[group][name], value)
            assert back[group][name].dims == value.dims
    assert back.posterior.attrs["weighting"] == "importance-resampled"


def test_arviz_summarizes_and_plots_it(data):
    table = arviz.summary(data, kind="stats")
    assert len(table) == 1 + 2 + 1 + 3 + 12 + 24 + 12
    assert table.loc["mu", "mean"] == pytest.approx(data.posterior.mu.mean().item(), abs=1e-3)
    assert arviz.extract(data).sizes["sample"] == 500
