"""The contract every flow layer keeps: an invertible map with its log-determinant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_nfvi._shapes import (
    broadcast_batch,
    check_context,
    check_dtype,
    check_positive_int,
    check_tensor,
    type_name,
)


class Bijection(nn.Module, ABC):
    r"""An invertible map :math:`z = f(u)` with its log-determinant, in both directions.

    .. math:: \log q(z) = \log p(u) - \log\left|\det \tfrac{\partial z}{\partial u}\right|

    The public methods check and broadcast their arguments; a subclass writes ``_forward`` and
    ``_inverse`` and may assume inputs of shape ``(*batch, input_dim)`` and a context that is
    ``None`` or of shape ``(*batch, context_dim)``. A new bijection starts as the identity and
    keeps no cache, so it copies, pickles, reloads and compiles.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If a dimension is not a positive integer, or an input has another shape.

    Example:
        >>> class Shift(Bijection):
        ...     def __init__(self, input_dim):
        ...         super().__init__(input_dim)
        ...         self.by = nn.Parameter(torch.zeros(input_dim))
        ...     def _forward(self, u, context):
        ...         return u + self.by, u.new_zeros(u.shape[:-1])
        ...     def _inverse(self, z, context):
        ...         return z - self.by, z.new_zeros(z.shape[:-1])
        >>> z, log_det = Shift(3)(torch.ones(7, 3))
        >>> z.shape, log_det.shape
        (torch.Size([7, 3]), torch.Size([7]))
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        owner = type(self).__name__
        self.input_dim = check_positive_int(owner, "input_dim", input_dim)
        self.context_dim = check_positive_int(owner, "context_dim", context_dim, minimum=0)

    def forward(self, u: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Map noise to latent, the sampling direction: :math:`z,\ \log|\det dz/du|`."""
        return self._forward(*self._checked("u", u, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Map any latent point back to noise: :math:`u,\ \log|\det du/dz|`."""
        return self._inverse(*self._checked("z", z, context))

    @abstractmethod
    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Forward pass on checked inputs."""

    @abstractmethod
    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverse pass on checked inputs."""

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inverse of ``z`` when its preimage ``u`` is known: only the derivatives are new.

        The path gradient asks for this right after sampling. A layer with an iterative inverse
        starts from ``u``; the others just invert.
        """
        return self._inverse(z, context)

    @property
    def log_det_is_random(self) -> bool:
        """Whether log-determinants are estimates, here or in a layer, new ones at every call.

        An ELBO takes unbiased ones; importance weights and Pareto k-hat want exact ones.
        """
        return any(module.log_det_is_random for module in self.modules()
                   if module is not self and isinstance(module, Bijection))

    def _initialize(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Take a data-dependent start from samples; return their noise.

        A layer that has such a start moves its parameters first; the others just invert.
        """
        return self._inverse(z, context)[0]

    @classmethod
    def _forward_run(cls, layers: Sequence[Bijection], u: Tensor, context: Tensor | None
                     ) -> tuple[Tensor, Tensor]:
        """Forward pass through layers of this class in a row; some know a shorter way."""
        log_det: Tensor | None = None
        for layer in layers:
            u, term = layer._forward(u, context if layer.context_dim else None)
            log_det = term if log_det is None else log_det + term
        assert log_det is not None
        return u, log_det

    def _checked(self, argument: str, value: Tensor, context: Tensor | None
                 ) -> tuple[Tensor, Tensor | None]:
        owner = type(self).__name__
        value = check_tensor(owner, argument, value, self.input_dim)
        if not torch.compiler.is_compiling():  # dynamo cannot walk the parameters of any module
            check_dtype(owner, argument, value, next(self.parameters(), None))
        context = check_context(owner, context, self.context_dim)
        return broadcast_batch(owner, argument, value, context)

    def extra_repr(self) -> str:
        """Dimensions, as ``repr`` shows them."""
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.input_dim}{context}"


class Inverse(Bijection):
    """A bijection run backwards: its forward is the other's inverse.

    Args:
        bijection: The map to invert.

    Example:
        >>> import torch
        >>> from pyro_nfvi.flows import Autoregressive
        >>> maf_layer = Inverse(Autoregressive(3))     # density in one pass, sampling in three
        >>> maf_layer(torch.zeros(3))[0].shape
        torch.Size([3])
    """

    def __init__(self, bijection: Bijection) -> None:
        if not isinstance(bijection, Bijection):
            raise ValueError("Inverse expected `bijection` to be a Bijection, got "
                             f"{type_name(bijection)}.")
        super().__init__(bijection.input_dim, bijection.context_dim)
        self.bijection = bijection

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.bijection._inverse(u, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.bijection._forward(z, context)
