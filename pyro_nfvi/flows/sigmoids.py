"""Monotone maps of sigmoids: conic combinations of them, and compositions of those."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_nfvi._shapes import check_flag, check_positive_int
from pyro_nfvi.flows.transformers import NumericallyInverted, soft_clamp

MIN_SLOPE = 1e-3  # smallest derivative before the output scale
SPREAD = 2.0  # the first and last sigmoid start this far from zero
LEAN = 2.0  # logit by which a hidden unit starts to lean on its own unit of the layer before
Layers = list[tuple[Tensor, ...]]  # log U, log a, b and log W of each


class DeepSigmoid(NumericallyInverted):
    r"""Layers of sigmoids, mixed and mapped back to the reals by a logit.

    A layer takes :math:`h` to :math:`\sigma^{-1}(W \sigma(a \odot U h + b))`, where :math:`a > 0`
    and the rows of :math:`W` and :math:`U` are convex weights. With :math:`S_\theta` all
    layers together,

    .. math:: z = t + e^{s} \{u + (1 - \epsilon) [S_\theta(u) - S_0(u)]\}, \qquad
              \frac{dz}{du} = e^{s} \{1 + (1 - \epsilon) [S_\theta'(u) - S_0'(u)]\}.

    :math:`S_0` is the same network at zero parameters. Its sigmoids all have slope one and stand
    apart, so that gradients tell them from each other, and by Jensen's inequality
    :math:`0 < S_0' \le 1`: the subtraction makes zero parameters the identity, and keeps every
    slope above :math:`\epsilon e^s`. Both tails are linear, so the map is onto, and everything is
    computed in logs. The inverse is a scalar root.

    Args:
        num_units: Number of sigmoids :math:`K` of a layer.
        num_layers: Number of layers.
        dense: Whether :math:`K` units lead from a layer to the next (the paper's deep dense
            sigmoidal flow), not one (its deep sigmoidal flow, composed).

    Shape:
        u: ``(*batch, n)``; params: ``(*batch, n, params_per_dim)``, which is
        ``3 * num_units * num_layers + 2`` if not dense.

    Raises:
        ValueError: If a number is no positive integer.

    Example:
        >>> sigmoids = DeepSigmoid(num_units=4)
        >>> z, log_slope = sigmoids.forward(torch.tensor([30.0]), torch.zeros(1, 14))
        >>> torch.allclose(z, torch.tensor([30.0]))
        True

    References:
        Huang, Krueger, Lacoste & Courville (2018), Neural Autoregressive Flows,
        arXiv:1804.00779, section 3.1 (deep sigmoidal and deep dense sigmoidal flows);
        Papamakarios et al. (2021), Normalizing Flows for Probabilistic Modeling and Inference,
        arXiv:1912.02762, section 3.1.1 (conic combinations and compositions).
    """

    def __init__(self, num_units: int = 8, num_layers: int = 1, dense: bool = False) -> None:
        self.num_units = check_positive_int("DeepSigmoid", "num_units", num_units)
        self.num_layers = check_positive_int("DeepSigmoid", "num_layers", num_layers)
        self.dense = check_flag("DeepSigmoid", "dense", dense)
        self._start = torch.cat([part.flatten() for k in range(self.num_layers)
                                 for part in self._layer_start(k)])
        self.params_per_dim = len(self._start) + 2

    def _map(self, u: Tensor, shift: Tensor, log_scale: Tensor, layers: Layers
             ) -> tuple[Tensor, Tensor]:
        """Sigmoids, logits, and the output scale and shift."""
        value, log_slope = u.unsqueeze(-1), torch.zeros_like(u).unsqueeze(-1)
        for layer in layers:
            value, log_slope = _layer(value, log_slope, *layer)
        learned, start = value.squeeze(-1).unbind(0)
        moved = torch.add(u, learned - start, alpha=1 - MIN_SLOPE)
        slope, start_slope = log_slope.squeeze(-1).exp().unbind(0)
        log_slope = torch.log1p((1 - MIN_SLOPE) * (slope - start_slope)) + log_scale
        return torch.addcmul(shift, moved, log_scale.exp()), log_slope

    def _bracket(self, z: Tensor, shift: Tensor, log_scale: Tensor, layers: Layers
                 ) -> tuple[Tensor, Tensor]:
        """A layer lies between the least and the greatest of its straight lines a h + b."""
        y = (z - shift) * (-log_scale).exp()
        reach = SPREAD * len(layers)  # of S_0 about the identity
        low, high = y - reach, y + reach
        for _, log_a, b, _ in reversed(layers):
            low = ((low.unsqueeze(-1) - b[0]) * (-log_a[0]).exp()).amin(-1)
            high = ((high.unsqueeze(-1) - b[0]) * (-log_a[0]).exp()).amax(-1)
        return torch.minimum(low, y - reach), torch.maximum(high, y + reach)

    # ------------------------------------------------------------------ parameters

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Layers]:
        """Output shift and log-scale; the layers with learned parameters, and with zero ones."""
        raw, shift, raw_scale = params.split([len(self._start), 1, 1], -1)
        start = self._start.to(params)
        both = torch.stack([raw + start, start.expand_as(raw)])
        return shift.squeeze(-1), soft_clamp(raw_scale.squeeze(-1)), self._layers(both)

    def _widths(self, k: int) -> tuple[int, int]:
        """Inputs and outputs of a layer."""
        inner = self.num_units if self.dense else 1
        return 1 if k == 0 else inner, 1 if k == self.num_layers - 1 else inner

    def _layer_start(self, k: int) -> tuple[Tensor, ...]:
        """Logits of U, log a, b and logits of W at zero parameters."""
        inputs, outputs = self._widths(k)
        b = torch.linspace(-SPREAD, SPREAD, self.num_units) if self.num_units > 1 \
            else torch.zeros(1)
        u = LEAN * torch.eye(self.num_units, inputs) if inputs > 1 else torch.zeros(0)
        w = LEAN * torch.eye(outputs, self.num_units) if outputs > 1 \
            else torch.zeros(1, self.num_units)
        return u, torch.zeros(self.num_units), b, w

    def _layers(self, flat: Tensor) -> Layers:
        """Logits of U (empty for one input), log a, b and logits of W of every layer."""
        layers, place = [], 0
        for k in range(self.num_layers):
            shapes = [part.shape for part in self._layer_start(k)]
            sizes = [math.prod(shape) for shape in shapes]
            u, log_a, b, w = flat[..., place:place + sum(sizes)].split(sizes, -1)
            u, w = u.unflatten(-1, shapes[0]), w.unflatten(-1, shapes[3])
            layers.append((torch.log_softmax(u, -1), soft_clamp(log_a), b,
                           torch.log_softmax(w, -1)))
            place += sum(sizes)
        return layers


def _layer(h: Tensor, log_slope: Tensor, log_u: Tensor, log_a: Tensor, b: Tensor, log_w: Tensor
           ) -> tuple[Tensor, Tensor]:
    """One layer with its log-slopes: ``(*batch, n, inputs) -> (*batch, n, outputs)``."""
    if h.shape[-1] > 1:
        log_slope = torch.logsumexp(log_u + log_slope.unsqueeze(-2), -1)
        h = (log_u.exp() * h.unsqueeze(-2)).sum(-1)
    s = torch.addcmul(b, h, log_a.exp())
    below, above = F.logsigmoid(s), F.logsigmoid(-s)  # of sigmoid(s), and of what it lacks to one
    log_p = torch.logsumexp(log_w + below.unsqueeze(-2), -1)
    log_q = torch.logsumexp(log_w + above.unsqueeze(-2), -1)
    log_slope = torch.logsumexp(log_w + (below + above + log_a + log_slope).unsqueeze(-2), -1)
    return log_p - log_q, log_slope - log_p - log_q
