"""Several places at once: how much mass each has, and in which coordinates."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.inference.modes import LEAST_WEIGHT, NUM_DRAWS, _weights, mixture_of
from pyro_nfvi.inference.score import Score
from tests.inference.targets import DOUBLE, covariance, gaussian_flow, mixture, normal

LOCS = torch.tensor([[-8.0, 0.0], [8.0, 3.0]], dtype=DOUBLE)
COVS = torch.stack([covariance(2, 10.0), 4 * covariance(2, 3.0, seed=1)])


def parts():
    return [normal(loc, cov) for loc, cov in zip(LOCS, COVS, strict=True)]


def places(wider=1.0):
    return [gaussian_flow(loc, wider * cov) for loc, cov in zip(LOCS, COVS, strict=True)]


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
def test_weights_are_the_masses_where_the_places_fit_exactly(mass):
    score = Score(mixture([mass, 1 - mass], *parts()))
    assert _weights(score, places())[0].item() == pytest.approx(mass, abs=1e-3)


def test_weights_are_the_masses_up_to_noise_where_the_places_are_too_wide():
    # The mass of a place is a mean of importance weights: of relative standard error cv / root n.
    masses = torch.tensor([0.8, 0.2], dtype=DOUBLE)
    score = Score(mixture(masses.tolist(), *parts()))
    found = _weights(score, places(wider=2.0))
    squares = (2.0 / (2 - 1 / 2.0) ** 0.5 / 2 ** 0.5) ** 2  # E w^2, of two dimensions
    relative = (2 * (squares - 1) / NUM_DRAWS) ** 0.5
    assert found.sum().item() == pytest.approx(1.0)
    assert ((found - masses).abs() < 4 * masses.prod() * relative).all()


def test_weights_do_not_depend_on_the_evidence():
    target = mixture([0.3, 0.7], *parts())
    for shift in (-1e4, 1e4):
        weights = _weights(Score(lambda z, shift=shift: target(z) + shift), places())
        assert weights[0].item() == pytest.approx(0.3, abs=1e-3)


def test_overlapping_places_share_the_mass_as_a_fit_of_the_mixture_does():
    eye = torch.eye(1, dtype=DOUBLE)
    centers = [torch.tensor([c], dtype=DOUBLE) for c in (-1.0, 1.0)]
    score = Score(mixture([0.25, 0.75], *(normal(c, eye) for c in centers)))
    found = torch.stack([_weights(score, [gaussian_flow(c, eye) for c in centers])
                         for _ in range(20)])[:, 0]
    assert abs(found.mean() - 0.25) < 4 * found.std() / 20 ** 0.5 + 0.005  # EM is not at its end
    assert found.std() < 0.05


def test_the_mixture_has_the_density_of_its_places():
    score = Score(mixture([0.3, 0.7], *parts()))
    flow = mixture_of(score, places())
    z = torch.cat([part.sample((50,)) for part in parts()])
    torch.testing.assert_close(flow.log_prob(z), score.value(z), rtol=1e-3, atol=5e-3)


def test_draws_of_the_mixture_come_from_every_place_by_its_weight():
    flow = mixture_of(Score(mixture([0.3, 0.7], *parts())), places())
    z, log_q = flow.rsample_and_log_prob((10_000,))
    torch.testing.assert_close(flow.log_prob(z), log_q)
    assert abs((z[:, 0] < 0).double().mean() - 0.3) < 4 * (0.21 / 10_000) ** 0.5 + 1e-3


def test_in_the_frame_the_noise_has_mean_zero_and_unit_covariance():
    flow = mixture_of(Score(mixture([0.3, 0.7], *parts())), places())
    weights, shifts, lowers = flow.base.weights, *(
        torch.stack([getattr(part.bijection, name) for part in flow.base.flows])
        for name in ("shift", "lower"))
    mean = weights @ shifts
    second = torch.einsum("k,kij->ij", weights, lowers @ lowers.mT) + (weights * shifts.T) @ shifts
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-9)
    torch.testing.assert_close(second, torch.eye(2, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_a_place_without_mass_is_left_out():
    everywhere = [*places(), gaussian_flow(torch.full((2,), 50.0, dtype=DOUBLE),
                                           torch.eye(2, dtype=DOUBLE))]
    flow = mixture_of(Score(mixture([0.3, 0.7], *parts())), everywhere)
    assert len(flow.base.flows) == 2
    light = Score(mixture([LEAST_WEIGHT / 10, 1 - LEAST_WEIGHT / 10], *parts()))
    assert len(mixture_of(light, places()).base.flows) == 1


def test_draws_without_density_count_for_nothing():
    target = mixture([0.5, 0.5], *parts())

    def cut(z):  # half of the first place is forbidden
        return target(z).where((z[:, 0] < -8) | (z[:, 0] > 0), z.new_tensor(-torch.inf))
    weights = _weights(Score(cut), places())
    share = 0.5 * (0.25 / NUM_DRAWS) ** 0.5
    assert abs(weights[0] / weights[1] - 0.5) < 4 * 2 * share
