"""Old Faithful: a mixture, and labels that switch.

Visitors of a geyser wait either about an hour or much longer: how long, and how often? In a
mixture the two components can swap their names and nothing else changes, so the posterior has two
copies of everything. What does a fit make of that, and what should one do about it?

    python examples/old_faithful.py [--out DIR]
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_nfvi import NFVI

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
# Minutes to the next eruption after each of 272 eruptions of Old Faithful in Yellowstone, August
# 1985 (Azzalini & Bowman 1990, Applied Statistics 39; Härdle 1991, Smoothing Techniques).

# %%
minutes = torch.tensor([float(word) for word in """
79 54 74 62 85 55 88 85 51 85 54 84 78 47 83 52 62 84 52 79 51 47 78 69 74 83 55 76 78 79 73 77 66
80 74 52 48 80 59 90 80 58 84 58 73 83 64 53 82 59 75 90 54 80 54 83 71 64 77 81 59 84 48 82 60 92
78 78 65 73 82 56 79 71 62 76 60 78 76 83 75 82 70 65 73 88 76 80 48 86 60 90 50 78 63 72 84 75 51
82 62 88 49 83 81 47 84 52 86 81 75 59 89 79 59 81 50 85 59 87 53 69 77 56 88 81 45 82 55 90 45 83
56 89 46 82 51 86 53 79 81 60 82 77 76 59 80 49 96 53 77 77 65 81 71 70 81 93 53 89 45 86 58 78 66
76 63 88 52 93 49 57 77 68 81 81 73 50 85 74 55 77 83 83 51 78 84 46 83 55 81 57 76 84 77 81 87 77
51 78 60 82 91 53 78 46 77 84 49 83 71 80 49 75 64 76 53 94 55 76 50 82 54 75 78 79 78 78 70 79 70
54 86 50 90 54 54 77 79 64 75 47 86 63 85 82 57 82 67 74 54 83 73 73 88 80 71 83 56 79 78 84 58 83
43 60 75 81 46 90 46 74
""".split()])

# %% [markdown]
# ## The model
# Which component an eruption belongs to is a discrete latent, and is summed out:
# `MixtureSameFamily` does so. The first version treats both components alike.


# %%
def two_waits(weight, mean, sd):
    """The mixture, for any batch of its parameters."""
    return dist.MixtureSameFamily(dist.Categorical(weight[..., None, :]),
                                  dist.Normal(mean[..., None, :], sd[..., None, :]))


def exchangeable(minutes):
    """Two components without order."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    mean = pyro.sample("mean", dist.Normal(70.0, 20.0).expand([2]).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(2.0, 0.5).expand([2]).to_event(1))
    with pyro.plate("eruption", len(minutes)):
        pyro.sample("minutes", two_waits(weight, mean, sd), obs=minutes)


# %%
both = NFVI(exchangeable, seed=0).run(minutes)
print(both.summary())

# %% [markdown]
# The fit has looked for separate modes before it trained anything, found the two copies, and holds
# a mixture of Gaussians for them: the verdict is good, and rightly so, as this *is* the posterior.
# But its table is useless: both means are averages over two labellings. The question has to be put
# so that the labels mean something.
#
# ## The labels pinned down
# The first component is to be the short wait: the long one is longer by a positive `gap`.


# %%
def ordered(minutes):
    """A short wait, and one that is longer."""
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    short = pyro.sample("short", dist.Normal(60.0, 20.0))
    gap = pyro.sample("gap", dist.LogNormal(3.0, 0.7))
    sd = pyro.sample("sd", dist.LogNormal(2.0, 0.5).expand([2]).to_event(1))
    mean = pyro.deterministic("mean", torch.stack([short, short + gap], -1))
    with pyro.plate("eruption", len(minutes)):
        pyro.sample("minutes", two_waits(weight, mean, sd), obs=minutes)


# %%
posterior = NFVI(ordered, seed=0).run(minutes)
print(posterior.summary())

# %% [markdown]
# ## The answer
# Something over a third of the waits are short, about 55 minutes, the others about 80. On the left
# what the labels do: the means of the first version lie in two clouds, mirror images of each other;
# those of the second in one. On the right the densities that the draws stand for.

# %%
swapping, pinned = both.resample(1500)["mean"], posterior.resample(1500)
mean = torch.stack([pinned["short"], pinned["short"] + pinned["gap"]], -1)
grid = torch.linspace(40.0, 100.0, 200)
density = two_waits(pinned["weight"], mean, pinned["sd"]).log_prob(grid).exp()

figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=(2, 3))
left.axline((70, 70), slope=1, color="0.8", lw=1, zorder=0)
left.plot(*mean.T, ".", ms=12, alpha=0.15, mew=0, color="C0", label="with order")
left.plot(*swapping.T, ".", ms=2, alpha=0.6, mew=0, color="C1", label="without order")
left.set(xlabel="mean of component 1, minutes", ylabel="mean of component 2, minutes")
for handle in left.legend(loc="lower left").legend_handles:
    handle.set(alpha=1, markersize=9)
right.hist(minutes.numpy(), np.arange(42, 99, 2), density=True, color="0.85", label="272 waits")
low, middle, high = np.quantile(density.numpy(), [0.05, 0.5, 0.95], axis=0)
right.fill_between(grid, low, high, color="C0", alpha=0.3, lw=0, label="90% interval")
right.plot(grid, middle, color="C0", label="density")
right.set(xlabel="minutes to the next eruption", yticks=[])
right.spines["left"].set_visible(False)
right.legend(loc="upper left")
figure.savefig(out / "old_faithful.png")
plt.close(figure)

# %% [markdown]
# ## What the verdict means here
# It judges how well the posterior you asked for was found, and both were. A fit that had found one
# of the two copies would have been told nothing by its own weights, which see only what the guide
# reaches: that is why the fit starts from many places, and why `posterior.diagnose()` searches for
# mass where the guide hardly draws. That one labelling is enough is a thing to put in the model.
