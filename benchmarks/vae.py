"""Variational autoencoders: posteriors against each other, and training against Pyro's own.

    python benchmarks/vae.py --digits              # five posteriors on scikit-learn's digits
    python benchmarks/vae.py --step                # a compiled training step against SVI.step
    python benchmarks/vae.py --tutorial MNIST      # Pyro's tutorial VAE, at equal epochs
    python benchmarks/vae.py --mnist MNIST --epochs 100 [--conv --images 20000]
    python benchmarks/vae.py --frey FREY --epochs 500
    python benchmarks/vae.py --report              # results/vae.md

MNIST is a file of binarized images (arrays train, valid, test, bits packed along the row), FREY one
of Frey faces (array images, 28 x 20 pixels). Each run adds a line to results/vae.jsonl. With
``--conv`` the networks are the gated convolutions of van den Berg et al. (2018), arXiv:1803.05649;
without, those of Pyro's tutorial (one hidden layer of 400).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_nfvi import iaf, nsf, planar, sylvester
from pyro_nfvi.vae import (
    VAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    DiagonalGaussian,
    DiscretizedLogistic,
    FlowPosterior,
    FullGaussian,
    MLPDecoder,
    MLPEncoder,
    bits_per_dim,
)

RESULTS = Path(__file__).parent / "results"
POSTERIORS: dict[str, Callable] = {
    "diagonal Gaussian": DiagonalGaussian,
    "full Gaussian": FullGaussian,
    "planar": partial(FlowPosterior, recipe=planar),
    "IAF": partial(FlowPosterior, recipe=iaf),
    "Sylvester": partial(FlowPosterior, recipe=sylvester),
    "spline": partial(FlowPosterior, recipe=partial(nsf, num_layers=2, num_bins=5)),
}
PUBLISHED = {"diagonal Gaussian": 86.55, "planar": 86.06, "IAF": 84.20, "Sylvester": 83.32}


def note(**row: object) -> None:
    """Print a row and keep it."""
    row["threads"] = torch.get_num_threads()
    print(json.dumps(row), flush=True)
    with open(RESULTS / "vae.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def timed(function: Callable) -> tuple[object, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


# ---------------------------------------------------------------------- digits

def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test images, each pixel on with the probability of its grey."""
    from sklearn.datasets import load_digits
    grey = torch.tensor(load_digits().images / 16).float()
    images = torch.bernoulli(grey, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    train, valid, test = images[order].split([1200, 200, 397])
    return train, valid, test


def run_digits(num_epochs: int, seeds: int) -> None:
    train, valid, test = digits()
    for name in POSTERIORS:
        for seed in range(seeds):
            torch.manual_seed(seed)
            vae = VAE(Bernoulli((8, 8)), 10, posterior=POSTERIORS[name])
            history, seconds = timed(lambda vae=vae, seed=seed: vae.fit(
                train, num_epochs=num_epochs, batch_size=100, validation=valid, seed=seed,
                progress=False))
            elbo = vae.elbo(test, num_particles=200)
            likelihood = vae.log_likelihood(test, num_samples=500)
            note(kind="digits", posterior=name, seed=seed, epochs=num_epochs, seconds=seconds,
                 elbo=elbo.mean().item(), each=[round(v, 4) for v in elbo.tolist()],
                 log_likelihood=likelihood.mean, engine=history.engines[0].tier,
                 active=sum(history.active_units))


# ---------------------------------------------------------------------- Pyro's tutorial

class TutorialVAE(nn.Module):
    """The networks, model and guide of Pyro's VAE tutorial."""

    def __init__(self, num_pixels: int = 784, latent_dim: int = 50, hidden_dim: int = 400) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.hidden = nn.Sequential(nn.Linear(num_pixels, hidden_dim), nn.Softplus())
        self.loc, self.log_scale = (nn.Linear(hidden_dim, latent_dim) for _ in range(2))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, hidden_dim), nn.Softplus(),
                                     nn.Linear(hidden_dim, num_pixels), nn.Sigmoid())

    def model(self, x: Tensor) -> None:
        """Latent, then pixels."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zero = torch.zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("latent", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pixels = dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, x.shape[-1]))

    def guide(self, x: Tensor) -> None:
        """Encode."""
        for name in ("hidden", "loc", "log_scale"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", x.shape[0]):
            h = self.hidden(x.reshape(-1, x.shape[-1]))
            pyro.sample("latent", dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1))


def same_networks(num_pixels: int = 784, latent_dim: int = 50, hidden_dim: int = 400) -> VAE:
    return VAE(Bernoulli((num_pixels,)), latent_dim,
               encoder=MLPEncoder((num_pixels,), (hidden_dim,), nn.Softplus),
               decoder=MLPDecoder(latent_dim, (num_pixels,), 1, (hidden_dim,), nn.Softplus))


def pyro_epochs(svi: SVI, batches: DataLoader | list[Tensor], count: int) -> None:
    for _ in range(count):
        for batch in batches:
            svi.step(batch[0] if isinstance(batch, (list, tuple)) else batch)


def shuffled(x: Tensor, size: int) -> list[Tensor]:
    return list(x[torch.randperm(len(x))].split(size))


def run_tutorial(path: Path, num_epochs: int) -> None:
    """Equal networks, batches, rate and epochs; and the seconds of an epoch, side by side."""
    train, _, test = mnist(path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    theirs = TutorialVAE()
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    loader = DataLoader(TensorDataset(train), batch_size=256, shuffle=True)
    torch.manual_seed(0)
    ours = same_networks()
    seconds: dict[str, list[float]] = {"loader": [], "tensors": [], "ours": []}
    for _ in range(3):
        seconds["loader"].append(timed(lambda: pyro_epochs(svi, loader, 1))[1])
        seconds["tensors"].append(timed(lambda: pyro_epochs(svi, shuffled(train, 256), 1))[1])
        seconds["ours"].append(timed(lambda: ours.fit(
            train, num_epochs=2, batch_size=256, progress=False, seed=0))[1] / 2)
    pyro_epochs(svi, loader, num_epochs - 6)
    their_elbo = -sum(svi.evaluate_loss(part) for part in test.split(1000)) / len(test)
    torch.manual_seed(0)
    fresh = same_networks()
    history, total = timed(lambda: fresh.fit(train, num_epochs=num_epochs, batch_size=256,
                                             progress=False, seed=0))
    note(kind="tutorial", epochs=num_epochs, pyro_elbo=their_elbo,
         our_elbo=fresh.elbo(test, num_particles=10).mean().item(),
         pyro_loader=min(seconds["loader"]), pyro_tensors=min(seconds["tensors"]),
         ours=min(min(seconds["ours"]), total / num_epochs), total=total,
         engine=history.engines[0].tier, microseconds=history.engines[0].microseconds)


def run_step() -> None:
    """One training step, compiled, against ``SVI.step`` with networks of the same sizes."""
    for pixels, latent, hidden, size in ((64, 10, 400, 100), (64, 10, 64, 100),
                                         (784, 50, 400, 256), (784, 50, 400, 32)):
        x = torch.rand(size, pixels).round()
        pyro.clear_param_store()
        theirs = TutorialVAE(pixels, latent, hidden)
        svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        ours = same_networks(pixels, latent, hidden)
        data = x.repeat(40, 1)
        best: dict[str, list[float]] = {"pyro": [], "ours": []}
        for _ in range(5):
            best["pyro"].append(timed(partial(pyro_epochs, svi, [x] * 40, 1))[1] / 40)
            history = ours.fit(data, num_epochs=3, batch_size=size, progress=False)
            best["ours"].append(history.engines[0].microseconds / 1e6)
        note(kind="step", pixels=pixels, latent=latent, hidden=hidden, batch=size,
             pyro_ms=1e3 * min(best["pyro"]), our_ms=1e3 * min(best["ours"]),
             ratio=min(best["pyro"]) / min(best["ours"]), engine=history.engines[0].tier)


# ---------------------------------------------------------------------- images

def mnist(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    arrays = np.load(path)
    train, valid, test = (torch.from_numpy(np.ascontiguousarray(np.unpackbits(
        arrays[name], axis=1))).float() for name in ("train", "valid", "test"))
    return train, valid, test


def networks(conv: bool, shape: tuple[int, ...], latent_dim: int, num_params: int) -> dict:
    """Gated convolutions of van den Berg et al., or one hidden layer."""
    if not conv:
        return {"encoder": MLPEncoder(shape, (400,)),
                "decoder": MLPDecoder(latent_dim, shape, num_params, (400,))}
    strides = (1, 2, 1, 2, 1)
    return {"encoder": ConvEncoder(shape, (32, 32, 64, 64, 64), strides, hidden_dim=256,
                                   gated=True),
            "decoder": ConvDecoder(latent_dim, shape, num_params, (64, 64, 32, 32, 32, 32),
                                   strides, gated=True)}


def run_mnist(path: Path, num_epochs: int, conv: bool, num_images: int, names: list[str]) -> None:
    train, valid, test = mnist(path)
    shape = (28, 28) if conv else (784,)
    train, valid, test = (part.reshape(-1, *shape) for part in (train[:num_images], valid, test))
    for name in names:
        torch.manual_seed(0)
        vae = VAE(Bernoulli(shape), 64, posterior=POSTERIORS[name],
                  **networks(conv, shape, 64, 1))
        history, seconds = timed(lambda vae=vae: vae.fit(
            train, num_epochs=num_epochs, batch_size=100, warm_up=num_epochs // 10, seed=0,
            progress=False))
        looked = test[::10] if conv else test
        note(kind="mnist", posterior=name, conv=conv, images=len(train), epochs=num_epochs,
             seconds=seconds, negative_elbo=-vae.elbo(looked, num_particles=5).mean().item(),
             tested=len(looked), active=sum(history.active_units),
             negative_log_likelihood=-vae.log_likelihood(
                 test[::40], num_samples=20 if conv else 500).mean,
             engine=history.engines[0].tier, microseconds=history.engines[0].microseconds)


def run_frey(path: Path, num_epochs: int, conv: bool, names: list[str], seeds: int) -> None:
    """Bits a dimension of held-out Frey faces."""
    images = torch.from_numpy(np.load(path)["images"]).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shape = (28, 20) if conv else (560,)
    train, valid, test = images[order].reshape(-1, *shape).split([1565, 200, 200])
    for name in names:
        for seed in range(seeds):
            torch.manual_seed(seed)
            vae = VAE(DiscretizedLogistic(shape), 20, posterior=POSTERIORS[name],
                      **networks(conv, shape, 20, 2))
            history, seconds = timed(lambda vae=vae, seed=seed: vae.fit(
                train, num_epochs=num_epochs, batch_size=100, validation=valid, seed=seed,
                progress=False))
            elbo = vae.elbo(test, num_particles=50).mean().item()
            likelihood = vae.log_likelihood(test, num_samples=500)
            note(kind="frey", posterior=name, conv=conv, seed=seed, epochs=num_epochs,
                 seconds=seconds, bits_by_elbo=bits_per_dim(elbo, 560),
                 bits=likelihood.bits_per_dim, best_epoch=history.best_epoch,
                 active=sum(history.active_units), engine=history.engines[0].tier)


# ---------------------------------------------------------------------- report

def report() -> None:
    rows = [json.loads(line) for line in open(RESULTS / "vae.jsonl")]
    parts = ["# Variational autoencoders", "", "Rows of `vae.jsonl`, by `python benchmarks/vae.py "
             "--report`.", *digits_table([r for r in rows if r["kind"] == "digits"]),
             *step_table([r for r in rows if r["kind"] == "step"]),
             *tutorial_table([r for r in rows if r["kind"] == "tutorial"]),
             *mnist_table([r for r in rows if r["kind"] == "mnist"]),
             *frey_table([r for r in rows if r["kind"] == "frey"])]
    (RESULTS / "vae.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts))


def table(title: str, text: str, head: list[str], rows: list[list[object]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return ["", f"## {title}", "", text, "", *lines] if rows else []


def by_posterior(rows: list[dict]) -> dict[str, list[dict]]:
    return {name: found for name in POSTERIORS
            if (found := [r for r in rows if r["posterior"] == name])}


def digits_table(rows: list[dict]) -> list[str]:
    groups = by_posterior(rows)
    base = np.array([r["each"] for r in groups.get("diagonal Gaussian", [])])
    lines = []
    for name, runs in groups.items():
        means = [r["elbo"] for r in runs]
        gain = (np.array([r["each"] for r in runs]) - base).mean(0)
        lines.append([name, f"{statistics.fmean(means):.3f}",
                      f"{np.std(means, ddof=1) / len(means) ** 0.5:.3f}",
                      f"{gain.mean():+.3f} +- {gain.std(ddof=1) / len(gain) ** 0.5:.3f}",
                      f"{statistics.fmean(r['log_likelihood'] for r in runs):.3f}",
                      f"{statistics.fmean(r['seconds'] for r in runs):.1f}", runs[0]["engine"]])
    epochs = rows[0]["epochs"] if rows else 0
    return table("Digits", f"Held-out ELBO in nats a digit, {epochs} epochs, the same networks, "
                 "three seeds; gain over the diagonal Gaussian by the same held-out digits.",
                 ["posterior", "ELBO", "se over seeds", "gain", "log p(x)", "seconds", "engine"],
                 lines)


def step_table(rows: list[dict]) -> list[str]:
    return table("One training step", "Milliseconds of a compiled step, and of `SVI.step` with "
                 "Pyro's tutorial VAE of the same sizes, alternating in one process.",
                 ["pixels", "hidden", "latent", "batch", "Pyro", "ours", "ratio", "engine",
                  "threads"],
                 [[r["pixels"], r["hidden"], r["latent"], r["batch"], f"{r['pyro_ms']:.2f}",
                   f"{r['our_ms']:.2f}", f"{r['ratio']:.1f}", r["engine"], r["threads"]]
                  for r in rows])


def tutorial_table(rows: list[dict]) -> list[str]:
    return table("Pyro's tutorial VAE on binarized MNIST", "Equal networks, minibatches, rate and "
                 "epochs; seconds an epoch, the best of alternating ones.",
                 ["epochs", "ELBO Pyro", "ELBO ours", "s/epoch Pyro, DataLoader",
                  "s/epoch Pyro, tensors", "s/epoch ours", "ratios", "threads"],
                 [[r["epochs"], f"{r['pyro_elbo']:.2f}", f"{r['our_elbo']:.2f}",
                   f"{r['pyro_loader']:.2f}", f"{r['pyro_tensors']:.2f}", f"{r['ours']:.2f}",
                   f"{r['pyro_loader'] / r['ours']:.2f}, {r['pyro_tensors'] / r['ours']:.2f}",
                   r["threads"]] for r in rows])


def mnist_table(rows: list[dict]) -> list[str]:
    return table("Binarized MNIST", "Negative ELBO in nats (published: after full training of "
                 "the convolutions by van den Berg et al.). log p(x) by 500 draws, 20 if "
                 "convolutional.",
                 ["networks", "images", "epochs", "posterior", "-ELBO", "-log p(x), of 250",
                  "active", "seconds", "published"],
                 [["gated conv" if r["conv"] else "400 hidden", r["images"], r["epochs"],
                   r["posterior"], f"{r['negative_elbo']:.2f}",
                   f"{r['negative_log_likelihood']:.2f}", r["active"], f"{r['seconds']:.0f}",
                   PUBLISHED.get(r["posterior"], "")] for r in rows])


def frey_table(rows: list[dict]) -> list[str]:
    lines = []
    for name, runs in by_posterior(rows).items():
        bits = [r["bits_by_elbo"] for r in runs]
        spread = np.std(bits, ddof=1) / len(bits) ** 0.5 if len(bits) > 1 else float("nan")
        lines.append([name, f"{statistics.fmean(bits):.4f}", f"{spread:.4f}",
                      f"{statistics.fmean(r['bits'] for r in runs):.4f}",
                      f"{statistics.fmean(r['seconds'] for r in runs):.0f}"])
    epochs = rows[0]["epochs"] if rows else 0
    return table("Frey faces", f"Bits a dimension of 200 held-out faces, {epochs} epochs, the same "
                 "networks.", ["posterior", "by ELBO", "se over seeds", "by log p(x)", "seconds"],
                 lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--tutorial", type=Path)
    parser.add_argument("--mnist", "--data", type=Path)
    parser.add_argument("--frey", type=Path)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--conv", action="store_true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--posteriors", nargs="*", choices=POSTERIORS, default=list(POSTERIORS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="VAE.fit")  # of fits too short to use their latents
    if options.digits:
        run_digits(options.epochs or 300, options.seeds)
    if options.step:
        run_step()
    if options.tutorial:
        run_tutorial(options.tutorial, options.epochs or 20)
    if options.mnist:
        run_mnist(options.mnist, options.epochs or 100, options.conv, options.images,
                  options.posteriors)
    if options.frey:
        run_frey(options.frey, options.epochs or 500, options.conv, options.posteriors,
                 options.seeds)
    if options.report:
        report()


if __name__ == "__main__":
    main()
