"""Newcomers' mistakes: each raises a ValueError that names owner, argument, expected and got."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
import zuko
from torch import nn
from torch.distributions import ExpTransform, Normal, StickBreakingTransform

from pyro_nfvi import flows
from pyro_nfvi.flows import (
    Affine,
    Autoregressive,
    BijectionTransform,
    Compose,
    Coupling,
    Diagonal,
    Flow,
    FromTransform,
    Gaussian,
    Householder,
    Inverse,
    LowRank,
    Mixture,
    MixtureOfFlows,
    MultivariateStudentT,
    Permutation,
    Planar,
    RationalQuadraticSpline,
    StudentT,
    Sylvester,
    nsf,
)
from tests.cases import BASES, RECIPES

LAYERS = [Diagonal, flows.Triangular, flows.LULinear, LowRank, Householder, Planar, flows.Radial,
          Sylvester, Coupling, Autoregressive, flows.Elementwise, flows.BlockAutoregressive,
          flows.AngularDiagonal]
ROWS = torch.zeros(5, 3)


def says(message: str) -> object:
    """The error whose message is ``message``, word by word; ``...`` is anything."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return pytest.raises(ValueError, match=f"(?s)^{pattern}$")


def mistakes(*pairs: tuple) -> pytest.MarkDecorator:
    """Parametrize over (mistake, message); the message is the id."""
    return pytest.mark.parametrize(("mistake", "message"), pairs, ids=[m for _, m in pairs])


# ------------------------------------------------------------------ points and contexts

@mistakes(
    (lambda: Coupling(3)(torch.zeros(5, 4)),
     "Coupling expected `u` of shape (*batch, 3), got (5, 4)."),
    (lambda: Coupling(3).inverse(torch.zeros(5, 4)),
     "Coupling expected `z` of shape (*batch, 3), got (5, 4)."),
    (lambda: Coupling(3)(torch.tensor(1.0)),
     "Coupling expected `u` of shape (*batch, 3), got ()."),
    (lambda: nsf(3)(torch.zeros(3, 5)),
     "Compose expected `u` of shape (*batch, 3), got (3, 5)."),
    (lambda: Coupling(3)(np.zeros((5, 3))),
     "Coupling expected `u` to be a tensor of shape (*batch, 3), got ndarray."),
    (lambda: Coupling(3)([0.0, 0.0, 0.0]),
     "Coupling expected `u` to be a tensor of shape (*batch, 3), got list."),
    (lambda: Coupling(3).inverse(ROWS.long()),
     "Coupling expected `z` to hold floating-point numbers, got torch.int64. "
     "Convert it: z.double()."),
    (lambda: Coupling(3)(ROWS.bool()),
     "Coupling expected `u` to hold floating-point numbers, got torch.bool. "
     "Convert it: u.double()."),
    (lambda: Coupling(3, 2)(ROWS),
     "Coupling expected `context` of shape (*batch, 2), got None. "
     "Pass it: coupling(u, context)."),
    (lambda: Coupling(3)(ROWS, torch.zeros(2)),
     "Coupling takes no `context` (it was built with context_dim=0). Build it with context_dim=2."),
    (lambda: Permutation([1, 0, 2])(ROWS, torch.zeros(2)),
     "Permutation takes no `context` (it was built with context_dim=0)...."),
    (lambda: Coupling(3, 2)(ROWS, torch.zeros(5)),
     "Coupling expected `context` of shape (*batch, 2), got (5,)."),
    (lambda: Coupling(3, 2)(ROWS, [0.0, 0.0]),
     "Coupling expected `context` to be a tensor of shape (*batch, 2), got list."),
    (lambda: Coupling(3, 2)(ROWS, torch.zeros(5, 2).long()),
     "Coupling expected `context` to hold floating-point numbers, got torch.int64...."),
    (lambda: Coupling(3, 2)(ROWS, torch.zeros(4, 2)),
     "Coupling expected the batch shapes of `u` and `context` to broadcast, "
     "got (5, 3) and (4, 2)."),
    (lambda: Inverse(Coupling(3)).inverse(torch.zeros(2)),
     "Inverse expected `z` of shape (*batch, 3), got (2,)."),
)
def test_a_wrong_point_or_context_is_named(mistake, message):
    with says(message):
        mistake()


@mistakes(
    (lambda: Flow(Planar(2)).log_prob(torch.zeros(3)),
     "Planar expected `z` of shape (*batch, 2), got (3,)."),
    (lambda: Flow(Planar(2)).log_prob([0.0, 0.0]),
     "Planar expected `z` to be a tensor of shape (*batch, 2), got list."),
    (lambda: Flow(Planar(2, 1)).log_prob(torch.zeros(2)),
     "Planar expected `context` of shape (*batch, 1), got None...."),
    (lambda: Flow(Planar(2, 1))().sample(),
     "Flow expected `context` of shape (*batch, 1), got None...."),
    (lambda: Flow(Planar(2, 1))(torch.zeros(3)).sample(),
     "Flow expected `context` of shape (*batch, 1), got (3,)."),
    (lambda: Flow(Planar(2)).rsample_and_log_prob((5,), torch.zeros(2)),
     "Flow takes no `context` (it was built with context_dim=0). Build it with context_dim=2."),
    (lambda: Flow(Planar(2, 1)).rsample_and_path_log_prob((5,)),
     "Flow expected `context` of shape (*batch, 1), got None...."),
    (lambda: Flow(Planar(2)).rsample_and_log_prob(5),
     "Flow expected `sample_shape` to be a tuple such as (100,), got 5."),
    (lambda: Flow(Planar(2, 1))(3), "Flow expected `context` to be a tensor of shape (*batch, 1), "
     "got int."),
    (lambda: Flow(Planar(2)).log_prob(torch.zeros(2).double()),
     "Planar expected `z` of dtype torch.float32, as its parameters, got torch.float64...."),
    (lambda: Flow(Planar(2))().log_prob(torch.zeros(3)),
     "...event_shape: torch.Size([3]) vs torch.Size([2])."),
    (lambda: BijectionTransform(Planar(2, 1))(torch.zeros(2)),
     "Planar expected `context` of shape (*batch, 1), got None...."),
    (lambda: FromTransform(ExpTransform(), 2)(torch.zeros(3)),
     "FromTransform expected `u` of shape (*batch, 2), got (3,)."),
)
def test_a_wrong_call_of_a_flow_is_named(mistake, message):
    with says(message):
        mistake()


# ------------------------------------------------------------------ dimensions

@pytest.mark.parametrize("wrong", [0, -1, 3.0, "3", True, None, (3,)], ids=repr)
@pytest.mark.parametrize("make", [*LAYERS, *BASES.values(), *RECIPES.values()],
                         ids=[layer.__name__ for layer in LAYERS] + [*BASES, *RECIPES])
def test_a_wrong_input_dim_is_named(make, wrong):
    with says(f"... expected `input_dim` to be an integer >= 1, got {wrong!r}."):
        make(wrong)


@pytest.mark.parametrize("wrong", [-1, 2.0, "2", True, None], ids=repr)
@pytest.mark.parametrize("make", [*LAYERS, *RECIPES.values()],
                         ids=[layer.__name__ for layer in LAYERS] + [*RECIPES])
def test_a_wrong_context_dim_is_named(make, wrong):
    with says(f"... expected `context_dim` to be an integer >= 0, got {wrong!r}."):
        make(3, wrong)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "2", None], ids=repr)
@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_number_of_layers_is_named(name, wrong):
    with says(f"{name} expected `num_layers` to be an integer >= 1, got {wrong!r}."):
        getattr(flows, name)(3, num_layers=wrong)


# ------------------------------------------------------------------ options of layers

@pytest.mark.parametrize("wrong", [
    [True, False], [False] * 3, [[True, False, True]], True, "abc", [0, 1, 2], [None] * 3,
    torch.tensor([True, False])], ids=str)
def test_a_wrong_mask_is_named(wrong):
    with says("Coupling expected `mask` to hold 3 booleans of which at least one is true, "
              f"got {wrong!r}."):
        Coupling(3, mask=wrong)


@pytest.mark.parametrize("wrong", [
    [0, 0, 1], [1, 2, 3], [-1, 0, 1], [[0, 1]], [0.5, 1], "ab", 3, None,
    torch.tensor([2, 2])], ids=str)
def test_a_wrong_order_is_named(wrong):
    with says(f"Permutation expected `order` to be a permutation of 0, ..., D - 1, got {wrong!r}."):
        Permutation(wrong)


@pytest.mark.parametrize("order", [range(3), (2, 0, 1), np.array([2, 0, 1]),
                                   torch.tensor([2, 0, 1])], ids=str)
def test_an_order_may_come_in_any_form(order):
    assert Permutation(order).order.tolist() == list(order)


@mistakes(
    (partial(Autoregressive, 3, num_passes=0),
     "Autoregressive expected `num_passes` to be an integer >= 1, got 0."),
    (partial(Autoregressive, 3, num_passes=2.0),
     "Autoregressive expected `num_passes` to be an integer >= 1, got 2.0."),
    (partial(Autoregressive, 3, num_passes=4),
     "Autoregressive expected `num_passes` of at most input_dim=3, got 4."),
    (partial(Sylvester, 3, num_ridges=0),
     "Sylvester expected `num_ridges` to be an integer >= 1, got 0."),
    (partial(Sylvester, 3, num_ridges=1.5),
     "Sylvester expected `num_ridges` to be an integer >= 1, got 1.5."),
    (partial(Sylvester, 3, num_ridges=4),
     "Sylvester expected `num_ridges` of at most input_dim=3, got 4."),
    (partial(LowRank, 3, rank=0), "LowRank expected `rank` to be an integer >= 1, got 0."),
    (partial(LowRank, 3, rank=1.5), "LowRank expected `rank` to be an integer >= 1, got 1.5."),
    (partial(LowRank, 3, rank=4), "LowRank expected `rank` of at most input_dim=3, got 4."),
    (partial(Householder, 3, num_reflections=0),
     "Householder expected `num_reflections` to be an integer >= 2, got 0."),
    (partial(Householder, 3, num_reflections=3),
     "Householder expected `num_reflections` to be even (pairs start as the identity), got 3."),
    (partial(RationalQuadraticSpline, 1),
     "RationalQuadraticSpline expected `num_bins` to be an integer >= 2, got 1."),
    (partial(RationalQuadraticSpline, 2.5),
     "RationalQuadraticSpline expected `num_bins` to be an integer >= 2, got 2.5."),
    (partial(RationalQuadraticSpline, 1000),
     "RationalQuadraticSpline expected `num_bins` below 1000, got 1000."),
    (partial(RationalQuadraticSpline, bound=0),
     "RationalQuadraticSpline expected `bound` to be a positive number, got 0."),
    (partial(RationalQuadraticSpline, bound=10 ** 30),
     f"RationalQuadraticSpline expected `bound` of at most 1e+12, got {10 ** 30}...."),
    (partial(RationalQuadraticSpline, bound=float("inf")),
     "RationalQuadraticSpline expected `bound` to be a positive number, got inf."),
    (partial(nsf, 3, num_bins=0),
     "RationalQuadraticSpline expected `num_bins` to be an integer >= 2, got 0."),
    (partial(Affine, -1.0),
     "Affine expected `max_log_scale` to be a positive number, got -1.0."),
    (partial(Affine, "3"),
     "Affine expected `max_log_scale` to be a positive number, got '3'."),
)
def test_a_wrong_number_is_named(mistake, message):
    with says(message):
        mistake()


@pytest.mark.parametrize("layer", [Coupling, Autoregressive])
@pytest.mark.parametrize(("options", "message"), [
    ({"transformer": Affine},
     "expected `transformer` to be a Transformer such as Affine(), got <class ...Affine'>."),
    ({"transformer": RationalQuadraticSpline},
     "expected `transformer` to be a Transformer such as Affine(), got <class ...Spline'>."),
    ({"transformer": "affine"},
     "expected `transformer` to be a Transformer such as Affine(), got 'affine'."),
    ({"hidden_dims": 64},
     "expected `hidden_dims` to be a sequence of integers, got 64. "
     "For one hidden layer: hidden_dims=(64,)."),
    ({"hidden_dims": "64"}, "expected `hidden_dims` to be a sequence of integers, got '64'...."),
    ({"hidden_dims": (64, 0)}, "expected `hidden_dims` to be an integer >= 1, got 0."),
    ({"hidden_dims": [64.5]}, "expected `hidden_dims` to be an integer >= 1, got 64.5."),
    ({"activation": list},
     "expected `activation` to be a constructor of a module such as nn.ReLU, got <class 'list'>."),
    ({"activation": nn.ReLU()},
     "expected `activation` to be a constructor of a module such as nn.ReLU, got ReLU()."),
    ({"activation": "relu"},
     "expected `activation` to be a constructor of a module such as nn.ReLU, got 'relu'."),
], ids=str)
def test_a_wrong_conditioner_is_named(layer, options, message):
    with says(f"{layer.__name__} {message}"):
        layer(3, **options)


# ------------------------------------------------------------------ what is made of what

@mistakes(
    (partial(Compose, []), "Compose expected `layers` to hold at least one bijection, got none."),
    (partial(Compose, Planar(2)),
     "Compose expected `layers` to be a sequence of bijections, got Planar."),
    (partial(Compose, [Planar(2), nn.ReLU()]),
     "Compose expected `layers` to be bijections, got ReLU. "
     "Wrap a torch, Pyro or Zuko transform: FromTransform(transform, dim)."),
    (partial(Compose, [Planar(2), pyro_transforms.affine_coupling(2)]),
     "Compose expected `layers` to be bijections, got AffineCoupling. Wrap ..."),
    (partial(Compose, [Planar]), "Compose expected `layers` to be bijections, got ABCMeta. ..."),
    (partial(Compose, [Planar(2), Planar(3)]),
     "Compose expected `layers` of one input_dim, got [2, 3]."),
    (partial(Compose, [Planar(2, 1), Planar(2), Planar(2, 3)]),
     "Compose expected `layers` of one context_dim, got [1, 3]."),
    (partial(Inverse, Planar), "Inverse expected `bijection` to be a Bijection, got ABCMeta."),
    (partial(Inverse, ExpTransform()),
     "Inverse expected `bijection` to be a Bijection, got ExpTransform."),
    (partial(Flow, ExpTransform()),
     "Flow expected `bijection` to be a Bijection, got ExpTransform. "
     "Wrap a transform: FromTransform(t, dim)."),
    (partial(Flow, [Planar(2)]), "Flow expected `bijection` to be a Bijection, got list. ..."),
    (partial(Flow, Planar(2), Gaussian(3)),
     "Flow expected `base` to be a Base over 2 coordinates, got Gaussian(3)."),
    (partial(Flow, Planar(2), Gaussian),
     "Flow expected `base` to be a Base over 2 coordinates, got <class ...Gaussian'>."),
    (partial(Flow, Planar(2), Normal(0.0, 1.0)),
     "Flow expected `base` to be a Base over 2 coordinates, got Normal(loc: 0.0, scale: 1.0)."),
    (partial(BijectionTransform, ExpTransform()),
     "BijectionTransform expected `bijection` to be a Bijection, got ExpTransform."),
    (partial(FromTransform, "exp", 2),
     "FromTransform expected `transform` to be a transform or a callable that returns one, "
     "got str."),
    (partial(FromTransform, Planar(2), 2),
     "FromTransform expected `transform` to be a transform or a callable that returns one, "
     "got Planar."),
    (partial(FromTransform, Normal(0.0, 1.0), 2),
     "FromTransform expected `transform` to be a transform or a callable that returns one, "
     "got Normal."),
    (lambda: FromTransform(lambda: 3, 2)(torch.zeros(2)),
     "FromTransform expected `transform` to return a transform, got int."),
    (lambda: FromTransform(zuko.flows.NSF(2), 2)(torch.zeros(2)),
     "FromTransform expected `transform` to return a transform, got NormalizingFlow."),
    (lambda: FromTransform(StickBreakingTransform(), 2)(torch.zeros(2)),
     "FromTransform expected `transform` to keep the shape (2,), got (3,) from "
     "StickBreakingTransform."),
    (lambda: FromTransform(StickBreakingTransform(), 2).inverse(torch.full((2,), 0.5)),
     "FromTransform expected `transform` to keep the shape (2,), got (1,) from "
     "StickBreakingTransform."),
)
def test_a_wrong_part_is_named(mistake, message):
    with says(message):
        mistake()


@mistakes(
    (partial(StudentT, 2, 1.0), "StudentT expected `df` above 1.0, got 1.0."),
    (partial(StudentT, 2, 0), "StudentT expected `df` to be a positive number, got 0."),
    (partial(StudentT, 2, "3"), "StudentT expected `df` to be a positive number, got '3'."),
    (partial(StudentT, 2, [3.0]),
     "StudentT expected `df` to be a number above 1.0, or 2 of them, got [3.0]."),
    (partial(StudentT, 2, (3.0, 1.0)),
     "StudentT expected `df` to be a number above 1.0, or 2 of them, got (3.0, 1.0)."),
    (partial(StudentT, 2, [3.0, float("inf")]),
     "StudentT expected `df` to be a number above 1.0, ..."),
    (partial(StudentT, 2, [3.0, float("nan")]),
     "StudentT expected `df` to be a number above 1.0, ..."),
    (partial(StudentT, 2, [3.0, "3"]), "StudentT expected `df` to be a number above 1.0, ..."),
    (partial(StudentT, 2, torch.tensor(3.0)),
     "StudentT expected `df` to be a number above 1.0, or 2 of them, got tensor(3.)."),
    (partial(MultivariateStudentT, 2, 1.0),
     "MultivariateStudentT expected `df` above 1.0, got 1.0."),
    (partial(MultivariateStudentT, 2, [3.0, 3.0]),
     "MultivariateStudentT expected `df` to be a positive number, got [3.0, 3.0]."),
    (partial(Mixture, 2, 0), "Mixture expected `num_components` to be an integer >= 1, got 0."),
    (partial(Mixture, 2, spread=0), "Mixture expected `spread` to be a positive number, got 0."),
)
def test_a_wrong_option_of_a_base_is_named(mistake, message):
    with says(message):
        mistake()


FLOW = Flow(Diagonal(2))


@mistakes(
    (partial(MixtureOfFlows, [], []),
     "MixtureOfFlows expected `flows` to hold at least one flow, got none."),
    (partial(MixtureOfFlows, 3, [1.0]),
     "MixtureOfFlows expected `flows` to be a sequence of flows, got int. ..."),
    (partial(MixtureOfFlows, [FLOW, Diagonal(2)], [1.0, 1.0]),
     "MixtureOfFlows expected `flows` to be a sequence of flows, got Diagonal. "
     "Wrap a bijection: Flow(bijection)."),
    (partial(MixtureOfFlows, [FLOW, Flow(Diagonal(2, 3))], [1.0, 1.0]),
     "MixtureOfFlows expected `flows` without context, got one of context_dim=3. "
     "Build it with context_dim=0."),
    (partial(MixtureOfFlows, [FLOW, Flow(Diagonal(3))], [1.0, 1.0]),
     "MixtureOfFlows expected `flows` of one input_dim, got [2, 3]."),
    (partial(MixtureOfFlows, [FLOW], [0.5, 0.5]),
     "MixtureOfFlows expected `weights` to be 1 positive numbers, one a flow, got [0.5, 0.5]. "
     "Leave out a flow of no weight."),
    (partial(MixtureOfFlows, [FLOW] * 2, [1.0, 0.0]),
     "MixtureOfFlows expected `weights` to be 2 positive numbers, one a flow, got [1.0, 0.0]. ..."),
    (partial(MixtureOfFlows, [FLOW] * 2, [1.0, float("nan")]),
     "MixtureOfFlows expected `weights` to be 2 positive numbers, one a flow, got [1.0, nan]. ..."),
    (partial(MixtureOfFlows, [FLOW] * 2, "ab"),
     "MixtureOfFlows expected `weights` to be 2 positive numbers, one a flow, got 'ab'. ..."),
    (partial(MixtureOfFlows, [FLOW] * 2, None),
     "MixtureOfFlows expected `weights` to be 2 positive numbers, one a flow, got None. ..."),
)
def test_a_wrong_part_of_a_mixture_of_flows_is_named(mistake, message):
    with says(message):
        mistake()


def test_an_unknown_option_is_refused():
    for make in (Coupling, Autoregressive, Planar, nsf, Gaussian):
        with pytest.raises(TypeError, match="unexpected keyword argument 'hidden_dim'"):
            make(3, hidden_dim=10)
