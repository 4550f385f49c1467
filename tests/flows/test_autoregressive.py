"""Autoregressive layers: passes from coupling to full, conditioners, and numerical inverses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import jacrev

from pyro_nfvi.flows import (
    Autoregressive,
    DeepSigmoid,
    Inverse,
    MaskedMLP,
    RecurrentNet,
    iaf,
    maf,
)
from pyro_nfvi.testing import perturb

GROUPS = {2: [0, 0, 0, 1, 1, 1], 3: [0, 0, 1, 1, 2, 2], 4: [0, 0, 1, 2, 2, 3],
          6: [0, 1, 2, 3, 4, 5]}


def structure(layer: Autoregressive) -> torch.Tensor:
    """Which output hangs on which input."""
    points = torch.randn(20, layer.input_dim).double()
    return sum(jacrev(lambda u: layer(u)[0])(u).abs() for u in points) > 0


@pytest.mark.parametrize("conditioner", [None, partial(RecurrentNet, hidden_dim=4)],
                         ids=["masked", "recurrent"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_passes", GROUPS)
def test_coordinates_of_a_group_do_not_see_each_other(num_passes, reverse, conditioner):
    layer = perturb(Autoregressive(6, num_passes=num_passes, reverse=reverse,
                                   conditioner=conditioner)).double()
    groups = torch.tensor(GROUPS[num_passes])
    groups = groups.flip(0) if reverse else groups
    expected = (groups[:, None] > groups) | torch.eye(6, dtype=torch.bool)
    assert torch.equal(structure(layer), expected)


@pytest.mark.parametrize("num_passes", GROUPS)
def test_the_inverse_takes_as_many_passes_as_there_are_groups(num_passes):
    calls = []

    class Counting(MaskedMLP):
        def forward(self, u, context=None):
            calls.append(1)
            return super().forward(u, context)
    for transformer in (None, DeepSigmoid(2)):
        layer = Autoregressive(6, num_passes=num_passes, conditioner=Counting,
                               transformer=transformer)
        calls.clear()
        layer.inverse(torch.randn(3, 6))
        assert len(calls) == num_passes


@pytest.mark.parametrize("reverse", [False, True])
def test_a_numerical_inverse_searches_once_for_each_coordinate(reverse, monkeypatch):
    searched = []

    class Counting(DeepSigmoid):
        def inverse(self, z, params):
            searched.append(z.shape[-1])
            return super().inverse(z, params)
    layer = perturb(Autoregressive(5, num_passes=3, reverse=reverse,
                                   transformer=Counting(2))).double()
    u = torch.randn(7, 5).double()
    z, log_det = layer(u)
    back, log_det_back = layer.inverse(z)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(-log_det_back, log_det)
    assert sum(searched) == 5
    assert len(searched) == 3


@pytest.mark.parametrize("recipe", [iaf, maf])
def test_recipes_take_passes_and_conditioner(recipe):
    flow = recipe(6, num_layers=2, num_passes=2, conditioner=RecurrentNet)
    layers = [layer.bijection if isinstance(layer, Inverse) else layer for layer in flow.layers]
    assert [layer.num_passes for layer in layers] == [2, 2]
    assert all(isinstance(layer.conditioner, RecurrentNet) for layer in layers)


@pytest.mark.parametrize("wrong", ["recurrent", RecurrentNet(torch.arange(3), 0, 2),
                                   lambda groups, context_dim, num_params: None, 3],
                         ids=["string", "built", "none", "number"])
def test_a_wrong_conditioner_is_named(wrong):
    with pytest.raises(ValueError, match="^Autoregressive expected `conditioner` to be a "
                                         "constructor of a network such as RecurrentNet, got "):
        Autoregressive(3, conditioner=wrong)


class Linear(nn.Module):
    """A conditioner of a user's own: sums of the coordinates before."""

    def __init__(self, groups, context_dim, num_params):
        super().__init__()
        self.register_buffer("before", (groups[:, None] > groups).float())
        self.weight = nn.Parameter(torch.zeros(num_params))

    def forward(self, u, context=None):
        return (u @ self.before.mT).unsqueeze(-1) * self.weight


def test_a_conditioner_may_be_a_users_own():
    layer = perturb(Autoregressive(4, conditioner=Linear)).double()
    u = torch.randn(5, 4).double()
    torch.testing.assert_close(layer.inverse(layer(u)[0])[0], u)
