"""LogJoint: the model as one batched function, equal to Pyro run particle by particle."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import biject_to, constraints

from pyro_nfvi import AutoFlow, planar
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import LogJoint
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.testing import perturb

DOUBLE = torch.float64
Y = torch.linspace(-1.0, 2.0, 6, dtype=DOUBLE)


# ------------------------------------------------------------------ models

def scalar(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y)


def mixed_supports(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0))
    low = pyro.sample("low", dist.Uniform(-1.0, 2.0))
    steps = pyro.sample("steps", dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0), [dist.transforms.OrderedTransform()]))
    loc = (chol @ weights).sum() + low + steps[0]
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc * share, scale), obs=y)


def nested_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("item", 2, dim=-1):
            b = pyro.sample("b", dist.Dirichlet(torch.ones(2)))
            pyro.sample("y", dist.Normal(a * (b * mu).sum(-1), 1.0), obs=y.reshape(3, 2))


def with_factor(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("banana", -((x[1] - x[0] ** 2) ** 2) - y.sum() * x[0])


def with_mask(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=y > 0):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_scale(y):
    with poutine.scale(scale=0.3):
        mu = pyro.sample("mu", dist.Exponential(1.0))
    with poutine.scale(scale=2.5), pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def with_deterministic(y):
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0))
    scale = pyro.deterministic("scale", log_scale.exp())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.scale = PyroSample(dist.HalfNormal(1.0))

    def forward(self, y):
        x = torch.stack([torch.ones_like(y), y.roll(1)], -1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((x * self.weight).sum(-1), self.scale), obs=y)


def with_param(y):
    scale = pyro.param("scale", torch.tensor(1.5, dtype=DOUBLE), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def fully_sampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def with_control_flow(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = 1.0 if mu > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


MODELS = {
    "scalar": scalar,
    "mixed-supports": mixed_supports,
    "nested-plates": nested_plates,
    "factor": with_factor,
    "mask": with_mask,
    "scale": with_scale,
    "deterministic": with_deterministic,
    "module": Regression(),
    "param": with_param,
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def make_log_joint(model, *args, dtype=DOUBLE, **kwargs):
    args = args or (Y,)
    with default_dtype(dtype):
        trace = prune_subsample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    return LogJoint(model, args, kwargs, LatentLayout.from_trace(trace), dtype)


def draw(log_joint, *shape, dtype=DOUBLE):
    return torch.randn(*shape, log_joint.layout.size, dtype=dtype)


# ------------------------------------------------------------------ the value

@every_model
def test_it_equals_the_trace_log_prob_plus_the_jacobian_for_each_particle(model):
    log_joint = make_log_joint(model)
    z = draw(log_joint, 5)
    for row, got in zip(z, log_joint(z), strict=True):
        values, log_det = {}, 0.0
        trace = prune_subsample_sites(poutine.trace(model).get_trace(Y))
        for name, node in trace.iter_stochastic_nodes():
            transform = biject_to(node["fn"].support)
            shape = transform.inv(node["value"]).shape
            part, row = row[:shape.numel()].reshape(shape), row[shape.numel():]
            values[name] = transform(part)
            log_det = log_det + transform.log_abs_det_jacobian(part, values[name]).sum()
        assert not len(row)
        with default_dtype(DOUBLE):
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(Y)
            expected = trace.log_prob_sum() + log_det
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@every_model
def test_it_equals_the_potential_that_pyro_gives_to_nuts(model):
    log_joint = make_log_joint(model)
    with default_dtype(DOUBLE):
        start, potential, _, _ = initialize_model(model, (Y,))
        for row in draw(log_joint, 4):
            parts = {name: part.reshape(start[name].shape)
                     for name, part in log_joint.layout.split(row).items()}
            torch.testing.assert_close(log_joint(row), -potential(parts), rtol=1e-12, atol=1e-12)


@every_model
def test_one_particle_of_the_elbo_is_what_trace_elbo_computes(model):
    with default_dtype(DOUBLE):
        guide = perturb(AutoFlow(model, planar, num_layers=2).setup(Y).double())
        log_joint = LogJoint(model, (Y,), {}, guide.layout)
        for seed in range(3):
            torch.manual_seed(seed)
            loss = Trace_ELBO().loss(model, guide, Y)
            torch.manual_seed(seed)
            z, log_q = guide._flow().rsample_and_log_prob(())
            assert (log_joint(z) - log_q).item() == pytest.approx(-loss, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)], ids=str)
def test_any_number_of_particle_dimensions_is_kept(shape):
    log_joint = make_log_joint(nested_plates)
    assert log_joint(draw(log_joint, *shape)).shape == shape


@every_model
def test_batched_and_single_runs_agree(model):
    log_joint = make_log_joint(model)
    z = draw(log_joint, 2, 3)
    batched = log_joint(z)
    log_joint.batched = False
    torch.testing.assert_close(batched, log_joint(z), rtol=1e-12, atol=1e-10)


@every_model
def test_gradients_of_batched_and_single_runs_agree(model):
    log_joint = make_log_joint(model)
    z = draw(log_joint, 4).requires_grad_()
    batched, = torch.autograd.grad(log_joint(z).sum(), z)
    log_joint.batched = False
    single, = torch.autograd.grad(log_joint(z).sum(), z)
    torch.testing.assert_close(batched, single, rtol=1e-10, atol=1e-10)
    assert batched.abs().sum() > 0


def test_gradients_agree_with_finite_differences():
    log_joint = make_log_joint(nested_plates)
    assert torch.autograd.gradcheck(log_joint, draw(log_joint, 2).requires_grad_())


def test_keyword_arguments_reach_the_model():
    def model(y, *, scale):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, scale), obs=y)
    z = torch.zeros(1, dtype=DOUBLE)
    got = make_log_joint(model, Y[0], scale=3.0)(z)
    expected = dist.Normal(0.0, 1.0).log_prob(z[0]) + dist.Normal(z[0], 3.0).log_prob(Y[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("z", "words"), [
    (torch.zeros(3, 2), r"LogJoint expected `z` of shape \(\*batch, 1\), got \(3, 2\)"),
    (torch.zeros(1, dtype=torch.long), "LogJoint expected `z` to hold floating-point"),
    ([0.0], "LogJoint expected `z` to be a tensor"),
], ids=["size", "integers", "list"])
def test_a_wrong_latent_is_named(z, words):
    with pytest.raises(ValueError, match=words):
        make_log_joint(scalar)(z)


# ------------------------------------------------------------------ one run or many

@every_model
def test_models_as_they_are_written_run_batched(model):
    log_joint = make_log_joint(model)
    log_joint.try_batched(draw(log_joint, 3))
    assert (log_joint.batched, log_joint.reason) == (True, "")


def test_control_flow_on_a_latent_falls_back_with_a_reason():
    log_joint = make_log_joint(with_control_flow)
    z = torch.tensor([[-1.0], [1.0]], dtype=DOUBLE)
    log_joint.try_batched(z)
    assert not log_joint.batched
    assert "control flow" in log_joint.reason
    assert "\n" not in log_joint.reason
    expected = [dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, scale).log_prob(Y).sum()
                for (mu,), scale in zip(z, (2.0, 1.0), strict=True)]
    torch.testing.assert_close(log_joint(z), torch.stack(expected))


@pytest.mark.parametrize("read", [
    lambda x: x.item(), float, lambda x: x.tolist(), lambda x: x.detach().numpy().item(),
], ids=["item", "float", "tolist", "numpy"])
def test_a_model_that_reads_a_latent_out_of_torch_falls_back(read):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(read(x), 1.0), obs=torch.tensor(0.5))
    trace = poutine.trace(model).get_trace()
    log_joint = LogJoint(model, (), {}, LatentLayout.from_trace(trace))
    z = torch.tensor([[0.0], [2.0]])
    log_joint.try_batched(z)
    assert not log_joint.batched
    assert log_joint.reason
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z[:, 0], 1.0).log_prob(
        torch.tensor(0.5))
    torch.testing.assert_close(log_joint(z), expected)


def test_hidden_state_that_makes_a_batch_wrong_is_caught():
    class Model:
        calls = 0

        def __call__(self, y):
            self.calls += 1
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.factor("drift", self.calls * mu)
    log_joint = make_log_joint(Model())
    log_joint.try_batched(torch.ones(3, 1, dtype=DOUBLE))
    assert not log_joint.batched
    assert log_joint.reason == "batched and single runs of the model differ"


def test_an_error_of_the_model_itself_is_not_taken_for_one_of_batching():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if len(y) != 6:
            raise KeyError("no such column")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])
    log_joint = make_log_joint(model)
    log_joint.args = (Y[:5],)
    with pytest.raises(KeyError, match="no such column"):
        log_joint.try_batched(torch.zeros(2, 1, dtype=DOUBLE))


def test_trying_leaves_no_gradient_behind():
    log_joint = make_log_joint(with_param)
    z = draw(log_joint, 2).requires_grad_()
    log_joint.try_batched(z)
    assert z.grad is None
    assert log_joint(z).requires_grad


# ------------------------------------------------------------------ subsampling and randomness

def test_a_subsampled_plate_is_scaled_without_bias():
    log_joint, full = make_log_joint(subsampled), make_log_joint(fully_sampled)
    z = torch.tensor([0.4], dtype=DOUBLE)
    draws = torch.stack([log_joint(z) for _ in range(600)])
    error = draws.std() / len(draws) ** 0.5
    assert error > 0
    assert abs(draws.mean() - full(z)) < 4 * error


def test_a_subsampled_plate_stays_batched_and_takes_one_minibatch_for_all():
    log_joint = make_log_joint(subsampled)
    log_joint.try_batched(draw(log_joint, 3))
    assert log_joint.batched
    same = log_joint(torch.zeros(50, 1, dtype=DOUBLE))
    assert (same == same[0]).all()


def test_a_model_that_draws_a_latent_of_its_own_stays_batched():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        own = pyro.sample("own", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(own, 1.0), obs=y[0])
    log_joint = make_log_joint(poutine.block(model, hide=["own"]))
    log_joint.try_batched(draw(log_joint, 3))
    assert log_joint.batched
    first, second = (log_joint(torch.zeros(5, 1, dtype=DOUBLE)) for _ in range(2))
    assert (first == first[0]).all()  # one draw for all
    assert first[0] != second[0]


def test_a_deterministic_log_joint_uses_no_random_numbers():
    log_joint = make_log_joint(mixed_supports)
    z = draw(log_joint, 3)
    before = torch.get_rng_state()
    first = log_joint(z)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, log_joint(z))


def test_a_seed_fixes_the_minibatches():
    log_joint = make_log_joint(subsampled)
    z = draw(log_joint, 3)
    torch.manual_seed(3)
    first = log_joint(z)
    torch.manual_seed(3)
    assert torch.equal(first, log_joint(z))


# ------------------------------------------------------------------ parameters, sites, dtype

def test_parameters_are_the_unconstrained_leaves_of_pyro_param():
    log_joint = make_log_joint(with_param)
    parameters = log_joint.parameters(torch.zeros(1, dtype=DOUBLE))
    assert list(parameters) == ["scale"]
    assert parameters["scale"].is_leaf
    assert parameters["scale"].item() == pytest.approx(torch.tensor(1.5).log().item(), rel=1e-6)
    assert make_log_joint(scalar).parameters(torch.zeros(1, dtype=DOUBLE)) == {}


def test_the_gradient_reaches_the_parameters_of_the_model():
    log_joint = make_log_joint(with_param)
    z = draw(log_joint, 4)
    parameter = log_joint.parameters(z[0])["scale"]
    got, = torch.autograd.grad(log_joint(z).sum(), parameter)
    expected = ((z / 1.5) ** 2 - 1).sum()  # d/d log s of log N(mu; 0, s)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_parameters_of_a_module_are_found_and_get_gradients():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[torch.nn.Linear](1, 1).double()

        def forward(self, y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                loc = self.net(mu.reshape(1))
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    model = Model()
    log_joint = make_log_joint(model)
    z = draw(log_joint, 3)
    log_joint.try_batched(z)
    assert log_joint.batched
    parameters = log_joint.parameters(z[0])
    assert len(parameters) == 2
    gradients = torch.autograd.grad(log_joint(z).sum(), list(parameters.values()))
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "single"])
def test_deterministic_sites_are_computed_for_every_point(batched):
    log_joint = make_log_joint(with_deterministic)
    log_joint.batched = batched
    z = draw(log_joint, 5)
    values = log_joint.deterministic(z)
    assert list(values) == ["scale"]
    torch.testing.assert_close(values["scale"], z[:, 0].exp())
    assert make_log_joint(scalar).deterministic(torch.zeros(2, 1, dtype=DOUBLE)) == {}


def bad_latent(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y[0])


def bad_observed(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, x), obs=y[0])


def bad_factor(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", x.log())


@pytest.mark.parametrize(("model", "z", "words"), [
    (bad_latent, [0.0, 800.0], "'scale' (value inf)"),
    (bad_latent, [0.0, -800.0], "'scale' (value 0)"),
    (bad_latent, [float("nan"), 0.0], "'x' (value nan)"),
    (bad_observed, [-1.0], "'y' (observed)"),
    (bad_factor, [-1.0], "'penalty' (observed)"),
], ids=["overflow", "underflow", "nan", "observed", "factor"])
def test_the_first_bad_site_is_named(model, z, words):
    log_joint = make_log_joint(model)
    z = torch.tensor(z, dtype=DOUBLE)
    assert not log_joint(z).isfinite()
    assert log_joint.first_bad_site(z) == words


def test_a_good_point_blames_no_site():
    assert make_log_joint(scalar).first_bad_site(torch.zeros(1, dtype=DOUBLE)).startswith("none")


def test_the_dtype_is_the_default_inside_the_model_and_nowhere_else():
    seen = []

    def model(y):
        seen.append(torch.zeros(()).dtype)
        pyro.sample("x", dist.Normal(torch.zeros(()), torch.ones(())))
    log_joint = make_log_joint(model)
    seen.clear()
    z = torch.zeros(2, 1, dtype=DOUBLE)
    assert log_joint(z).dtype == DOUBLE
    log_joint.first_bad_site(z[0])
    log_joint.parameters(z[0])
    log_joint.deterministic(z)
    log_joint.try_batched(z)
    assert set(seen) == {DOUBLE}
    assert torch.get_default_dtype() == torch.float32


def test_without_a_dtype_the_model_runs_in_torchs_own():
    log_joint = make_log_joint(scalar, Y.float(), dtype=None)
    assert log_joint(torch.zeros(2, 1)).dtype == torch.float32


def test_an_error_inside_the_model_leaves_dtype_and_validation_as_they_were():
    broken = False

    def model(y):
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if broken:
            raise KeyError("broken")
    log_joint = make_log_joint(model)
    broken = True
    with pytest.raises(KeyError):
        log_joint(torch.zeros(1, 1, dtype=DOUBLE))
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)
