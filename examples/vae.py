"""A variational autoencoder: what a flow adds to the encoder.

Handwritten digits, drawn from two latents each. An encoder reads the posterior of the latents off
an image, a decoder draws the image: how well are images modelled that neither has seen, and is a
flow in the encoder worth it?

    python examples/vae.py [--latent-dim 2] [--epochs N] [--data FILE] [--out DIR]

``--data`` reads an npz file in place of the digits: binarized MNIST (arrays train, valid and test,
the 784 bits of an image packed in 98 bytes) or the Frey faces (array images, 560 bytes each).
"""

# %%
import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits

from pyro_nfvi import iaf
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    DiagonalGaussian,
    DiscretizedLogistic,
    FlowPosterior,
    MLPDecoder,
    MLPEncoder,
)

pyro.set_rng_seed(0)

# %% tags=["remove-cell"]
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
parser.add_argument("--data", type=Path, help="npz file; default: scikit-learn's digits")
parser.add_argument("--latent-dim", type=int, default=2)
parser.add_argument("--epochs", type=int, default=150)
options = parser.parse_known_args()[0]
out, latent_dim, num_epochs = options.out, options.latent_dim, options.epochs
out.mkdir(parents=True, exist_ok=True)
plt.rcParams.update({"savefig.dpi": 110, "legend.frameon": False,
                     "figure.constrained_layout.use": True})


def from_file(path):
    """Likelihood, images to learn from, to choose the epoch by and to judge by, and no classes."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, EOFError) as error:
        parser.error(f"{path} is not a readable npz file ({error})")
    if {name: array.shape[1:] for name, array in arrays.items()} == dict.fromkeys(
            ("train", "valid", "test"), (98,)):
        parts = [torch.as_tensor(np.unpackbits(arrays[name], axis=1)).reshape(-1, 28, 28)
                 for name in ("train", "valid", "test")]
        return Bernoulli((28, 28)), *parts, None
    if "images" not in arrays or arrays["images"].shape[1:] != (560,):
        parser.error(f"{path} should hold the arrays train, valid and test, of 98 bytes an image, "
                     f"or images, of 560; it holds {', '.join(arrays) or 'none'}")
    x = torch.as_tensor(arrays["images"]).reshape(-1, 28, 20)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [x[rows] for rows in order.split([len(x) - 400, 200, 200])]
    return DiscretizedLogistic((28, 20)), *parts, None


# %% [markdown]
# ## The data
# 1,797 images of 8 by 8 pixels in 17 shades of grey (Alpaydin & Kaynak 1998), as scikit-learn ships
# them: to learn from, to choose the epoch by, and to judge by.


# %%
def digits():
    """Likelihood, three parts of the images, and which digit each of the last part is."""
    bundle = load_digits()
    x, classes = torch.as_tensor(bundle.images), bundle.target
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, valid, test = order.split([1297, 250, 250])
    return DiscretizedLogistic((8, 8), num_levels=17), x[train], x[valid], x[test], classes[test]


likelihood, train, valid, test, classes = from_file(options.data) if options.data else digits()

# %% [markdown]
# ## Two autoencoders
# The same networks, a layer of 400 units each, with a Gaussian posterior for the latents of an
# image and with one that a flow bends. A `DiscretizedLogistic` pixel gives every shade of grey its
# probability.


# %%
def autoencoder(posterior):
    """A VAE with one hidden layer on either side, trained."""
    shape = likelihood.event_shape
    vae = VAE(likelihood, latent_dim, posterior=posterior, encoder=MLPEncoder(shape, (400,)),
              decoder=MLPDecoder(latent_dim, shape, likelihood.num_params, (400,)))
    vae.fit(train, num_epochs=num_epochs, validation=valid, seed=0, progress=False)
    return vae


vaes = {"Gaussian": autoencoder(DiagonalGaussian),
        "flow": autoencoder(partial(FlowPosterior, recipe=iaf))}

# %% [markdown]
# ## The answer
# On images that neither has seen. The ELBO is what was trained; the log-likelihood is estimated by
# importance sampling; the amortization gap is what each image would gain from a posterior of its
# own, with this decoder.

# %%
judged = test[:1000]
for name, vae in vaes.items():
    elbo = vae.elbo(judged, num_particles=50).mean()
    print(f"{name}\n  held-out ELBO   {elbo:.2f} nats an image\n"
          f"  log-likelihood  {vae.log_likelihood(judged, num_samples=200)}\n"
          f"  amortization    {vae.amortization_gap(judged[:100], seed=0)}\n"
          f"  active units    {int(vae.active_units(judged).sum())} of {latent_dim}")


# %%
def mosaic(ax, rows, title):
    """Draw images `(rows, columns, height, width)` side by side."""
    shown = torch.nn.functional.pad(rows, (0, 1, 0, 1), value=torch.nan)
    height, width = shown.shape[0] * shown.shape[2], shown.shape[1] * shown.shape[3]
    ax.imshow(shown.movedim(1, 2).reshape(height, width).numpy(), cmap="gray_r",
              interpolation="none")
    ax.set_title(title, loc="left", fontsize=10)
    ax.axis("off")


vae = vaes["flow"]
figure, axes = plt.subplot_mosaic("ac;bc", figsize=(10.5, 3.8), width_ratios=(3, 2),
                                  height_ratios=(2, 3))
few = test[:12].float()
mosaic(axes["a"], torch.stack([few, vae.reconstruct(few)]), "held-out images, reconstructions")
mosaic(axes["b"], vae.generate(36, mean=True).unflatten(0, (3, 12)), "new images")
z = vae.latents(judged).mean(0)
axes["c"].set_title("latents of held-out images", loc="left", fontsize=10)
if classes is None:
    axes["c"].plot(*z[:, :2].T, ".", ms=4, alpha=0.6)
else:
    dots = axes["c"].scatter(*z[:, :2].T, c=classes[:1000], cmap="tab10", s=14, alpha=0.85, lw=0)
    axes["c"].legend(*dots.legend_elements(), loc="center left", bbox_to_anchor=(1, 0.5))
axes["c"].spines[["top", "right"]].set_visible(False)
figure.savefig(out / "vae.png")
plt.close(figure)

# %% [markdown]
# The latents of the first hundred held-out images, with their reconstructions, for ArviZ:

# %%
coords = {} if classes is None else {"data": classes[:100]}
vae.to_arviz(test[:100], coords=coords).to_netcdf(out / "vae.nc")

# %% [markdown]
# ## What these numbers mean
# An autoencoder has no single verdict, as it has a posterior for each image; these four lines take
# its place. With two latents for a digit, posteriors bend around each other, and a flow is worth a
# nat an image or so. With many latents there is room, and a Gaussian does nearly as well: try
# `--latent-dim 16`.
