"""Conditioners: the networks that output the parameters of a flow layer.

Their last layer starts at zero, so that a flow built on them starts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_nfvi._shapes import check_positive_int

HIDDEN_DIMS = (64, 64)
# Adam moves every weight by about the learning rate, and so an output of 64 weights by dozens of
# rates at once: a flow then bolts at rates at which a Gaussian guide is calm. Scaled like this,
# with bounded hidden units, an output moves about as fast as any other parameter.
OUTPUT_SCALE = 0.01


class MLP(nn.Module):
    """Multilayer perceptron whose output starts at zero.

    With no inputs it is just its output bias, which is what a conditioner of nothing should be.

    Args:
        in_dim: Number of inputs, possibly 0.
        out_dim: Number of outputs.
        hidden_dims: Sizes of the hidden layers.
        activation: Constructor of the nonlinearity.

    Shape:
        ``(*batch, in_dim) -> (*batch, out_dim)``.

    Raises:
        ValueError: If an argument is of another kind.

    Example:
        >>> MLP(3, 4)(torch.randn(7, 3)).abs().max().item()
        0.0
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        check_positive_int("MLP", "in_dim", in_dim, minimum=0)
        check_positive_int("MLP", "out_dim", out_dim, minimum=0)
        check_network("MLP", hidden_dims, activation)
        dims = [in_dim, *hidden_dims] if in_dim else []
        hidden = [layer for a, b in zip(dims[:-1], dims[1:], strict=True)
                  for layer in (nn.Linear(a, b), activation())]
        self.hidden = nn.Sequential(*hidden)
        self.output = OutputLinear(dims[-1] if dims else 0, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for the inputs ``x``."""
        return self.output(self.hidden(x))


class OutputLinear(nn.Module):
    """Last layer of a conditioner: starts at zero, and is scaled down by ``OUTPUT_SCALE``.

    An output that sees no input, such as a parameter of the first coordinate of an autoregressive
    layer, is its bias alone, which moves by itself and is not scaled.

    Args:
        in_dim: Number of inputs, possibly 0.
        out_dim: Number of outputs.
        mask: Boolean matrix ``(out_dim, in_dim)``, true where an output may see an input.

    References:
        Yang & Hu (2021), Feature Learning in Infinite-Width Neural Networks, arXiv:2011.14522
        (how outputs must scale for Adam's steps not to grow with the width).
    """

    scaled_mask: Tensor | None
    blind: Tensor | None  # outputs that see no input, if only some do not

    def __init__(self, in_dim: int, out_dim: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_dim, in_dim)) if in_dim else None
        self.bias = nn.Parameter(torch.zeros(out_dim))
        # Weights are scaled, not inputs or outputs: a batch is larger than a matrix.
        scaled_mask = None if mask is None else OUTPUT_SCALE * mask.to(self.bias.dtype)
        self.register_buffer("scaled_mask", scaled_mask)
        blind = None if mask is None or mask.any(-1).all() else ~mask.any(-1)
        self.register_buffer("blind", blind, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The (masked) product plus the bias, scaled."""
        if self.weight is None:
            return self.bias.expand(*x.shape[:-1], -1)
        return F.linear(x, *self.scaled())

    def scaled(self) -> tuple[Tensor, Tensor]:
        """The matrix and the bias of the product; a layer of no inputs has no matrix."""
        assert self.weight is not None
        scale = OUTPUT_SCALE if self.scaled_mask is None else self.scaled_mask
        bias = OUTPUT_SCALE * self.bias
        if self.blind is not None:
            bias = torch.where(self.blind, self.bias, bias)
        return scale * self.weight, bias


class MaskedLinear(nn.Linear):
    """Linear layer whose weights are multiplied by a fixed 0/1 mask.

    Args:
        mask: Boolean matrix ``(out_dim, in_dim)``, true where an output may see an input.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The masked product, plus the bias."""
        return F.linear(input, self.weight * self.mask, self.bias)


class MaskedMLP(nn.Module):
    r"""Multilayer perceptron whose outputs for a group see only the groups before it.

    Input :math:`i` has group :math:`g_i`; a hidden unit of degree :math:`m` sees inputs with
    :math:`g_i \le m`, and the outputs of coordinate :math:`i` see hidden units with
    :math:`m < g_i`. The context is seen by all.

    Args:
        groups: Group of each coordinate, integers from 0 up, shape ``(D,)``.
        context_dim: Number of context coordinates; 0 for none.
        num_params: Outputs for each coordinate.
        hidden_dims: Sizes of the hidden layers.
        activation: Constructor of the nonlinearity.
        angles: True for the coordinates that are angles, which it sees by cosine and sine.
            Default: none.

    Shape:
        ``(*batch, D), (*batch, context_dim) -> (*batch, D, num_params)``.

    Example:
        >>> net = MaskedMLP(torch.tensor([0, 1, 2]), context_dim=0, num_params=2)
        >>> net(torch.randn(7, 3), None).shape
        torch.Size([7, 3, 2])

    References:
        Germain et al. (2015), MADE: Masked Autoencoder for Distribution Estimation,
        arXiv:1502.03509, eq. 12-13.
    """

    def __init__(self, groups: Tensor, context_dim: int, num_params: int,
                 hidden_dims: Sequence[int] = HIDDEN_DIMS,
                 activation: Callable[[], nn.Module] = nn.Tanh, *,
                 angles: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__()
        self.num_params = num_params
        self.features = None if angles is None else AngleFeatures(
            check_angles("MaskedMLP", angles, len(groups)))
        seen = groups if self.features is None else groups[self.features.columns]
        before = torch.cat([seen, torch.full((context_dim,), -1)])
        layers: list[nn.Module] = []
        for size in hidden_dims:
            degrees = _spread(size, -1 if context_dim else 0, int(groups.max()) - 1)
            layers += [MaskedLinear(degrees[:, None] >= before), activation()]
            before = degrees
        after = groups.repeat(num_params)
        layers.append(OutputLinear(len(before), len(after), after[:, None] > before))
        self.layers = nn.Sequential(*layers)

    def forward(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """Parameters of every coordinate, given those before it and the context."""
        u = u if self.features is None else self.features(u)
        x = u if context is None else torch.cat([u, context], -1)
        params: Tensor = self.layers(x)
        return by_coordinate(params, self.num_params)


class AngleFeatures(nn.Module):
    r"""Coordinates as a network should see them: an angle by its cosine and its sine.

    .. math:: u \mapsto (u_{\text{reals}}, \cos u_{\text{angles}}, \sin u_{\text{angles}})

    Args:
        angles: True for the coordinates that are angles, ``(D,)``.

    Shape:
        ``(*batch, D) -> (*batch, len(columns))``.

    Attributes:
        columns: The coordinate that each feature is of.
    """

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self._reals: list[int] = (~angles).nonzero().squeeze(-1).tolist()
        self._angles: list[int] = angles.nonzero().squeeze(-1).tolist()
        self.columns = [*self._reals, *self._angles, *self._angles]

    def forward(self, u: Tensor) -> Tensor:
        """The features."""
        angles = u[..., self._angles]
        return torch.cat([u[..., self._reals], angles.cos(), angles.sin()], -1)


class ContextParameter(nn.Module):
    r"""A learned tensor, shifted by a network of the context where there is one.

    .. math:: \theta(\text{context}) = \theta_0 + \text{MLP}(\text{context})

    Args:
        init: Initial value :math:`\theta_0`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        ``(*init.shape)`` without context, ``(*batch, *init.shape)`` with.
    """

    def __init__(self, init: Tensor, context_dim: int = 0) -> None:
        super().__init__()
        self.value = nn.Parameter(init.clone())
        self.shift = MLP(context_dim, init.numel()) if context_dim else None

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The tensor for this context."""
        if self.shift is None:
            return self.value
        return self.value + self.shift(context).unflatten(-1, self.value.shape)


def check_network(owner: str, hidden_dims: Any, activation: Any) -> None:
    """Check the options of a conditioner.

    Raises:
        ValueError: If the sizes are no sequence of positive integers, or the activation builds
            no module.
    """
    if not isinstance(hidden_dims, Sequence) or isinstance(hidden_dims, str):
        raise ValueError(f"{owner} expected `hidden_dims` to be a sequence of integers, "
                         f"got {hidden_dims!r}. For one hidden layer: hidden_dims=(64,).")
    for size in hidden_dims:
        check_positive_int(owner, "hidden_dims", size)
    if isinstance(activation, nn.Module) or not callable(activation) or not isinstance(
            activation(), nn.Module):
        raise ValueError(f"{owner} expected `activation` to be a constructor of a module such as "
                         f"nn.ReLU, got {activation!r}.")


def built_network(owner: str, conditioner: Any, groups: Tensor, context_dim: int, num_params: int,
                  example: str) -> nn.Module:
    """The network that a user's constructor makes.

    Raises:
        ValueError: If it is no constructor, or makes no network.
    """
    network = None
    if callable(conditioner) and not isinstance(conditioner, nn.Module):
        network = conditioner(groups, context_dim, num_params)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{owner} expected `conditioner` to be a constructor of a network such as "
                         f"{example}, got {conditioner!r}.")
    return network


def check_angles(owner: str, angles: Any, input_dim: int) -> Tensor:
    """Which of ``input_dim`` coordinates are angles, as a boolean tensor; all of them for None.

    Raises:
        ValueError: If ``angles`` does not hold one boolean a coordinate.
    """
    if angles is None:
        return torch.ones(input_dim, dtype=torch.bool)
    try:
        given = torch.as_tensor(angles, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # of no use as numbers
        given = torch.zeros(0)
    if given.shape != (input_dim,) or not ((given == 0) | (given == 1)).all():
        raise ValueError(f"{owner} expected `angles` to hold {input_dim} booleans, one a "
                         f"coordinate, got {angles!r}.")
    return given == 1


def by_coordinate(params: Tensor, num_params: int) -> Tensor:
    """View ``(*batch, num_params * n)`` as ``(*batch, n, num_params)``.

    One parameter of all coordinates is contiguous in memory, which is how transformers read.
    """
    return params.unflatten(-1, (num_params, -1)).mT


def _spread(size: int, low: int, high: int) -> Tensor:
    """Integers from ``low`` to ``high``, repeated evenly to fill ``size`` places."""
    count = max(high - low + 1, 1)
    return low + ((torch.arange(size) + 1) * count - 1).div(size, rounding_mode="floor")

