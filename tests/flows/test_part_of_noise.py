"""Parts of a flow's draws: together they are those of the flow, eager and compiled."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import ELBO
from pyro_nfvi.flows import (
    Flow,
    Gaussian,
    Mixture,
    MultivariateStudentT,
    PartOfNoise,
    StudentT,
    nsf,
)
from pyro_nfvi.testing import perturb
from tests.engine.fits import Fit

BASES = [Gaussian, StudentT, MultivariateStudentT, Mixture]


def seeded(draw, *args):
    torch.manual_seed(7)
    return draw(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
@pytest.mark.parametrize("path", [False, True], ids=["whole", "path"])
def test_the_parts_together_are_the_draws_of_the_flow(base, dtype, path):
    flow = Flow(nsf(3, context_dim=2), base(3)).to(dtype)
    perturb(flow, 0.3)
    context, name = torch.randn(4, 2, dtype=dtype), "rsample_and_path_log_prob" if path else \
        "rsample_and_log_prob"
    whole = seeded(getattr(flow, name), (6, 5), context)
    parts = [seeded(getattr(PartOfNoise(flow, part, 3), name), (2, 5), context)
             for part in range(3)]
    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), one)


def test_one_draw_of_each_part_is_a_row():
    flow = Flow(nsf(3))
    z = seeded(flow.rsample_and_log_prob, (4,))[0]
    for part in range(4):
        row, log_q = seeded(PartOfNoise(flow, part, 4).rsample_and_log_prob)
        assert log_q.shape == ()
        torch.testing.assert_close(row, z[part])


def test_parts_share_the_parameters():
    flow = Flow(nsf(3), Mixture(3))
    part = PartOfNoise(flow, 1, 2)
    assert all(one is other for one, other in zip(flow.parameters(), part.parameters(),
                                                  strict=True))


@pytest.mark.parametrize(("flow", "part", "num_parts", "message"), [
    (Gaussian(2), 0, 2, "`flow` to be a Flow, got Gaussian"), (None, -1, 2, "`part` to be an int"),
    (None, 2, 2, "`part` below `num_parts`, got 2 of 2"), (None, 0, 0, "`num_parts` to be an int")])
def test_bad_parts_are_refused(flow, part, num_parts, message):
    with pytest.raises(ValueError, match=f"PartOfNoise expected {message}"):
        PartOfNoise(flow or Flow(nsf(2)), part, num_parts)


def gaussian():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(3))


def part_of(part):
    def objective(flow, log_joint, num_particles):
        return ELBO()(PartOfNoise(flow, part, 2), log_joint, num_particles // 2)
    return objective


def test_parts_compile_to_c_and_average_to_the_whole():
    fits = [Fit(gaussian, tuple, "c", objective=objective)
            for objective in (ELBO(), part_of(0), part_of(1))]
    assert [fit.stepper.tier for fit in fits] == ["c"] * 3
    whole, first, second = (fit.losses(fit.program, [0.0])[0] for fit in fits)
    assert first != second
    torch.testing.assert_close((first + second) / 2, whole)
