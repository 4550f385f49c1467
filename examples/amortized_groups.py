"""Varying slopes: a posterior for each group, or one encoder for all.

Each of fifty groups has an intercept and a slope of its own. Is it enough to train one network
that reads a group's data and returns its posterior, so that groups that come later need no fit; and
what does that cost in accuracy?

    python examples/amortized_groups.py [--out DIR]
"""

# %%
import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI

from pyro_nfvi import NFVI, AutoAmortizedFlow, CompiledTrace_ELBO
from pyro_nfvi.inference import amortization_gap
from pyro_nfvi.vae import SetEncoder

pyro.set_rng_seed(0)

# %% tags=["remove-cell"]
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
out = parser.parse_known_args()[0].out
out.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
                     "legend.frameon": False, "figure.constrained_layout.use": True})

# %% [markdown]
# ## The data
# Drawn here, so that the truth is known: groups of 4 to 12 observations, padded to one length, and
# a mask of what is there.

# %%
most = 12
truth = {"intercept": 1.0, "slope": -0.5, "spread": torch.tensor([0.8, 0.4]), "sigma": 0.7}


def draw_groups(count):
    """Predictor, mask, and outcome of each group."""
    effects = torch.tensor([1.0, -0.5]) + truth["spread"] * torch.randn(count, 2)
    x = torch.randn(count, most)
    seen = torch.arange(most) < torch.randint(4, most + 1, (count, 1))
    y = effects[:, :1] + effects[:, 1:] * x + truth["sigma"] * torch.randn(count, most)
    return x * seen, seen, y * seen


groups, new = draw_groups(50), draw_groups(20)

# %% [markdown]
# ## The model
# A regression whose intercept and slope vary by group. `batch_size` lets it take a few groups at a
# time.


# %%
def model(x, seen, y=None, batch_size=None):
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


# %% [markdown]
# ## One encoder for all groups
# `AutoAmortizedFlow` puts the five population values under one flow and the effects under another,
# which reads each group's pairs of x and y through a network for sets of any size. Its number of
# parameters does not grow with the groups, and it trains on 25 of them at a time.


# %%
def encoder_rows(x, seen, y, batch_size=None):
    """What the encoder reads of each group: pairs, and which of them are there."""
    pairs = torch.stack([x, y], -1)
    return pairs, seen.unsqueeze(-1).expand(pairs.shape)


start, num_steps = time.perf_counter(), 2000
guide = AutoAmortizedFlow(model, SetEncoder((most, 2), (64,), (64,)), inputs=encoder_rows)
guide.setup(*groups, 25)
svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)}),
          CompiledTrace_ELBO(num_particles=8))
for _ in range(num_steps):
    svi.step(*groups, 25)
print(f"{num_steps} steps in {time.perf_counter() - start:.0f} s")

# %% [markdown]
# ## A posterior of its own for every group
# The usual fit: 105 latents under one guide.

# %%
start = time.perf_counter()
posterior = NFVI(model, seed=0).run(*groups)
print(f"{time.perf_counter() - start:.0f} s; {posterior.summary().verdict}")

# %% [markdown]
# ## The answer
# The population first; then the effects of each group by both.

# %%
amortized, usual = guide.sample_posterior(4000, *groups), posterior.resample(4000)
print(f"{'':12}{'truth':>8}{'amortized':>18}{'usual':>18}")
for name, value in truth.items():
    for i, true in enumerate(torch.as_tensor(value).reshape(-1)):
        both = [draws[name].reshape(4000, -1)[:, i] for draws in (amortized, usual)]
        print(f"{name:12}{true:8.2f}" + "".join(f"{x.mean():10.3f} ± {x.std():.3f}" for x in both))

ours, own = amortized["effect"], usual["effect"]
error = ((ours.mean(0) - own.mean(0)) / own.std(0)).abs()
print(f"\nmeans of the effects differ by {error.mean():.2f} posterior deviations on average, "
      f"{error.max():.2f} at most; deviations are {(ours.std(0) / own.std(0)).mean():.2f} as large")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4.4))
for i, (ax, name) in enumerate(zip(axes, ("intercept", "slope"), strict=True)):
    ax.errorbar(own[..., i].mean(0), ours[..., i].mean(0), ours[..., i].std(0), own[..., i].std(0),
                fmt="o", ms=3, lw=0.5, alpha=0.6)
    ax.axline((0, 0), slope=1, color="0.5", lw=1, zorder=0)
    ax.set(xlabel=f"{name}, a posterior of its own", ylabel=f"{name}, amortized")
figure.savefig(out / "amortized_groups.png")
plt.close(figure)

# %% [markdown]
# For groups that neither fit has seen, given draws of the population, the effects have a Gaussian
# posterior in closed form. The encoder is asked for it without any training:

# %%
unseen = guide.sample_posterior(4000, *new)["effect"]
x, seen, y = new
design = torch.stack([seen, x], -1) * seen.unsqueeze(-1)
sigma, spread = (amortized[name][:1000] for name in ("sigma", "spread"))
centre = torch.stack([amortized["intercept"], amortized["slope"]], -1)[:1000, None]
noise = sigma[:, None, None, None] ** 2
covariance = torch.linalg.inv(design.mT @ design / noise + torch.diag_embed(spread**-2)[:, None])
pull = (design.mT @ y.unsqueeze(-1) / noise).squeeze(-1) + centre / spread[:, None] ** 2
means = (covariance @ pull.unsqueeze(-1)).squeeze(-1)
deviation = (covariance.diagonal(dim1=-2, dim2=-1).mean(0) + means.var(0)).sqrt()
error = ((unseen.mean(0) - means.mean(0)) / deviation).abs()
print(f"new groups: off by {error.mean():.2f} posterior deviations on average, "
      f"{error.max():.2f} at most")

# %% [markdown]
# ## What the verdict means here
# The usual fit has a verdict of its own. For the encoder the question is what sharing costs, and
# `amortization_gap` answers it: the nats that each group would gain from a posterior of its own.

# %%
print(amortization_gap(guide, *groups, num_steps=100, seed=0))
