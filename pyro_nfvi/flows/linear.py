"""Linear layers: diagonal, triangular, LU, low-rank, Householder, permutation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nfvi._shapes import check_context, check_positive_int
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import ContextParameter


class LinearMap(Bijection):
    r"""What every learned linear map has: :math:`z = t + A u`, with a shift and log-scales.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        self.shift = ContextParameter(torch.zeros(self.input_dim), self.context_dim)
        self.log_scale = ContextParameter(torch.zeros(self.input_dim), self.context_dim)

    def factor(self, context: Tensor | None = None) -> Tensor:
        """The matrix :math:`A`, dense: ``(*batch, D, D)``, for tests and few coordinates."""
        return self._dense(check_context(type(self).__name__, context, self.context_dim))

    @abstractmethod
    def _dense(self, context: Tensor | None) -> Tensor:
        """The matrix for a checked context."""


class Diagonal(LinearMap):
    r"""Shift and scale of each coordinate: :math:`z = t + e^{s} \odot u`.

    Its data-dependent start (:meth:`Flow.initialize`) makes the noise of the samples zero in mean
    and one in variance, which is the actnorm of Glow; a coordinate that does not vary keeps its
    scale.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Example:
        >>> layer = Diagonal(2)
        >>> with torch.no_grad():
        ...     _ = layer.log_scale.value.copy_(torch.tensor([2.0, 3.0]).log())
        >>> z, log_det = layer(torch.ones(2))
        >>> z.tolist(), round(log_det.exp().item(), 4)
        ([2.0, 3.0], 6.0)

    References:
        Dinh, Krueger & Bengio (2015), NICE, arXiv:1410.8516, section 3.3; Kingma & Dhariwal
        (2018), Glow, arXiv:1807.03039, section 3.1 (actnorm).
    """

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(context)
        z = torch.addcmul(self.shift(context), u, log_scale.exp())
        return z, log_scale.sum(-1).expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(context)
        u = (z - self.shift(context)) * (-log_scale).exp()
        return u, -log_scale.sum(-1).expand(z.shape[:-1])

    def _initialize(self, z: Tensor, context: Tensor | None) -> Tensor:
        rows = tuple(range(z.dim() - 1))
        self.shift.value += (z - self.shift(context)).mean(rows)
        spread = self._inverse(z, context)[0].std(rows, correction=0)
        self.log_scale.value += torch.where(spread > 0, spread, 1.0).log()
        return self._inverse(z, context)[0]

    def _dense(self, context: Tensor | None) -> Tensor:
        return torch.diag_embed(self.log_scale(context).exp())


class Triangular(LinearMap):
    r"""Lower-triangular map :math:`z = t + L u` with :math:`L_{ii} = e^{s_i}`.

    On a Gaussian base this is every Gaussian: :math:`L` is the Cholesky factor.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Example:
        >>> Triangular(3).factor().shape  # the Cholesky factor of the covariance
        torch.Size([3, 3])

    References:
        Kucukelbir et al. (2017), Automatic Differentiation Variational Inference,
        arXiv:1603.00788, section 2.4 (the full-rank Gaussian).
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        square = torch.zeros(self.input_dim, self.input_dim)
        self.lower = ContextParameter(square, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        factor, log_scale = self._factor(context)
        z = matvec(factor, u) + self.shift(context)
        return z, log_scale.sum(-1).expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        factor, log_scale = self._factor(context)
        u = _solve(factor, z - self.shift(context), upper=False)
        return u, -log_scale.sum(-1).expand(z.shape[:-1])

    def _factor(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(context)
        factor = self.lower(context).tril(-1) + torch.diag_embed(log_scale.exp())
        return factor, log_scale

    def _dense(self, context: Tensor | None) -> Tensor:
        return self._factor(context)[0]


class LULinear(LinearMap):
    r"""General linear map :math:`z = t + L U u` with unit-lower :math:`L`, upper :math:`U`.

    .. math:: \log|\det J| = \textstyle\sum_i s_i, \qquad U_{ii} = e^{s_i}

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Example:
        >>> LULinear(3, context_dim=2)(torch.randn(7, 3), torch.randn(7, 2))[1].shape
        torch.Size([7])

    References:
        Kingma & Dhariwal (2018), Glow, arXiv:1807.03039, eq. 10.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        square = torch.zeros(self.input_dim, self.input_dim)
        self.entries = ContextParameter(square, self.context_dim)  # L below, U above the diagonal

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, log_scale = self._factors(context)
        z = matvec(lower, matvec(upper, u)) + self.shift(context)
        return z, log_scale.sum(-1).expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower, upper, log_scale = self._factors(context)
        half = _solve(lower, z - self.shift(context), upper=False)
        return _solve(upper, half, upper=True), -log_scale.sum(-1).expand(z.shape[:-1])

    def _factors(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        entries, log_scale = self.entries(context), self.log_scale(context)
        lower = entries.tril(-1) + torch.diag_embed(torch.ones_like(log_scale))
        upper = entries.triu(1) + torch.diag_embed(log_scale.exp())
        return lower, upper, log_scale

    def _dense(self, context: Tensor | None) -> Tensor:
        lower, upper, _ = self._factors(context)
        return lower @ upper


class LowRank(LinearMap):
    r"""Scales after a symmetric stretch of low rank: :math:`z = t + e^s \odot (u + W W^\top u)`.

    .. math:: \log|\det J| = \textstyle\sum_i s_i + \log\det(I_r + W^\top W), \qquad
              (I + W W^\top)^{-1} = I - W (I_r + W^\top W)^{-1} W^\top

    On a Gaussian base, a Gaussian of :math:`D (r + 2)` parameters whose covariance has the
    symmetric root :math:`I + W W^\top` between its scales. Either way costs
    :math:`O(D r)` a point and :math:`O(D r^2)` a batch; no :math:`D \times D` matrix is made.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        rank: Number of columns :math:`r` of :math:`W`, at most :math:`D`. Default: all, up to 10.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the rank is above the number of coordinates.

    Example:
        >>> layer = LowRank(1000, rank=3)
        >>> z, log_det = layer(torch.randn(5, 1000))
        >>> z.shape, log_det.shape
        (torch.Size([5, 1000]), torch.Size([5]))

    References:
        Ong, Nott & Smith (2018), Gaussian Variational Approximation with a Factor Covariance
        Structure, arXiv:1701.03208 (low rank plus diagonal; here the root has that form).
    """

    START = 1e-5  # W is not zero, where it would have no gradient; its square is far below eps^0.5

    def __init__(self, input_dim: int, context_dim: int = 0, *, rank: int | None = None) -> None:
        super().__init__(input_dim, context_dim)
        self.rank = min(self.input_dim, 10) if rank is None else rank
        check_positive_int("LowRank", "rank", self.rank)
        if self.rank > self.input_dim:
            raise ValueError(f"LowRank expected `rank` of at most input_dim={self.input_dim}, "
                             f"got {rank}.")
        start = self.START * torch.randn(self.input_dim, self.rank)
        self.loadings = ContextParameter(start, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, log_scale = self.loadings(context), self.log_scale(context)
        stretched = u + matvec(w, matvec(w.mT, u))
        z = torch.addcmul(self.shift(context), stretched, log_scale.exp())
        return z, self._log_det(log_scale, _small_root(w)).expand(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, log_scale = self.loadings(context), self.log_scale(context)
        root = _small_root(w)
        stretched = (z - self.shift(context)) * (-log_scale).exp()
        half = _solve(root, matvec(w.mT, stretched), upper=False)
        u = stretched - matvec(w, _solve(root.mT, half, upper=True))
        return u, -self._log_det(log_scale, root).expand(z.shape[:-1])

    @staticmethod
    def _log_det(log_scale: Tensor, root: Tensor) -> Tensor:
        return log_scale.sum(-1) + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _dense(self, context: Tensor | None) -> Tensor:
        w = self.loadings(context)
        eye = torch.eye(self.input_dim, dtype=w.dtype, device=w.device)
        return self.log_scale(context).exp().unsqueeze(-1) * (eye + w @ w.mT)

    def extra_repr(self) -> str:
        """Dimensions and rank."""
        return f"{super().extra_repr()}, rank={self.rank}"


class Householder(Bijection):
    r"""Rotation as a product of reflections, of zero log-determinant.

    .. math:: z = H_M \cdots H_1 u, \qquad H_m = I - 2 \frac{v_m v_m^\top}{v_m^\top v_m}

    The vectors start in equal pairs, whose reflections undo each other.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        num_reflections: Number of reflections :math:`M`, an even number.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the number of reflections is odd.

    Example:
        >>> u = torch.randn(7, 3)
        >>> z, log_det = Householder(3)(u)
        >>> torch.allclose(z.norm(dim=-1), u.norm(dim=-1)), log_det.abs().max().item()
        (True, 0.0)

    References:
        Tomczak & Welling (2016), Improving Variational Auto-Encoders using Householder Flow,
        arXiv:1611.09630, eq. 9.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *, num_reflections: int = 2) -> None:
        super().__init__(input_dim, context_dim)
        check_positive_int("Householder", "num_reflections", num_reflections, minimum=2)
        if num_reflections % 2:
            raise ValueError("Householder expected `num_reflections` to be even (pairs start as "
                             f"the identity), got {num_reflections}.")
        pairs = torch.randn(num_reflections // 2, self.input_dim).repeat_interleave(2, 0)
        self.vectors = ContextParameter(pairs, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reflect(u, self.vectors(context).unbind(-2))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._reflect(z, self.vectors(context).unbind(-2)[::-1])

    @staticmethod
    def _reflect(x: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        for v in vectors:
            ratio = (x * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True)
            x = x - 2 * ratio * v
        return x, x.new_zeros(x.shape[:-1])


class Identity(Bijection):
    """The map that leaves every point where it is: a flow of no layers.

    Args:
        input_dim: Number of coordinates.

    Example:
        >>> Identity(2)(torch.tensor([3.0, 4.0]))
        (tensor([3., 4.]), tensor(0.))
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return u, u.new_zeros(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(z.shape[:-1])


class Permutation(Bijection):
    """Fixed reordering of the coordinates: ``z[..., i] = u[..., order[i]]``.

    Args:
        order: A permutation of ``range(D)``.

    Raises:
        ValueError: If ``order`` is no permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))[0]
        tensor([30., 10., 20.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        order = _checked_order(order)
        super().__init__(order.numel())
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return u[..., self.order], u.new_zeros(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z[..., self.inverse_order], z.new_zeros(z.shape[:-1])


def _checked_order(order: Sequence[int] | Tensor) -> Tensor:
    try:
        places = torch.as_tensor(order)
        fits = sorted(places.tolist()) == list(range(len(places)))
    except (TypeError, ValueError, RuntimeError):  # of no use as numbers
        fits = False
    if not fits:
        raise ValueError("Permutation expected `order` to be a permutation of 0, ..., D - 1, "
                         f"got {order!r}.")
    return places.long()


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for one matrix, or one a batch element."""
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _small_root(w: Tensor) -> Tensor:
    r"""Cholesky factor of :math:`I_r + W^\top W`."""
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    return torch.linalg.cholesky(eye + w.mT @ w)


def _solve(matrix: Tensor, vector: Tensor, *, upper: bool) -> Tensor:
    """Solve a triangular ``matrix @ x = vector`` for one matrix, or one a batch element."""
    if matrix.dim() == 2:
        rows = vector.reshape(-1, vector.shape[-1])
        solution = torch.linalg.solve_triangular(matrix.mT, rows, upper=not upper, left=False)
        return solution.reshape(vector.shape)
    solution = torch.linalg.solve_triangular(matrix, vector.unsqueeze(-1), upper=upper)
    return solution.squeeze(-1)
