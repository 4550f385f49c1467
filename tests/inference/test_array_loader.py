"""ArrayLoader: rows of arrays and mapped files, batch by batch, each as often as any other."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_nfvi import AutoFlow, planar
from pyro_nfvi.inference.array_loader import ArrayLoader, RowOrder

ORDERS = {"permutation": {}, "blocks": {"block_size": 3, "buffer_size": 9},
          "one-buffer": {"block_size": 4, "buffer_size": 100}}
every_order = pytest.mark.parametrize("options", ORDERS.values(), ids=ORDERS)


# ------------------------------------------------------------------ the order

@every_order
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_has_every_row_once(options, shuffle):
    order = RowOrder(20, 1, shuffle, **options)
    rows = order(0, 100).view(5, 20)
    assert (rows.sort(1).values == torch.arange(20)).all()
    assert (len({tuple(row.tolist()) for row in rows}) == 5) == shuffle


@every_order
def test_every_row_is_equally_likely_at_each_place(options):
    count = 2000
    rows = RowOrder(10, 1, **options)(0, 10 * count).view(count, 10).long()
    seen = torch.stack([torch.bincount(column, minlength=10) for column in rows.T])
    z = (seen - count / 10) / (count * 0.1 * 0.9) ** 0.5
    assert z.abs().max() < 4.5  # 100 places


@every_order
def test_what_was_asked_before_changes_nothing(options):
    whole = RowOrder(11, 3, **options)(0, 70)
    order = RowOrder(11, 3, **options)
    for start, stop in [(60, 70), (0, 7), (33, 44), (5, 50), (7, 7), (10, 12)]:
        assert torch.equal(order(start, stop), whole[start:stop])


def test_blocks_stay_together_until_they_are_mixed():
    rows = set(RowOrder(1000, 0, block_size=10, buffer_size=50)(0, 50).tolist())
    starts = [row for row in rows if (row - 1) % 1000 not in rows]
    assert len(starts) <= 5


# ------------------------------------------------------------------ what it gives

def test_it_gives_what_a_data_loader_of_the_arrays_gives():
    x, y = torch.randn(10, 3), torch.arange(10)
    loader = ArrayLoader(x, y.numpy(), batch_size=4, shuffle=False)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), x, rtol=0, atol=0)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), y)
    assert [len(x) for x, in ArrayLoader(x, batch_size=20)] == [10]


def test_epochs_are_shuffled_by_torch_s_random_state():
    loader = ArrayLoader(torch.arange(50), batch_size=8)
    torch.manual_seed(3)
    first, second = (torch.cat([batch for batch, in loader]) for _ in range(2))
    torch.manual_seed(3)
    again = torch.cat([batch for batch, in loader])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(50))


def test_it_serves_a_plain_loop_of_svi():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 200, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
    guide = AutoFlow(model, planar, num_layers=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    loader = ArrayLoader(np.full(200, 2.0, np.float32), batch_size=60)
    for _ in range(25):
        for x, in loader:
            svi.step(x)
    assert abs(guide.median(torch.zeros(60))["mu"].item() - 2.0) < 0.4


@pytest.mark.parametrize("array", [
    np.arange(24.0).reshape(8, 3),
    np.arange(24.0, dtype=">f4").reshape(8, 3),
    np.arange(48.0).reshape(8, 6)[:, ::2],
    np.arange(24.0).reshape(8, 3)[::-1, ::-1],
    np.asfortranarray(np.arange(24.0).reshape(8, 3)),
    np.arange(24, dtype=np.int32).reshape(8, 3),
    np.arange(24, dtype=">i8").reshape(8, 3),
    np.arange(24, dtype=np.uint8).reshape(8, 3),
    np.arange(24, dtype=np.uint16).reshape(8, 3),
    np.arange(24, dtype=np.uint32).reshape(8, 3),
    np.arange(24, dtype=np.float16).reshape(8, 3),
    np.arange(24).reshape(8, 3) > 11,
    np.ma.masked_array(np.arange(24.0).reshape(8, 3)),
    torch.arange(24.0).reshape(3, 8).T,
    torch.arange(24.0, requires_grad=True).reshape(8, 3),
    torch.arange(24.0, dtype=torch.bfloat16).reshape(8, 3),
], ids=["float64", "big-endian", "gaps", "backwards", "fortran", "int32", "big-endian-int", "uint8",
        "uint16", "uint32", "float16", "bool", "nothing-masked", "transposed", "requires-grad",
        "bfloat16"])
def test_arrays_of_every_kind_give_their_rows(array):
    expected = array.detach().double() if isinstance(array, torch.Tensor) else \
        torch.from_numpy(array.astype(np.float64))
    for shuffle in (True, False):
        loader = ArrayLoader(array, np.arange(8), batch_size=3, shuffle=shuffle)
        for x, rows in loader:
            assert not x.requires_grad
            assert torch.equal(x.double(), expected[rows])
            x.fill_(1)
    again = array.detach().double() if isinstance(array, torch.Tensor) else \
        torch.from_numpy(array.astype(np.float64))
    assert torch.equal(again, expected)  # batches are copies: what is done to them stays there


@pytest.mark.parametrize(("arrays", "options", "words"), [
    ((), {}, "one array or more"),
    (([1.0, 2.0],), {}, r"`arrays\[0\]` to be a tensor or a NumPy array, got list"),
    ((np.ones(3), np.ones(4)), {}, r"`arrays\[1\]` to have as many rows as `arrays\[0\]`, 3, got"),
    ((np.ones((0, 2)),), {}, "one row or more"),
    ((np.array(1.0),), {}, "a single number"),
    ((np.array(["a", "b"]),), {}, "numbers of a type that torch computes with, got <U1"),
    ((np.ones(3, np.uint64),), {}, "got uint64"),
    ((np.ones(3, np.longdouble),), {}, "got"),
    ((np.ones(3, "O"),), {}, "got object"),
    ((np.ma.masked_greater(np.arange(5.0), 2),), {},
     r"`arrays\[0\]` without a mask, got 2 masked numbers. Fill them with .filled\(0.0\), "),
    ((torch.ones(3, 3).to_sparse(),), {}, "a dense tensor"),
    ((np.ones(3),), {"batch_size": 0}, "`batch_size` to be an integer >= 1"),
    ((np.ones(3),), {"batch_size": 2.0}, "`batch_size` to be an integer >= 1"),
    ((np.ones(3),), {"shuffle": 1}, "`shuffle` to be True or False"),
    ((np.ones(3),), {"block_size": 0}, "`block_size` to be an integer >= 1"),
], ids=str)
def test_a_wrong_argument_is_named(arrays, options, words):
    with pytest.raises(ValueError, match=words):
        ArrayLoader(*arrays, **{"batch_size": 2, **options})


# ------------------------------------------------------------------ files

def test_a_read_only_mapped_file_is_read_without_a_word(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(30.0).reshape(10, 3))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = ArrayLoader(x, batch_size=4, shuffle=False)
        batches = [batch for batch, in loader]
        batches[0].zero_()  # a copy
    assert torch.equal(torch.cat(batches[1:]).flatten(), torch.arange(12.0, 30).double())
    assert x[0, 1] == 1.0
    assert loader.block_size == 1


def test_files_larger_than_half_the_memory_are_read_in_blocks(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((1000, 4)))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("pyro_nfvi.inference.array_loader._physical_memory", lambda: 40_000.0)
    assert ArrayLoader(x[1:], batch_size=4).block_size == 2 ** 17 // 32
    assert ArrayLoader(x, batch_size=4, block_size=1).block_size == 1
    assert ArrayLoader(np.array(x), batch_size=4).block_size == 1


SCRIPT = """
import resource, sys
import numpy as np, torch
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.loader import LoaderFeed
x = np.memmap(sys.argv[1], np.float32, "r", shape=(50_000_000, 10))  # 2 GB, a hole on the disk
used = int(next(line for line in open("/proc/self/status") if "VmData" in line).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 1_000_000_000,) * 2)
try:
    np.array(x)
    print("the limit does not hold")
except MemoryError:
    feed = LoaderFeed(ArrayLoader(x, batch_size=256, block_size=3276), dtype=torch.float64)
    print(sum(feed.take(20)[0].abs().sum().item() for _ in range(5)), len(next(feed.passes())[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory as Linux has")
def test_a_file_larger_than_the_memory_is_not_loaded_whole(tmp_path):
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(2_000_000_000)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "x.bin")], check=False,
                          capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["0.0", "256"], done.stderr
