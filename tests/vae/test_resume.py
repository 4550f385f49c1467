"""Trainings that are killed and run again."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import nn

from pyro_nfvi import iaf
from pyro_nfvi.inference import ArrayLoader, Checkpoint
from pyro_nfvi.inference.checkpoint import CheckpointStore
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    FlowPosterior,
    Gaussian,
    MLPDecoder,
    MLPEncoder,
    VampPrior,
    training,
)
from tests.fits import differences
from tests.killed import run_again, told
from tests.vae.parts import fitted

X = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).round()
NEW = torch.rand(9, 6, generator=torch.Generator().manual_seed(1)).round()
SEEN = torch.rand(20, 6, generator=torch.Generator().manual_seed(2)) > 0.2
SEEN[:, 0] = True


def small(likelihood=None, *extra, **options):
    likelihood = Bernoulli((6,)) if likelihood is None else likelihood
    encoder = nn.Sequential(MLPEncoder((6,), (8,)), *extra)
    return VAE(likelihood, 2, **{"encoder": encoder,
                                 "decoder": MLPDecoder(2, (6,), likelihood.num_params, (8,)),
                                 **options})


def outcome(vae, history):
    """All that a training leaves behind."""
    return {"state": vae.state_dict(), "history": told(history), "rng": torch.get_rng_state()}


CASES = {
    "alone": (small, {}),
    "loader": (small, {"x": ArrayLoader(X.bool().numpy(), SEEN, batch_size=8), "warm_up": 3,
                       "validation": NEW}),
    "mask and warm-up": (small, {"mask": SEEN, "warm_up": 3, "beta": 0.5}),
    "validation": (small, {"validation": NEW, "lr": 0.1, "num_epochs": 6}),
    "patience": (small, {"validation": NEW, "lr": 0.5, "num_epochs": 9, "patience": 1}),
    "global seed": (small, {"seed": None, "validation": NEW}),
    "eager dropout": (lambda: small(None, nn.Dropout(0.3)), {"compile": "eager"}),
    "batch norm": (lambda: small(None, nn.BatchNorm1d(8)), {"compile": "eager",
                                                            "validation": NEW}),
    "flows": (lambda: small(posterior=partial(FlowPosterior, recipe=iaf)), {"free_bits": 0.1}),
    "pseudo-inputs": (lambda: small(prior=VampPrior(2, X[:4])), {}),
}
SLOW = {"eager dropout", "flows", "mask and warm-up", "pseudo-inputs"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else
                                  case for case in CASES])
def test_a_training_that_is_killed_goes_on_bit_for_bit(case, monkeypatch, tmp_path):
    build, options = CASES[case]
    options = {"num_epochs": 4, "compile": "fx", **options}
    x = options.pop("x", X)

    def fit(checkpoint=None, seed=0):
        torch.manual_seed(seed)
        vae = build()
        torch.manual_seed(7)
        return outcome(vae, fitted(vae, x, checkpoint=checkpoint, **options))
    expected, seeds = fit(), iter(range(1, 9))  # weights at the start do not matter any more
    found, states = run_again(monkeypatch, tmp_path / "fit",
                              lambda checkpoint: fit(checkpoint, next(seeds) - 1), [1, 2, 3])
    steps = [0 if state is None else len(state["stepper"]["elbo"]) for state in states]
    assert steps == [0, 1, 3, 6]
    assert differences(found, expected) == []


def test_patience_is_lost_when_it_would_have_been():
    vae = small()
    assert fitted(vae, X, **CASES["patience"][1]).stopped  # else the case above proves less


def test_the_compiled_loop_goes_on_with_the_noise_it_had_drawn(monkeypatch, tmp_path):
    def fit(checkpoint=None):
        torch.manual_seed(0)
        vae = small()
        return outcome(vae, fitted(vae, X, num_epochs=10, compile="c", checkpoint=checkpoint,
                                   validation=NEW))
    found, states = run_again(monkeypatch, tmp_path, fit, [13])
    assert states[1]["stepper"]["tier"] == "c"
    assert 0 < states[1]["stepper"]["used"]
    assert differences(found, fit()) == []


def test_a_complete_training_returns_at_once_what_was_found(monkeypatch, tmp_path):
    vae, again = small(), small()
    history = fitted(vae, X, validation=NEW, checkpoint=tmp_path)
    monkeypatch.setattr(training._Epochs, "_stepper", None)  # no step is even prepared
    found = fitted(again, X, validation=NEW, checkpoint=tmp_path)
    assert differences(asdict(found), asdict(history)) == []
    assert torch.equal(again.encode(X).mean, vae.encode(X).mean)
    assert again.training


def test_what_was_of_concern_is_said_again(tmp_path):
    x = torch.randn(50, 3) * torch.tensor([1.0, 1e3, 1.0])
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"VAE\.fit: standard deviations of the columns"):
            VAE(Gaussian((3,)), 2).fit(x, num_epochs=2, seed=0, progress=False, lr=1e-4,
                                       checkpoint=tmp_path)


class Signal(nn.Module):
    """Sends this process a signal at one of its calls."""

    def __init__(self, signum, at):
        super().__init__()
        self.signum, self.left = signum, at

    def forward(self, x):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.signum)
        return x

    def __repr__(self):
        return "Signal()"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["sigint", "sigterm"])
def test_a_signal_keeps_a_last_checkpoint(signum, tmp_path):
    def fit(at, checkpoint=None):
        torch.manual_seed(0)
        vae = small(None, Signal(signum, at))
        return outcome(vae, fitted(vae, X, num_epochs=5, compile="eager", validation=NEW,
                                   checkpoint=checkpoint))
    checkpoint = Checkpoint(tmp_path, every_seconds=float("inf"))
    if signum == signal.SIGINT:
        with pytest.warns(UserWarning, match=r"interrupted after [0-9]+ steps; the parameters are "
                                             r"those so far\. The same call goes on from its"):
            assert fit(9, checkpoint)["history"]["interrupted"]
    else:
        with pytest.raises(SystemExit) as error:
            fit(9, checkpoint)
        assert error.value.code == 128 + signal.SIGTERM
    with CheckpointStore(checkpoint) as store:
        assert 5 <= len(store.latest()["stepper"]["elbo"]) <= 10
    assert differences(fit(0, checkpoint), fit(0)) == []


OTHERS = {
    "its `batch_size` was 8, not 9": {"batch_size": 9},
    "its `num_epochs` was 2, not 3": {"num_epochs": 3},
    "its `lr` was 0.002, not 0.001": {"lr": 1e-3},
    "its `num_particles` was 1, not 2": {"num_particles": 2},
    "its `beta` was 1.0, not 0.5": {"beta": 0.5},
    "its `warm_up` was 0, not 1": {"warm_up": 1},
    "its `free_bits` was 0.0, not 0.1": {"free_bits": 0.1},
    "its `patience` was None, not 1": {"patience": 1},
    "its `seed` was 0, not None": {"seed": None},
    "its `x.shape` was [20, 6], not [19, 6]": {"x": X[1:]},
    "the data differ": {"x": X.flip(0)},
    "the masks differ": {"mask": X == X},
    "the validation data differ": {"validation": NEW[:5]},
    "the masks of the validation data differ": {"validation": (NEW, NEW == NEW)},
    "the encoders differ": {"vae": lambda: small(None, nn.ReLU())},
    "the decoders differ": {"vae": lambda: small(decoder=MLPDecoder(2, (6,), 1, (7,)))},
    "the posteriors differ": {"vae": lambda: small(posterior=partial(FlowPosterior, recipe=iaf))},
    "the priors differ": {"vae": lambda: small(prior=VampPrior(2, X[:4]))},
    "the floating-point types differ": {"vae": lambda: small().double()},
}


def test_checkpoints_of_another_training_are_refused_by_name(tmp_path):
    fitted(small(), X, validation=NEW, checkpoint=tmp_path)
    for what, change in OTHERS.items():
        options = {"vae": small, "x": X, "validation": NEW, **change}
        found = f"VAE.fit found checkpoints of another fit in {str(tmp_path)!r}: {what}"
        message = (re.escape(found) + r"(?:, .* then and .* now)?\. Choose another folder, or "
                   r"remove that one to start anew\.")
        with pytest.raises(ValueError, match=f"^{message}$"):
            fitted(options.pop("vae")(), options.pop("x"), checkpoint=tmp_path, **options)
    fitted(small(), X, validation=NEW, checkpoint=tmp_path)  # is still there


def test_a_loader_of_other_data_is_another_training(tmp_path):
    def run(*arrays, **options):
        fitted(small(), ArrayLoader(*arrays, **{"batch_size": 8, **options}), checkpoint=tmp_path)
    run(X)
    run(X)
    for what, arrays, options in (("the data differ", [1 - X], {}),
                                  ("the masks differ", [X, X == X], {}),
                                  ("its `batch_size` was 8, not 9", [X], {"batch_size": 9}),
                                  ("its `x.shape` was [20, 6], not [19, 6]", [X[1:]], {})):
        with pytest.raises(ValueError, match=re.escape(what)):
            run(*arrays, **options)


def test_what_is_no_folder_is_refused():
    with pytest.raises(ValueError, match=r"VAE\.fit expected `checkpoint` to be the path of a fo"):
        fitted(small(), X, checkpoint=3)
