"""Linear splines: interpolation as numpy does it, and an exact density."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pyro_nfvi.flows import Coupling, Elementwise, Flow, LinearSpline
from pyro_nfvi.flows.spline import MIN_BIN, bin_sizes
from pyro_nfvi.testing import perturb

SPLINE = LinearSpline(num_bins=6)


def random(count: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(count, 1, SPLINE.params_per_dim, dtype=dtype)


def knots(params: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Knots of input and output, the output box undone."""
    sizes = bin_sizes(params[:12].unflatten(0, (2, 6)).mT, 5.0).mT.numpy()
    return tuple(np.concatenate([[-5.0], -5.0 + row.cumsum()]) for row in sizes)


def test_it_interpolates_between_its_knots():
    params = random(20, 2.0)
    params[..., -2:] = 0  # no output box
    u = torch.linspace(-4.99, 4.99, 201).double()
    for row in params[:, 0]:
        x, y = knots(row)
        z, _ = SPLINE.forward(u.unsqueeze(-1), row.expand(201, 1, -1))
        np.testing.assert_allclose(z.squeeze(-1), np.interp(u, x, y), rtol=1e-12, atol=1e-12)
        back, _ = SPLINE.inverse(u.unsqueeze(-1), row.expand(201, 1, -1))
        np.testing.assert_allclose(back.squeeze(-1), np.interp(u, y, x), rtol=1e-12, atol=1e-12)


def test_the_end_pieces_go_on_outside():
    params = random(50)
    for side in (-1, 1):
        (near, slope), (far, same) = (
            SPLINE.forward(torch.full((50, 1), side * u).double(), params) for u in (4.9999, 1e3))
        torch.testing.assert_close(slope, same)
        torch.testing.assert_close((far - near) / (side * (1e3 - 4.9999)), slope.exp())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.float64, 1e-9)],
                         ids=["float32", "float64"])
@pytest.mark.parametrize("reach", [4.0, 1e3])
def test_extreme_parameters_invert(reach, dtype, tolerance):
    params = random(20_000, 5.0, dtype)
    u = reach * torch.randn(20_000, 1, dtype=dtype)
    z, log_slope = SPLINE.forward(u, params)
    back, log_slope_back = SPLINE.inverse(z, params)
    for result in (z, log_slope, back, log_slope_back):
        assert result.isfinite().all()
    torch.testing.assert_close(back, u, rtol=tolerance, atol=tolerance)


def test_its_density_integrates_to_one_piece_by_piece():
    flow = perturb(Flow(Elementwise(1, transformer=SPLINE)), 2.0).double()
    with torch.no_grad():
        ends, _ = flow.bijection(torch.tensor([[-9.0], *knots(flow.bijection.params().mT[0])[0][
            :, None].tolist(), [9.0]]).double())
        total = 0.0
        for low, high in zip(ends[:-1], ends[1:], strict=True):
            z = torch.linspace(float(low) + 1e-9, float(high) - 1e-9, 2001).double()
            total += torch.trapezoid(flow.log_prob(z.unsqueeze(-1)).exp(), z).item()
    assert total == pytest.approx(1, abs=1e-5)


def test_bins_have_a_least_size():
    sizes = bin_sizes(50 * torch.randn(2, 8, 100).double(), 3.0)
    torch.testing.assert_close(sizes.sum(-2), torch.full((2, 100), 6.0).double())
    assert (sizes >= 6 * MIN_BIN - 1e-12).all()


@pytest.mark.parametrize(("make", "message"), [
    (partial(LinearSpline, 1), "`num_bins` to be an integer >= 2, got 1."),
    (partial(LinearSpline, 1000), "`num_bins` below 1000, got 1000."),
    (partial(LinearSpline, bound=0), "`bound` to be a positive number, got 0."),
])
def test_a_wrong_option_is_named(make, message):
    with pytest.raises(ValueError, match=f"^LinearSpline expected {message}$"):
        make()


def test_a_layer_with_extreme_weights_stays_finite_in_float32():
    layer = perturb(Coupling(4, transformer=SPLINE), 10.0)
    with torch.no_grad():
        for direction in (layer, layer.inverse):
            for result in direction(torch.randn(50_000, 4)):
                assert result.isfinite().all()
