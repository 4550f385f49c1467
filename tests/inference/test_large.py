"""Many latents: Gaussians from their curvature, draws in parts, chains without a matrix."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi.flows import FixedLinear, FixedLowRank, Flow, Gaussian, auto
from pyro_nfvi.inference import importance
from pyro_nfvi.inference import score as score_room
from pyro_nfvi.inference.curvature import _krylov, curved
from pyro_nfvi.inference.drift import drift
from pyro_nfvi.inference.hmc import short_chains
from pyro_nfvi.inference.importance import importance_sample
from pyro_nfvi.inference.initialization import gaussian_start
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, log_joint_of

WIDTHS = torch.logspace(-1, 1, 2000, dtype=DOUBLE)


def independent(dim, dtype=DOUBLE):
    """Log density of independent normals, of widths between 0.1 and 10, and its moments."""
    loc = torch.linspace(-3, 3, dim).to(dtype)
    scale = torch.logspace(-1, 1, dim, dtype=dtype)
    normal = torch.distributions.Normal(loc, scale, validate_args=False)
    return lambda z: normal.log_prob(z).sum(-1), loc, scale


def walk(dim, step=0.3):
    """Log density of a random walk seen with noise, up to a constant, and its precision."""
    y = torch.linspace(-2, 2, dim, dtype=DOUBLE).sin()
    gaps = torch.eye(dim, dtype=DOUBLE).diff(dim=0)
    precision = torch.eye(dim, dtype=DOUBLE) + gaps.T @ gaps / step ** 2

    def log_density(z):
        moves = (z[..., 1:] - z[..., :-1]) / step
        return -0.5 * moves.square().sum(-1) - 0.5 * (z - y).square().sum(-1)
    return log_density, torch.linalg.solve(precision, y), precision


def hierarchy(dim):
    """Groups around a common mean, up to a constant: a precision of diagonal plus low rank."""
    width = torch.logspace(-0.5, 0.5, dim - 1, dtype=DOUBLE)

    def log_density(z):
        mean, groups = z[..., :1], z[..., 1:]
        return (-0.5 * mean.square().sum(-1) - 0.5 * ((groups - mean) / 0.5).square().sum(-1)
                - 0.5 * ((groups - 1) / width).square().sum(-1))
    precision = torch.zeros(dim, dim, dtype=DOUBLE)
    precision[0, 0] = 1 + 4 * (dim - 1)
    precision[0, 1:] = precision[1:, 0] = -4
    precision[1:, 1:] = (4 + width ** -2).diag()
    pull = torch.cat([torch.zeros(1, dtype=DOUBLE), width ** -2])
    return log_density, torch.linalg.solve(precision, pull), precision


def wide(dim, dtype=DOUBLE):
    """The standard normal, as a Gaussian of low rank."""
    zeros = torch.zeros(dim, dtype=dtype)
    frame = FixedLowRank(zeros, zeros + 1, torch.zeros(dim, 0, dtype=dtype), zeros[:0])
    return Flow(frame, Gaussian(dim).to(zeros))


def boxes(dim):
    return lambda count: 4 * torch.rand(count, dim, dtype=DOUBLE) - 2


@pytest.mark.parametrize(("dim", "dtype"), [(500, torch.float32), (500, DOUBLE),
                                            pytest.param(10_000, DOUBLE, marks=pytest.mark.slow)],
                         ids=["500-single", "500-double", "10000-double"])
def test_independent_latents_of_any_number_get_their_own_scales(dim, dtype):
    torch.manual_seed(0)
    target, loc, scale = independent(dim, dtype)
    found, = curved(Score(target), wide(dim, dtype))
    assert isinstance(found.bijection, FixedLowRank)
    tolerance = {DOUBLE: 1e-6, torch.float32: 1e-2}[dtype]
    assert ((found.bijection.shift - loc) / scale).abs().max() < tolerance
    assert (found.bijection.scale / scale - 1).abs().max() < tolerance


def test_a_hierarchy_is_of_low_rank_and_found_to_a_percent():
    torch.manual_seed(0)
    target, mean, precision = hierarchy(600)
    found = curved(Score(target), wide(600), max_dense=0)[0].bijection
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((found.shift - mean) / sd).abs().max() < 0.02
    factor = found.factor()
    assert ((factor @ factor.T).diagonal().sqrt() / sd - 1).abs().max() < 0.01


def test_a_walk_needs_a_full_covariance_and_gets_one():
    torch.manual_seed(0)
    target, mean, precision = walk(500)
    low, full = curved(Score(target), wide(500))
    covariance = torch.linalg.inv(precision)
    assert isinstance(full.bijection, FixedLinear)
    torch.testing.assert_close(full.bijection.shift, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(full.bijection.lower, torch.linalg.cholesky(covariance),
                               rtol=0, atol=1e-6)
    z = low.rsample_and_log_prob((2000,))[0]
    assert (z.std(0) / covariance.diagonal().sqrt()).mean() < 0.8  # what low rank misses


@pytest.mark.parametrize("max_dense", [0, 499], ids=["none", "fewer"])
def test_no_matrix_is_made_of_more_latents_than_allowed(max_dense):
    target, *_ = walk(500)
    assert len(curved(Score(target), wide(500), max_dense)) == 1


def test_the_gaussian_stage_of_many_latents_is_exact_where_it_can_be():
    torch.manual_seed(0)
    target, loc, scale = independent(1000)
    start = gaussian_start(Score(target), boxes(1000))
    assert start.elbo[0] == pytest.approx(0.0, abs=0.01)  # the log mass of a density
    torch.testing.assert_close(start.flow.bijection.shift, loc, rtol=0, atol=1e-3)


def test_one_latent_is_as_good_as_many():
    torch.manual_seed(0)
    target, loc, scale = independent(1)
    start = gaussian_start(Score(target), boxes(1))
    assert start.elbo[0] == pytest.approx(0.0, abs=0.01)
    assert start.flow.bijection.lower.item() == pytest.approx(scale.item(), rel=0.01)


def test_a_density_without_curvature_keeps_what_it_had():
    torch.manual_seed(0)
    start = wide(500)
    found, = curved(Score(lambda z: 0 * z.sum(-1)), start, max_dense=0)
    assert found.bijection.scale.isfinite().all()
    assert found.bijection.scale.min() >= 1


def test_a_krylov_space_of_few_latents_ends_at_all_of_them():
    matrix = torch.diag(torch.arange(1.0, 7.0, dtype=DOUBLE))
    space, small = _krylov(lambda v: matrix @ v, torch.ones(6, dtype=DOUBLE))
    torch.testing.assert_close(space.T @ space, torch.eye(space.shape[1], dtype=DOUBLE))
    torch.testing.assert_close(small, space.T @ matrix @ space)


def test_scores_computed_in_parts_are_those_computed_at_once(monkeypatch):
    target, *_ = independent(50)
    z = torch.randn(100, 50, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    whole = Score(target)(z)
    monkeypatch.setattr(score_room, "BATCH_BYTES", 30_000)
    score = Score(target)
    parts = score(z)
    torch.testing.assert_close(parts, whole)
    assert score.evaluations == 100
    assert len(score._compiled) == 1  # sizes
    assert max(score._compiled) < 50


def test_draws_made_and_scored_in_parts_are_draws_of_the_flow(monkeypatch):
    target, *_ = independent(40)
    monkeypatch.setattr(importance, "DRAWN_NUMBERS", 40 * 700)
    monkeypatch.setattr(importance, "CHUNK_BYTES", 1e5)
    torch.manual_seed(0)
    flow = wide(40)
    sample = importance_sample(flow, target, 2000)
    assert sample.z.shape == (2000, 40)
    assert len(sample.z.unique(dim=0)) == 2000
    torch.testing.assert_close(sample.log_q, flow.log_prob(sample.z))
    torch.testing.assert_close(sample.log_p, target(sample.z))


def test_chains_run_on_scales_as_on_their_diagonal_matrix():
    target, _, scale = independent(5)
    ends = []
    for factor in (scale, scale.diag()):
        torch.manual_seed(0)
        ends.append(short_chains(Score(target), torch.zeros(30, 5, dtype=DOUBLE), factor, 4).end)
    torch.testing.assert_close(*ends)


def test_chains_of_many_latents_stay_at_an_exact_fit_and_leave_a_narrow_one():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2000), WIDTHS).to_event(1))
    torch.manual_seed(0)
    log_joint = log_joint_of(model)
    score = Score(log_joint)
    found = []
    for width in (1.0, 0.5):
        zeros = torch.zeros(2000, dtype=DOUBLE)
        frame = FixedLowRank(zeros, width * WIDTHS, zeros[:, None][:, :0], zeros[:0])
        flow = Flow(frame, Gaussian(2000).to(zeros))
        sample = importance_sample(flow, log_joint, 2000)
        score(sample.z[:12])
        found.append(drift(score, flow, sample, log_joint.layout, 5e7).found)
    assert found == [False, True]


@pytest.mark.parametrize("dim", [1, 20, 21, 256, 257, 10_000])
def test_the_automatic_flow_grows_no_faster_than_its_latents(dim):
    size = sum(p.numel() for p in auto(dim).parameters())
    assert size < 2500 * dim if dim <= 256 else size < 60 * dim
    assert auto(dim).input_dim == dim
