"""A Gaussian found from some of the rows, moved to where all of them want it."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.func import vjp

from pyro_nfvi.flows import FixedLinear, FixedLowRank, Flow
from pyro_nfvi.inference.all_data import AllData
from pyro_nfvi.inference.score import Score

NUM_STEPS = 3  # each of which reads all rows
ENOUGH = 0.01  # nats that a further step may promise


def centred(flow: Flow, all_data: AllData, score: Score, deadline: float = math.inf) -> Flow:
    r"""Move a Gaussian by Newton steps on the log joint of all rows.

    .. math:: \mu \leftarrow \mu + A A^\top \left(\nabla \log p(x, \mu)
              - \nabla \log p(x_s, \mu_s)\right), \qquad z = \mu + A u

    The gradient for the rows :math:`x_s` that the Gaussian was found from, at its mean
    :math:`\mu_s`, is not zero: the mean of a skewed posterior is not its mode. The covariance
    :math:`A A^\top` is that of those rows, with their likelihood scaled to all: one step takes the
    mean to within the error of that covariance. A step that does not gain, in the log joint less
    that gradient, is not made. A mixture stays as it is.

    Args:
        flow: The Gaussian.
        all_data: The log joint of all rows.
        score: The log joint of the rows it was found from.
        deadline: Time of ``time.monotonic()`` after which no further step is made.

    References:
        Le Cam (1956), On the asymptotic theory of estimation and testing hypotheses (one step
        from a root-n consistent estimate is efficient).
    """
    frame = flow.bijection
    if not isinstance(frame, FixedLinear | FixedLowRank) or getattr(flow.base, "flows", None):
        return flow
    tilt = score(frame.shift.unsqueeze(0))[1].squeeze(0)
    value, gradient = _at(all_data, frame.shift, tilt)
    for _ in range(NUM_STEPS):
        step = _newton(frame, gradient)
        if not step @ gradient > ENOUGH or time.monotonic() > deadline:
            break
        new_value, new_gradient = _at(all_data, frame.shift + step, tilt)
        if not new_value > value:
            break
        frame.shift.add_(step)
        value, gradient = new_value, new_gradient
    return flow


def _at(all_data: AllData, z: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = all_data(z.unsqueeze(0)).squeeze(0)
    gradient, = torch.autograd.grad(value, z)
    return value.detach() - tilt.double() @ z.detach().double(), gradient - tilt


def _newton(frame: FixedLinear | FixedLowRank, gradient: Tensor) -> Tensor:
    zeros = torch.zeros_like(gradient)
    _, transposed = vjp(lambda u: frame(u)[0], zeros)
    turned, = transposed(gradient)
    return (frame(turned)[0] - frame.shift).detach()
