"""Tails: which noise a fitted map should have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pyro_nfvi.flows import Flow, Gaussian, MixtureOfFlows, MultivariateStudentT, StudentT
from pyro_nfvi.flows.base import Base
from pyro_nfvi.inference.importance import ImportanceSample, importance_sample

NUM_PILOT = 2000  # draws that compare the tails
ENOUGH = 0.9  # effective fraction at which no further noise is tried
MOST_LOST = 0.5  # nats of ELBO
HEAVIER: tuple[Callable[[int], Base], ...] = tuple(
    partial(kind, df=df) for kind in (MultivariateStudentT, StudentT) for df in (30.0, 10.0, 3.0))


def heavier_tails(flow: Flow, log_joint: Callable, now: ImportanceSample, wanted: float
                  ) -> Flow:
    r"""The same map on the noise whose importance weights have the lightest tail.

    A Gaussian guide of a posterior with heavier tails has weights without a variance; noise
    from Student's t with few degrees of freedom covers them. Elliptical and independent noise
    is tried, with 30, 10 and 3 degrees of freedom, until one is all but perfect. Of those whose
    k-hat is below ``wanted``, the one of most effective draws is taken; if there is none, that
    of lowest k-hat. Noise that lowers the ELBO by more than a little is not.

    Args:
        flow: A flow on Gaussian noise, or on a mixture of such; others are returned as they are.
        log_joint: The log joint.
        now: Draws of the flow as it is.
        wanted: k-hat that is low enough.

    References:
        Jaini, Kobyzev, Yu & Brubaker (2020), Tails of Lipschitz Triangular Flows,
        arXiv:1907.04481; Liang, Mahoney & Hodgkinson (2022), Fat-Tailed Variational Inference,
        arXiv:2205.07918.
    """
    choices = [(flow, now)]
    for base in _bases(flow.base):
        heavy = Flow(flow.bijection, base.to(flow.base.zeros))
        sample = importance_sample(heavy, log_joint, NUM_PILOT)
        if sample.elbo[0] > now.elbo[0] - MOST_LOST:
            choices.append((heavy, sample))
            if _worth(sample, wanted) > ENOUGH:
                break
    return max(choices, key=lambda choice: _worth(choice[1], wanted))[0]


def _worth(sample: ImportanceSample, wanted: float) -> float:
    enough = sample.pareto_k < wanted
    return sample.ess / sample.num_samples if enough else wanted - sample.pareto_k - 1


def _bases(base: Base) -> Iterator[Base]:
    for make in HEAVIER:
        if type(base) is Gaussian:
            yield make(base.input_dim)
        elif isinstance(base, MixtureOfFlows):
            flows = [Flow(flow.bijection, make(base.input_dim).to(base.zeros))
                     for flow in base.flows]
            yield MixtureOfFlows(flows, base.weights)
