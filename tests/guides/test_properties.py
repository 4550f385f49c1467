"""Every promise of a guide, of every guide of the table, on every model of the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch

import pyro_nfvi
from pyro_nfvi import guides, testing
from pyro_nfvi.guides import AutoFlow
from tests.cases import GUIDES, MODEL_CANNOT, MODELS


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def promising(check: Callable[..., None]) -> pytest.MarkDecorator:
    """Every guide with every model that lets it promise the property of ``check``."""
    pairs = [(guide, model) for guide in GUIDES for model in MODELS
             if check not in MODEL_CANNOT.get(model, ())]
    return pytest.mark.parametrize(("guide", "model"), pairs, ids=map("-".join, pairs))


def run(check: Callable[..., None], guide: str, model: str) -> None:
    function, make_args = MODELS[model]
    check(GUIDES[guide], function, *make_args())


# ------------------------------------------------------------------ each property, each pair

@promising(testing.check_guide_trains)
def test_svi_trains_every_parameter(guide, model):
    run(testing.check_guide_trains, guide, model)


@promising(testing.check_guide_log_prob)
def test_log_prob_of_a_draw_is_its_traced_density(guide, model):
    run(testing.check_guide_log_prob, guide, model)


@promising(testing.check_guide_arbitrary_log_prob)
def test_log_prob_of_any_point_matches_autograd(guide, model):
    run(testing.check_guide_arbitrary_log_prob, guide, model)


@promising(testing.check_guide_draws)
def test_draws_fit_their_sites(guide, model):
    run(testing.check_guide_draws, guide, model)


@promising(testing.check_guide_quantiles)
def test_quantiles_are_those_of_the_draws(guide, model):
    run(testing.check_guide_quantiles, guide, model)


@promising(testing.check_guide_random_state)
def test_summaries_leave_the_random_state_alone(guide, model):
    run(testing.check_guide_random_state, guide, model)


@promising(testing.check_guide_copies)
def test_copies_are_exact(guide, model):
    run(testing.check_guide_copies, guide, model)


@promising(testing.check_guide_elbos)
def test_trace_and_mean_field_elbo_agree(guide, model):
    run(testing.check_guide_elbos, guide, model)


@promising(testing.check_guide_particles)
def test_particles_are_draws_of_their_own(guide, model):
    run(testing.check_guide_particles, guide, model)


@promising(testing.check_guide_predictive)
def test_predictive_takes_the_draws(guide, model):
    run(testing.check_guide_predictive, guide, model)


@promising(testing.check_guide_neutra)
def test_neutra_density_is_that_of_the_model(guide, model):
    run(testing.check_guide_neutra, guide, model)


# ------------------------------------------------------------------ the checks themselves

def test_every_check_of_a_guide_runs_here():
    source = inspect.getsource(inspect.getmodule(run))
    missing = [check.__name__ for check in testing.GUIDE_CHECKS
               if f"run(testing.{check.__name__}," not in source]
    assert not missing, f"No test here runs {missing}."


def test_every_guide_is_in_the_table():
    made = {type(make(MODELS["funnel"][0])) for make in GUIDES.values()}
    named = {value for room in (guides, pyro_nfvi)
             for value in (getattr(room, name) for name in room.__all__)
             if isinstance(value, type) and issubclass(value, AutoFlow)}
    missing = sorted(kind.__name__ for kind in named - made)
    assert not missing, f"No line of GUIDES in tests/cases.py for {missing}."


def test_check_guide_takes_keywords_of_the_model():
    function, make_args = MODELS["scalar"]
    testing.check_guide(GUIDES["planar"], function, data=make_args()[0])


class Forgetful(AutoFlow):
    """Its log_prob leaves the Jacobian of the constraints out."""

    def log_prob(self, values):
        return self._flow().log_prob(self.layout.pack(values))


class Stuck(AutoFlow):
    """Its parameters never reach the optimiser."""

    def _flow(self):
        return self._modules["flow"]


class Noisy(AutoFlow):
    """Its median is one draw."""

    def median(self, *args, **kwargs):
        return {name: value[0] for name, value in self.sample_posterior(1).items()}


class Narrow(AutoFlow):
    """Its quantiles are too close to the middle."""

    def quantiles(self, quantiles, *args, **kwargs):
        return super().quantiles([0.5 + 0.8 * (level - 0.5) for level in quantiles])


class Uncounted(AutoFlow):
    """It leaves what NeuTra counts too often."""

    def _surplus_in_neutra(self):
        return 0.0


@pytest.mark.parametrize(("guide", "check", "message"), [
    (Forgetful, testing.check_guide_log_prob, "traced density"),
    (Forgetful, testing.check_guide_arbitrary_log_prob, "any point"),
    (Forgetful, testing.check_guide_particles, "density of the particles"),
    (Stuck, testing.check_guide_trains, "fails the check that SVI trains it"),
    (Noisy, testing.check_guide_quantiles, "not its quantile 0.5"),
    (Noisy, testing.check_guide_random_state, "random state changed"),
    (Narrow, testing.check_guide_quantiles, "standard errors"),
    (Uncounted, testing.check_guide_neutra, "NeuTra"),
])
def test_a_check_finds_a_guide_that_breaks_its_promise(guide, check, message):
    function, make_args = MODELS["plate-first"]
    with pytest.raises(AssertionError, match=message):
        check(guide, function, *make_args())


def test_check_guide_refuses_what_is_no_guide_of_ours():
    with pytest.raises(ValueError, match="`make_guide` to return an AutoFlow, got object"):
        testing.check_guide(lambda model: object(), MODELS["funnel"][0])
