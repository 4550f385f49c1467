"""Flows under their paper's name: functions that stack layers.

Every recipe takes ``(input_dim, context_dim=0, *, num_layers, ...)``; options go by keyword, or
ahead of time: ``partial(nsf, num_layers=8)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.flows.autoregressive import Autoregressive
from pyro_nfvi.flows.bijection import Bijection, Inverse
from pyro_nfvi.flows.block_autoregressive import BlockAutoregressive
from pyro_nfvi.flows.circular import CircularSpline, PeriodicMLP
from pyro_nfvi.flows.compose import Compose
from pyro_nfvi.flows.continuous import Continuous
from pyro_nfvi.flows.contractive import LipSwish, Residual
from pyro_nfvi.flows.coupling import Coupling
from pyro_nfvi.flows.image import (
    ConvNet,
    Shape,
    channel_mask,
    check_image_shape,
    checkerboard_mask,
)
from pyro_nfvi.flows.linear import Diagonal, LULinear
from pyro_nfvi.flows.monotone import MonotoneIntegral
from pyro_nfvi.flows.multiscale import Pixelwise, check_num_scales, multiscale
from pyro_nfvi.flows.nets import HIDDEN_DIMS, check_angles
from pyro_nfvi.flows.planar import Planar, Radial
from pyro_nfvi.flows.sigmoids import DeepSigmoid
from pyro_nfvi.flows.spline import RationalQuadraticSpline
from pyro_nfvi.flows.sylvester import CoordinateFrame, HouseholderFrame, Sylvester
from pyro_nfvi.flows.transformers import Additive, Affine, Transformer

MAX_SPLINE = 20  # coordinates up to which splines pay
MAX_WIDE = 256  # and networks of many units


def planar(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """Planar flow of Rezende & Mohamed (2015), arXiv:1505.05770.

    Example:
        >>> z, log_det = planar(3, num_layers=4)(torch.randn(7, 3))
        >>> z.shape, log_det.shape
        (torch.Size([7, 3]), torch.Size([7]))
    """
    return _stack("planar", num_layers, lambda _: Planar(input_dim, context_dim))


def radial(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """Radial flow of Rezende & Mohamed (2015), arXiv:1505.05770.

    Example:
        >>> u = torch.randn(7, 3)
        >>> z, _ = radial(3)(u)
        >>> torch.allclose(z, u)  # as every flow, it starts as the identity
        True
    """
    return _stack("radial", num_layers, lambda _: Radial(input_dim, context_dim))


def sylvester(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
              num_ridges: int | None = None) -> Compose:
    """Sylvester flow of van den Berg et al. (2018), arXiv:1803.05649.

    Example:
        >>> sylvester(10, num_ridges=4)(torch.randn(7, 10))[1].shape
        torch.Size([7])
    """
    return _stack("sylvester", num_layers,
                  lambda _: Sylvester(input_dim, context_dim, num_ridges=num_ridges))


def householder_sylvester(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
                          num_ridges: int | None = None, num_reflections: int = 8) -> Compose:
    """Householder Sylvester flow of van den Berg et al. (2018), arXiv:1803.05649, section 4.2.

    The frames are products of reflections, which every context may turn its own way.

    Example:
        >>> flow = householder_sylvester(3, context_dim=2, num_reflections=2)
        >>> flow(torch.randn(7, 3), torch.randn(7, 2))[0].shape
        torch.Size([7, 3])
    """
    frame = partial(HouseholderFrame, num_reflections=num_reflections)
    return _stack("householder_sylvester", num_layers, lambda _: Sylvester(
        input_dim, context_dim, num_ridges=num_ridges, frame=frame))


def triangular_sylvester(input_dim: int, context_dim: int = 0, *, num_layers: int = 4) -> Compose:
    """Triangular Sylvester flow of van den Berg et al. (2018), arXiv:1803.05649, section 4.3.

    The frames are the axes, in turn from the first and from the last; a ridge for each.

    Example:
        >>> triangular_sylvester(3, num_layers=2)(torch.randn(7, 3))[0].shape
        torch.Size([7, 3])
    """
    return _stack("triangular_sylvester", num_layers, lambda k: Sylvester(
        input_dim, context_dim, num_ridges=input_dim,
        frame=partial(CoordinateFrame, reverse=k % 2 == 1)))


def iaf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
        num_passes: int | None = None, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh,
        conditioner: Callable[[Tensor, int, int], nn.Module] | None = None) -> Compose:
    """Inverse autoregressive flow of Kingma et al. (2016), arXiv:1606.04934.

    Sampling is one pass a layer, the order of the coordinates turning round between layers.

    Example:
        >>> from pyro_nfvi.flows import Flow
        >>> z, log_q = Flow(iaf(3)).rsample_and_log_prob((7,))  # one pass a layer
        >>> z.shape, log_q.shape
        (torch.Size([7, 3]), torch.Size([7]))
    """
    return _stack("iaf", num_layers, lambda k: Autoregressive(
        input_dim, context_dim, num_passes=num_passes, reverse=k % 2 == 1,
        hidden_dims=hidden_dims, activation=activation, conditioner=conditioner))


def maf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
        num_passes: int | None = None, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh,
        conditioner: Callable[[Tensor, int, int], nn.Module] | None = None) -> Compose:
    """Masked autoregressive flow of Papamakarios et al. (2017), arXiv:1705.07057.

    The density of any point is one pass a layer; sampling is ``num_passes`` (if not said,
    ``input_dim``) passes a layer, fewer passes being larger groups of coordinates.

    Example:
        >>> from pyro_nfvi.flows import Flow
        >>> Flow(maf(3)).log_prob(torch.randn(7, 3)).shape  # one pass a layer
        torch.Size([7])
    """
    return _stack("maf", num_layers, lambda k: Inverse(Autoregressive(
        input_dim, context_dim, num_passes=num_passes, reverse=k % 2 == 1,
        hidden_dims=hidden_dims, activation=activation, conditioner=conditioner)))


def nice(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
         hidden_dims: Sequence[int] = HIDDEN_DIMS,
         activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """NICE of Dinh, Krueger & Bengio (2015), arXiv:1410.8516: additive couplings, then scales.

    Example:
        >>> u = torch.randn(7, 4)
        >>> flow = nice(4)
        >>> torch.allclose(flow.inverse(flow(u)[0])[0], u)
        True
    """
    couplings = _couplings("nice", input_dim, context_dim, num_layers, Additive(), hidden_dims,
                           activation)
    return Compose([*couplings.layers, Diagonal(input_dim, context_dim)])


def realnvp(input_dim: int, context_dim: int = 0, *, num_layers: int = 8,
            hidden_dims: Sequence[int] = (32, 32),
            activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Real NVP of Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803: affine couplings.

    Example:
        >>> flow = realnvp(4, context_dim=2, num_layers=2)
        >>> flow(torch.randn(7, 4), torch.randn(2))[1].shape
        torch.Size([7])
    """
    return _couplings("realnvp", input_dim, context_dim, num_layers, Affine(), hidden_dims,
                      activation)


def nsf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4, num_bins: int = 8,
        bound: float = 5.0, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Neural spline flow of Durkan et al. (2019), arXiv:1906.04032: spline couplings.

    Example:
        >>> from pyro_nfvi.flows import Flow
        >>> flow = Flow(nsf(2, num_layers=2, num_bins=6))
        >>> flow().sample((7,)).shape, flow.log_prob(torch.zeros(2)).shape
        (torch.Size([7, 2]), torch.Size([]))
    """
    spline = RationalQuadraticSpline(num_bins, bound)
    return _couplings("nsf", input_dim, context_dim, num_layers, spline, hidden_dims, activation)


def auto(input_dim: int, context_dim: int = 0, *, num_layers: int = 8) -> Compose:
    """The flow :class:`~pyro_nfvi.NFVI` takes if none is named, by the number of coordinates.

    Up to 20 coordinates half as many spline couplings, which bend more; beyond, affine
    couplings, which cost less. Beyond 256 a quarter as many, with narrow networks that see the
    others through 16 numbers: there the Gaussian does most, and a step must stay cheap.

    Example:
        >>> [type(auto(dim).layers[0].transformer).__name__ for dim in (20, 21)]
        ['RationalQuadraticSpline', 'Affine']
    """
    check_positive_int("auto", "num_layers", num_layers)
    if check_positive_int("auto", "input_dim", input_dim) > MAX_WIDE:
        return realnvp(input_dim, context_dim, num_layers=(num_layers + 3) // 4,
                       hidden_dims=(16, 16))
    if input_dim > MAX_SPLINE:
        return realnvp(input_dim, context_dim, num_layers=num_layers)
    return nsf(input_dim, context_dim, num_layers=(num_layers + 1) // 2, num_bins=5,
               hidden_dims=(32, 32))


def realnvp_image(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
                  image_shape: Sequence[int] | None = None, num_scales: int | None = None,
                  hidden_channels: int = 32, num_blocks: int = 1,
                  activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Real NVP for images ``(C, H, W)``: Dinh et al. (2017), arXiv:1605.08803, section 3.4-3.7.

    At each of ``num_scales`` resolutions (as often as the sides can be halved, at most 3, if not
    said): ``num_layers`` couplings by checkerboard, as many by channels after a squeeze, then
    half of the channels leave; at the last only those by checkerboard. Where the paper has batch
    normalization there are actnorms, which start at the data by :meth:`Flow.initialize`. Without
    ``image_shape`` a vector is one pixel of ``input_dim`` channels.

    Example:
        >>> flow = realnvp_image(64, image_shape=(1, 8, 8), num_layers=2)
        >>> flow(torch.randn(3, 64))[0].shape
        torch.Size([3, 64])
    """
    shape = _image_shape("realnvp_image", input_dim, image_shape)
    check_positive_int("realnvp_image", "num_layers", num_layers)
    scales = check_num_scales("realnvp_image", num_scales, shape)
    network = partial(ConvNet, hidden_channels=hidden_channels, num_blocks=num_blocks,
                      activation=activation)

    def steps(mask: Callable[[Shape, bool], Tensor], shape: Shape) -> list[Bijection]:
        return [layer for k in range(num_layers) for layer in (
            Coupling(math.prod(shape), context_dim, mask=mask(shape, k % 2 == 1),
                     conditioner=partial(network, shape)),
            Pixelwise(Diagonal(shape[0], context_dim), shape))]
    return Compose(multiscale(shape, scales, partial(steps, _checkerboard),
                              partial(steps, channel_mask)))


def glow(input_dim: int, context_dim: int = 0, *, num_layers: int = 8,
         image_shape: Sequence[int] | None = None, num_scales: int | None = None,
         hidden_channels: int = 32, num_blocks: int = 1,
         activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Glow of Kingma & Dhariwal (2018), arXiv:1807.03039, for images ``(C, H, W)`` and vectors.

    ``num_layers`` steps (coupling by channels, 1x1 convolution, actnorm) after each squeeze from
    one of ``num_scales`` resolutions to the next (as often as the sides can be halved, at most 3,
    if not said), half of the channels leaving in between. Actnorms start at the data by
    :meth:`Flow.initialize`. Without ``image_shape`` a vector is one pixel of ``input_dim``
    channels, which is not squeezed.

    Example:
        >>> flow = glow(64, image_shape=(1, 8, 8), num_layers=2)
        >>> flow(torch.randn(3, 64))[1].shape
        torch.Size([3])
    """
    shape = _image_shape("glow", input_dim, image_shape)
    check_positive_int("glow", "num_layers", num_layers)
    scales = check_num_scales("glow", num_scales, shape)
    if scales == 1 and shape[0] == 1 and input_dim > 1:
        raise ValueError("glow expected an `image_shape` of several channels, or of even sides "
                         f"and a `num_scales` of 2 or more, got {shape} and {num_scales}. "
                         "Pad the images, or take realnvp_image.")
    network = partial(ConvNet, hidden_channels=hidden_channels, num_blocks=num_blocks,
                      activation=activation)

    def steps(shape: Shape) -> list[Bijection]:
        return [layer for k in range(num_layers) for layer in (
            Coupling(math.prod(shape), context_dim, mask=_channels(shape, k % 2 == 1),
                     conditioner=partial(network, shape)),
            Pixelwise(LULinear(shape[0], context_dim), shape),
            Pixelwise(Diagonal(shape[0], context_dim), shape))]
    return Compose(multiscale(shape, scales, steps if scales == 1 else lambda shape: [], steps))


def naf(input_dim: int, context_dim: int = 0, *, num_layers: int = 2, num_units: int = 8,
        dense: bool = False, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Neural autoregressive flow of Huang et al. (2018), arXiv:1804.00779: layers of sigmoids.

    Sampling is one pass a layer; :class:`Inverse` of it is the paper's for densities. ``dense``
    takes its deep dense sigmoidal flow of two layers, which is costlier and bends more.

    Example:
        >>> naf(3, num_layers=1)(torch.randn(7, 3))[1].shape
        torch.Size([7])
    """
    sigmoids = DeepSigmoid(num_units, num_layers=2 if dense else 1, dense=dense)
    return _stack("naf", num_layers, lambda k: Autoregressive(
        input_dim, context_dim, reverse=k % 2 == 1, transformer=sigmoids,
        hidden_dims=hidden_dims, activation=activation))


def umnn(input_dim: int, context_dim: int = 0, *, num_layers: int = 2, num_units: int = 8,
         bound: float = 5.0, hidden_dims: Sequence[int] = HIDDEN_DIMS,
         activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Unconstrained monotonic neural networks of Wehenkel & Louppe (2019), arXiv:1908.05164.

    Sampling is one pass a layer; :class:`Inverse` of it is the paper's for densities.

    Example:
        >>> umnn(3, num_layers=1)(torch.randn(7, 3))[1].shape
        torch.Size([7])
    """
    integral = MonotoneIntegral(num_units, bound)
    return _stack("umnn", num_layers, lambda k: Autoregressive(
        input_dim, context_dim, reverse=k % 2 == 1, transformer=integral,
        hidden_dims=hidden_dims, activation=activation))


def bnaf(input_dim: int, context_dim: int = 0, *, num_layers: int = 2, block_dim: int = 8,
         num_hidden: int = 2) -> Compose:
    """Block neural autoregressive flow of De Cao et al. (2019), arXiv:1904.04676, then scales.

    Sampling is one pass a layer; :class:`Inverse` of it is the paper's for densities.

    Example:
        >>> bnaf(3, num_layers=1)(torch.randn(7, 3))[1].shape
        torch.Size([7])
    """
    blocks = _stack("bnaf", num_layers, lambda k: BlockAutoregressive(
        input_dim, context_dim, block_dim=block_dim, num_hidden=num_hidden, reverse=k % 2 == 1))
    return Compose([*blocks.layers, Diagonal(input_dim, context_dim)])


def ncsf(input_dim: int, context_dim: int = 0, *, num_layers: int = 4,
         angles: Sequence[bool] | Tensor | None = None, num_bins: int = 8, bound: float = 5.0,
         hidden_dims: Sequence[int] = HIDDEN_DIMS,
         activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Circular spline flow of Rezende et al. (2020), arXiv:2002.02428: on tori and cylinders.

    ``angles`` says which coordinates are angles (all, if not said); the others get splines on
    the line, of half-width ``bound``. The base has to agree:
    ``Flow(ncsf(2), UniformAngles(2))``. See :mod:`pyro_nfvi.flows.circular`.

    Example:
        >>> from pyro_nfvi.flows import Flow, UniformAngles
        >>> angles = Flow(ncsf(2), UniformAngles(2))().sample((7,))
        >>> bool((angles.abs() <= torch.pi).all())
        True
    """
    check_positive_int("ncsf", "num_layers", num_layers)
    check_positive_int("ncsf", "input_dim", input_dim)
    which = check_angles("ncsf", angles, input_dim)
    kinds = [(which, CircularSpline(num_bins)), (~which, RationalQuadraticSpline(num_bins, bound))]
    network = partial(PeriodicMLP, which, hidden_dims=hidden_dims, activation=activation)
    masks = [_alternating_mask(input_dim, k) for k in range(num_layers)]
    return Compose([Coupling(input_dim, context_dim, mask=mask & kind, transformer=transformer,
                             hidden_dims=hidden_dims, activation=activation, conditioner=network)
                    for mask in masks for kind, transformer in kinds if (mask & kind).any()])


def residual(input_dim: int, context_dim: int = 0, *, num_layers: int = 8,
             lipschitz: float = 0.9, num_terms: int | None = None,
             roulette: float | None = None, hidden_dims: Sequence[int] = (64,),
             activation: Callable[[], nn.Module] = LipSwish) -> Compose:
    """Residual flow of Behrmann et al. (2019), arXiv:1811.00995, and Chen et al. (2019).

    The log-determinant is exact; ``num_terms`` of its power series are the first paper's, and
    ``num_terms`` with a ``roulette`` the second's, arXiv:1906.02735. See :class:`Residual`.

    Example:
        >>> residual(3, num_layers=2)(torch.randn(7, 3))[1].shape
        torch.Size([7])
    """
    return _stack("residual", num_layers, lambda _: Residual(
        input_dim, context_dim, lipschitz=lipschitz, num_terms=num_terms, roulette=roulette,
        hidden_dims=hidden_dims, activation=activation))


def cnf(input_dim: int, context_dim: int = 0, *, num_layers: int = 1, end_time: float = 4.0,
        method: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-5, num_steps: int = 10,
        adjoint: bool = False, hidden_dims: Sequence[int] = HIDDEN_DIMS,
        activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """Continuous normalizing flow of Chen et al. (2018), arXiv:1806.07366, with exact traces.

    With ``method="rk4"`` a fit compiles, and is many times faster. See :class:`Continuous`.

    Example:
        >>> cnf(3, method="rk4")(torch.randn(7, 3))[0].shape
        torch.Size([7, 3])
    """
    return _stack("cnf", num_layers, lambda _: Continuous(
        input_dim, context_dim, end_time=end_time, method=method, rtol=rtol, atol=atol,
        num_steps=num_steps, adjoint=adjoint, hidden_dims=hidden_dims, activation=activation))


def ffjord(input_dim: int, context_dim: int = 0, *, num_layers: int = 1,
           end_time: float = 4.0, num_probes: int | None = 1, method: str = "dopri5",
           rtol: float = 1e-5, atol: float = 1e-5, num_steps: int = 10, adjoint: bool = True,
           hidden_dims: Sequence[int] = HIDDEN_DIMS,
           activation: Callable[[], nn.Module] = nn.Tanh) -> Compose:
    """FFJORD of Grathwohl et al. (2019), arXiv:1810.01367: estimated traces, adjoint gradients.

    Its log-densities are random (``num_probes=None`` makes them exact): a fit takes that, a
    verdict on the fit does not. See :class:`Continuous`.

    Example:
        >>> flow = ffjord(3, method="rk4")
        >>> flow(torch.randn(7, 3))[1].shape, flow.log_det_is_random
        (torch.Size([7]), True)
    """
    return _stack("ffjord", num_layers, lambda _: Continuous(
        input_dim, context_dim, end_time=end_time, num_probes=num_probes, method=method,
        rtol=rtol, atol=atol, num_steps=num_steps, adjoint=adjoint, hidden_dims=hidden_dims,
        activation=activation))


def _image_shape(owner: str, input_dim: int, image_shape: Sequence[int] | None) -> Shape:
    check_positive_int(owner, "input_dim", input_dim)
    return check_image_shape(owner, (input_dim, 1, 1) if image_shape is None else image_shape,
                             input_dim)


def _checkerboard(shape: Shape, flip: bool) -> Tensor:
    """Every other pixel; of one pixel, half of its channels."""
    return _channels(shape, flip) if shape[1:] == (1, 1) else checkerboard_mask(shape, flip)


def _channels(shape: Shape, flip: bool) -> Tensor:
    """Half of the channels; all of a single number."""
    return torch.ones(1).bool() if shape == (1, 1, 1) else channel_mask(shape, flip)


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
