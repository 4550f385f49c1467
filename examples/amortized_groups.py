"""Varying intercepts and slopes: one posterior a group, or one encoder for all groups.

A regression in 100 groups of 4 to 12 observations each, drawn here from known values. The usual fit
holds a posterior for the two effects of every group: 205 latents in all. The amortized one holds a
flow for the five population values and another that reads a group's effects off its observations,
by a network that takes sets of any size. Its number of parameters does not grow with the groups, it
trains on minibatches of them, and groups that come later need no new fit. What one learns here: how
to write such a model, and what the network costs in accuracy.

    python examples/amortized_groups.py [--num-groups 100] [--num-steps 4000] [--out DIR]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_nfvi import NFVI, AutoAmortizedFlow, CompiledTrace_ELBO, Posterior
from pyro_nfvi.inference import amortization_gap
from pyro_nfvi.vae import SetEncoder

MOST = 12  # observations of a group
TRUTH = {"intercept": 1.0, "slope": -0.5, "spread": (0.8, 0.4), "sigma": 0.7}
POPULATION = tuple(TRUTH)
NUM_DRAWS = 4000


@dataclass
class Groups:
    """Observations of every group, padded to one length.

    Attributes:
        x: Predictor ``(num_groups, MOST)``.
        seen: Which entries are observations.
        y: Outcome.
        effects: The intercepts and slopes that made them.
    """

    x: Tensor
    seen: Tensor
    y: Tensor
    effects: Tensor


def draw_groups(count: int, seed: int) -> Groups:
    """Groups from the population of ``TRUTH``."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.tensor([TRUTH["intercept"], TRUTH["slope"]])
    effects = centre + torch.tensor(TRUTH["spread"]) * torch.randn(count, 2, generator=generator)
    x = torch.randn(count, MOST, generator=generator)
    noise = TRUTH["sigma"] * torch.randn(count, MOST, generator=generator)
    sizes = torch.randint(4, MOST + 1, (count, 1), generator=generator)
    seen = torch.arange(MOST) < sizes
    y = effects[:, :1] + effects[:, 1:] * x + noise
    return Groups(x * seen, seen, y * seen, effects)


def model(x: Tensor, seen: Tensor, y: Tensor | None = None, batch_size: int | None = None) -> None:
    """Regression with an intercept and a slope for every group."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    centre = torch.stack([intercept, slope], -1)
    with pyro.plate("group", len(x), subsample_size=batch_size) as rows:
        effect = pyro.sample("effect", dist.Normal(centre, spread).to_event(1))
        line = effect[..., :1] + effect[..., 1:] * x[rows]
        noise = dist.Normal(line, sigma.unsqueeze(-1)).mask(seen[rows]).to_event(1)
        pyro.sample("y", noise, obs=None if y is None else y[rows])


def encoder_rows(x: Tensor, seen: Tensor, y: Tensor, batch_size: int | None = None
                 ) -> tuple[Tensor, Tensor]:
    """What the encoder reads of each group: pairs of x and y, and which of them are there."""
    pairs = torch.stack([x, y], -1)
    return pairs, seen.unsqueeze(-1).expand(pairs.shape)


def fit_amortized(groups: Groups, num_steps: int) -> AutoAmortizedFlow:
    """Train the encoder and both flows, on minibatches of groups."""
    guide = AutoAmortizedFlow(model, SetEncoder((MOST, 2), (64,), (64,)), inputs=encoder_rows)
    size = min(25, len(groups.x))
    guide.setup(groups.x, groups.seen, groups.y, size)
    optimiser = ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimiser, CompiledTrace_ELBO(num_particles=8))
    for _ in range(num_steps):
        svi.step(groups.x, groups.seen, groups.y, size)
    return guide


def exact_effects(population: dict[str, Tensor], groups: Groups) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each group's effects, in closed form given draws of the population."""
    design = torch.stack([groups.seen, groups.x], -1) * groups.seen.unsqueeze(-1)
    spread, sigma = population["spread"][:, None], population["sigma"][:, None, None, None]
    centre = torch.stack([population["intercept"], population["slope"]], -1)[:, None]
    precision = design.mT @ design / sigma.square() + torch.diag_embed(spread.square().reciprocal())
    pull = (design.mT @ groups.y.unsqueeze(-1) / sigma.square()).squeeze(-1)
    covariance = torch.linalg.inv(precision)
    means = (covariance @ (pull + centre / spread.square()).unsqueeze(-1)).squeeze(-1)
    within = covariance.diagonal(dim1=-2, dim2=-1).mean(0)
    return means.mean(0), (within + means.var(0)).sqrt()


def compare(name: str, draws: Tensor, mean: Tensor, deviation: Tensor) -> float:
    """Print how far the draws' moments are from these; the mean error in standard deviations."""
    error = ((draws.mean(0) - mean) / deviation).abs()
    ratio = draws.std(0) / deviation
    print(f"{name:<36}{error.mean():10.3f}{error.max():10.3f}{ratio.mean():12.3f}")
    return error.mean().item()


def moments(posterior: Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of every site, by resampled draws."""
    return {name: (value.float().mean(0), value.float().std(0))
            for name, value in posterior.resample(NUM_DRAWS).items()}


def picture(guide_draws: dict[str, Tensor], usual: dict[str, tuple[Tensor, Tensor]], path: Path
            ) -> None:
    """Draw the means of all effects by one fit against those by the other."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for i, (ax, name) in enumerate(zip(axes, ("intercepts", "slopes"), strict=True)):
        mean, deviation = (part[:, i] for part in usual["effect"])
        ours = guide_draws["effect"][..., i]
        ax.errorbar(mean, ours.mean(0), ours.std(0), deviation, fmt=".", lw=0.6, alpha=0.7)
        ax.axline((float(mean.mean()),) * 2, slope=1, color="0.5", lw=1)
        ax.set(title=f"Group {name}", xlabel="a posterior of its own", ylabel="amortized")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(num_groups: int, num_steps: int, out: Path) -> dict[str, float]:
    """Fit both ways, compare, and read groups that neither has seen."""
    groups, new = draw_groups(num_groups, seed=0), draw_groups(20, seed=1)
    pyro.set_rng_seed(0)
    start = time.perf_counter()
    guide = fit_amortized(groups, num_steps)
    middle = time.perf_counter()
    posterior = NFVI(model, seed=0).run(groups.x, groups.seen, groups.y)
    end = time.perf_counter()
    print(f"amortized   {middle - start:5.1f} s, {num_steps} steps of minibatches\n"
          f"usual       {end - middle:5.1f} s, {str(posterior.summary()).splitlines()[-1]}\n")
    draws = guide.sample_posterior(NUM_DRAWS, groups.x, groups.seen, groups.y)
    usual = moments(posterior)
    print(f"{'population':<12}{'truth':>14}{'amortized':>22}{'usual':>22}")
    for name in POPULATION:
        _population_row(name, draws[name], usual[name])
    print(f"\n{'difference, in posterior sds':<36}{'mean':>10}{'largest':>10}{'sd ratio':>12}")
    errors = {"groups": compare("effects, against the usual fit", draws["effect"],
                                *usual["effect"])}
    exact = exact_effects({name: draws[name] for name in POPULATION}, new)
    unseen = guide.sample_posterior(NUM_DRAWS, new.x, new.seen, new.y)["effect"]
    errors["new"] = compare("effects of 20 new groups, exact", unseen, *exact)
    print(f"\n{amortization_gap(guide, groups.x, groups.seen, groups.y, num_steps=100, seed=0)}")
    picture(draws, usual, out / "amortized_groups.png")
    return errors


def _population_row(name: str, draws: Tensor, usual: tuple[Tensor, Tensor]) -> None:
    truth = torch.as_tensor(TRUTH[name]).reshape(-1)
    mean, deviation = (part.reshape(-1) for part in usual)
    ours = draws.reshape(len(draws), -1)
    for i in range(len(truth)):
        label = name if len(truth) == 1 else f"{name}[{i}]"
        print(f"{label:<12}{truth[i]:14.2f}{ours[:, i].mean():15.3f} ± {ours[:, i].std():.3f}"
              f"{mean[i]:15.3f} ± {deviation[i]:.3f}")


def main() -> None:
    """Compare the two fits."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--num-groups", type=int, default=100)
    parser.add_argument("--num-steps", type=int, default=4000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.num_groups, options.num_steps, options.out)
    print(f"Picture in {options.out}/")


if __name__ == "__main__":
    main()
