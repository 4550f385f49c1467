"""What an installed package must be able to do, without tests or their dependencies.

    python tests/smoke.py       # in an environment that holds the built wheel and nothing else
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_nfvi
from pyro_nfvi import NFVI, AutoIAF, Posterior
from pyro_nfvi.flows import Flow, nsf

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])


def model(y: torch.Tensor) -> None:
    """Two latents, one of them positive."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def check_files() -> None:
    """The wheel holds what the package reads, and the version is one."""
    assert version("pyro-nfvi") == pyro_nfvi.__version__
    for name in ["py.typed", "engine/c/functions.c", "engine/c/adam.c"]:
        assert files("pyro_nfvi").joinpath(name).is_file(), f"{name} is not in the package"


def check_fit() -> Posterior:
    """From a model to a verdict, ArviZ data and a file."""
    posterior = NFVI(model, seed=0, progress=False).run(Y)
    assert "Verdict: good" in str(posterior.summary()), str(posterior.summary())
    assert posterior.to_arviz()["posterior"]["mu"].shape == (1, 4000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.pt"
        posterior.save(path)
        again = Posterior.load(path, model)
    assert again.pareto_k < 0.7
    return posterior


def check_loop() -> None:
    """The flow is trained by one of the compiled loops."""
    guide = AutoIAF(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(Y)  # NFVI goes on with a guide that has been trained, by its flow
    posterior = NFVI(model, guide, num_steps=100, seed=0, progress=False).run(Y)
    assert posterior.engine is not None
    print(posterior.engine)


def main() -> None:
    """All of it."""
    check_files()
    print(check_fit().summary())
    check_loop()
    assert Flow(nsf(2))().sample((3,)).shape == (3, 2)
    print(f"pyro_nfvi {pyro_nfvi.__version__} works")


if __name__ == "__main__":
    main()
