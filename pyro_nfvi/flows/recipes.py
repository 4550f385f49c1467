"""Flows under their paper's name: functions that stack layers.

Every recipe takes ``(input_dim, context_dim=0, *, num_layers, ...)``; options go by keyword, or
ahead of time: ``partial(nsf, num_layers=8)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.autoregressive import Autoregressive
from pyro_nfvi.flows.bijection import Bijection, Inverse
from pyro_nfvi.flows.compose import Compose
from pyro_nfvi.flows.coupling import Coupling
from pyro_nfvi.flows.linear import Diagonal
from pyro_nfvi.flows.nets import HIDDEN_DIMS
from pyro_nfvi.flows.planar import Planar, Radial, Sylvester
from pyro_nfvi.flows.spline import RationalQuadraticSpline
from pyro_nfvi.flows.transformers import Additive, Affine, Transformer

MAX_SPLINE = 20


def planar(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """Planar flow of Rezende & Mohamed (2015), arXiv:1505.05770."""
    return _stack("planar", num_layers, lambda _: Planar(input_dim, context_dim))


def radial(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """Radial flow of Rezende & Mohamed (2015), arXiv:1505.05770."""
    return _stack("radial", num_layers, lambda _: Radial(input_dim, context_dim))


def sylvester(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
              num_ridges: int | None = None) -> Compose:
    """Sylvester flow of van den Berg et al. (2018), arXiv:1803.05649."""
    return _stack("sylvester", num_layers,
                  lambda _: Sylvester(input_dim, context_dim, num_ridges=num_ridges))


def iaf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
        hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Inverse autoregressive flow of Kingma et al. (2016), arXiv:1606.04934.

    Sampling is one pass a layer, the order of the coordinates turning round between layers.
    """
    return _stack("iaf", num_layers, lambda k: Autoregressive(
        input_dim, context_dim, reverse=k % 2 == 1, hidden_dims=hidden_dims,
        activation=activation))


def maf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
        hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Masked autoregressive flow of Papamakarios et al. (2017), arXiv:1705.07057.

    The density of any point is one pass a layer; sampling is ``input_dim`` passes a layer.
    """
    return _stack("maf", num_layers, lambda k: Inverse(Autoregressive(
        input_dim, context_dim, reverse=k % 2 == 1, hidden_dims=hidden_dims,
        activation=activation)))


def nice(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
         hidden_dims: Sequence[int] = HIDDEN_DIMS,
         activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """NICE of Dinh, Krueger & Bengio (2015), arXiv:1410.8516: additive couplings, then scales."""
    couplings = _couplings("nice", input_dim, context_dim, num_layers, Additive(), hidden_dims,
                           activation)
    return Compose([*couplings.layers, Diagonal(input_dim, context_dim)])


def realnvp(input_dim: int, context_dim: int = 0, *, num_layers: int = 8,
            hidden_dims: Sequence[int] = (32, 32),
            activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Real NVP of Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803: affine couplings."""
    return _couplings("realnvp", input_dim, context_dim, num_layers, Affine(), hidden_dims,
                      activation)


def nsf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4, num_bins: int = 8,
        bound: float = 5.0, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Neural spline flow of Durkan et al. (2019), arXiv:1906.04032: spline couplings."""
    spline = RationalQuadraticSpline(num_bins, bound)
    return _couplings("nsf", input_dim, context_dim, num_layers, spline, hidden_dims, activation)


def auto(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """The flow :class:`~pyro_nfvi.NFVI` takes if none is named, by the number of coordinates.

    Up to 20 coordinates half as many spline couplings, which bend more; beyond, affine
    couplings, which cost less.
    """
    check_positive_int("auto", "num_layers", num_layers)
    if check_positive_int("auto", "input_dim", input_dim) > MAX_SPLINE:
        return realnvp(input_dim, context_dim, num_layers=num_layers)
    return nsf(input_dim, context_dim, num_layers=(num_layers + 1) // 2, num_bins=5,
               hidden_dims=(32, 32))


def _stack(owner: str, num_layers: int, layer: Callable[[int], Bijection]) -> Compose:
    check_positive_int(owner, "num_layers", num_layers)
    return Compose([layer(k) for k in range(num_layers)])


def _couplings(owner: str, input_dim: int, context_dim: int, num_layers: int,
               transformer: Transformer, hidden_dims: Sequence[int],
               activation: Callable[[], nn.Module]) -> Compose:
    return _stack(owner, num_layers, lambda k: Coupling(
        input_dim, context_dim, mask=_alternating_mask(input_dim, k), transformer=transformer,
        hidden_dims=hidden_dims, activation=activation))


def _alternating_mask(input_dim: int, k: int) -> Tensor:
    """Second half, first half, odd, even, and again: every pair of coordinates meets."""
    place = torch.arange(check_positive_int("Coupling", "input_dim", input_dim))
    if input_dim == 1:
        return place == 0
    moved = place >= input_dim // 2 if k % 4 < 2 else place % 2 == 1
    return moved if k % 2 == 0 else ~moved
