"""ArviZ data: groups, named dimensions, coordinates, statistics, files."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule

from pyro_nfvi import NFVI, AutoPlanar, _arviz, to_arviz
from pyro_nfvi.diagnostics import inference_data
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
    assert set(data.groups()) == {"posterior", "posterior_predictive", "log_likelihood",
                                  "sample_stats", "prior", "prior_predictive", "observed_data"}
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
    ({"school": 4}, r"to_arviz expected coords\['school'\] of length 4, got 4"),
    ({"school": "abcd"}, r"to_arviz expected coords\['school'\] of length 4, got 'abcd'"),
    (["school"], "to_arviz expected `coords` to be a dict, got list"),
], ids=["name", "length", "empty", "number", "word", "list"])
def test_wrong_coords_are_named(posterior, coords, words):
    with pytest.raises(ValueError, match=words):
        posterior.to_arviz(10, coords=coords)


def test_a_model_without_data_has_no_group_for_it():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
    assert set(fit(model).to_arviz(5).groups()) == {"posterior", "sample_stats", "prior"}


def test_a_scalar_observation_is_kept():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    data = fit(model, torch.tensor(0.5)).to_arviz(5)
    assert data.observed_data.y.item() == 0.5


def test_a_subsampled_plate_shows_no_minibatch_and_no_index_site():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as chosen:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])
    posterior = fit(model, torch.arange(6.0))
    with pytest.warns(UserWarning, match="leaves out posterior_predictive, log_likelihood, "
                                         "observed_data, prior_predictive: the model draws "
                                         "minibatches"):
        data = posterior.to_arviz(5)
    assert "minibatches" in data.posterior.attrs["left_out"]
    assert list(data.posterior.data_vars) == ["mu"]
    assert not hasattr(data, "observed_data")  # a minibatch is not what was observed


@pytest.mark.slow
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


# ------------------------------------------------------------------ predictions and likelihoods

def regression(x, y, scale=2.0):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


ROWS = torch.linspace(-1, 1, 6)


@pytest.fixture(scope="module")
def fitted():
    return fit(regression, ROWS, 3 * ROWS)


def test_the_log_likelihood_is_that_of_each_observation(fitted):
    data = fitted.to_arviz(20)
    slope = torch.from_numpy(data.posterior.slope.values)
    expected = dist.Normal(slope.unsqueeze(-1) * ROWS.double(), 2.0).log_prob(3 * ROWS.double())
    assert data.log_likelihood.y.dims == ("chain", "draw", "row")
    np.testing.assert_allclose(data.log_likelihood.y, expected, rtol=1e-6)


def test_a_scale_does_not_enter_the_log_likelihood_and_a_mask_hides_a_point():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3), poutine.scale(scale=7.0), poutine.mask(mask=y > 0):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    y = torch.tensor([-1.0, 0.5, 2.0])
    data = fit(model, y).to_arviz(4)
    mu = torch.from_numpy(data.posterior.mu.values)[0]
    expected = dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(y)
    expected[:, 0] = 0
    np.testing.assert_allclose(data.log_likelihood.y[0], expected, rtol=1e-6)


def test_an_event_is_one_observation():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([3, 2]).to_event(1), obs=y)
    data = fit(model, torch.ones(3, 2)).to_arviz(4)
    assert data.log_likelihood.y.shape == (1, 4, 3)
    assert data.posterior_predictive.y.dims == ("chain", "draw", "row", "y_dim_1")


def test_one_event_that_is_all_of_the_data_is_many_observations():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)
    data = fit(model, torch.ones(3)).to_arviz(4)
    mu = torch.from_numpy(data.posterior.mu.values)
    expected = dist.Normal(mu, 1.0).log_prob(torch.ones(())).unsqueeze(-1).expand(1, 4, 3)
    np.testing.assert_allclose(data.log_likelihood.y, expected, rtol=1e-6)


def test_simulated_data_follow_the_draws(fitted):
    data = fitted.to_arviz(4000)
    mean = data.posterior.slope.values[..., None] * ROWS.numpy()
    residuals = (data.posterior_predictive.y - mean) / 2
    for moment, expected in ((residuals.mean(), 0.0), (residuals.var(), 1.0)):
        assert abs(moment.item() - expected) < 5 * (2 / 24_000) ** 0.5
    rows = residuals.stack(sample=("chain", "draw")).values
    apart = np.corrcoef(rows) - np.eye(6)
    assert np.abs(apart).max() < 5 / 4000 ** 0.5  # each row has noise of its own
    assert len(np.unique(rows)) == rows.size


def test_draws_of_the_prior_know_no_data(fitted):
    data = fitted.to_arviz(1000)
    assert data.prior.slope.shape == (1, 1000)
    assert abs(data.prior.slope.mean().item()) < 5 / 1000 ** 0.5
    assert abs(data.prior_predictive.y[0, :, 0].var().item() - 5) < 5 * 5 * (2 / 1000) ** 0.5


def test_a_prior_without_draws_is_left_out_and_noted():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(torch.distributions.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    guide = AutoPlanar(model, num_layers=1, affine=Triangular,
                       init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
    posterior = NFVI(model, guide, num_steps=10, progress=False).run(torch.tensor(0.5))
    data = posterior.to_arviz(5)
    assert not {"prior", "prior_predictive"} & set(data.groups())
    assert "the prior cannot be drawn from" in data.posterior.attrs["left_out"]


def test_groups_are_those_asked_for(fitted):
    data = fitted.to_arviz(5, groups=("posterior", "log_likelihood"))
    assert set(data.groups()) == {"posterior", "log_likelihood"}
    for wrong in (("draws", "posterior"), ("prior",), "posterior"):
        with pytest.raises(ValueError, match="to_arviz expected `groups` to be some of posterior"):
            fitted.to_arviz(5, groups=wrong)


def test_more_numbers_than_memory_holds_are_not_made(fitted, monkeypatch):
    monkeypatch.setattr(inference_data, "MAX_NUMBERS", 100)
    with pytest.warns(UserWarning, match="posterior_predictive, log_likelihood, prior_predictive: "
                                         "they would hold 1e\\+02 numbers each; ask for fewer"):
        data = fitted.to_arviz(20)
    assert "log_likelihood" not in data.groups()


# ------------------------------------------------------------------ constant data and dims

def test_arguments_that_are_not_observed_are_constants(fitted):
    data = fitted.to_arviz(5, dims={"x": ["row"], "slope": []})
    assert set(data.constant_data.data_vars) == {"x"}
    assert data.constant_data.x.dims == ("row",)
    np.testing.assert_allclose(data.constant_data.x, ROWS)


def test_constants_of_any_signature_have_names():
    def model(*rows, y, **other):
        mu = pyro.sample("mu", dist.Normal(rows[0], 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    run = NFVI(model, num_steps=10, progress=False).run
    posterior = run(torch.tensor(0.0), 2, y=torch.tensor(0.5), flag=True, word="no")
    assert set(posterior.to_arviz(5).constant_data.data_vars) == {"rows_0", "rows_1", "flag"}


def test_dims_name_the_rightmost_dimensions(posterior):
    data = posterior.to_arviz(5, dims={"pair": ["half"], "share": ["part"]},
                              coords={"half": ["left", "right"]})
    assert data.posterior.pair.dims == ("chain", "draw", "school", "feature", "half")
    assert data.posterior.share.dims == ("chain", "draw", "part")
    assert data.posterior.half.values.tolist() == ["left", "right"]


@pytest.mark.parametrize(("dims", "words"), [
    ({"town": ["a"]}, "to_arviz expected `dims` to name sites or arguments of the model"),
    ({"mu": ["a"]}, r"to_arviz expected dims\['mu'\] to be a list of at most 0 names"),
    ({"share": "part"}, r"to_arviz expected dims\['share'\] to be a list of at most 1 names"),
    ({"share": None}, r"to_arviz expected dims\['share'\] to be a list of at most 1 names"),
    ({"pair": ["half", "half"]}, r"to_arviz expected dims\['pair'\] to differ from one another"),
    ({"share": ["school"]}, "got 'school' for 2 and, at 'theta', for 4. Rename one"),
    (["share"], "to_arviz expected `dims` to be a dict, got list"),
])
def test_wrong_dims_are_named(posterior, dims, words):
    with pytest.raises(ValueError, match=words):
        posterior.to_arviz(5, dims=dims)


def test_a_plate_named_as_an_argument_gets_another_name():
    def model(group, y):
        with pyro.plate("group", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu * group, 1.0), obs=y)
    data = fit(model, torch.ones(3), torch.zeros(3)).to_arviz(5)
    assert data.posterior.mu.dims == ("chain", "draw", "group_dim")
    np.testing.assert_array_equal(data.constant_data.group, np.ones(3))


# ------------------------------------------------------------------ ArviZ 1.x

def test_the_new_arviz_gets_the_same_groups(posterior, data, monkeypatch):
    pytest.importorskip("arviz_stats")
    monkeypatch.setattr(_arviz, "_api", _arviz._parts)
    tree = posterior.to_arviz(500, coords={"school": list("abcd")})
    assert set(tree.children) == set(data.groups())
    assert tree["posterior"]["theta"].dims == data.posterior.theta.dims
    assert tree["log_likelihood"]["y"].shape == (1, 500, 4, 3)
    assert tree["sample_stats"].attrs["pareto_k"] == posterior.pareto_k


def test_both_arviz_leave_one_out_alike(fitted, monkeypatch):
    arviz_stats = pytest.importorskip("arviz_stats")
    torch.manual_seed(0)
    old = arviz.loo(fitted.to_arviz(2000)).elpd_loo
    monkeypatch.setattr(_arviz, "_api", _arviz._parts)
    torch.manual_seed(0)
    assert arviz_stats.loo(fitted.to_arviz(2000)).elpd == pytest.approx(old, abs=1e-3)


def test_leave_one_out_agrees_with_the_closed_form(fitted):
    """The predictive density of each left-out point, of a conjugate regression."""
    data = fitted.to_arviz(4000)
    expected = 0.0
    for i in range(6):
        others = torch.arange(6) != i
        x, y = ROWS[others], 3 * ROWS[others]
        precision = 1 + (x ** 2).sum() / 4
        mean, scale = (x * y).sum() / 4 / precision, (4 + ROWS[i] ** 2 / precision) ** 0.5
        expected += dist.Normal(mean * ROWS[i], scale).log_prob(3 * ROWS[i]).item()
    assert arviz.loo(data).elpd_loo == pytest.approx(expected, abs=0.05)


def test_deterministic_sites_in_a_plate_keep_their_shape_in_predictions():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            shifted = pyro.deterministic("shifted", mu + torch.arange(3.0))
            pyro.sample("y", dist.Normal(shifted, 0.01), obs=y)
    data = fit(model, torch.arange(3.0)).to_arviz(20)
    assert data.posterior_predictive.y.shape == data.prior_predictive.y.shape == (1, 20, 3)
    assert data.prior.shifted.shape == (1, 20, 3)
    np.testing.assert_allclose(data.posterior_predictive.y, data.posterior.shifted, atol=0.06)


def test_data_that_broadcast_with_their_distribution_have_one_shape_in_all_groups():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.01), obs=y)  # without a plate
        pyro.sample("one", dist.Normal(mu.expand(4), 0.01), obs=torch.tensor(0.3))
    data = fit(model, torch.full((3,), 0.3)).to_arviz(20)
    for group in (data.posterior_predictive, data.prior_predictive, data.log_likelihood):
        assert (group.y.shape, group.one.shape) == ((1, 20, 3), (1, 20, 4))
    assert (data.observed_data.y.shape, data.observed_data.one.shape) == ((3,), (4,))
    assert data.posterior_predictive.y.std("y_dim_0").min() > 0  # each its own draw


def test_deterministic_sites_that_fill_their_plates_have_their_dimensions():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3), pyro.plate("column", 2):
            pyro.deterministic("table", mu + torch.arange(6.0).reshape(2, 3))
            pyro.deterministic("line", mu + torch.arange(3.0))
            pyro.deterministic("event", mu + torch.arange(4.0))
    data = fit(model).to_arviz(5)
    assert data.posterior.table.dims == ("chain", "draw", "column", "row")
    assert data.posterior.line.dims == ("chain", "draw", "row")
    assert data.posterior.event.dims == ("chain", "draw", "event_dim_0")


def test_a_plate_named_as_the_draws_gets_another_name():
    def model():
        with pyro.plate("draw", 3):
            pyro.sample("mu", dist.Normal(0.0, 1.0))
    assert fit(model).to_arviz(5).posterior.mu.dims == ("chain", "draw", "draw_dim")


def test_arguments_of_a_module_keep_their_names():
    class Line(PyroModule):
        def forward(self, x, y=None):
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)
    model = Line()
    data = to_arviz(model, AutoNormal(model), X[0], num_samples=5, y=X[1])
    assert set(data.constant_data.data_vars) == {"x"}


def test_a_reparametrized_site_is_one_of_the_posterior():
    def model(y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("row", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    data = fit(poutine.reparam(model, {"theta": LocScaleReparam(0.0)}), torch.ones(3)).to_arviz(20)
    assert {"theta", "theta_decentered", "tau"} <= set(data.posterior.data_vars)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert set(data[group].data_vars) == {"y"}
    np.testing.assert_allclose(data.posterior.theta,
                               data.posterior.theta_decentered * data.posterior.tau, rtol=1e-5)
