"""Elementwise maps: nonlinearities of one coordinate at a time, and the layer that applies them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_nfvi.flows.bijection import Bijection
from pyro_nfvi.flows.nets import ContextParameter
from pyro_nfvi.flows.transformers import Transformer, checked_transformer, soft_clamp

# So that sinh stays far from the largest float32.
MAX_SKEW = 5.0
MAX_LOG_TAIL = 1.0


class SinhArcsinh(Transformer):
    r"""Skew and tails: :math:`z = \sinh(e^{s} \operatorname{arsinh}(u) + t)`.

    .. math:: \log \frac{dz}{du} = \log \cosh(e^{s} \operatorname{arsinh}(u) + t) + s
              - \tfrac12 \log(1 + u^2), \qquad s = \tanh \tilde s, \quad
              t = 5 \tanh(\tilde t / 5)

    Far out :math:`|z| \propto |u|^{e^s}`: tails grow heavier for :math:`s > 0` and lighter for
    :math:`s < 0`, while :math:`t` skews. Smooth, with an inverse in closed form.

    Example:
        >>> heavier = torch.tensor([[0.0, 1.0]])  # no skew, and s = tanh(1)
        >>> SinhArcsinh().forward(torch.tensor([10.0]), heavier)[0] > 10
        tensor([True])

    References:
        Jones & Pewsey (2009), Sinh-arcsinh distributions, Biometrika 96(4), eq. 1.
    """

    params_per_dim = 2

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift between arsinh and sinh."""
        shift, log_scale = self._shift_and_log_scale(params)
        x = torch.addcmul(shift, u.asinh(), log_scale.exp())
        return x.sinh(), _log_cosh(x) + log_scale - _log_cosh_of_asinh(u)

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The same, with the affine map undone."""
        shift, log_scale = self._shift_and_log_scale(params)
        x = (z.asinh() - shift) * (-log_scale).exp()
        return x.sinh(), _log_cosh(x) - log_scale - _log_cosh_of_asinh(z)

    @staticmethod
    def _shift_and_log_scale(params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.mT.unbind(-2)
        return soft_clamp(shift, MAX_SKEW), soft_clamp(raw, MAX_LOG_TAIL)


class LeakyReLU(Transformer):
    r"""Parametric leaky rectifier: one slope below zero, another above.

    .. math:: z = e^{s_-} \min(u, 0) + e^{s_+} \max(u, 0), \qquad s = 3 \tanh(\tilde s / 3)

    The density of a flow jumps at the kink; between linear layers this is the invertible twin of
    a rectifier network.

    Example:
        >>> params = torch.tensor([[0.0, 1.0]]).expand(2, 2)
        >>> z, _ = LeakyReLU().forward(torch.tensor([-1.0, 1.0]), params)
        >>> z[0].item(), bool(z[1] > 2)
        (-1.0, True)

    References:
        He, Zhang, Ren & Sun (2015), Delving Deep into Rectifiers, arXiv:1502.01852, eq. 1;
        Kobyzev, Prince & Brubaker (2020), Normalizing Flows: An Introduction and Review,
        arXiv:1908.09257, section 3.1 (elementwise flows).
    """

    params_per_dim = 2

    def forward(self, u: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Scale by the slope of the side."""
        log_slope = self._log_slope(u, params)
        return u * log_slope.exp(), log_slope

    def inverse(self, z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Unscale: the sides stay."""
        log_slope = self._log_slope(z, params)
        return z * (-log_slope).exp(), -log_slope

    @staticmethod
    def _log_slope(side: Tensor, params: Tensor) -> Tensor:
        below, above = soft_clamp(params.mT).unbind(-2)
        return torch.where(side < 0, below, above)


class Elementwise(Bijection):
    r"""Every coordinate by itself: :math:`z_i = \tau(u_i;\, \theta_i(\text{context}))`.

    Args:
        input_dim: Number of coordinates :math:`D`.
        context_dim: Number of context coordinates; 0 for none.
        transformer: Scalar map :math:`\tau`. Default: :class:`SinhArcsinh`.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.

    Raises:
        ValueError: If ``transformer`` is no Transformer.

    Example:
        >>> from pyro_nfvi.flows import RationalQuadraticSpline
        >>> layer = Elementwise(3, transformer=RationalQuadraticSpline(num_bins=4))
        >>> z, log_det = layer(torch.randn(7, 3))
        >>> z.shape, log_det.shape
        (torch.Size([7, 3]), torch.Size([7]))

    References:
        Kobyzev, Prince & Brubaker (2020), Normalizing Flows: An Introduction and Review,
        arXiv:1908.09257, section 3.1.
    """

    def __init__(self, input_dim: int, context_dim: int = 0, *,
                 transformer: Transformer | None = None) -> None:
        super().__init__(input_dim, context_dim)
        transformer = SinhArcsinh() if transformer is None else transformer
        self.transformer = checked_transformer("Elementwise", transformer)
        zeros = torch.zeros(self.transformer.params_per_dim, self.input_dim)
        self.params = ContextParameter(zeros, self.context_dim)

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = self.transformer.forward(u, self._params(u, context))
        return z, log_det.sum(-1)

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u, log_det = self.transformer.inverse(z, self._params(z, context))
        return u, log_det.sum(-1)

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        u, log_det = self.transformer.inverse_at(u, z, self._params(z, context))
        return u, log_det.sum(-1)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        """One set of parameters a coordinate and batch element, as transformers take them."""
        params: Tensor = self.params(context)
        return params.expand(*x.shape[:-1], *params.shape[-2:]).mT

    def extra_repr(self) -> str:
        """Dimensions and transformer."""
        return f"{super().extra_repr()}, transformer={self.transformer!r}"


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2)


def _log_cosh_of_asinh(x: Tensor) -> Tensor:
    r""":math:`\tfrac12 \log(1 + x^2)`, which for large numbers does not square them."""
    return torch.logaddexp(x.asinh(), -x.asinh()) - math.log(2)
