"""The map between named sites and the flat vector."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to
from torch.func import jacrev

from pyro_nfvi.guides import LatentLayout
from tests.cases import MODELS

SUPPORTS = {
    "real": lambda: dist.Normal(0.0, 1.0),
    "positive": lambda: dist.LogNormal(0.0, 1.0),
    "nonnegative": lambda: dist.HalfCauchy(1.0),
    "unit-interval": lambda: dist.Beta(2.0, 2.0),
    "interval": lambda: dist.Uniform(-3.0, 5.0),
    "greater-than": lambda: dist.Pareto(2.0, 3.0),
    "real-vector": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "positive-vector": lambda: dist.Exponential(1.0).expand([2]).to_event(1),
    "real-matrix": lambda: dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "correlation-cholesky": lambda: dist.LKJCholesky(4, 1.0),
    "truncated": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), dist.transforms.ExpTransform()),
}
every_support = pytest.mark.parametrize("name", SUPPORTS)
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layout_of(model, *args) -> LatentLayout:
    return LatentLayout.from_trace(poutine.trace(model).get_trace(*args))


def layout_of_support(name: str, plate: bool = False) -> LatentLayout:
    def model():
        if plate:
            with pyro.plate("two", 2, dim=-3):
                pyro.sample("x", SUPPORTS[name]())
        else:
            pyro.sample("x", SUPPORTS[name]())
    return layout_of(model)


@pytest.mark.parametrize("sample_shape", [(), (1,), (5,), (2, 1, 3)], ids=str)
@every_support
def test_pack_undoes_constrain_to_machine_precision(name, sample_shape):
    layout = layout_of_support(name)
    z = torch.randn(*sample_shape, layout.size)
    values, log_det = layout.constrain(z)
    assert values["x"].shape == (*sample_shape, *layout.sites[0].shape)
    assert log_det.shape == sample_shape
    assert torch.allclose(layout.pack(values), z, rtol=0, atol=1e-12)


@every_support
def test_constrain_undoes_pack_to_machine_precision(name):
    values = {"x": SUPPORTS[name]().sample((4,))}
    layout = layout_of_support(name)
    assert torch.allclose(layout.constrain(layout.pack(values))[0]["x"], values["x"], rtol=1e-10)


@every_support
def test_log_det_matches_autograd(name):
    layout = layout_of_support(name)
    z = torch.randn(layout.size)
    jacobian = jacrev(lambda point: layout.constrain(point)[0]["x"].reshape(-1))(z)
    _, log_det = layout.constrain(z)
    if name == "simplex":  # all but one coordinate of a simplex are free
        jacobian = jacobian[:-1]
    if name == "correlation-cholesky":  # the entries below the diagonal are free
        free = torch.ones(4, 4).tril(-1).reshape(-1).bool()
        jacobian = jacobian[free]
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-12)


@every_support
def test_a_plate_multiplies_sites_and_names_its_dimension(name):
    alone, layout = layout_of_support(name), layout_of_support(name, plate=True)
    site = layout.sites[0]
    assert layout.size == 2 * alone.size
    assert site.plates == ("two", None, None)
    assert site.batch_shape == (2, 1, 1)
    z = torch.randn(3, layout.size)
    values, log_det = layout.constrain(z)
    halves = [alone.constrain(half)[1] for half in z.split(alone.size, -1)]
    assert values["x"].shape == (3, 2, 1, 1, *alone.sites[0].shape)
    assert torch.allclose(log_det, sum(halves))


@every_model
def test_every_model_packs_and_unpacks(name):
    model, make_args = MODELS[name]
    layout = layout_of(model, *make_args())
    z = torch.randn(2, 3, layout.size)
    unpacked = layout.unpack(z)
    values = {site: value for site, (value, _) in unpacked.items()}
    assert torch.allclose(layout.pack(values), z, rtol=0, atol=1e-11)
    for site in layout:
        value, log_det = unpacked[site.name]
        assert value.shape == (2, 3, *site.shape)
        assert log_det.shape == (2, 3, *site.batch_shape)
        assert site.support.check(value).all()
        part = layout.split(z)[site.name]
        expected = biject_to(site.support).log_abs_det_jacobian(part, value)
        assert torch.allclose(log_det.sum(), expected.sum())


@every_model
def test_slices_of_the_vector_are_disjoint_and_cover_it(name):
    model, make_args = MODELS[name]
    layout = layout_of(model, *make_args())
    places = [k for site in layout for k in range(site.start, site.start + site.size)]
    assert places == list(range(layout.size))


def test_names_of_plates_follow_their_dimensions():
    model, make_args = MODELS["nested-plates"]
    plates = {site.name: site.plates for site in layout_of(model, *make_args())}
    assert plates == {"column": ("columns",), "row": ("rows", None), "cell": ("rows", "columns")}


def test_a_batch_without_a_plate_has_no_name():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))
        with poutine.block(), pyro.plate("hidden", 2):
            pass
    assert layout_of(model).sites[0].plates == (None,)


def test_pack_broadcasts_sample_dimensions():
    model, make_args = MODELS["mixed"]
    layout = layout_of(model, *make_args())
    one = layout.constrain(torch.randn(layout.size))[0]
    many = layout.constrain(torch.randn(5, layout.size))[0]
    assert layout.pack({**many, "scale": one["scale"]}).shape == (5, layout.size)


def test_observed_sites_and_deterministic_sites_are_no_latents():
    model, make_args = MODELS["deterministic"]
    assert [site.name for site in layout_of(model, *make_args())] == ["mu", "tau", "eta"]


def test_repr_shows_names_and_shapes():
    model, make_args = MODELS["plates"]
    assert repr(layout_of(model, *make_args())) == "LatentLayout(mu: (), tau: (), theta: (3,))"


# ------------------------------------------------------------------ mistakes

@pytest.fixture
def layout() -> LatentLayout:
    model, make_args = MODELS["plates"]
    return layout_of(model, *make_args())


@pytest.fixture
def values(layout) -> dict:
    return layout.constrain(torch.randn(2, layout.size))[0]


def test_a_missing_site_is_named(layout, values):
    del values["tau"]
    with pytest.raises(ValueError, match=r"'tau' is missing; got \['mu', 'theta'\]"):
        layout.pack(values)


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (2, 4)], ids=str)
def test_a_wrong_shape_is_named(layout, values, shape):
    values["theta"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"site 'theta' of shape \(\*sample, 3\), got"):
        layout.pack(values)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_value_outside_the_support_is_named(layout, values, value):
    values["tau"] = torch.tensor(value)
    with pytest.raises(ValueError, match="site 'tau' within its support"):
        layout.pack(values)


@pytest.mark.parametrize(("z", "message"), [
    (torch.zeros(4), r"`z` of shape \(\*batch, 5\), got \(4,\)"),
    (torch.tensor(1.0), r"`z` of shape \(\*batch, 5\), got \(\)"),
    ([0.0] * 5, "to be a tensor"),
    (torch.zeros(5, dtype=torch.long), "floating-point"),
], ids=["short", "scalar", "list", "integer"])
def test_a_wrong_vector_is_named(layout, z, message):
    for read in (layout.split, layout.unpack, layout.constrain):
        with pytest.raises(ValueError, match=message):
            read(z)
