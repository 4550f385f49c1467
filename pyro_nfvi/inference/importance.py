"""Importance weights of draws from a guide: Pareto smoothing, effective size, resampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi._memory import computed_bytes
from pyro_nfvi.flows import Flow
from pyro_nfvi.guides import GuideDraws

CHUNK = 2000  # draws scored at a time, at most
FEW = 20  # draws that are scored at once, whatever they take
CHUNK_BYTES = 1e9  # computed for them
DRAWN_NUMBERS = 4_000_000  # of draws made at a time
NUM_SAMPLES = 10_000  # draws behind a gate, k-hat, weights and summaries


@dataclass(frozen=True)
class ImportanceSample:
    r"""Draws of the flat latent with their smoothed importance weights.

    .. math:: w_i \propto \frac{p(x, z_i)}{q(z_i)}, \qquad
              \mathrm{ESS} = \frac{1}{\sum_i \bar w_i^2}

    Attributes:
        z: Draws ``(num_samples, D)``.
        log_p: Log joint densities.
        log_q: Log guide densities.
        log_weights: Pareto-smoothed, normalized log weights.
        pareto_k: k-hat, the shape of the weights' tail.

    Example:
        >>> from pyro_nfvi.flows import Identity
        >>> sample = importance_sample(Flow(Identity(2)), lambda z: -0.6 * z.square().sum(-1), 1000)
        >>> sample.z[sample.resample(200)].shape, 500 < sample.ess < 1000
        (torch.Size([200, 2]), True)

    References:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling, arXiv:1507.02646; Yao et al.
        (2018), Yes, but Did It Work?, arXiv:1802.02538.
    """

    z: Tensor
    log_p: Tensor
    log_q: Tensor
    log_weights: Tensor
    pareto_k: float

    @property
    def num_samples(self) -> int:
        """Number of draws."""
        return len(self.z)

    @property
    def ess(self) -> float:
        """Effective number of draws after weighting."""
        return float(torch.exp(-torch.logsumexp(2 * self.log_weights, 0)))

    @property
    def elbo(self) -> tuple[float, float]:
        """ELBO and its standard error, from the draws."""
        terms = (self.log_p - self.log_q)[self.finite]
        if not len(terms):
            return float("-inf"), float("nan")
        cut = math.log(len(terms) / self.num_samples)  # the guide where there is density
        return terms.mean().item() + cut, terms.std().item() / len(terms) ** 0.5

    @property
    def finite(self) -> Tensor:
        """Which draws have a finite log joint density."""
        return (self.log_p - self.log_q).isfinite()

    def resample(self, num_samples: int) -> Tensor:
        """Indices of draws, each as often as its weight asks for, in random order.

        Systematic: the number of copies of a draw is off by less than one.
        """
        cumulative = self.log_weights.exp().cumsum(0)
        start = torch.rand((), dtype=cumulative.dtype)
        places = (torch.arange(num_samples) + start) / num_samples * cumulative[-1]
        chosen = torch.searchsorted(cumulative, places)
        return chosen.clamp(max=self.num_samples - 1)[torch.randperm(num_samples)]


@torch.no_grad()
def importance_sample(flow: Flow | GuideDraws, log_joint: Callable[[Tensor], Tensor],
                      num_samples: int) -> ImportanceSample:
    """Draw from a flow, or another guide, and weigh the draws by the log joint.

    Draws whose log joint is not finite get weight zero; if none is finite, k-hat is infinite.

    Example:
        >>> from pyro_nfvi.flows import Identity
        >>> exact = importance_sample(Flow(Identity(2)), lambda z: -0.5 * z.square().sum(-1), 1000)
        >>> round(exact.ess)
        1000
    """
    z, log_q = _drawn(flow, num_samples)
    log_p = scored(log_joint, z)
    log_p, log_q = log_p.cpu().double(), log_q.cpu().double()  # before the difference rounds
    ratios = log_p - log_q
    ratios = ratios.where(ratios.isfinite(), torch.tensor(-np.inf, dtype=ratios.dtype))
    log_weights, pareto_k = _smooth(ratios.numpy())
    return ImportanceSample(z.cpu(), log_p, log_q, torch.from_numpy(log_weights), pareto_k)


def _drawn(flow: Flow | GuideDraws, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draws and their log densities; of many latents so many at a time, as a flow makes copies."""
    dim = flow.input_dim if isinstance(flow, Flow) else flow.layout.size
    size = max(1, DRAWN_NUMBERS // max(dim, 1))
    z, log_q = flow.rsample_and_log_prob((min(size, num_samples),))
    if num_samples <= size:
        return z, log_q
    all_z, all_log_q = z.new_empty(num_samples, dim), log_q.new_empty(num_samples)
    all_z[:size], all_log_q[:size] = z, log_q
    for i in range(size, num_samples, size):
        all_z[i:i + size], all_log_q[i:i + size] = flow.rsample_and_log_prob(
            (min(size, num_samples - i),))
    return all_z, all_log_q


def scored(log_joint: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Log joint of draws, so many at a time as memory holds; nan where a matrix has no factor."""
    blank = z.new_full((1,), torch.nan)
    return torch.cat([bisected(log_joint, part, blank)
                      for part in z.split(_at_once(log_joint, z, blank))])


def _at_once(log_joint: Callable[[Tensor], Tensor], z: Tensor, blank: Tensor) -> int:
    """How many draws are scored at a time, from what two of them take."""
    if getattr(log_joint, "all_at_once", False):
        return max(1, len(z))
    if len(z) <= FEW:
        return CHUNK
    each = computed_bytes(lambda: bisected(log_joint, z[:2], blank)) / 2
    return max(1, min(CHUNK, int(CHUNK_BYTES / max(each, 1.0))))


def bisected(function: Callable[[Tensor], Tensor], z: Tensor, blank: Tensor) -> Tensor:
    """Results at a batch of points; ``blank`` where a matrix has no factor, not at the others."""
    try:
        return function(z)
    except torch.linalg.LinAlgError:
        if len(z) == 1:
            return blank
        return torch.cat([bisected(function, half, blank) for half in z.tensor_split(2)])


def _smooth(ratios: np.ndarray) -> tuple[np.ndarray, float]:
    usable = np.isfinite(ratios)
    if not usable.any():
        return np.full(len(ratios), -np.log(len(ratios))), float("inf")
    log_weights = np.full(len(ratios), -np.inf)
    enough = usable.sum() >= _arviz.MIN_DRAWS
    if enough and np.ptp(ratios[usable]) < 1e-10:  # an exact fit: nothing to smooth, no tail
        log_weights[usable] = -np.log(usable.sum())
        return log_weights, float("-inf")
    log_weights[usable], pareto_k = _arviz.psis(ratios[usable])
    return log_weights, pareto_k
