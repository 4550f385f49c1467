"""Encoders: networks that turn data, with or without gaps, into features."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pyro_nfvi._shapes import check_dtype, check_positive_int, type_name
from pyro_nfvi.flows.nets import check_network
from pyro_nfvi.vae.layers import (
    check_convolutions,
    check_event_shape,
    check_sizes,
    check_strides,
    dense,
    map_sizes,
    nonlinear,
)


class Encoder(nn.Module, ABC):
    r"""Features :math:`h(x)` of data: what the encoders here share.

    The public method checks, fills gaps with zeros and flattens the batch dims; a subclass
    writes ``_forward`` and may assume ``x`` of shape ``(n, *event_shape)`` and a mask that is
    ``None`` or of the same shape. A VAE takes any module with an ``output_dim`` as an encoder.

    Args:
        event_shape: Shape of one observation.
        output_dim: Number of features.
        varying: Name of the first event dim, if its size may change between calls.

    Shape:
        x, mask: ``(*batch, *event_shape)``; features: ``(*batch, output_dim)``. The mask is
        true where an entry was seen.

    Raises:
        ValueError: If an input has another shape or type.

    Example:
        >>> class Mean(Encoder):
        ...     def _forward(self, x, mask):
        ...         return x.flatten(1).mean(-1, keepdim=True)
        >>> Mean((2, 2), output_dim=1)(torch.randn(5, 2, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(self, event_shape: Sequence[int], output_dim: int, varying: str = "") -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.output_dim = output_dim
        form: list[int | str] = [*self.event_shape]
        self._form = (varying, *form[1:]) if varying else tuple(form)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of every observation in ``x``."""
        x, mask = self._checked(x, mask)
        batch = x.shape[:x.dim() - len(self._form)]
        flat = (batch.numel(), *x.shape[len(batch):])
        if mask is not None:
            x, mask = torch.where(mask, x, 0.0).reshape(flat), mask.reshape(flat)
        features = self._forward(x.reshape(flat), mask)
        return features.reshape(*batch, self.output_dim)

    @abstractmethod
    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Features ``(n, output_dim)`` of checked inputs with one batch dim."""

    def _checked(self, x: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
        owner = type(self).__name__
        x = _checked_data(owner, x, self._form)
        check_dtype(owner, "x", x, next(self.parameters(), None))
        return x, None if mask is None else _checked_mask(owner, mask, x.shape)


class MLPEncoder(Encoder):
    r"""Multilayer perceptron on the flattened data.

    .. math:: h_0 = \text{flat}(x), \qquad h_l = \phi(W_l h_{l-1} + b_l)

    Args:
        event_shape: Shape of one observation.
        hidden_dims: Sizes of the layers; the last is the number of features.
        activation: Constructor of the nonlinearity :math:`\phi`.
        masked: Whether the network is told which entries were seen. If not, a gap looks like a
            zero.

    Shape:
        x, mask: ``(*batch, *event_shape)``; features: ``(*batch, hidden_dims[-1])``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        >>> encoder = MLPEncoder((28, 28), hidden_dims=(200, 100), masked=True)
        >>> x = torch.rand(5, 28, 28)
        >>> encoder(x, mask=x > 0.5).shape
        torch.Size([5, 100])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix C.
    """

    def __init__(self, event_shape: Sequence[int], hidden_dims: Sequence[int] = (400,),
                 activation: Callable[[], nn.Module] = nn.ReLU, *, masked: bool = False) -> None:
        sizes = check_event_shape("MLPEncoder", event_shape)
        check_network("MLPEncoder", hidden_dims, activation)
        input_dim = math.prod(sizes) * (2 if masked else 1)
        super().__init__(sizes, [input_dim, *hidden_dims][-1])
        self.masked = masked
        self.layers = dense(input_dim, hidden_dims, activation)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.masked:
            seen = torch.ones_like(x) if mask is None else mask.to(x.dtype)
            x = torch.stack([x, seen], 1)
        features: Tensor = self.layers(x.unsqueeze(-1).flatten(1))
        return features


class ConvEncoder(Encoder):
    r"""Convolutions, then one dense layer on the map that remains.

    .. math:: h_l = \phi(W_l * h_{l-1} + b_l), \quad \text{gated: } h_l =
        (W_l * h_{l-1} + b_l) \odot \sigma(V_l * h_{l-1} + c_l)

    A convolution of stride :math:`s` turns a side of :math:`n` into :math:`\lceil n/s \rceil`.
    The dense layer is the same function as a convolution whose kernel is the whole map.
    A gap looks like a zero.

    Args:
        event_shape: ``(C, H, W)``, or ``(H, W)`` for one channel.
        channels: Number of channels after each convolution.
        strides: Stride of all convolutions, or one for each.
        kernel_size: Side of the kernels, odd.
        hidden_dim: Number of features.
        gated: Whether each layer multiplies its output by gates, which takes twice the channels
            inside and replaces the activation.
        activation: Constructor of the nonlinearity :math:`\phi`.

    Shape:
        x, mask: ``(*batch, *event_shape)``; features: ``(*batch, hidden_dim)``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        The encoder of van den Berg et al.:

        >>> encoder = ConvEncoder((1, 28, 28), channels=(32, 32, 64, 64, 64),
        ...                       strides=(1, 2, 1, 2, 1), gated=True)
        >>> encoder(torch.rand(5, 1, 28, 28)).shape
        torch.Size([5, 256])

    References:
        van den Oord et al. (2016), Conditional Image Generation with PixelCNN Decoders,
        arXiv:1606.05328, eq. 2 (gates); van den Berg et al. (2018), Sylvester Normalizing Flows
        for Variational Inference, arXiv:1803.05649, section 6 (the architecture).
    """

    def __init__(self, event_shape: Sequence[int], channels: Sequence[int] = (32, 64),
                 strides: int | Sequence[int] = 2, kernel_size: int = 5, hidden_dim: int = 256, *,
                 gated: bool = False, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = check_event_shape("ConvEncoder", event_shape, "(C, H, W)", "(H, W)")
        check_convolutions("ConvEncoder", channels, kernel_size, activation)
        each = check_strides("ConvEncoder", strides, len(channels), "one for each of `channels`")
        super().__init__(sizes, check_positive_int("ConvEncoder", "hidden_dim", hidden_dim))
        self._image = (1, *sizes)[-3:]  # with its channel
        depths, sides = [self._image[0], *channels], map_sizes(sizes[-2:], each)[-1]
        self.convolutions = nn.Sequential(*[
            layer for (a, b), stride in zip(pairwise(depths), each, strict=True)
            for layer in nonlinear(nn.Conv2d, a, b, kernel_size, gated=gated, stride=stride,
                                   activation=activation, padding=kernel_size // 2)])
        self.head = nn.Sequential(*nonlinear(nn.Linear, depths[-1] * math.prod(sides), hidden_dim,
                                             gated=gated, activation=activation))

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        maps: Tensor = self.convolutions(x.reshape(len(x), *self._image))
        features: Tensor = self.head(maps.flatten(1))
        return features


class RecurrentEncoder(Encoder):
    r"""Gated recurrent units: the state after the last step of each sequence.

    .. math:: s_t = \text{GRU}(s_{t-1}, x_t), \qquad h = s_T

    Sequences may have their own lengths :math:`T`, told in one of three ways: a mask (the last
    step with a seen entry is the last of the sequence; gaps before it look like zeros),
    ``lengths``, or a packed sequence. A sequence of which the mask shows nothing has the state
    zero.

    Args:
        event_shape: ``(T, F)``: number of steps, which may change between calls, and of entries
            in each.
        hidden_dim: Size of the state, the number of features.
        num_layers: Number of layers; the features are the state of the last.

    Shape:
        x, mask: ``(*batch, T, F)``; lengths: ``(*batch,)``; features: ``(*batch, hidden_dim)``.

    Raises:
        ValueError: If an option or an input has another shape or type, or a length is not
            between 1 and ``T``.

    Example:
        >>> encoder = RecurrentEncoder((10, 3))
        >>> encoder(torch.randn(5, 8, 3), lengths=torch.tensor([8, 1, 3, 8, 5])).shape
        torch.Size([5, 128])

    References:
        Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder for
        Statistical Machine Translation, arXiv:1406.1078, eq. 5-8.
    """

    def __init__(self, event_shape: Sequence[int], hidden_dim: int = 128,
                 num_layers: int = 1) -> None:
        sizes = check_event_shape("RecurrentEncoder", event_shape, "(T, F)")
        super().__init__(sizes, check_positive_int("RecurrentEncoder", "hidden_dim", hidden_dim),
                         varying="T")
        check_positive_int("RecurrentEncoder", "num_layers", num_layers)
        self.gru = nn.GRU(sizes[-1], hidden_dim, num_layers)

    def forward(self, x: Tensor | PackedSequence, mask: Tensor | None = None,
                lengths: Tensor | None = None) -> Tensor:
        """Features of every sequence in ``x``."""
        if isinstance(x, PackedSequence):
            return self._packed(x, mask, lengths)
        if lengths is not None:
            x, mask = self._checked(x, mask)
            steps = self._within(x, lengths)
            mask = steps if mask is None else mask & steps
        return super().forward(x, mask)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # Not by batch_first, which transposes in place: no graph can hold that.
        states: Tensor = self.gru(x.transpose(0, 1))[0]  # (T, n, hidden_dim)
        if mask is None:
            return states[-1]
        steps = torch.arange(1, len(states) + 1, device=x.device)
        lengths = (mask.any(-1) * steps).amax(-1)[:, None]  # (n, 1)
        last = (lengths - 1).clamp(min=0).expand_as(states[0])[None]
        return torch.where(lengths > 0, states.gather(0, last)[0], 0.0)

    def _within(self, x: Tensor, lengths: Any) -> Tensor:
        """Which entries of ``x`` lie within the lengths."""
        owner, shape = type(self).__name__, tuple(x.shape[:-2])
        if not _is_integral(lengths) or lengths.shape != shape:
            raise ValueError(f"{owner} expected `lengths` to be a tensor of integers of shape "
                             f"{shape}, the batch shape of `x`, got {_described(lengths)}.")
        check_lengths(owner, lengths, x.shape[-2])
        steps = torch.arange(x.shape[-2], device=x.device)
        return (steps < lengths.to(x.device)[..., None])[..., None].expand_as(x)

    def _packed(self, x: PackedSequence, mask: Any, lengths: Any) -> Tensor:
        owner, size = type(self).__name__, self.event_shape[-1]
        if mask is not None or lengths is not None:
            raise ValueError(f"{owner} takes no `mask` and no `lengths` with a packed sequence, "
                             f"which knows its lengths. Leave them out.")
        if x.data.shape[1:] != (size,):
            raise ValueError(f"{owner} expected packed sequences of shape (T, {size}), "
                             f"got {('T', *x.data.shape[1:])}.".replace("'", ""))
        check_dtype(owner, "x", x.data, next(self.parameters()))
        states: Tensor = self.gru(x)[1]
        return states[-1]


class SetEncoder(Encoder):
    r"""Deep set: a network on every element, pooling, and a network on what was pooled.

    .. math:: h = \rho\Big(\tfrac1n \sum_i \phi(x_i),\ \max_i \phi(x_i),\ \log(1 + n)\Big)

    The order of the elements does not matter. The sums run over the :math:`n` elements that the
    mask shows, in part at least; of an empty set, mean and maximum are zero.

    Args:
        event_shape: ``(N, F)``: number of elements, which may change between calls, and of
            entries in each.
        hidden_dims: Sizes of the layers of :math:`\phi`.
        output_dims: Sizes of the layers of :math:`\rho`; the last is the number of features.
        activation: Constructor of the nonlinearity of both.

    Shape:
        x, mask: ``(*batch, N, F)``; features: ``(*batch, output_dims[-1])``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        >>> encoder = SetEncoder((10, 3))
        >>> x = torch.randn(5, 10, 3)
        >>> torch.allclose(encoder(x), encoder(x.flip(1)), atol=1e-6)
        True

    References:
        Zaheer et al. (2017), Deep Sets, arXiv:1703.06114, theorem 2.
    """

    def __init__(self, event_shape: Sequence[int], hidden_dims: Sequence[int] = (128,),
                 output_dims: Sequence[int] = (128,),
                 activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = check_event_shape("SetEncoder", event_shape, "(N, F)")
        check_network("SetEncoder", hidden_dims, activation)
        check_sizes("SetEncoder", "output_dims", output_dims)
        pooled_dim = 2 * [sizes[-1], *hidden_dims][-1] + 1
        super().__init__(sizes, [pooled_dim, *output_dims][-1], varying="N")
        self.phi = dense(sizes[-1], hidden_dims, activation)
        self.rho = dense(pooled_dim, output_dims, activation)

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        features: Tensor = self.rho(_pooled(self.phi(x), seen.any(-1, keepdim=True)))
        return features


def features_of(encoder: nn.Module) -> int:
    """Number of features an encoder returns.

    That is its ``output_dim``; without one, what its last linear layer returns.

    Raises:
        ValueError: If the encoder has neither.

    Example:
        >>> features_of(nn.Sequential(nn.Linear(5, 8), nn.ReLU()))
        8
    """
    if hasattr(encoder, "output_dim"):
        return check_positive_int(type_name(encoder), "output_dim", encoder.output_dim)
    sizes = [layer.out_features for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    if not sizes:
        raise ValueError(f"{type_name(encoder)} expected an `output_dim`, the number of features "
                         f"it returns, got none, and no nn.Linear that tells it. "
                         f"Set it: encoder.output_dim = 64.")
    return sizes[-1]


def takes_mask(encoder: nn.Module) -> bool:
    """Whether the ``forward`` of an encoder has a parameter named ``mask``."""
    return "mask" in inspect.signature(encoder.forward).parameters


def check_lengths(owner: str, lengths: Tensor, num_steps: float = math.inf) -> None:
    """Check the lengths of sequences; this reads them, so no graph can hold it.

    Raises:
        ValueError: If a sequence is empty, or longer than ``num_steps``.
    """
    if lengths.numel() and not 0 < int(lengths.min()) <= int(lengths.max()) <= num_steps:
        raise ValueError(f"{owner} expected `lengths` between 1 and {num_steps}, got "
                         f"{int(lengths.min())} to {int(lengths.max())}. "
                         f"Leave empty sequences out.")


def _pooled(elements: Tensor, seen: Tensor) -> Tensor:
    """Mean, maximum and log count of the elements ``(n, N, D)`` with ``seen`` ``(n, N, 1)``."""
    count = seen.sum(1).to(elements.dtype)
    mean = torch.where(seen, elements, 0.0).sum(1) / count.clamp(min=1)
    largest = torch.where(seen, elements, -torch.inf).amax(1)
    return torch.cat([mean, torch.where(count > 0, largest, 0.0), count.log1p()], -1)


def _checked_data(owner: str, x: Any, form: tuple[int | str, ...]) -> Tensor:
    expected = f"({', '.join(['*batch', *map(str, form)])})"
    if not isinstance(x, Tensor):
        raise ValueError(f"{owner} expected `x` to be a tensor of shape {expected}, "
                         f"got {type_name(x)}.")
    event = x.shape[max(x.dim() - len(form), 0):]
    if len(event) != len(form) or not all(map(_fits, event, form)):
        raise ValueError(f"{owner} expected `x` of shape {expected}, got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"{owner} expected `x` to hold floating-point numbers, got {x.dtype}. "
                         f"Convert it: x.float().")
    return x


def _fits(size: int, expected: int | str) -> bool:
    return size > 0 if isinstance(expected, str) else size == expected


def _checked_mask(owner: str, mask: Any, shape: torch.Size) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{owner} expected `mask` to be a boolean tensor of the shape of `x`, "
                         f"{tuple(shape)}, got {_described(mask)}.")
    return mask


def _is_integral(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32, torch.int16,
                                                         torch.int8, torch.uint8)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type_name(value)
    return f"{value.dtype} of shape {tuple(value.shape)}"
