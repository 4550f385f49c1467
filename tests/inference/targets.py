"""Densities with known answers for the tests of this folder."""

from __future__ import annotations

import torch
from torch.distributions import MultivariateNormal

from pyro_nfvi import AutoFlow
from pyro_nfvi.flows import FixedLinear, Flow, Gaussian
from pyro_nfvi.inference import LogJoint

DOUBLE = torch.float64


def covariance(dim, condition, seed=0):
    """A covariance with that ratio of largest to smallest variance, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=DOUBLE, generator=generator)).Q
    half = 0.5 * torch.tensor(condition, dtype=DOUBLE).log10().item()
    return (q * torch.logspace(-half, half, dim, dtype=DOUBLE)) @ q.T


def normal(loc, cov):
    """A normal distribution in double precision that checks nothing."""
    return MultivariateNormal(loc.to(DOUBLE), cov.to(DOUBLE), validate_args=False)


def mixture(weights, *parts):
    """Log density of a mixture of distributions."""
    logs = torch.tensor(weights, dtype=DOUBLE).log()
    return lambda z: torch.logsumexp(torch.stack([p.log_prob(z) for p in parts], -1) + logs, -1)


def gaussian_flow(loc, cov):
    """The flow that is a Gaussian."""
    return Flow(FixedLinear(loc, torch.linalg.cholesky(cov)), Gaussian(len(loc)).to(loc))


def log_joint_of(model, *args):
    """The log joint of a model in double precision."""
    guide = AutoFlow(model).setup(*args).to(dtype=DOUBLE)
    return LogJoint(model, args, {}, guide.layout, DOUBLE)
