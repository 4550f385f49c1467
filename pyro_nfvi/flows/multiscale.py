"""Bijections within bijections, by which images are treated at several scales.

:func:`~pyro_nfvi.flows.glow` and :func:`~pyro_nfvi.flows.realnvp_image` are made of these and of
the couplings of :mod:`pyro_nfvi.flows.image`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi._shapes import check_positive_int, type_name
from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.compose import Compose
from pyro_nfvi.flows.image import Shape, check_image_shape, check_sizes
from pyro_nfvi.flows.linear import LinearMap

Steps = Callable[[Shape], list[Bijection]]
MAX_SCALES = 3  # unless more are asked for


class Within(Bijection):
    """A bijection inside another: what the three ways of sitting in an image share.

    A subclass writes ``_take``, what the inner bijection sees of a point, and ``_put``, which
    puts its result back in the place of that.

    Args:
        bijection: The inner bijection.
        input_dim: Number of coordinates outside.
    """

    def __init__(self, bijection: Bijection, input_dim: int) -> None:
        super().__init__(input_dim, bijection.context_dim)
        self.bijection = bijection

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inner, log_det = self.bijection._forward(self._take(u), self._context(context))
        return self._put(inner, u), self._log_det(log_det)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inner, log_det = self.bijection._inverse(self._take(z), self._context(context))
        return self._put(inner, z), self._log_det(log_det)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        inner, log_det = self.bijection._inverse_at(self._take(u), self._take(z),
                                                    self._context(context))
        return self._put(inner, z), self._log_det(log_det)

    def _initialize(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._put(self.bijection._initialize(self._take(z), self._context(context)), z)

    @abstractmethod
    def _take(self, x: Tensor) -> Tensor:
        """What the inner bijection sees of ``x``."""

    @abstractmethod
    def _put(self, inner: Tensor, x: Tensor) -> Tensor:
        """``x`` with ``inner`` in the place of what the inner bijection saw."""

    def _context(self, context: Tensor | None) -> Tensor | None:
        return context

    def _log_det(self, log_det: Tensor) -> Tensor:
        return log_det

    def extra_repr(self) -> str:
        """Dimensions, and the shape of the image where it is known."""
        shape = getattr(self, "image_shape", None)
        return super().extra_repr() + (f", image_shape={shape}" if shape else "")


class Pixelwise(Within):
    r"""One bijection of the channels, the same at every pixel of an image.

    .. math:: z_{:,h,w} = f(u_{:,h,w}), \qquad
              \log|\det J| = \textstyle\sum_{h,w} \log|\det J_f(u_{:,h,w})|

    Of :class:`Diagonal` it is the actnorm of Glow, with its data-dependent start in
    :meth:`Flow.initialize`; of :class:`LULinear`, Glow's invertible 1x1 convolution.

    Args:
        bijection: The map :math:`f` of ``C`` coordinates.
        image_shape: ``(C, H, W)``.

    Shape:
        u, z: ``(*batch, C * H * W)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the bijection has another number of coordinates than the image channels.

    Example:
        >>> from pyro_nfvi.flows import LULinear
        >>> convolution = Pixelwise(LULinear(4), (4, 8, 8))
        >>> convolution(torch.randn(5, 256))[0].shape
        torch.Size([5, 256])

    References:
        Kingma & Dhariwal (2018), Glow, arXiv:1807.03039, sections 3.1-3.2.
    """

    def __init__(self, bijection: Bijection, image_shape: Sequence[int]) -> None:
        shape = check_image_shape("Pixelwise", image_shape)
        _check_inner("Pixelwise", bijection, shape[0],
                     f"one for each channel of image_shape={shape}")
        super().__init__(bijection, math.prod(shape))
        self.image_shape = shape

    def _take(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.image_shape[0], -1)).mT  # (*batch, pixels, C)

    def _put(self, inner: Tensor, x: Tensor) -> Tensor:
        return inner.mT.flatten(-2)

    def _context(self, context: Tensor | None) -> Tensor | None:
        if context is None:
            return None
        context = context.unsqueeze(-2)
        if isinstance(self.bijection, LinearMap):  # one map for all pixels, which broadcasts
            return context
        return context.expand(*context.shape[:-2], math.prod(self.image_shape[1:]), -1)

    def _log_det(self, log_det: Tensor) -> Tensor:
        return log_det.sum(-1)


class Squeeze(Within):
    r"""A bijection of the squeezed image, in which each block of pixels is one of more channels.

    .. math:: z = S^{-1} f(S u), \qquad
              (S x)_{(b_2 i' + j') C + c,\, i,\, j} = x_{c,\, b_1 i + i',\, b_2 j + j'}

    Args:
        bijection: The map :math:`f` of images ``(b1 * b2 * C, H / b1, W / b2)``.
        image_shape: ``(C, H, W)``.
        block: Sides :math:`(b_1, b_2)` of a block.

    Shape:
        u, z: ``(*batch, C * H * W)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If a side is no multiple of a block's, or the bijection has another number of
            coordinates.

    Example:
        >>> from pyro_nfvi.flows import Coupling, channel_mask
        >>> layer = Squeeze(Coupling(64, mask=channel_mask((4, 4, 4))), (1, 8, 8))
        >>> layer(torch.randn(5, 64))[0].shape
        torch.Size([5, 64])

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.6.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, bijection: Bijection, image_shape: Sequence[int],
                 block: Sequence[int] = (2, 2)) -> None:
        shape = channels, height, width = check_image_shape("Squeeze", image_shape)
        rows, columns = check_sizes("Squeeze", "block", block, "(b1, b2)")
        if height % rows or width % columns:
            raise ValueError("Squeeze expected `image_shape` whose height and width are multiples "
                             f"of block={rows, columns}, got {shape}. Pad the images.")
        _check_inner("Squeeze", bijection, math.prod(shape),
                     f"one for each number of image_shape={shape}")
        super().__init__(bijection, math.prod(shape))
        self.image_shape, self.block = shape, (rows, columns)
        places = torch.arange(self.input_dim).reshape(
            channels, height // rows, rows, width // columns, columns)
        order = places.permute(2, 4, 0, 1, 3).flatten()
        self.register_buffer("order", order)
        self.register_buffer("inverse_order", order.argsort())

    def _take(self, x: Tensor) -> Tensor:
        return x[..., self.order]

    def _put(self, inner: Tensor, x: Tensor) -> Tensor:
        return inner[..., self.inverse_order]


class Split(Within):
    r"""A bijection of the first coordinates; the others stay, and so leave a flow early.

    .. math:: z_{1:d} = f(u_{1:d}), \qquad z_{d+1:D} = u_{d+1:D}

    The first half of the coordinates of an image are the first half of its channels. Several of
    these, one inside the other, are the multi-scale architecture of Real NVP.

    Args:
        bijection: The map :math:`f` of the first :math:`d` coordinates.
        input_dim: Number of coordinates :math:`D`.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If the bijection has as many coordinates or more.

    Example:
        >>> from pyro_nfvi.flows import Diagonal
        >>> Split(Diagonal(2), 4)(torch.ones(4))
        (tensor([1., 1., 1., 1.], grad_fn=...), tensor(0., grad_fn=...))

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.6.
    """

    def __init__(self, bijection: Bijection, input_dim: int) -> None:
        check_positive_int("Split", "input_dim", input_dim)
        if not isinstance(bijection, Bijection) or bijection.input_dim >= input_dim:
            raise ValueError("Split expected `bijection` to be a Bijection of fewer than "
                             f"input_dim={input_dim} coordinates, got {_described(bijection)}.")
        super().__init__(bijection, input_dim)

    def _take(self, x: Tensor) -> Tensor:
        return x[..., :self.bijection.input_dim]

    def _put(self, inner: Tensor, x: Tensor) -> Tensor:
        return torch.cat([inner, x[..., self.bijection.input_dim:]], -1)


def multiscale(image_shape: Shape, num_scales: int, fine: Steps, squeezed: Steps
               ) -> list[Bijection]:
    """The multi-scale architecture: squeeze, let half of the channels leave, and again.

    Args:
        image_shape: ``(C, H, W)``.
        num_scales: Number of resolutions, each half the sides of the one before.
        fine: The layers at a resolution, given the shape of the image there; possibly none.
        squeezed: The layers on the squeezed image, given its shape, before half of it leaves.

    Returns:
        The layers, those of the coarsest resolution first, as the noise meets them.

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), Density estimation using Real NVP,
        arXiv:1605.08803, section 3.6 and eq. 10-12.
    """
    if num_scales == 1:
        return fine(image_shape)
    channels, height, width = image_shape
    shape = (4 * channels, height // 2, width // 2)
    deeper = multiscale((2 * channels, *shape[1:]), num_scales - 1, fine, squeezed)
    kept = [Split(Compose(deeper), math.prod(shape))] if deeper else []
    return [Squeeze(Compose([*kept, *squeezed(shape)]), image_shape), *fine(image_shape)]


def check_num_scales(owner: str, num_scales: Any, image_shape: Shape) -> int:
    """Return the number of scales; for None, as many as the sides can be halved, at most 3.

    Raises:
        ValueError: If it is no positive integer, or the sides cannot be halved so often.
    """
    _, height, width = image_shape
    possible = 1
    while height % 2 == width % 2 == 0:
        height, width, possible = height // 2, width // 2, possible + 1
    if num_scales is None:
        return min(possible, MAX_SCALES)
    if check_positive_int(owner, "num_scales", num_scales) > possible:
        raise ValueError(f"{owner} expected `num_scales` of at most {possible}, as often as the "
                         f"sides of image_shape={image_shape} can be halved, got {num_scales}. "
                         "Pad the images.")
    return int(num_scales)


def _check_inner(owner: str, bijection: Any, input_dim: int, which: str) -> None:
    """Check that an inner bijection has ``input_dim`` coordinates.

    Raises:
        ValueError: If it is none, or has another number.
    """
    if not isinstance(bijection, Bijection) or bijection.input_dim != input_dim:
        raise ValueError(f"{owner} expected `bijection` to be a Bijection of {input_dim} "
                         f"coordinates, {which}, got {_described(bijection)}.")


def _described(value: Any) -> str:
    name = type_name(value)
    return f"{name} of {value.input_dim}" if isinstance(value, Bijection) else name
