"""Golf putting: what a model of the stroke is worth.

How likely is a professional to hole a putt, given the distance? A curve through the data is one
answer; a model with the geometry of ball and hole in it is another, and the data can choose.

    python examples/golf_putting.py [--out DIR]
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
# Putts from 2 to 20 feet, and how many of them were holed (Berry 1996, Statistics: A Bayesian
# Perspective; Gelman & Nolan 2002, Teaching Statistics 24).

# %%
feet = torch.arange(2.0, 21.0)
tries = torch.tensor([1443.0, 694, 455, 353, 272, 256, 240, 217, 200, 237, 202, 192, 174, 167, 201,
                      195, 191, 147, 152])
holed = torch.tensor([1346.0, 577, 337, 208, 149, 136, 111, 69, 67, 75, 52, 46, 54, 28, 27, 31, 33,
                      20, 24])

# %% [markdown]
# ## Two models
# The first is logistic regression. The second says that the angle of a stroke is normal around the
# straight line, and that a putt is holed if the whole ball would pass over the hole: the angle must
# be smaller than the one under which half the difference of their widths is seen.


# %%
def logistic(feet, tries, holed=None):
    """Log-odds that fall with distance."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("distance", len(feet)):
        putts = dist.Binomial(tries, logits=intercept + slope * feet)
        pyro.sample("holed", putts, obs=holed)


hole, ball = 4.25 / 12, 1.68 / 12  # diameters in feet


def geometric(feet, tries, holed=None):
    """A normal angle that has to be small enough."""
    degrees = pyro.sample("degrees", dist.HalfNormal(10.0))
    angle = torch.asin((hole - ball) / 2 / feet)
    within = 2 * dist.Normal(0.0, 1.0).cdf(angle / torch.deg2rad(degrees)) - 1
    with pyro.plate("distance", len(feet)):
        pyro.sample("holed", dist.Binomial(tries, probs=within), obs=holed)


# %% [markdown]
# ## The fits

# %%
curve = NFVI(logistic, seed=0).run(feet, tries, holed)
print(curve.summary())

# %%
stroke = NFVI(geometric, seed=0).run(feet, tries, holed)
print(stroke.summary())

# %% [markdown]
# ## The answer
# Both verdicts are good: both posteriors are computed right. Which *model* is right is another
# question. Where k-hat is low, the ELBO is all but the log evidence, so its difference is the log
# Bayes factor; and putts simulated from each fit should look like those that were played.

# %%
curve_draws, degrees = curve.resample(1000), stroke.resample(1000)["degrees"][:, None]


def chances(distance):
    """Draws of the chance to hole from these distances, by model."""
    logits = curve_draws["intercept"][:, None] + curve_draws["slope"][:, None] * distance
    angle = torch.asin((hole - ball) / 2 / distance) / torch.deg2rad(degrees)
    return {"curve": torch.sigmoid(logits), "stroke": 2 * dist.Normal(0.0, 1.0).cdf(angle) - 1}


print(f"log Bayes factor, stroke against curve: {stroke.elbo[0] - curve.elbo[0]:.0f}")
for name, chance in chances(feet).items():
    low, high = np.quantile(dist.Binomial(tries, chance).sample(), [0.03, 0.97], axis=0)
    inside = ((low <= holed.numpy()) & (holed.numpy() <= high)).sum()
    print(f"{name}: {inside} of {len(feet)} distances within their 94% predictive intervals")

# %% [markdown]
# One number, an error of the angle of a degree and a half, does better than two. The picture says
# where the curve goes wrong: it cannot fall steeply near the hole and slowly far from it. The
# stroke is not the whole truth either: from 6 to 8 feet, professionals hole more than it says.

# %%
share = holed / tries
error = (share * (1 - share) / tries).sqrt()
distance = torch.linspace(1.0, 21.0, 100)

figure, ax = plt.subplots(figsize=(7.5, 4.2))
labels = {"curve": "curve: logistic regression", "stroke": "stroke: geometry"}
for (name, chance), color in zip(chances(distance).items(), ("C1", "C0"), strict=True):
    low, middle, high = np.quantile(chance, [0.03, 0.5, 0.97], axis=0)
    ax.fill_between(distance, low, high, color=color, alpha=0.3, lw=0)
    ax.plot(distance, middle, color=color, label=labels[name])
ax.errorbar(feet, share, error, fmt="o", ms=4, color="0.2", label="data, with standard errors")
ax.set(xlabel="distance in feet", ylabel="share of putts holed", ylim=(0, 1), xlim=(1, 21),
       xticks=range(2, 21, 3))
ax.legend()
figure.savefig(out / "golf_putting.png")
plt.close(figure)

# %% [markdown]
# ## What the verdict means here
# A verdict is about the fit, never about the model: the logistic curve gets a good one while it
# misses the data by many standard errors. Look at the posterior predictive distribution, or compare
# models, before you believe a number.
