"""From whole-numbered pixels to real numbers that a flow can model, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_int, type_name
from pyro_nfvi.flows.flow import Flow


@dataclass(frozen=True)
class Dequantization:
    r"""Uniform noise on whole-numbered pixels, then a logit: integers become real numbers.

    .. math:: z = \operatorname{logit}\!\left(\alpha + (1 - 2\alpha) \frac{x + v}{L}\right),
              \qquad v \sim \mathrm{U}[0, 1)

    Each level of :math:`x \in \{0, \dots, L - 1\}` owns a cell of volume one, so that a density
    of :math:`z` bounds the probability of the levels:

    .. math:: \log P(x) \ge \operatorname{E}_v\left[\log q(z) +
              \textstyle\sum_i \log\frac{dz_i}{dx_i}\right]

    Args:
        num_levels: Number :math:`L` of levels of a pixel: 256 for bytes, 17 for scikit-learn's
            digits, whose levels are 0 to 16.
        margin: The :math:`\alpha` that keeps the logit finite, below one half.

    Shape:
        x, z: ``(*batch, input_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If an option is of no use, or a pixel is no level.

    Example:
        >>> pixels = Dequantization(num_levels=17)
        >>> x = torch.randint(17, (5, 64))
        >>> z, log_det = pixels.dequantize(x)
        >>> torch.equal(pixels.quantize(z), x)
        True

    References:
        Theis, van den Oord & Bethge (2016), A note on the evaluation of generative models,
        arXiv:1511.01844, eq. 5; Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803,
        section 4.1 (the logit).
    """

    num_levels: int = 256
    margin: float = 0.05

    def __post_init__(self) -> None:
        check_positive_int("Dequantization", "num_levels", self.num_levels, minimum=2)
        if not isinstance(self.margin, (int, float)) or not 0 < self.margin < 0.5:
            raise ValueError("Dequantization expected `margin` to be a number between 0 and 0.5, "
                             f"got {self.margin!r}.")

    def dequantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Real numbers in place of the levels ``x``, and the log-determinant of the way there."""
        levels = self._checked(x)
        edge = 4 * torch.finfo(levels.dtype).eps * self.num_levels / (1 - 2 * self.margin)
        noise = torch.rand_like(levels).clamp(edge, 1 - edge)  # rounding must not leave the cell
        share = (levels + noise) / self.num_levels
        p = self.margin + (1 - 2 * self.margin) * share
        slope = math.log((1 - 2 * self.margin) / self.num_levels)
        z = torch.logit(p)
        return z, (slope + F.softplus(z) + F.softplus(-z)).sum(-1)  # dz/dp = 1 / (p (1 - p))

    def quantize(self, z: Tensor) -> Tensor:
        """The levels that ``z`` lies in, as integers; beyond the ends, the first or the last."""
        share = (torch.sigmoid(z) - self.margin) / (1 - 2 * self.margin)
        return (share * self.num_levels).floor().clamp(0, self.num_levels - 1).long()

    def bits_per_dim(self, flow: Flow, x: Tensor, context: Tensor | None = None, *,
                     num_samples: int = 1) -> Tensor:
        r"""Bits it takes at most to store each pixel by a flow of :math:`z`, for every image.

        .. math:: -\frac{1}{D \log 2} \operatorname{E}_v\left[\log q(z) + \log|\det dz/dx|\right]

        Args:
            flow: The flow of :math:`z`.
            x: Levels, ``(*batch, input_dim)``.
            context: Contexts of the flow, ``(*batch, context_dim)``.
            num_samples: Draws of the noise :math:`v` to average over.

        Returns:
            Bits a dimension, ``(*batch,)``.
        """
        check_positive_int("Dequantization", "num_samples", num_samples)
        nats = torch.stack([self._log_bound(flow, x, context) for _ in range(num_samples)])
        return -nats.mean(0) / (flow.input_dim * math.log(2))

    def _log_bound(self, flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
        z, log_det = self.dequantize(x)
        return flow.log_prob(z, context) + log_det

    def _checked(self, x: Any) -> Tensor:
        """``x`` as floating-point numbers, if it holds levels."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise ValueError("Dequantization expected `x` to be a tensor of shape "
                             f"(*batch, input_dim), got {type_name(x)}.")
        levels = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        inside = (levels >= 0) & (levels < self.num_levels) & (levels == levels.floor())
        if not bool(inside.all()):
            raise ValueError("Dequantization expected `x` to hold whole numbers from 0 to "
                             f"{self.num_levels - 1}, got {x[~inside][0].item()}. "
                             "Say how many levels there are: Dequantization(num_levels=...).")
        return levels
