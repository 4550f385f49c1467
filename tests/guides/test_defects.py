"""The defects of Pyro's own flow guides that ours must not have, by their number.

Where it is cheap, a test runs on Pyro's guide too and asserts the defect there, so that it stays
clear what is tested (and we learn when Pyro mends it).
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoNormalizingFlow,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam, ClippedAdam
from torch.distributions import ComposeTransform

from pyro_nfvi.flows import Sylvester, maf, nice, nsf, realnvp
from pyro_nfvi.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoSpline
from pyro_nfvi.testing import perturb
from tests.cases import GUIDES

KINDS = [AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoSpline]
every_kind = pytest.mark.parametrize("kind", KINDS)
pyros = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
torch_script = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
every_guide = pytest.mark.parametrize("guide", GUIDES)
PyroPlanar = partial(AutoNormalizingFlow, init_transform_fn=partial(pyro_transforms.planar))


def normal(size: int = 2):
    """A correlated Gaussian away from the origin."""
    pyro.sample("x", dist.Normal(torch.full((size,), 2.0), 0.5).to_event(1))


def wide():
    normal(5)


def fit(model, guide, num_steps: int = 5, lr: float = 0.05, elbo=None, args: tuple = ()) -> float:
    """Some steps of SVI; the last loss."""
    svi = SVI(model, guide, Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(num_steps)][-1]


def values_of(guide) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in guide.named_parameters()}


def moved(guide, before) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in guide.named_parameters())


def seeded_loss(model, guide, *args) -> float:
    pyro.set_rng_seed(7)
    return Trace_ELBO().loss(model, guide, *args)


# ------------------------------------------------------------------ D1: the param store

@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal, PyroPlanar], ids=lambda kind: getattr(
    kind, "__name__", "AutoNormalizingFlow"))
def test_d01_second_guide_of_a_class_trains(kind):
    fit(normal, kind(normal))
    second = kind(normal)
    second()
    before = values_of(second)
    fit(normal, second)
    assert moved(second, before) is issubclass(getattr(kind, "func", kind), AutoFlow)


@every_kind
def test_d01_second_guide_learns_the_posterior(kind):
    fit(normal, kind(normal), 1, lr=1e-6)
    guide = kind(normal)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    assert mean_loss(elbo, normal, guide, 50) > 1.0
    svi = SVI(normal, guide, ClippedAdam({"lr": 0.03}), elbo)
    losses = torch.tensor([svi.step() for _ in range(150)])
    assert losses[-40:].mean() < 0.5  # the exact one is zero


@every_kind
def test_d01_guides_of_a_class_with_other_sizes_both_train(kind):
    for model in (normal, wide, normal):
        guide = kind(model)
        guide()
        before = values_of(guide)
        fit(model, guide)
        assert moved(guide, before)


def test_d01_guides_of_a_class_with_other_flows_both_train():
    for recipe in (nsf, realnvp, maf, nice, nsf):
        guide = AutoFlow(normal, recipe, num_layers=2)
        guide()
        before = values_of(guide)
        fit(normal, guide)
        assert moved(guide, before)


@pytest.mark.parametrize("name", ["iaf", "default", "planar", "mixture", "from-pyro", "from-zuko"])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_d01_param_store_loads_into_a_guide_to_the_digit_and_it_trains_on(name, called, tmp_path):
    guide = GUIDES[name](normal)
    fit(normal, guide, 20)
    expected = seeded_loss(normal, guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    guide = GUIDES[name](normal)
    if called:
        guide()
    pyro.clear_param_store()
    load_store(tmp_path / "store.pt")
    guide()  # builds it, if it is not yet
    assert seeded_loss(normal, guide) == expected
    before = values_of(guide)
    fit(normal, guide)
    assert moved(guide, before)


def load_store(path) -> None:
    """``ParamStore.load``, which trusts its file."""
    store = pyro.get_param_store()
    store.set_state(torch.load(path, weights_only=False))


def test_d01_a_store_of_another_size_is_refused_with_a_sentence(tmp_path):
    fit(wide, AutoPlanar(wide))
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    load_store(tmp_path / "store.pt")
    with pytest.raises(ValueError, match=r"expected parameter 'AutoPlanar.flow\$\$\$.*' of shape "
                                         r"\(.*\), the param store holds one of shape \(.*\).*"
                                         "Clear it: pyro.clear_param_store"):
        AutoPlanar(normal)()


@every_kind
def test_d01_permutations_are_not_lost_on_the_way(kind, tmp_path):
    guide = kind(wide)
    fit(wide, guide, 10)
    u = torch.randn(3, 5)
    z = guide.get_transform()(u)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(123)
    load_store(tmp_path / "store.pt")
    fresh = kind(wide)
    fresh()
    assert torch.equal(fresh.get_transform()(u), z)


@every_kind
def test_d01_clearing_the_store_mid_training_keeps_training(kind):
    guide = kind(normal)
    fit(normal, guide)
    pyro.clear_param_store()
    before = values_of(guide)
    fit(normal, guide)
    assert moved(guide, before)


# ------------------------------------------------------------------ D2: the mean-field objective

def log_normal():
    pyro.sample("x", dist.LogNormal(0.0, 1.0))


def dirichlet():
    pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))


def mean_loss(elbo, model, guide, count: int) -> float:
    pyro.set_rng_seed(5)
    with torch.no_grad():
        return sum(elbo.loss(model, guide) for _ in range(count)) / count


@pytest.mark.parametrize("model", [log_normal, dirichlet], ids=["LogNormal", "Dirichlet"])
@pytest.mark.parametrize("kind", [*KINDS, AutoDiagonalNormal], ids=lambda kind: kind.__name__)
def test_d02_mean_field_elbo_is_the_elbo_on_constrained_sites(kind, model):
    guide = kind(model, init_scale=0.5)
    guide()
    trace, mean_field = (mean_loss(elbo(), model, guide, 20)
                         for elbo in (Trace_ELBO, TraceMeanField_ELBO))
    agree = math.isclose(trace, mean_field, rel_tol=1e-4, abs_tol=1e-4)
    assert agree is issubclass(kind, AutoFlow)


@every_kind
def test_d02_mean_field_elbo_finds_a_log_normal_prior(kind):
    guide = kind(log_normal)
    elbo = TraceMeanField_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(log_normal, guide, ClippedAdam({"lr": 0.02, "lrd": 0.995}), elbo)
    for _ in range(400):
        svi.step()
    loc, scale = guide._loc_scale()
    assert abs(loc.item()) < 0.15  # Pyro's guides give -1
    assert abs(scale.item() - 1) < 0.15


# ------------------------------------------------------------------ D3: NeuTra's potential

def plate_first():
    with pyro.plate("four", 4):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum(), 1.0))


def neutra_density(guide, model) -> tuple[float, float]:
    """Log-density of NeuTra's model at one draw, and the one by hand."""
    trace = poutine.trace(NeuTraReparam(guide).reparam(model)).get_trace()
    u = trace.nodes["x_shared_latent"]["value"].detach()
    transform = guide.get_transform()
    z = transform(u)
    log_det = transform.log_abs_det_jacobian(u, z)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    prior = prior - torch.distributions.Normal(0.0, 1.0).log_prob(z[-1])
    prior = prior + torch.distributions.Normal(z[:-1].exp().sum(), 1.0).log_prob(z[-1])
    return trace.log_prob_sum().item(), (prior + log_det.sum()).item()


@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal],
                         ids=lambda kind: kind.__name__)
def test_d03_neutra_counts_the_jacobian_once_where_the_first_site_is_in_a_plate(kind):
    guide = kind(plate_first)
    guide()
    if isinstance(guide, AutoFlow):
        perturb(guide, 0.2)
    got, expected = neutra_density(guide, plate_first)
    assert math.isclose(got, expected, rel_tol=1e-4) is isinstance(guide, AutoFlow)


# ------------------------------------------------------------------ D4: no inverse

@every_guide
def test_d04_any_value_can_be_scored(guide):
    made = GUIDES[guide](plate_first)
    made()
    posterior = made.get_posterior()
    z = posterior.rsample()
    elsewhere = torch.randn(3, 5)
    assert posterior.log_prob(z.detach().clone()).isfinite()
    assert posterior.log_prob(elsewhere).isfinite().all()
    trace = poutine.trace(made).get_trace()
    made()  # newer samples
    trace.compute_log_prob()
    replayed = poutine.trace(poutine.replay(made, trace=trace)).get_trace()
    assert torch.allclose(replayed.log_prob_sum(), trace.log_prob_sum(), rtol=1e-4)


@pyros
@pytest.mark.parametrize("transform", [pyro_transforms.planar, pyro_transforms.radial],
                         ids=["planar", "radial"])
def test_d04_pyros_planar_and_radial_score_only_their_last_sample(transform):
    guide = AutoNormalizingFlow(plate_first, init_transform_fn=transform)
    guide()
    with pytest.raises((KeyError, NotImplementedError)):
        guide.get_posterior().log_prob(torch.randn(3, 5))


# ------------------------------------------------------------------ D5: the compiled ELBOs

@torch_script
@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d05_the_compiled_elbo_runs(kind):
    if issubclass(kind, AutoFlow):
        assert math.isfinite(fit(wide, kind(wide), elbo=JitTrace_ELBO()))
    else:
        with pytest.raises(AssertionError):
            fit(wide, kind(wide), elbo=JitTrace_ELBO())


# ------------------------------------------------------------------ D6: pickling harms the guide

@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d06_pickling_leaves_the_live_guide_its_model(kind):
    guide = kind(wide)
    guide()
    pickle.dumps(guide)
    assert (guide._model is not None) is issubclass(kind, AutoFlow)


def subsampled(data):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data), subsample_size=2) as index:
        pyro.sample("obs", dist.Normal(a + b, 1.0), obs=data[index])


def test_d06_a_list_of_guides_with_subsampling_lives_on_after_a_checkpoint():
    guide, data = AutoGuideList(subsampled), torch.zeros(6)
    guide.append(AutoPlanar(poutine.block(subsampled, expose=["a"])))
    guide.append(AutoIAF(poutine.block(subsampled, expose=["b"])))
    for _ in range(3):
        fit(subsampled, guide, 1, args=(data,))
        pickle.dumps(guide)
        assert all(part.master is not None for part in guide)


# ------------------------------------------------------------------ D7: dtypes

def double():
    zero = torch.zeros(3, dtype=torch.float64)
    pyro.sample("x", dist.Normal(zero, zero + 1).to_event(1))
    pyro.sample("y", dist.LogNormal(zero[0], zero[0] + 1))


@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d07_a_float64_model_gets_a_float64_guide(kind):
    guide = kind(double)
    assert (guide()["x"].dtype == torch.float64) is issubclass(kind, AutoFlow)
    if issubclass(kind, AutoFlow):
        assert math.isfinite(fit(double, guide))
        assert guide.get_posterior().log_prob(torch.zeros(2, 4).double()).dtype == torch.float64


# ------------------------------------------------------------------ D8: latents of minibatches

def local():
    with pyro.plate("data", 100, subsample_size=10):
        pyro.sample("x", dist.Normal(0.0, 1.0))


@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d08_a_latent_in_a_subsampled_plate_is_refused(kind):
    if issubclass(kind, AutoFlow):
        with pytest.raises(ValueError, match="'x' is local to the subsampled plate 'data'"):
            kind(local)()
    else:
        assert kind(local)()["x"].shape == (10,)  # of 100, without a word


# ------------------------------------------------------------------ D9: the start

START = torch.tensor([3.0, -2.0, 5.0, 100.0])


def far():
    pyro.sample("x", dist.Normal(START, 0.1).to_event(1))


@every_kind
def test_d09_guides_start_where_they_are_told(kind):
    guide = kind(far, init_loc_fn=init_to_value(values={"x": START}), init_scale=0.01)
    draws = guide.setup().sample_posterior(200)["x"]
    assert torch.allclose(guide.median()["x"], START, rtol=1e-6)
    assert torch.allclose(draws.std(0), torch.tensor(0.01), rtol=0.3)


@every_kind
def test_d09_a_posterior_far_from_the_origin_is_found(kind):
    loss = fit(far, kind(far), 100, lr=0.01)
    assert loss < 10  # Pyro's: 4.7e5 (IAF), 1.9e6 (spline), of an exact 0


def test_d09_pyros_flow_takes_no_start():
    with pytest.raises(TypeError):
        AutoNormalizingFlow(far, pyro_transforms.planar, init_scale=0.1)


# ------------------------------------------------------------------ D10: summaries

@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d10_median_quantiles_mean_and_variance_are_there(kind):
    guide = kind(wide)
    guide()
    uses = [guide.median, lambda: guide.quantiles([0.1, 0.9]),
            lambda: guide.get_posterior().mean, lambda: guide.get_posterior().variance]
    for use in uses:
        if issubclass(kind, AutoFlow):
            use()
        else:
            with pytest.raises((NotImplementedError, AttributeError)):
                use()


# ------------------------------------------------------------------ D11: couplings that mix

@pytest.mark.parametrize("recipe", [realnvp, nice, nsf], ids=lambda recipe: recipe.__name__)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_d11_every_coordinate_hangs_on_every_other(recipe, size):
    guide = AutoFlow(partial(normal, size), recipe).setup()
    perturb(guide)
    u = torch.randn(20, size)
    transform = guide.get_transform().with_cache(0)
    slopes = torch.func.vmap(torch.func.jacrev(transform))(u).abs().amax(0)
    assert (slopes > 0).all()


def test_d11_couplings_fit_a_gaussian_that_is_shifted_in_every_coordinate():
    def shifted():
        pyro.sample("x", dist.Normal(torch.full((6,), 5.0), 0.5).to_event(1))

    guide = AutoFlow(shifted)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(shifted, guide, ClippedAdam({"lr": 0.02, "lrd": 0.995}), elbo)
    for _ in range(300):
        svi.step()
    loc, scale = guide._loc_scale()
    assert torch.allclose(loc, torch.tensor(5.0), atol=0.1)
    assert torch.allclose(scale, torch.tensor(0.5), atol=0.1)


# ------------------------------------------------------------------ D12: deepcopy

@pyros
@pytest.mark.parametrize("kind", [*KINDS, AutoIAFNormal], ids=lambda kind: kind.__name__)
def test_d12_a_guide_can_be_copied_after_a_step(kind):
    guide = kind(wide)
    fit(wide, guide, 1)
    if not issubclass(kind, AutoFlow):
        with pytest.raises(RuntimeError):
            copy.deepcopy(guide)
        return
    twin = copy.deepcopy(guide)
    before = values_of(twin)
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in twin.parameters()}
    assert torch.equal(guide.median()["x"], twin.median()["x"])
    fit(wide, guide, 1)
    assert not moved(twin, before)


# ------------------------------------------------------------------ D13: what is registered

COMPOSED = {
    "compose": lambda dim: ComposeTransform([pyro_transforms.planar(dim),
                                             pyro_transforms.planar(dim)]),
    "inverse": lambda dim: pyro_transforms.affine_autoregressive(dim).inv,
}


@pyros
@pytest.mark.parametrize("name", COMPOSED)
def test_d13_parameters_inside_a_plain_compose_or_inverse_train(name):
    theirs = AutoNormalizingFlow(wide, COMPOSED[name])
    theirs()
    ours = AutoFlow(wide, COMPOSED[name])
    ours()
    inside = [p for key, p in ours.named_parameters() if "modules_inside" in key]
    assert inside
    before = [p.detach().clone() for p in inside]
    fit(wide, ours)
    after = [p for key, p in ours.named_parameters() if "modules_inside" in key]
    assert not all(torch.equal(p, q) for p, q in zip(after, before, strict=True))
    assert len(list(theirs.parameters())) < len(inside)


# ------------------------------------------------------------------ D14: torch script

@torch_script
@every_kind
def test_d14_a_guide_traces_as_a_torch_script(kind):
    guide = kind(wide)
    guide()
    traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    assert traced.call()[0].shape == (5,)


# ------------------------------------------------------------------ D15: devices

def test_d15_a_sylvester_guide_makes_nothing_on_the_default_device():
    guide = AutoFlow(double, lambda dim: Sylvester(dim)).setup()
    with torch.device("meta"):  # whatever is made without a device fails against real tensors
        bijection = guide._modules["flow"].bijection
        z, log_det = bijection(torch.zeros(2, 4, dtype=torch.float64, device="cpu"))
    assert z.device.type == log_det.device.type == "cpu"


# ------------------------------------------------------------------ D16: train and eval

@every_guide
def test_d16_train_and_eval_mode_give_the_same_density(guide):
    made = GUIDES[guide](plate_first).setup()
    values = made.sample_posterior(4)
    train = made.train().log_prob(values)
    assert torch.equal(train, made.eval().log_prob(values))


# ------------------------------------------------------------------ D17: splines in float32

def test_d17_splines_keep_their_inverse_in_float32():
    guide = AutoSpline(wide, init_scale=1.0).setup()
    perturb(guide)
    transform = guide.get_transform()
    u = 3 * torch.randn(5000, 5)
    z = transform(u).detach()
    assert torch.allclose(transform.inv(z.clone()), u, rtol=0, atol=1e-4)
    perturb(guide, 5.0)  # slopes of 1e10: no digit of u is left to compare
    back = transform.inv(transform(u).detach().clone())
    assert back.isfinite().all()


# ------------------------------------------------------------------ D18: a high learning rate

OBSERVED = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools():
    """Eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, ERRORS), obs=OBSERVED)


def funnel():
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(9), (y / 2).exp()).to_event(1))


@pytest.mark.parametrize(("model", "bound"), [(schools, 60.0), (funnel, 40.0)],
                         ids=["schools", "funnel"])
@every_kind
def test_d18_a_high_learning_rate_stays_finite_and_sane(kind, model, bound):
    guide = kind(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    losses = torch.tensor([svi.step() for _ in range(300)])
    assert losses.isfinite().all()
    assert losses[-20:].mean() < bound  # a Gaussian: 32 and 5; Pyro's flows: 680 and up, or inf
    assert all(p.isfinite().all() for p in guide.parameters())


# ------------------------------------------------------------------ D19: late errors

@every_kind
def test_d19_an_unknown_option_is_refused_where_it_is_written(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*'hidden_dim'"):
        kind(wide, hidden_dim=10)


@every_kind
def test_d19_the_arguments_of_every_pyro_guide_are_taken(kind):
    guide = kind(subsampled, init_loc_fn=init_to_value, init_scale=0.2,
                 create_plates=lambda data: pyro.plate("data", len(data), subsample_size=3))
    assert guide.init_scale == 0.2


@pyros
def test_d19_pyros_guide_finds_out_at_its_first_call():
    guide = AutoIAFNormal(wide, init_scale=0.1)
    with pytest.raises(TypeError):
        guide()


# ------------------------------------------------------------------ D20: sizes

def large():
    pyro.sample("x", dist.Normal(torch.zeros(500), 1.0).to_event(1))


@pytest.mark.parametrize("make", [*KINDS, partial(AutoFlow, recipe=maf),
                                  partial(AutoFlow, recipe=nice)],
                         ids=[*(kind.__name__ for kind in KINDS), "maf", "nice"])
def test_d20_default_networks_stay_small_in_500_dimensions(make):
    guide = make(large).setup()
    count = sum(p.numel() for p in guide.parameters())
    assert count < 4_000_000  # Pyro's: 65 million (spline coupling), 105 million (spline IAF)


# ------------------------------------------------------------------ D21: freezing

@pyros
@every_kind
def test_d21_freezing_is_quiet(kind, recwarn):
    guide = kind(wide)
    guide()
    guide.requires_grad_(False)
    recwarn.clear()
    Predictive(wide, guide=guide, num_samples=3)()
    assert not list(recwarn)


@pytest.mark.filterwarnings("always::UserWarning")
def test_d21_pyros_frozen_guide_warns(recwarn):
    guide = AutoNormalizingFlow(wide, pyro_transforms.planar)
    guide()
    guide.requires_grad_(False)
    recwarn.clear()
    Predictive(wide, guide=guide, num_samples=3)()
    assert any("not registered" in str(warning.message) for warning in recwarn)
