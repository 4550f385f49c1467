"""FreeForm: a bijection from any invertible module, with the structure of its Jacobian named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_int, check_tensor, type_name
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.jacobian import (
    check_structure,
    jacobian,
    low_rank_parts,
    value_and_diagonal,
    value_and_log_abs_det,
)
from pyro_nfvi.flows.roots import NotConverged, increasing_root

Solve = Callable[[Tensor], Tensor]
NUM_STEPS = 100  # of Newton: each halves the error at worst, and squares it near the root
NUM_HALVINGS = 40  # of a Newton step that goes too far
NUM_DOUBLINGS = 60  # of a bracket
NUM_POINTS = 16  # of a check; fewer where their Jacobians have more entries than NUM_ENTRIES
NUM_ENTRIES = 2**22
ZERO = 1e-9  # an entry below this part of the largest one is none


class FreeForm(Bijection):
    r"""A bijection :math:`z = f(u)` from your own invertible module.

    The log-determinant follows from the module by :mod:`~pyro_nfvi.flows.jacobian`, at the cost
    of the structure that is named. Without an inverse, one is found numerically: by Newton steps,
    halved where they go too far, on which :math:`\lVert f(u) - z \rVert` shrinks to zero if
    :math:`f` is a diffeomorphism of :math:`\mathbb{R}^D` (and by a bracketed root of each
    coordinate where ``"diagonal"`` maps are too flat for that). Two more steps make it twice
    differentiable. The search does not compile in one graph.

    Construction and :meth:`check` verify in float64 that the structure is what it is said to be
    and that the module is invertible at the points of the check, and say where not.

    Args:
        input_dim: Number of coordinates :math:`D`.
        module: Maps ``(n, D)`` to ``(n, D)``, each row by itself; with a context, which is its
            second argument, ``(n, context_dim)``. Its method ``inverse``, if it has one, is its
            inverse.
        inverse: The inverse, of the same signature as the module. Default: the module's own, or
            the search.
        structure: ``"full"``, ``"diagonal"`` (each coordinate by itself), ``"triangular"`` (lower
            or upper; a module with a method ``diagonal`` that returns :math:`\partial z_i /
            \partial u_i` spares the :math:`D` products) or ``"low-rank"`` (a
            :class:`~pyro_nfvi.flows.jacobian.LowRankUpdate`, or a module with its attributes).
        context_dim: Number of context coordinates; 0 for none.
        max_bytes: Bound on the memory that log-determinants take on the way, as in
            :func:`~pyro_nfvi.flows.jacobian.log_abs_det`. Default: none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the module is none, changes shapes, mixes rows, is not invertible at a
            point, or does not have the structure named; if the search does not converge.

    Example:
        >>> class Cubic(nn.Module):
        ...     def forward(self, u):
        ...         return u + u**3
        >>> layer = FreeForm(2, Cubic(), structure="diagonal")
        >>> u = torch.randn(5, 2)
        >>> z, log_det = layer(u)
        >>> torch.allclose(layer.inverse(z)[0], u, atol=1e-5)
        True
    """

    def __init__(self, input_dim: int, module: nn.Module,
                 inverse: Callable[..., Tensor] | None = None, *, structure: str = "full",
                 context_dim: int = 0, max_bytes: int | None = None) -> None:
        super().__init__(input_dim, context_dim)
        if not isinstance(module, nn.Module):
            raise ValueError("FreeForm expected `module` to be an nn.Module, got "
                             f"{type_name(module)}. Hold a function in one: its forward method.")
        check_structure("FreeForm", module, structure)
        if inverse is not None and not callable(inverse):
            raise ValueError("FreeForm expected `inverse` to be a callable such as the module, "
                             f"got {type_name(inverse)}.")
        self.module, self.structure = module, structure
        self.given_inverse = inverse
        self.max_bytes = (None if max_bytes is None
                          else check_positive_int("FreeForm", "max_bytes", max_bytes))
        self._check_at_random_points()

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._in_batch(u, *self._value_and_log_det(*_rows(u, context)))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, contexts = _rows(z, context)
        inverse = self._known_inverse()
        if inverse is None:
            u = self._refined(self._search(rows, contexts), rows, contexts)
        else:
            u = inverse(*_given(rows, contexts))
        return self._in_batch(z, u, -self._value_and_log_det(u, contexts)[1])

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._known_inverse() is not None:
            return self._inverse(z, context)
        rows, contexts = _rows(z, context)
        known = self._refined(u.reshape(rows.shape), rows, contexts)
        return self._in_batch(z, known, -self._value_and_log_det(known, contexts)[1])

    def _value_and_log_det(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return value_and_log_abs_det(self.module, u, context, structure=self.structure,
                                     max_bytes=self.max_bytes)

    @staticmethod
    def _in_batch(like: Tensor, point: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        return point.reshape(like.shape), log_det.reshape(like.shape[:-1])

    def _known_inverse(self) -> Callable[..., Tensor] | None:
        if self.given_inverse is not None:
            return self.given_inverse
        own = getattr(self.module, "inverse", None)
        return own if callable(own) else None

    # -------------------------------------------------------------- the search for a preimage

    def _search(self, z: Tensor, context: Tensor | None) -> Tensor:
        """A preimage of every row of ``z``, without derivatives."""
        with torch.no_grad():
            u = self._newton(z, context)
            residual = (self.module(*_given(u, context)) - z).abs().amax(-1)
        lost = ~(residual <= _accuracy(z, 0.5))  # so that nan is lost
        if lost.any():
            k = int(lost.nonzero()[0])
            raise NotConverged(
                f"FreeForm found no u that its module maps to {_shown(z[k])}, nor for "
                f"{int(lost.sum()) - 1} more of {len(z)} points (it came within "
                f"{float(residual[k]):.2g}). Pass `inverse`, or a module whose range is all of "
                "space.")
        return u

    def _bracketed(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Every coordinate by itself, each of which may rise or fall."""
        args, one = _given(z, context)[1:], torch.ones_like(z)
        sign = (self.module(one, *args) - self.module(-one, *args)).sign()

        def residual(u: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = value_and_diagonal(self.module, u, context)
            return sign * (value - z), sign * slope
        low, high, width = z - 1, z + 1, one
        for _ in range(NUM_DOUBLINGS):
            below = sign * (self.module(low, *args) - z) > 0
            above = sign * (self.module(high, *args) - z) < 0
            if not (below | above).any():
                break
            width = 2 * width
            low, high = torch.where(below, z - width, low), torch.where(above, z + width, high)
        return increasing_root(residual, low, high)

    def _newton(self, z: Tensor, context: Tensor | None) -> Tensor:
        """All coordinates at once; rows that get stuck start once more elsewhere."""
        u = self._descended(self._start(z, context), z, context)
        again = ([self._bracketed] if self.structure == "diagonal" else
                 [lambda z, context: self._descended(z.clone(), z, context),
                  lambda z, context: self._descended(torch.ones_like(z), z, context)])
        for search in again:
            found = self._distance(u, z, context) <= _accuracy(z, 0.5)
            rest = (~found).nonzero().squeeze(-1)
            if len(rest):
                u[rest] = search(z[rest], None if context is None else context[rest])
        return u

    def _descended(self, u: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Newton steps in place, on ever fewer rows, as some arrive or get stuck."""
        left = torch.arange(len(z), device=z.device)
        for _ in range(NUM_STEPS):
            at, target = u[left], z[left]
            others = None if context is None else context[left]
            value, solve = self._linearized(at, others)
            error = value - target
            far = error.abs().amax(-1) > _accuracy(target, 0.75)
            new, moved = self._shortened(at, target, others, error, solve(error))
            u[left] = torch.where((far & moved).unsqueeze(-1), new, at)
            left = left[far & moved]
            if not len(left):
                break
        return u

    def _start(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The image itself or zero, whichever is mapped nearer to it."""
        zero = torch.zeros_like(z)
        nearer = self._distance(z, z, context) <= self._distance(zero, z, context)
        return torch.where(nearer.unsqueeze(-1), z, zero)

    def _shortened(self, u: Tensor, z: Tensor, context: Tensor | None, error: Tensor, step: Tensor
                   ) -> tuple[Tensor, Tensor]:
        """The first half, quarter, ... of a step that comes closer, and which rows have one."""
        size, new = error.norm(dim=-1), u - step
        moved = self._distance(new, z, context) < size
        for k in range(NUM_HALVINGS):
            rest = (~moved).nonzero().squeeze(-1)
            if not len(rest):
                break
            shorter = u[rest] - 0.5 ** (k + 1) * step[rest]
            others = None if context is None else context[rest]
            new[rest] = shorter
            moved[rest] = self._distance(shorter, z[rest], others) < size[rest]
        return new, moved

    def _distance(self, u: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        distance: Tensor = (self.module(*_given(u, context)) - z).norm(dim=-1)
        return distance

    def _refined(self, u: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """Attach implicit gradients to known preimages.

        Each Newton step with a constant Jacobian gains an order in the parameters: two are exact
        to second derivatives.
        """
        u = u.detach()
        with torch.no_grad():
            _, solve = self._linearized(u, context)
        for _ in range(2):
            u = u - solve(self.module(*_given(u, context)) - z)
        return u

    def _linearized(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Solve]:
        """The image, and the inverse of the Jacobian there as a function of vectors."""
        if self.structure == "diagonal":
            z, slope = value_and_diagonal(self.module, u, context)
            return z, lambda x: x / slope
        if self.structure == "low-rank":
            z, left, right, diagonal = low_rank_parts(self.module, u, context)
            return z, _woodbury(left, right, diagonal)
        z, matrix = jacobian(self.module, u, context)
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return z, lambda x: torch.linalg.lu_solve(factors, pivots, x.unsqueeze(-1)).squeeze(-1)

    # -------------------------------------------------------------- the check

    def check(self, u: Tensor, context: Tensor | None = None) -> None:
        """Verify the structure and the inverse at points of your own, in float64.

        The Jacobian is taken in full, by ``D`` products, whatever the structure.

        Args:
            u: Points ``(*batch, input_dim)``.
            context: Contexts ``(*batch, context_dim)``, if any.

        Raises:
            ValueError: If the module changes shapes, mixes rows, is not invertible at a point or
                does not have the structure named; the message says where.
        """
        point = check_tensor("FreeForm", "u", u, self.input_dim)
        u, context = self._checked("u", point.to(self._dtype(u)), context)
        rows, contexts = _rows(u.detach().double(),
                               None if context is None else context.detach().double())
        if len(rows):
            try:
                twin = copy.deepcopy(self).double()
            except Exception as error:
                raise ValueError("FreeForm expected `module` to be one that copies, got "
                                 f"{type_name(error)}: {error}") from error
            _check(twin, rows, contexts)

    def _dtype(self, u: Tensor) -> torch.dtype:
        return next((parameter.dtype for parameter in self.parameters()), u.dtype)

    def _check_at_random_points(self) -> None:
        """Points near and far, each with its context, and then all with one."""
        tensor = next((x for x in self.state_dict().values() if x.is_floating_point()),
                      torch.empty(0))
        count = min(NUM_POINTS, max(2, NUM_ENTRIES // self.input_dim**2))
        with forked_rng(0):
            u = torch.randn(count, self.input_dim) * torch.linspace(0.5, 3, count).unsqueeze(-1)
            contexts = torch.randn(count, self.context_dim)
        u, contexts = u.to(tensor), contexts.to(tensor)
        if not self.context_dim:
            return self.check(u)
        self.check(u, contexts)
        return self.check(u, contexts[:1])

    def extra_repr(self) -> str:
        """Dimensions and structure."""
        return f"{super().extra_repr()}, structure={self.structure!r}"


def _rows(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One dimension of rows, as modules know them."""
    rows = x.reshape(-1, x.shape[-1])
    if context is None:
        return rows, None
    return rows, context.reshape(-1, context.shape[-1])


def _given(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if context is None else (x, context)


def _accuracy(z: Tensor, digits: float) -> Tensor:
    """The error of a row that so large a part of the digits allows."""
    return torch.finfo(z.dtype).eps ** digits * (1 + z.abs().amax(-1))


def _woodbury(left: Tensor, right: Tensor, diagonal: Tensor | None) -> Solve:
    r"""The inverse of :math:`B + G H`: :math:`B^{-1} - B^{-1} G (I + H B^{-1} G)^{-1} H B^{-1}`."""
    scale = torch.ones_like(left[..., 0]) if diagonal is None else diagonal
    left = left / scale.unsqueeze(-1)
    small = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device) + right @ left
    factors, pivots, _ = torch.linalg.lu_factor_ex(small)

    def solve(x: Tensor) -> Tensor:
        x = (x / scale).unsqueeze(-1)
        return (x - left @ torch.linalg.lu_solve(factors, pivots, right @ x)).squeeze(-1)
    return solve


# ------------------------------------------------------------------ what a check checks

@torch.no_grad()
def _check(layer: FreeForm, u: Tensor, context: Tensor | None) -> None:
    z = _image(layer, u, context)
    _check_rows(layer, u, z, context)
    _, matrix = jacobian(layer.module, u, context)
    if not matrix.isfinite().all():
        k = int((~matrix.isfinite()).flatten(1).any(-1).nonzero()[0])
        raise ValueError("FreeForm expected `module` to have finite derivatives, got "
                         f"{_named_entry(matrix[k], ~matrix[k].isfinite())} at u = {_shown(u[k])}.")
    _check_structure(layer, u, matrix, context)
    _check_invertible(layer, u, matrix, context)
    _check_inverse(layer, u, z, context)


def _image(layer: FreeForm, u: Tensor, context: Tensor | None) -> Tensor:
    wanted = "FreeForm expected `module` to map float64 points " + " and contexts ".join(
        str(tuple(x.shape)) for x in _given(u, context)) + f" to points {tuple(u.shape)}, got "
    try:
        z = layer.module(*_given(u, context))
    except Exception as error:
        raise ValueError(f"{wanted}{type_name(error)}: {str(error).rstrip('.')}.") from error
    if not isinstance(z, Tensor) or z.shape != u.shape or z.dtype != u.dtype:
        got = (type_name(z) if not isinstance(z, Tensor) else
               tuple(z.shape) if z.shape != u.shape else
               f"{z.dtype}. Register its tensors as buffers")
        raise ValueError(f"{wanted}{got}.")
    if not z.isfinite().all():
        k = int((~z.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"FreeForm expected `module` to map all of space, got {_shown(z[k])} at "
                         f"u = {_shown(u[k])}.")
    return z


def _check_rows(layer: FreeForm, u: Tensor, z: Tensor, context: Tensor | None) -> None:
    try:
        gap = float((layer.module(*(x[:1] for x in _given(u, context))) - z[:1]).abs().max())
        same = gap <= _half_the_digits(z[0])
        got = "" if same else f"another image of a row alone (by {gap:.3g})"
    except Exception as error:
        got = f"{type_name(error)} for a row alone: {error}"
    if got:
        raise ValueError("FreeForm expected `module` to map each row by itself, the same at every "
                         f"call, got {got}. Put layers such as dropout or batch normalization "
                         "into eval mode, or leave them out.")


def _check_structure(layer: FreeForm, u: Tensor, matrix: Tensor, context: Tensor | None) -> None:
    structure, wrong = layer.structure, torch.zeros_like(matrix)
    what = "that is not zero"
    if structure == "diagonal":
        wrong = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))
    if structure == "triangular":
        wrong = min(matrix.triu(1), matrix.tril(-1), key=lambda part: float(part.abs().max()))
        own = getattr(layer.module, "diagonal", None)
        if not _worst(wrong, matrix) and callable(own):
            entries, what = own(*_given(u, context)), "that its method `diagonal` misses"
            wrong = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1) - entries)
    if structure == "low-rank":
        _, left, right, diagonal = low_rank_parts(layer.module, u, context)
        base = torch.ones_like(u) if diagonal is None else diagonal
        wrong, what = matrix - torch.diag_embed(base) - left @ right, "that its parts miss"
    found = _worst(wrong, matrix)
    if found:
        k, i, j, size = found
        raise ValueError(f"FreeForm expected `module` to have a Jacobian of structure "
                         f"{structure!r}, got entry ({i}, {j}) {what} (by {size:.3g}) at "
                         f"u = {_shown(u[k])}. Name the structure it has: structure='full' is "
                         "always true.")


def _worst(wrong: Tensor, matrix: Tensor) -> tuple[int, int, int, float] | None:
    """Point, row, column and size of the largest entry that should be zero, if it is not."""
    size = (wrong / matrix.abs().amax((-2, -1), keepdim=True)).abs()
    if not float(size.max()) > ZERO:
        return None
    k, i, j = (int(index) for index in torch.unravel_index(size.argmax(), size.shape))
    return k, i, j, float(wrong[k, i, j])


def _check_invertible(layer: FreeForm, u: Tensor, matrix: Tensor, context: Tensor | None) -> None:
    balanced = matrix / matrix.abs().amax(-1, keepdim=True)
    balanced = balanced / balanced.abs().amax(-2, keepdim=True)
    pivots = torch.linalg.lu_factor_ex(balanced)[0].diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    singular = ~(pivots > layer.input_dim * torch.finfo(u.dtype).eps)
    if singular.any():
        k = int(singular.nonzero()[0])
        raise ValueError("FreeForm expected `module` to be invertible, got a singular Jacobian at "
                         f"u = {_shown(u[k])}.")
    if context is not None and not torch.equal(context, context[:1].expand_as(context)):
        return
    signs = torch.linalg.slogdet(matrix).sign
    flipped = signs != signs[0]
    if flipped.any():
        k = int(flipped.nonzero()[0])
        raise ValueError("FreeForm expected `module` to be invertible, got determinants of "
                         f"opposite signs at u = {_shown(u[0])} and u = {_shown(u[k])}: it folds.")


def _check_inverse(layer: FreeForm, u: Tensor, z: Tensor, context: Tensor | None) -> None:
    inverse = layer._known_inverse()
    back = (layer._refined(layer._search(z, context), z, context) if inverse is None
            else inverse(*_given(z, context)))
    if not isinstance(back, Tensor) or back.shape != u.shape:
        got = tuple(back.shape) if isinstance(back, Tensor) else type_name(back)
        raise ValueError(f"FreeForm expected `inverse` to map points {tuple(z.shape)} to points "
                         f"{tuple(u.shape)}, got {got}.")
    gap = (back - u).abs().amax(-1)
    missed = ~(gap <= _half_the_digits(u))
    if missed.any():
        k = int(missed.nonzero()[0])
        reason = ("both have the same image" if inverse is None else
                  "`inverse` does not undo `module`")
        raise ValueError(f"FreeForm expected `module` to be invertible, got back "
                         f"{_shown(back[k])} for u = {_shown(u[k])}: {reason}.")


def _half_the_digits(x: Tensor) -> Any:
    return 1e-6 * (1 + x.abs().amax(-1))


def _named_entry(matrix: Tensor, where: Tensor) -> str:
    i, j = (int(index) for index in where.nonzero()[0])
    return f"entry ({i}, {j}) = {float(matrix[i, j])}"


def _shown(point: Tensor) -> str:
    """A point, the first coordinates of it if there are many."""
    head = ", ".join(f"{float(x):.4g}" for x in point[:4])
    return f"({head}{', ...' if len(point) > 4 else ''})"
