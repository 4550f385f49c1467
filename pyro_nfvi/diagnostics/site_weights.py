"""Which latent is badly fitted: the weights as a function of one coordinate at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_nfvi import _arviz
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import ImportanceSample

DEGREE = 2  # of the polynomial in the normal score
COLUMNS = 1000  # latents looked at at a time
TAIL = 2.5  # normal scores that stand for the tails
MIN_DRAWS = 100


@dataclass(frozen=True)
class SiteWeights:
    r"""How the weights depend on each coordinate of the flat latent.

    With :math:`s_d` the normal score of a draw's rank along coordinate :math:`d`,

    .. math:: m_d = \operatorname*{arg\,min}_{\text{quadratic } m}
              \sum_i \left(\log w_i - m(s_{di})\right)^2

    is the log ratio of the posterior's marginal to the guide's, as far as a parabola tells, and the
    k-hat of :math:`\exp m_d` is that of the coordinate.

    Attributes:
        pareto_k: k-hat by site, of its worst coordinate.
        coordinate: That coordinate of the flat latent, by site.
        tails: By how much the log weight in the two tails of that coordinate exceeds that in the
            middle, the lesser of both: above zero where the guide's tails are too light.

    References:
        Vehtari et al. (2024), arXiv:1507.02646 (k-hat, of one function at a time).
    """

    pareto_k: dict[str, float]
    coordinate: dict[str, int]
    tails: dict[str, float]

    @property
    def worst(self) -> str:
        """Name of the site with the largest k-hat."""
        return max(self.pareto_k, key=lambda name: self.pareto_k[name])


def site_weights(sample: ImportanceSample, layout: LatentLayout) -> SiteWeights | None:
    """k-hat of each latent site; None of too few draws with finite weights."""
    usable = sample.finite & sample.z.isfinite().all(-1)
    if usable.sum() < MIN_DRAWS:
        return None
    log_w = (sample.log_p - sample.log_q)[usable]
    features = _features(len(log_w))
    coefficients = _coefficients(sample.z, usable, log_w, features)
    spread = torch.einsum("kd,kl,ld->d", coefficients, torch.cov(features.mT), coefficients)
    worst = {site.name: site.start + int(spread[site.start:site.start + site.size].argmax())
             for site in layout if site.size}
    low, middle, high = (features.new_tensor([place ** power for power in range(DEGREE + 1)])
                         @ coefficients for place in (-TAIL, 0.0, TAIL))
    tails = torch.minimum(low, high) - middle
    return SiteWeights({name: _pareto_k(features @ coefficients[:, place])
                        for name, place in worst.items()},
                       worst, {name: tails[place].item() for name, place in worst.items()})


def _features(count: int) -> Tensor:
    """Powers of the normal scores of so many ranks, ``(count, DEGREE + 1)``."""
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    score = torch.special.ndtri(ranks)
    return torch.stack([score ** power for power in range(DEGREE + 1)], -1)


def _coefficients(z: Tensor, usable: Tensor, log_w: Tensor, features: Tensor) -> Tensor:
    """Of the polynomial of log weights along each coordinate, ``(DEGREE + 1, D)``."""
    parts = []
    for columns in z.split(COLUMNS, dim=-1):  # of many latents, copies of all would not fit
        ordered = log_w[columns[usable].argsort(0)]  # as seen along each coordinate
        parts.append(torch.linalg.lstsq(features, ordered).solution)
    return torch.cat(parts, -1)


def _pareto_k(log_w: Tensor) -> float:
    values: np.ndarray = log_w.numpy()
    return float("-inf") if np.ptp(values) < 1e-6 else _arviz.psis(values)[1]
