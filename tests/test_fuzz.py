"""The promise on random models and arguments, and each bug that random ones have found."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pyro.infer.autoguide import init_to_feasible
from torch import nn

from pyro_nfvi import (
    AutoFlow,
    AutoIAF,
    AutoPlanar,
    Posterior,
    compare,
    fit_density,
    nsf,
    plot_flow,
    vae,
)
from pyro_nfvi.flows import MLP, FixedLinear, FixedLowRank, FlowDistribution
from tests.fuzz import Call, Fit, Model, Site, calls, fits, is_clear, judge

Y = torch.tensor([1.0, 2.0, 0.5])


def examples(count: int) -> settings:
    """The same cases each time."""
    return settings(derandomize=True, max_examples=count, database=None, deadline=None,
                    phases=[Phase.explicit, Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("fuzz"))  # where odd paths lead
    monkeypatch.setenv("MPLBACKEND", "Agg")


def kept(case: Fit | Call) -> None:
    outcome = judge(case)
    assert not outcome.failed, f"judge({case!r})\n{outcome.words}\n{outcome.details}"


@examples(16)
@given(calls())
def test_a_random_call_gives_finite_numbers_or_one_clear_sentence(case):
    kept(case)


@examples(3)
@given(fits())
def test_a_random_fit_gives_finite_numbers_or_one_clear_sentence(case):
    kept(case)


@pytest.mark.slow
@examples(300)
@given(calls())
def test_many_random_calls_give_finite_numbers_or_one_clear_sentence(case):
    kept(case)


@pytest.mark.slow
@examples(40)
@given(fits())
def test_many_random_fits_give_finite_numbers_or_one_clear_sentence(case):
    kept(case)


# ------------------------------------------------------------------ the judge

@pytest.mark.parametrize(("code", "words"), [
    ("{}['missing']", "KeyError"),
    ("torch.zeros(2) @ torch.zeros(3)", "RuntimeError"),
    ("torch.tensor([1.0, math.nan])", "nan in result"),
    ("__import__('time').sleep(60)", "hangs"),
    ("[None for _ in iter(int, 1)]", "hangs"),
    ("__import__('warnings').warn('careful')", "warns in words not ours"),
    ("torch.set_default_dtype(torch.float64)", "settings changed"),
    ("int('x')", "ValueError"),
])
def test_the_judge_sees_a_broken_promise(code, words):
    outcome = judge(Call(code), seconds=0.1 if words == "hangs" else 60.0)
    assert outcome.failed
    assert words in outcome.words
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("words", [
    "expected something", "nsf expected", "Unknown expected `a` to be an integer, got 3.",
    "nsf: " + 300 * "many "])
def test_an_error_that_names_no_owner_or_is_no_sentence_is_not_clear(words):
    assert not is_clear(ValueError(words))
    assert is_clear(ValueError("nsf expected `num_bins` to be an integer >= 2, got 1."))
    assert not is_clear(TypeError("nsf expected `num_bins` to be an integer >= 2, got 1."))


def test_the_judge_lets_a_model_have_errors_of_its_own():
    outcome = judge(Fit(Model((Site(),), twists=("raises",))))
    assert outcome.kind == "the model's own error"


def test_a_case_is_the_code_that_makes_it_again():
    case = Fit(Model((Site("gamma", on="loc"), Site()), ((2, None),), "poisson"), reads=("a",))
    assert eval(repr(case)) == case


# ------------------------------------------------------------------ found, and mended

def model(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior():
    pyro.set_rng_seed(0)
    return Posterior.of(model, AutoIAF(model, num_layers=1).setup(Y), Y)


@pytest.mark.parametrize(("prior", "words"), [
    (lambda: dist.Wishart(torch.tensor(3.0), torch.eye(2)), "LKJCholesky"),
    (lambda: dist.ProjectedNormal(torch.ones(3)), "ProjectedNormalReparam"),
    (lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)),
                                    dist.Normal(torch.zeros(2), 1.0)), "pyro.factor"),
], ids=["wishart", "sphere", "mixture"])
@pytest.mark.filterwarnings("ignore:Singular sample")  # torch's words on a Wishart's draw
@pytest.mark.parametrize("init_loc_fn", [None, init_to_feasible], ids=["median", "feasible"])
def test_a_support_that_no_map_reaches_is_named(prior, words, init_loc_fn):
    options = {} if init_loc_fn is None else {"init_loc_fn": init_loc_fn}
    with pytest.raises(NotImplementedError, match=f"AutoFlow maps the reals .* 'x' is .*{words}"):
        AutoFlow(lambda: pyro.sample("x", prior()), **options)()


def test_a_discrete_latent_is_named_whatever_the_start():
    guide = AutoPlanar(lambda: pyro.sample("k", dist.Bernoulli(0.5)), init_loc_fn=init_to_feasible)
    with pytest.raises(ValueError, match="AutoPlanar handles continuous sites; 'k' is Bernoulli"):
        guide()


@pytest.mark.parametrize("value", [None, 3.0, math.nan], ids=["nothing", "a float", "nan"])
def test_a_start_that_is_no_finite_tensor_is_named(value):
    def start(site):
        return torch.full((), value) if isinstance(value, float) and value != value else value
    with pytest.raises(ValueError, match="AutoPlanar expected `init_loc_fn` to return .*'mu'"):
        AutoPlanar(model, init_loc_fn=start)(Y)


@pytest.mark.parametrize("plates", [3, lambda *args: None, lambda *args: [1, 2]],
                         ids=["a number", "nothing", "numbers"])
def test_plates_that_are_none_are_named(plates):
    with pytest.raises(ValueError, match="AutoPlanar expected `create_plates` to"):
        AutoPlanar(model, create_plates=plates)(Y)


@pytest.mark.parametrize("values", [3.0, None, [1.0], torch.zeros(3)], ids=str)
def test_values_that_are_no_dict_are_named(posterior, values):
    with pytest.raises(ValueError, match="LatentLayout expected `values` to be a dict"):
        posterior.log_prob(values)


@pytest.mark.parametrize("value", ["x", None, object(), {}], ids=["str", "None", "object", "dict"])
def test_a_value_that_is_no_tensor_is_named(posterior, value):
    with pytest.raises(ValueError, match="LatentLayout expected site 'mu' to have a tensor"):
        posterior.log_prob({"mu": value})


def test_a_value_may_be_a_number_of_any_kind(posterior):
    known = posterior.log_prob({"mu": torch.tensor(1.0)})
    for value in (1, 1.0, np.float32(1.0), torch.tensor(1)):
        assert torch.allclose(posterior.log_prob({"mu": value}).float(), known)


@pytest.mark.parametrize("quantiles", [None, "ab", ("a", "b"), object()],
                         ids=["nothing", "text", "texts", "an object"])
def test_quantiles_that_are_no_numbers_are_named(posterior, quantiles):
    with pytest.raises(ValueError, match="AutoIAF expected `quantiles` to be numbers"):
        posterior.guide.quantiles(quantiles)


def test_one_quantile_is_a_list_of_one(posterior):
    assert torch.equal(posterior.guide.quantiles(0.5)["mu"], posterior.guide.quantiles([0.5])["mu"])


@pytest.mark.parametrize("ax", [3, "ax", {}], ids=repr)
@pytest.mark.parametrize("plot", ["plot_elbo", "plot_weights", "plot_pareto_k"])
def test_axes_that_are_none_are_named(posterior, plot, ax):
    with pytest.raises(ValueError, match=f"{plot} expected `ax` to be matplotlib axes or None"):
        getattr(posterior, plot)(ax)


@pytest.mark.parametrize("plot", ["plot_marginals", "plot_pairs", "plot_predictive"])
@pytest.mark.parametrize("names", [3, 2.0, [1], {"mu": 1}], ids=repr)
def test_names_that_are_none_are_named(posterior, plot, names):
    with pytest.raises(ValueError, match=f"{plot} expected `var_names` to be a list of names"):
        getattr(posterior, plot)(var_names=names)


@pytest.mark.parametrize("path", [None, 0, b"x", torch.int32, ""], ids=repr)
def test_a_path_that_is_none_is_named(posterior, path):
    with pytest.raises(ValueError, match="Posterior.save expected `path` to be the path"):
        posterior.save(path)
    if path == "":
        return  # which is read as the folder it stands for
    with pytest.raises(ValueError, match="Posterior.load expected `path` to be the path"):
        Posterior.load(path, model)
    autoencoder = vae.VAE(vae.Gaussian((2,)), 1)
    for name in ("save", "load"):
        with pytest.raises(ValueError, match=f"VAE.{name} expected `path` to be the path"):
            getattr(autoencoder, name)(path)


def test_a_model_or_guide_to_load_for_is_checked(posterior, tmp_path):
    posterior.save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="Posterior.load expected `model` to be .* got int"):
        Posterior.load(tmp_path / "fit.pt", 3)
    with pytest.raises(ValueError, match="Posterior.load expected `guide` to be .* got str"):
        Posterior.load(tmp_path / "fit.pt", model, "x")


@pytest.mark.parametrize("flag", [torch.tensor([True, False]), "yes", 2, None], ids=str)
def test_a_flag_that_is_neither_true_nor_false_is_named(posterior, flag):
    with pytest.raises(ValueError, match="Posterior.diagnose expected `progress` to be True or"):
        posterior.diagnose(progress=flag)
    with pytest.raises(ValueError, match="Posterior.to_arviz expected `weighted` to be True or"):
        posterior.to_arviz(weighted=flag)
    with pytest.raises(ValueError, match="fit_density expected `progress` to be True or"):
        fit_density(nsf(2), samples=torch.randn(50, 2), progress=flag)


@pytest.mark.parametrize("losses", [3, "abc", [None], object()],
                         ids=["a number", "text", "nothing", "an object"])
def test_losses_that_are_no_numbers_are_named(posterior, losses):
    with pytest.raises(ValueError, match="Posterior.diagnose expected `losses` to be numbers"):
        posterior.diagnose(losses=losses, progress=False)


@pytest.mark.parametrize("returned", [None, 3.0, (1.0, 2.0), torch.zeros(3)], ids=str)
def test_an_objective_that_returns_something_else_is_named(returned):
    with pytest.raises(ValueError, match="fit_density expected `objective` to return two tensors"):
        fit_density(nsf(2, num_layers=1), log_density=lambda z: -z.square().sum(-1), num_steps=2,
                    objective=lambda *args: returned, compile="eager", progress=False)


@pytest.mark.parametrize("number", [10 ** 30, 2 ** 63, 2 ** 31])
def test_a_count_beyond_all_memory_is_named(number):
    with pytest.raises(ValueError, match=r"nsf expected|below 2\*\*31"):
        nsf(2, num_layers=number)
    with pytest.raises(ValueError, match=r"below 2\*\*31"):
        nsf(number)


@pytest.mark.parametrize("mistake", [
    lambda: MLP(torch.tensor(1.0), 2), lambda: MLP(2, "x"), lambda: MLP(2, 2, activation=math.nan),
    lambda: MLP(2, 2, hidden_dims=3)], ids=["in", "out", "activation", "hidden"])
def test_a_wrong_option_of_a_perceptron_is_named(mistake):
    with pytest.raises(ValueError, match="MLP expected"):
        mistake()


@pytest.mark.parametrize("mistake", [
    lambda: FixedLinear({}, torch.eye(2)), lambda: FixedLinear(torch.zeros(2), 3.0),
    lambda: FixedLinear(torch.zeros(2, 2), torch.eye(4)),
    lambda: FixedLinear(torch.full((2,), math.nan), torch.eye(2)),
    lambda: FixedLinear(torch.zeros(2).long(), torch.eye(2)),
    lambda: FixedLowRank(torch.zeros(2), 0.5, torch.eye(2), torch.zeros(2)),
    lambda: FixedLowRank(torch.zeros(2), torch.ones(2), "", ())],
    ids=["dict", "float", "matrix", "nan", "ints", "scale", "directions"])
def test_a_wrong_part_of_a_fixed_map_is_named(mistake):
    with pytest.raises(ValueError, match="Fixed(Linear|LowRank) expected `"):
        mistake()


@pytest.mark.parametrize(("call", "words"), [
    (lambda fitted: fitted.sample(0), "`sample_shape` to be a tuple"),
    (lambda fitted: fitted.sample((-1,)), "`sample_shape` to be a tuple"),
    (lambda fitted: fitted.expand(torch.int32), "`batch_shape` to be a tuple"),
    (lambda fitted: fitted.log_prob(False), "`value` to be a tensor")],
    ids=["sample", "negative", "expand", "log_prob"])
def test_a_wrong_argument_of_a_fitted_flow_is_named(call, words):
    fitted = fit_density(nsf(2, num_layers=1), samples=torch.randn(200, 2), num_steps=1,
                         compile="eager", seed=0, progress=False)
    with pytest.raises(ValueError, match=f"FittedFlow expected {words}"):
        call(fitted)


@pytest.mark.parametrize("flow", [-1, None, torch.ones(2, 2), nn.Linear(2, 2)], ids=str)
def test_a_distribution_of_no_flow_is_named(flow):
    with pytest.raises(ValueError, match="FlowDistribution expected `flow` to be a Flow"):
        FlowDistribution(flow)


def test_a_tensor_is_no_list_of_fits():
    with pytest.raises(ValueError, match="compare expected `posteriors` to be a list or dict"):
        compare(torch.tensor(1.0))


@pytest.mark.parametrize("limits", [3, (1, 2), (1.0, 0.0, 0.0, 1.0), ("a",) * 4,
                                    (0.0, math.nan, 0.0, 1.0)], ids=str)
def test_limits_that_are_no_window_are_named(limits):
    with pytest.raises(ValueError, match="plot_flow expected `limits` to be four numbers"):
        plot_flow(nsf_flow(), limits=limits)


def nsf_flow():
    from pyro_nfvi.flows import Flow

    return Flow(nsf(2, num_layers=1))


@pytest.mark.parametrize(("nats", "num_dims"), [("x", 3), ([], 3), (1.0, 0), (1.0, "x")])
def test_bits_of_no_number_are_named(nats, num_dims):
    with pytest.raises(ValueError, match="bits_per_dim expected `n"):
        vae.bits_per_dim(nats, num_dims)
