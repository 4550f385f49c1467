"""Densities from samples: a picture, and a likelihood for a simulator.

A flow can learn the density of points from the points alone. How well does it do on two crescents,
and can a learned density stand in for a likelihood that one cannot write down, only simulate?

    python examples/density_estimation.py [--out DIR]
"""

# %%
import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import make_moons

from pyro_nfvi import NFVI, fit_density, nsf, plot_flow

pyro.set_rng_seed(0)

# %% tags=["remove-cell"]
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
out = parser.parse_known_args()[0].out
out.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
                     "legend.frameon": False, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Two moons
# 2,000 points of scikit-learn's crescents. A tenth of them is held out and stops the fit; another
# 5,000, drawn afterwards, are to judge by.

# %%
points, _ = make_moons(2000, noise=0.1, random_state=0)
moons = fit_density(nsf, samples=points, num_steps=2000, seed=0, progress=False)
print(moons)
new = torch.as_tensor(make_moons(5000, noise=0.1, random_state=1)[0])
mean, covariance = (torch.as_tensor(part) for part in (points.mean(0), np.cov(points.T)))
gaussian = dist.MultivariateNormal(mean, covariance)
print(f"negative log-likelihood of new points: flow {-moons.log_prob(new).mean():.3f}, "
      f"Gaussian {-gaussian.log_prob(new).mean():.3f} nats")

# %% [markdown]
# What it has learned: the density, draws from it, and below the grid of the noise, bent further and
# further by the layers.

# %%
axes = plot_flow(moons, samples=points, num_layers=2)
axes[0].figure.get_figure(root=True).savefig(out / "density_estimation.png")
plt.close("all")

# %% [markdown]
# ## A likelihood that can only be simulated
# A simulator takes a location and a log-scale and returns one number. (This one adds Gumbel
# noise, so that its likelihood is known after all, and the answer can be checked.) It is run
# 40,000 times, with parameters from the prior, and a flow learns the density of the outcome *given*
# the parameters.


# %%
def simulate(theta):
    """One outcome for each row of parameters."""
    noise = -(-torch.rand(len(theta)).log()).log()
    return theta[:, 0] + theta[:, 1].exp() * noise


runs = torch.randn(40_000, 2)
emulator = fit_density(partial(nsf, num_layers=1), samples=simulate(runs), context=runs,
                       num_steps=1500, seed=0, progress=False)
print(emulator)

# %% [markdown]
# ## Inference with it
# Given parameters, the emulator is a Pyro distribution like any other. Twenty observations, the
# same model with the emulator and with the exact likelihood. (As the emulator is a network that
# runs for each observation, fewer particles than usual make a step.)

# %%
truth = torch.tensor([[1.0, -0.5]])
y = simulate(truth.expand(20, 2)).unsqueeze(-1)


def model(likelihood, y):
    """Parameters with standard normal priors, independent outcomes."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("outcomes", len(y)):
        pyro.sample("y", likelihood(theta.expand(len(y), 2)), obs=y)


def exact_likelihood(theta):
    """What the emulator has never seen."""
    return dist.Gumbel(theta[..., :1], theta[..., 1:].exp()).to_event(1)


emulated = NFVI(partial(model, emulator.condition), num_particles=64, seed=0).run(y)
exact = NFVI(partial(model, exact_likelihood), seed=0).run(y)
for name, posterior in (("emulated", emulated), ("exact", exact)):
    print(f"{name} likelihood\n{posterior.summary()}\n")

# %% [markdown]
# ## The answer
# The two posteriors lie on each other, up to what 40,000 runs can teach.

# %%
ours, theirs = (posterior.resample(10_000)["theta"].double() for posterior in (emulated, exact))
gap = ((ours.mean(0) - theirs.mean(0)) / theirs.std(0)).abs().max()
print(f"largest gap of the means: {gap:.2f} standard deviations")
figure, ax = plt.subplots(figsize=(5.5, 4.4))
for draws, color, name in ((theirs, "0.5", "exact likelihood"), (ours, "C0", "emulated")):
    ax.plot(*draws[:1500].T, ".", ms=3, alpha=0.5, color=color, label=name)
ax.plot(*truth[0], "+", ms=14, mew=2, color="C1", label="truth")
ax.set(xlabel="location", ylabel="log of the scale")
ax.legend(markerscale=1.0)
figure.savefig(out / "density_estimation_posterior.png")
plt.close(figure)

# %% [markdown]
# ## What the verdict means here
# Both verdicts are good: each posterior is the one its likelihood asks for. They cannot know that
# the emulator is not quite the simulator; held-out runs can (`emulator` prints their score), and so
# can simulation-based calibration (`calibrate`).
