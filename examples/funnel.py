"""Neal's funnel: where a Gaussian fails, and what the verdict says.

The funnel is the shape of many hierarchical posteriors: a scale, and values that have much room
where it is large and none where it is small. Its answer is known exactly. Who finds it: a Gaussian,
a flow, or neither; and would you be told?

    python examples/funnel.py [--out DIR]
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_nfvi import NFVI, CompiledTrace_ELBO, Posterior, compare

pyro.set_rng_seed(0)

# %% tags=["remove-cell"]
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
out = parser.parse_known_args()[0].out
out.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
                     "legend.frameon": False, "figure.constrained_layout.use": True})

# %% [markdown]
# ## The model
# The logarithm of a variance, and nine values with that variance (Neal 2003, Annals of Statistics
# 31, section 8). There are no data: the posterior is the prior, so `v` is normal with deviation 3.


# %%
def model():
    """A scale, and what depends on it."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("value", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


# %% [markdown]
# ## A Gaussian
# Pyro's guide of full covariance, trained by Pyro's own loop, and the verdict on it.

# %%
guide = AutoMultivariateNormal(model)
svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.999}),
          CompiledTrace_ELBO(num_particles=32))
for _ in range(2000):
    svi.step()
gaussian = Posterior.of(model, guide)
print(gaussian.summary().verdict)

# %% [markdown]
# ## A flow
# `NFVI` tries Gaussians first as well, from many starts, and goes on because they are not enough.

# %%
posterior = NFVI(model, seed=0).run()
for stage in posterior.history.stages:
    print(f"{stage.name:16} k-hat {stage.pareto_k:.2f}")
print(posterior.summary())

# %%
print(compare({"flow": posterior, "Gaussian": gaussian}).to_string())

# %% [markdown]
# ## The answer
# On the left and in the middle draws of both, over the true contours: the Gaussian sits where all
# ten numbers are moderate, and knows of neither neck nor mouth; the flow fills the funnel. On the
# right `v` itself, whose truth is a normal distribution.

# %%
flow, wrong = posterior.sample(4000), gaussian.sample(4000)
x_grid, v_grid = np.meshgrid(np.linspace(-25, 25, 200), np.linspace(-9, 9, 200))
log_density = -(v_grid**2) / 18 - x_grid**2 / 2 / np.exp(v_grid) - v_grid / 2  # of one value and v

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 4), sharey=True)
for ax, draws, color, name in ((left, wrong, "C1", "Gaussian"), (middle, flow, "C0", "flow")):
    ax.contour(x_grid, v_grid, log_density, levels=[-6, -4, -2, 0], colors="0.75", linewidths=1,
               linestyles="solid")
    ax.plot(draws["x"][:, 0], draws["v"], ".", ms=2, alpha=0.4, color=color)
    ax.set(xlabel="x[0]", title=name, xlim=(-25, 25), ylim=(-9, 9))
left.set_ylabel("v")
bins = np.linspace(-9, 9, 46)
for draws, color, name in ((wrong, "C1", "Gaussian"), (flow, "C0", "flow")):
    right.hist(draws["v"].numpy(), bins, density=True, histtype="step", lw=1.8, color=color,
               label=name, orientation="horizontal")
v = np.linspace(-9, 9, 200)
right.plot(np.exp(-(v**2) / 18) / 3 / np.sqrt(2 * np.pi), v, color="0.3", lw=1, label="truth")
right.set(title="density of v", xticks=[])
right.spines["bottom"].set_visible(False)
right.legend(loc="upper right")
figure.savefig(out / "funnel.png")
plt.close(figure)
print(f"deviation of v, truly 3: Gaussian {wrong['v'].std():.2f}, flow {flow['v'].std():.2f}")

# %% [markdown]
# ## Another way out
# A funnel can also be taken out of the model: Pyro rewrites `x` as a standard normal times the
# scale, and the Gaussian stage is enough.

# %%
straight = pyro.poutine.reparam(model, {"x": LocScaleReparam(0.0)})
reparametrized = NFVI(straight, seed=0).run()
print(reparametrized.history.stages[-1].name, reparametrized.summary().verdict)

# %% [markdown]
# ## What the verdict means here
# The Gaussian looks converged: its loss is flat. Its importance weights tell, because a few draws
# from its edge carry most of the weight. The flow's verdict is good, and its `v` is all but as wide
# as it should be. Reparametrise where you can; where the data decide which form is better, or the
# funnel is hidden in a larger model, the flow follows it as it is.
