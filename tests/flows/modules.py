"""Modules a user might write: invertible for all their parameters, the identity at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_nfvi.flows import MLP


class Bend(nn.Module):
    r"""Each coordinate by itself: :math:`z = u + (e^s - 1) \tanh u`, which rises for any s."""

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(input_dim))
        self.shift = MLP(context_dim, input_dim, (8,)) if context_dim else None

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if self.shift is None else self.shift(context)
        return u + torch.expm1(torch.tanh(self.log_slope + shift)) * torch.tanh(u)


class Mix(Bend):
    """All coordinates: a bend, then the exponential of a matrix."""

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.generator = nn.Parameter(torch.zeros(input_dim, input_dim))

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(u, context) @ torch.matrix_exp(self.generator)


class Steer(Bend):
    """Each coordinate bends, and is shifted by a network of those before it (or after it)."""

    upper = False

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.weight = nn.Parameter(torch.zeros(input_dim, input_dim))

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        below = self.weight.triu(1) if self.upper else self.weight.tril(-1)
        return super().forward(u, context) + torch.sin(u) @ below.mT


class SteerUp(Steer):
    """The same, upper triangular."""

    upper = True


class SteerWithDiagonal(Steer):
    """The same, and it knows its diagonal."""

    def diagonal(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if self.shift is None else self.shift(context)
        slope = torch.expm1(torch.tanh(self.log_slope + shift))
        return 1 + slope * (1 - torch.tanh(u)**2)


class Ridges(nn.Module):
    r"""Few directions: :math:`z = b(u) + W^\top c \tanh(W u)` with small :math:`c`."""

    def __init__(self, input_dim: int, context_dim: int = 0, *, bend: bool = False) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 2 * input_dim).reshape(2, input_dim).cos()
        self.weight = nn.Parameter(start)
        self.height = nn.Parameter(torch.zeros(2))
        self.shift = MLP(context_dim, 2, (8,)) if context_dim else None
        self.base = Bend(input_dim, context_dim) if bend else None

    def inner(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if self.shift is None else self.shift(context)
        return torch.tanh(u @ self.weight.mT + shift)

    def outer(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        bound = 3 * (1 + self.weight.square().sum())  # the slopes of a bend are above 1/3
        return (torch.tanh(self.height) / bound * h) @ self.weight

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        start = u if self.base is None else self.base(u, context)
        return start + self.outer(self.inner(u, context), context)


class Turn(nn.Module):
    """A linear map with an inverse of its own: the exponential of a matrix and of its negative."""

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.generator = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.shift = MLP(context_dim, input_dim, (8,)) if context_dim else None

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if self.shift is None else self.shift(context)
        return u @ torch.matrix_exp(self.generator) + shift

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0 if self.shift is None else self.shift(context)
        return (z - shift) @ torch.matrix_exp(-self.generator)
