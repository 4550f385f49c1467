"""Leave-one-out from variational draws against that from exact draws.

    python benchmarks/loo.py --posteriors FOLDER

``FOLDER`` holds posteriors with reference draws (``models.py``). Breast cancer is compared with
NUTS of NumPyro. Prints, for each model, ArviZ's elpd_loo of both and their difference in standard
errors, which should be below 2.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from tables import installed

from pyro_nfvi import NFVI, Posterior
from pyro_nfvi.diagnostics import to_inference_data

NAMES = ["eight_schools-eight_schools_centered", "eight_schools-eight_schools_noncentered",
         "kidiq-kidscore_interaction", "mesquite-logmesquite_logva", "dugongs_data-dugongs_model"]
GROUPS = ("posterior", "log_likelihood")
COLUMNS = 10


def logistic(x: torch.Tensor, y: torch.Tensor) -> None:
    """Logistic regression."""
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def cancer() -> tuple[torch.Tensor, torch.Tensor]:
    """Breast cancer, standardized columns."""
    data = load_breast_cancer()
    x = torch.tensor(data.data[:, :COLUMNS])
    return (x - x.mean(0)) / x.std(0), torch.tensor(data.target, dtype=torch.float64)


def by_nuts(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Draws of NumPyro's NUTS."""
    import jax
    import numpyro

    jax.config.update("jax_enable_x64", True)

    def model() -> None:
        weights = numpyro.sample("weights", numpyro.distributions.Normal(0, 1).expand(
            [x.shape[-1]]).to_event(1))
        logits = jax.numpy.asarray(x.numpy()) @ weights
        numpyro.sample("y", numpyro.distributions.Bernoulli(logits=logits), obs=y.numpy())
    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), num_warmup=1000, num_samples=5000,
                              progress_bar=False)
    mcmc.run(jax.random.PRNGKey(0))
    return {"weights": torch.tensor(np.asarray(mcmc.get_samples()["weights"]))}


def reference_data(posterior: Posterior, draws: dict[str, torch.Tensor]) -> Any:
    """ArviZ data of exact draws of the latents."""
    z = posterior.log_joint.layout.pack(draws)
    return to_inference_data(posterior.log_joint, z[None], {}, groups=GROUPS)


def row(name: str, posterior: Posterior, draws: dict[str, torch.Tensor], seconds: float) -> None:
    """Print the comparison of one model."""
    ours = arviz.loo(posterior.to_arviz(groups=GROUPS))
    exact = arviz.loo(reference_data(posterior, draws))
    columns = set(arviz.summary(posterior.to_arviz(groups=GROUPS)).columns)
    apart = abs(ours.elpd_loo - exact.elpd_loo) / exact.se
    print(f"| {name} | {ours.elpd_loo:.3f} | {exact.elpd_loo:.3f} | {exact.se:.3f} | {apart:.3f} | "
          f"{posterior.pareto_k:.2f} | {'mean' in columns and 'sd' in columns} | {seconds:.1f} |",
          flush=True)


def main() -> None:
    """Fit every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", type=Path, metavar="FOLDER")
    folder = parser.parse_args().posteriors
    warnings.filterwarnings("ignore")
    print("| model | elpd_loo | of exact draws | its se | difference in se | k-hat | "
          "az.summary | seconds |\n|---|---|---|---|---|---|---|---|")
    if installed("numpyro"):
        data = cancer()
        fit("breast cancer", logistic, data, {}, by_nuts(*data))
    else:
        print("\nBreast cancer is left out: NumPyro is not installed.")
    if folder is None:
        return
    sys.path.insert(0, str(folder))
    torch.set_default_dtype(torch.float64)
    import models
    for name in NAMES:
        model, args, kwargs, _ = models.load(name)
        fit(name, model, args, kwargs, models.latent_reference(name))


def fit(name: str, model: Any, args: tuple, kwargs: dict, draws: dict[str, torch.Tensor]) -> None:
    """Fit one model and print its row."""
    start = time.perf_counter()
    posterior = NFVI(model, seed=0, progress=False).run(*args, **kwargs)
    row(name, posterior, draws, time.perf_counter() - start)


if __name__ == "__main__":
    main()
