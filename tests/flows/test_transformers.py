"""The coupling laws, and inverses that are roots."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pyro_nfvi import flows
from pyro_nfvi.flows import (
    Additive,
    Affine,
    Compose,
    Coupling,
    DeepSigmoid,
    Elementwise,
    LeakyReLU,
    LinearSpline,
    LULinear,
    Multiplicative,
    RecurrentNet,
    SinhArcsinh,
    transformers,
)
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.testing import perturb
from tests.cases import MODELS
from tests.engine.fits import Fit
from tests.engine.test_tiers import assert_agree


def test_the_affine_law_is_the_multiplicative_and_then_the_additive():
    u, params = torch.randn(50, 3).double(), 2 * torch.randn(50, 3, 2).double()
    shift, scale = params.split(1, -1)
    scaled, log_scale = Multiplicative().forward(u, scale)
    z, zero = Additive().forward(scaled, shift)
    expected, expected_slope = Affine().forward(u, params)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_scale + zero, expected_slope)


@pytest.mark.parametrize("law", [Affine, Multiplicative])
def test_a_scale_is_clamped_softly(law):
    transformer = law(max_log_scale=2.0)
    params = torch.full((3, 1, transformer.params_per_dim), 1e6).double()
    params *= torch.tensor([-1.0, 1e-8, 1.0]).double()[:, None, None]
    _, log_scale = transformer.forward(torch.ones(3, 1).double(), params)
    torch.testing.assert_close(log_scale.squeeze(-1), torch.tensor([-2.0, 0.01, 2.0]).double(),
                               rtol=1e-4, atol=0)


def test_a_multiplicative_coupling_keeps_signs():
    layer = perturb(Coupling(4, transformer=Multiplicative()), 3.0)
    u = torch.randn(100, 4)
    assert torch.equal(layer(u)[0].sign(), u.sign())


def test_a_known_preimage_saves_the_search(monkeypatch):
    layer = perturb(Coupling(4, transformer=DeepSigmoid(3))).double()
    u = torch.randn(5, 4).double()
    z, log_det = layer(u)
    expected, expected_log_det = layer.inverse(z)
    monkeypatch.setattr(transformers, "increasing_root", None)
    back, log_det_back = layer._inverse_at(u, z, None)
    torch.testing.assert_close(back, expected)
    torch.testing.assert_close(log_det_back, expected_log_det)


def test_a_repr_shows_options_and_nothing_else():
    assert repr(Multiplicative(2.0)) == "Multiplicative(max_log_scale=2.0)"
    assert repr(DeepSigmoid(3)) == "DeepSigmoid(num_units=3, num_layers=1, dense=False)"


# ------------------------------------------------------------------ fits

def with_elementwise(transformer, input_dim):
    return Compose([Elementwise(input_dim, transformer=transformer()), LULinear(input_dim)])


FITS = {
    "naf": partial(flows.naf, num_layers=1, hidden_dims=(8,)),
    "naf-dense": partial(flows.naf, num_layers=1, num_units=3, dense=True, hidden_dims=(8,)),
    "umnn": partial(flows.umnn, num_layers=1, hidden_dims=(8,)),
    "bnaf": partial(flows.bnaf, num_layers=2, block_dim=3),
    "ncsf": partial(flows.ncsf, num_layers=2, hidden_dims=(8,)),
    "recurrent": partial(flows.iaf, num_layers=1, conditioner=partial(RecurrentNet, hidden_dim=8)),
    "linear-spline": partial(Coupling, transformer=LinearSpline()),
    "multiplicative": partial(Coupling, transformer=Multiplicative()),
    "sinh-arcsinh": partial(with_elementwise, SinhArcsinh),
    "leaky-relu": partial(with_elementwise, LeakyReLU),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FITS)
def test_generated_code_fits_by_them(name, dtype):
    fit = Fit(*MODELS["plates"], make=partial(AutoFlow, recipe=FITS[name]), dtype=dtype)
    assert fit.stepper.tier == "c"
    assert_agree(fit)
