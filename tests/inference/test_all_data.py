"""AllData: the log joint of all rows, summed over batches."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_nfvi.inference.all_data as all_data_module
from pyro_nfvi import AutoFlow, planar
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import LogJoint, importance_sample
from pyro_nfvi.inference.all_data import AllData
from pyro_nfvi.inference.array_loader import ArrayLoader
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.score import Score

DOUBLE = torch.float64
N = 1003
generator = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, dtype=DOUBLE, generator=generator)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE) + torch.randn(
    N, dtype=DOUBLE, generator=generator)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def with_condition(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = 1.0 if w[0] > 0 else 2.0
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def with_options(prior, *, x, y, noise):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), prior).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def layout_of(model, *args, dtype=DOUBLE, **kwargs):
    with default_dtype(dtype):
        trace = prune_subsample_sites(pyro.poutine.trace(model).get_trace(*args, **kwargs))
    return LatentLayout.from_trace(trace)


def all_data_of(model, loader, args=(), dtype=DOUBLE, **kwargs):
    feed = LoaderFeed(loader, dtype=dtype)
    given, named = feed.arguments(args, kwargs)
    layout = layout_of(model, *given, dtype=dtype, **named)
    return AllData(model, args, kwargs, layout, feed, dtype)


def whole_of(model, *args, **kwargs):
    return LogJoint(model, args, kwargs, layout_of(model, *args, **kwargs), DOUBLE)


LOADERS = {"arrays": lambda: ArrayLoader(X, Y, batch_size=100),
           "data-loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=100, shuffle=True,
                                             drop_last=True)}
every_loader = pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)


@pytest.fixture(params=["compiled", "plain"])
def _small(request, monkeypatch):
    """Many small batches and chunks, compiled or not."""
    monkeypatch.setattr(all_data_module, "MOST_ROWS", 64)
    monkeypatch.setattr(all_data_module, "MOST_POINTS", 4)
    monkeypatch.setattr(all_data_module, "FEW_CALLS", 20 if request.param == "compiled" else 1e9)


@every_loader
@pytest.mark.usefixtures("_small")
def test_it_equals_the_log_joint_of_all_rows(make):
    every = all_data_of(regression, make())
    z = torch.randn(2, 5, 4, dtype=DOUBLE)
    torch.testing.assert_close(every(z), whole_of(regression, X, Y)(z), rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("_small")
def test_its_gradient_is_that_of_all_rows():
    every, whole = (all_data_of(regression, LOADERS["arrays"]()), whole_of(regression, X, Y))
    z = torch.randn(6, 4, dtype=DOUBLE)
    score, expected = Score(every)(z), Score(whole)(z)
    torch.testing.assert_close(score, expected, rtol=1e-11, atol=1e-8)
    at = z.clone().requires_grad_()
    gradient, = torch.autograd.grad((every(at) * torch.arange(6)).sum(), at)
    torch.testing.assert_close(gradient, expected[1] * torch.arange(6).unsqueeze(-1), rtol=1e-11,
                               atol=1e-8)


@pytest.mark.parametrize("count", [1, 257])
def test_any_number_of_latents_will_do(count):
    every = all_data_of(regression, LOADERS["arrays"]())
    z = torch.randn(count, 4, dtype=DOUBLE)
    torch.testing.assert_close(every(z), whole_of(regression, X, Y)(z), rtol=1e-12, atol=1e-9)
    assert every(torch.zeros(4, dtype=DOUBLE)).shape == ()
    assert every(torch.zeros(2, 0, 4, dtype=DOUBLE)).shape == (2, 0)


def test_sums_are_in_double_precision_whatever_the_fit_is_in():
    every = all_data_of(regression, LOADERS["arrays"](), dtype=torch.float32)
    z = torch.randn(3, 4) * 0.1
    got = every(z)
    assert got.dtype == DOUBLE
    torch.testing.assert_close(got, whole_of(regression, X, Y)(z.double()), rtol=1e-6, atol=0.0)


def test_named_batches_and_other_arguments_reach_the_model():
    batches = [{"x": x, "y": y} for x, y in zip(X.split(100), Y.split(100), strict=True)]
    every = all_data_of(with_options, batches, (2.0,), noise=0.7)
    z = torch.randn(3, 3, dtype=DOUBLE)
    expected = whole_of(with_options, 2.0, x=X, y=Y, noise=0.7)(z)
    torch.testing.assert_close(every(z), expected, rtol=1e-12, atol=1e-9)


def test_a_model_that_cannot_be_batched_runs_point_by_point():
    every = all_data_of(with_condition, LOADERS["arrays"]())
    z = torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]], dtype=DOUBLE)
    every.try_batched(z)
    assert not every.batched
    whole = whole_of(with_condition, X, Y)
    whole.batched = False
    torch.testing.assert_close(every(z), whole(z), rtol=1e-12, atol=1e-9)


def test_each_row_is_read_once_a_call():
    loader, read = LOADERS["arrays"](), []
    every = all_data_of(regression, loader)
    between = loader.between
    loader.between = lambda start, stop: read.extend(range(start, stop)) or between(start, stop)
    every(torch.randn(600, 4, dtype=DOUBLE))
    assert read == list(range(N))


def test_it_weighs_the_draws_of_a_guide_as_the_log_joint_of_all_rows_does():
    with default_dtype(DOUBLE):
        guide = AutoFlow(regression, planar, num_layers=1).setup(X, Y).double()
    flow, every = guide._flow(), all_data_of(regression, LOADERS["arrays"]())
    samples = []
    for log_joint in (every, whole_of(regression, X, Y)):
        torch.manual_seed(0)
        samples.append(importance_sample(flow, log_joint, 500))
    assert samples[0].pareto_k == pytest.approx(samples[1].pareto_k, abs=1e-6)
    torch.testing.assert_close(samples[0].log_p, samples[1].log_p, rtol=1e-11, atol=1e-8)


def test_what_else_a_log_joint_tells_is_that_of_the_first_batch():
    every = all_data_of(regression, LOADERS["arrays"]())
    z = torch.zeros(4, dtype=DOUBLE)
    with every.surroundings():
        assert every.trace(z).nodes["y"]["value"].shape == (100,)
    assert every.parameters(z) == {}
    assert every.first_bad_site(torch.tensor([0.0, 0.0, 0.0, torch.nan],
                                             dtype=DOUBLE)).startswith("'scale'")


def test_memory_is_bounded_by_the_tensors_a_model_makes():
    def wide(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        hidden = torch.tanh((x @ w).unsqueeze(-1) * torch.linspace(-1, 1, 500, dtype=x.dtype))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(hidden.sum(-1), 1.0), obs=y)
    every = all_data_of(wide, LOADERS["arrays"]())
    rows = every._rows_at_once(torch.randn(256, 3, dtype=DOUBLE))
    assert all_data_module.MOST_NUMBERS / 4 < rows * 256 * 500 <= all_data_module.MOST_NUMBERS
    assert every._rows_at_once(torch.randn(1, 3, dtype=DOUBLE)) == pytest.approx(
        all_data_module.MOST_NUMBERS / 500, rel=0.5)


# ------------------------------------------------------------------ what is wrong

def test_a_loader_that_has_other_rows_than_the_model_says_is_refused():
    batches = list(zip(X[:900].split(100), Y[:900].split(100), strict=True))
    with pytest.raises(ValueError, match="to give all 1003 rows once, as the model says, got 900"):
        all_data_of(regression, batches)(torch.zeros(2, 4, dtype=DOUBLE))
    with pytest.raises(ValueError, match="to give all 1003 rows once, as the model says, got more"):
        all_data_of(regression, batches * 2)(torch.zeros(2, 4, dtype=DOUBLE))


class Endless(IterableDataset):
    """Rows without an end."""

    def __iter__(self):
        while True:
            yield X[0], Y[0]


def test_rows_without_an_end_are_refused_as_soon_as_they_are_too_many():
    every = all_data_of(regression, DataLoader(Endless(), batch_size=100))
    with pytest.raises(ValueError, match="all 1003 rows once, .* got more. Its workers must share"):
        every(torch.zeros(2, 4, dtype=DOUBLE))


# ------------------------------------------------------------------ a second likelihood

def and_another(observe, *, num_rows=N):
    """A mean that some rows tell about, and others as ``observe`` says."""
    def model(x, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", num_rows, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])
        observe(dist.Normal(mean, 1.0), y)
    return model


def in_a_plate(*sizes, **options):
    def observe(normal, y):
        with pyro.plate("more", *(size or len(y) for size in sizes),
                        **{name: len(y) for name in options}):
            pyro.sample("v", normal, obs=y)
    return observe


def in_no_plate(normal, y):
    pyro.sample("v", normal.expand([len(y)]).to_event(1), obs=y)


def as_a_factor(normal, y):
    pyro.factor("v", normal.log_prob(y).sum())


def by_its_mean(normal, y):
    pyro.sample("v", dist.Normal(normal.loc, len(y) ** -0.5), obs=y.mean())


def one_by_one(normal, y):
    for i in range(len(y)):
        pyro.sample(f"v{i}", normal, obs=y[i])


def summed_in_the_plate(normal, y):
    with pyro.plate("rows", N, subsample_size=len(y)):
        as_a_factor(normal, y)


def scaled_by_hand(normal, y):
    with poutine.scale(scale=N / len(y)):
        in_no_plate(normal, y)


def scaled_factor(normal, y):
    pyro.factor("v", N / len(y) * normal.log_prob(y).sum())


def one_by_one_in_a_plate(normal, y):
    for i, _ in enumerate(pyro.plate("more", N, subsample_size=len(y))):
        pyro.sample(f"v{i}", normal, obs=y[i])


def of_no_batch(normal, y):
    pyro.sample("v", normal, obs=torch.tensor(3.0))
    with pyro.plate("known", 77, subsample_size=4) as chosen:
        pyro.sample("w", normal, obs=torch.linspace(-1.0, 1.0, 77)[chosen])


@pytest.mark.parametrize("batch_size", [1, 2, 7, N])
@pytest.mark.parametrize("observe", [
    in_a_plate(None), in_a_plate(2 * N, subsample_size=None), in_no_plate, as_a_factor,
    by_its_mean, one_by_one, summed_in_the_plate,
], ids=["plate", "other-total", "none", "factor", "mean", "one-by-one", "sum"])
def test_a_second_likelihood_that_is_not_scaled_is_refused(observe, batch_size):
    with pytest.raises(ValueError, match=(
            rf"^NFVI expected the model to scale its likelihood from a batch of {batch_size} rows "
            r"to all 1003 rows, found site 'v\d*' that is not. Write: with pyro.plate\('data', "
            r"1003, subsample_size=len\(x\)\): around it, row by row.$")):
        all_data_of(and_another(observe), ArrayLoader(X, Y, batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [1, 2, 7, N])
@pytest.mark.parametrize("observe", [
    in_a_plate(N, subsample_size=None), scaled_by_hand, scaled_factor, one_by_one_in_a_plate,
    of_no_batch,
], ids=["plate", "by-hand", "factor", "one-by-one", "of-no-batch"])
def test_a_second_likelihood_that_is_scaled_or_of_no_batch_passes(observe, batch_size):
    every = all_data_of(and_another(observe), ArrayLoader(X, Y, batch_size=batch_size))
    assert (every.num_rows, every.whole) == (N, False)


def test_a_single_row_is_all_of_them():
    model = and_another(in_a_plate(1, subsample_size=None), num_rows=1)
    assert all_data_of(model, ArrayLoader(X[:1], Y[:1], batch_size=1)).whole


def test_a_plate_that_does_not_follow_the_batch_is_refused():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=100):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    with pytest.raises(ValueError, match=r"pyro.plate\('data', 1003, subsample_size=len\(x\)\)"):
        all_data_of(model, LOADERS["arrays"]())


def test_one_batch_of_all_rows_needs_no_scale():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    every = all_data_of(model, ArrayLoader(X, Y, batch_size=5000))
    z = torch.randn(3, 3, dtype=DOUBLE)
    torch.testing.assert_close(every(z), whole_of(model, X, Y)(z), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("subsample_size", [None, N])
def test_one_batch_of_a_list_is_seen_to_be_all_rows(subsample_size):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=subsample_size and len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    every = all_data_of(model, [(X, Y)])
    z = torch.randn(3, 3, dtype=DOUBLE)
    torch.testing.assert_close(every(z), whole_of(model, X, Y)(z), rtol=1e-12, atol=1e-9)
    with pytest.raises(ValueError, match="batch of 1003 rows to all 1003 rows, found plate 'data', "
                                         "of 1003 of 2000 rows"):
        all_data_of(and_another(of_no_batch, num_rows=2000), [(X, Y)])


def test_one_batch_of_all_rows_needs_a_scale_if_processes_share_it():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    feed = LoaderFeed(ArrayLoader(Y[:1000], batch_size=1000), dtype=DOUBLE, size=2)
    with pytest.raises(ValueError, match=r"pyro.plate\('data', 1000, subsample_size=len\(x\)\)"):
        AllData(model, (), {}, layout_of(model, Y), feed, DOUBLE)


def test_a_latent_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"AllData expected `z` of shape \(\*batch, 4\), got"):
        all_data_of(regression, LOADERS["arrays"]())(torch.zeros(2, 3, dtype=DOUBLE))
