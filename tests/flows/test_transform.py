"""Bijections inside torch and Pyro, and transforms of torch, Pyro and Zuko as bijections."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
import zuko
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import distributions as td
from torch.distributions import transforms as torch_transforms

from pyro_nfvi.flows import (
    Affine,
    Autoregressive,
    BijectionTransform,
    Compose,
    Coupling,
    Flow,
    FromTransform,
    Gaussian,
    Planar,
    iaf,
    nsf,
    planar,
)
from pyro_nfvi.testing import perturb

RECIPES = {"planar": planar, "iaf": iaf, "nsf": nsf}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
copies = pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                                 ids=["deepcopy", "pickle"])


def perturbed(recipe, input_dim=2, context_dim=0):
    return perturb(recipe(input_dim, context_dim, num_layers=2))


def noise(module=td, input_dim=2):
    return module.Independent(module.Normal(torch.zeros(input_dim), torch.ones(input_dim)), 1)


class Counted(Planar):
    """A planar layer that counts its passes."""

    def __init__(self, input_dim):
        super().__init__(input_dim)
        self.passes = []

    def _forward(self, u, context):
        self.passes.append("forward")
        return super()._forward(u, context)

    def _inverse(self, z, context):
        self.passes.append("inverse")
        return super()._inverse(z, context)


# ------------------------------------------------------------------ a bijection as a transform

@every_recipe
@pytest.mark.parametrize("module", [td, dist], ids=["torch", "pyro"])
def test_a_transformed_distribution_is_the_flow(module, recipe):
    bijection = perturbed(recipe)
    q = module.TransformedDistribution(noise(module), [BijectionTransform(bijection)])
    flow = Flow(bijection)
    z = q.rsample((5,))
    assert (q.event_shape, z.shape) == ((2,), (5, 2))
    torch.testing.assert_close(q.log_prob(z), flow.log_prob(z), rtol=1e-4, atol=1e-4)
    z = 3 * torch.randn(4, 2)
    torch.testing.assert_close(q.log_prob(z), flow.log_prob(z))


def test_a_transform_maps_both_ways_and_batches():
    bijection = perturbed(nsf)
    transform = BijectionTransform(bijection)
    u = torch.randn(4, 5, 2)
    z = transform(u)
    assert transform.inv(z) is u
    torch.testing.assert_close(transform.inv(z.clone()), u, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, z), bijection(u)[1])
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(z, u), -bijection(u)[1])


def test_a_transform_of_a_context_broadcasts():
    bijection = perturbed(nsf, context_dim=3)
    context = torch.randn(5, 3)
    q = td.TransformedDistribution(noise().expand([5]), [BijectionTransform(bijection, context)])
    assert q.rsample((4,)).shape == (4, 5, 2)
    assert q.log_prob(torch.zeros(2)).shape == (5,)


def test_a_transform_chains_with_those_of_torch():
    bijection = perturbed(planar)
    q = td.TransformedDistribution(noise(), [
        BijectionTransform(bijection), torch_transforms.ExpTransform()])
    x = q.rsample((5,))
    z = x.log()
    expected = Flow(bijection).log_prob(z) - z.sum(-1)
    torch.testing.assert_close(q.log_prob(x), expected, rtol=1e-4, atol=1e-4)


def test_memory_saves_the_second_pass():
    layer = Counted(2)
    q = td.TransformedDistribution(noise(), [BijectionTransform(layer)])
    q.log_prob(q.rsample())
    assert layer.passes == ["forward"]
    q.log_prob(torch.zeros(2))
    assert layer.passes == ["forward", "inverse"]


def test_memory_is_only_of_the_last_point():
    transform = BijectionTransform(perturb(Planar(2)))
    first, second = torch.randn(2), torch.randn(2)
    z = transform(first)
    log_det = transform.log_abs_det_jacobian(first, z)
    transform(second)
    torch.testing.assert_close(transform.log_abs_det_jacobian(first, z), log_det)


def test_a_transform_without_memory_gives_the_same():
    transform = BijectionTransform(perturb(Planar(2)))
    forgetful = transform.with_cache(0)
    assert forgetful.bijection is transform.bijection
    assert transform.with_cache(1) is transform
    assert forgetful.with_cache(0) is forgetful
    assert forgetful.with_cache(1) is not transform
    u = torch.randn(2)
    z = forgetful(u)
    torch.testing.assert_close(z, transform(u))
    assert forgetful.inv(z) is not u
    torch.testing.assert_close(forgetful.inv(z), u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forgetful.log_abs_det_jacobian(u, z),
                               transform.log_abs_det_jacobian(u, transform(u)))


def test_memory_made_without_gradients_is_not_used_with_them():
    transform = BijectionTransform(perturb(Planar(2)))
    u = torch.randn(2)
    with torch.no_grad():
        z = transform(u)
    assert transform(u).requires_grad
    with torch.no_grad():
        z = transform(u.clone())
        assert not transform.inv(z).requires_grad
    assert transform.inv(z).requires_grad


def test_clearing_the_memory_lets_one_point_be_scored_after_a_step():
    layer = perturb(Planar(2))
    q = dist.TransformedDistribution(noise(dist), [BijectionTransform(layer)])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    z = torch.randn(2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -q.log_prob(z)
        torch.testing.assert_close(loss, -Flow(layer).log_prob(z))
        loss.backward()
        optimizer.step()
        q.clear_cache()


@copies
def test_a_transform_copies_after_a_step_and_forgets(how):
    transform = BijectionTransform(perturb(Planar(2)))
    q = td.TransformedDistribution(noise(), [transform])
    z = q.rsample()
    q.log_prob(z).backward()
    twin = how(q)
    assert twin.transforms[0]._cached_x_y == (None, None)
    torch.testing.assert_close(twin.log_prob(z), Flow(transform.bijection).log_prob(z))
    assert transform.inv(z) is not None


def test_a_transform_owns_its_parameters_and_hashes_by_identity():
    bijection = planar(2)
    one, other = BijectionTransform(bijection), BijectionTransform(bijection)
    assert set(one.parameters()) == set(bijection.parameters())
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    assert (one.sign, one.bijective) == (1, True)
    assert one.domain.event_dim == one.codomain.event_dim == 1


# ------------------------------------------------------------------ inside Pyro

def model():
    x = pyro.sample("x", dist.Normal(1.0, 0.5))
    with pyro.plate("two", 2):
        y = pyro.sample("y", dist.LogNormal(x, 0.3))
        pyro.sample("obs", dist.Normal(y, 1.0), obs=torch.tensor([3.0, 2.0]))


def loss_of(guide):
    """The loss, by the same many draws each time."""
    torch.manual_seed(1)
    return Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1).loss(model, guide)


@pytest.fixture
def guide(recipe):
    return AutoNormalizingFlow(model, lambda input_dim: BijectionTransform(
        recipe(input_dim, num_layers=2)))


@every_recipe
@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(num_particles=2),
                                  Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)],
                         ids=["one-particle", "two-particles", "vectorized"])
def test_pyros_normalizing_flow_guide_trains(guide, elbo):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    svi.step()
    before = loss_of(guide)
    for _ in range(20):
        svi.step()
    assert loss_of(guide) < before
    draws = Predictive(model, guide=guide, num_samples=10)()
    assert draws["y"].shape == (10, 2)


@every_recipe
def test_pyros_normalizing_flow_guide_scores_any_point(guide):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    svi.step()
    posterior = guide.get_posterior()
    z = posterior.rsample()
    expected = posterior.log_prob(z)
    torch.testing.assert_close(posterior.log_prob(z.detach()), expected, rtol=1e-4, atol=1e-4)
    assert posterior.log_prob(torch.zeros(7, 3)).shape == (7,)


@every_recipe
def test_pyros_normalizing_flow_guide_copies_after_a_step(guide):
    SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()).step()
    twin = copy.deepcopy(guide)
    z = torch.randn(4, 3)
    torch.testing.assert_close(twin.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_recipe
def test_a_flow_jits_in_pyro(recipe):
    transform = BijectionTransform(recipe(3, num_layers=2))

    def guide():
        pyro.module("flow", transform)
        z = pyro.sample("z", dist.TransformedDistribution(noise(dist, 3), [transform]),
                        infer={"is_auxiliary": True})
        pyro.sample("x", dist.Delta(z[..., 0]))
        with pyro.plate("two", 2):
            pyro.sample("y", dist.Delta(z[..., 1:].exp(), log_density=-z[..., 1:]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), JitTrace_ELBO())
    losses = torch.tensor([svi.step() for _ in range(3)])
    assert losses.isfinite().all()


# ------------------------------------------------------------------ a transform as a bijection

def deep_chain():
    """Modules inside a plain chain, inside an inverse, and an affine map with a parameter."""
    return torch_transforms.ComposeTransform([
        pyro_transforms.spline(3), pyro_transforms.affine_autoregressive(3, [8]).inv,
        torch_transforms.AffineTransform(1.0, 2.0),
        torch_transforms.ComposeTransform([pyro_transforms.affine_coupling(3, hidden_dims=[8])])])


TRANSFORMS = {
    "affine": lambda: torch_transforms.AffineTransform(torch.ones(3), torch.tensor([1., 2., -3.])),
    "independent": lambda: torch_transforms.IndependentTransform(
        torch_transforms.AffineTransform(1.0, 2.0), 1),
    "chain": lambda: torch_transforms.ComposeTransform([
        torch_transforms.AffineTransform(1.0, -0.5), torch_transforms.ExpTransform(),
        torch_transforms.AffineTransform(1.0, 1.0)]),
    "lower-cholesky": lambda: pyro_transforms.LowerCholeskyAffine(
        torch.ones(3), torch.ones(3, 3).tril()),
    "pyro-autoregressive": lambda: pyro_transforms.affine_autoregressive(3, [8]),
    "pyro-autoregressive-inverse": lambda: pyro_transforms.affine_autoregressive(3, [8]).inv,
    "pyro-spline": lambda: pyro_transforms.spline(3),
    "pyro-spline-coupling": lambda: pyro_transforms.spline_coupling(3, hidden_dims=[8]),
    "pyro-chain": lambda: pyro_transforms.ComposeTransformModule([
        pyro_transforms.spline(3), pyro_transforms.affine_coupling(3, hidden_dims=[8])]),
    "deep-chain": deep_chain,
    "deep-chain-inverse": lambda: deep_chain().inv,
    "zuko": lambda: zuko.flows.MaskedAutoregressiveTransform(3, hidden_features=(8,)),
    "zuko-chain": lambda: zuko.lazy.LazyComposedTransform(
        zuko.flows.MaskedAutoregressiveTransform(3, hidden_features=(8,)),
        zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform)),
}
ONE_WAY = {
    "pyro-planar": lambda: pyro_transforms.planar(3),
    "pyro-radial": lambda: pyro_transforms.radial(3),
    "pyro-sylvester": lambda: pyro_transforms.sylvester(3),
    "pyro-block-autoregressive": lambda: pyro_transforms.block_autoregressive(3),
    "pyro-neural-autoregressive": lambda: pyro_transforms.neural_autoregressive(3, [8]),
    "pyro-polynomial": lambda: pyro_transforms.polynomial(3, [8]),
    "pyro-planar-in-a-chain": lambda: torch_transforms.ComposeTransform(
        [pyro_transforms.planar(3), pyro_transforms.spline(3)]),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
one_way_too = pytest.mark.parametrize("name", [*TRANSFORMS, *ONE_WAY])


def bijection_from(name):
    return FromTransform({**TRANSFORMS, **ONE_WAY}[name](), 3)


@every_transform
def test_a_foreign_transform_inverts(name):
    bijection = bijection_from(name)
    u = torch.randn(4, 5, 3)
    z, log_det = bijection(u)
    back, log_det_back = bijection.inverse(z)
    assert (z.shape, log_det.shape) == ((4, 5, 3), (4, 5))
    torch.testing.assert_close(back, u, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(-log_det_back, log_det, rtol=1e-3, atol=1e-3)


@one_way_too
def test_a_foreign_log_det_is_that_of_autograd(name):
    bijection = bijection_from(name)
    u = torch.randn(3)
    jacobian = torch.autograd.functional.jacobian(lambda u: bijection(u)[0], u)
    torch.testing.assert_close(bijection(u)[1], torch.linalg.slogdet(jacobian).logabsdet,
                               rtol=1e-3, atol=1e-3)


@one_way_too
def test_every_foreign_parameter_is_registered_and_trained(name):
    bijection = bijection_from(name)
    optimizer = torch.optim.SGD(bijection.parameters(), lr=0.1) if list(
        bijection.parameters()) else None
    for _ in range(2):  # a second step fails if anything was cached
        z, log_det = bijection(torch.randn(6, 3))
        if optimizer is None:
            return
        optimizer.zero_grad()
        (z.square().sum() - log_det.sum()).backward()
        assert [name for name, p in bijection.named_parameters() if p.grad is None] == []
        optimizer.step()


@pytest.mark.parametrize(("name", "count"), [
    ("affine", 0), ("pyro-spline", 1), ("pyro-autoregressive-inverse", 1), ("pyro-chain", 1),
    ("deep-chain", 3), ("deep-chain-inverse", 3), ("zuko", 1), ("zuko-chain", 1),
    ("pyro-spline-coupling", 1)])
def test_the_outermost_modules_of_a_transform_are_registered_once(name, count):
    bijection = bijection_from(name)
    assert len(bijection.modules_inside) == count
    ids = [id(p) for _, p in bijection.named_parameters(remove_duplicate=False)]
    assert len(ids) == len(set(ids))


@one_way_too
@copies
def test_a_foreign_transform_copies_after_a_step(name, how):
    bijection = bijection_from(name)
    u = torch.randn(4, 3).requires_grad_()
    z, log_det = bijection(u)
    (z.square().sum() - log_det.sum()).backward()
    twin = how(bijection)
    torch.testing.assert_close(twin(u)[0], z)
    trained = list(zip(twin.parameters(), bijection.parameters(), strict=True))
    assert all(a is not b for a, b in trained)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(bijection(u)[0], z)
    if trained:
        assert not torch.allclose(twin(u)[0], z), "The copy does not see its own parameters."


@every_transform
def test_the_state_of_a_foreign_transform_reloads(name):
    one, other = bijection_from(name), bijection_from(name)
    other.load_state_dict(one.state_dict())
    u = torch.randn(4, 3)
    torch.testing.assert_close(other(u)[0], one(u)[0])


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_transform_without_inverse_says_so(name):
    bijection = bijection_from(name)
    bijection(torch.randn(4, 3))
    with pytest.raises(NotImplementedError, match="has no inverse for points it did not produce. "
                                                  "Use one of pyro_nfvi.flows"):
        bijection.inverse(torch.randn(4, 3))


@pytest.mark.parametrize("context_dim", [0, 2], ids=["no-context", "context"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_a_lazy_transform_of_zuko_takes_context(context_dim, inverse):
    lazy = zuko.flows.MaskedAutoregressiveTransform(3, context_dim, hidden_features=(8,))
    bijection = FromTransform(lazy.inv if inverse else lazy, 3, context_dim)
    u, context = torch.randn(4, 3), torch.randn(4, context_dim) if context_dim else None
    transform = lazy(context).inv if inverse else lazy(context)
    z, log_det = bijection(u, context)
    torch.testing.assert_close(z, transform(u))
    torch.testing.assert_close(log_det, transform.log_abs_det_jacobian(u, z))
    flow = Flow(Compose([bijection, Coupling(3, context_dim)]))
    z, log_prob = flow.rsample_and_log_prob((5,), None if context is None else context[0])
    torch.testing.assert_close(flow.log_prob(z, None if context is None else context[0]),
                               log_prob, rtol=1e-3, atol=1e-3)


def test_a_flow_of_ours_and_of_zuko_agree():
    """One masked autoregressive layer with the same parameters, written twice."""
    lazy = zuko.flows.MaskedAutoregressiveTransform(3, hidden_features=(8,))
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(3), torch.ones(3), buffer=True)
    theirs = zuko.lazy.Flow([lazy.inv], base)
    ours = Flow(FromTransform(lazy, 3), Gaussian(3))
    z = torch.randn(5, 3)
    torch.testing.assert_close(ours.log_prob(z), theirs().log_prob(z), rtol=1e-4, atol=1e-4)


def test_a_foreign_transform_trains_inside_a_flow():
    flow = Flow(Compose([FromTransform(deep_chain(), 3), Autoregressive(3, transformer=Affine())]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        z, log_q = flow.rsample_and_log_prob((64,))
        loss = (log_q + 0.5 * (z - 3).square().sum(-1)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_double_wrap_is_the_bijection():
    bijection = perturbed(nsf)
    twice = FromTransform(BijectionTransform(bijection), 2)
    u = torch.randn(4, 2)
    for a, b in zip((*twice(u), *twice.inverse(u)), (*bijection(u), *bijection.inverse(u)),
                    strict=True):
        torch.testing.assert_close(a, b)
    assert set(twice.parameters()) == set(bijection.parameters())
    assert torch.equal(copy.deepcopy(twice)(u)[0], twice(u)[0])


def test_a_transform_that_needs_other_arguments_is_refused():
    layer = FromTransform(Gaussian, 1)
    with pytest.raises(ValueError, match="FromTransform expected `transform` to be a function of "
                                         "nothing that returns a transform, got TypeError: "):
        layer(torch.zeros(3, 1))
