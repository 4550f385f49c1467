"""VAE: its ELBO against Pyro's, its parts together, the param store, files, and mistakes."""

from __future__ import annotations

import copy
import io
import pickle
import re
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pyro_nfvi import CompiledTrace_ELBO, iaf, nsf, planar, sylvester
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    ConvDecoder,
    ConvEncoder,
    DiagonalGaussian,
    DiscretizedLogistic,
    FlowPosterior,
    FlowPrior,
    FullGaussian,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedGaussian,
    MLPDecoder,
    MLPEncoder,
    NegativeBinomial,
    Poisson,
    RecurrentDecoder,
    RecurrentEncoder,
    SetEncoder,
    StandardGaussian,
    VampPrior,
)
from pyro_nfvi.vae.objective import elbo_terms
from tests.vae.parts import exact_vae, fitted, linear_gaussian

X = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).round()
SEEN = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.3
SEEN[:, 0] = True
POSTERIORS = {
    "diagonal": DiagonalGaussian,
    "full": FullGaussian,
    "planar": partial(FlowPosterior, recipe=planar, num_layers=2, context_dim=4),
    "iaf": partial(FlowPosterior, recipe=iaf, num_layers=1, context_dim=4),
    "sylvester": partial(FlowPosterior, recipe=sylvester, num_layers=2, context_dim=4),
    "nsf": partial(FlowPosterior, recipe=nsf, num_layers=1, context_dim=4),
}
PRIORS = {
    "standard": StandardGaussian,
    "flow": partial(FlowPrior, num_layers=1),
    "vamp": lambda latent_dim: VampPrior(latent_dim, X[:3]),
}


def small(posterior="diagonal", prior="standard", masked=False, **options):
    """A VAE of five bits, away from its start."""
    vae = VAE(Bernoulli((5,)), 2, encoder=MLPEncoder((5,), (8,), masked=masked),
              decoder=MLPDecoder(2, (5,), hidden_dims=(8,)), posterior=POSTERIORS[posterior],
              prior=PRIORS[prior](2), **options)
    with torch.no_grad():
        for part in (vae.posterior, vae.prior):
            for parameter in part.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def trained(vae, loss, *args, num_steps=2, lr=0.01):
    """Some steps of SVI on the VAE."""
    svi = SVI(vae.model, vae.guide, Adam({"lr": lr}), loss=loss)
    return [svi.step(*args) for _ in range(num_steps)]


def values(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


# ------------------------------------------------------------------ the ELBO is Pyro's

@pytest.mark.parametrize("mask", [None, SEEN], ids=["whole", "masked"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_elbo_is_minus_the_loss_of_pyro(posterior, prior, mask):
    vae, num = small(posterior, prior), 400

    def single(loss):
        return torch.tensor([loss().loss(vae.model, vae.guide, X, mask) for _ in range(20)]).std()
    ours, error = vae.elbo(X, mask, num_particles=num).sum(), single(TraceMeanField_ELBO)
    for loss in (Trace_ELBO, TraceMeanField_ELBO):
        many = loss(num_particles=num, vectorize_particles=True, max_plate_nesting=1)
        theirs = -many.loss(vae.model, vae.guide, X, mask)
        together = (error ** 2 + single(loss) ** 2) ** 0.5 / num ** 0.5
        assert abs(theirs - ours) < 4 * together


@pytest.mark.parametrize("beta", [0.3, 4.0, torch.tensor(2.0)], ids=str)
def test_beta_weighs_the_terms_of_the_latents(beta):
    vae = small("full")
    with torch.no_grad():
        fit, kl = elbo_terms(vae, X, None, 2000)
    expected = (fit - beta * kl.sum(-1)).sum().item()
    elbo = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    assert -elbo.loss(vae.model, vae.guide, X, None, beta) == pytest.approx(expected, abs=0.4)
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    assert -elbo.loss(vae.model, vae.guide, X, None, beta) == pytest.approx(expected, abs=1.0)


def test_the_elbo_is_below_the_log_likelihood():
    weights, shift, x = linear_gaussian(30)
    vae = exact_vae(weights, shift, DiagonalGaussian)
    vae_elbo = vae.elbo(x, num_particles=500)
    estimate = vae.log_likelihood(x, num_samples=2000)
    assert (vae_elbo < estimate.values + 4 * estimate.standard_errors + 0.1).all()
    assert vae_elbo.mean() < estimate.mean - 0.05  # the posterior is correlated


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Pyro's, in JitTrace_ELBO
@pytest.mark.parametrize("loss", [
    Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, RenyiELBO, CompiledTrace_ELBO,
    partial(JitTrace_ELBO, ignore_jit_warnings=True),
    partial(Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=1)],
    ids=["trace", "mean-field", "graph", "renyi", "compiled", "jit", "vectorized"])
@pytest.mark.parametrize("kind", [("diagonal", "standard"), ("iaf", "flow"), ("full", "vamp")],
                         ids="-".join)
def test_svi_trains_every_parameter(loss, kind):
    vae = small(*kind)
    before, loss = values(vae), loss()
    history = trained(vae, loss, X, SEEN, num_steps=3)
    assert all(map(torch.isfinite, map(torch.tensor, history)))
    if isinstance(loss, CompiledTrace_ELBO):
        assert loss.tier == "c", loss.reason
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), loss=Trace_ELBO())
    assert svi.evaluate_loss(X[:2]) > 0  # of another number of data


# ------------------------------------------------------------------ masks

@pytest.mark.parametrize("masked", [True, False], ids=["told", "not-told"])
def test_what_was_not_seen_has_no_influence_on_anything(masked):
    vae = small(masked=masked)
    worlds = []
    for hidden in (0.0, 1.0, torch.nan, torch.inf, -1e30):
        x = torch.where(SEEN, X, hidden)
        torch.manual_seed(0)
        q, loss = vae.encode(x, SEEN), Trace_ELBO()
        loss = loss.differentiable_loss(vae.model, vae.guide, x, SEEN)
        gradients = torch.autograd.grad(loss, vae.parameters())
        worlds.append([q.mean, q.stddev, loss, *gradients, vae.elbo(x, SEEN),
                       vae.reconstruct(x, SEEN), vae.latents(x, SEEN, num_samples=2),
                       vae.log_likelihood(x, SEEN, num_samples=5).values])
        worlds[-1].append(torch.cat([p.detach().flatten() for p in _fitted_copy(
            vae, x).parameters()]))
    for world in worlds[1:]:
        for value, expected in zip(world, worlds[0], strict=True):
            assert value.isfinite().all()
            assert torch.equal(value, expected)


def _fitted_copy(vae, x):
    other = copy.deepcopy(vae)
    fitted(other, x, SEEN, num_epochs=1, compile="eager")
    return other


def test_an_encoder_that_takes_masks_by_name_is_given_them_by_name():
    class Counting(nn.Linear):
        def forward(self, x, lengths=None, *, mask=None):
            assert lengths is None
            seen = torch.ones_like(x) if mask is None else mask.to(x.dtype)
            return super().forward(x) + seen.sum(-1, keepdim=True)
    vae = VAE(Bernoulli((5,)), 2, encoder=Counting(5, 3))
    whole, part = vae.features(X), vae.features(X * SEEN, SEEN)
    torch.testing.assert_close(whole - nn.functional.linear(X, vae.encoder.weight,
                                                            vae.encoder.bias),
                               torch.full((6, 3), 5.0))
    assert part.shape == (6, 3)


def test_classes_that_were_not_seen_are_no_class_to_the_encoder():
    seen = {}

    class Spy(nn.Linear):
        def forward(self, x, mask):
            seen.update(x=x, mask=mask)
            return super().forward(x.flatten(1))
    vae = VAE(Categorical((5,), 3), 2, encoder=Spy(15, 4))
    vae.encode(2 * X, SEEN)
    assert seen["x"].shape == seen["mask"].shape == (6, 3, 5)
    assert torch.equal(seen["x"].sum(1), SEEN.float())
    assert torch.equal(seen["mask"], SEEN.unsqueeze(1).expand(6, 3, 5))


# ------------------------------------------------------------------ everything together

def used(vae, x, mask=None):
    """Whether the whole life of a VAE gives finite numbers of the right shapes."""
    shape = tuple(vae.event_shape)
    num_data = len(vae._checked(x, mask)[0])
    history = fitted(vae, x, mask, batch_size=4)
    assert all(map(torch.isfinite, map(torch.tensor, history.elbo)))
    assert len(history.epochs) == 2
    for shown in (vae.reconstruct(x, mask), vae.reconstruct(x, mask)):
        assert shown.shape == (num_data, *shape)
        assert shown.isfinite().all()
    for num_samples in (1, 3):
        assert vae.generate(num_samples).shape == (num_samples, *shape)
        assert vae.generate(num_samples, mean=True).shape == (num_samples, *shape)
    vae.likelihood.check("test", vae.generate(20))
    assert vae.latents(x, mask, num_samples=4).shape == (4, num_data, vae.latent_dim)
    idata = vae.to_arviz(x, mask, num_samples=3)
    assert idata["posterior_predictive"]["x"].shape == (1, 3, num_data, *shape)
    assert torch.as_tensor(idata["log_likelihood"]["x"].values).isfinite().all()
    assert vae.log_likelihood(x, mask, num_samples=5).values.isfinite().all()
    return True


LIKELIHOODS = {
    "bernoulli": (Bernoulli, X),
    "continuous_bernoulli": (ContinuousBernoulli, torch.rand(6, 5)),
    "gaussian": (partial(Gaussian, scale=0.5), torch.randn(6, 5)),
    "learned": (LearnedGaussian, torch.randn(6, 5)),
    "learned_per_dimension": (partial(LearnedGaussian, per_dimension=True), torch.randn(6, 5)),
    "heteroscedastic": (HeteroscedasticGaussian, torch.randn(6, 5)),
    "categorical": (partial(Categorical, num_classes=4), torch.randint(4, (6, 5))),
    "logistic": (DiscretizedLogistic, torch.randint(256, (6, 5), dtype=torch.uint8)),
    "poisson": (Poisson, torch.randint(50, (6, 5))),
    "negative_binomial": (NegativeBinomial, torch.randint(50, (6, 5))),
}


@pytest.mark.parametrize("mask", [None, SEEN], ids=["whole", "masked"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_trains_from_end_to_end(name, mask):
    build, x = LIKELIHOODS[name]
    likelihood = build((5,))
    vae = VAE(likelihood, 2, encoder=MLPEncoder(likelihood.input_shape((5,)), (8,), masked=True),
              decoder=MLPDecoder(2, (5,), likelihood.num_params, (8,)))
    assert used(vae, x, mask)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_parts_a_vae_takes_by_default_fit_every_likelihood(name):
    build, x = LIKELIHOODS[name]
    assert VAE(build((5,)), 2).elbo(x).isfinite().all()


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()
SERIES = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
STEPS = torch.arange(4).view(1, 4, 1) < torch.tensor([4, 1, 2, 3, 4, 2]).view(6, 1, 1)
STEPS = STEPS.expand(6, 4, 2)
WAYS = {
    "conv": lambda: (VAE(Bernoulli((1, 8, 8)), 2,
                         encoder=ConvEncoder((1, 8, 8), (2, 3), hidden_dim=8, kernel_size=3),
                         decoder=ConvDecoder(2, (1, 8, 8), 1, (3, 2), kernel_size=3)), IMAGES),
    "conv-gated": lambda: (VAE(Bernoulli((1, 8, 8)), 2,
                               encoder=ConvEncoder((1, 8, 8), (2,), hidden_dim=8, gated=True),
                               decoder=ConvDecoder(2, (1, 8, 8), 1, (3, 2), gated=True)), IMAGES),
    "recurrent": lambda: (VAE(Gaussian((4, 2)), 2, encoder=RecurrentEncoder((4, 2), 6),
                              decoder=RecurrentDecoder(2, (4, 2), hidden_dim=6)), SERIES),
    "recurrent-masked": lambda: (VAE(Gaussian((4, 2)), 2, encoder=RecurrentEncoder((4, 2), 6),
                                     decoder=RecurrentDecoder(2, (4, 2), hidden_dim=6)),
                                 SERIES, STEPS),
    "recurrent-packed": lambda: (VAE(Gaussian((4, 2)), 2, encoder=RecurrentEncoder((4, 2), 6),
                                     decoder=RecurrentDecoder(2, (4, 2), hidden_dim=6)),
                                 pack_sequence([row[:length] for row, length in zip(
                                     SERIES, [4, 1, 2, 3, 4, 2], strict=True)],
                                     enforce_sorted=False)),
    "set": lambda: (VAE(LearnedGaussian((4, 2)), 2, encoder=SetEncoder((4, 2), (6,), (6,))),
                    SERIES, STEPS),
    "scalar": lambda: (VAE(Gaussian(()), 2), torch.randn(6)),
    "scalar-masked": lambda: (VAE(Gaussian(()), 2), torch.randn(6), torch.ones(6, dtype=torch.bool)
                              ),
    "modules-of-ones-own": lambda: (VAE(
        Bernoulli((1, 8, 8)), 2,
        encoder=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 8)),
        decoder=nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (4, 2, 2)),
                              nn.ConvTranspose2d(4, 1, 8),
                              nn.Upsample((8, 8)))), IMAGES),
    "double": lambda: (small("iaf", "flow").double(), X),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_encode_and_decode_trains_from_end_to_end(name):
    assert used(*WAYS[name]())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_posterior_trains_with_every_prior(posterior, prior):
    vae = small(posterior, prior)
    before = values(vae)
    history = fitted(vae, X, compile="fx")
    assert all(map(torch.isfinite, map(torch.tensor, history.elbo)))
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_packed_sequences_are_those_with_a_mask():
    vae, x, mask = WAYS["recurrent-masked"]()
    packed = pack_sequence([row[:length] for row, length in zip(SERIES, [4, 1, 2, 3, 4, 2],
                                                                strict=True)],
                           enforce_sorted=False)
    torch.testing.assert_close(vae.encode(packed).mean, vae.encode(x, mask).mean)
    torch.manual_seed(0)
    expected = vae.elbo(x, mask)
    torch.manual_seed(0)
    torch.testing.assert_close(vae.elbo(packed), expected)


@pytest.mark.parametrize("num_data", [1, 2, 5])
def test_the_number_of_data_is_never_taken_for_something_else(num_data):
    # One datum, or as many as the decoder has features: batch norm and likelihood could mix it up.
    vae = VAE(Bernoulli((5,)), 2, encoder=nn.Linear(5, 4), decoder=nn.Sequential(
        nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)))
    x = X[:num_data]
    assert vae.elbo(x, num_particles=3).shape == (num_data,)
    assert vae.reconstruct(x).shape == (num_data, 5)
    vae.eval()
    assert vae.decode(torch.zeros(3, num_data, 2)).batch_shape == (3, num_data)
    assert vae.decode(torch.zeros(2)).batch_shape == ()
    torch.testing.assert_close(vae.decode(torch.ones(3, 4, 2)).mean[1, 2],
                               vae.decode(torch.ones(2)).mean)


def test_reconstructions_are_means_at_the_mean_of_the_latents():
    weights, shift, x = linear_gaussian(10)
    vae = exact_vae(weights, shift)
    expected = vae.encode(x).mean @ weights.T + shift
    torch.testing.assert_close(vae.reconstruct(x), expected, rtol=1e-4, atol=1e-4)


def test_generated_data_follow_the_model():
    weights, shift, _ = linear_gaussian(1)
    vae = exact_vae(weights, shift)
    x = vae.generate(20_000)
    covariance = weights @ weights.T + 0.25 * torch.eye(5)
    error = (covariance.diagonal() / 20_000) ** 0.5
    assert ((x.mean(0) - shift).abs() < 4 * error).all()
    error = ((covariance ** 2 + torch.outer(*[covariance.diagonal()] * 2)) / 20_000) ** 0.5
    assert ((x.T.cov() - covariance).abs() < 4 * error).all()
    noiseless = vae.generate(20_000, mean=True).T.cov()
    assert ((noiseless - weights @ weights.T).abs() < 5 * error).all()


# ------------------------------------------------------------------ the param store

def test_two_vaes_in_one_process_train_and_share_nothing():
    one, other = small(), small()
    start = values(one), values(other)
    for _ in range(2):
        trained(one, Trace_ELBO(), X)
    middle = values(one)
    trained(other, Trace_ELBO(), X)
    for name in middle:
        assert torch.equal(one.state_dict()[name], middle[name]), name
    for vae, before in zip((one, other), start, strict=True):
        for name, parameter in vae.named_parameters():
            assert not torch.equal(parameter, before[name]), name
    keys = list(pyro.get_param_store())
    assert len(keys) == 2 * len(list(one.parameters()))
    assert {key.split("$$$")[0] for key in keys} == {"vae", "vae_2"}
    trained(one, Trace_ELBO(), X)
    assert len(list(pyro.get_param_store())) == len(keys)


def test_a_fresh_vae_takes_the_values_of_a_loaded_param_store(tmp_path):
    vae = small()
    trained(vae, Trace_ELBO(), X)
    pyro.get_param_store().save(tmp_path / "store")
    learned = values(vae)
    pyro.clear_param_store()
    fresh = small()
    pyro.get_param_store().load(tmp_path / "store")
    fresh.guide(X)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, learned[name]), name
    trained(fresh, Trace_ELBO(), X)
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, learned[name]), name
    assert {key.split("$$$")[0] for key in pyro.get_param_store()} == {"vae"}


def test_a_cleared_param_store_keeps_what_was_learned():
    vae = small()
    trained(vae, Trace_ELBO(), X)
    learned = values(vae)
    pyro.clear_param_store()
    trained(vae, Trace_ELBO(), X, lr=1e-12)
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.detach(), learned[name])


def test_a_name_of_ones_own_is_the_one_in_the_store():
    trained(small(name="images"), Trace_ELBO(), X)
    assert {key.split("$$$")[0] for key in pyro.get_param_store()} == {"images"}


def test_fit_and_svi_go_on_from_each_other():
    vae = small()
    trained(vae, Trace_ELBO(), X)
    before = values(vae)
    fitted(vae, X)
    assert any(not torch.equal(p, before[name]) for name, p in vae.named_parameters())
    before = values(vae)
    trained(vae, Trace_ELBO(), X)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_frozen_parameters_stay_out_of_svi():
    vae = small()
    vae.encoder.requires_grad_(False)
    before = values(vae)
    trained(vae, Trace_ELBO(), X)
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder"), name


def saved_and_loaded(vae):
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)),
                                       saved_and_loaded], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [("diagonal", "vamp"), ("iaf", "flow")], ids="-".join)
def test_a_vae_copies_after_steps_of_svi_and_both_train_on(duplicate, kind):
    vae = small(*kind)
    trained(vae, Trace_ELBO(), X)
    copied = duplicate(vae)
    before = values(vae)
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name]), name
    trained(vae, Trace_ELBO(), X)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name]), name
    after = values(vae)
    trained(copied, Trace_ELBO(), X)
    for name, parameter in copied.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    for name, value in vae.state_dict().items():
        assert torch.equal(value, after[name]), name


# ------------------------------------------------------------------ files

def test_a_vae_saved_is_the_vae_loaded(tmp_path):
    vae = small("iaf", "vamp")
    fitted(vae, X)
    vae.save(tmp_path / "vae.pt")
    other = small("iaf", "vamp")
    assert other.load(tmp_path / "vae.pt") is other
    for name, value in other.state_dict().items():
        assert torch.equal(value, vae.state_dict()[name]), name
    torch.manual_seed(0)
    expected = vae.elbo(X)
    torch.manual_seed(0)
    assert torch.equal(other.elbo(X), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"]


def test_a_loaded_vae_trains_on_in_the_param_store(tmp_path):
    vae = small()
    vae.save(tmp_path / "vae.pt")
    trained(vae, Trace_ELBO(), X)
    vae.load(str(tmp_path / "vae.pt"))
    before = values(vae)
    trained(vae, Trace_ELBO(), X)
    for name, parameter in vae.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def write(path, what):
    torch.save(what, path)


FILES = {
    "missing": (lambda path: None, "VAE.load found no file "),
    "text": (lambda path: path.write_text("hello"), "which is damaged or foreign"),
    "cut": (lambda path: (small().save(path), path.write_bytes(path.read_bytes()[:500])),
            "which is damaged or foreign"),
    "other": (lambda path: write(path, {"x": 1}), "which holds something else"),
    "posterior": (lambda path: write(path, {"format": "pyro_nfvi posterior", "version": 1}),
                  "which holds something else"),
    "newer": (lambda path: write(path, {"format": "pyro_nfvi vae", "version": 99, "state": {}}),
              "version 99: update pyro_nfvi"),
    "stateless": (lambda path: write(path, {"format": "pyro_nfvi vae", "version": 1}),
                  r"which is damaged or foreign \(no state\)"),
    "odd": (lambda path: write(path, {"format": "pyro_nfvi vae", "version": 1, "state": 3}),
            "is of a VAE of other parts: 'decoder.hidden.0.bias' is missing there"),
    "full": (lambda path: small("full").save(path),
             "is of a VAE of other parts: 'posterior.lower.bias' is (4,) there and missing here. "
             "Build the VAE with the options it was saved with."),
    "larger": (lambda path: VAE(Bernoulli((5,)), 3).save(path), "is of a VAE of other parts: "),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_of_this_vae_is_refused_and_changes_nothing(name, tmp_path):
    spoil, words = FILES[name]
    path = tmp_path / "vae.pt"
    spoil(path)
    vae = small()
    before = values(vae)
    with pytest.raises(ValueError, match=words if "\\" in words else re.escape(words)) as error:
        vae.load(path)
    assert "vae.pt" in str(error.value) or name == "newer"
    assert "\n" not in str(error.value)
    for key, value in vae.state_dict().items():
        assert torch.equal(value, before[key])


# ------------------------------------------------------------------ mistakes

class Twice(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


BERNOULLI = Bernoulli((5,))
MISTAKES = {
    "likelihood": (lambda: VAE("bernoulli", 2), "VAE expected `likelihood` to be a Likelihood, got "
                                                "str. Say: Bernoulli((28, 28))."),
    "likelihood-class": (lambda: VAE(Bernoulli, 2), "VAE expected `likelihood` to be a Likelihood, "
                                                    "got the class Bernoulli, not built. Say: "
                                                    "Bernoulli((28, 28))."),
    "latent_dim": (lambda: VAE(BERNOULLI, 2.0), "VAE expected `latent_dim` to be an integer >= 1, "
                                                "got 2.0."),
    "encoder": (lambda: VAE(BERNOULLI, 2, encoder=torch.relu),
                "VAE expected `encoder` to be a Module, got builtin_function_or_method."),
    "encoder-class": (lambda: VAE(BERNOULLI, 2, encoder=MLPEncoder),
                      "VAE expected `encoder` to be a Module, got the class MLPEncoder, not "
                      "built."),
    "encoder-size": (lambda: VAE(BERNOULLI, 2, encoder=nn.Flatten()),
                     "Flatten expected an `output_dim`, the number of features it returns, got "
                     "none, and no nn.Linear that tells it. Set it: encoder.output_dim = 64."),
    "decoder": (lambda: VAE(BERNOULLI, 2, decoder="mlp"),
                "VAE expected `decoder` to be a Module, got str."),
    "posterior": (lambda: VAE(BERNOULLI, 2, posterior="diagonal"),
                  "VAE expected `posterior` to be a function of (feature_dim, latent_dim) that "
                  "builds one, got str. Say: posterior=DiagonalGaussian, or "
                  "partial(FlowPosterior, recipe=iaf)."),
    "posterior-built": (lambda: VAE(BERNOULLI, 2, posterior=DiagonalGaussian(400, 2)),
                        "VAE expected `posterior` to be a function of (feature_dim, latent_dim) "
                        "that builds one, got DiagonalGaussian. Say: posterior=DiagonalGaussian, "
                        "or partial(FlowPosterior, recipe=iaf)."),
    "posterior-recipe": (lambda: VAE(BERNOULLI, 2, posterior=iaf),
                         "VAE expected `posterior` to build an AmortizedPosterior, got Compose. "
                         "Say: posterior=DiagonalGaussian, or partial(FlowPosterior, recipe=iaf)."
                         ),
    "posterior-size": (lambda: VAE(BERNOULLI, 2, posterior=lambda *_: DiagonalGaussian(400, 3)),
                       "VAE expected `posterior` to build one of feature_dim=400 and latent_dim=2, "
                       "got 400 and 3. Say: posterior=DiagonalGaussian, or "
                       "partial(FlowPosterior, recipe=iaf)."),
    "prior": (lambda: VAE(BERNOULLI, 2, prior="standard"),
              "VAE expected `prior` to be a Prior, got str. Say: StandardGaussian(2)."),
    "prior-class": (lambda: VAE(BERNOULLI, 2, prior=FlowPrior),
                    "VAE expected `prior` to be a Prior, got the class FlowPrior, not built. Say: "
                    "StandardGaussian(2)."),
    "prior-size": (lambda: VAE(BERNOULLI, 2, prior=FlowPrior(3)),
                   "VAE expected `prior` to be of 2 coordinates, got 3. Say: FlowPrior(2, ...)."),
    "encoder-output": (lambda: VAE(BERNOULLI, 2, encoder=nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 4), nn.Flatten(0))).elbo(X),
        "VAE expected its encoder to return features of shape (6, 4), one row a datum, got (24,). "
        "If their number is another, set it before: encoder.output_dim = 64."),
    "encoder-mean": (lambda: VAE(BERNOULLI, 2, encoder=Twice(5, 8)).elbo(X),
                     "VAE expected its encoder to return features of shape (6, 8), one row a "
                     "datum, got (1, 8). If their number is another, set it before: "
                     "encoder.output_dim = 64."),
    "decoder-output": (lambda: VAE(BERNOULLI, 2, decoder=nn.Linear(2, 4)).elbo(X),
                       "VAE expected its decoder to return parameters of shape (batch, "
                       "num_params, *event_shape), here (6, 1, 5), got (6, 4). A last "
                       "layer nn.Unflatten(1, (1, 5)) gives rows their shape."),
    "decoder-params": (lambda: VAE(HeteroscedasticGaussian((5,)), 2,
                                   decoder=nn.Linear(2, 10)).reconstruct(X),
                       "VAE expected its decoder to return parameters of shape (batch, "
                       "num_params, *event_shape), here (6, 2, 5), got (6, 10). A last "
                       "layer nn.Unflatten(1, (2, 5)) gives rows their shape."),
    "decoder-mean": (lambda: VAE(BERNOULLI, 2, decoder=Twice(2, 5)).model(X),
                     "VAE expected its decoder to return parameters of shape (batch, "
                     "num_params, *event_shape), here (6, 1, 5), got (1, 5). A last "
                     "layer nn.Unflatten(1, (1, 5)) gives rows their shape."),
    "z": (lambda: VAE(BERNOULLI, 2).decode(torch.zeros(4, 3)),
          "VAE expected `z` of shape (*batch, 2), got (4, 3)."),
    "generate": (lambda: VAE(BERNOULLI, 2).generate(0),
                 "VAE.generate expected `num_samples` to be an integer >= 1, got 0."),
    "latents": (lambda: VAE(BERNOULLI, 2).latents(X, num_samples=2.0),
                "VAE.latents expected `num_samples` to be an integer >= 1, got 2.0."),
    "elbo": (lambda: VAE(BERNOULLI, 2).elbo(X, num_particles=0),
             "VAE.elbo expected `num_particles` to be an integer >= 1, got 0."),
    "model": (lambda: VAE(BERNOULLI, 2).model(X.unsqueeze(1)),
              "VAE expected `x` of shape (num_data, 5), got (6, 1, 5). If these are the same "
              "data: x.reshape(-1, 5)."),
    "guide": (lambda: VAE(BERNOULLI, 2).guide(X.numpy()),
              "VAE expected `x` to be a tensor of shape (num_data, 5), got ndarray. Convert it: "
              "torch.as_tensor(x)."),
    "fit": (lambda: VAE(BERNOULLI, 2).fit(0.5 * X),
            "VAE expected binary data (0 or 1) for Bernoulli, got 0.5. For data between 0 and 1: "
            "ContinuousBernoulli(event_shape)."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_sentence_with_the_way_out(name):
    mistake, message = MISTAKES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake()


# ------------------------------------------------------------------ slips of users

def test_a_decoder_that_squashes_is_warned_of():
    with pytest.warns(UserWarning, match="its decoder ends in Sigmoid, but Bernoulli takes any"):
        VAE(BERNOULLI, 2, decoder=nn.Sequential(nn.Linear(2, 5), nn.Sigmoid()))


def test_networks_that_fail_say_what_they_get():
    with pytest.raises(ValueError, match=r"its encoder failed .* start one of nn.Linear with"):
        VAE(Bernoulli((2, 3)), 2, encoder=nn.Linear(6, 4)).elbo(torch.ones(4, 2, 3))
    with pytest.raises(ValueError, match=r"its decoder failed on latents of shape \(6, 2\)"):
        VAE(BERNOULLI, 2, decoder=nn.Linear(3, 5)).elbo(X)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, -1)


def test_an_encoder_of_location_and_scale_is_told_whose_they_are():
    with pytest.raises(ValueError, match="Location and scale are the posterior's to make"):
        VAE(BERNOULLI, 2, encoder=Pair(5, 4)).elbo(X)


def test_replicates_of_the_data_come_from_predictive():
    vae = VAE(BERNOULLI, 2)
    model = pyro.poutine.uncondition(vae.model)
    drawn = pyro.infer.Predictive(model, guide=vae.guide, num_samples=50)(X)["x"]
    assert drawn.shape == (50, *X.shape)
    assert 0 < drawn.float().mean() < 1
    assert drawn.std(0).max() > 0


def test_a_mask_of_whole_steps_is_one_of_all_their_entries():
    vae = VAE(Gaussian((4, 3)), 2)
    x, steps = torch.randn(6, 4, 3), torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4], [2]])
    full = steps.unsqueeze(-1).expand(x.shape)
    torch.testing.assert_close(vae.encode(x, steps).mean, vae.encode(x, full).mean)


def test_bits_are_shown_of_discrete_data_only():
    assert "bits" in repr(VAE(BERNOULLI, 2).log_likelihood(X, num_samples=5))
    assert "bits" not in repr(VAE(Gaussian((5,)), 2).log_likelihood(X, num_samples=5))


def test_encoding_is_done_without_dropout():
    vae = VAE(BERNOULLI, 2, encoder=nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5)))
    torch.testing.assert_close(vae.encode(X).mean, vae.encode(X).mean)
    assert vae.training
