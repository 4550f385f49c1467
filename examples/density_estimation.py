"""Densities learned from data: a picture of one, and one that stands in for a likelihood.

First the two moons of scikit-learn: a flow is fitted to 2,000 points, judged on points it has not
seen, and drawn with the grid of its noise carried layer by layer. Then inference for a simulator
whose likelihood one cannot write down, only run: a flow learns the density of its output given its
parameters from 40,000 runs, and takes the place of the likelihood in a Pyro model. The simulator
here has a likelihood after all, so that the posterior can be checked against the exact one.

    python examples/density_estimation.py [--num-steps 5000] [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import make_moons
from torch import Tensor

from pyro_nfvi import NFVI, FittedFlow, Posterior, fit_density, nsf, plot_flow

NUM_RUNS = 40_000  # of the simulator
NUM_OBSERVED, TRUTH = 30, (1.0, -0.5)  # location, log of the scale


def moons(num_steps: int, out: Path) -> float:
    """Fit two moons, draw them, and return the NLL of new points."""
    points, _ = make_moons(2000, noise=0.1, random_state=0)  # NumPy, on scales of its own
    fitted = fit_density(nsf, samples=points, num_steps=num_steps, seed=0)
    new = torch.as_tensor(make_moons(5000, noise=0.1, random_state=1)[0])
    nll = -fitted.log_prob(new).mean().item()
    print(f"two moons: {fitted}")
    print(f"NLL of 5,000 new points: {nll:.3f} nats")
    axes = plot_flow(fitted, samples=points)
    axes[0].figure.get_figure(root=True).savefig(out / "moons.png", dpi=110)
    fitted.plot().figure.savefig(out / "moons_fit.png", dpi=110)
    plt.close("all")
    return nll


def gumbel(theta: Tensor) -> dist.Gumbel:
    """What the simulator draws from; an emulator sees its draws alone."""
    return dist.Gumbel(theta[..., 0], theta[..., 1].exp())


def emulate(num_steps: int) -> FittedFlow:
    """Learn the density of an outcome given the parameters, from runs over the prior."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(NUM_RUNS, 2, generator=generator)
    chance = torch.rand(NUM_RUNS, generator=generator)
    outcome = theta[:, 0] - theta[:, 1].exp() * (-chance.log()).log()  # the simulator
    recipe = partial(nsf, num_layers=2)
    fitted = fit_density(recipe, samples=outcome, context=theta, num_steps=num_steps, seed=0)
    print(f"emulator: {fitted}")
    return fitted


def model(likelihood: Callable[[Tensor], dist.Distribution], y: Tensor) -> None:
    """Location and log-scale with standard normal priors, and independent outcomes."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("outcomes", len(y)):
        pyro.sample("y", likelihood(theta.unsqueeze(-2).expand(*theta.shape[:-1], len(y), 2)),
                    obs=y)


def infer(emulator: FittedFlow) -> float:
    """Largest difference of the posterior means, in standard deviations of the exact one."""
    torch.manual_seed(1)
    y = gumbel(torch.tensor(TRUTH)).sample((NUM_OBSERVED,)).unsqueeze(-1)
    emulated: Posterior = NFVI(partial(model, emulator.condition), seed=0).run(y)
    exact = NFVI(partial(model, lambda theta: gumbel(theta.unsqueeze(-2)).to_event(1)),
                 seed=0).run(y)
    for name, posterior in (("emulated", emulated), ("exact", exact)):
        print(f"\n{name} likelihood\n{posterior.summary()}")
    draws = [posterior.resample(10_000)["theta"].double() for posterior in (emulated, exact)]
    return ((draws[0].mean(0) - draws[1].mean(0)) / draws[1].std(0)).abs().max().item()


def main() -> None:
    """Fit, draw, emulate, infer."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=5000, help="most steps of a fit")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    moons(options.num_steps, options.out)
    gap = infer(emulate(options.num_steps))
    print(f"\nlargest gap between the posterior means: {gap:.2f} standard deviations")
    print(f"Files in {options.out}/")


if __name__ == "__main__":
    main()
