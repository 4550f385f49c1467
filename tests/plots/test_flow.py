"""plot_flow: which panels there are, what is on them, and what is refused."""

from __future__ import annotations

import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_nfvi import fit_density, maf, nsf, plot_flow
from pyro_nfvi.flows import (
    Compose,
    Coupling,
    FixedLinear,
    Flow,
    Identity,
    Inverse,
    Planar,
    StudentT,
    Triangular,
)
from pyro_nfvi.plots.flow import NUM_GRID, NUM_LINES, REACH
from pyro_nfvi.testing import perturb

mpl.use("Agg")
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def bent(dtype=DOUBLE):
    """A flow of three layers away from the identity."""
    shift = FixedLinear(torch.tensor([10.0, -4.0]), torch.tensor([[2.0, 0.0], [1.0, 0.5]]))
    return perturb(Flow(Compose([Coupling(2), Planar(2), shift])), 0.5).to(dtype)


def titles(axes):
    return [ax.get_title(loc="left") for ax in axes]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_grid_ends_where_the_flow_puts_it(dtype):
    flow = bent(dtype)
    axes = plot_flow(flow)
    assert titles(axes) == ["density of the flow", "draws", "noise", "1: Coupling", "2: Planar",
                            "3: FixedLinear"]
    for ax, carry in ((axes[2], lambda u: u), (axes[-1], lambda u: flow.bijection(u)[0])):
        assert len(ax.lines) == 2 * NUM_LINES
        ends = np.stack([line.get_xydata()[[0, -1]] for line in ax.lines])
        u = torch.tensor([[-REACH, -REACH], [REACH, -REACH]], dtype=dtype)  # the lowest line
        assert np.allclose(ends[0], carry(u).detach(), atol=1e-5)
        u = torch.tensor([[REACH, -REACH], [REACH, REACH]], dtype=dtype)  # and the rightmost
        assert np.allclose(ends[-1], carry(u).detach(), atol=1e-5)


def test_the_density_is_that_of_the_flow():
    flow = bent()
    ax = plot_flow(flow, limits=(0, 20, -14, 6))[0]
    values = np.asarray(ax.collections[0].get_array()).reshape(NUM_GRID, NUM_GRID)
    x, y = np.linspace(0, 20, NUM_GRID), np.linspace(-14, 6, NUM_GRID)
    i, j = 120, 90  # row: y; column: x
    ratio = flow.log_prob(torch.tensor([[x[j], y[i]], [x[100], y[100]]])).detach()
    assert values[i, j] / values[100, 100] == pytest.approx((ratio[0] - ratio[1]).exp().item())
    assert values.max() == 1


def test_data_and_target_have_panels_of_their_own_and_are_in_sight():
    data = np.random.default_rng(0).normal(50, 1, (100, 2))
    axes = plot_flow(Flow(Triangular(2)), samples=data, num_samples=300,
                     log_density=lambda z: -z.square().sum(-1))
    assert titles(axes)[:4] == ["density of the flow", "target density", "draws", "data"]
    assert axes[3].get_xlim()[1] > 51
    assert [len(ax.collections[0].get_offsets()) for ax in axes[2:4]] == [300, 100]
    assert np.asarray(axes[1].collections[0].get_array()).max() == 1


def test_many_layers_are_shown_at_even_distances_the_last_among_them():
    axes = plot_flow(Flow(Compose([Planar(2) for _ in range(32)])), num_layers=4)
    assert titles(axes)[2:] == ["noise", "8: Planar", "16: Planar", "24: Planar", "32: Planar"]


def test_layers_within_layers_and_turned_round_are_shown_one_by_one():
    inner = perturb(Compose([Planar(2), Coupling(2)]).double(), 0.5)
    flow = Flow(Compose([Inverse(inner), Compose([Identity(2)])])).double()
    axes = plot_flow(flow)
    assert titles(axes)[2:] == ["noise", "1: Coupling, inverted", "2: Planar, inverted",
                                "3: Identity"]
    u = torch.full((1, 2), -REACH, dtype=DOUBLE)
    assert np.allclose(axes[-1].lines[0].get_xydata()[0], flow.bijection(u)[0].detach(), atol=1e-6)


def test_a_fitted_conditional_flow_is_drawn_at_its_context():
    c = torch.randn(200, 1)
    x = torch.cat([100 * c, c], -1) + torch.randn(200, 2)
    fitted = fit_density(maf(2, 1, num_layers=1), samples=x, context=c, num_steps=5, seed=0,
                         progress=False, compile="eager")
    at = torch.tensor([2.0])
    named, given = plot_flow(fitted, context=at), plot_flow(fitted.condition(at))
    assert titles(named) == titles(given)
    assert titles(named)[2:] == ["noise", "1: Autoregressive, inverted", "2: FixedLinear",
                                 "3: FixedRegression"]
    assert 190 < np.mean(named[1].get_xlim()) < 210
    u = torch.full((1, 2), -REACH)
    expected = fitted.flow.bijection(u, at)[0]
    for axes in (named, given):
        assert np.allclose(axes[-1].lines[0].get_xydata()[0], expected, rtol=1e-4)


def test_noise_without_variance_has_a_grid():
    axes = plot_flow(Flow(Triangular(2), StudentT(2, df=1.5)))
    assert axes[2].lines[0].get_xydata()[0, 0] == -REACH


def test_drawing_leaves_the_random_state_and_the_flow_alone():
    flow, state = Flow(nsf(2, num_layers=1)), torch.get_rng_state()
    plot_flow(flow)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in flow.parameters())


def test_a_target_without_density_at_some_points_is_drawn():
    plot_flow(Flow(Triangular(2)), log_density=lambda z: torch.where(
        z[:, 0] > 0, -z.square().sum(-1), torch.nan))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"flow": nsf(2)}, "expected `flow` to be a Flow or a fitted one, got Compose. Of a bijection "
                       "make one: Flow(bijection)."),
    ({"flow": Flow(nsf(3))}, "draws flows over two coordinates, got 3. Draw samples of it instead"),
    ({"flow": Flow(nsf(2, 1))}, "expected `context` of shape (*batch, 1), got None."),
    ({"flow": Flow(nsf(2, 1)), "context": torch.zeros(5, 1)}, "one `context` of shape (1,), got "
                                                              "(5, 1). Choose one: context=c[0]."),
    ({"context": torch.zeros(1)}, "takes no `context`"),
    ({"samples": torch.zeros(5, 3)}, "`samples` of shape (n, 2), got (5, 3)."),
    ({"samples": np.zeros((0, 2))}, "`samples` of shape (n, 2), got (0, 2)."),
    ({"num_samples": 0}, "`num_samples` to be an integer >= 1"),
    ({"num_layers": 0}, "`num_layers` to be an integer >= 1")])
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_flow(**{"flow": Flow(Triangular(2)), **arguments})
