"""The amortization gap of functions whose best features are known."""

from __future__ import annotations

import re

import pytest
import torch

from pyro_nfvi.inference.amortization import NUM_COMPARED, AmortizationGap, reoptimize

TARGET = torch.tensor([[1.0, -2.0], [0.0, 3.0], [5.0, 5.0], [-1.0, 0.5]])


def parabola(features, count, noise=0.5):
    """ELBO of each datum: best at the target, and noisy."""
    error = noise * torch.randn(count, len(features)).mean(0)
    return -(features - TARGET[:len(features)]).square().sum(-1) + error


def gap(elbo=parabola, start=None, **options):
    start = TARGET + torch.tensor([1.0, -1.0]) if start is None else start
    return reoptimize(elbo, start, **{"num_steps": 200, "lr": 0.1, "num_particles": 4,
                                      **options})


def test_the_features_of_each_datum_reach_their_own_best():
    found = gap()
    torch.testing.assert_close(found.gaps, torch.full((4,), 2.0), rtol=0, atol=0.01)
    error = 4 * 0.5 / NUM_COMPARED ** 0.5
    assert (found.optimized.abs() < error).all()
    assert ((found.amortized + 2).abs() < error).all()
    assert found.mean == pytest.approx(2.0, abs=0.01)
    assert found.standard_error == pytest.approx(found.gaps.std().item() / 2)
    assert re.fullmatch(r"AmortizationGap\([12]\.\d{3} \+- 0\.\d{3} nats a datum, 4 data\)",
                        repr(found))


def test_both_are_compared_on_the_same_noise():
    found = gap(lambda features, count: parabola(features, count, noise=100.0), TARGET)
    assert (found.gaps >= 0).all()
    assert found.mean < 0.05
    assert found.amortized.abs().max() > 1


def test_a_datum_that_did_not_gain_keeps_the_encoders():
    def worse_away(features, count):
        return -(features.detach() - TARGET).abs().sum(-1) + features.sum(-1) \
            - features.detach().sum(-1)  # its slope leads astray
    found = gap(worse_away, TARGET)
    assert torch.equal(found.gaps, torch.zeros(4))


@pytest.mark.parametrize("start", [torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(1, 1)],
                         ids=["zeros", "ones", "one-number"])
def test_features_without_any_spread_are_optimised_too(start):
    def elbo(features, count):
        return -(features - 3).square().sum(-1)
    found = gap(elbo, start, num_steps=400)
    torch.testing.assert_close(found.optimized, torch.zeros(len(start)), rtol=0, atol=0.01)
    assert found.standard_error < 1e-6


def test_features_of_any_size_are_optimised_at_the_same_rate():
    found = gap(lambda features, count: -(features / 1e4 - TARGET).square().sum(-1),
                1e4 * (TARGET + 1))
    torch.testing.assert_close(found.gaps, torch.full((4,), 2.0), rtol=0, atol=0.01)


def test_no_more_draws_are_made_at_once_than_asked_for():
    counts = []

    def elbo(features, count):
        counts.append(count)
        return parabola(features, count)
    gap(elbo, num_steps=5, num_particles=7)
    assert set(counts) == {7}
    assert sum(counts[5:]) >= 2 * NUM_COMPARED


def test_a_seed_makes_it_reproducible_and_leaves_the_random_state():
    state = torch.get_rng_state()
    one = gap(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(one.optimized, gap(seed=3).optimized)
    assert not torch.equal(one.optimized, gap(seed=4).optimized)
    before = torch.get_rng_state()
    gap()
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_features_given_are_left_alone():
    start = (TARGET + 1).requires_grad_()
    found = gap(start=start)
    assert torch.equal(start, TARGET + 1)
    assert start.grad is None
    assert not found.amortized.requires_grad
    assert not found.optimized.requires_grad


def test_one_datum_has_no_error_over_the_data():
    assert AmortizationGap(torch.zeros(1), torch.ones(1)).standard_error == 0.0


@pytest.mark.parametrize(("options", "message"), [
    ({"num_steps": 0}, "amortization_gap expected `num_steps` to be an integer >= 1, got 0."),
    ({"num_particles": 1.5}, "amortization_gap expected `num_particles` to be an integer >= 1, "
                             "got 1.5."),
    ({"seed": [1]}, "amortization_gap expected `seed` to be an integer or None, got [1]."),
    ({"lr": 0}, "amortization_gap expected `lr` to be a positive number, got 0."),
], ids=lambda value: None if isinstance(value, str) else next(iter(value)))
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gap(**options)
