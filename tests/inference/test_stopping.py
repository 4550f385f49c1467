"""Schedules: up, flat, down, within the budget, and the same however they are asked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_nfvi.inference.stopping import (
    DECAY,
    FEWEST,
    FLAT_LOOKS,
    LONGEST_HOLD,
    LOOK_EVERY,
    OneCycle,
    UntilFlat,
    is_flat,
)


def rising(step, rate=0.01, noise=1.0):
    return rate * step + noise * np.random.default_rng(step).standard_normal()


def arriving(step, time=100.0, noise=0.5):
    """An ELBO that has arrived after a few times ``time``."""
    return -20 * math.exp(-step / time) + noise * np.random.default_rng(step).standard_normal()


def run(schedule, elbo_fn, chunks):
    """All rates of a fit that asks for so many at a time."""
    elbo, rates, chunks = [], [], iter(chunks)
    while len(elbo) < schedule.num_steps:
        new = schedule.rates(len(elbo), next(chunks))
        assert new
        rates += new
        elbo += [elbo_fn(step) for step in range(len(elbo), len(elbo) + len(new))]
        schedule.look(elbo)
    return rates


def forever(size):
    while True:
        yield size


def random_sizes(seed):
    generator = np.random.default_rng(seed)
    while True:
        yield int(generator.integers(1, 200))


# ------------------------------------------------------------------ OneCycle

@pytest.mark.parametrize("num_steps", [1, 2, 9, 10, 11, 100, 3000])
def test_one_cycle_rises_to_one_and_falls_towards_zero(num_steps):
    rates = OneCycle(num_steps).rates(0, num_steps)
    assert len(rates) == num_steps
    top = rates.index(max(rates))
    assert rates[top] == 1.0
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)
    assert top <= 0.1 * num_steps + 1
    if num_steps >= 100:
        assert rates[-1] < 1e-3


def test_one_cycle_rises_in_a_line_and_falls_as_a_cosine():
    rates = OneCycle(100).rates(0, 100)
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5)


@pytest.mark.parametrize("chunks", [forever(1), forever(7), forever(1000), random_sizes(0)])
def test_one_cycle_gives_the_same_rates_in_any_pieces(chunks):
    assert run(OneCycle(500), rising, chunks) == OneCycle(500).rates(0, 500)


def test_one_cycle_is_not_changed_by_what_happens():
    schedule = OneCycle(100)
    before = schedule.rates(0, 100)
    schedule.look([0.0] * 50)
    schedule.hurry(50)
    assert schedule.rates(0, 200) == before
    assert schedule.rates(100, 10) == []


# ------------------------------------------------------------------ UntilFlat

def test_the_rate_holds_while_the_elbo_rises_and_falls_at_half_the_budget():
    rates = run(UntilFlat(3000), rising, forever(100))
    assert rates[:LOOK_EVERY] == pytest.approx([(i + 1) / LOOK_EVERY for i in range(LOOK_EVERY)])
    hold = int(LONGEST_HOLD * 3000)
    assert set(rates[LOOK_EVERY:hold]) == {1.0}
    fall = rates[hold:]
    assert fall == sorted(fall, reverse=True)
    assert fall[-1] < 1e-3
    assert len(fall) == DECAY * hold


def test_the_rate_falls_soon_after_the_elbo_is_flat():
    rates = run(UntilFlat(10_000), arriving, forever(100))
    hold = max(step for step, rate in enumerate(rates) if rate == 1.0)
    assert FEWEST <= hold < 2500
    assert len(rates) == pytest.approx((1 + DECAY) * hold, abs=LOOK_EVERY)
    assert rates[-1] < 1e-2
    longer = run(UntilFlat(10_000), lambda step: arriving(step, time=400.0), forever(100))
    assert len(longer) > len(rates)


def test_a_flat_elbo_is_seen_no_earlier_than_after_the_fewest_steps():
    rates = run(UntilFlat(3000), lambda step: 0.0, forever(100))
    assert rates.index(1.0) == LOOK_EVERY - 1
    assert rates[FEWEST - 1] == 1.0
    assert len(rates) == pytest.approx((1 + DECAY) * FEWEST)


def test_one_flat_look_is_not_enough():
    schedule = UntilFlat(100_000)
    for looks in range(1, FLAT_LOOKS + 1):
        assert schedule.hold is None
        schedule.look([0.0] * (FEWEST + looks * LOOK_EVERY))
    assert schedule.hold == FEWEST + FLAT_LOOKS * LOOK_EVERY
    schedule = UntilFlat(100_000)
    flat, up = [0.0] * 1000, [float(i) for i in range(1000)]
    for elbo in (flat, up, flat, up):
        schedule.look(elbo)
    assert schedule.hold is None


@pytest.mark.parametrize("num_steps", [1, 2, 10, 49, 50, 51, 99, 150, 400, 401, 1000])
@pytest.mark.parametrize("elbo_fn", [rising, arriving], ids=["rising", "arriving"])
def test_the_steps_are_within_the_budget_and_end_slowly(num_steps, elbo_fn):
    rates = run(UntilFlat(num_steps), elbo_fn, forever(13))
    assert 0 < len(rates) <= num_steps
    assert all(0 < rate <= 1 for rate in rates)
    if num_steps >= 2 * LOOK_EVERY:
        assert rates[-1] < 0.01


@pytest.mark.parametrize("elbo_fn", [rising, arriving], ids=["rising", "arriving"])
@pytest.mark.parametrize("seed", range(5))
def test_rates_are_the_same_in_any_pieces(elbo_fn, seed):
    reference = run(UntilFlat(1200), elbo_fn, forever(1))
    assert run(UntilFlat(1200), elbo_fn, random_sizes(seed)) == reference
    assert run(UntilFlat(1200), elbo_fn, forever(10_000)) == reference


def test_in_a_hurry_the_rate_falls_from_that_step_on():
    schedule = UntilFlat(3000)
    before = schedule.rates(0, 1000)
    assert len(before) == LOOK_EVERY
    schedule.hurry(200)
    after = schedule.rates(200, 3000)
    assert schedule.num_steps == 320
    assert len(after) == 120
    assert after[0] == 1.0
    assert after == sorted(after, reverse=True)
    schedule.hurry(250)  # once is enough
    assert schedule.rates(200, 3000) == after


def test_a_hurry_right_at_the_start_still_makes_some_steps():
    schedule = UntilFlat(3000)
    schedule.hurry(5)
    assert schedule.num_steps == 5 + LOOK_EVERY
    assert len(schedule.rates(5, 1000)) == LOOK_EVERY


# ------------------------------------------------------------------ is_flat

@pytest.mark.parametrize("seed", range(5))
def test_a_line_that_rises_out_of_the_noise_is_not_flat(seed):
    noise = np.random.default_rng(seed).standard_normal(400)
    slope_error = (12 / 400 ** 3) ** 0.5
    assert not is_flat(noise + 6 * slope_error * np.arange(400))
    assert is_flat(noise - 6 * slope_error * np.arange(400))


def test_noise_alone_is_flat_about_five_times_in_six():
    generator = np.random.default_rng(0)
    share = np.mean([is_flat(generator.standard_normal(100)) for _ in range(1000)])
    assert abs(share - 0.8413) < 4 * (0.8413 * 0.1587 / 1000) ** 0.5 + 0.01


def test_a_few_wild_values_hide_no_rise():
    values = 0.05 * np.arange(400) + np.random.default_rng(0).standard_normal(400)
    values[[5, 150, 390]] = [1e6, -1e8, -1e9]
    assert not is_flat(values)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0] * 50, [1.0, 0.0]])
def test_what_does_not_rise_is_flat(values):
    assert is_flat(values)


def test_what_rises_without_noise_is_not_flat():
    assert not is_flat(list(range(50)))
