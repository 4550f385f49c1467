"""Likelihoods: their numbers against independent formulas, their shapes, and their messages."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_nfvi.vae.distributions import (
    ContinuousBernoulliDistribution,
    DiscretizedLogisticDistribution,
)
from pyro_nfvi.vae.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedGaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
)

BUILD = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": lambda shape: Gaussian(shape, scale=0.3),
    "learned": lambda shape: LearnedGaussian(shape, scale=0.3),
    "learned_per_dimension": lambda shape: LearnedGaussian(shape, per_dimension=True),
    "heteroscedastic": HeteroscedasticGaussian,
    "categorical": lambda shape: Categorical(shape, num_classes=4),
    "logistic": DiscretizedLogistic,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}
SUPPORT = {  # all values that carry probability worth counting, for parameters of order one
    "bernoulli": torch.arange(2.0), "categorical": torch.arange(4.0),
    "logistic": torch.arange(256.0), "poisson": torch.arange(400.0),
    "negative_binomial": torch.arange(3000.0),
}
EXTREMES = [-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]
VALUES = {"bernoulli": [0, 1], "continuous_bernoulli": [0, 0.5, 1], "categorical": [0, 3],
          "logistic": [0, 1, 128, 254, 255], "poisson": [0, 7, 1000],
          "negative_binomial": [0, 7, 1000]}

each = pytest.mark.parametrize("name", BUILD)


def random_params(likelihood: Likelihood, *batch: int, dtype: torch.dtype = torch.float64
                  ) -> Tensor:
    return torch.randn(*batch, likelihood.num_params, *likelihood.event_shape, dtype=dtype)


def soft_clamp(raw: Any, bound: float = 20.0) -> Any:
    return bound * np.tanh(raw / bound)


# Truth


def _truth(name: str, x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Log-probability of the data by scipy, or by the formula of the paper in float64."""
    if name == "bernoulli":
        return stats.bernoulli(1 / (1 + np.exp(-p[0]))).logpmf(x)
    if name == "continuous_bernoulli":
        return p[0] * x + np.log(p[0] / np.expm1(p[0]))
    if name in ("gaussian", "learned"):
        return stats.norm(p[0], 0.3).logpdf(x)
    if name == "learned_per_dimension":
        return stats.norm(p[0], 1.0).logpdf(x)
    if name == "heteroscedastic":
        return stats.norm(p[0], np.log1p(np.exp(p[1])) + 1e-3).logpdf(x)
    if name == "categorical":
        return np.log(np.take_along_axis(np.exp(p), x[None].astype(int), 0)[0] / np.exp(p).sum(0))
    if name == "logistic":
        upper = np.where(x == 255, np.inf, (2 * x + 1) / 255 - 1)
        lower = np.where(x == 0, -np.inf, (2 * x - 1) / 255 - 1)
        d = stats.logistic(p[0], np.exp(soft_clamp(p[1], 7.0)))
        return np.log(d.cdf(upper) - d.cdf(lower))
    if name == "poisson":
        return stats.poisson(np.exp(soft_clamp(p[0]))).logpmf(x)
    mean, r = np.exp(soft_clamp(p[0])), np.exp(soft_clamp(p[1]))
    return stats.nbinom(r, r / (r + mean)).logpmf(x)


@each
def test_log_prob_is_that_of_an_independent_formula(name: str) -> None:
    likelihood = BUILD[name]((3, 2)).double()
    params = random_params(likelihood, 500)
    x = likelihood(params).sample()
    expected = _truth(name, x.numpy(), params.movedim(1, 0).numpy())
    # A learned scale starts as a float32 number.
    tolerance = 1e-5 if name == "learned" else 1e-9
    np.testing.assert_allclose(likelihood(params).log_prob(x).detach(), expected,
                               rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SUPPORT)
def test_probabilities_over_the_support_sum_to_one(name: str) -> None:
    likelihood = BUILD[name]((5,)).double()
    x = SUPPORT[name].double().reshape(-1, 1, 1).expand(-1, 7, 5)
    log_prob = likelihood(random_params(likelihood, 7)).log_prob(x)
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(7, 5, dtype=torch.float64),
                               rtol=0, atol=1e-7)


@pytest.mark.parametrize("logit", [-1000.0, -20.0, -0.1001, -0.0999, 0.0, 1e-3, 3.0, 20.0, 1000.0])
def test_the_continuous_bernoulli_integrates_to_one_at_any_logit(logit: float) -> None:
    d = ContinuousBernoulliDistribution(torch.tensor(logit, dtype=torch.float64))
    x = torch.tensor(np.polynomial.legendre.leggauss(200)[0] / 2 + 0.5)
    weights = torch.tensor(np.polynomial.legendre.leggauss(200)[1] / 2)
    # A thousandfold slope needs the coordinate of the distribution's own boundary layer.
    width = min(1.0, 40 / max(abs(logit), 1e-9))
    near = 1 - x * width if logit > 0 else x * width
    total = (weights * d.log_prob(near).exp()).sum() * width
    assert total == pytest.approx(1, abs=1e-9)
    mean = (weights * near * d.log_prob(near).exp()).sum() * width
    torch.testing.assert_close(d.mean, mean, rtol=1e-9, atol=0)


@pytest.mark.parametrize("raw_scale", [-30.0, -3.0, 0.0, 3.0, 30.0])
@pytest.mark.parametrize("loc", [-2.0, -1.0, 0.1, 0.9, 5.0])
def test_the_discretized_logistic_sums_to_one_in_float32(loc: float, raw_scale: float) -> None:
    d = DiscretizedLogistic(())(torch.tensor([loc, raw_scale]))
    assert d.log_prob(torch.arange(256.0)).logsumexp(0) == pytest.approx(0, abs=1e-4)


def test_far_bins_of_the_discretized_logistic_keep_their_exact_log_probability() -> None:
    d = DiscretizedLogisticDistribution(torch.tensor(0.0), torch.tensor(1e-3))
    # exp(-a) (1 - exp(-2h / s)), where a is the distance of the nearer edge in scales
    expected = -(199 / 255 - 1 / 255) / 1e-3 + math.log(-math.expm1(-2 / 255 / 1e-3))
    assert d.log_prob(torch.tensor(227.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_levels", [2, 5, 65536])
def test_other_numbers_of_levels_sum_to_one(num_levels: int) -> None:
    d = DiscretizedLogistic((), num_levels=num_levels)(torch.tensor([0.2, -1.0]).double())
    assert d.log_prob(torch.arange(num_levels)).exp().sum() == pytest.approx(1, abs=1e-9)


def test_integer_images_have_the_log_probability_of_float_images() -> None:
    x = torch.tensor([0, 3, 200, 255])
    for likelihood in (DiscretizedLogistic((4,)), NegativeBinomial((4,))):
        d = likelihood(random_params(likelihood))
        torch.testing.assert_close(d.log_prob(x.to(torch.uint8)), d.log_prob(x.double()))


# Precision


@each
def test_float32_agrees_with_float64(name: str) -> None:
    likelihood = BUILD[name]((3, 2))
    params = random_params(likelihood, 500)
    x = copy.deepcopy(likelihood).double()(params).sample()
    exact = copy.deepcopy(likelihood).double()(params).log_prob(x)
    single = likelihood(params.float()).log_prob(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logit", [1e-6, 4.1e-3, 0.099, 0.101, 10.0, 17.0, 100.0])
def test_the_continuous_bernoulli_keeps_its_gradient_in_float32(logit: float) -> None:
    slopes = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([-logit, logit], dtype=dtype, requires_grad=True)
        ContinuousBernoulliDistribution(logits).log_prob(torch.full((2,), 0.3, dtype=dtype)
                                                         ).sum().backward()
        slopes.append(logits.grad.double())
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("raw", [0.0, 3.0, 5.0, 10.0, 30.0, 100.0])
def test_a_negative_binomial_near_poisson_keeps_its_digits_in_float32(raw: float) -> None:
    params, x = torch.tensor([1.5, raw]), torch.arange(30.0)
    single = NegativeBinomial(())(params).log_prob(x)
    exact = NegativeBinomial(())(params.double()).log_prob(x.double())
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-5)


def test_the_negative_binomial_becomes_poisson_at_large_concentration() -> None:
    x = torch.arange(30.0, dtype=torch.float64)
    binomial = NegativeBinomial(())(torch.tensor([1.5, 1e3], dtype=torch.float64)).log_prob(x)
    poisson = Poisson(())(torch.tensor([1.5], dtype=torch.float64)).log_prob(x)
    torch.testing.assert_close(binomial, poisson, rtol=1e-6, atol=1e-6)


# Gradients and scales


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_at_extreme_parameters(name: str, dtype: torch.dtype) -> None:
    likelihood = BUILD[name](()).to(dtype)
    grid = [torch.tensor(EXTREMES, dtype=dtype)] * likelihood.num_params
    params = torch.cartesian_prod(*grid).reshape(-1, likelihood.num_params).requires_grad_()
    for value in VALUES.get(name, [-1e3, 0.0, 1e3]):
        log_prob = likelihood(params).log_prob(torch.tensor(value, dtype=dtype))
        grad, = torch.autograd.grad(log_prob.sum(), params)
        assert log_prob.isfinite().all()
        assert grad.isfinite().all()


@each
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    likelihood = BUILD[name]((3,)).double()
    params = random_params(likelihood, 5)
    x = likelihood(params).sample()
    assert torch.autograd.gradcheck(lambda p: likelihood(p).log_prob(x), params.requires_grad_())


def test_a_decoder_that_starts_at_zero_has_the_exact_gradient() -> None:
    logits = torch.zeros(3, requires_grad=True)
    ContinuousBernoulli((3,))(logits).log_prob(torch.tensor([0.0, 0.3, 1.0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, -0.2, 0.5]))


@pytest.mark.parametrize("raw", [-100.0, 100.0])
def test_scales_and_rates_are_positive_and_finite_at_large_parameters(raw: float) -> None:
    params = torch.full((2, 5), raw)
    learned = LearnedGaussian((5,))
    learned.raw_scale.data.fill_(raw)
    scales = [HeteroscedasticGaussian((5,))(params).scale, DiscretizedLogistic((5,))(params).scale,
              Poisson((5,))(params).rate, NegativeBinomial((5,))(params).total_count,
              NegativeBinomial((5,))(params).mean, learned(params).scale]
    for scale in scales:
        assert (scale > 0).all()
        assert scale.isfinite().all()


@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 1e6])
def test_a_learned_scale_starts_where_asked(scale: float, per_dimension: bool) -> None:
    likelihood = LearnedGaussian((5,), scale, per_dimension=per_dimension)
    assert likelihood.scale.shape == ((5,) if per_dimension else ())
    np.testing.assert_allclose(likelihood.scale.detach(), scale, rtol=1e-5)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_a_learned_scale_finds_the_noise(per_dimension: bool) -> None:
    likelihood = LearnedGaussian((2,), per_dimension=per_dimension)
    x = torch.tensor([0.1, 0.5]) * torch.randn(1000, 2)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-likelihood(torch.zeros(1000, 2)).log_prob(x).mean()).backward()
        optimizer.step()
    found = x.square().mean(0).sqrt() if per_dimension else x.square().mean().sqrt()
    torch.testing.assert_close(likelihood.scale.detach(), found, rtol=0.01, atol=0)


# Means and draws


@pytest.mark.parametrize("name", [name for name in BUILD if name != "categorical"])
def test_the_mean_is_that_of_the_draws(name: str) -> None:
    likelihood = BUILD[name]((3, 2)).double()
    params = random_params(likelihood, 4)
    draws = likelihood(params).sample((20_000,)).double()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - likelihood.mean(params)).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("raw_scale", [-100.0, -3.0, 0.0])
def test_the_mean_of_the_discretized_logistic_is_the_sum_over_levels(raw_scale: float) -> None:
    d = DiscretizedLogistic(())(torch.tensor([0.31, raw_scale], dtype=torch.float64))
    levels = torch.arange(256.0, dtype=torch.float64)
    torch.testing.assert_close(d.mean, (levels * d.log_prob(levels).exp()).sum())


@pytest.mark.parametrize("logit", [-1000.0, -30.0, 0.0, 1e-6, 30.0, 1000.0])
def test_draws_of_the_continuous_bernoulli_follow_its_distribution(logit: float) -> None:
    draws = ContinuousBernoulliDistribution(torch.tensor(logit)).sample((20_000,)).double()
    size = max(abs(logit), 1e-9)
    falling = (1 - draws if logit > 0 else draws).numpy()
    uniform = np.expm1(-size * falling) / np.expm1(-size)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_draws_of_the_discretized_logistic_have_its_frequencies() -> None:
    d = DiscretizedLogisticDistribution(torch.tensor(0.8), torch.tensor(0.3), num_levels=8)
    draws = d.sample((20_000,))
    counts = torch.bincount(draws.long(), minlength=8)
    expected = d.log_prob(torch.arange(8.0)).exp().double()
    assert stats.chisquare(counts, 20_000 * expected / expected.sum()).pvalue > 1e-4


def test_a_categorical_shows_the_most_probable_class() -> None:
    params = torch.zeros(7, 4, 5)
    params[:, 2] = 1.0
    assert (Categorical((5,), num_classes=4).mean(params) == 2).all()


# Shapes


@each
@pytest.mark.parametrize("batch", [(), (7,), (2, 3, 7)])
@pytest.mark.parametrize("event", [(), (5,), (1,), (3, 4, 2)])
def test_shapes_are_batch_then_event(name: str, event: tuple, batch: tuple) -> None:
    likelihood = BUILD[name](event)
    params = random_params(likelihood, *batch, dtype=torch.float32)
    d = likelihood(params)
    assert (d.batch_shape, d.event_shape) == (batch + event, ())
    assert d.log_prob(d.sample()).shape == likelihood.mean(params).shape == batch + event
    assert d.sample((6,)).shape == (6, *batch, *event)
    assert d.to_event(len(event)).log_prob(d.sample()).shape == batch


@each
def test_expanded_distributions_agree_with_their_own_rows(name: str) -> None:
    likelihood = BUILD[name]((5,))
    d = likelihood(random_params(likelihood, dtype=torch.float32))
    x = d.expand((3, 5)).sample()
    assert type(d.expand((3, 5))) is type(d)
    torch.testing.assert_close(d.expand((3, 5)).log_prob(x), d.log_prob(x))


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli", "gaussian", "learned",
                                  "learned_per_dimension", "poisson"])
def test_a_single_parameter_may_leave_its_dimension_away(name: str) -> None:
    likelihood = BUILD[name]((3, 2))
    params = random_params(likelihood, 7, dtype=torch.float32)
    x = likelihood(params).sample()
    torch.testing.assert_close(likelihood(params.squeeze(1)).log_prob(x),
                               likelihood(params).log_prob(x))


def test_parameters_that_end_in_one_and_the_event_have_the_dimension() -> None:
    assert Bernoulli((1, 5))(torch.zeros(4, 1, 5)).batch_shape == (4, 1, 5)
    assert Bernoulli((1, 5))(torch.zeros(4, 1, 1, 5)).batch_shape == (4, 1, 5)
    assert Bernoulli((1, 5))(torch.zeros(1, 1, 5)).batch_shape == (1, 5)


@each
@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8],
                         ids=str)
def test_as_input_has_the_input_shape(name: str, batch: tuple, dtype: torch.dtype) -> None:
    likelihood = BUILD[name]((3, 2))
    x = torch.ones(*batch, 3, 2, dtype=dtype)
    inputs = likelihood.as_input(x)
    assert inputs.shape == batch + likelihood.input_shape((3, 2))
    assert inputs.dtype == (dtype if dtype.is_floating_point else torch.float32)


def test_as_input_scales_counts_levels_and_classes() -> None:
    x = torch.tensor([0, 3])
    assert Poisson((2,)).as_input(x).tolist() == pytest.approx([0, math.log(4)])
    assert NegativeBinomial((2,)).as_input(x).tolist() == pytest.approx([0, math.log(4)])
    assert DiscretizedLogistic((2,), 4).as_input(x).tolist() == pytest.approx([-1, 1])
    assert Categorical((2,), 4).as_input(x).T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert Categorical((2,), 4).as_input(torch.tensor([math.nan, 1.0]))[:, 0].tolist() == [0] * 4


# As part of a Pyro model


@each
def test_a_mask_drops_elements_of_the_log_density(name: str) -> None:
    likelihood = BUILD[name]((3, 2))
    params = random_params(likelihood, 7, dtype=torch.float32)
    d = likelihood(params)
    x, seen = d.sample(), torch.rand(7, 3, 2) < 0.5

    def model() -> None:
        with pyro.plate("data", 7):
            pyro.sample("x", likelihood(params).mask(seen).to_event(2), obs=x)

    expected = torch.where(seen, d.log_prob(x), torch.zeros(())).sum()
    torch.testing.assert_close(poutine.trace(model).get_trace().log_prob_sum(), expected)


@each
@pytest.mark.parametrize("method", ["forward", "as_input"])
def test_no_value_is_read_while_recording(name: str, method: str) -> None:
    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                               ) -> Any:
            reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
            assert func.overloadpacket.__name__ not in reads
            return func(*args, **(kwargs or {}))

    likelihood = BUILD[name]((3, 2))
    params = random_params(likelihood, 7, dtype=torch.float32)
    x = likelihood(params).sample()
    pyro.enable_validation(False)
    with NoReads():
        if method == "forward":
            likelihood(params).log_prob(x)
        else:
            likelihood.as_input(x)


@each
def test_the_host_decides_about_validation(name: str) -> None:
    likelihood = BUILD[name]((5,))
    params = random_params(likelihood, dtype=torch.float32)
    with pytest.raises(ValueError, match="within the support"):
        likelihood(params).log_prob(torch.full((5,), math.nan))
    pyro.enable_validation(False)
    d = likelihood(params)
    if name != "categorical":  # it looks the value up, as an index
        assert d.log_prob(torch.full((5,), math.nan)).isnan().all()


def test_negative_scales_of_the_discretized_logistic_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogisticDistribution(torch.zeros(3), -torch.ones(3))


@each
def test_likelihoods_pickle_and_copy(name: str) -> None:
    likelihood = BUILD[name]((3, 2))
    params = random_params(likelihood, 7, dtype=torch.float32)
    x = likelihood(params).sample()
    for twin in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        twin.load_state_dict(likelihood.state_dict())
        assert repr(twin) == repr(likelihood)
        assert torch.equal(twin(params).log_prob(x), likelihood(params).log_prob(x))


def test_the_repr_shows_the_options() -> None:
    assert repr(Bernoulli((28, 28))) == "Bernoulli((28, 28))"
    assert repr(Gaussian((5,), scale=0.1)) == "Gaussian((5,), scale=0.1)"
    assert repr(Categorical((5,), 3)) == "Categorical((5,), num_classes=3)"
    assert repr(LearnedGaussian((5,))) == "LearnedGaussian((5,), per_dimension=False)"


def test_discrete_tells_probabilities_from_densities() -> None:
    discrete = {name for name in BUILD if BUILD[name](()).discrete}
    assert discrete == set(SUPPORT)


# Messages


@each
def test_good_data_pass_in_any_dtype(name: str) -> None:
    likelihood = BUILD[name]((2,))
    likelihood.check("VAE", torch.tensor([[0.0, 1.0]]))
    likelihood.check("VAE", torch.tensor([[0, 1]], dtype=torch.uint8))
    likelihood.check("VAE", torch.tensor([[False, True]]))
    likelihood.check("VAE", torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))
    likelihood.check("VAE", likelihood(random_params(likelihood, 9).float()).sample())


BAD = [
    (Bernoulli((2,)), 0.5, "VAE expected binary data (0 or 1) for Bernoulli, got 0.5. "
     "For data between 0 and 1: ContinuousBernoulli(event_shape)."),
    (ContinuousBernoulli((2,)), 1.0000001, "VAE expected data between 0 and 1 for "
     "ContinuousBernoulli, got 1.0000001. Rescale them (8-bit images: x / 255), or use "
     "Gaussian(event_shape)."),
    (Categorical((2,), 3), 3.0, "VAE expected classes (integers 0 to 2) for Categorical, got 3. "
     "Build it with more classes; for real data: Gaussian(event_shape)."),
    (Categorical((2,), 3), 0.5, "VAE expected classes (integers 0 to 2) for Categorical, got 0.5."),
    (DiscretizedLogistic((2,)), 0.5, "VAE expected levels (integers 0 to 255) for "
     "DiscretizedLogistic, got 0.5. Data between 0 and 1: (x * 255).round(), or "
     "ContinuousBernoulli(event_shape)."),
    (DiscretizedLogistic((2,), 16), 16.0, "VAE expected levels (integers 0 to 15) for "
     "DiscretizedLogistic, got 16. Data between 0 and 1: (x * 15).round()"),
    (Poisson((2,)), 2.5, "VAE expected counts (integers >= 0) for Poisson, got 2.5. "
     "For continuous data: Gaussian(event_shape)."),
    (NegativeBinomial((2,)), -1.0, "VAE expected counts (integers >= 0) for NegativeBinomial, "
     "got -1. For continuous data: Gaussian(event_shape)."),
]


@pytest.mark.parametrize(("likelihood", "value", "message"), BAD)
def test_values_outside_of_the_support_are_named(likelihood: Likelihood, value: float,
                                                 message: str) -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, value]])
    with pytest.raises(ValueError, match=re.escape(message)):
        likelihood.check("VAE", x)
    likelihood.check("VAE", x, torch.tensor([[True, True], [True, False]]))
    likelihood.check("VAE", x, torch.tensor([True, False]))


@each
@pytest.mark.parametrize(("value", "mask"), [(math.nan, "~x.isnan()"), (math.inf, "x.isfinite()"),
                                             (-math.inf, "x.isfinite()")])
def test_seen_values_must_be_finite(name: str, value: float, mask: str) -> None:
    x = torch.tensor([[0.0, value]])
    message = f"VAE expected finite data, got {value}. Missing entries: pass mask={mask}."
    with pytest.raises(ValueError, match=re.escape(message)):
        BUILD[name]((2,)).check("VAE", x)
    BUILD[name]((2,)).check("VAE", x, x.isfinite())


@pytest.mark.parametrize(("mask", "message"), [
    (torch.ones(2), "VAE expected `mask` to be a boolean tensor, true where the data are seen, "
                    "got torch.float32. Pass mask=~x.isnan()."),
    ([True, True], "true where the data are seen, got list."),
    (torch.ones(3, dtype=torch.bool), "VAE expected a `mask` that broadcasts to the data, of "
                                      "shape (4, 2), got (3,)."),
    (torch.ones(5, 4, 2, dtype=torch.bool), "of shape (4, 2), got (5, 4, 2)."),
])
def test_a_mask_must_be_one_of_the_data(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Bernoulli((2,)).check("VAE", torch.zeros(4, 2), mask)


@pytest.mark.parametrize("shape", [(7, 5), (7, 3, 5), (7, 2, 4), (5,), (2,), ()])
def test_parameters_of_another_shape_name_the_way_out(shape: tuple) -> None:
    message = (f"HeteroscedasticGaussian expected `params` of shape (*batch, 2, 5), got {shape}. "
               f"A decoder must output (*batch, num_params, *event_shape), here num_params=2 and "
               f"event_shape=(5,).")
    with pytest.raises(ValueError, match=re.escape(message)):
        HeteroscedasticGaussian((5,))(torch.zeros(shape))
    with pytest.raises(ValueError, match=re.escape("(*batch, 2, 5), got")):
        HeteroscedasticGaussian((5,)).mean(torch.zeros(shape))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Bernoulli(5), "Bernoulli expected `event_shape` to be a sequence of integers, got "
                           "5. For one: event_shape=(64,)."),
    (lambda: Gaussian("5"), "Gaussian expected `event_shape` to be a sequence"),
    (lambda: Poisson((5, 0)), "Poisson expected `event_shape` to be an integer >= 1, got 0."),
    (lambda: Poisson((True,)), "an integer >= 1, got True."),
    (lambda: Gaussian((5,), 0.0), "Gaussian expected `scale` to be a positive number, got 0.0."),
    (lambda: Gaussian((5,), "a"), "Gaussian expected `scale` to be a positive number, got 'a'."),
    (lambda: LearnedGaussian((5,), -1), "LearnedGaussian expected `scale` to be a positive "
                                        "number, got -1."),
    (lambda: LearnedGaussian((5,), 1e-9), "LearnedGaussian expected `scale` between 2.1e-09 and "
                                          "4.9e+08, got 1e-09. Rescale the data."),
    (lambda: LearnedGaussian((5,), per_dimension="yes"),
     "LearnedGaussian expected `per_dimension` to be True or False, got 'yes'."),
    (lambda: HeteroscedasticGaussian((5,), min_scale=0), "HeteroscedasticGaussian expected "
     "`min_scale` to be a positive number, got 0."),
    (lambda: Categorical((5,), 1), "Categorical expected `num_classes` to be an integer >= 2, "
                                   "got 1."),
    (lambda: DiscretizedLogistic((5,), 1.5), "DiscretizedLogistic expected `num_levels` to be an "
                                             "integer >= 2, got 1.5."),
])
def test_options_are_checked_when_built(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
