"""A variational autoencoder with a normalizing-flow posterior, on handwritten digits.

1,797 images of 8 x 8 pixels in 17 shades of grey (scikit-learn's digits). Each image has two
latents; an encoder reads its posterior off the image, a decoder draws images from latents. What one
learns here: how to choose likelihood, networks and posterior, train with validation data, judge the
fit on images never seen, and hand the latents to ArviZ. Run it again with ``--posterior gaussian``:
with few latents posteriors bend, and a flow is worth a nat an image.

    python examples/vae.py [--posterior iaf] [--latent-dim 2] [--data FILE] [--out DIR]

``--data`` reads an npz file in place of the digits: binarized MNIST (arrays train, valid and test,
the 784 bits of an image packed in 98 bytes) or the Frey faces (array images, 560 bytes each).
"""

from __future__ import annotations

import argparse
import pickle
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pyro_nfvi import iaf, nsf, planar, sylvester
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    DiagonalGaussian,
    DiscretizedLogistic,
    FlowPosterior,
    FullGaussian,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    TrainingHistory,
)

POSTERIORS = {"gaussian": DiagonalGaussian, "full": FullGaussian,
              "planar": partial(FlowPosterior, recipe=planar),
              "iaf": partial(FlowPosterior, recipe=iaf),
              "sylvester": partial(FlowPosterior, recipe=sylvester),
              "spline": partial(FlowPosterior, recipe=nsf)}
NUM_JUDGED, NUM_WRITTEN = 1000, 100  # held-out images in the figures, and in the NetCDF file


@dataclass
class Images:
    """Images in three parts, and how to model them.

    Attributes:
        name: What they are.
        likelihood: Their distribution given the decoder's output.
        train: To learn from.
        valid: To choose the epoch by.
        test: To judge by.
        classes: What to colour the test images by, if anything.
        num_epochs: How long to train unless told.
    """

    name: str
    likelihood: Likelihood
    train: Tensor
    valid: Tensor
    test: Tensor
    classes: np.ndarray | None
    num_epochs: int


def digits() -> Images:
    """The digits of scikit-learn."""
    bundle = load_digits()
    x, order = torch.as_tensor(bundle.images), _shuffled(len(bundle.images))
    train, valid, test = order.split([1297, 250, 250])
    return Images("digits", DiscretizedLogistic((8, 8), num_levels=17), x[train], x[valid],
                  x[test], bundle.target[test], num_epochs=300)


def from_file(path: Path) -> Images:
    """Binarized MNIST or Frey faces, told apart by the names of their arrays."""
    arrays = _arrays(path)
    sizes = {name: array.shape[1:] for name, array in arrays.items()}
    if sizes == dict.fromkeys(("train", "valid", "test"), (98,)):
        return mnist(arrays)
    if sizes.get("images") == (560,):
        return frey_faces(arrays["images"])
    raise ValueError(f"{path} should hold the arrays train, valid and test, of 98 bytes an image "
                     f"(binarized MNIST), or images, of 560 (Frey faces); it holds "
                     f"{', '.join(f'{name} {size}' for name, size in sizes.items()) or 'none'}.")


def mnist(arrays: dict[str, np.ndarray]) -> Images:
    """Binarized MNIST, in the parts of the file."""
    parts = [torch.as_tensor(np.unpackbits(arrays[name], axis=1)).reshape(-1, 28, 28)
             for name in ("train", "valid", "test")]
    return Images("mnist", Bernoulli((28, 28)), *parts, None, num_epochs=20)


def frey_faces(images: np.ndarray) -> Images:
    """Frames of a film of one face, shuffled; their place in the film is their colour."""
    x, order = torch.as_tensor(images).reshape(-1, 28, 20), _shuffled(len(images))
    train, valid, test = order.split([len(x) - 400, 200, 200])
    return Images("frey_faces", DiscretizedLogistic((28, 20)), x[train], x[valid], x[test],
                  test.numpy(), num_epochs=200)


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable npz file ({error}).") from error


def build(images: Images, posterior: str, latent_dim: int) -> VAE:
    """Networks with one hidden layer on either side, and the posterior of that name."""
    likelihood = images.likelihood
    shape = likelihood.event_shape
    return VAE(likelihood, latent_dim, posterior=POSTERIORS[posterior],
               encoder=MLPEncoder(shape, (400,)),
               decoder=MLPDecoder(latent_dim, shape, likelihood.num_params, (400,)))


def judge(vae: VAE, x: Tensor) -> None:
    """Print how well images never seen are modelled."""
    print(f"held-out ELBO       {vae.elbo(x, num_particles=50).mean():.2f} nats an image")
    print(f"log-likelihood      {vae.log_likelihood(x, num_samples=500)}")
    print(f"active units        {int(vae.active_units(x).sum())} of {vae.latent_dim}")
    print(f"amortization gap    {vae.amortization_gap(x[:100], seed=0)}")


def mosaic(ax: plt.Axes, rows: Tensor, title: str) -> None:
    """Draw images ``(rows, columns, height, width)`` side by side, a pixel of space between."""
    shown = torch.nn.functional.pad(rows, (0, 1, 0, 1), value=torch.nan)
    height, width = shown.shape[0] * shown.shape[2], shown.shape[1] * shown.shape[3]
    canvas = shown.movedim(1, 2).reshape(height, width).numpy()
    ax.imshow(canvas, cmap="gray_r", interpolation="none")
    ax.set_title(title, loc="left")
    ax.axis("off")


def latent_map(ax: plt.Axes, vae: VAE, x: Tensor, classes: np.ndarray | None) -> None:
    """Draw posterior means, by their first two principal components if there are more."""
    z = vae.latents(x).mean(0)
    z = z - z.mean(0)
    if vae.latent_dim > 2:
        z = z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T
    few = classes is not None and len(np.unique(classes)) <= 10
    colours = {} if classes is None else {"c": classes, "cmap": "tab10" if few else "viridis"}
    dots = ax.scatter(*z[:, :2].T.numpy(), s=14, alpha=0.85, lw=0, **colours)
    if few:
        ax.legend(*dots.legend_elements(), frameon=False, loc="center left",
                  bbox_to_anchor=(1, 0.5))
    ax.set_title("Latent map", loc="left")


def picture(vae: VAE, images: Images, path: Path) -> None:
    """Draw reconstructions, samples, and where the images are among the latents."""
    figure, axes = plt.subplot_mosaic("ac;bc", figsize=(13, 6.2), layout="constrained")
    x = images.test[:12].float()
    mosaic(axes["a"], torch.stack([x, vae.reconstruct(x)]), "Held-out images, reconstructions")
    samples = vae.generate(36, mean=True)
    mosaic(axes["b"], samples.unflatten(0, (3, 12)), "New images")
    classes = None if images.classes is None else images.classes[:NUM_JUDGED]
    latent_map(axes["c"], vae, images.test[:NUM_JUDGED], classes)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(images: Images, posterior: str, latent_dim: int, num_epochs: int, seed: int,
        out: Path) -> tuple[VAE, TrainingHistory]:
    """Train, judge, draw and write."""
    pyro.set_rng_seed(seed)
    vae = build(images, posterior, latent_dim)
    start = time.perf_counter()
    history = vae.fit(images.train, num_epochs=num_epochs, validation=images.valid, seed=seed)
    print(f"training time       {time.perf_counter() - start:.1f} s, {num_epochs} epochs, "
          f"best {history.best_epoch}")
    judge(vae, images.test[:NUM_JUDGED])
    picture(vae, images, out / f"vae_{images.name}.png")
    few = slice(NUM_WRITTEN)
    coords = {} if images.classes is None else {"data": images.classes[few]}
    vae.to_arviz(images.test[few], coords=coords).to_netcdf(out / f"vae_{images.name}.nc")
    return vae, history


def main() -> None:
    """Fit one VAE."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where files go")
    parser.add_argument("--data", type=Path, help="npz file; default: scikit-learn's digits")
    parser.add_argument("--posterior", choices=POSTERIORS, default="iaf")
    parser.add_argument("--latent-dim", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="default: as many as suit the data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        images = digits() if options.data is None else from_file(options.data)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    run(images, options.posterior, options.latent_dim, options.epochs or images.num_epochs,
        options.seed, options.out)
    print(f"Files in {options.out}/")


if __name__ == "__main__":
    main()
