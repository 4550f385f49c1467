"""A newcomer's mistakes: one sentence each that says what to do."""

from __future__ import annotations

import re
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, config_enumerate
from pyro.optim import Adam
from torch.distributions import ExpTransform

from pyro_nfvi.flows import Gaussian, nsf, planar
from pyro_nfvi.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoSpline

KINDS = [AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoSpline]
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(data=None):
    """Two latents; the data are one too if not given."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 3 if data is None else len(data)):
        pyro.sample("obs", dist.Normal(mu, sigma), obs=data)


def local(data):
    """One latent for each row."""
    with pyro.plate("data", len(data)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=data)


DATA = torch.tensor([1.0, 2.0, 3.0])


# ------------------------------------------------------------------ models

@every_kind
def test_a_discrete_latent_is_refused_with_the_way_out(kind):
    def mixture():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    message = (f"{kind.__name__} handles continuous sites; 'k' is Categorical. Hide it: "
               f"{kind.__name__}(poutine.block(model, hide=['k'])).")
    for wrapped in (mixture, config_enumerate(mixture)):
        with pytest.raises(ValueError, match=re.escape(message)):
            kind(wrapped)()


def test_a_sequential_plate_is_refused_at_each_call():
    def steps():
        for i in pyro.plate("time", 2):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))
    guide = AutoFlow(steps)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="AutoFlow handles vectorized plates; 'x0' is "
                           "in the sequential plate 'time'. Use `with pyro.plate"):
            guide()


def test_a_discrete_latent_in_a_plate_is_named_by_its_own_kind():
    def counts():
        with pyro.plate("two", 2):
            pyro.sample("k", dist.Poisson(torch.ones(3)).to_event(1))

    with pytest.raises(ValueError, match="'k' is Poisson"):
        AutoFlow(counts)()


@every_kind
def test_a_model_without_latents_is_refused(kind):
    def observed(data):
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=data)

    for error in (ValueError, RuntimeError):  # Pyro's guides raise the latter
        with pytest.raises(error, match="found no latent site in the model"):
            kind(observed)(torch.tensor(1.0))


def test_a_latent_local_to_a_subsampled_plate_is_refused():
    def local():
        with pyro.plate("data", 100, subsample_size=10):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    message = r"'x' is local to the subsampled plate 'data' \(10 of 100\). Use the full plate"
    with pytest.raises(ValueError, match=message):
        AutoPlanar(local)()


def test_create_plates_do_not_make_a_subsampled_latent_right():
    def plates(data):
        return pyro.plate("data", len(data), subsample_size=2)

    def minibatch(data):
        with plates(data) as index:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(x, 1.0), obs=data[index])

    with pytest.raises(ValueError, match="'x' is local to the subsampled plate 'data'"):
        AutoPlanar(minibatch, create_plates=plates)(DATA)


def test_a_refused_model_leaves_the_guide_unbuilt():
    state = {"latents": 0}

    def growing():
        if state["latents"]:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoFlow(growing)
    with pytest.raises(ValueError, match="found no latent site"):
        guide()
    state["latents"] = 1
    assert set(guide()) == {"x"}


# ------------------------------------------------------------------ between two calls

def test_data_of_another_length_say_what_to_do():
    guide = AutoPlanar(local)
    guide(DATA)
    with pytest.raises(ValueError, match=r"expected site 'x' of shape \(3,\), got \(4,\). Build a "
                                         "new guide"):
        guide(torch.zeros(4))


def test_data_of_another_length_are_welcome_where_no_latent_hangs_on_them():
    guide = AutoPlanar(model)
    guide(DATA)
    assert set(guide(torch.zeros(7))) == {"mu", "sigma"}


def test_a_site_that_was_latent_at_the_first_call_says_what_to_do():
    guide = AutoPlanar(model)
    Predictive(model, guide=guide, num_samples=1)()
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match="built when 'obs' was latent; now it is observed. Build a "
                                         "new guide, and call it first with the arguments"):
        svi.step(DATA)


def test_a_latent_site_that_disappears_is_named():
    def changing(extra):
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if extra:
            pyro.sample("y", dist.Normal(0.0, 1.0))

    guide = AutoPlanar(changing)
    guide(True)
    with pytest.raises(ValueError, match="latent site 'y' that the model no longer has"):
        guide(False)


def test_predicting_without_data_after_the_fit_is_no_mistake():
    guide = AutoPlanar(model).setup(DATA)
    assert Predictive(model, guide=guide, num_samples=4)()["obs"].shape == (4, 3)


# ------------------------------------------------------------------ arguments of the constructor

@pytest.mark.parametrize("option", ["hidden_dim", "num_layer", "layers", "input_dim"])
@every_kind
def test_an_unknown_option_is_refused_at_once_and_the_known_ones_are_told(kind, option):
    with pytest.raises(ValueError, match=rf"(?s){kind.__name__}: .*{option}.* takes .*num_layers"):
        kind(model, **{option: 10})


def test_a_wrong_option_of_a_right_name_says_what_is_expected():
    with pytest.raises(ValueError, match="expected `num_layers` to be an integer >= 1, got 0"):
        AutoPlanar(model, num_layers=0).setup(DATA)


@pytest.mark.parametrize("recipe", ["nsf", 3, [planar]], ids=["string", "number", "list"])
def test_a_recipe_that_is_no_function_is_refused(recipe):
    with pytest.raises(ValueError, match="AutoFlow expected `recipe` to be a function, got "):
        AutoFlow(model, recipe)


@pytest.mark.parametrize("result", [None, 3, "planar"], ids=repr)
def test_a_recipe_that_returns_nonsense_is_refused(result):
    guide = AutoFlow(model, lambda input_dim: result)
    with pytest.raises(ValueError, match="`recipe` to return a Bijection or a transform, got "):
        guide(DATA)


def test_a_recipe_of_another_dimension_is_refused():
    guide = AutoFlow(model, lambda input_dim: planar(input_dim + 1))
    with pytest.raises(ValueError, match="3"):
        guide(DATA)


@pytest.mark.parametrize("argument", ["recipe", "base", "affine"])
@pytest.mark.parametrize("built", [planar(2), Gaussian(2), ExpTransform()],
                         ids=["layers", "noise", "transform"])
def test_a_part_that_is_built_already_is_refused(argument, built):
    message = f"`{argument}` to be a function of the number of latents, got {type(built).__name__}"
    with pytest.raises(ValueError, match=message):
        AutoFlow(model, **{argument: built})


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, "a", None, float("nan"), float("inf"), True],
                         ids=repr)
@every_kind
def test_an_init_scale_that_is_no_positive_number_is_refused(kind, scale):
    with pytest.raises(ValueError, match=f"{kind.__name__} expected `init_scale` to be a positive "
                                         "number, got "):
        kind(model, init_scale=scale)


@pytest.mark.parametrize("argument", ["init_loc_fn", "base", "affine"])
def test_an_argument_that_is_no_function_is_refused(argument):
    with pytest.raises(ValueError, match=f"expected `{argument}` to be a function, got int"):
        AutoFlow(model, **{argument: 3})


def test_a_function_of_something_else_than_a_site_is_refused():
    guide = AutoFlow(model, init_loc_fn=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="AutoFlow expected `init_loc_fn` to be a function of a "
                                         "site, a dict as in a trace, got TypeError: linear()"):
        guide(DATA)


@pytest.mark.parametrize("wrong", [None, 3, "model", DATA], ids=["none", "number", "text", "data"])
@every_kind
def test_a_model_that_is_no_function_is_refused(kind, wrong):
    message = f"{kind.__name__} expected `model` to be a function, got {type(wrong).__name__}"
    with pytest.raises(ValueError, match=message):
        kind(wrong)


def test_the_model_is_called_by_the_guide_not_before_it():
    with pytest.raises(ValueError, match="expected `model` to be a function, got NoneType"):
        AutoFlow(model(DATA))


# ------------------------------------------------------------------ reading the guide

USES = {
    "sample_posterior": lambda guide: guide.sample_posterior(3),
    "log_prob": lambda guide: guide.log_prob({"mu": torch.tensor(0.0)}),
    "median": lambda guide: guide.median(),
    "quantiles": lambda guide: guide.quantiles([0.5]),
    "get_posterior": lambda guide: guide.get_posterior(),
    "get_transform": lambda guide: guide.get_transform(),
    "load_state_dict": lambda guide: guide.load_state_dict({}),
}


@pytest.mark.parametrize("use", USES)
@every_kind
def test_a_guide_used_before_its_first_call_says_what_to_do(kind, use):
    message = (f"{kind.__name__} is built at its first call. Call it with the model's arguments, "
               f"or {kind.__name__}.setup(*args), first.")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        USES[use](kind(model))


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", None], ids=repr)
def test_a_number_of_draws_that_is_none_is_refused(count):
    guide = AutoPlanar(model).setup(DATA)
    with pytest.raises(ValueError, match="AutoPlanar expected `num_samples` to be an integer >= 1"):
        guide.sample_posterior(count)


@pytest.mark.parametrize(("values", "message"), [
    ({"mu": 0.0}, "'sigma' is missing"),
    ({"mu": 0.0, "sigma": [1.0, 2.0, 3.0]}, None),
    ({"mu": 0.0, "sigma": -1.0}, "site 'sigma' within its support"),
    ({"mu": float("nan"), "sigma": 1.0}, "site 'mu' within its support"),
])
def test_values_that_do_not_fit_log_prob_are_named(values, message):
    guide = AutoPlanar(model).setup(DATA)
    values = {name: torch.tensor(value) for name, value in values.items()}
    if message is None:
        assert guide.log_prob(values).shape == (3,)
        return
    with pytest.raises(ValueError, match=message):
        guide.log_prob(values)


def test_a_value_of_the_wrong_shape_is_named():
    guide = AutoPlanar(local).setup(DATA)
    with pytest.raises(ValueError, match=r"site 'x' of shape \(\*sample, 3\), got \(2, 4\)"):
        guide.log_prob({"x": torch.zeros(2, 4)})


@pytest.mark.parametrize("level", [-0.1, 1.1, 50, float("nan")], ids=repr)
def test_a_quantile_level_outside_zero_to_one_is_refused(level):
    guide = AutoPlanar(model).setup(DATA)
    with pytest.raises(ValueError, match="quantiles"):
        guide.quantiles([level])


@pytest.mark.parametrize("make", [
    partial(AutoFlow, recipe=nsf, num_bins=0), partial(AutoIAF, num_layers="2"),
    partial(AutoSpline, hidden_dims=8)], ids=["num_bins", "num_layers", "hidden_dims"])
def test_an_option_of_the_wrong_kind_is_named(make):
    with pytest.raises(ValueError, match=r"expected `?(num_bins|num_layers|hidden_dims)"):
        make(model).setup(DATA)
