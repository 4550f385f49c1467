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
    fitted, tails = _marginal(sample.z[usable].double(), log_w)
    worst = {site.name: site.start + int(fitted[:, site.start:site.start + site.size].var(0)
                                         .argmax()) for site in layout if site.size}
    return SiteWeights({name: _pareto_k(fitted[:, place]) for name, place in worst.items()},
                       worst, {name: tails[place].item() for name, place in worst.items()})


def _marginal(z: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Fitted log weights ``(n, D)``, in the order of each coordinate, and their tails ``(D,)``."""
    count = len(z)
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    score = torch.special.ndtri(ranks)
    features = torch.stack([score ** power for power in range(DEGREE + 1)], -1)
    ordered = log_w[z.argsort(0)]  # as seen along each coordinate
    coefficients = torch.linalg.lstsq(features, ordered).solution
    low, middle, high = (features.new_tensor([place ** power for power in range(DEGREE + 1)])
                         @ coefficients for place in (-TAIL, 0.0, TAIL))
    return features @ coefficients, torch.minimum(low, high) - middle


def _pareto_k(log_w: Tensor) -> float:
    values: np.ndarray = log_w.numpy()
    return float("-inf") if np.ptp(values) < 1e-6 else _arviz.psis(values)[1]
