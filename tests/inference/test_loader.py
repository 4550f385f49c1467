"""LoaderFeed: batches of one shape from any loader, resumed to the bit, and the right mean."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.util import prune_subsample_sites
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_nfvi.engine.compiled import Compiled
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import LogJoint
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.scaling import GivenRows, check_scaling
from pyro_nfvi.inference.score import Score, value_and_gradient

DOUBLE = torch.float64
ROWS = torch.arange(23.0)
X = torch.stack([ROWS, -ROWS], -1)


class Noisy(Dataset):
    """Rows with noise of torch's global random state."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return X[i], ROWS[i] + torch.rand(())


class Numbers(IterableDataset):
    """Rows whose number is not known before."""

    def __iter__(self):
        return iter(zip(X, ROWS, strict=True))


def data_loader(**options):
    return DataLoader(TensorDataset(X, ROWS), batch_size=5, **options)


def seeded(**options):
    return data_loader(generator=torch.Generator().manual_seed(3), **options)


LOADERS = {
    "arrays": lambda: ArrayLoader(X, ROWS, batch_size=5),
    "arrays-in-order": lambda: ArrayLoader(X, ROWS, batch_size=5, shuffle=False),
    "arrays-in-blocks": lambda: ArrayLoader(X, ROWS, batch_size=5, block_size=3),
    "shuffle": lambda: data_loader(shuffle=True),
    "in-order": lambda: data_loader(),
    "drop-last": lambda: data_loader(shuffle=True, drop_last=True),
    "own-generator": lambda: seeded(shuffle=True),
    "sampler-generator": lambda: data_loader(sampler=RandomSampler(
        ROWS, generator=torch.Generator().manual_seed(3))),
    "noisy-data": lambda: DataLoader(Noisy(), batch_size=5, shuffle=True),
    "iterable-dataset": lambda: DataLoader(Numbers(), batch_size=5),
    "list": lambda: list(zip(X.split(5), ROWS.split(5), strict=True)),
    "uneven-list": lambda: list(zip(X.split([5, 9, 1, 8]), ROWS.split([5, 9, 1, 8]), strict=True)),
}
WORKERS = {"workers": lambda: data_loader(shuffle=True, num_workers=2),
           "noisy-workers": lambda: DataLoader(Noisy(), batch_size=5, shuffle=True, num_workers=2)}
every_loader = pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
any_workers = pytest.mark.parametrize("make", [*LOADERS.values(), *(
    pytest.param(make, marks=pytest.mark.slow) for make in WORKERS.values())],
    ids=[*LOADERS, *WORKERS])


def feed_of(loader, seed=0, **options):
    torch.manual_seed(seed)
    return LoaderFeed(loader, **options)


def taken(feed, *counts):
    """Rows of so many steps, however they are asked for."""
    parts = [feed.take(count) for count in counts]
    return [torch.cat(same) for same in zip(*parts, strict=True)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------ what it supplies

@every_loader
def test_every_epoch_has_all_rows_and_batches_one_shape(make):
    feed = feed_of(make())
    x, rows = feed.take(23)  # five epochs of batches of five rows
    assert x.shape == (23, 5, 2)
    assert rows.shape == (23, 5)
    assert [tensor.shape for tensor in feed.live] == [(5, 2), (5,)]
    assert torch.equal(x[..., 0], rows.floor())
    epochs = rows.floor().reshape(5, 23)
    assert torch.equal(epochs.sort(1).values, ROWS.expand(5, 23))
    assert (feed.epoch, feed.step) == (5, 23)


@every_loader
def test_how_many_batches_are_taken_at_once_changes_nothing(make):
    whole = taken(feed_of(make()), 40)
    assert equal(taken(feed_of(make()), 1, 2, 3, 14, 1, 1, 18), whole)
    assert equal(taken(feed_of(make()), *[1] * 40), whole)


@every_loader
def test_the_live_batch_is_the_first(make):
    feed = feed_of(make())
    live = [tensor.clone() for tensor in feed.live]
    assert equal(live, [block[0] for block in feed.take(3)])


@every_loader
def test_epochs_completed_are_counted(make):
    feed = feed_of(make())
    epochs = []
    for _ in range(12):
        feed.take(1)
        epochs.append(feed.epoch)
    assert epochs == [step * 5 // 23 for step in range(1, 13)]


def test_seeds_give_orders_of_their_own():
    for name in ("arrays", "shuffle", "arrays-in-blocks"):
        first, second = (taken(feed_of(LOADERS[name](), seed), 5) for seed in (0, 1))
        assert not equal(first, second)
        assert equal(first, taken(feed_of(LOADERS[name](), 0), 5))


@any_workers
def test_the_global_random_state_is_left_alone(make):
    loader = make()
    feed = feed_of(loader, 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    own = getattr(loader, "generator", None)
    before = None if own is None else own.get_state()
    feed.take(7)
    feed.first(6)
    list(feed.passes())
    feed.restore(feed.snapshot(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert before is None or torch.equal(own.get_state(), before)


def test_floating_point_is_converted_and_integers_stay():
    numbers, words = torch.arange(8), torch.arange(8, dtype=torch.uint8)
    for loader in (ArrayLoader(X[:8], numbers, words, batch_size=3),
                   DataLoader(TensorDataset(X[:8], numbers, words), batch_size=3)):
        feed = feed_of(loader, dtype=DOUBLE)
        for tensors in (feed.live, feed.take(2), feed.first(5), next(feed.passes())):
            assert [t.dtype for t in tensors] == [DOUBLE, torch.int64, torch.uint8]
        assert feed_of(loader).live[0].dtype == torch.float32


def test_dicts_go_to_the_model_by_name_and_others_by_place():
    batches = [{"y": ROWS[:4], "x": X[:4]}, {"x": X[4:6], "y": ROWS[4:6]}]
    with pytest.raises(ValueError, match="differ in their number of rows only, got x"):
        feed_of(batches).take(3)
    feed = feed_of([{"y": ROWS[:4], "x": X[:4]}])
    args, kwargs = feed.arguments((1,), {"z": 2})
    assert (args, list(kwargs)) == ((1,), ["z", "y", "x"])
    assert torch.equal(kwargs["x"], X[:4])
    args, kwargs = feed_of([ROWS[:4]]).arguments((1,), {"z": 2})
    assert (args[0], len(args), kwargs) == (1, 2, {"z": 2})


def test_a_batch_that_names_what_the_call_gives_too_is_refused():
    with pytest.raises(ValueError, match=r"^NFVI expected each argument of the model once, got 'x' "
                                         r"in the call and in the batches of `loader`\. Leave"):
        feed_of([{"y": ROWS, "x": X}]).arguments((), {"x": X, "z": 2})


def test_a_slow_loader_is_asked_for_few_batches_at_once():
    class Slow(Noisy):
        def __getitem__(self, i):
            time.sleep(0.01)
            return super().__getitem__(i)
    feed = feed_of(DataLoader(Slow(), batch_size=5))
    assert feed.most > 1000
    feed.take(2)
    assert 1 <= feed.most <= 6


def test_live_tensors_are_the_feed_s_own():
    data = [(X.clone(), ROWS.clone())]
    feed = feed_of(data)
    for tensor in [*feed.live, *feed.take(1)]:
        tensor.fill_(7.0)
    assert torch.equal(data[0][0], X)


# ------------------------------------------------------------------ back, and on from a file

@any_workers
def test_a_rewound_feed_supplies_the_same_once_more(make):
    feed, whole = feed_of(make()), taken(feed_of(make()), 30)
    feed.take(7)
    feed.take(9)
    feed.rewind(11)
    assert equal(feed.live, [block[11] for block in whole])
    assert feed.step == 11
    rest = taken(feed, 2, 17)
    assert equal(rest, [block[11:] for block in whole])


@any_workers
@pytest.mark.parametrize("step", [5, 9, 12, 23, 26])
def test_a_resumed_feed_supplies_what_it_would_have_supplied(make, step):
    feed, whole = feed_of(make()), taken(feed_of(make()), 45)
    feed.take(step - 4)
    feed.take(6)
    snapshot = feed.snapshot(step)
    other = feed_of(make(), seed=9)
    other.take(3)
    other.restore(snapshot)
    assert (other.step, other.epoch) == (step, step * 5 // 23)
    assert equal(taken(other, 1, 44 - step), [block[step:] for block in whole])


def test_a_snapshot_is_plain_and_survives_a_file(tmp_path):
    for name in ("arrays-in-blocks", "own-generator"):
        feed = feed_of(LOADERS[name]())
        feed.take(8)
        torch.save(feed.snapshot(7), tmp_path / "feed.pt")
        other = feed_of(LOADERS[name](), 4)
        other.restore(torch.load(tmp_path / "feed.pt", weights_only=True))
        feed.rewind(7)
        assert equal(other.take(3), feed.take(3))


def test_a_snapshot_of_another_loader_is_refused():
    snapshot = feed_of(LOADERS["arrays"]()).snapshot(0)
    with pytest.raises(ValueError, match="of batch_size=5, got batch_size=4"):
        feed_of(ArrayLoader(X, ROWS, batch_size=4)).restore(snapshot)
    with pytest.raises(ValueError, match="of num_rows=23, got num_rows=22"):
        feed_of(ArrayLoader(X[1:], batch_size=5)).restore(snapshot)


def test_a_new_stage_counts_steps_anew_and_goes_on():
    for name in ("arrays", "shuffle"):
        feed, whole = feed_of(LOADERS[name]()), taken(feed_of(LOADERS[name]()), 20)
        feed.take(6)
        feed.restart()
        feed.take(4)
        feed.rewind(2)
        assert feed.step == 2
        snapshot = feed.snapshot(2)
        assert equal(feed.take(3), [block[8:11] for block in whole])
        other = feed_of(LOADERS[name](), 2)
        other.restore(snapshot)
        assert other.step == 2
        assert equal(other.take(12), [block[8:] for block in whole])


# ------------------------------------------------------------------ beside the order

@any_workers
def test_a_pass_has_all_rows_once_and_disturbs_nothing(make):
    feed, whole = feed_of(make()), taken(feed_of(make()), 12)
    first = feed.take(3)
    inside = feed.passes()
    batch = next(inside)
    middle = feed.take(4)
    batches = [batch, *inside]
    assert [len(rows) for _, rows in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([x for x, _ in batches])[:, 0].sort().values, ROWS)
    assert [len(rows) for _, rows in feed.passes(9)] == [9, 9, 5]
    some = feed.first(8)
    assert [len(tensor) for tensor in some] == [8, 8]
    assert len({row.item() for row in some[0][:, 0]}) == 8
    assert len(feed.first(100)[0]) == 23
    parts = [first, middle, feed.take(5)]
    assert equal([torch.cat(same) for same in zip(*parts, strict=True)], whole)


class Reads(Noisy):
    """Rows that are read several at a time, and count how many."""

    def __init__(self):
        self.counts = []

    def __getitems__(self, indices):
        self.counts.append(len(indices))
        return [(X[i], ROWS[i]) for i in indices]


def test_a_batch_sampler_reads_as_many_rows_at_a_time_in_a_pass_and_drops_none():
    data = Reads()
    feed = feed_of(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(ROWS), 5, True)))
    assert len(feed.take(23)[1].unique()) == 23
    data.counts.clear()
    assert torch.equal(torch.cat([rows for _, rows in feed.passes()]), ROWS)
    assert data.counts == [5, 5, 5, 5, 3]


def test_rows_drawn_evenly_with_replacement_are_passed_once_each():
    feed = feed_of(data_loader(sampler=RandomSampler(ROWS, replacement=True, num_samples=9)))
    assert torch.equal(torch.cat([rows for _, rows in feed.passes()]), ROWS)
    assert len(feed.first(100)[0]) == feed.num_rows == 23


class Endless(IterableDataset):
    """Rows without an end."""

    def __iter__(self):
        while True:
            yield X[0], ROWS[0]


@pytest.mark.parametrize("make", [
    lambda: DataLoader(Endless(), batch_size=5), lambda: [(X, ROWS), (X, ROWS)]])
def test_rows_beyond_those_there_should_be_are_refused_where_all_are_read(make):
    with pytest.raises(ValueError, match="^NFVI expected `loader` to give all 23 rows once, as the "
                                         "model says, got more. Its workers must share"):
        feed_of(make()).first(6, 23)


def test_rows_to_start_from_are_drawn_from_everywhere():
    for name in ("arrays", "arrays-in-order", "in-order"):
        rows = torch.stack([feed_of(LOADERS[name](), seed).first(4)[1] for seed in range(60)])
        z = (rows.mean() - 11) / (rows.std() / rows.numel() ** 0.5)
        assert abs(z) < 4


@pytest.mark.slow
def test_persistent_workers_are_not_reset_by_a_pass():
    loader = data_loader(shuffle=True, num_workers=1, persistent_workers=True)
    whole = taken(feed_of(loader), 12)
    feed = feed_of(data_loader(shuffle=True, num_workers=1, persistent_workers=True))
    first = feed.take(3)
    assert sum(len(rows) for _, rows in feed.passes()) == 23
    assert equal([torch.cat(same) for same in zip(first, feed.take(9), strict=True)], whole)


def test_the_number_of_rows_is_known_where_it_can_be():
    expected = {"arrays": 23, "shuffle": 23, "drop-last": 23, "sampler-generator": None,
                "iterable-dataset": None, "list": None}
    for name, num_rows in expected.items():
        got = feed_of(LOADERS[name]()).num_rows
        assert got == (23 if name == "sampler-generator" else num_rows)
    assert feed_of(data_loader(sampler=SubsetRandomSampler(range(9)))).num_rows == 9
    assert feed_of(DataLoader(TensorDataset(X), batch_sampler=BatchSampler(
        RandomSampler(X), 4, False))).num_rows == 23


# ------------------------------------------------------------------ processes

@pytest.mark.parametrize("name", ["arrays", "arrays-in-blocks", "shuffle", "own-generator"])
def test_processes_together_have_the_batches_of_one(name):
    def make():
        loader = LOADERS[name]()
        if isinstance(loader, ArrayLoader):
            return ArrayLoader(X, ROWS, batch_size=6, block_size=loader.block_size)
        return DataLoader(TensorDataset(X, ROWS), batch_size=6, shuffle=True,
                          generator=loader.generator)
    whole = taken(feed_of(make()), 3, 9)
    feeds = [feed_of(make(), rank=rank, size=3) for rank in range(3)]
    assert [(feed.batch_size, feed.num_own, len(feed.live[0])) for feed in feeds] == [(6, 2, 2)] * 3
    parts = [taken(feed, 5, 7) for feed in feeds]
    assert equal([torch.cat(same, 1) for same in zip(*parts, strict=True)], whole)
    assert equal(feeds[0].first(7), feeds[2].first(7))
    assert sum(len(rows) for _, rows in feeds[1].passes()) == 23


def test_a_distributed_sampler_has_shared_the_rows_already():
    def loader(rank):
        data = TensorDataset(X[:22], ROWS[:22])
        sampler = DistributedSampler(data, 2, rank, seed=4)
        return DataLoader(data, batch_size=4, sampler=sampler)
    feeds = [feed_of(loader(rank), rank=rank, size=2) for rank in range(2)]
    assert [(feed.batch_size, feed.num_own, feed.num_rows) for feed in feeds] == [(8, 4, 22)] * 2
    parts = [feed.take(11)[1].reshape(4, 11) for feed in feeds]  # four epochs
    epochs = torch.cat(parts, 1)
    assert torch.equal(epochs.sort(1).values, ROWS[:22].expand(4, 22))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert torch.equal(torch.cat([rows for _, rows in feeds[0].passes()]), ROWS[:22])
    assert equal(feeds[0].first(7), feeds[1].first(7))


@pytest.mark.parametrize("make", [lambda: ArrayLoader(X, batch_size=5), lambda: data_loader()])
def test_a_batch_that_cannot_be_shared_is_refused(make):
    with pytest.raises(ValueError, match="divisible by the 2 processes that share a batch, got 5"):
        feed_of(make(), size=2)


# ------------------------------------------------------------------ what is wrong with a loader

def broken_after(count):
    class Broken(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            if i >= count:
                raise KeyError(f"no file {i}")
            return ROWS[i]
    return DataLoader(Broken(), batch_size=5)


class Drawing(BatchSampler):
    """Batches in an order that passes over all rows keep."""


def weighted():
    return WeightedRandomSampler(torch.ones(23), 23)


class Once:
    """Gives batches at its first epoch only."""

    def __init__(self):
        self.batches = [ROWS]

    def __iter__(self):
        batches, self.batches = self.batches, []
        return iter(batches)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: 3, "an ArrayLoader, a DataLoader or another iterable of batches, got int"),
    (lambda: X, r"got Tensor. Wrap it: ArrayLoader\(x, batch_size=512\)"),
    (lambda: X.numpy(), "got ndarray. Wrap it: ArrayLoader"),
    (lambda: TensorDataset(X), r"got TensorDataset, which gives rows. Wrap it: DataLoader\("),
    (lambda: (x for x in X), "again and again, got generator, which is exhausted after one epoch"),
    (lambda: iter([X]), "got list_iterator, which is exhausted"),
    (lambda: [], "to give batches, got none in epoch 1.$"),
    (lambda: data_loader(sampler=weighted()), "each row once an epoch, got one whose "
     r"WeightedRandomSampler draws with replacement. Take DataLoader\(dataset, batch_size=512, "),
    (lambda: DataLoader(TensorDataset(X), batch_sampler=BatchSampler(weighted(), 5, False)),
     "whose WeightedRandomSampler draws"),
    (lambda: DataLoader(list(X.split(1)), batch_size=None, sampler=weighted()),
     "whose WeightedRandomSampler draws"),
    (lambda: DataLoader(TensorDataset(X), batch_sampler=Drawing(
        RandomSampler(X, replacement=True), 5, False)), "whose RandomSampler draws"),
    (Once, "got none in epoch 2. It must be one that can be iterated again"),
    (lambda: {"x": X}, "got str in batch 1 of epoch 1"),
    (lambda: [X.numpy()], "got ndarray in batch 1 of epoch 1. Convert it: torch.as_tensor"),
    (lambda: [(X, None)], "got NoneType inside tuple in batch 1"),
    (lambda: [(X, [ROWS])], "got list inside tuple in batch 1"),
    (lambda: [()], "got tuple in batch 1"),
    (lambda: [{1: X}], "dicts by the names of the model's arguments"),
    (lambda: [(X, ROWS[:3])], r"as many rows each, got shapes \(23, 2\), \(3,\) in batch 1"),
    (lambda: [(X, ROWS[0])], r"as many rows each, got shapes \(23, 2\), \(\) in batch 1"),
    (lambda: [(X, ROWS), X], r"got \(num_rows, 2\) of torch.float32 in batch 2 of epoch 1 after"),
    (lambda: [X, X[:, :1]], r"got \(num_rows, 1\) of torch.float32 in batch 2 of epoch 1"),
    (lambda: [X, X.double()], r"got \(num_rows, 2\) of torch.float64 in batch 2"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_loader_that_will_not_do_is_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        feed_of(make()).take(50)
    assert str(caught.value).startswith("NFVI expected `loader`")


def test_an_error_of_the_user_s_dataset_comes_with_the_batch():
    feed = feed_of(broken_after(12))
    with pytest.raises(RuntimeError, match="`loader` raised KeyError at batch 3 of epoch 1: 'no fi"
                       ) as caught:
        feed.take(4)
    assert isinstance(caught.value.__cause__, KeyError)


def test_workers_end_with_the_feed_and_not_when_it_is_collected():
    feed = feed_of(data_loader(num_workers=2))
    workers = feed._stream.batches.iterator._workers
    assert all(worker.is_alive() for worker in workers)
    del feed
    assert not any(worker.is_alive() for worker in workers)


# ------------------------------------------------------------------ the thread

def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "pyro_nfvi loader"]


def wait_for_threads():
    end = time.monotonic() + 20
    while loader_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return loader_threads()


def test_the_next_block_is_gathered_meanwhile_and_no_thread_stays(monkeypatch):
    loader, names = ArrayLoader(X, ROWS, batch_size=5), []
    gather = ArrayLoader.gather

    def spy(self, rows):
        names.append(threading.current_thread().name)
        return gather(self, rows)
    monkeypatch.setattr(ArrayLoader, "gather", spy)
    feed = feed_of(loader)
    for _ in range(4):
        feed.take(10)
    assert names[2:].count("pyro_nfvi loader") >= 3
    del feed
    gc.collect()
    assert not wait_for_threads()


def test_an_error_in_the_thread_is_raised_as_it_is(monkeypatch):
    feed = feed_of(ArrayLoader(X, ROWS, batch_size=5))
    gather, main = ArrayLoader.gather, threading.current_thread()

    def failing(self, rows):
        if threading.current_thread() is not main:
            raise OSError("the disk is gone")
        return gather(self, rows)
    monkeypatch.setattr(ArrayLoader, "gather", failing)
    feed.take(3)
    with pytest.raises(OSError, match="the disk is gone"):
        feed.take(3)
    assert not wait_for_threads()


# ------------------------------------------------------------------ the mean of minibatches

N = 230
torch_rows = torch.Generator().manual_seed(0)
INPUTS = torch.randn(N, 3, dtype=DOUBLE, generator=torch_rows)
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) + torch.randn(
    N, dtype=DOUBLE, generator=torch_rows)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def log_joint_of(model, *args, **kwargs):
    with default_dtype(DOUBLE):
        trace = prune_subsample_sites(pyro.poutine.trace(model).get_trace(*args, **kwargs))
    return LogJoint(model, args, kwargs, LatentLayout.from_trace(trace), DOUBLE)


@pytest.mark.parametrize("make", [
    lambda: ArrayLoader(INPUTS, TARGETS, batch_size=32),
    lambda: ArrayLoader(INPUTS, TARGETS, batch_size=32, block_size=8),
    lambda: DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=32, shuffle=True),
], ids=["arrays", "blocks", "data-loader"])
def test_the_mean_gradient_of_minibatches_is_that_of_all_data(make):
    feed, z = feed_of(make()), torch.tensor([[0.3, -1.0, 0.2, 0.4]], dtype=DOUBLE)
    _, expected = Score(log_joint_of(regression, INPUTS, TARGETS))(z)
    log_joint = log_joint_of(GivenRows("data")(regression), *feed.live)
    live = z.clone()
    compiled = Compiled(lambda: list(value_and_gradient(log_joint, live)), [live, *feed.live],
                        "fx")
    assert not compiled.draws(1)  # GivenRows: no permutation of all rows at each step
    gradients = [compiled.program([z, *batch], [])[1][0]
                 for batch in zip(*feed.take(400), strict=True)]
    got = torch.stack(gradients)
    scores = (got.mean(0) - expected[0]) / (got.std(0) / len(got) ** 0.5)
    assert scores.abs().max() < 4
    assert (got.std(0) > 1).all()  # and not by being all data


# ------------------------------------------------------------------ the scale of the likelihood

def plated(*sizes, name="data", **options):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate(name, *sizes, **options):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    return model


def unplated(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def local_latent(x, y):
    with pyro.plate("data", N, subsample_size=len(x)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_factor(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.factor("fit", -((y - x @ w) ** 2))


@pytest.mark.parametrize(("model", "num_rows"), [
    (regression, N), (regression, None), (by_factor, N), (plated(32), 32),
], ids=["regression", "unknown", "factor", "one-batch"])
def test_a_model_that_scales_its_likelihood_passes(model, num_rows):
    log_joint = log_joint_of(model, INPUTS[:32], TARGETS[:32])
    state = torch.get_rng_state()
    plate = check_scaling(log_joint, 32, num_rows)
    assert (plate.name, plate.size) == ("data", 32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("model", "num_rows", "words"), [
    (plated(32, name="rows"), N, r"a batch of 32 rows to all 230 rows, found plate 'rows', of 32 "
     r"of 32 rows. Write: with pyro.plate\('rows', 230, subsample_size=len\(x\)\):"),
    (plated(32), None, r"to all rows, found plate 'data', of 32 of 32 rows. Write: with "
     r"pyro.plate\('data', num_rows, subsample_size=len\(x\)\):"),
    (plated(100, subsample_size=32), N, "found plate 'data', of 32 of 100 rows"),
    (unplated, N, r"found no plate around observed sites. Write: with pyro.plate\('data', 230, "),
    (local_latent, N, "'mu' is local to the plate 'data' of minibatches. Amortize it: AutoAmort"),
], ids=["own-size", "unknown", "another-size", "no-plate", "local"])
def test_a_model_that_does_not_is_told_what_to_write(model, num_rows, words):
    with pytest.raises(ValueError, match=words):
        check_scaling(log_joint_of(model, INPUTS[:32], TARGETS[:32]), 32, num_rows)


def test_given_rows_draw_no_rows_and_leave_other_plates_alone():
    def model(x):
        with pyro.plate("data", 10 ** 9, subsample_size=len(x)) as rows:
            pass
        with pyro.plate("other", 50, subsample_size=3) as others:
            return rows, others
    for given in (GivenRows("data"), GivenRows(batch_size=4)):
        rows, others = given(model)(torch.zeros(4))
        assert rows.tolist() == [0, 1, 2, 3]
    assert not torch.equal(others, GivenRows("data")(model)(torch.zeros(4))[1])


def test_arrays_are_read_only_where_they_are_needed():
    read = []
    loader = ArrayLoader(np.arange(1000.0), batch_size=10)
    gather = loader.gather
    loader.gather = lambda rows: read.append(len(rows)) or gather(rows)
    feed = feed_of(loader, rank=1, size=5)
    feed.take(3)
    feed.take(2)
    wait_for_threads()
    assert sum(read) <= (1 + 3 + 3 + 3) * 2
