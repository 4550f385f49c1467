"""Data: what a VAE takes, what it says of the rest, and minibatches."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from pyro_nfvi.inference import ArrayLoader, minibatches
from pyro_nfvi.vae import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    NegativeBinomial,
    Poisson,
)
from pyro_nfvi.vae.data import (
    LoadedMinibatches,
    Minibatches,
    checked_data,
    checked_loader,
    shaped_data,
)

LIKE = torch.zeros(())
NAN = float("nan")


def checked(x, mask=None, likelihood=None):
    return checked_data(x, mask, Gaussian((2, 3)) if likelihood is None else likelihood, LIKE)


# ------------------------------------------------------------------ what is taken

@pytest.mark.parametrize("x", [
    torch.ones(5, 2, 3, dtype=torch.int64), torch.ones(5, 2, 3, dtype=torch.bool),
    torch.ones(5, 2, 3, dtype=torch.float64), torch.ones(5, 2, 3, dtype=torch.uint8)],
    ids=lambda x: str(x.dtype))
def test_data_of_any_kind_come_in_the_type_of_the_parameters(x):
    for like in (LIKE, LIKE.double()):
        taken, mask = checked_data(x, None, Gaussian((2, 3)), like)
        assert (taken.dtype, mask) == (like.dtype, None)
        assert torch.equal(taken, torch.ones(5, 2, 3, dtype=like.dtype))


def test_what_was_not_seen_becomes_zero_in_a_copy():
    x = torch.full((5, 2, 3), NAN)
    x[:, 0] = 7.0
    taken, mask = checked(x, ~x.isnan())
    assert (taken[:, 0] == 7).all()
    assert (taken[:, 1] == 0).all()
    assert torch.equal(mask, ~x.isnan())
    assert x[0, 1].isnan().all()


def test_packed_sequences_become_padded_ones_with_a_mask():
    sequences = [torch.randn(length, 3) for length in (2, 4, 1)]
    taken, mask = checked(pack_sequence(sequences, enforce_sorted=False), None, Gaussian((5, 3)))
    assert taken.shape == mask.shape == (3, 5, 3)
    for row, sequence in enumerate(sequences):
        assert torch.equal(taken[row, :len(sequence)], sequence)
        assert mask[row, :len(sequence)].all()
        assert not mask[row, len(sequence):].any()


def test_data_of_single_numbers_may_have_gaps():
    taken, mask = checked(torch.arange(4.0), torch.ones(4, dtype=torch.bool), Gaussian(()))
    assert taken.shape == mask.shape == (4,)
    with pytest.raises(ValueError, match="that at 1 has nothing"):
        checked(torch.arange(4.0), torch.arange(4) != 1, Gaussian(()))


def test_the_way_out_of_rows_without_anything_works():
    x, mask = torch.randn(5, 2, 3), torch.rand(5, 2, 3) > 0.5
    mask[3], mask[:3, 0, 0], mask[4, 0, 0] = False, True, True
    with pytest.raises(ValueError, match="that at 3 has nothing") as error:
        checked(x, mask)
    way_out = str(error.value).split("Leave such data out: ")[1].rstrip(".")
    first, second = way_out.split("; ")
    scope = {"x": x, "mask": mask}
    exec(first, scope)
    assert checked(*eval(second, scope))[0].shape == (4, 2, 3)


# ------------------------------------------------------------------ mistakes

X = torch.ones(5, 2, 3)
MISTAKES = {
    "array": (lambda: checked(X.numpy()),
              "VAE expected `x` to be a tensor of shape (num_data, 2, 3), got ndarray. Convert it: "
              "torch.as_tensor(x)."),
    "none": (lambda: checked(None),
             "VAE expected `x` to be a tensor of shape (num_data, 2, 3), got NoneType. New data "
             "come from vae.generate(100)."),
    "scalar": (lambda: checked(torch.tensor(1.0)),
               "VAE expected `x` of shape (num_data, 2, 3), got ()."),
    "flat": (lambda: checked(torch.ones(5, 6)),
             "VAE expected `x` of shape (num_data, 2, 3), got (5, 6). If these are the same data: "
             "x.reshape(-1, 2, 3)."),
    "channel": (lambda: checked(torch.ones(5, 1, 2, 3)),
                "VAE expected `x` of shape (num_data, 2, 3), got (5, 1, 2, 3). If these are the "
                "same data: x.reshape(-1, 2, 3)."),
    "single": (lambda: checked(torch.ones(2, 3)),
               "VAE expected `x` of shape (num_data, 2, 3), got (2, 3). If these are the same "
               "data: x.reshape(-1, 2, 3)."),
    "size": (lambda: checked(torch.ones(5, 2, 4)),
             "VAE expected `x` of shape (num_data, 2, 3), got (5, 2, 4)."),
    "empty": (lambda: checked(X[:0]), "VAE expected `x` to hold at least one datum, got none."),
    "nan": (lambda: checked(torch.full((5, 2, 3), NAN)),
            "VAE expected finite data, got nan. Missing entries: pass mask=~x.isnan()."),
    "inf": (lambda: checked(X / 0),
            "VAE expected finite data, got inf. Missing entries: pass mask=x.isfinite()."),
    "mask-list": (lambda: checked(X, [True] * 5),
                  "VAE expected `mask` to be a boolean tensor of shape (5, 2, 3), true where x was "
                  "seen, got list."),
    "mask-floats": (lambda: checked(X, X),
                    "VAE expected `mask` to be a boolean tensor of shape (5, 2, 3), true where x "
                    "was seen, got torch.float32 (5, 2, 3)."),
    "mask-shape": (lambda: checked(X, X[:, 0] > 0),
                   "VAE expected `mask` to be a boolean tensor of shape (5, 2, 3), true where x "
                   "was seen, got torch.bool (5, 3)."),
    "nothing-seen": (lambda: checked(X, X < 0),
                     "VAE expected every datum to have something seen; that at 0 has nothing. "
                     "Leave such data out: seen = mask.reshape(len(mask), -1).any(1); x[seen], "
                     "mask[seen]."),
    "packed-mask": (lambda: checked(pack_sequence([X[0]]), X > 0),
                    "VAE takes no `mask` with a packed sequence, which knows its lengths. Leave it "
                    "out, or pad: pad_packed_sequence(x, batch_first=True)."),
    "packed-long": (lambda: checked(pack_sequence([torch.ones(4, 3)])),
                    "VAE expected sequences of at most 2 steps, as `event_shape` says, got up to "
                    "4. Build the likelihood with more."),
    "packed-wide": (lambda: checked(pack_sequence([torch.ones(2, 4)])),
                    "VAE expected `x` of shape (num_data, 2, 3), got (1, 2, 4)."),
    "grey": (lambda: checked(0.5 * X, None, Bernoulli((2, 3))),
             "VAE expected binary data (0 or 1) for Bernoulli, got 0.5. For data between 0 and 1: "
             "ContinuousBernoulli(event_shape)."),
    "bytes": (lambda: checked(255 * X, None, ContinuousBernoulli((2, 3))),
              "VAE expected data between 0 and 1 for ContinuousBernoulli, got 255. Rescale them "
              "(8-bit images: x / 255), or use Gaussian(event_shape)."),
    "half-counts": (lambda: checked(2.5 * X, None, Poisson((2, 3))),
                    "VAE expected counts (integers >= 0) for Poisson, got 2.5. For continuous "
                    "data: Gaussian(event_shape)."),
    "negative-counts": (lambda: checked(-X, None, NegativeBinomial((2, 3))),
                        "VAE expected counts (integers >= 0) for NegativeBinomial, got -1. For "
                        "continuous data: Gaussian(event_shape)."),
    "classes": (lambda: checked(4 * X, None, Categorical((2, 3), 4)),
                "VAE expected classes (integers 0 to 3) for Categorical, got 4. Build it with more "
                "classes; for real data: Gaussian(event_shape)."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_sentence_with_the_way_out(name):
    mistake, message = MISTAKES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mistake()


def test_levels_outside_of_a_byte_are_named():
    with pytest.raises(ValueError, match="^VAE expected .* for DiscretizedLogistic, got 256"):
        checked(256 * X, None, DiscretizedLogistic((2, 3)))


def test_values_that_were_not_seen_may_be_anything():
    x = torch.tensor([[0.0, 1, -5], [NAN, 1, 0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    for likelihood in (Bernoulli((3,)), Poisson((3,)), Categorical((3,), 2)):
        assert checked(x, mask, likelihood)[0].tolist() == [[0, 1, 0], [0, 1, 0]]


def test_shapes_alone_are_looked_at_in_the_steps_of_svi():
    assert shaped_data(torch.full((5, 2, 3), NAN), None, Gaussian((2, 3)), LIKE)[0].isnan().all()


# ------------------------------------------------------------------ minibatches

def one(step):
    return 1.0


def batches(num_data, batch_size, weight=one, mask=None):
    x = torch.arange(float(num_data)).unsqueeze(-1)
    return Minibatches((x, mask), batch_size, weight)


@pytest.mark.parametrize(("num_data", "batch_size"), [(10, 4), (12, 4), (10, 100), (1, 1), (5, 1)])
def test_every_epoch_shows_every_datum_once(num_data, batch_size):
    feed = batches(num_data, batch_size)
    assert feed.num_batches == -(-num_data // batch_size)
    for _ in range(3):
        x, counts, weight = feed.take(feed.num_batches)
        assert x.shape == (feed.num_batches, min(batch_size, num_data), 1)
        assert sorted(x[counts].flatten().tolist()) == list(range(num_data))
        assert counts[:-1].all()  # the last batch alone is filled up
        assert (weight == 1).all()


def test_the_order_is_another_each_epoch_and_the_last_batch_has_no_datum_twice():
    feed = batches(10, 4)
    orders = []
    for _ in range(5):
        x, counts, _ = feed.take(3)
        orders.append(x.flatten().tolist())
        assert counts[-1].tolist() == [True, True, False, False]
        assert len(set(x[-1].flatten().tolist())) == 4
    assert len(set(map(tuple, orders))) == 5


def test_batches_do_not_depend_on_how_many_are_taken_at_once():
    feeds = []
    for _ in range(3):
        torch.manual_seed(0)
        feeds.append(batches(10, 4))
    whole = feeds[0].take(12)
    steps = [feeds[1].take(1) for _ in range(12)]
    pieces = [feeds[2].take(count) for count in (5, 0, 6, 1)]
    for i, values in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in steps]), values)
        assert torch.equal(torch.cat([part[i] for part in pieces]), values)


def test_a_mask_goes_along_and_what_is_live_looks_the_same():
    x, mask = torch.arange(20.0).view(10, 2), torch.arange(20).view(10, 2) % 3 > 0
    feed = Minibatches((x, mask), 4, one)
    taken = feed.take(6)
    for live, values in zip(feed.live, taken, strict=True):
        assert (live.shape, live.dtype) == (values.shape[1:], values.dtype)
    assert torch.equal(taken[1], taken[0] % 3 > 0)


def test_weights_go_by_the_step():
    feed = batches(10, 4, weight=lambda step: 10.0 * step)
    weights = torch.cat([feed.take(count)[-1] for count in (2, 3, 1)])
    assert weights.tolist() == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("unused", [1, 2, 5])
def test_a_feed_goes_back_to_a_step_and_shows_it(unused):
    torch.manual_seed(0)
    expected = batches(10, 4, float).take(12)
    torch.manual_seed(0)
    feed = batches(10, 4, float)
    feed.take(2)
    feed.take(5)
    feed.rewind(7 - unused)
    for live, values in zip(feed.live, expected, strict=True):
        assert torch.equal(live, values[7 - unused])
    rest = feed.take(5 + unused)
    for values, wanted in zip(rest, expected, strict=True):
        assert torch.equal(values, wanted[7 - unused:])


def test_large_data_are_gathered_a_few_batches_at_a_time(monkeypatch):
    monkeypatch.setattr(minibatches, "BLOCK_BYTES", 4 * 4 * 6)
    assert batches(10, 4).most == 6
    monkeypatch.setattr(minibatches, "BLOCK_BYTES", 1)
    assert batches(10, 4).most == 1


def test_the_order_leaves_the_random_state_of_the_noise_alone():
    feed = batches(10, 4)
    state = torch.get_rng_state()
    feed.take(20)
    assert torch.equal(torch.get_rng_state(), state)


def test_data_in_another_order_of_memory_are_the_same():
    x = torch.arange(24.0).view(3, 4, 2).permute(1, 2, 0)
    feeds = []
    for data in (x, x.contiguous()):
        torch.manual_seed(0)
        feeds.append(Minibatches((data, None), 3, one))
    assert torch.equal(*(feed.take(4)[0] for feed in feeds))


# ------------------------------------------------------------------ loaders

def loaded(*arrays, batch_size, weight=one):
    loader = ArrayLoader(*arrays, batch_size=batch_size)
    return LoadedMinibatches(loader, lambda x, mask: shaped_data(x, mask, Gaussian((2,)), LIKE),
                             weight)


@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.bool_])
def test_a_mapped_file_feeds_every_datum_once_an_epoch(kind, tmp_path):
    np.save(tmp_path / "x.npy", (np.arange(60).reshape(30, 2) % 2).astype(kind))
    np.save(tmp_path / "seen.npy", np.ones((30, 2), bool))
    arrays = [np.load(tmp_path / name, mmap_mode="r") for name in ("x.npy", "seen.npy")]
    feed = loaded(*arrays, batch_size=7, weight=float)
    assert (feed.num_batches, feed.epoch) == (5, 0)
    x, mask, counts, weights = feed.take(30)
    assert (x.dtype, mask.dtype, x.shape) == (LIKE.dtype, torch.bool, (30, 7, 2))
    assert counts.all()
    assert weights.tolist() == list(range(30))
    assert feed.epoch == 7
    assert [live.shape for live in feed.live] == [(7, 2), (7, 2), (7,), ()]


def test_the_rows_of_a_loader_are_each_seen_equally_often():
    feed = loaded(torch.arange(60.0).reshape(30, 2), batch_size=7)
    rows = feed.take(30)[0][..., 0].flatten() / 2
    assert torch.equal(torch.bincount(rows.long()), torch.full((30,), 7))
    assert rows[:30].unique().numel() == 30


def test_a_loaded_feed_goes_back_and_on_from_a_snapshot():
    x = torch.arange(60.0).reshape(30, 2)
    feed, other = (loaded(x, batch_size=7, weight=float) for _ in range(2))
    first = feed.take(6)
    feed.rewind(2)
    assert all(torch.equal(live, values[2]) for live, values in
               zip(feed.live, first, strict=True))
    assert all(map(torch.equal, feed.take(4), [values[2:] for values in first]))
    other.restore(feed.snapshot(3))
    assert all(map(torch.equal, other.take(3), [values[3:] for values in first]))


def test_all_rows_of_a_loader_are_looked_at_block_by_block(monkeypatch):
    monkeypatch.setattr(minibatches, "BLOCK_BYTES", 64)
    sizes, x = [], torch.zeros(20, 2)

    def checking(x, mask):
        sizes.append(len(x))
        return checked_data(x, mask, Gaussian((2,)), LIKE)
    assert checked_loader(ArrayLoader(x, batch_size=3), None, checking).num_rows == 20
    assert sizes == [8, 8, 4]
    x[17] = NAN
    with pytest.raises(ValueError, match=r"VAE expected .*finite"):
        checked_loader(ArrayLoader(x, batch_size=3), None, checking)
    with pytest.raises(ValueError, match=r"VAE expected `x` of shape .*, got \(5, 3\)"):
        checked_loader(ArrayLoader(torch.zeros(20, 3), batch_size=3), None, checking)


@pytest.mark.parametrize(("arrays", "mask", "got"), [
    (3, None, "3 arrays"), (1, torch.ones(4, 2).bool(), "a mask beside it")])
def test_a_loader_is_of_data_or_of_data_and_mask(arrays, mask, got):
    loader = ArrayLoader(*[torch.zeros(4, 2)] * arrays, batch_size=3)
    with pytest.raises(ValueError, match=f"VAE expected a loader of data, or of data and mask, got "
                                         rf"{got}\. Say: ArrayLoader\(x, mask, batch_size=128\)"):
        checked_loader(loader, mask, None)
