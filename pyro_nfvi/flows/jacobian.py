r"""Log-determinants of the Jacobian of any differentiable map, by its structure, over a batch.

A map takes points ``(*batch, D)`` to points ``(*batch, D)``, each row by itself. Then one product
with its Jacobian :math:`J` serves the whole batch, and no loop runs over rows. What a structure
costs, in products (each about as much as the map) and in arithmetic a row:

================  =====================  ==============================================
structure         products               beside them
================  =====================  ==============================================
``"diagonal"``    1                      :math:`O(D)`
``"triangular"``  :math:`D`; 1 call if   :math:`O(D)`, no LU
                  the map has
                  ``diagonal(x)``
``"low-rank"``    :math:`2 M + 1`        :math:`O(D M^2)`
``"full"``        :math:`D`              :math:`O(D^3)`, a batched LU
estimates         one a term and probe   :math:`O(D)`; no determinant, but unbiased
================  =====================  ==============================================

A product with a triangular matrix gives sums along its columns or rows, never its diagonal, so
that of a black box takes :math:`D` products. A map :math:`z_i = \tau(x_i;\, c_i(x_{<i}))` whose two
parts are at hand needs one: hold the second still, ``log_abs_det(lambda v: tau(v, c(x)), x,
structure="diagonal")``.
"""

from __future__ import annotations

import importlib
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import broadcast_batch, check_positive_int, check_tensor, type_name
from pyro_nfvi.engine.record import NotRecordable, is_recording

Map = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]
STRUCTURES = ("full", "diagonal", "triangular", "low-rank")
MODES = ("auto", "forward", "reverse")
FORWARD_RULES, DYNAMO = "torch._decomp.decompositions_for_jvp", "torch._dynamo"


class LowRankUpdate(nn.Module):
    r"""A map that moves points in few directions: :math:`z = b(x) + g(h(x))`.

    .. math::
        J = B + G H, \qquad
        \log|\det J| = \log|\det B| + \log|\det(I_M + H B^{-1} G)|

    with :math:`B` diagonal, :math:`G` of shape :math:`D \times M` and :math:`H` of shape
    :math:`M \times D`: this is what ``structure="low-rank"`` reads from the attributes ``inner``,
    ``outer`` and, where there is one, ``base``.

    Args:
        inner: :math:`h`, from ``(*batch, D)`` to ``(*batch, M)``.
        outer: :math:`g`, from ``(*batch, M)`` to ``(*batch, D)``.
        base: :math:`b`, elementwise and without critical points. Default: the identity.

    Shape:
        x, z: ``(*batch, D)``. With a context, each part takes it as its second argument.

    Raises:
        ValueError: If a part is no map.

    Example:
        >>> ridge = LowRankUpdate(nn.Sequential(nn.Linear(50, 2), nn.Tanh()), nn.Linear(2, 50))
        >>> log_abs_det(ridge, torch.randn(7, 50), structure="low-rank").shape
        torch.Size([7])
    """

    def __init__(self, inner: Map, outer: Map, base: Map | None = None) -> None:
        super().__init__()
        for name, part in {"inner": inner, "outer": outer, "base": base}.items():
            if not callable(part) and not (name == "base" and part is None):
                raise ValueError(f"LowRankUpdate expected `{name}` to be a map of tensors, got "
                                 f"{type_name(part)}.")
        self.inner, self.outer, self.base = inner, outer, base

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The image of ``x``."""
        args = () if context is None else (context,)
        start = x if self.base is None else self.base(x, *args)
        return start + self.outer(self.inner(x, *args), *args)


# ------------------------------------------------------------------ log-determinants

def log_abs_det(fn: Map, x: Tensor, context: Tensor | None = None, *, structure: str = "full",
                mode: str = "auto", max_bytes: int | None = None) -> Tensor:
    r"""Log-determinant :math:`\log|\det \partial f / \partial x|` at every row of ``x``.

    The structure is taken at its word; :class:`~pyro_nfvi.flows.FreeForm` checks it. The result
    is :math:`-\infty` where the Jacobian is singular, and differentiable wherever the map is one
    time more.

    Args:
        fn: The map, of operations that ``torch.func`` transforms: ``fn(x)``, or ``fn(x, context)``
            with a context.
        x: Points.
        context: What the map is conditioned on, or None.
        structure: ``"full"``, ``"diagonal"``, ``"triangular"`` (lower or upper; the map may have a
            method ``diagonal`` that returns the diagonal) or ``"low-rank"`` (the map has ``inner``
            and ``outer``, see :class:`LowRankUpdate`).
        mode: Whether ``"full"`` and ``"triangular"`` use ``"forward"`` or ``"reverse"`` products.
            The two take as many for a square Jacobian; ``"auto"`` is reverse, which was the
            cheaper one on every kind of layer of this package except when gradients of
            millions of entries follow, where forward is up to a quarter faster.
        max_bytes: Bound on the memory of all tensors that are alive at once on the way, inputs and
            results apart. The cost of a few rows is measured first, then as many go at a time as
            fit; where not even one does, its products are taken in parts. With gradients enabled
            the bound holds in the backward pass too (of first derivatives), which computes each
            part again. Not counted is what one operation needs inside, and what an allocator
            keeps of freed memory. Default: everything at once.

    Shape:
        x: ``(*batch, D)``; context: ``(*batch, context_dim)``; result: ``(*batch,)``. With
        ``max_bytes`` the map is called on ``(n, D)``.

    Returns:
        The log-determinants.

    Raises:
        ValueError: If an option is unknown, the map changes shapes or lacks the parts of its
            structure, or the bound is below what the smallest part takes.

    Example:
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(log_abs_det(torch.exp, x, structure="diagonal"), x.sum(-1))
        True
    """
    return value_and_log_abs_det(fn, x, context, structure=structure, mode=mode,
                                 max_bytes=max_bytes)[1]


def value_and_log_abs_det(fn: Map, x: Tensor, context: Tensor | None = None, *,
                          structure: str = "full", mode: str = "auto",
                          max_bytes: int | None = None) -> Pair:
    """The image of ``x`` and the log-determinant there, as :func:`log_abs_det`, in one go.

    Example:
        >>> z, log_det = value_and_log_abs_det(lambda x: 2 * x, torch.ones(7, 3),
        ...                                    structure="diagonal")
        >>> z.shape, torch.allclose(log_det, torch.tensor(8.0).log())
        (torch.Size([7, 3]), True)
    """
    owner = "log_abs_det"
    check_structure(owner, fn, structure)
    return _value_and(owner, structure, fn, x, context, mode, max_bytes)


def low_rank_log_det(left: Tensor, right: Tensor, diagonal: Tensor | None = None) -> Tensor:
    r"""Log-determinant of :math:`B + G H` by the matrix determinant lemma, :math:`O(D M^2)`.

    .. math:: \log|\det(B + G H)| = \log|\det B| + \log|\det(I_M + H B^{-1} G)|

    Args:
        left: :math:`G`.
        right: :math:`H`.
        diagonal: Diagonal of :math:`B`, without zeros. Default: ones.

    Shape:
        left: ``(*batch, D, M)``; right: ``(*batch, M, D)``; diagonal: ``(*batch, D)``; result:
        ``(*batch,)``.

    Example:
        >>> left, right = torch.randn(100, 2), torch.randn(2, 100)
        >>> dense = torch.linalg.slogdet(torch.eye(100) + left @ right).logabsdet
        >>> torch.allclose(low_rank_log_det(left, right), dense, rtol=1e-3)
        True
    """
    scaled = left if diagonal is None else left / diagonal.unsqueeze(-1)
    small = right @ scaled
    eye = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    update = torch.linalg.slogdet(eye + small).logabsdet
    return update if diagonal is None else update + diagonal.abs().log().sum(-1)


def jacobian(fn: Map, x: Tensor, context: Tensor | None = None, *, mode: str = "auto"
             ) -> Pair:
    r"""The image of ``x`` and the Jacobian at every row, in one batched sweep.

    Args:
        fn: The map, from ``(*batch, D)`` to ``(*batch, K)``, each row by itself.
        x: Points ``(*batch, D)``.
        context: What the map is conditioned on, or None.
        mode: ``"reverse"`` takes :math:`K` products, ``"forward"`` takes :math:`D`; ``"auto"`` is
            reverse unless :math:`K > 2 D`.

    Returns:
        The image ``(*batch, K)`` and the Jacobians ``(*batch, K, D)``.

    Example:
        >>> z, matrix = jacobian(nn.Linear(3, 2), torch.zeros(5, 3))
        >>> z.shape, matrix.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 3]))
    """
    x, context = _checked_point("jacobian", fn, x, context)
    _check_mode("jacobian", mode)
    fn = _bound(fn, context)
    if mode != "forward":
        z, pull = _pullback(fn, x)
    if mode == "forward" or (mode == "auto" and z.shape[-1] > 2 * x.shape[-1]):
        z, columns = _pushed(fn, x, _basis(x, 0, x.shape[-1]))
        return z, columns.movedim(0, -1)
    return z, pull(_spread(_basis(z, 0, z.shape[-1]), z)).movedim(0, -2)


def value_and_diagonal(fn: Map, x: Tensor, context: Tensor | None = None, hooks: bool = False
                       ) -> Pair:
    """The image of an elementwise map and the derivative of every coordinate, by one product."""
    z, pull = _pullback(_bound(fn, context), x, hooks)
    _check_image(x, z)
    return z, pull(torch.ones_like(z))


def low_rank_parts(fn: Any, x: Tensor, context: Tensor | None = None, hooks: bool = False
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    r"""The image under a :class:`LowRankUpdate`, and :math:`G, H` and the diagonal of :math:`B`."""
    inner, outer = _bound(fn.inner, context), _bound(fn.outer, context)
    h, pull = _pullback(inner, x, hooks)
    right = pull(_spread(_basis(h, 0, h.shape[-1]), h)).movedim(0, -2)
    moved, columns = _pushed(outer, h, _basis(h, 0, h.shape[-1]))
    _check_image(x, moved)
    left = columns.movedim(0, -1)
    if getattr(fn, "base", None) is None:
        return x + moved, left, right, None
    start, diagonal = value_and_diagonal(fn.base, x, context, hooks)
    return start + moved, left, right, diagonal


def check_structure(owner: str, fn: Any, structure: Any) -> None:
    """Check that the structure is a known one, and that the map has the parts it needs.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise ValueError(f"{owner} expected `structure` to be one of {', '.join(STRUCTURES)}, got "
                         f"{structure!r}.")
    lacking = [part for part in ("inner", "outer") if not callable(getattr(fn, part, None))]
    if structure == "low-rank" and lacking:
        raise ValueError(f"{owner} expected a map of structure 'low-rank' to have `inner` and "
                         f"`outer`, got {type_name(fn)} without {' and '.join(lacking)}. Make it "
                         "of its parts: LowRankUpdate(inner, outer).")


# ------------------------------------------------------------------ estimates

def rademacher(x: Tensor, num_probes: int = 1) -> Tensor:
    """Random signs for :func:`trace` and :func:`power_series_log_det`: ``(num_probes, *x.shape)``.

    Of all noise with independent entries of unit variance, signs have the least variance.

    Example:
        >>> rademacher(torch.zeros(7, 3), 4).shape
        torch.Size([4, 7, 3])
    """
    check_positive_int("rademacher", "num_probes", num_probes)
    uniform = torch.rand(num_probes, *x.shape, dtype=x.dtype, device=x.device)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(x.dtype)


def trace(fn: Map, x: Tensor, context: Tensor | None = None, *, noise: Tensor | None = None,
          mode: str = "auto", max_bytes: int | None = None) -> Pair:
    r"""The image of ``x`` and the trace of the Jacobian there, exact or estimated.

    .. math:: \operatorname{tr} J = \operatorname{E} v^\top J v, \qquad
              \operatorname{E} v v^\top = I

    Args:
        fn: The map, of operations that ``torch.func`` transforms.
        x: Points.
        context: What the map is conditioned on, or None.
        noise: Probes :math:`v`, such as ``rademacher(x, 4)``, over which the estimate is a mean:
            one product each. Default: none, and the trace is exact by :math:`D` products.
        mode: As in :func:`log_abs_det`, for the exact trace.
        max_bytes: As in :func:`log_abs_det`, for the exact trace.

    Shape:
        x: ``(*batch, D)``; noise: ``(*probes, *batch, D)``; image: ``(*batch, D)``; trace:
        ``(*batch,)``.

    Raises:
        ValueError: If the noise does not have the shape of ``x`` behind the probes, or both it and
            a bound are given.

    Example:
        >>> x = torch.randn(5, 3)
        >>> z, exact = trace(torch.sin, x)
        >>> torch.allclose(exact, x.cos().sum(-1))
        True

    References:
        Hutchinson (1990), A stochastic estimator of the trace of the influence matrix; Grathwohl
        et al. (2019), FFJORD, arXiv:1810.01367, section 3.1.
    """
    if noise is None:
        return _value_and("trace", "trace", fn, x, context, mode, max_bytes)
    if max_bytes is not None:
        raise ValueError("trace expected `max_bytes` to be None beside `noise`, got "
                         f"{max_bytes!r}. Pass fewer probes at a time.")
    x, context = _checked_point("trace", fn, x, context)
    z, pull = _pullback(_bound(fn, context), x)
    _check_image(x, z)
    probes = _checked_noise("trace", noise, x)
    return z, (pull(probes) * probes).sum(-1).mean(0)


def power_series_log_det(fn: Map, x: Tensor, context: Tensor | None = None, *,
                         noise: Tensor | None = None, num_terms: int = 10,
                         roulette: float | None = None, neumann_gradient: bool = False) -> Pair:
    r"""The image of ``x`` and :math:`\log\det(I + J)` of a contraction, by its power series.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k
              \approx \sum_{k=1}^{N} \frac{(-1)^{k+1}}{k\, P(N \ge k)}\, v^\top J^k v

    With ``num_terms`` alone the series is cut: for :math:`\lVert J \rVert \le L < 1` and
    :math:`n` terms the error is at most :math:`D L^{n+1} / ((n + 1)(1 - L))`. With ``roulette``
    set to :math:`q` as well, each further term follows with probability :math:`q`, which makes the
    result unbiased; its variance is finite for :math:`L^2 < q`. One number of terms is drawn for
    the whole batch, from torch's CPU generator.

    Args:
        fn: The contraction :math:`g`, of operations that ``torch.func`` transforms.
        x: Points.
        context: What the map is conditioned on, or None.
        noise: Probes :math:`v`, such as ``rademacher(x)``: one product each a term. Default: none,
            and the traces are exact by :math:`D` products a term.
        num_terms: Number of terms that are always there.
        roulette: Probability :math:`q` of each further term, or None for none.
        neumann_gradient: Whether gradients come from the Neumann series of the inverse,
            :math:`\nabla \log\det(I + J) = \operatorname{E} \sum_k (-1)^k v^\top J^k\, \nabla J\,
            v`: as good an estimate, for the memory of one product instead of all. First
            derivatives only, and so not with ``create_graph=True``.

    Shape:
        x: ``(*batch, D)``; noise: ``(*probes, *batch, D)``; image: ``(*batch, D)``; log-det:
        ``(*batch,)``.

    Raises:
        ValueError: If an option is out of range or the noise has another shape.

    Example:
        >>> x = torch.randn(5, 3)
        >>> _, log_det = power_series_log_det(lambda x: 0.5 * x, x, num_terms=30)
        >>> torch.allclose(log_det, 3 * torch.tensor(1.5).log())
        True

    References:
        Behrmann et al. (2019), Invertible Residual Networks, arXiv:1811.00995, section 3.2; Chen
        et al. (2019), Residual Flows for Invertible Generative Modeling, arXiv:1906.02735, eq. 6
        (roulette) and 8 (Neumann gradient).
    """
    owner = "power_series_log_det"
    weights = _term_weights(owner, num_terms, roulette)
    x, context = _checked_point(owner, fn, x, context)
    z, pull = _pullback(_bound(fn, context), x)
    _check_image(x, z)
    if noise is None:
        probes, count = _spread(_basis(z, 0, z.shape[-1]), z), 1
    else:
        probes = _checked_noise(owner, noise, x)
        count = len(probes)
    series = _neumann_series if neumann_gradient else _power_series
    return z, series(pull, probes, weights).sum(0) / count


def _power_series(pull: Map, probes: Tensor, weights: list[float]) -> Tensor:
    total, power = torch.zeros_like(probes[..., 0]), probes
    for k, weight in enumerate(weights, 1):
        power = pull(power)
        total = total + (-1) ** (k + 1) * weight / k * (power * probes).sum(-1)
    return total


def _neumann_series(pull: Map, probes: Tensor, weights: list[float]) -> Tensor:
    """Values of the power series, with the gradient of one product."""
    with torch.no_grad():
        total, power, inverse = torch.zeros_like(probes[..., 0]), probes, torch.zeros_like(probes)
        for k, weight in enumerate(weights, 1):
            inverse = inverse + (-1) ** (k + 1) * weight * power
            power = pull(power)
            total = total + (-1) ** (k + 1) * weight / k * (power * probes).sum(-1)
    surrogate = (pull(inverse) * probes).sum(-1)
    estimate: Tensor = _FirstDerivatives.apply(total + (surrogate - surrogate.detach()))
    return estimate


class _FirstDerivatives(torch.autograd.Function):
    """The identity, but an error where a second derivative is wanted of what has only a first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("power_series_log_det has first derivatives only with "
                                      "neumann_gradient=True. Leave it off for more.")
        return grad


def _term_weights(owner: str, num_terms: int, roulette: float | None) -> list[float]:
    r"""The factors :math:`1 / P(N \ge k)` of the terms of one draw."""
    weights = [1.0] * check_positive_int(owner, "num_terms", num_terms)
    if roulette is None:
        return weights
    if not isinstance(roulette, float) or not 0 < roulette < 1:
        raise ValueError(f"{owner} expected `roulette` to be a probability between 0 and 1, got "
                         f"{roulette!r}.")
    while float(torch.rand(())) < roulette:
        weights.append(weights[-1] / roulette)
    return weights


# ------------------------------------------------------------------ products, all rows at once

def _pullback(fn: Map, x: Tensor, hooks: bool = False) -> tuple[Tensor, Map]:
    r"""The image, and :math:`v \mapsto J^\top v` for one vector a row or a batch of such.

    Inside a checkpoint (``hooks``) torch refuses its functional transforms, and autograd does it.
    """
    if not hooks:
        z, pull = vjp(fn, x)
        return z, lambda v: (vmap(lambda w: pull(w)[0])(v) if v.dim() > z.dim() else pull(v)[0])
    start = x if x.requires_grad else x.detach().requires_grad_()
    start = start.view_as(start)  # so that gradients stop here, whatever x came from
    z = fn(start)
    return z, lambda v: torch.autograd.grad(z, start, v, create_graph=True, materialize_grads=True,
                                            is_grads_batched=v.dim() > z.dim())[0]


def _pushed(fn: Map, x: Tensor, basis: Tensor) -> Pair:
    r"""The image, and :math:`J v` for every :math:`v` of a basis: ``(t, *batch, K)``."""
    _load_forward_rules()
    x = x.clone()  # of a slice, torch would make tangents as large as what it is a slice of

    def push(v: Tensor) -> Pair:
        z, product = jvp(fn, (x,), (v.expand_as(x),))
        return z, product
    pair: Pair = vmap(push, out_dims=(None, 0), randomness="same")(basis)
    return pair


def _load_forward_rules() -> None:
    """Have torch load its forward derivatives, at which some versions warn of their own code."""
    if not torch.compiler.is_compiling() and FORWARD_RULES not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(FORWARD_RULES)


def _basis(like: Tensor, start: int, stop: int) -> Tensor:
    """Unit vectors from ``start`` to ``stop``: ``(stop - start, D)``."""
    place = torch.arange(like.shape[-1], device=like.device)
    return (place[start:stop, None] == place).to(like.dtype)


def _spread(basis: Tensor, like: Tensor) -> Tensor:
    """The same vectors for every row: ``(t, *batch, D)``."""
    shape = (len(basis), *[1] * (like.dim() - 1), basis.shape[-1])
    return basis.reshape(shape).expand(-1, *like.shape)


def _bound(fn: Map, context: Tensor | None) -> Map:
    return fn if context is None else lambda v: fn(v, context)


class _Sweep:
    """How the products of a structure are taken: which way, how many at once, and whether again.

    Args:
        mode: ``"forward"``, ``"reverse"`` or ``"auto"``.
        size: Products at once; None for all.
        hooks: Whether this runs inside a checkpoint.
    """

    def __init__(self, mode: str = "auto", size: int | None = None, hooks: bool = False) -> None:
        self.forward, self.size, self.hooks = mode == "forward", size, hooks

    def products(self, fn: Map, x: Tensor, context: Tensor | None, keep: Map) -> Pair:
        """The image, and what ``keep(products, basis)`` keeps of each part, along dimension 0."""
        dim, parts, z = x.shape[-1], [], x
        size = self.size or dim
        for start in range(0, dim, size):
            part = partial(self.part, fn, keep, start, min(start + size, dim))
            z, kept = _again(part, x, context) if self.hooks and size < dim else part(x, context)
            parts.append(kept)
        return z, parts[0] if len(parts) == 1 else torch.cat(parts)

    def part(self, fn: Map, keep: Map, start: int, stop: int, x: Tensor, context: Tensor | None
             ) -> Pair:
        """The image, and what is kept of the products with some unit vectors."""
        fn, basis = _bound(fn, context), _spread(_basis(x, start, stop), x)
        if self.forward:
            z, products = _pushed(fn, x, _basis(x, start, stop))
        else:
            z, pull = _pullback(fn, x, self.hooks)
            _check_image(x, z)
            products = pull(basis)
        _check_image(x, z)
        return z, keep(products, basis)


def _keep_all(products: Tensor, basis: Tensor) -> Tensor:
    return products


def _keep_diagonal(products: Tensor, basis: Tensor) -> Tensor:
    return (products * basis).sum(-1)


def _dense_log_det(products: Tensor) -> Tensor:
    """By rows or by columns: the determinant is that of the transpose."""
    return torch.linalg.slogdet(products.movedim(0, -1)).logabsdet  # as LAPACK stores matrices


def _diagonal_log_det(entries: Tensor) -> Tensor:
    return entries.abs().log().sum(0)


def _sum(entries: Tensor) -> Tensor:
    return entries.sum(0)


# What takes a product for every coordinate: what is kept of them, and what comes of that.
SWEPT: dict[str, tuple[Map, Map]] = {"full": (_keep_all, _dense_log_det),
                                     "triangular": (_keep_diagonal, _diagonal_log_det),
                                     "trace": (_keep_diagonal, _sum)}


def _is_swept(quantity: str, fn: Any) -> bool:
    knows_diagonal = quantity == "triangular" and callable(getattr(fn, "diagonal", None))
    return quantity in SWEPT and not knows_diagonal


def _evaluate(quantity: str, sweep: _Sweep, fn: Any, x: Tensor, context: Tensor | None) -> Pair:
    if not _is_swept(quantity, fn):
        return FEW_PRODUCTS[quantity](sweep, fn, x, context)
    keep, finish = SWEPT[quantity]
    z, kept = sweep.products(fn, x, context, keep)
    return z, finish(kept)


def _elementwise(sweep: _Sweep, fn: Map, x: Tensor, context: Tensor | None) -> Pair:
    z, diagonal = value_and_diagonal(fn, x, context, sweep.hooks)
    return z, diagonal.abs().log().sum(-1)


def _known_diagonal(sweep: _Sweep, fn: Any, x: Tensor, context: Tensor | None) -> Pair:
    z, entries = _bound(fn, context)(x), _bound(fn.diagonal, context)(x)
    _check_image(x, z)
    _check_image(x, entries, "`fn.diagonal`")
    return z, entries.abs().log().sum(-1)


def _low_rank(sweep: _Sweep, fn: Any, x: Tensor, context: Tensor | None) -> Pair:
    z, left, right, diagonal = low_rank_parts(fn, x, context, sweep.hooks)
    return z, low_rank_log_det(left, right, diagonal)


FEW_PRODUCTS: dict[str, Callable[..., Pair]] = {
    "diagonal": _elementwise, "triangular": _known_diagonal, "low-rank": _low_rank}


def _value_and(owner: str, quantity: str, fn: Map, x: Tensor, context: Tensor | None, mode: str,
               max_bytes: int | None) -> Pair:
    x, context = _checked_point(owner, fn, x, context)
    _check_mode(owner, mode)
    if max_bytes is None:
        return _evaluate(quantity, _Sweep(mode), fn, x, context)
    check_positive_int(owner, "max_bytes", max_bytes)
    if is_recording():
        raise NotRecordable(f"{owner} with max_bytes measures memory as it runs")
    run = _in_chunks
    if DYNAMO in sys.modules:  # not loaded for this alone: it takes seconds
        run = torch.compiler.disable(_in_chunks)
    return run(owner, quantity, fn, x, context, mode, max_bytes)


# ------------------------------------------------------------------ memory

def _in_chunks(owner: str, quantity: str, fn: Map, x: Tensor, context: Tensor | None, mode: str,
               max_bytes: int) -> Pair:
    if not x.numel():
        return _evaluate(quantity, _Sweep(mode), fn, x, context)
    batch, dim = x.shape[:-1], x.shape[-1]
    rows = x.reshape(-1, dim)
    contexts = None if context is None else context.reshape(len(rows), -1)
    with forked_rng():
        first = _bound(fn, None if contexts is None else contexts[:1])(rows[:1])
    _check_image(rows[:1], first)
    hooks = first.requires_grad
    budget = _Budget(owner, quantity, fn, rows, contexts, mode, max_bytes, hooks)
    num_rows, size = budget.split()
    hooks = hooks and (num_rows < len(rows) or size < budget.num_products)
    run = partial(_evaluate, quantity, _Sweep(mode, size, hooks), fn)
    run = partial(_again, run) if hooks else run
    pairs = [run(*chunk) for chunk in _chunks(rows, contexts, num_rows)]
    z, log_det = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return z.reshape(x.shape), log_det.reshape(batch)


def _chunks(rows: Tensor, contexts: Tensor | None, size: int
            ) -> list[tuple[Tensor, Tensor | None]]:
    chunks = rows.split(size)
    others = [None] * len(chunks) if contexts is None else contexts.split(size)
    return list(zip(chunks, others, strict=True))


def _again(function: Callable[..., Pair], *inputs: Tensor | None) -> Pair:
    """The results, without what their gradient needs: the backward pass computes that again."""
    pair: Pair = checkpoint(function, *inputs, use_reentrant=False)
    return pair


class _Budget:
    """How many rows and products fit into a number of bytes, by measuring ever more of them.

    What is alive at once grows at most in proportion to both, so a measurement at few bounds that
    at more; none is made of what may not fit.
    """

    PROBE_ROWS = (2, 16)  # more than one, so that what is there once (masked weights) counts less

    def __init__(self, owner: str, quantity: str, fn: Map, rows: Tensor, contexts: Tensor | None,
                 mode: str, max_bytes: int, hooks: bool) -> None:
        self.owner, self.quantity, self.fn, self.mode = owner, quantity, fn, mode
        self.rows, self.contexts, self.max_bytes = rows, contexts, max_bytes
        self.hooks = hooks  # whether there will be a gradient
        self.num_products = rows.shape[-1] if _is_swept(quantity, fn) else 1
        self.measured: dict[tuple[int, int], int] = {}

    def split(self) -> tuple[int, int]:
        """Rows a chunk, and products a part of one."""
        if self.cost(1, 1) > self.max_bytes:
            raise ValueError(f"{self.owner} expected `max_bytes` of at least "
                             f"{self.cost(1, 1):,} for one row of {self.rows.shape[-1]} "
                             f"coordinates, got {self.max_bytes:,}.")
        size = self.products_that_fit()
        return (self.rows_that_fit() if size == self.num_products else 1), size

    def products_that_fit(self) -> int:
        """Products at once for one row."""
        size = 1
        for _ in range(4):
            grown = min(self.num_products, self.max_bytes * size // self.cost(1, size))
            if grown == size or self.cost(1, grown) > self.max_bytes:
                break
            size = grown
        return size

    def rows_that_fit(self) -> int:
        """Rows at once, with all their products."""
        rows, size = 1, self.num_products
        for more in self.PROBE_ROWS:
            more = min(more, len(self.rows))
            if more * self.cost(rows, size) > rows * self.max_bytes:
                return self.max_bytes * rows // self.cost(rows, size)
            if self.cost(more, size) > self.max_bytes:
                return rows
            rows = more
        return self.max_bytes * rows // self.cost(rows, size)

    def cost(self, rows: int, size: int) -> int:
        """Bytes for so many rows, ``size`` products at a time."""
        if (rows, size) not in self.measured:
            self.measured[rows, size] = (self.cost_of_whole(rows) if size == self.num_products else
                                         self.cost_of_part(rows, size) + self.cost_of_rest(rows))
        return self.measured[rows, size]

    def cost_of_whole(self, rows: int) -> int:
        """Bytes with all products at once."""
        sweep = _Sweep(self.mode, hooks=self.hooks)
        return self._peak(partial(_evaluate, self.quantity, sweep, self.fn), *self._probe(rows))

    def cost_of_part(self, rows: int, size: int) -> int:
        """Bytes of a few products."""
        sweep = _Sweep(self.mode, hooks=self.hooks)
        keep, _ = SWEPT[self.quantity]
        return self._peak(partial(sweep.part, self.fn, keep, 0, size), *self._probe(rows))

    def cost_of_rest(self, rows: int) -> int:
        """Bytes of what comes of all the products: the parts, the whole, and its factors."""
        keep, finish = SWEPT[self.quantity]

        def rest(x: Tensor, context: None) -> Pair:
            basis = _spread(_basis(x, 0, x.shape[-1]), x)
            kept = keep(basis.clone() + x.sum(), basis)
            return kept, finish(torch.cat(kept.split(1)))
        return self._peak(rest, torch.zeros_like(self.rows[:rows]), None)

    def _probe(self, rows: int) -> tuple[Tensor, Tensor | None]:
        contexts = None if self.contexts is None else self.contexts[:rows].detach()
        return self.rows[:rows].detach(), contexts

    def _peak(self, function: Callable[..., Pair], x: Tensor, context: Tensor | None) -> int:
        """Most bytes alive at once in a call, and in its gradient where there will be one."""
        with forked_rng(), MemoryMeter() as meter, torch.set_grad_enabled(self.hooks):
            x = x.clone().requires_grad_(self.hooks)
            total = sum(result.sum() for result in function(x, context))
            if isinstance(total, Tensor) and total.requires_grad:
                torch.autograd.grad(total, [x, *self._parameters()], allow_unused=True)
        return meter.peak

    def _parameters(self) -> list[Tensor]:
        if not isinstance(self.fn, nn.Module):
            return []
        return [parameter for parameter in self.fn.parameters() if parameter.requires_grad]


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it, on any device.

    What was there before does not count, nor does the workspace inside one operation.

    Attributes:
        peak: The most bytes that were alive at once.

    Example:
        >>> with MemoryMeter() as meter:
        ...     y = torch.zeros(1000) + 1
        >>> meter.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, 0)
        result = op(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, 1)
        return result

    def _note(self, tensor: Tensor, new: int) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), new * storage.nbytes()
        if key in self._known:
            return

        def forget(_: Any) -> None:
            self.alive -= size
            del self._known[key]
        self._known[key] = weakref.ref(storage, forget)
        self.alive += size
        self.peak = max(self.peak, self.alive)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------ checks

def _checked_point(owner: str, fn: Any, x: Any, context: Any) -> tuple[Tensor, Tensor | None]:
    """The point and the context, broadcast."""
    if not callable(fn):
        raise ValueError(f"{owner} expected `fn` to be a map of tensors, got {type_name(fn)}.")
    x = check_tensor(owner, "x", x, _last_size(x))
    if context is not None:
        context = check_tensor(owner, "context", context, _last_size(context))
    return broadcast_batch(owner, "x", x, context)


def _last_size(value: Any) -> int:
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else 1


def _check_mode(owner: str, mode: Any) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{owner} expected `mode` to be one of {', '.join(MODES)}, got {mode!r}.")


def _check_image(x: Tensor, z: Any, what: str = "`fn`") -> None:
    if not isinstance(z, Tensor) or z.shape != x.shape:
        got = tuple(z.shape) if isinstance(z, Tensor) else type_name(z)
        raise ValueError(f"log|det J| expected {what} to return a tensor of the shape of x, "
                         f"{tuple(x.shape)}, got {got}.")


def _checked_noise(owner: str, noise: Any, x: Tensor) -> Tensor:
    """The probes, in one dimension."""
    shape = tuple(noise.shape) if isinstance(noise, Tensor) else ()
    if len(shape) < x.dim() or shape[len(shape) - x.dim():] != tuple(x.shape):
        ending = ", ".join(map(str, x.shape))
        raise ValueError(f"{owner} expected `noise` of shape (*probes, {ending}), got "
                         f"{shape or type_name(noise)}. Draw it: rademacher(x).")
    return noise.reshape(-1, *x.shape)
