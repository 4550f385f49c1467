"""Decoders: networks that turn latents into the parameters of a likelihood."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_dtype, check_positive_int, check_tensor
from pyro_nfvi.flows.nets import check_network
from pyro_nfvi.vae.layers import (
    check_convolutions,
    check_event_shape,
    check_strides,
    dense,
    map_sizes,
    nonlinear,
)


class Decoder(nn.Module, ABC):
    r"""Parameters :math:`\theta(z)` of a likelihood: what the decoders here share.

    The public method checks and flattens the leading dims; a subclass writes ``_forward`` and
    may assume ``z`` of shape ``(n, latent_dim)``. The outputs are any real numbers: it is the
    likelihood that makes a scale positive.

    Args:
        latent_dim: Size of the latent.
        event_shape: Shape of one observation.
        num_params: Number of parameters for each of its entries.

    Shape:
        z: ``(*batch, latent_dim)``; parameters: ``(*batch, num_params, *event_shape)``.

    Raises:
        ValueError: If an input has another shape or type.

    Example:
        >>> class Flat(Decoder):
        ...     def _forward(self, z):
        ...         return z.sum(-1, keepdim=True).expand(len(z), self.num_params * 4)
        >>> Flat(2, (2, 2), num_params=1)(torch.randn(5, 2)).shape
        torch.Size([5, 1, 2, 2])
    """

    def __init__(self, latent_dim: int, event_shape: Sequence[int], num_params: int) -> None:
        super().__init__()
        owner = type(self).__name__
        self.latent_dim = check_positive_int(owner, "latent_dim", latent_dim)
        self.event_shape = tuple(event_shape)
        self.num_params = check_positive_int(owner, "num_params", num_params)

    def forward(self, z: Tensor) -> Tensor:
        """Parameters of the likelihood for every latent in ``z``."""
        owner = type(self).__name__
        z = check_tensor(owner, "z", z, self.latent_dim)
        check_dtype(owner, "z", z, next(self.parameters(), None))
        params = self._forward(z.reshape(-1, self.latent_dim))
        return params.reshape(*z.shape[:-1], self.num_params, *self.event_shape)

    @abstractmethod
    def _forward(self, z: Tensor) -> Tensor:
        """Parameters of checked latents, which flatten to ``(n, num_params, *event_shape)``."""


class MLPDecoder(Decoder):
    r"""Multilayer perceptron, then one linear layer.

    .. math:: h_0 = z, \qquad h_l = \phi(W_l h_{l-1} + b_l), \qquad \theta = W h_L + b

    Args:
        latent_dim: Size of the latent.
        event_shape: Shape of one observation.
        num_params: Number of parameters for each of its entries.
        hidden_dims: Sizes of the hidden layers.
        activation: Constructor of the nonlinearity :math:`\phi`.

    Shape:
        z: ``(*batch, latent_dim)``; parameters: ``(*batch, num_params, *event_shape)``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        >>> decoder = MLPDecoder(2, (28, 28), num_params=2)
        >>> decoder(torch.randn(5, 2)).shape
        torch.Size([5, 2, 28, 28])

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114, appendix C.
    """

    def __init__(self, latent_dim: int, event_shape: Sequence[int], num_params: int = 1,
                 hidden_dims: Sequence[int] = (400,),
                 activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = check_event_shape("MLPDecoder", event_shape)
        check_network("MLPDecoder", hidden_dims, activation)
        super().__init__(latent_dim, sizes, num_params)
        self.hidden = dense(latent_dim, hidden_dims, activation)
        self.output = nn.Linear([latent_dim, *hidden_dims][-1], num_params * math.prod(sizes))

    def _forward(self, z: Tensor) -> Tensor:
        params: Tensor = self.output(self.hidden(z))
        return params


class ConvDecoder(Decoder):
    r"""Transposed convolutions: from the latent to a small map, to the size of the image.

    .. math:: h_l = \phi(W_l \star h_{l-1} + b_l), \quad \text{gated: } h_l =
        (W_l \star h_{l-1} + b_l) \odot \sigma(V_l \star h_{l-1} + c_l)

    The maps have the sizes of those of a :class:`ConvEncoder` with the strides in reverse order,
    so every image size is met exactly. A convolution of size 1 turns the last map into the
    parameters.

    Args:
        latent_dim: Size of the latent.
        event_shape: ``(C, H, W)``, or ``(H, W)`` for one channel.
        num_params: Number of parameters for each pixel and channel.
        channels: Number of channels of each map. The first is made from the latent by a
            kernel of its own size, each other from the one before.
        strides: Stride of all steps between maps, or one for each: one fewer than ``channels``.
        kernel_size: Side of the kernels, odd.
        gated: Whether each layer multiplies its output by gates, which takes twice the channels
            inside and replaces the activation.
        activation: Constructor of the nonlinearity :math:`\phi`.

    Shape:
        z: ``(*batch, latent_dim)``; parameters: ``(*batch, num_params, *event_shape)``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        The decoder of van den Berg et al.:

        >>> decoder = ConvDecoder(64, (1, 28, 28), channels=(64, 64, 32, 32, 32, 32),
        ...                       strides=(1, 2, 1, 2, 1), gated=True)
        >>> decoder(torch.randn(5, 64)).shape
        torch.Size([5, 1, 1, 28, 28])

    References:
        van den Oord et al. (2016), Conditional Image Generation with PixelCNN Decoders,
        arXiv:1606.05328, eq. 2 (gates); van den Berg et al. (2018), Sylvester Normalizing Flows
        for Variational Inference, arXiv:1803.05649, section 6 (the architecture).
    """

    def __init__(self, latent_dim: int, event_shape: Sequence[int], num_params: int = 1,
                 channels: Sequence[int] = (64, 32, 32), strides: int | Sequence[int] = 2,
                 kernel_size: int = 5, *, gated: bool = False,
                 activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        sizes = check_event_shape("ConvDecoder", event_shape, "(C, H, W)", "(H, W)")
        check_convolutions("ConvDecoder", channels, kernel_size, activation)
        if not channels:
            raise ValueError("ConvDecoder expected `channels` to hold at least one number, that "
                             f"of the map made from the latent, got {channels!r}.")
        each = check_strides("ConvDecoder", strides, len(channels) - 1,
                             "one fewer than `channels`")
        super().__init__(latent_dim, sizes, num_params)
        sides = map_sizes(sizes[-2:], each[::-1])[::-1]
        layers = nonlinear(nn.ConvTranspose2d, latent_dim, channels[0], sides[0], gated=gated,
                           activation=activation)
        for depths, stride, step in zip(pairwise(channels), each, pairwise(sides), strict=True):
            layers += nonlinear(nn.ConvTranspose2d, *depths, kernel_size, gated=gated,
                                activation=activation, stride=stride, padding=kernel_size // 2,
                                output_padding=_missing(*step, stride))
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Conv2d(channels[-1], num_params * (1, *sizes)[-3], 1)

    def _forward(self, z: Tensor) -> Tensor:
        params: Tensor = self.output(self.hidden(z[..., None, None]))
        return params


class RecurrentDecoder(Decoder):
    r"""Gated recurrent units, driven by the latent at every step.

    .. math:: s_0 = \tanh(W_0 z + b_0), \qquad s_t = \text{GRU}(s_{t-1}, z),
        \qquad \theta_t = W s_t + b

    Args:
        latent_dim: Size of the latent.
        event_shape: ``(T, F)``: number of steps, and of entries in each.
        num_params: Number of parameters for each entry.
        hidden_dim: Size of the state.
        num_layers: Number of layers.

    Shape:
        z: ``(*batch, latent_dim)``; parameters: ``(*batch, num_params, T, F)``.

    Raises:
        ValueError: If an option or an input has another shape or type.

    Example:
        >>> decoder = RecurrentDecoder(2, (10, 3), num_params=2)
        >>> decoder(torch.randn(5, 2)).shape
        torch.Size([5, 2, 10, 3])

    References:
        Cho et al. (2014), Learning Phrase Representations using RNN Encoder-Decoder for
        Statistical Machine Translation, arXiv:1406.1078, section 2.2.
    """

    def __init__(self, latent_dim: int, event_shape: Sequence[int], num_params: int = 1,
                 hidden_dim: int = 128, num_layers: int = 1) -> None:
        sizes = check_event_shape("RecurrentDecoder", event_shape, "(T, F)")
        super().__init__(latent_dim, sizes, num_params)
        check_positive_int("RecurrentDecoder", "hidden_dim", hidden_dim)
        check_positive_int("RecurrentDecoder", "num_layers", num_layers)
        self.state = nn.Linear(latent_dim, num_layers * hidden_dim)
        self.gru = nn.GRU(latent_dim, hidden_dim, num_layers)
        self.output = nn.Linear(hidden_dim, num_params * sizes[-1])

    def _forward(self, z: Tensor) -> Tensor:
        initial = torch.tanh(self.state(z)).unflatten(-1, (self.gru.num_layers, -1))
        inputs = z.expand(self.event_shape[0], -1, -1)
        # Not by batch_first, which transposes in place: no graph can hold that.
        states = self.gru(inputs, initial.transpose(0, 1).contiguous())[0]
        params: Tensor = self.output(states).unflatten(-1, (self.num_params, -1))
        return params.permute(1, 2, 0, 3)  # from (T, n, num_params, F)


def _missing(before: Sequence[int], after: Sequence[int], stride: int) -> tuple[int, ...]:
    """What a transposed convolution must add to each side to end at the sizes ``after``."""
    return tuple(b - (a - 1) * stride - 1 for a, b in zip(before, after, strict=True))
