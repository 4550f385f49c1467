"""plots: what the pictures of a fit show, on any numbers, under both versions of ArviZ."""

from __future__ import annotations

import arviz
import matplotlib as mpl
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.path import Path
from scipy import integrate, stats

from pyro_nfvi import _arviz
from pyro_nfvi.inference import History, Stage
from pyro_nfvi.plots import (
    plot_elbo,
    plot_marginals,
    plot_pairs,
    plot_pareto_k,
    plot_predictive,
    plot_weights,
)
from pyro_nfvi.plots.components import components
from pyro_nfvi.plots.density import density_of, view
from pyro_nfvi.plots.pairs import _density_2d, _plot_contours
from pyro_nfvi.plots.pareto_k import MAX_SITES
from pyro_nfvi.plots.predictive_checks import predictive_sites
from pyro_nfvi.plots.text import MAX_LABEL, short
from pyro_nfvi.plots.weights import weight_tail
from tests.test_arviz import APIS

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=4000)


@pytest.fixture(params=APIS)
def api(request, monkeypatch):
    made = _arviz._legacy(arviz) if request.param == "legacy" else _arviz._parts()
    monkeypatch.setattr(_arviz, "_api", lambda: made)


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    mpl.pyplot.close("all")


def data(posterior=None, dims=None, coords=None, **groups):
    posterior = {"mu": NORMAL} if posterior is None else posterior
    groups = {name: {site: values if name == "observed_data" else values[None]
                     for site, values in group.items()}
              for name, group in {"posterior": posterior, **groups}.items()}
    return _arviz.inference_data(groups, dims or {}, coords or {}, {})


def schools():
    theta = NORMAL[:, None] + RNG.normal(size=(4000, 3))
    return data({"mu": NORMAL, "tau": np.exp(NORMAL), "theta": theta}, {"theta": ["school"]},
                {"school": ["A", "$B$", "C & D"]})


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def drawn(figure):
    """Draw it, which is when labels and layout are worked out."""
    figure.canvas.draw()
    return figure


def axes():
    return Figure(layout="constrained").subplots()


# ------------------------------------------------------------------ ELBO

def test_the_limits_of_the_elbo_leave_out_the_start_and_what_is_not_finite():
    elbo = np.r_[np.full(10, -1e6), np.linspace(-2, -1, 90), np.nan, -np.inf]
    ax = plot_elbo(History(list(elbo), stages=[Stage("flow", len(elbo))]), axes())
    low, high = ax.get_ylim()
    assert -2.2 < low < -1.9
    assert -1.0 < high < -0.9
    drawn(ax.figure)


def test_a_flat_elbo_of_any_size_has_limits():
    for value in (0.0, -3.0, -1e30):
        low, high = plot_elbo(History([value] * 20), axes()).get_ylim()
        assert low < value < high


def test_an_elbo_that_is_never_finite_is_drawn_without_error():
    drawn(plot_elbo(History([float("nan")] * 20), axes()).figure)


# ------------------------------------------------------------------ weights

@pytest.mark.parametrize("shape", [0.2, 0.7])
def test_the_fitted_tail_is_the_generalized_pareto_of_arviz(api, shape):
    log_ratios = -shape * np.log(RNG.uniform(size=10_000))
    tail = weight_tail(log_ratios)
    assert tail.pareto_k == pytest.approx(_arviz.psis(log_ratios)[1], rel=1e-6)
    assert len(tail.fitted) == _arviz.tail_length(10_000) == 300
    above = (np.arange(300) + 0.5) / 300
    truth = tail.start + stats.genpareto(tail.pareto_k, scale=tail.scale).isf(above)
    cut = truth > tail.ratios[0]  # ArviZ cuts at the largest ratio
    assert cut.mean() < 0.05
    np.testing.assert_allclose(tail.fitted[~cut], truth[~cut], rtol=1e-6)
    # k-hat has a standard error of (1 + k) / sqrt(300) and is drawn to 0.5 by 10 / 310.
    assert abs(tail.pareto_k - shape) < 4 * (1 + shape) / 300 ** 0.5 + 10 / 310


def test_the_ratios_are_in_units_of_their_mean_and_fall():
    log_ratios = torch.from_numpy(NORMAL)[:1000].float() + 50
    tail = weight_tail(log_ratios)
    ratios = np.sort(log_ratios.double().exp().numpy())[::-1]
    np.testing.assert_allclose(tail.ratios, (ratios / ratios.mean())[: len(tail.ratios)], rtol=1e-9)
    np.testing.assert_allclose(tail.exceed[:3], [0.0005, 0.0015, 0.0025])
    assert tail.num_draws == 1000


def test_the_bar_is_a_tail_of_its_own_shape_with_the_start_and_scale_of_the_fit():
    tail = weight_tail(0.5 * NORMAL)
    np.testing.assert_allclose(tail.quantiles(tail.pareto_k)[5:], tail.fitted[5:], rtol=1e-8)
    bar = tail.quantiles(0.7)
    assert tail.pareto_k < 0.7
    assert bar[0] > tail.fitted[0]
    assert np.all(np.diff(bar) < 0)


def test_the_picture_of_the_weights_names_k_hat_and_the_bar():
    ax = plot_weights(3 * NORMAL, axes(), threshold=0.65)
    k = _arviz.psis(3 * NORMAL)[1]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["draws", f"fitted Pareto, k-hat {k:.2f}", "the bar, 0.65"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    ticks = [text.get_text() for text in drawn(ax.figure).axes[0].get_yticklabels()]
    assert "0.01" in ticks


@pytest.mark.parametrize(("log_ratios", "words"), [
    (np.zeros(1000), "equal"), (NORMAL[:10], "too few"), (NORMAL[:1], "too few")])
def test_weights_without_a_tail_are_drawn_and_say_so(log_ratios, words):
    ax = plot_weights(log_ratios, axes())
    assert words in ax.get_title()
    drawn(ax.figure)


@pytest.mark.parametrize("log_ratios", [
    np.r_[np.zeros(9999), 800.0], 1000 * NORMAL, np.r_[NORMAL, [np.nan, -np.inf, np.inf]],
    1e-12 * NORMAL], ids=["one-has-all", "huge", "not-finite", "all-but-equal"])
def test_wild_weights_are_drawn(log_ratios):
    drawn(plot_weights(log_ratios, axes()).figure)


def test_no_finite_weight_is_refused():
    with pytest.raises(ValueError, match=r"plot_weights expected `log_ratios` with finite .* 3\."):
        plot_weights(torch.full((3,), torch.nan))


# ------------------------------------------------------------------ k-hat by site

def test_the_worst_site_is_on_top_and_every_k_hat_is_written():
    ks = {"good": 0.1, "bad": 0.9, "exact": -np.inf, "lost": np.nan, "none": np.inf, "far": 30.0,
          "mid": 0.6}
    ax = plot_pareto_k(ks, 0.7, axes())
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "lost", "none", "far", "bad", "mid", "good", "exact"]
    assert [t.get_text() for t in ax.texts] == [
        "unknown", "infinite", "30.00", "0.90", "0.60", "0.10", "no tail"]
    low, high = ax.get_xlim()
    places = [line.get_xdata()[0] for line in ax.lines if line.get_marker() in "oXs"]
    assert len(places) == 7
    assert all(low < place < high for place in places)
    markers = {t: m for t, m in zip(["bad", "mid", "good"], [
        line.get_marker() for line in ax.lines if line.get_marker() in "oXs"][3:6], strict=True)}
    assert markers == {"bad": "X", "mid": "s", "good": "o"}  # the colour is not alone
    assert {line.get_xdata()[0] for line in ax.lines if line.get_linestyle() in (":", "--")} == {
        0.5, 0.7}
    drawn(ax.figure)


def test_many_sites_are_capped_and_the_title_says_how_many_are_left_out():
    ax = plot_pareto_k({f"site{i}": i / 100 for i in range(60)}, ax=axes())
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == [f"site{i}" for i in range(59, 59 - MAX_SITES, -1)]
    assert ax.get_title() == f"worst k-hat first; {60 - MAX_SITES} more sites left out"


def test_no_site_is_refused():
    with pytest.raises(ValueError, match="plot_pareto_k expected `site_pareto_k` with at least"):
        plot_pareto_k({})


# ------------------------------------------------------------------ which components

def test_components_have_the_names_and_draws_of_arvizs_data(api):
    chosen, num_left = components("plot", schools())
    assert [one.label for one in chosen] == ["mu", "tau", "theta[A]", "theta[$B$]",
                                             "theta[C & D]"]
    assert num_left == 0
    np.testing.assert_array_equal(chosen[0].draws, NORMAL)
    assert np.isnan(chosen[0].gap)


def test_components_of_several_dimensions_are_numbered_like_arvizs_table(api):
    made = data({"cov": RNG.normal(size=(100, 2, 3))})
    labels = [one.label for one in components("plot", made)[0]]
    assert labels == list(_arviz.summary(made).index)
    assert labels[4] == "cov[1, 1]"


def test_the_worst_k_hat_comes_first_where_not_all_can_be_shown():
    ks = {"mu": 0.1, "tau": 0.6, "theta": 0.2, "theta[C & D]": float("nan")}
    take = {"pareto_k": ks, "most": 3}
    chosen, num_left = components("plot", schools(), **take)
    assert [one.label for one in chosen] == ["theta[C & D]", "tau", "theta[A]"]
    assert num_left == 2
    spread, _ = components("plot", schools(), spread=True, **take)
    assert [one.label for one in spread] == ["theta[C & D]", "tau", "mu"]  # one of each site


def test_the_farthest_from_the_reference_comes_first_where_k_hat_does_not_tell():
    wide = {"x": RNG.normal(size=(1000, 30))}
    reference = {"x": RNG.normal(size=(500, 30)) + 5 * (np.arange(30) == 17)}
    chosen, _ = components("plot", wide, reference, most=2)
    assert chosen[0].label == "x[17]"
    assert abs(chosen[0].gap - 5) < 0.5


def test_numbers_that_do_not_vary_come_last_where_not_all_can_be_shown():
    factor = RNG.normal(size=(100, 2, 2))
    factor[:, 0, 0], factor[:, 0, 1] = 1, 0
    draws = {"corr": factor, "x": RNG.normal(size=(100, 9))}
    for spread in (False, True):
        chosen, _ = components("plot", draws, pareto_k={"corr": 0.9}, most=11, spread=spread)
        assert {"corr[1, 0]", "corr[1, 1]"} <= {one.label for one in chosen}
        assert not {"corr[0, 0]", "corr[0, 1]"} & {one.label for one in chosen}
    assert len(components("plot", draws, most=13)[0]) == 13


@pytest.mark.parametrize("reference", [
    {"x": torch.randn(50, 2)}, {"x": np.zeros((4, 25, 2))}, data({"x": np.zeros((50, 2))})],
    ids=["tensors", "chains", "arviz"])
def test_a_reference_may_be_draws_by_site_or_arviz_data(reference):
    chosen, _ = components("plot", {"x": np.ones((10, 2)), "y": np.ones(10)}, reference)
    sizes = [None if one.reference is None else len(one.reference) for one in chosen]
    assert sizes == [next(n for n in (50, 100) if n == sizes[0])] * 2 + [None]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"reference": {"nope": NORMAL}}, r"`reference` to have one of the sites mu, tau, theta, got "
                                      r"nope\."),
    ({"reference": {"theta": np.zeros((100, 2))}},
     r"reference's 'theta' of shape \(num_draws, 3\), got \(100, 2\)\."),
    ({"reference": 3}, r"`reference` to be ArviZ data .* got int\."),
    ({"var_names": ["mu", "nu"]}, r"`var_names` to name sites .*\(mu, tau, theta\), got 'nu'\."),
    ({"data": {}}, r"`data` to be ArviZ data .* got dict\."),
    ({"data": NORMAL}, r"`data` to be ArviZ data .* got ndarray\."),
])
@pytest.mark.parametrize("plot", [plot_marginals, plot_pairs])
def test_what_does_not_fit_is_refused_in_one_sentence(plot, arguments, message):
    with pytest.raises(ValueError, match=f"{plot.__name__} expected (the )?{message}"):
        plot(**{"data": schools()} | arguments)


# ------------------------------------------------------------------ marginals

def test_the_density_of_a_normal_is_drawn(api):
    grid, density = density_of(NORMAL, view([NORMAL]))
    assert abs(integrate.trapezoid(density, grid) - 1) < 0.02
    # A kernel estimate from 4,000 draws: its error is at most some percent of the peak, 0.4.
    np.testing.assert_allclose(density[1:-1], stats.norm.pdf(grid[1:-1]), atol=0.035)


def test_the_density_does_not_depend_on_the_scale(api):
    for scale in (1e-200, 1e200):
        grid, density = density_of(NORMAL * scale, view([NORMAL * scale]))
        assert abs(integrate.trapezoid(density * scale, grid / scale) - 1) < 0.02


def test_a_heavy_tail_does_not_hide_the_middle(api):
    values = RNG.standard_cauchy(4000)
    low, high = view([values])
    assert -150 < low < high < 150
    grid, density = density_of(values, (low, high))
    assert 0.95 < integrate.trapezoid(density, grid) < 1.02


def test_few_different_values_are_spikes_of_their_frequency():
    grid, density = density_of(np.repeat([0.0, 1.0], [30, 70]), (-1.0, 2.0))
    assert sorted(set(density)) == [0.0, 0.3, 0.7]
    assert abs(grid[density == 0.7].mean() - 1) < 1e-9


def test_the_edge_of_a_positive_number_is_not_smoothed_away(api):
    values = RNG.exponential(size=4000)
    grid, density = density_of(values, view([values]))
    assert grid[0] > 0
    assert density[1] > 0.8  # an unbounded kernel would give half


def test_marginals_show_a_panel_for_each_number_beside_the_reference(api):
    reference = {"mu": torch.randn(500), "theta": torch.randn(500, 3)}
    figure = drawn(plot_marginals(schools(), reference, figure=Figure(layout="constrained")))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["mu", "tau", "theta[A]", "theta[$B$]", "theta[C & D]"]
    assert [len(ax.lines) for ax in figure.axes] == [1] * 5
    assert [len(ax.collections) for ax in figure.axes] == [1, 0, 1, 1, 1]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"fit", "reference"}


def test_many_marginals_are_capped_and_the_figure_says_how_many_are_left_out():
    figure = plot_marginals({"x": RNG.normal(size=(100, 500))}, most=6, pareto_k={"x": 0.3})
    assert len(figure.axes) == 6
    assert "worst k-hat first; 494 more numbers left out" in texts(figure)


WILD = {
    "constant": np.ones(200), "nan": np.full(200, np.nan), "some-nan": np.where(
        NORMAL[:200] > 0, NORMAL[:200], np.nan), "infinite": np.where(
        NORMAL[:200] > 0, NORMAL[:200], np.inf), "huge": NORMAL[:200] * 1e306,
    "rounding": 1 + NORMAL[:200] * 1e-15, "denormal": NORMAL[:200] * 1e-310,
    "boolean": NORMAL[:200] > 0, "counts": RNG.poisson(200, 200), "float32": np.float32(
        NORMAL[:200]), "one-draw": NORMAL[:1]}


@pytest.mark.parametrize("values", WILD.values(), ids=WILD.keys())
def test_numbers_of_any_kind_are_drawn(values):
    draws = {"x": values, "y": NORMAL[: len(values)]}
    drawn(plot_marginals(draws, {"x": NORMAL[:100]}, figure=Figure(layout="constrained")))
    drawn(plot_marginals({"y": NORMAL[:100], "x": NORMAL[:100]}, draws))
    drawn(plot_pairs(draws, {"x": NORMAL[:99], "y": NORMAL[1:100]}))


def test_a_single_number_has_marginals_and_pairs():
    assert len(plot_marginals({"x": NORMAL}).axes) == 1
    assert len(plot_pairs({"x": NORMAL}).axes) == 1


def test_a_posterior_of_nothing_is_refused():
    with pytest.raises(ValueError, match="plot_marginals expected a posterior with at least one"):
        plot_marginals({"x": np.zeros((100, 0))})
    with pytest.raises(ValueError, match="plot_pairs expected finite draws"):
        plot_pairs({"x": np.zeros((100, 0))})


# ------------------------------------------------------------------ pairs

def test_the_contours_hold_half_and_nine_tenths_of_the_draws():
    x, y = NORMAL, 0.6 * NORMAL + RNG.normal(size=4000)
    ax = axes()
    _plot_contours(ax, x, y, [view([x]), view([y])])
    inner, outer = (max(lines, key=len) for lines in ax.collections[0].allsegs[::-1])
    inside = [Path(line).contains_points(np.c_[x, y]).mean() for line in (inner, outer)]
    # Smoothing widens the contours a little, and they are lines between cells.
    np.testing.assert_allclose(inside, [0.5, 0.9], atol=0.04)


def test_the_smoothed_histogram_keeps_its_mass_at_an_edge():
    x, y = RNG.exponential(size=4000), NORMAL
    density = _density_2d(x, y, [view([x]), view([y])])
    inside = np.histogram2d(x, y, 50, [view([x]), view([y])])[0].sum()
    assert density.sum() == pytest.approx(inside)


def test_pairs_are_a_lower_triangle_with_one_number_of_each_site_first():
    figure = drawn(plot_pairs(schools(), {"mu": NORMAL, "tau": np.exp(NORMAL)}, most=3,
                              pareto_k={"theta": 0.6, "mu": 0.1, "tau": 0.2}))
    assert len(figure.axes) == 6
    assert [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()] == ["theta[A]", "tau", "mu"]
    assert "worst k-hat first; 2 more numbers left out" in texts(figure)


# ------------------------------------------------------------------ predictive checks

def checks(observed, draws, name="y"):
    made = data(posterior_predictive={name: np.asarray(draws)},
                observed_data={name: np.asarray(observed)})
    return predictive_sites(made)[0]


def test_a_calibrated_model_has_nine_tenths_of_the_observations_inside(api):
    site = checks(RNG.normal(size=2000), RNG.normal(size=(400, 2000)))
    error = (0.9 * 0.1 / 2000) ** 0.5
    assert abs(site.inside.mean() - 0.9) < 4 * error + 0.01  # 400 draws know their ends to 1%
    assert site.form == "densities"
    assert f"of {len(site.observed):,} observations" in site.words


@pytest.mark.parametrize(("observed", "draws", "form"), [
    (RNG.normal(size=8), RNG.normal(size=(100, 8)), "intervals"),
    (RNG.normal(size=300), RNG.normal(size=(100, 300)), "densities"),
    (RNG.integers(0, 2, 8), RNG.integers(0, 2, (100, 8)), "columns"),
    (RNG.poisson(3, 300), RNG.poisson(3, (100, 300)), "columns"),
    (RNG.poisson(300, 300), RNG.poisson(300, (100, 300)), "densities"),
    (RNG.poisson(9, 8), RNG.poisson(9, (100, 8)), "intervals"),
    (RNG.random(20) < 0.5, RNG.random((100, 20)) < 0.5, "columns"),
    (np.array(1.5), RNG.normal(size=100), "intervals"),
    (RNG.normal(size=(5, 4)), RNG.normal(size=(100, 5, 4)), "intervals"),
    (np.r_[np.nan, np.ones(7)], RNG.normal(size=(100, 8)), "intervals"),
], ids=["few", "many", "binary", "counts", "large-counts", "few-counts", "boolean", "one", "matrix",
        "missing"])
def test_each_kind_of_observation_has_its_form(observed, draws, form):
    assert checks(observed, draws).form == form
    made = data(posterior_predictive={"y": draws}, observed_data={"y": observed})
    figure = drawn(plot_predictive(made, figure=Figure(layout="constrained")))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("predicted" in label for label in labels)
    assert "observed" in labels


def test_an_observation_outside_its_interval_is_marked_by_more_than_colour():
    observed = np.r_[np.zeros(7), 50.0]
    made = data(posterior_predictive={"y": RNG.normal(size=(200, 8))},
                observed_data={"y": observed})
    (ax,) = plot_predictive(made).axes
    (outside,) = [line for line in ax.lines if line.get_marker() == "X"]
    assert outside.get_ydata().tolist() == [50.0]
    assert checks(observed, RNG.normal(size=(200, 8))).words == (
        "7 of 8 observations are within their 90% intervals")


def test_the_frequencies_of_values_are_those_of_the_data():
    site = checks([0, 0, 1, 2] * 20, RNG.integers(0, 3, (200, 80)))
    observed, drawn_ = site.frequencies
    np.testing.assert_allclose(observed, [0.5, 0.25, 0.25])
    np.testing.assert_allclose(drawn_.sum(1), 1)
    assert "of 3 values" in site.words


def test_sites_that_agree_least_come_first_and_the_others_are_counted():
    sites = {f"y{i}": RNG.normal(size=20) for i in range(4)}
    draws = {name: RNG.normal(size=(100, 20)) + 10 * (name == "y2") for name in sites}
    made = data(posterior_predictive=draws, observed_data=sites)
    figure = drawn(plot_predictive(made, most=2))
    assert [ax.get_title(loc="left") for ax in figure.axes][0] == "y2"
    assert "those that agree least first; 2 more sites left out" in texts(figure)


def test_many_observations_and_draws_are_thinned_evenly():
    site = checks(np.arange(10_000.0), np.broadcast_to(np.arange(10_000.0), (1500, 10_000)))
    assert site.draws.shape == (500, 2000)
    assert np.ptp(np.diff(site.observed)) == 0


@pytest.mark.parametrize("made", [
    data(), data(posterior_predictive={"y": np.zeros((10, 3))}),
    data(posterior_predictive={"y": np.zeros((10, 3))}, observed_data={"z": np.zeros(3)}),
    data(posterior_predictive={"y": np.zeros((10, 3))}, observed_data={"y": np.zeros(4)}),
    data(posterior_predictive={"y": np.full((10, 3), np.nan)}, observed_data={"y": np.zeros(3)}),
    data(posterior_predictive={"y": np.zeros((10, 3))}, observed_data={"y": np.full(3, np.nan)}),
    {"y": NORMAL}, None], ids=["no-group", "no-data", "other-site", "other-shape", "nan-draws",
                               "nan-data", "draws", "none"])
def test_nothing_to_compare_is_refused_in_one_sentence(made):
    with pytest.raises(ValueError, match=r"plot_predictive expected data with observed_data and"):
        plot_predictive(made)


# ------------------------------------------------------------------ figures

def test_labels_are_shown_as_they_are_written():
    figure = drawn(plot_pairs({"a$\\frac{$": NORMAL, "b_{$x": NORMAL}))
    assert {"a$\\frac{$", "b_{$x"} <= set(texts(figure))
    assert short("x\n\t\x00y") == "x \N{REPLACEMENT CHARACTER}y"
    assert len(short("a" * 90 + "[12, 345]")) == MAX_LABEL
    assert short("a" * 90 + "[12, 345]").endswith("[12, 345]")


@pytest.mark.parametrize("plot", [
    lambda **kw: plot_marginals({"x": NORMAL}, **kw), lambda **kw: plot_pairs({"x": NORMAL}, **kw),
    lambda **kw: plot_predictive(data(posterior_predictive={"y": NORMAL[:, None]},
                                      observed_data={"y": np.zeros(1)}), **kw)],
    ids=["marginals", "pairs", "predictive"])
def test_a_figure_of_yours_is_drawn_on_and_pyplot_is_not_asked(plot):
    figure = Figure(layout="constrained")
    assert plot(figure=figure) is figure
    assert not mpl.pyplot.get_fignums()
    assert plot() is mpl.pyplot.gcf()


@pytest.mark.parametrize("plot", [
    lambda ax: plot_weights(NORMAL, ax), lambda ax: plot_pareto_k({"x": 0.3}, ax=ax),
    lambda ax: plot_elbo(History([1.0, 2.0]), ax)], ids=["weights", "k-hat", "elbo"])
def test_axes_of_yours_are_drawn_on_and_pyplot_is_not_asked(plot):
    ax = axes()
    assert plot(ax) is ax
    assert not mpl.pyplot.get_fignums()
    assert plot(None) is mpl.pyplot.gca()
