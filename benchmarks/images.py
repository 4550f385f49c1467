"""Flows of images on scikit-learn's digits: 8 x 8 pixels of 17 levels.

    python benchmarks/images.py --flows realnvp_image glow        # or all, without --flows
    python benchmarks/images.py --picture                         # docs/images/digits.png
    python benchmarks/images.py --report                          # results/images.md

Bits a dimension are bounds for whole-numbered pixels, averaged over 20 draws of the noise between
the levels; training, validation and test images are 1,237, 200 and 360. Each run adds a line to
results/images.jsonl, and keeps draws of its flow in results/images.npz for the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi.flows import (
    Dequantization,
    FixedLinear,
    Flow,
    glow,
    realnvp,
    realnvp_image,
)
from pyro_nfvi.inference import fit_density

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "digits.png"
SHAPE, NUM_LEVELS, BATCH_SIZE = (1, 8, 8), 17, 100
PIXELS = Dequantization(NUM_LEVELS)
COPIES = 20  # of each training image, each with its own noise
FLOWS: dict[str, tuple[Callable, int, float]] = {  # recipe, steps, learning rate
    "realnvp": (realnvp, 1200, 0.01),
    "realnvp_image": (partial(realnvp_image, image_shape=SHAPE), 1500, 4e-3),
    "realnvp_image, given the digit": (partial(realnvp_image, image_shape=SHAPE), 1000, 4e-3),
    "glow": (partial(glow, image_shape=SHAPE), 900, 4e-3),
}
NAMES = {"gaussian": "full Gaussian", "realnvp": "Real NVP of vectors",
         "realnvp_image": "Real NVP of images",
         "realnvp_image, given the digit": "Real NVP of images, given the digit", "glow": "Glow"}


def digits() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Images and one-hot labels, each for training, validation and test."""
    from sklearn.datasets import load_digits
    found = load_digits()
    images, labels = torch.tensor(found.data).float(), torch.eye(10)[found.target]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = [1237, 200, 360]
    return images[order].split(sizes), labels[order].split(sizes)


def dequantized(x: Tensor, copies: int) -> tuple[Tensor, float]:
    """Copies of the images with noise of their own, and the mean log-det of the way there."""
    z, log_det = PIXELS.dequantize(x.repeat(copies, 1))
    return z, log_det.mean().item()


def bits(nats: float) -> float:
    return nats / (64 * math.log(2))


def run(name: str) -> None:
    torch.manual_seed(0)
    (train, valid, test), labels = digits()
    given = "given" in name
    c_train, c_valid, c_test = labels if given else (None, None, None)
    start = time.process_time()
    row: dict[str, object] = {"flow": name, "threads": torch.get_num_threads()}
    if name == "gaussian":
        flow = gaussian(train)
    else:
        recipe, num_steps, lr = FLOWS[name]
        z, log_det = dequantized(train, COPIES)
        v, v_log_det = dequantized(valid, 4)
        bijection = recipe(64, context_dim=10) if given else recipe(64)
        fitted = fit_density(
            Flow(bijection), samples=z, standardize=name == "realnvp", batch_size=BATCH_SIZE,
            context=c_train.repeat(COPIES, 1) if given else None,
            validation=(v, c_valid.repeat(4, 1)) if given else v,
            num_steps=num_steps, lr=lr, seed=0, compile="eager", progress=False)
        flow, history = fitted.flow, fitted.history
        row |= {"steps": len(history.elbo), "kept": history.best_step, "lr": lr,
                "epochs": [round(k * BATCH_SIZE / len(train), 1) for k in history.checks],
                "train": [round(bits(nll - log_det), 4) for nll in history.train],
                "validation": [round(bits(nll - v_log_det), 4) for nll in history.validation]}
    row |= {"seconds": round(time.process_time() - start, 1),
            "parameters": sum(p.numel() for p in flow.parameters()),
            **judged(flow, test, c_test)}
    print(json.dumps(row), flush=True)
    with open(RESULTS / "images.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    keep(name, flow, given)


def gaussian(train: Tensor) -> Flow:
    """The Gaussian of the images' mean and covariance, after the logit."""
    z, _ = dequantized(train, COPIES)
    return Flow(FixedLinear(z.mean(0), torch.linalg.cholesky(z.mT.cov())))


@torch.no_grad()
def judged(flow: Flow, x: Tensor, context: Tensor | None) -> dict[str, float]:
    """Bits of held-out images, and how exactly the flow inverts in its dtype."""
    each = PIXELS.bits_per_dim(flow, x, context, num_samples=20)
    z, _ = PIXELS.dequantize(x)
    u = flow.base.rsample((len(x),)).to(z)
    f, inverse = (partial(way, context=context) for way in (flow.bijection, flow.bijection.inverse))
    return {"test": round(each.mean().item(), 4),
            "se": round(each.std().item() / len(x) ** 0.5, 4),
            "error_data": (f(inverse(z)[0])[0] - z).abs().max().item(),
            "error_noise": (inverse(f(u)[0])[0] - u).abs().max().item(),
            "dtype": str(z.dtype)}


@torch.no_grad()
def keep(name: str, flow: Flow, given: bool) -> None:
    """Draws for the picture: 100, or ten of each digit."""
    torch.manual_seed(1)
    context = torch.eye(10).repeat_interleave(10, 0) if given else None
    z, _ = flow.rsample_and_log_prob((1,) if given else (100,), context)
    path = RESULTS / "images.npz"
    kept = dict(np.load(path)) if path.exists() else {}
    kept[name] = PIXELS.quantize(z).reshape(100, 64).byte().numpy()
    np.savez_compressed(path, **kept)


# ---------------------------------------------------------------------- report

def rows() -> dict[str, dict]:
    """The last run of each flow."""
    found = [json.loads(line) for line in open(RESULTS / "images.jsonl")]
    return {row["flow"]: row for row in sorted(found, key=lambda row: [*NAMES].index(row["flow"]))}


def report() -> None:
    found = rows()
    lines = ["# Flows of images", "", "Rows of `images.jsonl`, by `python benchmarks/images.py "
             "--report`: scikit-learn's digits, 8 x 8 pixels of 17 levels, 1,237 to train on, 200 "
             "to stop by, 360 to test.", "", "Bits a dimension of the test images, with the "
             "standard error over them; the largest error of inverting test images and draws of "
             "the noise, in float32; processor seconds of the fit on one thread. Uniform pixels "
             f"would take {math.log2(NUM_LEVELS):.3f} bits; to tell the digit takes up to "
             f"{math.log2(10) / 64:.3f}.", "",
             "| flow | parameters | steps | seconds | bits/dim | inverse, data | inverse, noise |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {NAMES[name]} | {row['parameters']:,} | {row.get('steps', '')} | "
              f"{row['seconds']} | {row['test']:.3f} +- {row['se']:.3f} | {row['error_data']:.0e} "
              f"| {row['error_noise']:.0e} |" for name, row in found.items()]
    lines += ["", "## Bits a dimension over the fit", "",
              "Training images since the check before / validation images.", ""]
    for name, row in found.items():
        if "epochs" in row:
            lines += [f"{NAMES[name]}:", "", *falling(row), ""]
    text = "\n".join(lines).rstrip() + "\n"
    (RESULTS / "images.md").write_text(text)
    print(text)


def falling(row: dict) -> list[str]:
    """A table of some of the checks, from first to last."""
    last = len(row["epochs"]) - 1
    some = sorted({0, 1, 3, last} | {round(last * k / 5) for k in range(1, 5)})
    return ["| epoch | " + " | ".join(f"{row['epochs'][k]:g}" for k in some) + " |",
            "| --- " * (len(some) + 1) + "|",
            *("| " + which + " | " + " | ".join(f"{row[which][k]:.3f}" for k in some) + " |"
              for which in ("train", "validation"))]


def picture() -> None:
    """Data, draws of both flows, and bits over the epochs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    (train, *_), _ = digits()
    draws = dict(np.load(RESULTS / "images.npz"))
    panels = {"data": train[:100].numpy(), **{NAMES[name]: draws[name] for name in NAMES
                                              if "image" in name or name == "glow"}}
    width, height = 330 * len(panels) + 400, 360
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100)
    for k, (title, images) in enumerate(panels.items()):
        ax = figure.add_axes((330 * k / width, 0, 300 / width, 300 / height))  # 3 x 3 a pixel
        ax.imshow(grid(images), cmap="gray_r", interpolation="nearest", vmin=0,
                  vmax=NUM_LEVELS - 1)
        ax.set_title(title)
        ax.axis("off")
    ax = figure.add_axes((1 - 350 / width, 50 / height, 340 / width, 250 / height))
    for name, row in rows().items():
        if "epochs" in row:
            ax.plot(row["epochs"], row["validation"], label=NAMES[name], lw=1.2)
    ax.set(xlabel="epoch", ylim=(1.9, 3.9), title="bits a dimension, held out")
    ax.legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)
    print(PICTURE, PICTURE.stat().st_size, "bytes")


def grid(images: np.ndarray) -> np.ndarray:
    """A hundred images as one, ten a row, with a line between them."""
    tiles = np.pad(images.reshape(10, 10, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return tiles.transpose(0, 2, 1, 3).reshape(100, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="*", choices=NAMES)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = [] if options.picture or options.report else [*NAMES]
    for name in options.flows if options.flows is not None else asked:
        run(name)
    if options.picture:
        picture()
    if options.report:
        report()


if __name__ == "__main__":
    main()
