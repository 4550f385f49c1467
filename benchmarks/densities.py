"""Flows fitted to data and to densities: two circles, and four energies of two coordinates.

Two circles: 1,000 points of scikit-learn's make_circles (factor 0.5, noise 0.05), standardized.
Mean negative log-likelihood over the steps of Adam at 5e-3, all points at each step, beside Pyro's
own spline-autoregressive flow of one layer at a constant rate; then with the defaults of
fit_density, which hold out every tenth point. The truth is known, so that all can be judged on
10,000 points never seen.

Four energies: U1 to U4 of Rezende & Mohamed (2015), arXiv:1505.05770, table 1. The paper draws
them between -4 and 4; U2 to U4 do not end there, so a wall does: half a Gaussian of width 0.2
beyond 4 in every direction. KL(q || p) is by 50,000 draws of the flow, p normalized by quadrature.

    python benchmarks/densities.py [--only circles U1 U2 U3 U4] [--seeds 0 1 2] [--figure FILE]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from sklearn.datasets import make_circles
from torch import Tensor, nn

from pyro_nfvi import FittedFlow, fit_density, nsf, planar
from pyro_nfvi.flows import Autoregressive, Compose, Inverse, RationalQuadraticSpline

NUM_STEPS, RATE = 1500, 5e-3
RADII, NOISE = (0.5, 1.0), 0.05
WALL, WIDTH = 4.0, 0.2
NUM_DRAWS = 50_000


def spline_autoregressive(num_layers: int) -> Compose:
    """Spline layers whose density is one pass, the order turning round between them."""
    return Compose([Inverse(Autoregressive(
        2, reverse=k % 2 == 1, transformer=RationalQuadraticSpline(8, bound=3.0),
        activation=nn.ReLU)) for k in range(num_layers)])


# ------------------------------------------------------------------ two circles

def circles() -> tuple[Tensor, Tensor, Tensor]:
    """Points to learn from, points to judge by, and the scales of both."""
    def points(count: int, seed: int) -> Tensor:
        return torch.as_tensor(make_circles(count, noise=NOISE, factor=RADII[0],
                                            random_state=seed)[0])
    x = points(1000, 0)
    mean, scale = x.mean(0), x.std(0, correction=0)
    return (x - mean) / scale, (points(10_000, 1) - mean) / scale, torch.stack([mean, scale])


def true_nll(x: Tensor, units: Tensor) -> float:
    """Mean negative log-likelihood of standardized points under two noisy circles."""
    mean, scale = units
    rho, r = (x * scale + mean).norm(dim=-1, keepdim=True), x.new_tensor(RADII)
    log_density = -0.5 * ((rho - r) / NOISE).square() - math.log(2 * math.pi * NOISE ** 2) \
        + torch.special.i0e(rho * r / NOISE ** 2).log()
    log_mixture = log_density.logsumexp(-1) - math.log(2) + scale.log().sum()
    return -log_mixture.mean().item()


def pyro_run(x: Tensor, seed: int) -> tuple[list[float], Callable[[Tensor], Tensor], float]:
    """Loss at each step of Pyro's flow, its log-density, and the time."""
    torch.manual_seed(seed)
    transform = T.spline_autoregressive(2, count_bins=8, bound=3.0)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform])
    adam, losses, start = torch.optim.Adam(transform.parameters(), lr=RATE), [], time.perf_counter()
    for _ in range(NUM_STEPS):
        adam.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        adam.step()
        flow.clear_cache()
        losses.append(loss.item())
    return losses, flow.log_prob, time.perf_counter() - start


def our_run(x: Tensor, seed: int, num_layers: int, **options: object) -> tuple[FittedFlow, float]:
    """A fit of the spline-autoregressive flow, and the time."""
    torch.manual_seed(seed)
    flow, start = spline_autoregressive(num_layers), time.perf_counter()
    fitted = fit_density(flow, samples=x, seed=seed, progress=False, **options)
    return fitted, time.perf_counter() - start


def report_circles(seed: int) -> None:
    """Print the curves, and how the flows do on new points."""
    x, new, units = circles()
    x, new = x.float(), new.float()
    theirs, log_prob, seconds = pyro_run(x, seed)
    curves, rows = {"Pyro": theirs}, [("Pyro, 1 layer", theirs[-1], log_prob, seconds)]
    for num_layers in (1, 2):
        fitted, seconds = our_run(x, seed, num_layers, validation=None, batch_size=len(x),
                                  num_steps=NUM_STEPS, lr=RATE)
        name = f"pyro_nfvi, {num_layers} layer{'s' * (num_layers > 1)}"
        curves[name] = [-value for value in fitted.history.elbo]
        rows.append((name, curves[name][-1], fitted.log_prob, seconds))
    fitted, seconds = our_run(x, seed, 2)
    rows.append(("the same, defaults, a tenth held out", -fitted.log_prob(x).mean().item(),
                 fitted.log_prob, seconds))
    print(f"\nNLL of the 1,000 points by step (seed {seed})\n\n| step | {' | '.join(curves)} |")
    print("|---|" + "---|" * len(curves))
    for step in range(100, NUM_STEPS + 1, 100):
        values = [f"{curve[step - 1]:.3f}" if step <= len(curve) else "" for curve in
                  curves.values()]
        print(f"| {step} | {' | '.join(values)} |")
    print("\n| flow | NLL of the 1,000 points | NLL of 10,000 new points | seconds |\n"
          "|---|---|---|---|")
    for name, train, score, seconds in rows:
        with torch.no_grad():
            print(f"| {name} | {train:.3f} | {-score(new).mean():.3f} | {seconds:.1f} |")
    print(f"| the truth | {true_nll(x.double(), units):.3f} | {true_nll(new.double(), units):.3f} "
          "| |", flush=True)


# ------------------------------------------------------------------ four energies

def _w1(z: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * z[..., 0] / 4)


def _w2(z: Tensor) -> Tensor:
    return 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6).square())


def _w3(z: Tensor) -> Tensor:
    return 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)


def _two_valleys(a: Tensor, b: Tensor) -> Tensor:
    return -torch.logaddexp(-0.5 * a.square(), -0.5 * b.square())


def _u1(z: Tensor) -> Tensor:
    ring = 0.5 * ((z.norm(dim=-1) - 2) / 0.4).square()
    return ring + _two_valleys((z[..., 0] - 2) / 0.6, (z[..., 0] + 2) / 0.6)


def _u2(z: Tensor) -> Tensor:
    return 0.5 * ((z[..., 1] - _w1(z)) / 0.4).square()


def _u3(z: Tensor) -> Tensor:
    offset = z[..., 1] - _w1(z)
    return _two_valleys(offset / 0.35, (offset + _w2(z)) / 0.35)


def _u4(z: Tensor) -> Tensor:
    offset = z[..., 1] - _w1(z)
    return _two_valleys(offset / 0.4, (offset + _w3(z)) / 0.35)


ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {"U1": _u1, "U2": _u2, "U3": _u3, "U4": _u4}
FLOWS: dict[str, Callable[[], Compose]] = {
    "planar x2": partial(planar, 2, num_layers=2), "planar x8": partial(planar, 2, num_layers=8),
    "planar x32": partial(planar, 2, num_layers=32), "nsf": partial(nsf, 2)}


def log_density(name: str, z: Tensor) -> Tensor:
    """Minus the energy, within the wall."""
    beyond = (z.abs() - WALL).clamp(min=0) / WIDTH
    return -ENERGIES[name](z) - 0.5 * beyond.square().sum(-1)


def log_normalizer(name: str, num_points: int = 2001, reach: float = 6.0) -> float:
    """Log of the integral, by the midpoint rule."""
    step = 2 * reach / num_points
    places = -reach + step * (torch.arange(num_points, dtype=torch.float64) + 0.5)
    rows = [log_density(name, torch.stack(torch.broadcast_tensors(places, y), -1)).logsumexp(0)
            for y in places]
    return (torch.stack(rows).logsumexp(0) + 2 * math.log(step)).item()


@torch.no_grad()
def divergence(fitted: FittedFlow, name: str) -> tuple[float, float]:
    """KL(q || p) and its standard error."""
    z, log_q = fitted.to(torch.float64).rsample_and_log_prob((NUM_DRAWS,))
    terms = log_q - log_density(name, z) + log_normalizer(name)
    return terms.mean().item(), terms.std().item() / NUM_DRAWS ** 0.5


def report_energy(name: str, seeds: list[int]) -> dict[str, FittedFlow]:
    """Print the divergences of all flows; the fits of the first seed."""
    first: dict[str, FittedFlow] = {}
    for flow, build in FLOWS.items():
        for seed in seeds:
            torch.manual_seed(seed)
            bijection, start = build(), time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fitted = fit_density(bijection, log_density=partial(log_density, name), seed=seed,
                                     progress=False)
            seconds, stage = time.perf_counter() - start, fitted.history.stages[-1]
            kl, error = divergence(fitted, name)
            print(f"| {name} | {flow} | {seed} | {kl:.4f} +- {error:.4f} | {stage.pareto_k:.2f} | "
                  f"{stage.ess:.3f} | {seconds:.0f} | {len(caught) or ''} |", flush=True)
            first.setdefault(flow, fitted)
    return first


@torch.no_grad()
def picture(fits: dict[str, dict[str, FittedFlow]], path: Path) -> None:
    """Draw the densities, true and fitted, a row for each energy."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = torch.linspace(-WALL, WALL, 300)
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)
    titles = ["true", *FLOWS]
    figure, axes = plt.subplots(len(fits), len(titles), squeeze=False, layout="constrained",
                                figsize=(2 * len(titles), 2 * len(fits) + 0.3))
    for row, (name, fitted) in zip(axes, fits.items(), strict=True):
        true = (log_density(name, grid) - log_normalizer(name)).exp()
        densities = [true, *(fit.log_prob(grid).exp() for fit in fitted.values())]
        for ax, density in zip(row, densities, strict=True):
            ax.imshow(density, origin="lower", cmap="viridis", vmin=0, vmax=true.max(),
                      extent=(-WALL, WALL, -WALL, WALL))
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Print the tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["circles", *ENERGIES],
                        default=["circles", *ENERGIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--figure", type=Path, help="where a picture of the energies goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "circles" in options.only:
        report_circles(options.seeds[0])
    energies = [name for name in options.only if name != "circles"]
    if energies:
        print("\n| energy | flow | seed | KL(q, p), nats | k-hat | effective draws | seconds | "
              "warnings |\n|---|---|---|---|---|---|---|---|")
    fits = {name: report_energy(name, options.seeds) for name in energies}
    if options.figure is not None and fits:
        picture(fits, options.figure)


if __name__ == "__main__":
    main()
