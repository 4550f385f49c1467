"""Transformers: the monotone scalar maps inside coupling and autoregressive layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_float


class Transformer(ABC):
    r"""A monotone scalar map :math:`\tau(u; \theta)`; zero parameters are the identity.

    It holds no learned state: the conditioner hands it the parameters.

    Shape:
        u, z: ``(*batch, n)``; params: ``(*batch, n, params_per_dim)``; log-derivatives:
        ``(*batch, n)``.
    """

    params_per_dim: int

    @abstractmethod
    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map :math:`z = \tau(u; \theta)` and its :math:`\log dz/du`."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        r"""Inverse map :math:`u = \tau^{-1}(z; \theta)` and its :math:`\log du/dz`."""

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items()
                            if key != "params_per_dim")
        return f"{type(self).__name__}({options})"


class Additive(Transformer):
    r"""Shift: :math:`z = u + t`, which preserves volume.

    References:
        Dinh, Krueger & Bengio (2015), NICE, arXiv:1410.8516, eq. 9.
    """

    params_per_dim = 1

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Shift by the parameter; the log-derivative is zero."""
        return u + params.squeeze(-1), torch.zeros_like(u)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Shift back."""
        return z - params.squeeze(-1), torch.zeros_like(z)


class Affine(Transformer):
    r"""Shift and scale, the log-scale softly clamped to :math:`(-c, c)`.

    .. math:: z = t + u\, e^{s}, \qquad s = c \tanh(\tilde s / c)

    The clamp keeps a deep stack finite however far an optimiser throws its parameters.

    Args:
        max_log_scale: The bound :math:`c`.

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, eq. 4; Andrade (2024), Stable training of normalizing flows for
        high-dimensional variational inference, arXiv:2402.16408 (the soft clamp).
    """

    params_per_dim = 2

    def __init__(self, max_log_scale: float = 3.0) -> None:
        self.max_log_scale = check_positive_float("Affine", "max_log_scale", max_log_scale)

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, then shift."""
        shift, log_scale = self._shift_and_log_scale(params)
        return torch.addcmul(shift, u, log_scale.exp()), log_scale

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Shift back, then unscale."""
        shift, log_scale = self._shift_and_log_scale(params)
        return (z - shift) * (-log_scale).exp(), -log_scale

    def _shift_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.mT.unbind(-2)  # contiguous, see nets.by_coordinate
        return shift, self.max_log_scale * torch.tanh(raw / self.max_log_scale)


def checked_transformer(owner: str, transformer: Any) -> Transformer:
    """The transformer, :class:`Affine` for None.

    Raises:
        ValueError: If it is something else.
    """
    if transformer is None:
        return Affine()
    if not isinstance(transformer, Transformer):
        raise ValueError(f"{owner} expected `transformer` to be a Transformer such as Affine(), "
                         f"got {transformer!r}.")
    return transformer
