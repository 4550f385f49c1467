"""Adam with clipped gradients on one flat vector of parameters."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

CLIP_FACTOR = 10.0  # gradients longer than this many median lengths are shortened
CLIP_WINDOW = 100  # steps of the median
SNAPSHOT_EVERY = 25  # steps
ADAM: dict[str, Any] = {
    "fused": True, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
    "amsgrad": False, "maximize": False, "foreach": False, "capturable": False,
    "differentiable": False, "grad_scale": None, "found_inf": None, "has_complex": False}


class AdamState:
    r"""Parameters and moments, flat, with the last snapshot of them.

    .. math:: m \leftarrow m + 0.1 (g - m), \quad v \leftarrow 0.999 v + 0.001 g^2, \quad
              \theta \leftarrow \theta - \frac{\eta}{1 - 0.9^t} \Big/
              \Big(\sqrt{\tfrac{v}{1 - 0.999^t}} + 10^{-8}\Big)\, m

    The gradient :math:`g` is first cut to ``CLIP_FACTOR`` times the median length of the last
    ``CLIP_WINDOW``.

    Args:
        parameters: Tensors to optimise; ``write_back`` puts the result there.

    Attributes:
        live: ``(3, size)``: parameters and both moments.
        step: Number of steps made.
        saved: The same at the last snapshot.
        saved_step: Number of steps made then.
        norms: Lengths of the last gradients, after clipping.

    References:
        Kingma & Ba (2015), Adam, arXiv:1412.6980, algorithm 1.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.live = torch.stack([flat, torch.zeros_like(flat), torch.zeros_like(flat)])
        self.saved = self.live.clone()
        self.step = self.saved_step = 0
        self.count = flat.new_zeros((), dtype=torch.float32)
        self.norms: deque[float] = deque(maxlen=CLIP_WINDOW)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.live.shape[1]

    def views(self) -> list[Tensor]:
        """The flat parameters in the shapes and types of the originals."""
        parts = self.live[0].split([p.numel() for p in self.parameters])
        return [part.view(p.shape).to(p.dtype)
                for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the flat parameters to the originals."""
        for parameter, value in zip(self.parameters, self.views(), strict=True):
            parameter.copy_(value)

    def snapshot(self) -> dict[str, Any]:
        """All of it, as a file holds it."""
        return {"live": self.live.clone(), "saved": self.saved.clone(), "step": self.step,
                "saved_step": self.saved_step, "norms": list(self.norms)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.live.copy_(snapshot["live"])
        self.saved.copy_(snapshot["saved"])
        self.step, self.saved_step = snapshot["step"], snapshot["saved_step"]
        self.norms.clear()
        self.norms.extend(snapshot["norms"])
        self.write_back()

    def roll_back(self) -> None:
        """Return to the last snapshot."""
        self.live.copy_(self.saved)
        self.step = self.saved_step
        self.write_back()

    def limit(self) -> float:
        """The longest gradient that is not cut."""
        return CLIP_FACTOR * statistics.median(self.norms) if self.norms else math.inf

    def update(self, gradient: Tensor, norm: float, rate: float) -> None:
        """One step along a flat gradient of this length; it counts once it is whole."""
        theta, m, v = self.live
        limit, step = self.limit(), self.step + 1
        scale = limit / (norm + 1e-6)
        gradient = gradient if scale >= 1 else gradient * scale
        self.count.fill_(self.step)  # the kernel adds one
        adam([theta], [gradient], [m], [v], [], [self.count], lr=rate, **ADAM)
        self.norms.append(min(norm, limit))
        if (step - 1) % SNAPSHOT_EVERY == 0:
            self.saved.copy_(self.live)
            self.saved_step = step
        self.step = step
