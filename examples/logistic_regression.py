"""Bayesian logistic regression on the breast-cancer data of scikit-learn.

569 biopsies, 30 measurements: which are malignant? The predictors are collinear, so the
posterior is a thin tilted ridge, which a mean-field guide cannot follow.

    python examples/logistic_regression.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from pyro_nfvi import NFVI, Posterior


def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """Standard normal prior on standardised effects."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    effect = pyro.sample("effect", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("biopsy", len(x)):
        pyro.sample("malignant", dist.Bernoulli(logits=intercept + x @ effect), obs=y)


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Training and test halves, standardised by the training half, and predictor names."""
    bundle = load_breast_cancer()
    malignant = 1.0 - bundle.target
    x, x_test, y, y_test = train_test_split(bundle.data, malignant, test_size=0.3,
                                            random_state=0, stratify=malignant)
    scaler = StandardScaler().fit(x)
    parts = scaler.transform(x), scaler.transform(x_test), y, y_test
    return *(torch.as_tensor(part) for part in parts), list(bundle.feature_names)


def predict(posterior: Posterior, x: torch.Tensor) -> torch.Tensor:
    """Posterior predictive probability that each biopsy is malignant."""
    draws = posterior.resample(2000)
    return torch.sigmoid(draws["intercept"][:, None] + draws["effect"] @ x.T).mean(0)


def picture(posterior: Posterior, names: list[str], path: Path) -> None:
    """Draw the effects with their 94% intervals, and the ELBO."""
    effects = posterior.resample(4000)["effect"].numpy()
    low, middle, high = np.quantile(effects, [0.03, 0.5, 0.97], axis=0)
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 7), layout="constrained",
                                    width_ratios=(3, 2))
    place = np.arange(len(names))
    left.hlines(place, low, high, color="C0")
    left.plot(middle, place, "o", ms=4, color="C0")
    left.axvline(0, color="0.6", lw=1)
    left.set(yticks=place, xlabel="effect on log-odds of malignancy, per sd")
    left.set_yticklabels(names)
    posterior.plot_elbo(right)
    plt.gcf().savefig(path, dpi=120)
    plt.close()


def main() -> None:
    """Fit, report, and predict held-out biopsies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
    parser.add_argument("--num-steps", type=int, default=3000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    x, x_test, y, y_test, names = data()
    posterior = NFVI(model, num_steps=options.num_steps, seed=0).run(x, y=y)
    print(posterior.summary())
    probability = predict(posterior, x_test)
    accuracy = ((probability > 0.5) == (y_test > 0.5)).double().mean()
    score = dist.Bernoulli(probability).log_prob(y_test).mean()
    print(f"\nHeld-out biopsies: accuracy {accuracy:.3f}, mean log score {score:.3f}")
    picture(posterior, names, options.out / "logistic_regression.png")
    data_out = posterior.to_arviz(coords={"effect_dim_0": names})
    data_out.to_netcdf(options.out / "logistic_regression.nc")


if __name__ == "__main__":
    main()
