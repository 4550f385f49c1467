"""Sparse regression: which measurements predict diabetes?

Ten measurements of 442 patients, and how far their diabetes had gone a year later: which of them
matter? The regularized horseshoe says beforehand that few do, and is known to be hard to fit; one
way to write it gets a bad verdict here, another a good one.

    python examples/sparse_regression.py [--out DIR]
"""

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import gaussian_kde
from sklearn.datasets import load_diabetes

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
# Efron, Hastie, Johnstone & Tibshirani (2004, Annals of Statistics 32), as scikit-learn ships them;
# everything is standardised.

# %%
data = load_diabetes()
names = ["age", "sex", "body mass", "blood pressure", "total cholesterol", "LDL", "HDL",
         "cholesterol / HDL", "log triglycerides", "glucose"]
x, y = torch.as_tensor(data.data), torch.as_tensor(data.target)
x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
n, d = x.shape

# %% [markdown]
# ## The prior
# Each effect is normal with a width of its own, `tau * local`: half-Cauchy both, so that most
# effects are pulled to zero and a few escape; `slab` keeps those from running away. The scale of
# `tau` says that some three of ten effects are expected to matter (Piironen & Vehtari 2017,
# arXiv:1707.01694).


# %%
def widths(sigma):
    """Prior deviation of each effect."""
    tau = pyro.sample("tau", dist.HalfCauchy(3 / (d - 3) / n**0.5))
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 2.0))
    with pyro.plate("predictor", d):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
    wide = tau * sigma * local
    return wide * (slab / (slab + wide**2)).sqrt()


# %% [markdown]
# ## First try
# Effects as latents, in units of their widths, as one would write it for NUTS.


# %%
def direct(x, y):
    """Widths and effects."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    width = widths(sigma)
    with pyro.plate("effects", d):
        unit = pyro.sample("unit", dist.Normal(0.0, 1.0))
    effect = pyro.deterministic("effect", unit * width)
    with pyro.plate("patient", n):
        pyro.sample("y", dist.Normal(x @ effect, sigma), obs=y)


first = NFVI(direct, seed=0).run(x, y)
print(first.summary().verdict)

# %% [markdown]
# The verdict is not good: effect and width of a predictor that does not matter form a funnel, those
# of one that may or may not matter have two arms, and there are ten of each. The advice it gives
# would help; but here one can do better than the advice.
#
# ## The way out: integrate out what one can
# Given the widths, effects and data are jointly Gaussian, so the effects can be left out of the fit
# and drawn afterwards. Rotated by the orthogonal matrix of `x = q r`, the data fall into ten
# numbers that know of the effects, and a sum of squares that knows of `sigma` only; nothing is
# lost, and the matrices are ten by ten.

# %%
q, r = torch.linalg.qr(x)
rotated = q.T @ y
rest = (y @ y - rotated @ rotated).clamp(min=0)


def collapsed(rotated, rest):
    """Widths alone; the effects are integrated out."""
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    spread = r * widths(sigma)
    covariance = spread @ spread.T + sigma**2 * torch.eye(d)
    pyro.sample("rotated", dist.MultivariateNormal(torch.zeros(d), covariance), obs=rotated)
    pyro.sample("rest", dist.Gamma((n - d) / 2, 0.5 / sigma**2), obs=rest)


posterior = NFVI(collapsed, seed=0).run(rotated, rest)
print(posterior.summary())

# %% [markdown]
# The effects, given each draw of the widths, are drawn from their Gaussian:

# %%
draws = posterior.resample(4000)
sigma = draws["sigma"][:, None]
wide = draws["tau"][:, None] * sigma * draws["local"]
width = wide * (draws["slab"][:, None] / (draws["slab"][:, None] + wide**2)).sqrt()
precision = (r.T @ r) / sigma[..., None] ** 2 + torch.diag_embed(width**-2)
mean = torch.linalg.solve(precision, (r.T @ rotated) / sigma**2)
effects = dist.MultivariateNormal(mean, precision_matrix=precision).sample().numpy()
for name, low, middle, high in zip(names, *np.quantile(effects, [0.05, 0.5, 0.95], axis=0),
                                   strict=True):
    print(f"{name:20}{middle:7.2f}   90% interval {low:6.2f} to {high:5.2f}")

# %% [markdown]
# ## The answer
# Body mass, triglycerides and blood pressure matter, sex too; of the four cholesterols something
# does, but they say so much the same that the data cannot tell which. Least squares spreads large
# effects of opposite sign over them; the horseshoe pulls these in, and leaves the clear ones alone.

# %%
least_squares = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].numpy()
order = np.argsort(np.abs(np.median(effects, axis=0)))
figure, ax = plt.subplots(figsize=(7.5, 4.4))
grid = np.linspace(-0.75, 0.75, 301)
for row, i in enumerate(order):
    density = gaussian_kde(effects[:, i])(grid)
    height = 0.42 * density / density.max()
    ax.fill_between(grid, row - height, row + height, color="C0", alpha=0.6, lw=0)
ax.plot(least_squares[order], np.arange(d), "|", ms=14, mew=2, color="C1", label="least squares")
ax.plot([], [], lw=8, color="C0", alpha=0.6, label="posterior, horseshoe")
ax.axvline(0, color="0.8", lw=1, zorder=0)
ax.set(xlabel="effect on the progression, in standard deviations", yticks=np.arange(d),
       xlim=(-0.75, 0.75))
ax.set_yticklabels([names[i] for i in order])
ax.legend(loc="upper left")
figure.savefig(out / "sparse_regression.png")
plt.close(figure)

# %% [markdown]
# ## What the verdict means here
# The first verdict was a warning worth having: without it the draws look like any others. A model
# that is written for the sampler's comfort helps a flow as well, and the best latent is the one
# that is not there. Where nothing can be integrated out, `first.neutra()` runs NUTS through the
# flow, and `first.metropolis()` uses it as a proposal.
