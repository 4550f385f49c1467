"""Flow and FlowDistribution: a flow is a distribution, and its path gradient is one too."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal, TransformedDistribution

from pyro_nfvi.flows import (
    Compose,
    Diagonal,
    Flow,
    FlowDistribution,
    Gaussian,
    Mixture,
    Planar,
    Radial,
    StudentT,
    Sylvester,
    Triangular,
    iaf,
    maf,
    nsf,
)
from pyro_nfvi.testing import perturb
from tests.cases import BASES

FLOWS = {
    "planar-radial": lambda context_dim: Compose([Planar(3, context_dim), Radial(3, context_dim)]),
    "sylvester": lambda context_dim: Sylvester(3, context_dim),
    "nsf": lambda context_dim: nsf(3, context_dim, num_layers=2),
    "iaf": lambda context_dim: iaf(3, context_dim, num_layers=2),
    "maf": lambda context_dim: maf(3, context_dim, num_layers=2),
}
with_and_without_context = pytest.mark.parametrize("context_dim", [0, 2],
                                                   ids=["no-context", "context"])
every_base = pytest.mark.parametrize("base", BASES)
every_flow = pytest.mark.parametrize("name", FLOWS)


def make_flow(name="nsf", context_dim=0, base="gaussian", device="cpu"):
    return perturb(Flow(FLOWS[name](context_dim), BASES[base](3))).to(device).double()


def make_context(context_dim, *batch, device="cpu"):
    return torch.randn(*batch, context_dim, device=device).double() if context_dim else None


# ------------------------------------------------------------------ a distribution

@pytest.mark.parametrize("batch", [(), (5,), (4, 5)], ids=str)
@with_and_without_context
def test_shapes_are_sample_then_batch_then_event(context_dim, batch, device):
    batch = batch if context_dim else ()
    q = make_flow("nsf", context_dim, device=device)(make_context(context_dim, *batch,
                                                                  device=device))
    assert (q.batch_shape, q.event_shape) == (batch, (3,))
    for sample in ((), (7,), (6, 7)):
        z = q.sample(sample)
        assert z.shape == (*sample, *batch, 3)
        assert q.log_prob(z).shape == (*sample, *batch)
        z, log_prob = q.rsample_and_log_prob(sample)
        assert (z.shape, log_prob.shape) == ((*sample, *batch, 3), (*sample, *batch))


@every_base
@every_flow
@with_and_without_context
def test_every_way_to_the_log_density_agrees(name, base, context_dim, device):
    flow = make_flow(name, context_dim, base, device)
    context = make_context(context_dim, 5, device=device)
    z, log_prob = flow.rsample_and_log_prob((6, 5)[:1 + (not context_dim)], context)
    assert log_prob.shape == (6, 5)
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-7)
    close(flow.log_prob(z, context), log_prob)
    close(flow(context).log_prob(z), log_prob)
    u, log_det = flow.bijection.inverse(z, context)
    close(flow.base.log_prob(u) + log_det, log_prob)
    z, log_prob = flow(context).rsample_and_log_prob((6,))
    close(flow.log_prob(z, context), log_prob)


def test_a_triangular_flow_is_the_gaussian_it_should_be():
    flow = perturb(Flow(Triangular(3))).double()
    factor = torch.func.jacrev(lambda u: flow.bijection(u)[0])(torch.zeros(3).double()).detach()
    loc, _ = flow.bijection(torch.zeros(3).double())
    z = 3 * torch.randn(100, 3).double()
    truth = MultivariateNormal(loc, scale_tril=factor)
    torch.testing.assert_close(flow.log_prob(z), truth.log_prob(z))
    draws = flow().sample((100_000,))
    error = draws.T.cov() - truth.covariance_matrix
    scale = truth.variance.sqrt()
    assert (error.abs() <= 4 * (2 / 100_000) ** 0.5 * torch.outer(scale, scale)).all()
    assert ((draws.mean(0) - loc).abs() <= 4 * scale / 100_000 ** 0.5).all()


def test_the_score_of_a_flow_has_mean_zero():
    flow = perturb(Flow(Compose([Planar(2), Diagonal(2)]), StudentT(2, df=8.0, learn=True)))
    flow = flow.double()
    z = flow().sample((4000,))
    parameters = dict(flow.named_parameters())

    def log_prob(parameters, z):
        return torch.func.functional_call(LogProb(flow), parameters, (z,))
    parameters = {f"flow.{name}": p.detach() for name, p in parameters.items()}
    scores = torch.func.vmap(torch.func.grad(log_prob), (None, 0))(parameters, z)
    for name, score in scores.items():
        error = score.std(0) / len(z) ** 0.5
        assert (score.mean(0).abs() <= 4 * error).all(), name


class LogProb(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, z):
        return self.flow.log_prob(z)


@with_and_without_context
def test_expand_repeats_the_flow(context_dim, device):
    flow = make_flow("nsf", context_dim, device=device)
    q = flow(make_context(context_dim, *[5][:context_dim], device=device))
    wide = q.expand((4, 5))
    assert isinstance(wide, FlowDistribution)
    assert (wide.batch_shape, wide.event_shape) == ((4, 5), (3,))
    z, log_prob = wide.rsample_and_log_prob((7,))
    assert (z.shape, log_prob.shape) == ((7, 4, 5, 3), (7, 4, 5))
    torch.testing.assert_close(q.log_prob(z), log_prob, rtol=1e-7, atol=1e-7)
    assert wide.log_prob(torch.zeros(3, device=device).double()).shape == (4, 5)


def test_it_is_a_reparametrized_vector_distribution():
    q = make_flow()()
    assert isinstance(q, TransformedDistribution)
    assert q.has_rsample
    assert q.support is torch.distributions.constraints.real_vector
    assert q.rsample().requires_grad
    assert not q.sample().requires_grad


def test_one_context_serves_many_points_and_one_point_many_contexts():
    flow = make_flow("nsf", 2)
    context, z = make_context(2, 5), torch.randn(3).double()
    rows = torch.stack([flow.log_prob(z, row) for row in context])
    torch.testing.assert_close(flow.log_prob(z, context), rows)
    torch.testing.assert_close(flow(context).log_prob(z), rows)


def test_a_draw_is_scored_without_an_inverse(monkeypatch):
    flow = make_flow("iaf")
    monkeypatch.setattr(flow.bijection, "inverse", None)
    flow.rsample_and_log_prob((3,))
    q = flow()
    assert q.log_prob(q.rsample((3,))).shape == (3,)


def test_a_draw_without_gradients_is_scored_with_them():
    flow = make_flow("nsf", base="student-t-learned")
    q = flow()
    z = q.sample((6,))
    got = torch.autograd.grad(q.log_prob(z).sum(), list(flow.parameters()))
    expected = torch.autograd.grad(flow.log_prob(z).sum(), list(flow.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_base
def test_every_parameter_gets_a_gradient_from_the_density_and_from_the_draw(base):
    flow = make_flow("nsf", 2, base)
    context = make_context(2, 8)
    z, _ = flow.rsample_and_log_prob((), context)
    density = flow.log_prob(z.detach(), context)
    for result in (density.sum(), z.square().sum()):
        slopes = torch.autograd.grad(result, list(flow.parameters()), allow_unused=True)
        names = [name for name, _ in flow.named_parameters()]
        dead = [name for name, slope in zip(names, slopes, strict=True)
                if slope is None or not slope.any()]
        assert dead == []


@every_base
def test_it_follows_the_dtype_and_the_device(base, device):
    flow = Flow(nsf(3, num_layers=2), BASES[base](3)).to(device)
    for dtype in (torch.float64, torch.float32):
        flow.to(dtype)
        for result in (*flow.rsample_and_log_prob((2,)), *flow.rsample_and_path_log_prob((2,)),
                       flow().sample((2,)), flow.base.mean, flow.base.variance):
            assert result.dtype == dtype
            assert result.device.type == device.type


@every_base
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])
def test_it_copies_after_a_step(base, how):
    flow = make_flow("nsf", 0, base)
    flow.rsample_and_path_log_prob((4,))[1].sum().backward()
    z, log_prob = flow.rsample_and_log_prob((4,))
    torch.testing.assert_close(how(flow).log_prob(z), flow.log_prob(z))
    q = flow()
    z = q.rsample()
    torch.testing.assert_close(how(flow).log_prob(z), q.log_prob(z))


def test_the_same_seed_gives_the_same_draw():
    flow = make_flow()
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(flow.rsample_and_log_prob((4,))[0])
    torch.manual_seed(3)
    draws.append(flow.rsample_and_path_log_prob((4,))[0])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_the_default_base_is_gaussian():
    flow = Flow(nsf(3, 2))
    assert isinstance(flow.base, Gaussian)
    assert (flow.input_dim, flow.context_dim) == (3, 2)


# ------------------------------------------------------------------ the path gradient

def seeded(function, *args):
    torch.manual_seed(1)
    return function(*args)


@every_base
@every_flow
@with_and_without_context
def test_the_path_log_density_has_the_same_value(name, base, context_dim):
    flow = make_flow(name, context_dim, base)
    context = make_context(context_dim, 5)
    z, plain = seeded(flow.rsample_and_log_prob, (6,), context)
    same_z, path = seeded(flow.rsample_and_path_log_prob, (6,), context)
    torch.testing.assert_close(same_z, z)
    torch.testing.assert_close(path, plain, rtol=1e-7, atol=1e-7)


@every_base
@every_flow
@with_and_without_context
def test_the_path_gradient_vanishes_at_an_exact_fit(name, base, context_dim):
    flow = make_flow(name, context_dim, base)
    context = make_context(context_dim, 5)
    target = copy.deepcopy(flow).requires_grad_(False)
    sizes = {}
    for draw in (flow.rsample_and_path_log_prob, flow.rsample_and_log_prob):
        z, log_q = seeded(draw, (6,), context)
        loss = (log_q - target.log_prob(z, context)).sum()
        slopes = torch.autograd.grad(loss, list(flow.parameters()), materialize_grads=True)
        sizes[draw.__name__] = max(slope.abs().max().item() for slope in slopes)
    assert sizes["rsample_and_path_log_prob"] < 1e-6
    assert sizes["rsample_and_log_prob"] > 1e-2


@pytest.mark.parametrize("base", [Gaussian(2), StudentT(2, df=8.0, learn=True), Mixture(2, 2)],
                         ids=["gaussian", "student-t-learned", "mixture"])
@pytest.mark.parametrize("layer", [Planar, Radial])
def test_the_path_gradient_is_unbiased(layer, base):
    flow = perturb(Flow(Compose([layer(2), Diagonal(2)]), copy.deepcopy(base))).double()
    parameters = list(flow.parameters())
    differences = []
    for seed in range(300):
        slopes = []
        for draw in (flow.rsample_and_path_log_prob, flow.rsample_and_log_prob):
            torch.manual_seed(seed)
            z, log_q = draw((20,))
            loss = (log_q + 0.5 * (z - 1).square().sum(-1)).mean()
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
            slopes.append(torch.cat([grad.flatten() for grad in grads]))
        differences.append(slopes[0] - slopes[1])
    difference = torch.stack(differences)
    error = difference.std(0) / len(difference) ** 0.5
    assert (difference.std(0) > 0).any()
    assert (difference.mean(0).abs() <= 4 * error + 1e-10).all()


def test_the_path_gradient_reaches_the_context():
    flow = make_flow("nsf", 2)
    context = make_context(2, 5).requires_grad_()
    z, log_q = flow.rsample_and_path_log_prob((6,), context)
    slope, = torch.autograd.grad((log_q + z.square().sum(-1)).sum(), context)
    assert (slope != 0).all()
    target = copy.deepcopy(flow).requires_grad_(False)
    z, log_q = flow.rsample_and_path_log_prob((6,), context)
    loss = (log_q - target.log_prob(z, context.detach())).sum()
    slope, = torch.autograd.grad(loss, context)
    assert slope.abs().max() < 1e-6


def test_a_distribution_over_no_distribution_is_refused():
    with pytest.raises(ValueError, match="FlowDistribution expected `base` to be a Distribution"):
        FlowDistribution(Flow(Planar(2)), base=int)
