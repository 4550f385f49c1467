"""Bijections in sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import type_name
from pyro_nfvi.flows.bijection import Bijection


class Compose(Bijection):
    r"""Bijections applied one after the other.

    .. math:: z = f_K \circ \dots \circ f_1(u), \qquad
              \log|\det J| = \textstyle\sum_k \log|\det J_k|

    Layers built with a context all receive the same one; the others receive none.

    Args:
        layers: Bijections of one ``input_dim``, the first applied to the noise first.

    Raises:
        ValueError: If there is no layer, or the layers do not fit together.

    Example:
        >>> from pyro_nfvi.flows import Diagonal, Planar
        >>> z, log_det = Compose([Planar(2), Diagonal(2)])(torch.randn(5, 2))
        >>> z.shape, log_det.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, layers: Sequence[Bijection]) -> None:
        layers = _checked_layers(layers)
        super().__init__(_common_input_dim(layers), _common_context_dim(layers))
        self.layers = nn.ModuleList(layers)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det: Tensor | None = None
        for run in self._runs():
            u, term = run[0]._forward_run(run, u, context)
            log_det = term if log_det is None else log_det + term
        assert log_det is not None
        return u, log_det

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det: Tensor | None = None
        for layer in reversed(self.layers):
            z, term = layer._inverse(z, context if layer.context_dim else None)
            log_det = term if log_det is None else log_det + term
        assert log_det is not None
        return z, log_det

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = self._layer_inputs(u, context)
        log_det: Tensor | None = None
        for layer, known in zip(reversed(self.layers), reversed(inputs), strict=True):
            z, term = layer._inverse_at(known, z, context if layer.context_dim else None)
            log_det = term if log_det is None else log_det + term
        assert log_det is not None
        return z, log_det

    def _initialize(self, z: Tensor, context: Tensor | None) -> Tensor:
        for layer in reversed(self.layers):
            z = layer._initialize(z, context if layer.context_dim else None)
        return z

    def _runs(self) -> list[list[Bijection]]:
        """Neighbours of one class, which may know a shorter way through all of them."""
        runs: list[list[Bijection]] = []
        for layer in self.layers:
            if runs and type(runs[-1][0]) is type(layer):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return runs

    @torch.no_grad()
    def _layer_inputs(self, u: Tensor, context: Tensor | None) -> list[Tensor]:
        inputs = [u]
        for layer in self.layers[:-1]:
            u, _ = layer._forward(u, context if layer.context_dim else None)
            inputs.append(u)
        return inputs

    def extra_repr(self) -> str:
        """Nothing beyond the layers, which ``repr`` lists."""
        return ""


def _checked_layers(layers: Sequence[Bijection]) -> list[Bijection]:
    if not isinstance(layers, Iterable) or isinstance(layers, Tensor):
        raise ValueError("Compose expected `layers` to be a sequence of bijections, got "
                         f"{type_name(layers)}.")
    layers = list(layers)
    if not layers:
        raise ValueError("Compose expected `layers` to hold at least one bijection, got none.")
    for layer in layers:
        if not isinstance(layer, Bijection):
            raise ValueError(f"Compose expected `layers` to be bijections, got {type_name(layer)}. "
                             "Wrap a torch, Pyro or Zuko transform: FromTransform(transform, dim).")
    return layers


def _common_input_dim(layers: list[Bijection]) -> int:
    dims = [layer.input_dim for layer in layers]
    if len(set(dims)) > 1:
        raise ValueError(f"Compose expected `layers` of one input_dim, got {dims}.")
    return dims[0]


def _common_context_dim(layers: list[Bijection]) -> int:
    dims = sorted({layer.context_dim for layer in layers} - {0})
    if len(dims) > 1:
        raise ValueError(f"Compose expected `layers` of one context_dim, got {dims}.")
    return dims[0] if dims else 0
