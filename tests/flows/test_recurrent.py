"""The recurrent conditioner: the cell of torch, a size that does not grow, one sweep back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_nfvi.flows import Autoregressive, Coupling, RecurrentNet
from pyro_nfvi.testing import perturb


@pytest.mark.parametrize("context_dim", [0, 2])
def test_its_cell_is_the_gated_recurrent_unit_of_torch(context_dim):
    net = RecurrentNet(torch.arange(3), context_dim, 2, hidden_dim=5)
    cell = nn.GRUCell(1 + context_dim, 5)
    cell.load_state_dict({"weight_ih": net.read.weight, "bias_ih": net.read.bias,
                          "weight_hh": net.keep.weight, "bias_hh": net.keep.bias})
    u, h = torch.randn(7, 1), torch.randn(7, 5)
    context = torch.randn(7, context_dim) if context_dim else None
    inputs = u if context is None else torch.cat([u, context], -1)
    torch.testing.assert_close(net._step(h, u, context), cell(inputs, h))


def test_its_cell_does_not_grow_with_the_number_of_coordinates():
    def sizes(dim: int) -> tuple[int, int]:
        net = RecurrentNet(torch.arange(dim), 0, 2, hidden_dim=8)
        cell = [*net.read.parameters(), *net.keep.parameters()]
        return sum(p.numel() for p in cell), sum(p.numel() for p in net.parameters())
    (small, all_small), (large, all_large) = sizes(2), sizes(50)
    assert small == large
    assert all_large - all_small == 48 * 2 * (8 + 1)  # read off the state, linearly


@pytest.mark.parametrize("num_passes", [1, 3, 7])
def test_the_inverse_is_one_sweep(num_passes, monkeypatch):
    layer = perturb(Autoregressive(7, 2, num_passes=num_passes, conditioner=RecurrentNet)).double()
    u, context = torch.randn(4, 7).double(), torch.randn(4, 2).double()
    z, log_det = layer(u, context)
    steps = []
    step = RecurrentNet._step

    def counted(self, *args):
        steps.append(1)
        return step(self, *args)
    monkeypatch.setattr(RecurrentNet, "_step", counted)
    back, log_det_back = layer.inverse(z, context)
    assert len(steps) == num_passes
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(-log_det_back, log_det)


def test_groups_of_any_order_and_size_are_read():
    groups = torch.tensor([2, 0, 1, 0, 2, 0])
    net = perturb(RecurrentNet(groups, 0, 3, hidden_dim=4)).double()
    u = torch.randn(6).double()
    slopes = torch.func.jacrev(net)(u).abs().sum(1)
    assert net(u).shape == (6, 3)
    assert torch.equal(slopes > 0, groups[:, None] > groups)


def test_a_long_chain_stays_finite():
    layer = perturb(Autoregressive(200, conditioner=RecurrentNet))
    u = torch.randn(4, 200)
    z, log_det = layer(u)
    assert z.isfinite().all()
    log_det.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(z)[0], u, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "8"])
def test_a_wrong_size_is_named(wrong):
    with pytest.raises(ValueError, match="^RecurrentNet expected `hidden_dim` to be an integer"):
        RecurrentNet(torch.arange(3), 0, 2, hidden_dim=wrong)


def test_the_groups_of_a_coupling_are_refused():
    with pytest.raises(ValueError, match="RecurrentNet expected `groups` to be integers, got bool"):
        Coupling(3, conditioner=RecurrentNet)
