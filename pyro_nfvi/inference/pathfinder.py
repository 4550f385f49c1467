"""Pathfinder: the best Gaussian along the way to a mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_nfvi.inference.lbfgs import Path, maximize
from pyro_nfvi.inference.score import Score, elbo_of

NUM_STEPS = 200
NUM_CANDIDATES = 15  # points of a path whose Gaussians are compared
ARRIVED = 0.1  # gain, in nats, that a Newton step from a mode may still promise
NUM_DRAWS = 10  # to estimate the ELBO of each


@dataclass(frozen=True)
class PathGaussian:
    r"""Gaussian with a covariance of few directions between scales.

    .. math:: \Sigma = A A^\top, \qquad
              A = \mathrm{diag}(s)\,(I + Q\,\mathrm{diag}(c)\,Q^\top), \qquad Q^\top Q = I

    Attributes:
        loc: Mean ``(D,)``.
        scale: :math:`s`, ``(D,)``.
        directions: :math:`Q`, ``(D, r)``.
        stretch: :math:`c`, ``(r,)``, above -1.
        elbo: Its ELBO, estimated.
        mode: Where the path ended.
        arrived: Whether that is a mode, rather than a place on the way to one or to infinity.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretch: Tensor
    elbo: float
    mode: Tensor
    arrived: bool

    def distance(self, gap: Tensor) -> float:
        """Length of a difference ``(D,)`` in standard deviations."""
        scaled = gap / self.scale
        along = self.directions.mT @ scaled
        shrink = -self.stretch / (1 + self.stretch)
        return float((scaled + self.directions @ (shrink * along)).norm())

    def covariance(self) -> Tensor:
        """Dense covariance ``(D, D)``."""
        root = self.scale.unsqueeze(-1) * (torch.eye(len(self.loc)).to(self.loc) + (
            self.directions * self.stretch) @ self.directions.mT)
        return root @ root.mT


def pathfinder(score: Score, starts: Tensor) -> list[PathGaussian]:
    r"""The best Gaussian along the L-BFGS path of each start, best first.

    At every point of a path L-BFGS knows an inverse Hessian :math:`H`; the Gaussian
    :math:`\mathcal N(z + H \nabla \log p(z), H)` with the highest ELBO is where the path meets
    the bulk of the mass, which in many dimensions is not at the mode.

    Args:
        score: The log joint and its gradient.
        starts: Points ``(S, D)``.

    Returns:
        One Gaussian for every start that has a density.

    References:
        Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder, arXiv:2108.03782.
    """
    memory = min(max(6, starts.shape[-1]), 20)
    paths = maximize(score, starts, NUM_STEPS, memory)
    found = [_best(score, path, memory) if len(path.z) > 1 else _flat(path) for path in paths]
    return sorted((g for g in found if g is not None), key=lambda g: -g.elbo)


def _flat(path: Path) -> PathGaussian:
    """Where there is nowhere to go, the standard normal at the start, if nothing else is found."""
    z = path.z[-1]
    return PathGaussian(z, torch.ones_like(z), z.new_zeros(len(z), 0), z.new_zeros(0),
                        -math.inf, z, arrived=False)


@torch.no_grad()
def _best(score: Score, path: Path, memory: int) -> PathGaussian | None:
    loc, scale, directions, stretch = _gaussians(path, memory)
    noise = torch.randn(NUM_DRAWS, 1, loc.shape[-1], dtype=loc.dtype, device=loc.device)
    inside = torch.einsum("tdr,ntd->ntr", directions, noise.expand(-1, len(loc), -1))
    z = loc + scale * (noise + torch.einsum("tdr,ntr->ntd", directions, stretch * inside))
    log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) \
        - scale.log().sum(-1) - stretch.log1p().sum(-1)
    elbo = elbo_of(score.value(z.flatten(0, 1)).reshape(z.shape[:2]) - log_q, dim=0)
    best = int(elbo.argmax())
    if not elbo[best].isfinite():
        return None
    return PathGaussian(loc[best], scale[best], directions[best], stretch[best],
                        elbo[best].item(), path.z[-1], _arrived(path, loc[-1]))


def _arrived(path: Path, newton: Tensor) -> bool:
    """Whether no step from the end, up to the full Newton step, promises more than a little."""
    return bool((newton - path.z[-1]) @ path.gradient[-1] < ARRIVED)


def _gaussians(path: Path, memory: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, scale, directions and stretch at some points of the path, the last ones densely."""
    s, y = path.z.diff(dim=0), -path.gradient.diff(dim=0)
    chosen = _spread(len(s))
    alpha, good = _diagonals(s, y)
    parts = []
    for t in chosen:
        kept = [i for i in range(t + 1) if good[i]][-memory:]
        parts.append(_gaussian(path.z[t + 1], path.gradient[t + 1], alpha[t],
                               s[kept].mT, y[kept].mT))
    rank = max(stretch.shape[-1] for *_, stretch in parts)
    pad = torch.nn.functional.pad
    return (torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]),
            torch.stack([pad(p[2], (0, rank - p[2].shape[-1])) for p in parts]),
            torch.stack([pad(p[3], (0, rank - len(p[3]))) for p in parts]))


def _spread(count: int) -> list[int]:
    """At most so many of the points, more of the late ones, as the path slows down."""
    if count <= NUM_CANDIDATES:
        return list(range(count))
    late = NUM_CANDIDATES // 2
    early = torch.linspace(0, count - late - 1, NUM_CANDIDATES - late).long().tolist()
    return sorted({*early, *range(count - late, count)})


def _diagonals(s: Tensor, y: Tensor) -> tuple[Tensor, list[bool]]:
    """Diagonal of the inverse Hessian after every step, and which steps could be used (eq. 15)."""
    alpha, all_alpha, good = torch.ones_like(s[0]), [], []
    for ds, dy in zip(s, y, strict=True):
        b = dy @ ds
        usable = bool(b > 1e-12 * (dy @ dy))
        if usable:
            a, c = dy @ (alpha * dy), ds @ (ds / alpha)
            new = 1 / (a / (b * alpha) + dy.square() / b - a * ds.square() / (b * c * alpha ** 2))
            usable = bool((new.isfinite() & (new > 0)).all())
            alpha = new if usable else alpha
        all_alpha.append(alpha)
        good.append(usable)
    return torch.stack(all_alpha), good


def _gaussian(z: Tensor, gradient: Tensor, alpha: Tensor, s: Tensor, y: Tensor
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Mean, and the inverse Hessian :math:`\mathrm{diag}(\alpha) + \beta\gamma\beta^\top`."""
    scale = alpha.sqrt()
    count = s.shape[-1]
    if not count:
        return z + alpha * gradient, scale, s, z.new_zeros(0)
    product = s.mT @ y
    triangle = product.triu()
    inverse = torch.linalg.solve_triangular(
        triangle, torch.eye(count, dtype=z.dtype, device=z.device), upper=True)
    middle = product.diagonal().diag() + y.mT @ (alpha.unsqueeze(-1) * y)
    gamma = torch.cat([torch.cat([torch.zeros_like(inverse), -inverse], -1),
                       torch.cat([-inverse.mT, inverse.mT @ middle @ inverse], -1)])
    beta = torch.cat([scale.unsqueeze(-1) * y, s / scale.unsqueeze(-1)], -1)
    q, r = torch.linalg.qr(beta)
    small = r @ gamma @ r.mT
    values, vectors = torch.linalg.eigh(0.5 * (small + small.mT).nan_to_num())
    directions = q @ vectors
    # H g, with H = diag(s) (I + Q diag(values) Q^T) diag(s):
    half = scale * gradient
    loc = z + scale * (half + directions @ (values * (directions.mT @ half)))
    return loc, scale, directions, (1 + values).clamp(min=1e-12).sqrt() - 1
