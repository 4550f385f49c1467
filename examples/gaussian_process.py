"""Gaussian process: a crash test whose noise changes.

A dummy's head in a simulated motorcycle crash: nothing for 14 milliseconds, then a blow and its
echo. How does the acceleration run, and how exact are the readings at each moment? A Gaussian
process with noise that depends on time answers both; its hyperparameters are what is fitted.

    python examples/gaussian_process.py [--out DIR]
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
# 133 readings (Silverman 1985, Journal of the Royal Statistical Society B 47): milliseconds after
# the impact, and acceleration in g. Every third reading is held out, to judge by.

# %%
time = torch.tensor([float(word) for word in """
2.4 2.6 3.2 3.6 4 6.2 6.6 6.8 7.8 8.2 8.8 8.8 9.6 10 10.2 10.6 11 11.4 13.2 13.6 13.8 14.6 14.6
14.6 14.6 14.6 14.6 14.8 15.4 15.4 15.4 15.4 15.6 15.6 15.8 15.8 16 16 16.2 16.2 16.2 16.4 16.4
16.6 16.8 16.8 16.8 17.6 17.6 17.6 17.6 17.8 17.8 18.6 18.6 19.2 19.4 19.4 19.6 20.2 20.4 21.2
21.4 21.8 22 23.2 23.4 24 24.2 24.2 24.6 25 25 25.4 25.4 25.6 26 26.2 26.2 26.4 27 27.2 27.2 27.2
27.6 28.2 28.4 28.4 28.6 29.4 30.2 31 31.2 32 32 32.8 33.4 33.8 34.4 34.8 35.2 35.2 35.4 35.6 35.6
36.2 36.2 38 38 39.2 39.4 40 40.4 41.6 41.6 42.4 42.8 42.8 43 44 44.4 45 46.6 47.8 47.8 48.8 50.6
52 53.2 55 55 55.4 57.6
""".split()], dtype=torch.float64)
acceleration = torch.tensor([float(word) for word in """
0 -1.3 -2.7 0 -2.7 -2.7 -2.7 -1.3 -2.7 -2.7 -1.3 -2.7 -2.7 -2.7 -5.4 -2.7 -5.4 0 -2.7 -2.7 0 -13.3
-5.4 -5.4 -9.3 -16 -22.8 -2.7 -22.8 -32.1 -53.5 -54.9 -40.2 -21.5 -21.5 -50.8 -42.9 -26.8 -21.5
-50.8 -61.7 -5.4 -80.4 -59 -71 -91.1 -77.7 -37.5 -85.6 -123.1 -101.9 -99.1 -104.4 -112.5 -50.8
-123.1 -85.6 -72.3 -127.2 -123.1 -117.9 -134 -101.9 -108.4 -123.1 -123.1 -128.5 -112.5 -95.1 -81.8
-53.5 -64.4 -57.6 -72.3 -44.3 -26.8 -5.4 -107.1 -21.5 -65.6 -16 -45.6 -24.2 9.5 4 12 -21.5 37.5
46.9 -17.4 36.2 75 8.1 54.9 48.2 46.9 16 45.6 1.3 75 -16 -54.9 69.6 34.8 32.1 -37.5 22.8 46.9 10.7
5.4 -1.3 -21.5 -13.3 30.8 -10.7 29.4 0 -10.7 14.7 -1.3 0 10.7 10.7 -26.8 -14.7 -13.3 0 10.7 -14.7
-2.7 10.7 -2.7 10.7
""".split()], dtype=torch.float64)
held_out = torch.arange(len(time)) % 3 == 2
t, y = time[~held_out], acceleration[~held_out] / 50  # in units of 50 g

# %% [markdown]
# ## The model
# The curve is a Gaussian process with two hyperparameters, a size and a time scale. The logarithm
# of the noise runs linearly between nine knots. The curve itself is integrated out: what is left of
# it is a covariance matrix.

# %%
knots, step = 9, 7.5


def noise(log_noise, t):
    """Deviation of a reading at each time."""
    i = (t / step).long().clamp(max=knots - 2)
    share = t / step - i
    return (log_noise[..., i] * (1 - share) + log_noise[..., i + 1] * share).exp()


def covariance(size, scale, s, t):
    """Squared-exponential covariance of the curve at times s and t."""
    distance = (s[:, None] - t) / scale[..., None, None]
    return size[..., None, None] ** 2 * (-0.5 * distance**2).exp()


def model(t, y):
    """Readings of a smooth curve, with noise that changes."""
    size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(1.6, 0.5))
    log_noise = pyro.sample("log_noise", dist.Normal(-1.5, 1.5).expand([knots]).to_event(1))
    total = covariance(size, scale, t, t) + torch.diag_embed(noise(log_noise, t) ** 2 + 1e-6)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(t)), total), obs=y)


# %% [markdown]
# ## The fit

# %%
posterior = NFVI(model, seed=0).run(t, y)
print(posterior.summary())

# %% [markdown]
# ## The answer
# For each draw of the hyperparameters, the curve at any time is Gaussian, in closed form; over all
# draws, this is what is known of the curve, and with the noise what is known of a reading.

# %%
draws = posterior.resample(1000)
size, scale, log_noise = draws["size"], draws["scale"], draws["log_noise"]
inverse = torch.linalg.inv(covariance(size, scale, t, t)
                           + torch.diag_embed(noise(log_noise, t) ** 2 + 1e-6))


def curve(at):
    """Draws of the curve and of a reading at these times, in g."""
    gain = covariance(size, scale, at, t) @ inverse
    mean = gain @ y
    variance = size[:, None] ** 2 - (gain * covariance(size, scale, at, t)).sum(-1)
    smooth = dist.Normal(mean, variance.clamp(min=1e-9).sqrt()).sample()
    return 50 * smooth, 50 * dist.Normal(smooth, noise(log_noise, at)).sample()


_, readings = curve(time[held_out])
low, high = np.quantile(readings.numpy(), [0.05, 0.95], axis=0)
inside = (low <= acceleration[held_out].numpy()) & (acceleration[held_out].numpy() <= high)
print(f"held-out readings in their 90% intervals: {inside.sum()} of {len(inside)}")
deviation = 50 * noise(log_noise, torch.tensor([5.0, 15.0, 30.0, 50.0]).double()).mean(0)
print("noise at 5, 15, 30 and 50 ms:", ", ".join(f"{value:.0f} g" for value in deviation))

# %%
grid = torch.linspace(0.0, 60.0, 241, dtype=torch.float64)
smooth, readings = (part.numpy() for part in curve(grid))
figure, ax = plt.subplots(figsize=(8.5, 4.4))
ax.fill_between(grid, *np.quantile(readings, [0.05, 0.95], axis=0), color="0.9", lw=0,
                label="90% interval of a reading")
ax.fill_between(grid, *np.quantile(smooth, [0.05, 0.95], axis=0), color="C0", alpha=0.4, lw=0,
                label="90% interval of the curve")
ax.plot(grid, smooth.mean(0), color="C0")
ax.plot(t, 50 * y, "o", ms=3, color="0.2", label="readings")
ax.plot(time[held_out], acceleration[held_out], "o", ms=4, mfc="white", color="C1",
        label="held out")
ax.set(xlabel="milliseconds after the impact", ylabel="acceleration in g", xlim=(0, 60))
ax.legend(loc="lower right")
figure.savefig(out / "gaussian_process.png")
plt.close(figure)

# %% [markdown]
# ## What the verdict means here
# Eleven hyperparameters, and weights with a light tail: the weighted draws are the posterior's. One
# often takes the single best hyperparameters instead; the table shows how unsure they are, and the
# bands above contain that doubt.
