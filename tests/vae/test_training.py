"""Training: batches, weights, tiers, validation, and how it ends."""

from __future__ import annotations

import math
import os
import re
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pyro_nfvi import iaf
from pyro_nfvi.engine import Stepper
from pyro_nfvi.engine.adam import AdamState
from pyro_nfvi.inference import ArrayLoader, Loop, loop
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    FlowPosterior,
    FullGaussian,
    Gaussian,
    LearnedGaussian,
    MLPDecoder,
    MLPEncoder,
    RecurrentEncoder,
    training,
)
from pyro_nfvi.vae.objective import elbo_terms, penalty
from tests.vae.parts import Linear, fitted, linear_gaussian, log_evidence

X = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).round()
SEEN = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)) > 0.2
SEEN[:, 0] = True


def small(likelihood=Bernoulli, seed=0, **options):
    torch.manual_seed(seed)
    likelihood = likelihood((6,))
    return VAE(likelihood, 2, **{"encoder": MLPEncoder((6,), (8,)),
                                 "decoder": MLPDecoder(2, (6,), likelihood.num_params, (8,)),
                                 **options})


def parameters(vae):
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


@pytest.fixture
def updates(monkeypatch):
    """Gradients of the eager steps made while the test runs, before they are clipped."""
    made, update = [], AdamState.update

    def spy(state, gradient, norm, rate):
        made.append(gradient.clone())
        update(state, gradient, norm, rate)
    monkeypatch.setattr(AdamState, "update", spy)
    return made


# ------------------------------------------------------------------ truth

def test_a_linear_vae_reaches_the_likelihood_of_factor_analysis():
    # For probabilistic PCA the best likelihood is known: Tipping & Bishop (1999), eq. 8.
    _, _, x = linear_gaussian(200, num_dims=5)
    vae = VAE(LearnedGaussian((5,)), 2, encoder=Linear(5, 16), decoder=Linear(2, 5),
              posterior=FullGaussian)
    fitted(vae, x, num_epochs=150, batch_size=50, lr=0.03, num_particles=4)
    covariance = x.T.cov(correction=0).double()
    values = torch.linalg.eigvalsh(covariance)
    noise = values[:3].mean()
    best = -0.5 * (5 * math.log(2 * math.pi) + values[3:].log().sum() + 3 * noise.log() + 5).item()
    with torch.no_grad():
        weights, shift = vae.decoder.weight.double(), vae.decoder.bias.double()
        learned = weights @ weights.T + vae.likelihood.scale.double() ** 2 * torch.eye(5)
        reached = torch.distributions.MultivariateNormal(shift, learned).log_prob(
            x.double()).mean().item()
    assert reached <= best + 1e-9
    assert reached == pytest.approx(best, abs=0.02)
    estimate = vae.log_likelihood(x, num_samples=200)
    assert abs(estimate.mean - reached) < 4 * estimate.standard_error + 1e-3
    elbo = vae.elbo(x, num_particles=500).mean().item()
    assert elbo == pytest.approx(reached, abs=0.05)  # the exact posterior is linear


# ------------------------------------------------------------------ what a step is

@pytest.mark.parametrize("mask", [None, SEEN], ids=["whole", "masked"])
def test_an_epoch_is_that_of_plain_torch_with_the_last_batch_smaller(updates, mask):
    # Without noise, by a decoder that ignores z, every number is known.
    vae = small()
    with torch.no_grad():
        vae.decoder.hidden[0].weight.zero_()
    x, mask = X[:10], None if mask is None else mask[:10]
    seen, before = [], parameters(vae)
    feed = training.Minibatches.take

    def spy(self, count):
        values = feed(self, count)
        seen.extend(zip(*values, strict=True))
        return values
    training.Minibatches.take = spy
    try:
        history = fitted(vae, x, mask, num_epochs=1, batch_size=4, lr=1e-12, compile="eager")
    finally:
        training.Minibatches.take = feed
    torch.testing.assert_close(parameters(vae), before)
    assert len(history.elbo) == len(updates) == len(seen) == 3
    assert [int(values[-2].sum()) for values in seen] == [4, 4, 2]
    for value, gradient, batch in zip(history.elbo, updates, seen, strict=True):
        data, counts = batch[0][batch[-2]], batch[-2]
        part = batch[1][counts] if mask is not None else torch.ones_like(data, dtype=torch.bool)
        posterior = vae.posterior_of(data, part)
        mean, scale = posterior.mean, posterior.stddev
        logits = vae.decoder(torch.zeros(len(data), 2)).squeeze(1)
        fit = torch.where(part, data * logits - nn.functional.softplus(logits), 0.0).sum(-1)
        kl = (0.5 * (mean ** 2 + scale ** 2 - 1) - scale.log()).sum(-1)
        objective = (fit - kl).mean()
        assert value == pytest.approx(objective.item(), rel=1e-5)
        # The decoder's first weights have gradients that depend on the noise: leave them out
        rest = [p for name, p in vae.named_parameters() if name != "decoder.hidden.0.weight"]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(-objective, rest)])
        parts = gradient.split([p.numel() for p in vae.parameters()])
        got = torch.cat([part for part, (name, _) in zip(parts, vae.named_parameters(),
                                                         strict=True)
                         if name != "decoder.hidden.0.weight"])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_every_datum_of_an_epoch_counts_once_in_its_objective():
    vae = small()
    history = fitted(vae, X[:10], num_epochs=2, batch_size=4, lr=1e-12, num_particles=3000)
    exact = small().elbo(X[:10], num_particles=20_000).mean().item()
    by_size = sum(value * size for value, size in zip(history.elbo[:3], (4, 4, 2), strict=True))
    assert by_size / 10 == pytest.approx(exact, abs=0.03)
    assert history.epochs == pytest.approx([sum(history.elbo[:3]) / 3, sum(history.elbo[3:]) / 3])


def test_a_batch_larger_than_the_data_is_all_of_them():
    history = fitted(small(), X, num_epochs=5, batch_size=1000)
    assert len(history.elbo) == len(history.epochs) == 5
    assert history.elbo == pytest.approx(history.epochs)


def test_a_single_datum_can_be_fitted():
    vae = small()
    history = fitted(vae, X[:1], num_epochs=3)
    assert len(history.elbo) == 3
    assert history.active_units == []
    assert vae.reconstruct(X[:1]).shape == (1, 6)


def weights_of(**options):
    """The weights of the KL divergence, step by step: 5 batches an epoch."""
    seen, feed = [], training.Minibatches.take

    def spy(self, count):
        values = feed(self, count)
        seen.extend(values[-1].tolist())
        return values
    training.Minibatches.take = spy
    try:
        fitted(small(), X, batch_size=4, **options)
    finally:
        training.Minibatches.take = feed
    return seen


def test_the_weight_of_the_divergence_is_beta_after_the_warm_up():
    assert weights_of(num_epochs=3) == [1.0] * 15
    assert weights_of(num_epochs=2, beta=0.25) == [0.25] * 10
    assert weights_of(num_epochs=2, beta=0.0) == [0.0] * 10
    expected = [4 * (step + 1) / 10 for step in range(10)] + [4.0] * 5
    assert weights_of(num_epochs=3, warm_up=2, beta=4) == pytest.approx(expected)
    assert weights_of(num_epochs=1, warm_up=2) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("beta", [0.0, 0.3, 5.0])
def test_the_objective_weighs_the_divergence(beta):
    vae = small()
    fit, kl = (part.mean().item() for part in (
        elbo_terms(vae, X, None, 5000)[0], elbo_terms(vae, X, None, 1)[1].sum(-1)))
    history = fitted(small(), X, num_epochs=1, batch_size=20, beta=beta, lr=1e-12,
                     num_particles=5000)
    assert history.elbo[0] == pytest.approx(fit - beta * kl, abs=0.02)


@pytest.mark.parametrize("posterior", [None, FullGaussian], ids=["diagonal", "full"])
def test_free_bits_cost_nothing_by_the_formula(posterior):
    vae = small(**({} if posterior is None else {"posterior": posterior}))
    with torch.no_grad():
        vae.posterior.loc.bias.copy_(torch.tensor([1.0, 0.0]))
        vae.posterior.scale.weight.mul_(0.01)
        vae.posterior.loc.weight.mul_(0.01)
    fit, terms = elbo_terms(vae, X, None, 5000)
    mean = terms.mean(0)
    bits = 0.3
    if posterior is None:
        assert mean[1] < bits < mean[0]  # one coordinate has more
        expected = mean[0] + bits
    else:  # whose divergence is not told by coordinates
        expected = mean[0].clamp(min=2 * bits)
    history = fitted(vae, X, num_epochs=1, batch_size=20, free_bits=bits, lr=1e-12,
                     num_particles=5000)
    assert history.elbo[0] == pytest.approx((fit.mean() - expected).item(), abs=0.02)


def test_the_penalty_is_that_of_the_data_that_count():
    terms = torch.tensor([[0.1, 3.0], [0.5, 1.0], [99.0, 99.0]], requires_grad=True)
    counts = torch.tensor([True, True, False])
    assert penalty(terms, counts, 0.0)[:2].tolist() == pytest.approx([3.1, 1.5])
    value = penalty(terms, counts, 2 * 0.8)
    assert value.tolist() == pytest.approx([0.8 + 2.0] * 3)
    gradient, = torch.autograd.grad(value[0], terms)
    assert gradient.tolist() == [[0, 0.5], [0, 0.5], [0, 0]]


# ------------------------------------------------------------------ reproducible, in any tier

@pytest.mark.parametrize("compile", ["auto", "fx", "eager"])
def test_a_seed_gives_the_same_parameters_and_leaves_the_random_state_alone(compile, monkeypatch):
    results = []
    for seconds in (0.1, 0.0, 3e-5):  # between two looks at the clock
        monkeypatch.setattr(loop, "CHUNK_SECONDS", seconds)
        vae = small()
        torch.manual_seed(int(1e6 * seconds))
        state = torch.get_rng_state()
        history = fitted(vae, X, SEEN, num_epochs=6, batch_size=8, compile=compile)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((parameters(vae).tolist(), history.elbo, history.active_units))
    assert results[0] == results[1] == results[2]


def test_without_a_seed_the_random_state_of_the_host_is_used():
    def run(seed):
        vae = small()
        torch.manual_seed(seed)
        fitted(vae, X, seed=None)
        return parameters(vae).tolist()
    assert run(1) == run(1) != run(2)


def test_validation_does_not_change_the_steps():
    histories = [fitted(small(), X, num_epochs=4, validation=validation)
                 for validation in (None, X[:7])]
    assert histories[0].elbo == histories[1].elbo


@pytest.mark.parametrize("options", [
    {}, {"posterior": partial(FlowPosterior, recipe=iaf, num_layers=1, context_dim=4)}],
    ids=["gaussian", "iaf"])
def test_all_tiers_make_the_same_steps(options):
    results = []
    for compile in ("c", "fx"):
        vae = small(**options).double()
        history = fitted(vae, X, SEEN, num_epochs=4, compile=compile, warm_up=2, free_bits=0.05)
        engine, = history.engines
        assert engine.tier == compile, engine.reason
        results.append((history.elbo, parameters(vae)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-8)


def test_the_steps_as_they_are_are_those_that_are_recorded(updates):
    # They draw other noise, of which many particles leave little.
    values = []
    for compile in ("fx", "eager"):
        vae = small().double()
        history = fitted(vae, X, SEEN, num_epochs=3, batch_size=20, compile=compile, lr=1e-3,
                         num_particles=5000)
        assert history.engines[0].tier == compile
        values += history.elbo
    assert values[:3] == pytest.approx(values[3:], abs=0.03)
    for recorded, plain in zip(updates[:3], updates[3:], strict=True):
        assert (recorded - plain).norm() < 0.03 * plain.norm()


def test_data_of_a_loader_are_learned_as_those_in_memory():
    weights, shift, x = linear_gaussian(600)
    values = []
    for data in (x, ArrayLoader(x.double().numpy(), batch_size=50)):
        torch.manual_seed(0)
        vae = VAE(Gaussian((5,), 0.5), 2, encoder=Linear(5, 4), decoder=Linear(2, 5))
        history = fitted(vae, data, num_epochs=30, batch_size=50, lr=0.02, compile="auto")
        assert len(history.epochs) == 30
        values.append(vae.elbo(x, num_particles=20).mean().item())
    assert values[1] == pytest.approx(values[0], abs=0.1)
    assert values[1] > log_evidence(weights, shift, x).mean().item() - 0.5


# ------------------------------------------------------------------ validation

class Scripted(VAE):
    """A VAE whose validation says what it is told."""

    script: list[float] = []

    def elbo(self, x, mask=None, *, num_particles=1):
        self.states = [*getattr(self, "states", []), parameters(self)]
        self.modes = [*getattr(self, "modes", []), self.training]
        return torch.tensor([self.script[len(self.states) - 1]])


def scripted(script):
    torch.manual_seed(0)
    vae = Scripted(Bernoulli((6,)), 2, encoder=MLPEncoder((6,), (8,)))
    vae.script = script
    return vae


def test_the_parameters_of_the_best_epoch_are_kept():
    vae = scripted([-5.0, -3.0, -4.0, -4.5])
    history = fitted(vae, X, num_epochs=4, validation=X)
    assert history.validation == [-5.0, -3.0, -4.0, -4.5]
    assert history.best_epoch == 2
    assert history.stopped == ""
    assert torch.equal(parameters(vae), vae.states[1])
    assert not torch.equal(parameters(vae), vae.states[3])


def test_patience_ends_the_training():
    vae = scripted([-5.0, -3.0, -4.0, -4.5, -1.0])
    history = fitted(vae, X, num_epochs=5, validation=(X, SEEN), patience=2)
    assert (len(history.epochs), history.best_epoch) == (4, 2)
    assert history.stopped == "the validation ELBO has not risen for 2 epochs"
    assert torch.equal(parameters(vae), vae.states[1])


def test_an_epoch_without_a_value_is_not_the_best():
    vae = scripted([math.nan, -3.0, math.nan])
    history = fitted(vae, X, num_epochs=3, validation=X)
    assert history.best_epoch == 2
    assert torch.equal(parameters(vae), vae.states[1])


def test_validation_sees_the_parameters_of_its_epoch():
    vae, other = small(), small()
    history = fitted(vae, X, num_epochs=3, validation=X[:5], lr=0.05)
    assert len(history.validation) == 3
    assert len(set(history.validation)) == 3
    fitted(other, X, num_epochs=3, lr=0.05)
    if history.best_epoch == 3:
        assert torch.equal(parameters(vae), parameters(other))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        again = vae.elbo(X[:5]).mean().item()
    assert again == pytest.approx(max(history.validation))


def test_packed_sequences_serve_as_validation():
    data = pack_sequence([torch.randn(length, 2) for length in (4, 3, 1)])
    vae = VAE(Gaussian((5, 2)), 2, encoder=RecurrentEncoder((5, 2), 4))
    assert len(fitted(vae, data, validation=data).validation) == 2


# ------------------------------------------------------------------ modules with modes

class Modes(nn.Sequential):
    """Records the modes in which it runs."""

    def forward(self, x):
        self.__dict__.setdefault("modes", []).append(self.training)
        return super().forward(x)


@pytest.mark.parametrize("extra", [nn.Dropout(0.3), nn.BatchNorm1d(8)], ids=["dropout", "norm"])
def test_modules_with_modes_train_in_one_and_are_looked_at_in_the_other(extra):
    torch.manual_seed(0)
    encoder = Modes(nn.Linear(6, 8), extra, nn.ReLU())
    decoder = Modes(nn.Linear(2, 8), type(extra)(8) if isinstance(extra, nn.BatchNorm1d)
                    else nn.Dropout(0.3), nn.Linear(8, 6))
    vae = VAE(Bernoulli((6,)), 2, encoder=encoder, decoder=decoder)
    before = parameters(vae)
    history = fitted(vae, X, validation=X, compile="auto")
    assert len(history.validation) == 2
    assert all(math.isfinite(value) for value in history.elbo)
    assert not torch.equal(parameters(vae), before)
    assert {True, False} == set(encoder.modes)
    assert vae.training
    assert encoder[1].training
    if isinstance(extra, nn.BatchNorm1d):
        engine, = history.engines
        assert engine.tier == "eager"
        assert "in place" in engine.reason
        assert int(extra.num_batches_tracked) >= 5


def test_modes_are_put_back_one_by_one_even_after_an_error():
    for error in (None, RuntimeError("broken")):
        encoder = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Dropout(0.3))
        vae = VAE(Bernoulli((6,)), 2, encoder=encoder)
        encoder[2].eval()
        if error is None:
            fitted(vae, X)
        else:
            def fail(*_, error=error):
                raise error
            vae.decoder.register_forward_hook(fail)
            with pytest.raises(ValueError, match="decoder failed .* RuntimeError: broken"):
                fitted(vae, X)
        assert [m.training for m in (vae, *encoder)] == [True, True, True, False]
        vae.eval()
        if error is None:
            fitted(vae, X)
            assert not any(m.training for m in vae.modules())


def test_frozen_parameters_stay_as_they_are():
    vae = small()
    vae.encoder.requires_grad_(False)
    before = [p.clone() for p in vae.encoder.parameters()], vae.decoder.output.weight.clone()
    fitted(vae, X)
    for parameter, value in zip(vae.encoder.parameters(), before[0], strict=True):
        assert torch.equal(parameter, value)
    assert not torch.equal(vae.decoder.output.weight, before[1])


# ------------------------------------------------------------------ how it ends

class Switch(nn.Module):
    """A decoder that does something at one of its calls."""

    def __init__(self, at, what):
        super().__init__()
        self.inner, self.calls, self.at, self.what = MLPDecoder(2, (6,), 1, (8,)), 0, at, what

    def forward(self, z):
        self.calls += 1
        out = self.inner(z)
        return self.what(out) if self.calls in self.at else out


def interrupt(out):
    os.kill(os.getpid(), signal.SIGINT)
    return out


@pytest.mark.parametrize("validation", [None, X], ids=["alone", "validated"])
def test_ctrl_c_keeps_what_was_learned_and_says_so(validation, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 1e-9)  # it is heard after the step
    vae = small(decoder=Switch([9 if validation is None else 12], interrupt))
    before = parameters(vae)
    with pytest.warns(UserWarning, match="VAE.fit was interrupted after [0-9]+ steps; the "
                                         "parameters are those so far") as record:
        history = vae.fit(X, num_epochs=100, batch_size=8, seed=0, progress=False,
                          compile="eager", validation=validation)
    assert record[0].filename == __file__
    assert history.interrupted
    assert 7 <= len(history.elbo) <= 9
    assert parameters(vae).isfinite().all()
    assert not torch.equal(parameters(vae), before)
    assert len(history.active_units) == 2
    assert history.concerns == []
    assert vae.training


def test_a_step_that_is_not_finite_is_tried_again():
    vae = small(decoder=Switch([5], lambda out: out * math.nan))
    history = fitted(vae, X, num_epochs=4, compile="eager")
    assert len(history.elbo) == 12
    (step, site), = history.rollbacks
    assert step == 4
    assert site.startswith("'x' (log-likelihood of a datum with values up to 1")
    assert all(map(math.isfinite, history.elbo))
    assert parameters(vae).isfinite().all()


@pytest.mark.parametrize("compile", ["c", "fx", "eager"])
def test_after_a_roll_back_every_epoch_still_shows_every_datum(compile, monkeypatch):
    # The decoder's bias grows until there is no likelihood, again and again.
    made, run = [], Stepper.run

    def spy(stepper, rates, fed=()):
        count = run(stepper, rates, fed)
        made.extend(fed[0][:count, :, 0][fed[1][:count]].tolist())
        return count
    monkeypatch.setattr(Stepper, "run", spy)
    x = torch.arange(10.0).unsqueeze(-1)

    class Edge(nn.Linear):
        def forward(self, z):
            out = super().forward(z)
            return out + torch.where(self.bias.detach() > 0.03, math.nan, 0.0)
    torch.manual_seed(0)
    vae = VAE(Gaussian((1,)), 1, encoder=Linear(1, 4), decoder=Edge(1, 1))
    with torch.no_grad():
        vae.decoder.bias.zero_()
    with pytest.warns(UserWarning, match="steps were not finite and were taken back. Take a sm"):
        history = fitted(vae, x, num_epochs=10, batch_size=4, lr=0.02, compile=compile)
    assert history.engines[0].tier == compile
    assert 2 <= len(history.rollbacks) < 10
    assert len(history.epochs) == 10
    assert len(made) == 100
    for first in range(0, 100, 10):
        assert sorted(made[first:first + 10]) == list(range(10))
    for _, site in history.rollbacks:
        assert site.startswith("'x' (log-likelihood of a datum with values up to ")


def test_one_that_stays_bad_stops_with_a_warning():
    vae = small(decoder=Switch(range(5, 1000), lambda out: out * math.nan))
    with pytest.warns(UserWarning, match="VAE.fit: the log joint is not finite at step 4; first "
                                         "bad site 'x' .*last good state") as record:
        history = vae.fit(X[:1], num_epochs=40, seed=0, progress=False, compile="eager")
    assert record[0].filename == __file__
    assert (len(history.elbo), len(history.rollbacks)) == (4, 10)
    assert parameters(vae).isfinite().all()


def test_a_gradient_that_is_not_finite_is_blamed_as_such():
    class Rough(nn.Linear):
        def forward(self, z):
            return super().forward(z) + (self.weight - self.weight.detach()).sum().abs().sqrt()
    vae = small(decoder=Rough(2, 6))
    with pytest.warns(UserWarning, match="first bad site the gradient"):
        history = vae.fit(X[:7], num_epochs=2, batch_size=4, seed=0, progress=False)
    assert history.elbo == []


def test_the_bar_shows_the_epochs_only_if_asked_to(capsys):
    fitted(small(), X, validation=X)
    assert capsys.readouterr() == ("", "")
    fitted(small(), X, validation=X, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("VAE", "6/6", "ELBO", "validation"):
        assert words in err


def test_a_decoder_that_ignores_the_latents_is_a_collapse_with_advice():
    vae = small()
    with torch.no_grad():
        vae.decoder.hidden[0].weight.zero_()
    vae.decoder.hidden[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="VAE.fit: posterior collapse: no latent depends on the "
                                         "data.*warm_up=10 or free_bits=0.1") as record:
        history = vae.fit(X, num_epochs=150, lr=0.02, seed=0, progress=False)
    assert record[0].filename == __file__
    assert history.active_units == [False, False]
    assert len(history.concerns) == 1


def test_few_latents_in_use_are_a_concern():
    vae = VAE(Gaussian((6,)), 8, encoder=Linear(6, 6), decoder=Linear(8, 6))
    with torch.no_grad():
        vae.encoder.weight.copy_(torch.eye(6))
        vae.posterior.loc.weight.zero_()
        vae.posterior.loc.weight[0, 0] = 3.0
    with pytest.warns(UserWarning, match="only 1 of 8 latents depend on the data"):
        vae.fit(X, num_epochs=1, lr=1e-12, seed=0, progress=False)


def test_latents_in_use_are_no_concern():
    _, _, x = linear_gaussian(60)
    vae = VAE(Gaussian((5,), 0.5), 2, encoder=Linear(5, 8), decoder=Linear(2, 5))
    history = vae.fit(x, num_epochs=100, batch_size=20, lr=0.02, seed=0, progress=False)
    assert history.active_units == [True, True]
    assert history.concerns == []
    assert history.epochs[-1] > history.epochs[0]
    assert log_evidence(*linear_gaussian(60)).mean() > history.epochs[-1] - 1.0


def test_the_loop_is_fed_and_knows_its_engine():
    assert issubclass(training._Epochs, Loop)
    history = fitted(small(), X, compile="fx")
    assert [e.tier for e in history.engines] == ["fx"]
    assert history.stages[0].name == "VAE"


# ------------------------------------------------------------------ mistakes

@pytest.mark.parametrize(("options", "message"), [
    ({"num_epochs": 0}, "VAE.fit expected `num_epochs` to be an integer >= 1, got 0."),
    ({"num_epochs": 1.5}, "VAE.fit expected `num_epochs` to be an integer >= 1, got 1.5."),
    ({"batch_size": 0}, "VAE.fit expected `batch_size` to be an integer >= 1, got 0."),
    ({"num_particles": -1}, "VAE.fit expected `num_particles` to be an integer >= 1, got -1."),
    ({"lr": 0}, "VAE.fit expected `lr` to be a positive number, got 0."),
    ({"lr": "fast"}, "VAE.fit expected `lr` to be a positive number, got 'fast'."),
    ({"warm_up": -1}, "VAE.fit expected `warm_up` to be an integer >= 0, got -1."),
    ({"beta": -1}, "VAE.fit expected `beta` to be a number >= 0, got -1."),
    ({"beta": math.nan}, "VAE.fit expected `beta` to be a number >= 0, got nan."),
    ({"free_bits": True}, "VAE.fit expected `free_bits` to be a number >= 0, got True."),
    ({"patience": 3}, "VAE.fit expected `validation` data to go with `patience`, got None."),
    ({"patience": 0, "validation": X},
     "VAE.fit expected `patience` to be an integer >= 1, got 0."),
    ({"validation": X[:, :5]},
     "VAE.fit, `validation`: VAE expected `x` of shape (num_data, 6), got (20, 5)."),
    ({"validation": (X, SEEN, X)},
     "VAE.fit expected `validation` to be data, or data and mask, got a tuple of 3."),
    ({"seed": "one"}, "VAE.fit expected `seed` to be an integer or None, got 'one'."),
    ({"seed": 1.0}, "VAE.fit expected `seed` to be an integer or None, got 1.0."),
    ({"compile": "fast"}, "VAE.fit expected `compile` to be one of ('auto', 'c', 'inductor', "
                          "'cuda_graph', 'fx', 'eager'), got 'fast'."),
], ids=lambda value: None if isinstance(value, str) else ", ".join(
    f"{k}={'data' if torch.is_tensor(v) else 'tuple' if isinstance(v, tuple) else v}"
    for k, v in value.items()))
def test_a_wrong_option_is_named_with_the_way_out(options, message):
    vae = small()
    before = parameters(vae)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vae.fit(X, progress=False, **options)
    assert torch.equal(parameters(vae), before)


def test_a_vae_without_anything_to_train_is_refused():
    vae = small()
    vae.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^VAE.fit expected parameters to train, got only frozen "
                                         r"ones. Thaw some: vae.requires_grad_\(\).$"):
        vae.fit(X)


# ------------------------------------------------------------------ breakdowns

def test_an_objective_that_falls_is_a_concern_before_any_collapse():
    vae, history = small(), training.TrainingHistory(epochs=[-9.0, -8.0, -20.0, -30.0, -31.0])
    found, = training._breakdown(vae, X, None, history)
    assert found == ("the objective ended lower (-31 nats a datum) than in the first epoch (-9). "
                     "Take a smaller lr")
    history.epochs[-1] = -9.5  # noise
    assert not training._breakdown(vae, X, None, history)


def test_columns_of_very_different_scales_are_named():
    x = torch.randn(50, 3) * torch.tensor([1.0, 1.0, 1000.0])
    with pytest.warns(UserWarning, match=r"Standardize them: x = \(x - x.mean\(0\)\) / x.std"):
        VAE(Gaussian((3,)), 2).fit(x, num_epochs=1, seed=0, progress=False)


def test_a_history_is_printed_in_one_line():
    history = fitted(small(), X, num_epochs=2, validation=X[:5])
    assert re.fullmatch(r"TrainingHistory\(6 steps, 2 epochs, objective -[\d.]+, validation ELBO "
                        r"-[\d.]+ in epoch \d, \d of \d latents active.*\)", repr(history))


def test_gradients_switched_off_outside_do_not_matter_and_inference_mode_is_refused():
    with torch.no_grad():
        fitted(small(), X, num_epochs=1)
    with torch.inference_mode(), pytest.raises(ValueError, match="VAE.fit needs gradients, which"):
        small().fit(X)
