"""One fit of one posterior, by every method of :mod:`guides`, each in its own library.

A method takes a case, a seed and a budget, and returns draws of the latent sites with what else
there is to say. The clock runs from model and data in hand to the draws: compilation counts,
imports do not. All compute in double precision.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from guides_models import Arrays, Case

NUM_DRAWS = 10_000
FIRST = {"num_steps": 2000, "particles": 1, "lr": 1e-2, "decay": 1.0}  # as tutorials have it
TUNED = {"num_steps": 3000, "particles": 16, "lr": 3e-2, "decay": 0.01}
CHAINS, WARM_UP, SAMPLES = 4, 1000, 1000
Found = tuple[Arrays, dict[str, Any]]  # draws by site, other columns of the row


class Clock:
    """Seconds since it was made, of the processor (of children too) and of the wall."""

    def __init__(self) -> None:
        self.cpu, self.wall = _cpu(), time.perf_counter()

    def __call__(self) -> dict[str, float]:
        """Both."""
        return {"cpu": _cpu() - self.cpu, "wall": time.perf_counter() - self.wall}


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in usage)


# ---------------------------------------------------------------------- torch

def torch_case(case: Case, seed: int) -> tuple[Callable, list[Any]]:
    """The Pyro model and its arguments."""
    import pyro
    import pyro.distributions as dist
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    return case.model(pyro, dist), [torch.as_tensor(x) for x in case.data().values()]


def nfvi(case: Case, seed: int) -> Found:
    """``NFVI(model).run(data)``, nothing chosen."""
    from pyro_nfvi import NFVI

    model, data = torch_case(case, seed)
    clock = Clock()
    posterior = NFVI(model, seed=seed, progress=False).run(*data)
    draws = {name: x.numpy() for name, x in posterior.sample(NUM_DRAWS).items()}
    row = clock()
    *_, numbers, verdict = str(posterior.summary()).splitlines()
    return draws, {**row, **weighted(posterior), "numbers": numbers, "verdict": verdict,
                   "stages": [stage.name for stage in posterior.history.stages]}


def weighted(posterior: Any) -> dict[str, Any]:
    """k-hat, effective draws, and the draws that the weights ask for."""
    again = {name: x.numpy() for name, x in posterior.resample(NUM_DRAWS).items()}
    return {"k": float(posterior.pareto_k), "ess": float(posterior.ess) / NUM_DRAWS,
            "elbo": posterior.elbo[0], "resampled": again}


def pyro_guide(case: Case, seed: int, *, name: str, budget: dict[str, Any]) -> Found:
    """A guide of Pyro, by its own SVI."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO, autoguide

    from pyro_nfvi import Posterior

    model, data = torch_case(case, seed)
    clock = Clock()
    guide = getattr(autoguide, name)(model)
    steps, particles = budget["num_steps"], budget["particles"]
    optimizer = pyro.optim.ClippedAdam({"lr": budget["lr"],
                                        "lrd": budget["decay"] ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*data)
    seconds = clock()
    with torch.no_grad():
        posterior = Posterior.of(model, guide, *data)
        clock = Clock()
        draws = {name: x.numpy() for name, x in posterior.sample(NUM_DRAWS).items()}
    row = {key: seconds[key] + value for key, value in clock().items()}
    return draws, {**row, **weighted(posterior)}


def pyro_nuts(case: Case, seed: int) -> Found:
    """One chain of Pyro's NUTS, compiled by torch's tracer."""
    from pyro.infer import MCMC, NUTS

    model, data = torch_case(case, seed)
    clock = Clock()
    chain = MCMC(NUTS(model, jit_compile=True, ignore_jit_warnings=True), SAMPLES, WARM_UP,
                 disable_progbar=True)
    chain.run(*data)
    draws = {name: x.numpy() for name, x in chain.get_samples().items()}
    return draws, clock()


# ---------------------------------------------------------------------- NumPyro

def jax_case(case: Case) -> tuple[Callable, list[Any]]:
    """The NumPyro model and its arguments."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    jax.config.update("jax_enable_x64", True)
    return case.model(numpyro, dist), [jnp.asarray(x) for x in case.data().values()]


def numpyro_guide(case: Case, seed: int, *, name: str, budget: dict[str, Any]) -> Found:
    """A guide of NumPyro, by its compiled SVI."""
    import jax
    from numpyro import optim
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    model, data = jax_case(case)
    clock = Clock()
    guide = getattr(autoguide, name)(model)
    steps, lr = budget["num_steps"], budget["lr"]
    rate = optim.optimizers.exponential_decay(lr, steps, budget["decay"])
    svi = SVI(model, guide, optim.ClippedAdam(rate), Trace_ELBO(budget["particles"]))
    one, two = jax.random.split(jax.random.PRNGKey(seed))
    result = svi.run(one, steps, *data, progress_bar=False)
    draws = guide.sample_posterior(two, result.params, sample_shape=(NUM_DRAWS,))
    draws = {name: np.asarray(x) for name, x in draws.items()}
    return draws, clock()


def numpyro_chains(case: Case, seed: int, warm_up: int, samples: int, **options: Any) -> Arrays:
    """Draws of chains of NumPyro's NUTS, ``(num_chains, num_draws, *shape)`` by site."""
    import jax
    from numpyro.infer import MCMC, NUTS

    model, data = jax_case(case)
    chains = MCMC(NUTS(model, **options), num_warmup=warm_up, num_samples=samples,
                  num_chains=CHAINS, chain_method="sequential", progress_bar=False)
    chains.run(jax.random.PRNGKey(seed), *data)
    return {name: np.asarray(x) for name, x in chains.get_samples(group_by_chain=True).items()}


def numpyro_nuts(case: Case, seed: int) -> Found:
    """Four chains of NumPyro's NUTS, one after another."""
    clock = Clock()
    chains = numpyro_chains(case, seed, WARM_UP, SAMPLES)
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in chains.items()}, clock()


# ---------------------------------------------------------------------- PyMC

def pymc_model(case: Case) -> Any:
    """The PyMC model."""
    import pymc as pm

    with pm.Model() as model:
        case.pymc(pm, case.data())
    return model


def pymc_draws(data: Any) -> Arrays:
    """Draws of all chains of the latent sites."""
    return {str(name): x.values.reshape(-1, *x.shape[2:]) for name, x in data.posterior.items()}


def pymc_advi(case: Case, seed: int, *, method: str, num_steps: int, tuned: bool) -> Found:
    """PyMC's ADVI, by its own optimizer or by Adam."""
    import pymc as pm

    clock = Clock()
    with pymc_model(case):
        options = {"obj_optimizer": pm.adam(learning_rate=1e-2)} if tuned else {}
        fitted = pm.fit(num_steps, method=method, random_seed=seed, progressbar=False, **options)
        draws = pymc_draws(fitted.sample(NUM_DRAWS, random_seed=seed))
    return draws, clock()


def pymc_pathfinder(case: Case, seed: int) -> Found:
    """Pathfinder of pymc-extras, with as many draws as the others."""
    import pymc_extras

    clock = Clock()
    with pymc_model(case):
        found = pymc_extras.fit(
            method="pathfinder", num_draws=NUM_DRAWS, num_draws_per_path=NUM_DRAWS,
            random_seed=seed, progressbar=False, concurrent=None, display_summary=False)
    return pymc_draws(found), clock()


# ---------------------------------------------------------------------- all

METHODS: dict[str, tuple[str, Callable[..., Found]]] = {  # the package it needs, the fit
    "NFVI": ("pyro-nfvi", nfvi),
    "Pyro AutoNormal": ("pyro-ppl", partial(pyro_guide, name="AutoNormal", budget=FIRST)),
    "Pyro AutoNormal, tuned": (
        "pyro-ppl", partial(pyro_guide, name="AutoNormal", budget=TUNED)),
    "Pyro AutoMultivariateNormal": (
        "pyro-ppl", partial(pyro_guide, name="AutoMultivariateNormal", budget=FIRST)),
    "Pyro AutoMultivariateNormal, tuned": (
        "pyro-ppl", partial(pyro_guide, name="AutoMultivariateNormal", budget=TUNED)),
    "Pyro AutoIAFNormal": ("pyro-ppl", partial(pyro_guide, name="AutoIAFNormal", budget=FIRST)),
    "Pyro AutoIAFNormal, tuned": (
        "pyro-ppl", partial(pyro_guide, name="AutoIAFNormal", budget=TUNED)),
    "NumPyro AutoIAFNormal, tuned": (
        "numpyro", partial(numpyro_guide, name="AutoIAFNormal", budget={**TUNED, "lr": 5e-3})),
    "NumPyro AutoBNAFNormal, tuned": (
        "numpyro", partial(numpyro_guide, name="AutoBNAFNormal", budget={**TUNED, "lr": 5e-3})),
    "PyMC ADVI": ("pymc", partial(pymc_advi, method="advi", num_steps=10_000, tuned=False)),
    "PyMC full-rank ADVI, Adam": (
        "pymc", partial(pymc_advi, method="fullrank_advi", num_steps=20_000, tuned=True)),
    "PyMC Pathfinder": ("pymc-extras", pymc_pathfinder),
    "NumPyro NUTS": ("numpyro", numpyro_nuts),
    "Pyro NUTS": ("pyro-ppl", pyro_nuts),
}
