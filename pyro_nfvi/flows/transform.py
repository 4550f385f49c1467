"""Between bijections and torch transforms, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import ComposeTransform, _InverseTransform

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection


class BijectionTransform(Transform, nn.Module):
    r"""A bijection as a ``torch.distributions`` transform that owns its parameters.

    It goes wherever torch or Pyro take a transform, ``TransformedDistribution`` and
    ``AutoNormalizingFlow`` among them. It remembers the last call, so that a sample is scored
    without an inverse; copies and pickles forget it.

    Args:
        bijection: The map :math:`u \mapsto z`.
        context: Context it is conditioned on, or None.

    Raises:
        ValueError: If ``bijection`` is none, or the context does not fit it.

    Example:
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from pyro_nfvi.flows import planar
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> TransformedDistribution(base, [BijectionTransform(planar(2))]).rsample().shape
        torch.Size([2])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1

    def __init__(self, bijection: Bijection, context: Tensor | None = None,
                 cache_size: int = 1) -> None:
        if not isinstance(bijection, Bijection):
            raise ValueError("BijectionTransform expected `bijection` to be a Bijection, got "
                             f"{type_name(bijection)}.")
        super().__init__(cache_size=cache_size)
        self.bijection = bijection
        self.context = context
        self._log_det: Tensor | None = None
        self._constant = False  # whether the last call kept no graph

    def __call__(self, u: Tensor) -> Tensor:
        """Map ``u`` forward, or recall it."""
        self._forget_constants()
        return super().__call__(u)

    def _inv_call(self, z: Tensor) -> Tensor:
        self._forget_constants()
        return super()._inv_call(z)

    def _call(self, u: Tensor) -> Tensor:
        self._constant = not torch.is_grad_enabled()
        z, self._log_det = self.bijection(u, self.context)
        return z

    def _inverse(self, z: Tensor) -> Tensor:
        self._constant = not torch.is_grad_enabled()
        u, log_det = self.bijection.inverse(z, self.context)
        self._log_det = -log_det
        return u

    def _forget_constants(self) -> None:
        """Forget a call made under ``no_grad`` once gradients are wanted."""
        if self._constant and torch.is_grad_enabled():
            self._cached_x_y, self._log_det = (None, None), None

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant at ``x``; from memory if ``x`` or ``y`` was the last to pass."""
        x_old, y_old = self._cached_x_y if self._cache_size else (None, None)
        if self._log_det is not None and (x is x_old or y is y_old):
            return self._log_det
        return self.bijection(x, self.context)[1]

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        """The same transform with or without memory of its last call."""
        if self._cache_size == cache_size:
            return self
        return BijectionTransform(self.bijection, self.context, cache_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inv": None, "_cached_x_y": (None, None), "_log_det": None}

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class FromTransform(Bijection):
    r"""Any torch, Pyro or Zuko transform as a bijection.

    Every module inside the transform is registered, so that its parameters train, also inside
    a plain ``ComposeTransform`` or an ``.inv``; whatever it cached is dropped after each call.

    Args:
        transform: The map :math:`u \mapsto z`, over vectors or elementwise; or, with a context,
            a callable from the context to such a transform (a Zuko lazy transform).
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Raises:
        ValueError: If ``transform`` is none, or changes shapes.
        NotImplementedError: At the first inverse of a transform that has none.

    Example:
        >>> from torch.distributions.transforms import ExpTransform
        >>> FromTransform(ExpTransform(), 2)(torch.zeros(2))
        (tensor([1., 1.]), tensor(0.))
    """

    def __init__(self, transform: Transform | Callable[..., Transform], input_dim: int,
                 context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        if not callable(transform) or isinstance(transform, Bijection):
            raise ValueError("FromTransform expected `transform` to be a transform or a callable "
                             f"that returns one, got {type_name(transform)}.")
        self._transform = [transform]  # in a list: registered once, just below
        self.modules_inside = nn.ModuleList(_modules_of(transform))

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self._conditioned(context)
        z = transform(u)
        self._check_shape(u, z)
        return z, self._log_det(transform, u, z)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transform = self._conditioned(context)
        try:
            u = transform.inv(z)
        except (NotImplementedError, KeyError) as error:
            raise NotImplementedError(
                f"{type_name(transform)} has no inverse for points it did not produce. Use one of "
                "pyro_nfvi.flows, each of which inverts any point.") from error
        self._check_shape(z, u)
        return u, -self._log_det(transform, u, z)

    def _conditioned(self, context: Tensor | None) -> Transform:
        source = self._transform[0]
        if isinstance(source, Transform):
            return source
        try:
            transform = source(context) if self.context_dim else source()
        except TypeError as error:
            given = "a context" if self.context_dim else "nothing"
            raise ValueError(f"FromTransform expected `transform` to be a function of {given} that "
                             f"returns a transform, got TypeError: {error}.") from error
        if not isinstance(transform, Transform):
            raise ValueError("FromTransform expected `transform` to return a transform, got "
                             f"{type_name(transform)}.")
        return transform

    def _log_det(self, transform: Transform, u: Tensor, z: Tensor) -> Tensor:
        log_det = transform.log_abs_det_jacobian(u, z)
        _drop_caches(transform)
        extra = log_det.dim() - (u.dim() - 1)
        return log_det.sum(-1) if extra == 1 else log_det

    def _check_shape(self, u: Tensor, z: Tensor) -> None:
        if z.shape != u.shape:
            raise ValueError("FromTransform expected `transform` to keep the shape "
                             f"{tuple(u.shape)}, got {tuple(z.shape)} from "
                             f"{type_name(self._transform[0])}.")

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._transform[0], Transform):
            _drop_caches(self._transform[0])
        return self.__dict__


def _parts(transform: Any) -> Iterator[Any]:
    """The transform, and whatever transforms it is made of."""
    yield transform
    if isinstance(transform, ComposeTransform):
        for part in transform.parts:
            yield from _parts(part)
    if isinstance(transform, _InverseTransform):
        yield from _parts(transform._inv)
    if isinstance(transform, (torch.distributions.IndependentTransform,)):
        yield from _parts(transform.base_transform)
    if isinstance(transform, nn.Module):
        for child in transform._modules.values():  # children() hashes, which dynamo refuses
            yield from _parts(child) if child is not None else ()


def _modules_of(transform: Any) -> list[nn.Module]:
    """Outermost modules inside the transform, each once."""
    found: list[nn.Module] = []
    for part in _parts(transform):
        inside = {id(child) for module in found for child in module.modules()}
        if isinstance(part, nn.Module) and id(part) not in inside:
            found.append(part)
    return found


def _drop_caches(transform: Any) -> None:
    """Forget what torch and Pyro transforms remember of their last call."""
    for part in _parts(transform):
        for name in [name for name in vars(part) if name.startswith("_cache")]:
            if name != "_cache_size":
                setattr(part, name, (None, None) if name == "_cached_x_y" else None)
