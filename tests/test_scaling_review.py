"""What a user of large data meets in the first hour: data that are not clean, sorted, or skewed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_nfvi.inference.problem as problem
from pyro_nfvi import NFVI, ArrayLoader, AutoFlow
from pyro_nfvi.flows import FixedLinear, Flow, Gaussian, auto
from pyro_nfvi.inference.all_data import AllData
from pyro_nfvi.inference.batch_stream import BatchStream, sampled_rows
from pyro_nfvi.inference.centring import centred
from pyro_nfvi.inference.identity import identity
from pyro_nfvi.inference.importance import scored
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.problem import Setup
from pyro_nfvi.inference.score import Score
from pyro_nfvi.inference.team import Alone

N, BATCH = 600, 50
LATE = 450  # a row that is not in the first batch of a loader that does not shuffle


def rows(num_rows=N):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 2, generator=generator)
    y = torch.rand(num_rows, generator=generator) < torch.sigmoid(x @ torch.tensor([1.0, -0.5]))
    return x, y.float()


def logistic(x, y, num_rows=N):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", num_rows, subsample_size=len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def fit(model, loader, **options):
    return NFVI(model, num_steps=50, num_particles=16, seed=0, progress=False, **options).run(
        loader=loader)


def in_order(*tensors):
    return ArrayLoader(*tensors, batch_size=BATCH, shuffle=False)


def without_subsample_size(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", N):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def with_rows_of_its_own(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", N, subsample_size=10) as chosen:
        pyro.sample("y", dist.Bernoulli(logits=x[chosen] @ w), obs=y[chosen])


def with_too_few_rows(x, y):
    logistic(x, y, num_rows=BATCH - 1)


@pytest.mark.parametrize("model", [without_subsample_size, with_rows_of_its_own,
                                   with_too_few_rows])
def test_a_plate_that_does_not_fit_the_batch_is_told_how_to_be_written(model):
    with pytest.raises(ValueError, match=r"^NFVI expected the model to take a batch of 50 rows, "
                                         r"got an error: .*subsample_size=len\(x\)\)") as caught:
        fit(model, in_order(*rows()))
    assert "\n" not in str(caught.value)


BAD = {"a missing observation": (1, torch.nan, "site 'y' to be observed with numbers, got 1 NaN"),
       "an impossible one": (1, 2.0, "site 'y' to be observed within the support .* got 1 outside"),
       "a missing covariate": (0, torch.nan, "rows of `loader` to have a log density, got NaN at "
                                             "site 'y'")}


def of_all(model, loader):
    """The log joint of all rows of a loader; its latents are those of the logistic model."""
    layout = _setup(logistic, in_order(*rows())).guide.layout
    return AllData(model, (), {}, layout, LoaderFeed(loader, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("what", BAD)
def test_bad_rows_after_the_first_batch_are_found_when_all_are_read(what):
    data = rows()
    column, value, words = BAD[what]
    data[column][LATE] = value
    with pytest.raises(ValueError, match=f"^NFVI expected {words}"):
        of_all(logistic, in_order(*data))(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("what", ["a missing observation", "an impossible one"])
def test_bad_rows_that_a_fit_starts_from_are_found_before_it_starts(what):
    data = rows()
    column, value, words = BAD[what]
    data[column][LATE] = value
    with pytest.raises(ValueError, match=f"^NFVI expected {words}"):
        _setup(logistic, in_order(*data))


def _setup(model, loader):
    guide = AutoFlow(model, auto)
    return Setup(model, guide, torch.float64, None, 4, False, Alone())((), {}, loader)


def test_a_fit_of_no_finite_start_names_the_site_that_is_bad():
    x, y = rows(problem.START_ROWS)
    x[LATE] = torch.nan

    def model(x, y):
        logistic(x, y, num_rows=problem.START_ROWS)
    with pytest.raises(ValueError, match="not finite at any of 12 starts; first bad site 'y'"):
        fit(model, in_order(x, y))


def as_dict(**more):
    x, y = rows()
    return [{"x": x, "y": y, **more}]


def of_pairs(batch):
    logistic(*batch)


def of_dicts(batch):
    logistic(**batch)


@pytest.mark.parametrize(("model", "loader", "args", "kwargs", "words"), [
    (of_pairs, in_order(*rows()), (), {}, r"\(batch\): too many positional arguments. A batch of "
     r"`loader` gives 2 of them; take it whole: NFVI\(lambda \*batch: model\(batch\)\)."),
    (of_dicts, as_dict(), (), {}, r"\(batch\): missing a required argument: 'batch'. A batch of "
     r"`loader` gives 'x', 'y'; take it whole: NFVI\(lambda \*\*batch: model\(batch\)\)."),
    (logistic, in_order(*rows()), rows(), {}, r"\(x, y, num_rows=600\): too many positional "
     "arguments. A batch of `loader` gives 2 of them, the call 2 more."),
    (logistic, in_order(*rows()), (), {"noise": 1.0}, ".*'noise'. A batch of `loader` gives 2 of "
     "them, the call 1 more."),
    (logistic, as_dict(id=torch.arange(N)), (), {}, ".* argument 'id'. A batch of `loader` gives "
     "'x', 'y', 'id'."),
    (logistic, rows(), (), {}, ".*'y'. A batch of `loader` gives 1 of them."),
], ids=["batch", "dict", "rows-twice", "keyword", "key", "no-batches"])
def test_arguments_that_do_not_fit_the_model_are_told_with_those_of_the_batch(
        model, loader, args, kwargs, words):
    with pytest.raises(ValueError, match=f"^NFVI expected the arguments of the model, {words}$"):
        NFVI(model, progress=False).run(*args, loader=loader, **kwargs)


@pytest.mark.parametrize(("model", "loader"), [
    (lambda *batch: of_pairs(batch), in_order(*rows())),
    (lambda **batch: of_dicts(batch), as_dict())], ids=["pairs", "dicts"])
def test_a_model_takes_a_batch_whole_as_it_is_told(model, loader):
    assert _setup(model, loader).all_data.num_rows == N


@pytest.mark.parametrize(("limit", "expected"), [(2400, 100), (2399, 99), (10, BATCH), (1e9, N)])
def test_wide_rows_to_start_from_are_bounded_by_their_memory(monkeypatch, limit, expected):
    monkeypatch.setattr(problem, "START_BYTES", limit)
    start = _setup(logistic, in_order(*rows())).start  # rows of three doubles
    assert [len(part) for part in start.args] == [expected] * 2


def test_workers_that_all_give_the_same_rows_are_told_to_share_them():
    class Unshared(IterableDataset):
        def __iter__(self):
            return iter(zip(*rows(), strict=True))
    with pytest.raises(ValueError, match="to give all 600 rows once, as the model says, got more. "
                                         "Its workers must share the rows"):
        _setup(logistic, DataLoader(Unshared(), batch_size=BATCH, num_workers=2))


class Counted(Dataset):
    """Rows that count how often they are read."""

    def __init__(self, *tensors):
        self.tensors, self.num_read = tensors, 0

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        self.num_read += 1
        return tuple(tensor[index] for tensor in self.tensors)


def test_draws_are_weighted_in_one_pass_over_the_rows():
    dataset = Counted(*rows())
    all_data = of_all(logistic, DataLoader(dataset, batch_size=BATCH, shuffle=True))
    before = dataset.num_read
    assert scored(all_data, torch.zeros(3000, 2, dtype=torch.float64)).isfinite().all()
    assert dataset.num_read - before == N


def test_sorted_batches_start_from_rows_of_all_of_them():
    x = torch.arange(1000.0)
    stream = BatchStream(list(x.split(50)), lambda rows: rows, 0, 1, seed=0)
    some, = stream.some(200)
    assert len(some.unique()) == 200
    error = x.std() * (1 / 200 - 1 / 1000) ** 0.5
    assert abs(some.mean() - x.mean()) < 4 * error
    assert torch.equal(stream.some(200)[0], some)
    assert len(stream.some(5000)[0]) == 1000


def test_each_row_is_as_likely_to_be_sampled_as_another():
    random, counts = torch.Generator().manual_seed(0), torch.zeros(40)
    for _ in range(1000):
        chosen, = sampled_rows(([part] for part in torch.arange(40).split(7)), 10, random)
        counts[chosen] += 1
    assert float(((counts - 250) ** 2 / (250 * 0.75)).sum()) < 80  # chi2 of 39, p = 1e-4


def test_a_mean_that_is_no_mode_keeps_its_distance_when_it_moves_to_where_all_rows_want_it():
    y = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)

    def normal(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)
    all_data = of_all(normal, in_order(y))
    some = LogJoint(all_data.model, (y[100:200],), {}, all_data.layout, torch.float64)
    covariance = torch.linalg.inv((torch.eye(2) + N * torch.ones(2, 2)).double())
    mean, some_mean = (covariance @ torch.ones(2).double() * N * part.mean()
                       for part in (y, y[100:200]))
    offset = torch.tensor([0.3, -0.1], dtype=torch.float64)
    flow = Flow(FixedLinear(some_mean + offset, torch.linalg.cholesky(covariance)),
                Gaussian(2).double())
    moved = centred(flow, all_data, Score(some)).bijection.shift
    torch.testing.assert_close(moved, mean + offset, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loader", [
    in_order, lambda *tensors: DataLoader(TensorDataset(*tensors), batch_size=BATCH)])
def test_data_that_change_after_the_first_batch_are_other_data(loader):
    def density(y):
        return identity(_setup(logistic, loader(x, y)))["the densities of the sites"]["y"]
    x, y = rows()
    late = y.clone()
    late[LATE:] = 1 - late[LATE:]
    assert torch.equal(density(y), density(y))
    assert not torch.allclose(density(y), density(late), rtol=1e-3)
