"""Fixed affine maps: coordinates in which a distribution that was fitted before is standard."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.linear import matvec


class FixedMap(Bijection):
    """What both fixed maps have: a shift that is no parameter, and a matrix.

    Args:
        shift: Image of zero, ``(D,)``.
        **others: Further tensors of the map, to be checked with it.
    """

    shift: Tensor

    def __init__(self, shift: Tensor, **others: Tensor) -> None:
        for name, value in {"shift": shift, **others}.items():
            _check_numbers(type(self).__name__, name, value)
        if shift.dim() != 1:
            raise ValueError(f"{type(self).__name__} expected `shift` of shape (D,), got "
                             f"{tuple(shift.shape)}.")
        super().__init__(shift.numel())
        self.register_buffer("shift", shift.detach().clone())

    @abstractmethod
    def factor(self) -> Tensor:
        """The matrix, dense: ``(D, D)``."""


def _check_numbers(owner: str, argument: str, value: Any) -> None:
    """Refuse what is no tensor of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type_name(value)
        raise ValueError(f"{owner} expected `{argument}` to be a floating-point tensor, got "
                         f"{kind}.")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{owner} expected `{argument}` to hold finite numbers, got "
                         f"{int((~value.isfinite()).sum())} that are not.")


class FixedLinear(FixedMap):
    r"""Affine map :math:`z = t + L u` with a lower-triangular :math:`L` that is not learned.

    Args:
        shift: :math:`t`, of shape ``(D,)``.
        factor: :math:`L`, of shape ``(D, D)``, with a positive diagonal.

    Shape:
        u, z: ``(*batch, D)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the shapes do not fit, or the factor has no positive diagonal.

    Example:
        >>> z, log_det = FixedLinear(torch.zeros(2), 3.0 * torch.eye(2))(torch.ones(2))
        >>> z, round(float(log_det.exp()))
        (tensor([3., 3.]), 9)
    """

    lower: Tensor
    inverse_lower: Tensor
    log_det: Tensor

    def __init__(self, shift: Tensor, factor: Tensor) -> None:
        super().__init__(shift, factor=factor)
        dim = self.input_dim
        if factor.shape != (dim, dim) or not bool((factor.diagonal() > 0).all()):
            raise ValueError(f"FixedLinear expected `factor` of shape ({dim}, {dim}) with a "
                             f"positive diagonal, got {tuple(factor.shape)}.")
        lower = factor.detach().tril()
        eye = torch.eye(dim, dtype=lower.dtype, device=lower.device)
        self.register_buffer("lower", lower)
        self.register_buffer("inverse_lower",
                             torch.linalg.solve_triangular(lower, eye, upper=False))
        self.register_buffer("log_det", lower.diagonal().log().sum())

    def factor(self) -> Tensor:
        """The matrix, dense: ``(D, D)``."""
        return self.lower

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return matvec(self.lower, u) + self.shift, self.log_det.expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return matvec(self.inverse_lower, z - self.shift), -self.log_det.expand(z.shape[:-1])


class FixedLowRank(FixedMap):
    r"""Scales after a stretch along a few directions, none of it learned.

    .. math:: z = t + s \odot (u + Q\, \mathrm{diag}(c)\, Q^\top u), \qquad
              \log|\det J| = \textstyle\sum_i \log s_i + \sum_j \log(1 + c_j)

    Args:
        shift: :math:`t`, of shape ``(D,)``.
        scale: :math:`s`, of shape ``(D,)``, positive.
        directions: :math:`Q`, of shape ``(D, r)``, with orthonormal columns.
        stretch: :math:`c`, of shape ``(r,)``, above -1.

    Shape:
        u, z: ``(*batch, D)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the shapes do not fit, or a scale is not positive or a stretch not above -1.

    Example:
        >>> layer = FixedLowRank(torch.zeros(2), torch.ones(2), torch.eye(2)[:, :1],
        ...                      torch.tensor([1.0]))
        >>> layer(torch.ones(2))[0]
        tensor([2., 1.])
    """

    scale: Tensor
    directions: Tensor
    stretch: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, directions: Tensor, stretch: Tensor) -> None:
        super().__init__(shift, scale=scale, directions=directions, stretch=stretch)
        dim, rank = self.input_dim, stretch.numel()
        if scale.shape != (dim,) or directions.shape != (dim, rank):
            raise ValueError(f"FixedLowRank expected `scale` of shape ({dim},) and `directions` of "
                             f"shape ({dim}, {rank}), got {tuple(scale.shape)} and "
                             f"{tuple(directions.shape)}.")
        if not bool((scale > 0).all()) or not bool((stretch > -1).all()):
            raise ValueError("FixedLowRank expected a positive `scale` and a `stretch` above -1, "
                             f"got at least {scale.min():.3g} and {stretch.min():.3g}.")
        for name, value in (("scale", scale), ("directions", directions), ("stretch", stretch)):
            self.register_buffer(name, value.detach().clone())

    def factor(self) -> Tensor:
        """The matrix, dense: ``(D, D)``."""
        return self._stretched(torch.eye(self.input_dim).to(self.scale),
                               self.stretch).mT * self.scale.unsqueeze(-1)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = torch.addcmul(self.shift, self.scale, self._stretched(u, self.stretch))
        return z, self._log_det().expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u = self._stretched((z - self.shift) / self.scale, -self.stretch / (1 + self.stretch))
        return u, -self._log_det().expand(z.shape[:-1])

    def _stretched(self, u: Tensor, stretch: Tensor) -> Tensor:
        return u + (matvec(self.directions.mT, u) * stretch) @ self.directions.mT

    def _log_det(self) -> Tensor:
        return self.scale.log().sum() + self.stretch.log1p().sum()
