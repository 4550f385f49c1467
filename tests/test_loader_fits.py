"""Fits to minibatches of a loader find the posterior of all rows, which is known here."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_nfvi import NFVI, Posterior
from pyro_nfvi.inference.array_loader import ArrayLoader
from tests.fits import guide_of, never_satisfied

ROWS, NOISE, DRAWS = 600, 0.7, 10_000
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + NOISE * torch.randn(
    ROWS, generator=GENERATOR, dtype=torch.float64)
GROUPS = torch.arange(ROWS) % 3


@pytest.fixture(autouse=True)
def _no_windows():
    mpl.use("Agg")


def regression(x, y, noise=NOISE):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def in_front(noise, scale, x, y):
    """Arguments that are no rows come before those of the batch."""
    regression(x, y / scale, noise)


def by_group(group, y):
    """Integer columns choose a coefficient."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(w[group], NOISE), obs=y)


def learned_noise(x, y):
    noise = pyro.param("noise", lambda: torch.tensor(1.5), constraint=constraints.positive)
    regression(x, y, noise)


def dicts():
    return [{"y": y, "x": x} for x, y in zip(X.split(64), Y.split(64), strict=True)]


def memory_map(folder):
    """Single precision in files, of which the rows are read."""
    maps = []
    for name, values in (("x", X), ("y", Y)):
        np.save(folder / f"{name}.npy", values.float().numpy())
        maps.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
    return ArrayLoader(*maps, batch_size=50)


def data_loader():
    return DataLoader(TensorDataset(X, Y), batch_size=50, shuffle=True)


CASES = {
    "array-loader": (regression, lambda _: ((), {"loader": ArrayLoader(X, Y, batch_size=50)})),
    "data-loader": (regression, lambda _: ((), {"loader": data_loader()})),
    "dicts": (regression, lambda _: ((), {"loader": dicts(), "noise": NOISE})),
    "arguments": (in_front, lambda _: ((NOISE, 2.0), {"loader": ArrayLoader(
        X, 2 * Y, batch_size=50)})),
    "integers": (by_group, lambda _: ((), {"loader": ArrayLoader(GROUPS.int(), Y,
                                                                 batch_size=50)})),
    "memory-map": (regression, lambda folder: ((), {"loader": memory_map(folder)})),
}


def exact(case):
    """Mean and standard deviations of the posterior."""
    x = torch.eye(3, dtype=torch.float64)[GROUPS] if case == "integers" else X
    covariance = torch.linalg.inv(torch.eye(3) + x.T @ x / NOISE ** 2)
    return covariance @ (x.T @ Y) / NOISE ** 2, covariance.diagonal().sqrt()


def check_posterior(posterior, case):
    """Means within four standard errors, standard deviations within five per cent."""
    mean, sd = exact(case)
    draws = posterior.resample(DRAWS)["w"].double()
    assert draws.shape == (DRAWS, 3)
    error = sd / math.sqrt(min(DRAWS, posterior.ess))
    assert ((draws.mean(0) - mean).abs() < 4 * math.sqrt(2) * error).all()  # drawn, then resampled
    assert (draws.std(0) / sd - 1).abs().max() < 0.05
    assert posterior.pareto_k < 0.5


@pytest.mark.parametrize("case", CASES)
def test_the_gaussian_is_that_of_all_rows(tmp_path, case):
    model, make = CASES[case]
    args, kwargs = make(tmp_path)
    posterior = NFVI(model, seed=0, progress=False).run(*args, **kwargs)
    assert [stage.name for stage in posterior.history.stages] == ["Gaussian"]
    check_posterior(posterior, case)


@pytest.mark.parametrize("case", ["array-loader", pytest.param("data-loader",
                                                               marks=pytest.mark.slow)])
def test_a_flow_trained_on_minibatches_finds_the_posterior_of_all_rows(monkeypatch, tmp_path, case):
    never_satisfied(monkeypatch)
    model, make = CASES[case]
    args, kwargs = make(tmp_path)
    posterior = NFVI(model, guide_of(model), num_steps=150, num_particles=32, seed=0,
                     progress=False).run(*args, **kwargs)
    assert len(posterior.history.elbo) == 300
    check_posterior(posterior, case)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32,
                                                               marks=pytest.mark.slow)])
def test_a_parameter_of_the_model_is_learned_from_minibatches(dtype):
    loader = ArrayLoader(X, Y, batch_size=100)
    NFVI(learned_noise, guide_of(learned_noise), num_steps=300, num_particles=16, seed=0,
         dtype=dtype, progress=False).run(loader=loader)
    mean, _ = exact("array-loader")
    best = (Y - X @ mean).square().mean().sqrt().item()  # to the order 1 / ROWS
    assert abs(pyro.param("noise").item() - best) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32])
def test_single_precision_may_be_asked_for(dtype):
    posterior = NFVI(regression, seed=0, dtype=dtype, progress=False).run(
        loader=ArrayLoader(X, Y, batch_size=50))
    assert posterior.resample(5)["w"].dtype is dtype
    check_posterior(posterior, "array-loader")


# ---------------------------------------------------------------------- what is asked of it

@pytest.fixture(scope="module")
def fitted():
    pyro.clear_param_store()
    return NFVI(regression, seed=0, progress=False).run(loader=ArrayLoader(X, Y, batch_size=50))


def test_a_summary_is_that_of_all_rows(fitted):
    summary = str(fitted.summary())
    assert "w[2]" in summary
    assert "Verdict: good" in summary
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(ROWS, dtype=torch.float64),
        NOISE ** 2 * torch.eye(ROWS, dtype=torch.float64) + X @ X.T).log_prob(Y)
    assert abs(fitted.elbo[0] - evidence) < 0.01


def test_a_diagnosis_says_which_checks_would_read_the_rows_too_often(fitted):
    report = str(fitted.diagnose())
    assert "chains would read all rows of the loader again and again" in report
    assert "Verdict: good" in report


def test_arviz_gets_the_posterior_and_is_told_what_is_left_out(fitted):
    with pytest.warns(UserWarning, match="to_arviz leaves out posterior_predictive"):
        data = fitted.to_arviz()
    assert data["posterior"]["w"].shape[-1] == 3


def test_a_file_gives_the_same_posterior_back_with_its_loader(fitted, tmp_path):
    fitted.save(tmp_path / "fit.pt")
    loaded = Posterior.load(tmp_path / "fit.pt", regression,
                            loader=ArrayLoader(X, Y, batch_size=20))
    for name, value in fitted.guide.state_dict().items():
        assert torch.equal(loaded.guide.state_dict()[name], value)
    check_posterior(loaded, "array-loader")
    z = fitted.draws.z[:5]
    torch.testing.assert_close(loaded.log_joint(z), fitted.log_joint(z))
    with pytest.raises(ValueError, match="expected `loader` with the 600 rows that were fitted"):
        Posterior.load(tmp_path / "fit.pt", regression)


@pytest.mark.parametrize("picture", ["elbo", "weights", "pareto_k", "marginals", "pairs"])
def test_pictures_need_no_rows(fitted, picture):
    assert getattr(fitted, f"plot_{picture}")() is not None
    mpl.pyplot.close("all")


def test_chains_and_predictions_that_need_all_rows_at_once_say_so(fitted):
    with pytest.raises(ValueError, match="subsample"):
        fitted.neutra()
    with pytest.raises(ValueError, match="a fit by a loader does not hold. For rows of"):
        fitted.plot_predictive()


def test_predictions_are_for_rows_of_ones_choice(fitted):
    values = fitted.predict(torch.randn(4, 3), torch.zeros(4))  # zeros: their number
    assert values["y"].shape == (1000, 4)


def test_a_model_that_is_not_scaled_to_all_rows_is_refused_with_the_way_out():
    def unscaled(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)
    with pytest.raises(ValueError, match=r"subsample_size=len\(x\)"):
        NFVI(unscaled, progress=False).run(loader=ArrayLoader(X, Y, batch_size=50))
