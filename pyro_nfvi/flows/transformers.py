"""Transformers: the monotone scalar maps inside coupling and autoregressive layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_float
from pyro_nfvi.flows.roots import FEW_STEPS, Residual, increasing_root, refine_root

MAX_LOG_SCALE = 3.0


class Transformer(ABC):
    r"""A monotone scalar map :math:`\tau(u; \theta)`; zero parameters are the identity.

    It holds no learned state: the conditioner hands it the parameters.

    Shape:
        u, z: ``(*batch, n)``; params: ``(*batch, n, params_per_dim)``; log-derivatives:
        ``(*batch, n)``.

    Example:
        >>> class Power(Transformer):  # of positive numbers: log z = e^p log u
        ...     params_per_dim = 1
        ...     def forward(self, u, params):
        ...         p = params.squeeze(-1)
        ...         return u ** p.exp(), p + (p.exp() - 1) * u.log()
        ...     def inverse(self, z, params):
        ...         p = params.squeeze(-1)
        ...         return z ** (-p).exp(), -p + ((-p).exp() - 1) * z.log()
        >>> z, log_slope = Power().forward(torch.tensor([4.0]), torch.tensor([[0.5]]).log())
        >>> z, log_slope.exp()
        (tensor([2.]), tensor([0.2500]))
    """

    params_per_dim: int

    @abstractmethod
    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map :math:`z = \tau(u; \theta)` and its :math:`\log dz/du`."""

    @abstractmethod
    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        r"""Inverse map :math:`u = \tau^{-1}(z; \theta)` and its :math:`\log du/dz`."""

    def inverse_at(self, u: Tensor, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of ``z`` when its preimage ``u`` is known, which saves a search for it."""
        return self.inverse(z, params)

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items()
                            if key != "params_per_dim" and not key.startswith("_"))
        return f"{type(self).__name__}({options})"


class NumericallyInverted(Transformer):
    r"""A transformer without an inverse in closed form: :math:`u` is the root of an equation.

    A subclass splits its parameters into parts, maps by them with slopes bounded away from zero,
    and says where the root is.

    Shape:
        u, z: ``(*batch, n)``; params: ``(*batch, n, params_per_dim)``; log-derivatives:
        ``(*batch, n)``.
    """

    @abstractmethod
    def _split(self, params: Tensor) -> tuple[Any, ...]:
        """What the other methods take of the parameters."""

    @abstractmethod
    def _map(self, u: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
        """The map and its log-derivative."""

    @abstractmethod
    def _bracket(self, z: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
        """Points at or below and at or above the preimage of ``z``."""

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The map and its log-derivative."""
        return self._map(u, *self._split(params))

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Search for the root; its gradients are implicit."""
        parts = self._split(params)
        with torch.no_grad():
            low, high = self._bracket(z, *parts)
        u = increasing_root(self._residual(z, parts), low, high, FEW_STEPS)
        return u, -self._map(u, *parts)[1]

    def inverse_at(self, u: Tensor, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Attach gradients to the root, which is known."""
        parts = self._split(params)
        u = refine_root(self._residual(z, parts), u)
        return u, -self._map(u, *parts)[1]

    def _residual(self, z: Tensor, parts: tuple[Any, ...]) -> Residual:
        def residual(u: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self._map(u, *parts)
            return value - z, log_slope.exp()
        return residual


class Additive(Transformer):
    r"""Shift: :math:`z = u + t`, which preserves volume.

    Example:
        >>> Additive().forward(torch.zeros(3), torch.tensor([[1.0], [2.0], [3.0]]))
        (tensor([1., 2., 3.]), tensor([0., 0., 0.]))

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


class Multiplicative(Transformer):
    r"""Scale, the log-scale softly clamped to :math:`(-c, c)`.

    .. math:: z = u\, e^{s}, \qquad s = c \tanh(\tilde s / c)

    The sign of every coordinate stays.

    Args:
        max_log_scale: The bound :math:`c`.

    Example:
        >>> z, log_slope = Multiplicative().forward(torch.ones(1), torch.ones(1, 1))
        >>> torch.allclose(z.log().flatten(), log_slope)
        True

    References:
        Dinh, Krueger & Bengio (2015), NICE, arXiv:1410.8516, section 3.2 (the multiplicative
        coupling law).
    """

    params_per_dim = 1

    def __init__(self, max_log_scale: float = MAX_LOG_SCALE) -> None:
        self.max_log_scale = check_positive_float("Multiplicative", "max_log_scale", max_log_scale)

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Scale."""
        log_scale = soft_clamp(params.squeeze(-1), self.max_log_scale)
        return u * log_scale.exp(), log_scale

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Unscale."""
        log_scale = soft_clamp(params.squeeze(-1), self.max_log_scale)
        return z * (-log_scale).exp(), -log_scale


class Affine(Transformer):
    r"""Shift and scale, the log-scale softly clamped to :math:`(-c, c)`.

    .. math:: z = t + u\, e^{s}, \qquad s = c \tanh(\tilde s / c)

    The clamp keeps a deep stack finite however far an optimiser throws its parameters.

    Args:
        max_log_scale: The bound :math:`c`.

    Example:
        >>> u, params = torch.randn(5, 3), torch.randn(5, 3, 2)
        >>> z, log_slope = Affine().forward(u, params)
        >>> torch.allclose(Affine().inverse(z, params)[0], u, atol=1e-5)
        True

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, eq. 4; Andrade (2024), Stable training of normalizing flows for
        high-dimensional variational inference, arXiv:2402.16408 (the soft clamp).
    """

    params_per_dim = 2

    def __init__(self, max_log_scale: float = MAX_LOG_SCALE) -> None:
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
        return shift, soft_clamp(raw, self.max_log_scale)


def soft_clamp(x: Tensor, bound: float = MAX_LOG_SCALE) -> Tensor:
    r"""Smooth clamp :math:`c \tanh(x / c)`, of slope one at zero."""
    return bound * torch.tanh(x / bound)


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
