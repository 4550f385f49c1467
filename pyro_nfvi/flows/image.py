"""What a coupling of images needs: masks of pixels, and a convolutional conditioner.

To every bijection an image of shape ``(C, H, W)`` is a flat vector of ``C * H * W`` numbers; only
these parts, and those of :mod:`pyro_nfvi.flows.multiscale`, know of its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.nets import OutputLinear, check_network

Shape = tuple[int, int, int]


def checkerboard_mask(image_shape: Sequence[int], flip: bool = False) -> Tensor:
    r"""Mask for :class:`Coupling` that moves every other pixel: those of odd :math:`h + w`.

    Args:
        image_shape: ``(C, H, W)``.
        flip: Whether to move the other pixels instead.

    Returns:
        Booleans of shape ``(C * H * W,)``.

    Raises:
        ValueError: If the image has one pixel, which leaves none to steer the others.

    Example:
        >>> checkerboard_mask((1, 2, 4)).int().reshape(2, 4)
        tensor([[0, 1, 0, 1],
                [1, 0, 1, 0]], dtype=torch.int32)

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.4.
    """
    channels, height, width = check_image_shape("checkerboard_mask", image_shape)
    if height * width == 1:
        raise ValueError("checkerboard_mask expected `image_shape` of two or more pixels, "
                         f"got {image_shape}. Take channel_mask.")
    moved = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 1
    return (moved ^ bool(flip)).expand(channels, height, width).flatten()


def channel_mask(image_shape: Sequence[int], flip: bool = False) -> Tensor:
    """Mask for :class:`Coupling` that moves the second half of the channels.

    Args:
        image_shape: ``(C, H, W)``.
        flip: Whether to move the first half instead.

    Returns:
        Booleans of shape ``(C * H * W,)``.

    Raises:
        ValueError: If the image has one channel, which leaves none to steer the others.

    Example:
        >>> channel_mask((4, 1, 2))
        tensor([False, False, False, False,  True,  True,  True,  True])

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.4.
    """
    channels, height, width = check_image_shape("channel_mask", image_shape)
    if channels == 1:
        raise ValueError("channel_mask expected `image_shape` of two or more channels, "
                         f"got {image_shape}. Take checkerboard_mask, or Squeeze first.")
    moved = torch.arange(channels) >= channels // 2
    return (moved ^ bool(flip))[:, None].expand(channels, height * width).flatten()


class ConvNet(nn.Module):
    r"""Residual convolutional conditioner whose output starts at zero.

    .. math:: h_0 = K_0 * u_a + V c, \qquad
              h_l = h_{l-1} + K'_l * \phi(K_l * \phi(h_{l-1})), \qquad
              \theta = W \phi(h_L) + b

    The pixels that stay, :math:`u_a`, stand in their places and zeros in those of the pixels that
    move; every map has the height and width of the image. The parameters :math:`\theta` are one
    linear function of the features of a pixel, scaled as in :class:`MLP`.

    Args:
        image_shape: ``(C, H, W)``.
        mask: True for the pixels that move, ``(C * H * W,)``; some have to stay.
        context_dim: Number of context coordinates; 0 for none.
        num_params: Outputs for each pixel that moves.
        hidden_channels: Number of features of a pixel.
        num_blocks: Number of residual blocks :math:`L`.
        kernel_size: Side of the kernels, odd; along a side of one pixel it is 1.
        activation: Constructor of the nonlinearity :math:`\phi`.

    Shape:
        ``(*batch, kept + context_dim) -> (*batch, num_params * moved)``.

    Raises:
        ValueError: If the mask does not fit the image, or an option is of no use.

    Example:
        >>> from functools import partial
        >>> from pyro_nfvi.flows import Coupling
        >>> shape = (1, 8, 8)
        >>> layer = Coupling(64, mask=checkerboard_mask(shape), conditioner=partial(ConvNet, shape))
        >>> layer(torch.randn(5, 64))[0].shape
        torch.Size([5, 64])

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 4.1; He et al. (2016), Identity Mappings in Deep Residual
        Networks, arXiv:1603.05027, eq. 5 (activations before weights).
    """

    place: Tensor | None
    which: Tensor | None

    def __init__(self, image_shape: Sequence[int], mask: Tensor, context_dim: int,
                 num_params: int, *, hidden_channels: int = 32, num_blocks: int = 1,
                 kernel_size: int = 3, activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        channels, *self.sides = check_image_shape("ConvNet", image_shape)
        moved = _checked_mask(mask, (channels, *self.sides))
        _check_options(hidden_channels, num_blocks, kernel_size, activation)
        reads, writes = (~moved).any(-1), moved.any(-1)  # channels in which pixels stay, move
        kept, moved = ~moved[reads].flatten(), moved[writes].flatten()
        self.num_kept, self.num_params = int(kept.sum()), num_params
        place = torch.where(kept, kept.cumsum(0) - 1, self.num_kept)  # the last: of the zero
        self.register_buffer("place", None if kept.all() else place, persistent=False)
        which = None if moved.all() else moved.nonzero().squeeze(-1)
        self.register_buffer("which", which, persistent=False)

        def convolution(in_channels: int) -> nn.Conv2d:
            kernel = [min(kernel_size, 2 * side - 1) for side in self.sides]
            return nn.Conv2d(in_channels, hidden_channels, kernel, padding=[k // 2 for k in kernel])
        self.read = convolution(int(reads.sum()))
        self.context = nn.Linear(context_dim, hidden_channels, bias=False) if context_dim else None
        self.blocks = nn.ModuleList(nn.Sequential(
            activation(), convolution(hidden_channels), activation(), convolution(hidden_channels)
        ) for _ in range(num_blocks))
        self.activation = activation()
        self.output = OutputLinear(hidden_channels, num_params * int(writes.sum()))

    def forward(self, x: Tensor) -> Tensor:
        """Parameters of the pixels that move, given those that stay and the context."""
        batch = x.shape[:-1]
        flat = x.reshape(math.prod(batch), x.shape[-1])
        maps = self.read(self._image(flat[:, :self.num_kept]))
        if self.context is not None:
            maps = maps + self.context(flat[:, self.num_kept:])[..., None, None]
        for block in self.blocks:
            maps = maps + block(maps)
        params = self.output(self.activation(maps).movedim(1, -1)).movedim(-1, 1)
        params = params.unflatten(1, (self.num_params, -1)).flatten(2)  # (n, P, pixels)
        params = params if self.which is None else params[..., self.which]
        return params.reshape(*batch, params.shape[-2] * params.shape[-1])

    def _image(self, kept: Tensor) -> Tensor:
        """Pixels that stay in their places, ``(n, channels, H, W)``, and zeros elsewhere."""
        if self.place is not None:
            kept = nn.functional.pad(kept, (0, 1))[:, self.place]
        return kept.unflatten(-1, (-1, *self.sides))


def _check_options(hidden_channels: Any, num_blocks: Any, kernel_size: Any, activation: Any
                   ) -> None:
    check_positive_int("ConvNet", "hidden_channels", hidden_channels)
    check_positive_int("ConvNet", "num_blocks", num_blocks, minimum=0)
    check_network("ConvNet", (), activation)
    if check_positive_int("ConvNet", "kernel_size", kernel_size) % 2 == 0:
        raise ValueError("ConvNet expected `kernel_size` to be odd, so that a kernel has a "
                         f"middle, got {kernel_size}. Take {kernel_size + 1}.")


def check_image_shape(owner: str, image_shape: Any, input_dim: int | None = None) -> Shape:
    """Return ``image_shape`` if it is ``(C, H, W)`` and, where asked, of ``input_dim`` numbers.

    Raises:
        ValueError: If it is anything else.
    """
    shape = check_sizes(owner, "image_shape", image_shape, "(C, H, W)")
    if input_dim is not None and math.prod(shape) != input_dim:
        raise ValueError(f"{owner} expected `image_shape` (C, H, W) with C * H * W = "
                         f"input_dim = {input_dim}, got {shape}.")
    return shape[0], shape[1], shape[2]


def check_sizes(owner: str, argument: str, sizes: Any, form: str) -> tuple[int, ...]:
    """Return ``sizes`` if it is as many positive integers as ``form`` has, such as ``(H, W)``.

    Raises:
        ValueError: If it is anything else.
    """
    count = form.count(",") + 1
    whole = isinstance(sizes, Sequence) and len(sizes) == count and all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not whole:
        raise ValueError(f"{owner} expected `{argument}` to be {count} positive integers {form}, "
                         f"got {sizes!r}.")
    return tuple(sizes)


def _checked_mask(mask: Any, image_shape: tuple[int, ...]) -> Tensor:
    """The mask by channel and pixel, ``(C, H * W)``."""
    size = math.prod(image_shape)
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (size,)
    if not fits or mask.all() or not mask.any():
        raise ValueError(f"ConvNet expected `mask` to hold {size} booleans, one for each number of "
                         f"image_shape={image_shape}, both true and false, got {mask!r}.")
    return mask.reshape(image_shape[0], -1)
