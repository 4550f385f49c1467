"""Importance weights: ArviZ's own smoothing, ESS, resampling, draws of no use."""

from __future__ import annotations

import math
import warnings

import arviz
import numpy as np
import pytest
import torch
from torch.distributions import Normal, StudentT

from pyro_nfvi.flows import Diagonal, Flow, Gaussian
from pyro_nfvi.inference import ImportanceSample, importance_sample
from pyro_nfvi.inference.importance import CHUNK

DOUBLE = torch.float64


def make_flow(dim=1):
    return Flow(Diagonal(dim).double(), Gaussian(dim).double())


def wide(z):
    return StudentT(3.0).log_prob(z).sum(-1) + 7.0


def normal(z):
    return Normal(0.0, 1.0).log_prob(z).sum(-1) + 7.0


def make_sample(log_weights):
    log_weights = torch.as_tensor(log_weights, dtype=DOUBLE)
    nothing = torch.zeros_like(log_weights)
    return ImportanceSample(nothing.unsqueeze(-1), nothing, nothing,
                            log_weights - torch.logsumexp(log_weights, 0), 0.0)


# ------------------------------------------------------------------ weights

def test_weights_and_k_hat_agree_with_arviz():
    sample = importance_sample(make_flow(), wide, 3000)
    ratios = (sample.log_p - sample.log_q).numpy()
    expected, pareto_k = arviz.psislw(ratios.copy())
    np.testing.assert_allclose(sample.log_weights.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert sample.pareto_k == pytest.approx(float(pareto_k), rel=1e-12)
    assert sample.pareto_k > 0.5


def test_the_parts_are_what_flow_and_log_joint_say():
    flow = make_flow(2)
    sample = importance_sample(flow, wide, 50)
    assert (sample.z.shape, sample.num_samples) == ((50, 2), 50)
    torch.testing.assert_close(sample.log_p, wide(sample.z))
    torch.testing.assert_close(sample.log_q, flow.log_prob(sample.z))
    assert not sample.z.requires_grad
    assert not sample.log_q.requires_grad


def test_weights_are_normalized():
    sample = importance_sample(make_flow(), wide, 1000)
    assert torch.logsumexp(sample.log_weights, 0).abs() < 1e-12


def test_weights_recover_another_distribution():
    # Target N(0.5, 0.8), guide N(0, 1): E[z] from weights, standard error by the delta method.
    sample = importance_sample(make_flow(), lambda z: Normal(0.5, 0.8).log_prob(z).sum(-1), 20_000)
    weights, z = sample.log_weights.exp(), sample.z[:, 0]
    mean = (weights * z).sum()
    assert abs(mean - 0.5) < 4 * ((weights * (z - mean)) ** 2).sum().sqrt()


def test_a_draw_at_which_a_matrix_has_no_factor_costs_no_other():
    def log_joint(z):
        return normal(z) + torch.linalg.cholesky(1.5 + z.unsqueeze(-1)).squeeze((-1, -2)) * 0
    sample = importance_sample(make_flow(), log_joint, 500)
    bad = (sample.z <= -1.5).squeeze(-1)
    assert 0 < bad.sum() < 100
    assert torch.equal(sample.log_p.isfinite(), ~bad)
    assert torch.equal(sample.log_weights.isfinite(), ~bad)


def test_the_log_joint_is_called_on_a_chunk_at_a_time():
    sizes = []

    def log_joint(z):
        sizes.append(len(z))
        return normal(z)
    importance_sample(make_flow(), log_joint, 2 * CHUNK + 1)
    assert sizes == [2, CHUNK, CHUNK, 1]  # the first two tell how much memory it takes


def test_an_exact_fit_has_equal_weights_and_no_tail():
    sample = importance_sample(make_flow(3), normal, 1000)
    assert sample.pareto_k == -math.inf
    assert (sample.log_weights == -math.log(1000)).all()
    assert sample.ess == pytest.approx(1000)
    assert sample.elbo[0] == pytest.approx(7)
    assert sample.elbo[1] < 1e-12


def test_an_exact_fit_in_single_precision_has_a_small_k_hat():
    flow = Flow(Diagonal(3), Gaussian(3))
    sample = importance_sample(flow, normal, 2000)
    assert sample.pareto_k < 0.5
    assert sample.ess == pytest.approx(2000, rel=1e-4)
    assert sample.log_weights.dtype == sample.log_p.dtype == sample.log_q.dtype == DOUBLE


def test_a_guide_too_narrow_has_a_large_k_hat():
    flow = make_flow(5)
    with torch.no_grad():
        flow.bijection.log_scale.value.fill_(-2.0)
    sample = importance_sample(flow, normal, 2000)
    assert sample.pareto_k > 0.7
    assert sample.ess < 200


# ------------------------------------------------------------------ draws of no use

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_draws_whose_log_joint_is_not_finite_get_no_weight(bad):
    def log_joint(z):
        return torch.where(z[:, 0] > 0.5, torch.tensor(bad, dtype=DOUBLE), wide(z))
    sample = importance_sample(make_flow(), log_joint, 2000)
    cut = sample.z[:, 0] > 0.5
    assert 0 < cut.sum() < 2000
    assert (sample.log_weights[cut] == -math.inf).all()
    assert sample.log_weights[~cut].isfinite().all()
    assert torch.logsumexp(sample.log_weights, 0).abs() < 1e-12
    assert torch.equal(sample.finite, ~cut)
    assert all(map(math.isfinite, (sample.ess, sample.pareto_k, *sample.elbo)))
    assert not cut[sample.resample(5000)].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_no_finite_log_joint_at_all_gives_an_infinite_k_hat(bad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = importance_sample(make_flow(), lambda z: torch.full((len(z),), bad).double(), 100)
    assert sample.pareto_k == math.inf
    assert sample.log_weights.isfinite().all()
    assert sample.elbo[0] == -math.inf
    assert sample.resample(10).shape == (10,)


@pytest.mark.parametrize("num_finite", [1, 3, 5, 6, 24])
def test_a_few_finite_draws_get_all_the_weight_and_an_infinite_k_hat(num_finite):
    def log_joint(z):
        return wide(z).where(torch.arange(len(z)) < num_finite, torch.tensor(math.nan).double())
    sample = importance_sample(make_flow(), log_joint, 100)
    expected = torch.softmax((sample.log_p - sample.log_q)[:num_finite], 0)
    torch.testing.assert_close(sample.log_weights[:num_finite].exp(), expected)
    assert (sample.log_weights[num_finite:] == -math.inf).all()
    assert sample.pareto_k == math.inf


def test_an_exact_fit_on_part_of_the_draws_gives_them_equal_weights():
    sample = importance_sample(
        make_flow(), lambda z: normal(z).where(z[:, 0] < 0, torch.tensor(-math.inf).double()), 500)
    used = sample.log_weights[sample.z[:, 0] < 0]
    assert torch.allclose(used, torch.tensor(-math.log(len(used)), dtype=DOUBLE))
    assert sample.ess == pytest.approx(len(used))


# ------------------------------------------------------------------ statistics

def test_ess_is_the_inverse_of_the_sum_of_squared_weights():
    assert make_sample(np.log([0.5, 0.25, 0.25])).ess == pytest.approx(1 / 0.375)
    assert make_sample([0.0] * 8).ess == pytest.approx(8)
    assert make_sample([0.0, -math.inf, -math.inf]).ess == pytest.approx(1)


def test_elbo_comes_with_its_standard_error():
    sample = importance_sample(make_flow(), wide, 500)
    terms = (sample.log_p - sample.log_q).numpy()
    assert sample.elbo == pytest.approx((terms.mean(), terms.std(ddof=1) / 500 ** 0.5))


@pytest.mark.parametrize("num_samples", [1, 7, 100, 10_000])
def test_systematic_resampling_is_off_by_less_than_one_copy(num_samples):
    sample = importance_sample(make_flow(), wide, 300)
    counts = torch.bincount(sample.resample(num_samples), minlength=300)
    assert counts.sum() == num_samples
    assert (counts - num_samples * sample.log_weights.exp()).abs().max() < 1


@pytest.mark.parametrize("seed", [0, 1, 1042, 2469])  # the last two failed in float32
def test_equal_weights_take_every_draw_once(seed):
    torch.manual_seed(seed)
    chosen = make_sample([0.0] * 10_000).resample(10_000)
    assert torch.equal(chosen.sort().values, torch.arange(10_000))


def test_resampling_is_unbiased_and_in_random_order():
    sample = make_sample(np.log([0.1, 0.2, 0.7]))
    counts = sum(torch.bincount(sample.resample(5), minlength=3) for _ in range(2000)) / 2000
    assert (counts - torch.tensor([0.5, 1.0, 3.5])).abs().max() < 4 * 0.5 / 2000 ** 0.5
    chosen = make_sample([0.0] * 1000).resample(1000).double()
    assert not torch.equal(chosen, chosen.sort().values)
    assert abs(torch.corrcoef(torch.stack([chosen, torch.arange(1000.0).double()]))[0, 1]) < 0.13
