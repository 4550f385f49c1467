"""Where a density fit starts: in coordinates in which data or density are standard."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_nfvi.flows import Bijection, Compose, FixedLinear, FixedLowRank, Flow
from pyro_nfvi.inference.importance import CHUNK
from pyro_nfvi.inference.initialization import MAX_FULL, GaussianStart, flow_elbo, gaussian_start
from pyro_nfvi.inference.log_density import LogDensity
from pyro_nfvi.inference.score import Score
from pyro_nfvi.inference.stages import RUNAWAY

MAX_WHITENED = 128  # coordinates up to which data are rotated as well as scaled
ROWS_A_COORDINATE = 10  # that a covariance matrix takes
LEAST_REST = 1e-4  # of the spread of a coordinate, that a regression may leave
RIDGE = 1e-6  # added to a correlation matrix of contexts
LEAST_EIGENVALUE = 1e-6  # of a correlation matrix that is inverted
NUM_SCORED = 2000  # rows that tell which start is better
NUM_DRAWS = 2000  # the same of a density
LEAST_MASS = 0.01  # of a place that counts
SLACK = 1e-3  # nats by which a standardized start may be worse


class ContextUnits(Bijection):
    r"""A bijection whose context is standardized first: :math:`f(u;\, (c - m) / s)`.

    Args:
        bijection: The map :math:`f`, with a context.
        shift: :math:`m`, of shape ``(context_dim,)``.
        scale: :math:`s`, of shape ``(context_dim,)``, positive.

    Shape:
        u, z: ``(*batch, input_dim)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, bijection: Bijection, shift: Tensor, scale: Tensor) -> None:
        super().__init__(bijection.input_dim, bijection.context_dim)
        self.bijection = bijection
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.bijection._forward(u, self._scaled(context))

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.bijection._inverse(z, self._scaled(context))

    def _inverse_at(self, u: Tensor, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.bijection._inverse_at(u, z, self._scaled(context))

    def _initialize(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.bijection._initialize(z, self._scaled(context))

    def _scaled(self, context: Tensor | None) -> Tensor:
        assert context is not None
        return (context - self.shift) / self.scale


class FixedRegression(Bijection):
    r"""Shift that is linear in the context: :math:`z = u + B c`, with a matrix that is not learned.

    Args:
        slopes: :math:`B`, of shape ``(D, context_dim)``.

    Shape:
        u, z: ``(*batch, D)``; context: ``(*batch, context_dim)``; log-det: ``(*batch,)``.
    """

    slopes: Tensor

    def __init__(self, slopes: Tensor) -> None:
        super().__init__(*slopes.shape)
        self.register_buffer("slopes", slopes.clone())

    def _forward(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return u + context @ self.slopes.mT, u.new_zeros(u.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z - context @ self.slopes.mT, z.new_zeros(z.shape[:-1])


# ------------------------------------------------------------------ data

@torch.no_grad()
def data_start(flow: Flow, x: Tensor, context: Tensor | None, standardize: bool) -> Flow:
    """The flow, or the flow between noise and standardized data, whichever the data prefer.

    A flow that is trained already knows its data better as it is.
    """
    rows = slice(NUM_SCORED)
    data = x[rows], None if context is None else context[rows]
    best, score = flow, _log_likelihood(flow, *data)
    if standardize:
        standardized = _standardized(flow, x, context)
        value = _log_likelihood(standardized, *data)
        best, score = (standardized, value) if value > score - SLACK else (best, score)
    initialized = copy.deepcopy(best)
    initialized.initialize(*data)
    return initialized if _log_likelihood(initialized, *data) > score else best


@torch.no_grad()
def mean_log_prob(flow: Flow, x: Tensor, context: Tensor | None) -> float:
    """Mean log-likelihood of rows, so many at a time."""
    contexts = [None] * len(x) if context is None else context.split(CHUNK)
    parts = [flow.log_prob(part, c).double().sum() for part, c in
             zip(x.split(CHUNK), contexts, strict=False)]
    return (torch.stack(parts).sum() / len(x)).item()


def _log_likelihood(flow: Flow, x: Tensor, context: Tensor | None) -> float:
    value = mean_log_prob(flow, x, context)
    return value if value == value else -torch.inf


def _standardized(flow: Flow, x: Tensor, context: Tensor | None) -> Flow:
    """The flow between noise and standardized data, given standardized contexts."""
    x, layers = x.double(), [flow.bijection]
    if context is None:
        return Flow(Compose([*layers, _frame(x)]), flow.base).to(flow.base.zeros)
    mean, scale = context.double().mean(0), context.double().std(0)
    scale = scale.where(scale > 0, 1.0)
    slopes, rest = _regressed(x, (context.double() - mean) / scale)
    layers += [_frame(rest), FixedRegression(slopes)]
    return Flow(ContextUnits(Compose(layers), mean, scale), flow.base).to(flow.base.zeros)


def _regressed(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of a linear regression on standardized contexts, and what it leaves unexplained.

    With few rows, or if nothing is left, the slopes are zero.
    """
    rows, size = context.shape
    if size <= MAX_WHITENED and rows >= ROWS_A_COORDINATE * (size + 1):
        normal = context.mT @ context / rows + RIDGE * torch.eye(size).to(context)
        slopes = torch.linalg.solve(normal, context.mT @ (x - x.mean(0)) / rows).mT
        rest = x - context @ slopes.mT
        if (rest.std(0) > LEAST_REST * x.std(0)).all():
            return slopes, rest
    return x.new_zeros(x.shape[-1], size), x


def _frame(x: Tensor) -> Bijection:
    """The affine map from standard coordinates to those of the data."""
    rows, dim = x.shape
    mean, scale = x.mean(0), x.std(0)
    if dim <= MAX_WHITENED and rows >= ROWS_A_COORDINATE * dim:
        standard = (x - mean) / scale
        correlation = standard.mT @ standard / (rows - 1)
        if torch.linalg.eigvalsh(correlation)[0] > LEAST_EIGENVALUE:
            factor = scale.unsqueeze(-1) * torch.linalg.cholesky(correlation)
            return FixedLinear(mean, factor)
    return FixedLowRank(mean, scale, x.new_zeros(dim, 0), x.new_zeros(0))


# ------------------------------------------------------------------ densities

@torch.no_grad()
def density_start(flow: Flow, log_density: LogDensity) -> tuple[Flow, Tensor]:
    """The flow, or the flow in coordinates in which the density is standard, if that is better.

    The density's modes and scales are found by Pathfinder from many starts.

    Returns:
        The flow, and the centres ``(k, D)`` of places with mass.
    """
    score = Score(log_density)
    found = gaussian_start(score, _starting_points(flow))
    if found is None:
        return flow, flow.base.zeros.new_zeros(0, flow.input_dim)
    weights = torch.tensor(found.elbo).softmax(0)
    centres = torch.stack([place.bijection.shift for place, weight in
                           zip(found.places, weights, strict=True) if weight > LEAST_MASS])
    frame = _density_frame(found)
    if frame is None:
        return flow, centres
    framed = Flow(Compose([flow.bijection, frame]), flow.base).to(flow.base.zeros)
    elbos = [flow_elbo(score, start, NUM_DRAWS) for start in (flow, framed)]
    return framed if elbos[1] > elbos[0] else flow, centres


def _starting_points(flow: Flow) -> Callable[[int], Tensor]:
    """Draws of the flow, and of boxes like those of Stan, the second five times as wide."""
    def draw(count: int) -> Tensor:
        zeros, third = flow.base.zeros, count // 3
        boxes = 4 * torch.rand(count - third, len(zeros)).to(zeros) - 2
        boxes[third:] *= 5
        return torch.cat([flow.rsample_and_log_prob((third,))[0], boxes])
    return draw


def _density_frame(found: GaussianStart) -> Bijection | None:
    """Mean and covariance over all places, each by its mass; None if they are without bounds."""
    maps = [place.bijection for place in found.places]
    shift = maps[0].shift
    if len(shift) > MAX_FULL:
        return maps[0]
    weights = torch.tensor(found.elbo).softmax(0).to(shift)
    shifts = torch.stack([place.shift for place in maps])
    factors = torch.stack([place.factor() for place in maps])
    mean = weights @ shifts
    gaps = shifts - mean
    covariance = torch.einsum("k,kij,klj->il", weights, factors, factors) \
        + (weights * gaps.mT) @ gaps
    scale = covariance.diagonal().sqrt()
    if not bool((mean.abs() + scale < RUNAWAY).all()):
        return None
    return FixedLinear(mean, torch.linalg.cholesky(covariance))
