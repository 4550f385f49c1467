"""Posteriors that are hard in one known way, with exact references.

    model, args, kwargs, reference = load("funnel-10")

``reference`` maps every site to ``(10000, *shape)`` independent draws, float64. All densities are
normalised: the log evidence is zero. Models take ``torch.get_default_dtype()``, for which float64
is wanted, and broadcast over particles to the left.

References:
    Neal (2003), Slice sampling (funnel); Haario et al. (1999) (banana); Pagani, Wiegand & Nadarajah
    (2022), An n-dimensional Rosenbrock distribution, arXiv:1903.09556.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

NUM_DRAWS = 10_000
Draws = dict[str, np.ndarray]
Case = tuple[Callable, tuple, Draws]  # model, its arguments, reference


class Start(dist.TorchDistribution):
    """Density one on all vectors. Its draws are places to start from, uniform on (-2, 2)."""

    arg_constraints: dict = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, dim: int, batch_shape: tuple = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Start:
        """The same with other batch dimensions."""
        return Start(self.event_shape[0], batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Somewhere to start."""
        return torch.empty(self.shape(torch.Size(sample_shape))).uniform_(-2, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(value[..., 0])


def target(dim: int, log_density: Callable[[Tensor], Tensor]) -> Callable:
    """Model of one latent vector ``z`` with that density."""
    def model() -> None:
        z = pyro.sample("z", Start(dim))
        pyro.factor("target", log_density(z))
    return model


def normal(x: Tensor, loc: Any, scale: Any) -> Tensor:
    """Log density of a normal, for each number."""
    scale = torch.as_tensor(scale, dtype=x.dtype)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def tensor(x: Any) -> Tensor:
    """As the model wants it."""
    return torch.as_tensor(x, dtype=torch.get_default_dtype())


def rotation(dim: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix."""
    q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
    return q * np.sign(np.diag(r))


# ---------------------------------------------------------------------- curvature


def funnel(dim: int, rng: np.random.Generator) -> Case:
    """Neal's: the scale of all others is a latent itself."""
    def model() -> None:
        v = pyro.sample("v", dist.Normal(tensor(0.0), 3.0))
        scale = (v / 2).exp().unsqueeze(-1).expand(v.shape + (dim - 1,))
        pyro.sample("x", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
    v = 3 * rng.standard_normal(NUM_DRAWS)
    x = np.exp(v / 2)[:, None] * rng.standard_normal((NUM_DRAWS, dim - 1))
    return model, (), {"v": v, "x": x}


def banana(rng: np.random.Generator) -> Case:
    """Haario's, strongly bent: a parabola of ten times the length of its width."""
    def bend(x: Any) -> Any:
        return 0.1 * (100 - x**2)

    def log_density(z: Tensor) -> Tensor:
        x, y = z[..., 0], z[..., 1]
        return normal(x, 0.0, 10.0) + normal(y, bend(x), 1.0)
    x = 10 * rng.standard_normal(NUM_DRAWS)
    y = bend(x) + rng.standard_normal(NUM_DRAWS)
    return target(2, log_density), (), {"z": np.stack([x, y], -1)}


def rosenbrock(rng: np.random.Generator) -> Case:
    """Pagani's hybrid: three chains of squares from one root, ten numbers in all."""
    chains, length, root, width = 3, 3, 0.5, 0.1

    def log_density(z: Tensor) -> Tensor:
        first = z[..., :1].unsqueeze(-1).expand(z.shape[:-1] + (chains, 1))
        links = z[..., 1:].reshape(z.shape[:-1] + (chains, length))
        before = torch.cat([first, links[..., :-1]], -1)
        return normal(z[..., 0], 1.0, root) + normal(links, before**2, width).sum((-2, -1))
    first = 1 + root * rng.standard_normal(NUM_DRAWS)
    parts = [first]
    for _ in range(chains):
        last = first
        for _ in range(length):
            last = last**2 + width * rng.standard_normal(NUM_DRAWS)
            parts.append(last)
    return target(1 + chains * length, log_density), (), {"z": np.stack(parts, -1)}


def ring(rng: np.random.Generator) -> Case:
    """A circle of radius 5 and width 0.3."""
    radius, width = 5.0, 0.3
    log_mass = math.log(2 * math.pi * radius * width * math.sqrt(2 * math.pi))

    def log_density(z: Tensor) -> Tensor:
        r = (z.square().sum(-1) + 1e-30).sqrt()
        return -0.5 * ((r - radius) / width) ** 2 - log_mass
    r = radius + width * rng.standard_normal(4 * NUM_DRAWS)  # density times r, by rejection
    r = r[rng.uniform(0, 2 * radius, len(r)) < r][:NUM_DRAWS]
    angle = rng.uniform(0, 2 * math.pi, NUM_DRAWS)
    return target(2, log_density), (), {"z": r[:, None] * np.stack(
        [np.cos(angle), np.sin(angle)], -1)}


# ---------------------------------------------------------------------- modes


def modes(dim: int, weights: list[float], rng: np.random.Generator) -> Case:
    """Gaussians of different widths, their centres at least eight standard deviations apart."""
    count = len(weights)
    axes = rotation(dim, rng)
    corners = [axes[0], -axes[0], axes[1], -axes[1]][:count]
    centres = (5.0 if count == 2 else 7.0) * np.stack(corners)
    scales = np.linspace(0.7, 1.1, count)[:, None] * rng.uniform(0.8, 1.1, (count, dim))
    where, width, log_w = tensor(centres), tensor(scales), tensor(np.log(weights))

    def log_density(z: Tensor) -> Tensor:
        parts = normal(z.unsqueeze(-2), where, width).sum(-1)
        return torch.logsumexp(parts + log_w, -1)
    chosen = rng.choice(count, NUM_DRAWS, p=weights)
    draws = centres[chosen] + scales[chosen] * rng.standard_normal((NUM_DRAWS, dim))
    return target(dim, log_density), (), {"z": draws}


# ---------------------------------------------------------------------- Gaussians, scales, tails


def ill_conditioned(dim: int, rng: np.random.Generator) -> Case:
    """A rotated Gaussian whose covariance has condition number 1e4."""
    axes, scales = rotation(dim, rng), np.logspace(-1, 1, dim)
    loc = 3 * rng.standard_normal(dim)
    turn, width, centre = tensor(axes), tensor(scales), tensor(loc)

    def log_density(z: Tensor) -> Tensor:
        return normal((z - centre) @ turn, 0.0, width).sum(-1)
    draws = loc + (scales * rng.standard_normal((NUM_DRAWS, dim))) @ axes.T
    return target(dim, log_density), (), {"z": draws}


def low_rank(dim: int, rank: int, rng: np.random.Generator) -> Case:
    """A Gaussian with a few strong directions, which no single coordinate shows."""
    factor = rng.standard_normal((dim, rank))
    scales, loc = rng.uniform(0.5, 1.5, dim), rng.standard_normal(dim)
    covariance = factor @ factor.T + np.diag(scales**2)
    root = np.linalg.cholesky(covariance)
    whiten, centre = tensor(np.linalg.inv(root).T), tensor(loc)
    log_det = float(np.log(np.diag(root)).sum())

    def log_density(z: Tensor) -> Tensor:
        return normal((z - centre) @ whiten, 0.0, 1.0).sum(-1) - log_det
    draws = loc + scales * rng.standard_normal((NUM_DRAWS, dim)) \
        + rng.standard_normal((NUM_DRAWS, rank)) @ factor.T
    return target(dim, log_density), (), {"z": draws}


def scales(rng: np.random.Generator) -> Case:
    """Independent Gaussians from a millionth to a million, each centred two widths away."""
    widths = np.logspace(-6, 6, 13)
    centres = 2 * widths * np.where(np.arange(13) % 2, 1, -1)
    loc, width = tensor(centres), tensor(widths)

    def log_density(z: Tensor) -> Tensor:
        return normal(z, loc, width).sum(-1)
    draws = centres + widths * rng.standard_normal((NUM_DRAWS, 13))
    return target(13, log_density), (), {"z": draws}


def student_t(dim: int, together: bool, rng: np.random.Generator, df: float = 3.0) -> Case:
    """Heavy tails, of each number by itself or of all together."""
    size = dim if together else 1
    constant = math.lgamma((df + size) / 2) - math.lgamma(df / 2) \
        - 0.5 * size * math.log(df * math.pi)

    def log_density(z: Tensor) -> Tensor:
        squares = z.square().sum(-1, keepdim=True) if together else z.square()
        return (constant - 0.5 * (df + size) * torch.log1p(squares / df)).sum(-1)
    chi2 = rng.chisquare(df, (NUM_DRAWS, 1 if together else dim))
    draws = rng.standard_normal((NUM_DRAWS, dim)) * np.sqrt(df / chi2)
    return target(dim, log_density), (), {"z": draws}


# ---------------------------------------------------------------------- public interface

POSTERIORS: dict[str, Callable[[np.random.Generator], Case]] = {
    "funnel-10": lambda rng: funnel(10, rng),
    "funnel-30": lambda rng: funnel(30, rng),
    "banana": banana,
    "rosenbrock-10": rosenbrock,
    "ring": ring,
    "two-modes-2": lambda rng: modes(2, [0.5, 0.5], rng),
    "two-modes-2-unequal": lambda rng: modes(2, [0.8, 0.2], rng),
    "two-modes-10": lambda rng: modes(10, [0.5, 0.5], rng),
    "two-modes-10-unequal": lambda rng: modes(10, [0.7, 0.3], rng),
    "four-modes-2": lambda rng: modes(2, [0.25] * 4, rng),
    "four-modes-2-unequal": lambda rng: modes(2, [0.4, 0.3, 0.2, 0.1], rng),
    "four-modes-10": lambda rng: modes(10, [0.25] * 4, rng),
    "four-modes-10-unequal": lambda rng: modes(10, [0.4, 0.3, 0.2, 0.1], rng),
    "gaussian-100": lambda rng: ill_conditioned(100, rng),
    "gaussian-300-low-rank": lambda rng: low_rank(300, 10, rng),
    "scales": scales,
    "student-t-independent": lambda rng: student_t(10, False, rng),
    "student-t-joint": lambda rng: student_t(10, True, rng),
}


def names() -> list[str]:
    """Names of all of them."""
    return list(POSTERIORS)


def load(name: str) -> tuple[Callable, tuple, dict, Draws]:
    """Model, arguments, keyword arguments, and reference draws, always the same."""
    rng = np.random.default_rng(list(POSTERIORS).index(name) + 1)
    model, args, reference = POSTERIORS[name](rng)
    return model, args, {}, reference
