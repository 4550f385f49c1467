"""_arviz: one set of functions over ArviZ 0.x and the parts of ArviZ 1.x."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from types import SimpleNamespace

import arviz
import numpy as np
import pytest

from pyro_nfvi import _arviz

GROUPS = {
    "posterior": {"mu": np.arange(100.0).reshape(1, 100),
                  "t": np.arange(300.0).reshape(1, 100, 3)},
    "sample_stats": {"lp": np.zeros((1, 100))},
    "observed_data": {"y": np.ones(3)},
}
DIMS = {"mu": [], "t": ["group"], "y": ["group"]}
COORDS = {"group": np.array(["a", "b", "c"])}
ATTRS = {"weighting": "none", "pareto_k": 0.25}

NEW = all(importlib.util.find_spec(name) for name in ("arviz_base", "arviz_stats"))
OLD = arviz.__version__.startswith("0.")
APIS = [
    pytest.param("legacy", id="arviz-0.x",
                 marks=pytest.mark.skipif(not OLD, reason="ArviZ 0.x is not installed")),
    pytest.param("parts", id="arviz-1.x",
                 marks=pytest.mark.skipif(not NEW, reason="ArviZ 1.x is not installed")),
]


@pytest.fixture(params=APIS)
def api(request, monkeypatch):
    made = _arviz._legacy(arviz) if request.param == "legacy" else _arviz._parts()
    monkeypatch.setattr(_arviz, "_api", lambda: made)
    return made


def test_smoothed_weights_are_normalized_and_the_ratios_stay_as_they_were(api):
    ratios = np.random.default_rng(0).standard_t(3, size=2000)
    before = ratios.copy()
    log_weights, pareto_k = _arviz.psis(ratios)
    assert np.array_equal(ratios, before)
    assert np.argmax(log_weights) == np.argmax(ratios)  # not those of the inverse ratios
    assert abs(np.logaddexp.reduce(log_weights)) < 1e-10
    assert isinstance(pareto_k, float)
    order = np.argsort(ratios)
    assert (np.diff(log_weights[order]) >= -1e-12).all()
    middle = order[:1000]
    np.testing.assert_allclose(np.diff(log_weights[middle]), np.diff(ratios[middle]), atol=1e-10)


@pytest.mark.parametrize("shape", [0.3, 0.6, 0.9])
def test_k_hat_finds_the_shape_of_a_pareto_tail(api, shape):
    # A Pareto variate u ** -k; the standard error of k-hat from a tail of M draws is
    # (1 + k) / sqrt(M), with M = 3 sqrt(S) in PSIS; its prior shrinks it by 10 / (M + 10) to 0.5.
    num_draws = 100_000
    u = np.random.default_rng(0).uniform(size=num_draws)
    _, pareto_k = _arviz.psis(-shape * np.log(u))
    tail = 3 * num_draws ** 0.5
    assert abs(pareto_k - shape) < 4 * (1 + shape) / tail ** 0.5 + 10 / tail


@pytest.mark.parametrize("num_draws", [1, 4, 5, 6, 20, 24])
def test_too_few_draws_for_a_tail_keep_their_weights(api, num_draws):
    ratios = np.random.default_rng(0).normal(size=num_draws)
    log_weights, pareto_k = _arviz.psis(ratios)
    np.testing.assert_allclose(log_weights, ratios - np.logaddexp.reduce(ratios))
    assert pareto_k == float("inf")


def test_enough_draws_for_a_tail_are_smoothed(api):
    _, pareto_k = _arviz.psis(np.random.default_rng(0).normal(size=_arviz.MIN_DRAWS))
    assert np.isfinite(pareto_k)


@pytest.mark.parametrize("num_flat", [500, 1000], ids=["flat-tail", "all-equal"])
def test_a_flat_tail_is_left_alone(api, num_flat):
    ratios = np.r_[np.random.default_rng(0).normal(size=1000 - num_flat) - 10, np.ones(num_flat)]
    log_weights, pareto_k = _arviz.psis(ratios)
    assert pareto_k == -np.inf
    np.testing.assert_allclose(log_weights, ratios - np.logaddexp.reduce(ratios))


def test_one_draw_with_all_the_weight_is_seen(api):
    log_weights, pareto_k = _arviz.psis(np.r_[np.zeros(9999), 50.0])
    assert log_weights.argmax() == 9999
    assert not pareto_k < 0.7


def test_equal_ratios_do_no_harm(api):
    ratios = np.round(np.random.default_rng(0).standard_t(3, size=1000))
    log_weights, _ = _arviz.psis(ratios)
    assert np.isfinite(log_weights).all()
    assert abs(np.logaddexp.reduce(log_weights)) < 1e-10
    assert log_weights[ratios.argmax()] == log_weights.max()


def test_a_bad_tail_is_no_warning(api):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _arviz.psis(100 * np.random.default_rng(0).normal(size=500))[1] > 0.7


def test_inference_data_names_dimensions_coordinates_and_attributes(api):
    data = _arviz.inference_data(GROUPS, DIMS, COORDS, ATTRS)
    for group, variables in GROUPS.items():
        for name, values in variables.items():
            np.testing.assert_array_equal(data[group][name], values)
    assert data["posterior"]["t"].dims == ("chain", "draw", "group")
    assert data["observed_data"]["y"].dims == ("group",)
    assert data["posterior"]["group"].values.tolist() == ["a", "b", "c"]
    assert ATTRS.items() <= data["posterior"].attrs.items()


def test_inference_data_needs_no_observed_data(api):
    groups = {name: GROUPS[name] for name in ("posterior", "sample_stats")}
    data = _arviz.inference_data(groups, DIMS, COORDS, {})
    assert data["posterior"]["mu"].shape == (1, 100)


def test_the_summary_is_a_table_with_a_row_for_each_coordinate(api):
    table = _arviz.summary(_arviz.inference_data(GROUPS, DIMS, COORDS, ATTRS))
    assert list(table.index) == ["mu", "t[a]", "t[b]", "t[c]"]
    assert float(table.loc["mu", "mean"]) == pytest.approx(49.5, rel=0.05)
    assert "mu" in table.to_string()
    assert "<table" in table.to_html()


# ------------------------------------------------------------------ which ArviZ

@pytest.fixture
def choose(monkeypatch):
    """Pick the functions with some module in the place of ``arviz``."""
    def pick(module):
        monkeypatch.setitem(sys.modules, "arviz", module)
        monkeypatch.setattr(_arviz, "_parts", lambda: "1.x")
        monkeypatch.setattr(_arviz, "_legacy", lambda module: "0.x")
        return _arviz._api.__wrapped__()
    return pick


@pytest.mark.parametrize(("module", "expected"), [
    (SimpleNamespace(__version__="0.23.4"), "0.x"),
    (SimpleNamespace(__version__="1.2.0"), "1.x"),
    (None, "1.x"),  # the import fails
], ids=["arviz-0.x", "arviz-1.x", "no-umbrella"])
def test_the_version_is_found_by_what_it_has(choose, module, expected):
    assert choose(module) == expected
