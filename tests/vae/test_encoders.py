"""Encoders: shapes, masks, lengths, order, and newcomers' mistakes."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from pyro_nfvi.engine.record import NotRecordable, record
from pyro_nfvi.vae.encoders import (
    ConvEncoder,
    Encoder,
    MLPEncoder,
    RecurrentEncoder,
    SetEncoder,
    check_lengths,
    features_of,
    takes_mask,
)

VAN_DEN_BERG = {"channels": (32, 32, 64, 64, 64), "strides": (1, 2, 1, 2, 1), "gated": True}
ENCODERS: dict[str, Callable[[], Encoder]] = {
    "mlp": lambda: MLPEncoder((4, 3), (16, 5)),
    "mlp-masked": lambda: MLPEncoder((4, 3), (5,), nn.Tanh, masked=True),
    "mlp-scalar": lambda: MLPEncoder((), (5,), masked=True),
    "conv": lambda: ConvEncoder((2, 7, 5), (3, 4), kernel_size=3, hidden_dim=5),
    "conv-gated": lambda: ConvEncoder((7, 5), (3, 4), (1, 3), hidden_dim=5, gated=True),
    "recurrent": lambda: RecurrentEncoder((6, 3), 5),
    "recurrent-deep": lambda: RecurrentEncoder((6, 3), 5, num_layers=2),
    "set": lambda: SetEncoder((6, 3), (8,), (5,)),
    "set-deep": lambda: SetEncoder((6, 3), (8, 8), (8, 5), nn.Tanh),
}
each = pytest.mark.parametrize("name", ENCODERS)


def says(message: str) -> object:
    """The error whose message is ``message``, word by word."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def mistakes(*pairs: tuple) -> pytest.MarkDecorator:
    """Parametrize over (mistake, message); the message is the id."""
    return pytest.mark.parametrize(("mistake", "message"), pairs, ids=[m for _, m in pairs])


def assert_replays(function: Callable[[Tensor], Tensor], first: Tensor, second: Tensor,
                   module: nn.Module) -> None:
    """The graph recorded at one input equals the function at another, gradients included."""
    def outputs(x: Tensor) -> list[Tensor]:
        value = function(x)
        slopes = torch.autograd.grad(value.square().sum(), [x, *module.parameters()])
        return [value, *slopes]

    first, second = first.requires_grad_(), second.requires_grad_()
    weights = list(module.parameters())
    recording = record(lambda: outputs(first), [first, *weights])
    with torch.no_grad():
        actual = recording.graph(second, *weights)
    torch.testing.assert_close(list(actual), outputs(second))


def data(encoder: Encoder, *batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn((*batch, *encoder.event_shape))
    return x, torch.rand(x.shape) > 0.4


# ------------------------------------------------------------------ what all encoders promise

@each
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_features_have_the_batch_shape_of_the_data(name, batch):
    encoder = ENCODERS[name]()
    x, mask = data(encoder, *batch)
    assert encoder(x).shape == encoder(x, mask).shape == (*batch, encoder.output_dim)
    assert features_of(encoder) == encoder.output_dim


@each
def test_a_batch_equals_its_rows(name, device):
    encoder = ENCODERS[name]().to(device)
    x, mask = (value.to(device) for value in data(encoder, 2, 3))
    rows = [encoder(x[i, j], mask[i, j]) for i in range(2) for j in range(3)]
    torch.testing.assert_close(encoder(x, mask), torch.stack(rows).unflatten(0, (2, 3)))
    rows = [encoder(row) for row in x.flatten(0, 1)]
    torch.testing.assert_close(encoder(x), torch.stack(rows).unflatten(0, (2, 3)))


@each
def test_unseen_entries_have_no_influence_and_no_gradient(name):
    encoder = ENCODERS[name]()
    x, mask = data(encoder, 4)
    other = torch.where(mask, x, torch.nan).requires_grad_()
    assert torch.equal(encoder(x, mask), encoder(other, mask))
    inputs = [other, *encoder.parameters()]
    slopes = torch.autograd.grad(encoder(other, mask).square().sum(), inputs)
    assert all(slope.isfinite().all() for slope in slopes)
    assert not slopes[0][~mask].any()


@each
def test_a_mask_that_shows_all_changes_nothing(name):
    encoder = ENCODERS[name]()
    x, mask = data(encoder, 4)
    torch.testing.assert_close(encoder(x, torch.ones_like(mask)), encoder(x))


@each
def test_gradients_reach_every_parameter(name):
    encoder = ENCODERS[name]()
    encoder(*data(encoder, 20)).square().sum().backward()
    idle = [key for key, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@each
def test_double_precision_goes_through(name):
    encoder = ENCODERS[name]().double()
    x, mask = data(encoder, 3)
    features = encoder(x.double(), mask)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), encoder.float()(x, mask))


@each
def test_encoders_copy_and_pickle(name):
    encoder = ENCODERS[name]()
    x, mask = data(encoder, 3)
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(copied(x, mask), encoder(x, mask))


@each
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_encoders_become_one_graph(name, masked):
    encoder = ENCODERS[name]().double()
    (x, mask), (y, _) = data(encoder, 3), data(encoder, 3)
    assert_replays(lambda v: encoder(v, mask if masked else None), x.double(), y.double(), encoder)


@each
def test_the_mask_may_be_an_input_of_the_graph(name):
    encoder = ENCODERS[name]()
    (x, mask), (y, other) = data(encoder, 3), data(encoder, 3)
    recording = record(lambda: [encoder(x, mask)], [x, mask])
    with torch.no_grad():
        torch.testing.assert_close(recording.graph(y, other)[0], encoder(y, other))


# ------------------------------------------------------------------ MLPEncoder, ConvEncoder

def test_only_a_masked_network_tells_a_gap_from_a_zero():
    x, mask = torch.zeros(1, 4), torch.tensor([[True, False, True, False]])
    plain, masked = MLPEncoder((4,)), MLPEncoder((4,), masked=True)
    assert torch.equal(plain(x), plain(x, mask))
    assert not torch.equal(masked(x), masked(x, mask))


def test_a_network_without_layers_returns_its_inputs():
    encoder, x, mask = MLPEncoder((2, 3), (), masked=True), torch.randn(5, 2, 3), torch.eye(2, 3)
    mask = mask.bool().expand_as(x)
    assert torch.equal(encoder(x, mask), torch.cat([x * mask, mask], 1).flatten(1))
    assert features_of(encoder) == 12


def test_the_gated_encoder_is_that_of_van_den_berg_et_al():
    encoder = ConvEncoder((1, 28, 28), **VAN_DEN_BERG)
    layers = [(1, 32, 5), (32, 32, 5), (32, 64, 5), (64, 64, 5), (64, 64, 5), (64, 256, 7)]
    count = sum(2 * (a * b * k * k + b) for a, b, k in layers)  # values and gates
    assert sum(p.numel() for p in encoder.parameters()) == count
    x, sizes = torch.rand(2, 1, 28, 28), []
    for layer in encoder.convolutions:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes[1::2] == [(32, 28, 28), (32, 14, 14), (64, 14, 14), (64, 7, 7), (64, 7, 7)]
    assert encoder.head(x.flatten(1)).shape == (2, 256)


def test_gates_multiply_the_values():
    encoder = ConvEncoder((3, 3), (2,), 1, 3, hidden_dim=4, gated=True)
    x, (convolution, _), (dense, _) = torch.randn(5, 3, 3), encoder.convolutions, encoder.head
    values, gates = convolution(x[:, None]).chunk(2, 1)
    values, gates = dense((values * gates.sigmoid()).flatten(1)).chunk(2, 1)
    torch.testing.assert_close(encoder(x), values * gates.sigmoid())


def test_the_head_is_a_convolution_over_the_whole_map():
    encoder = ConvEncoder((2, 5, 7), (3,), 2, 3, hidden_dim=4)
    maps, dense = encoder.convolutions(torch.randn(6, 2, 5, 7)), encoder.head[0]
    whole = nn.functional.conv2d(maps, dense.weight.view(4, 3, 3, 4), dense.bias)
    torch.testing.assert_close(dense(maps.flatten(1)), whole.flatten(1))


def test_images_may_come_without_a_channel():
    encoder = ConvEncoder((1, 8, 6), hidden_dim=5)
    flat = ConvEncoder((8, 6), hidden_dim=5)
    flat.load_state_dict(encoder.state_dict())
    x = torch.rand(3, 8, 6)
    assert torch.equal(flat(x), encoder(x[:, None]))


# ------------------------------------------------------------------ RecurrentEncoder

LENGTHS = torch.tensor([3, 6, 1, 6, 2])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_lengths_masks_and_packed_sequences_give_the_state_of_packed_sequences(num_layers):
    encoder, x = RecurrentEncoder((6, 3), 5, num_layers), torch.randn(5, 6, 3)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected = encoder.gru(packed)[1][-1]
    mask = (torch.arange(6) < LENGTHS[:, None])[..., None].expand_as(x)
    for features in (encoder(packed), encoder(x, mask), encoder(x, lengths=LENGTHS)):
        torch.testing.assert_close(features, expected)


def test_packed_sequences_of_several_lengths_keep_their_order():
    encoder, rows = RecurrentEncoder((6, 3), 5), [torch.randn(n, 3) for n in LENGTHS.tolist()]
    expected = torch.stack([encoder(row) for row in rows])
    torch.testing.assert_close(encoder(pack_sequence(rows, enforce_sorted=False)), expected)


def test_the_number_of_steps_may_change_between_calls():
    encoder, x = RecurrentEncoder((6, 3), 5), torch.randn(2, 9, 3)
    for num_steps in (1, 4, 9):
        lengths = torch.tensor([num_steps] * 2)
        torch.testing.assert_close(encoder(x[:, :num_steps]), encoder(x, lengths=lengths))


def test_a_mask_and_lengths_hold_both():
    encoder, x = RecurrentEncoder((6, 3), 5), torch.randn(2, 6, 3)
    mask, lengths = torch.rand(2, 6, 3) > 0.3, torch.tensor([4, 6])
    mask[:, 3] = mask[:, 5] = True
    both = encoder(x, mask, lengths)
    torch.testing.assert_close(both[0], encoder(x[0, :4], mask[0, :4]))
    torch.testing.assert_close(both[1], encoder(x[1], mask[1]))


def test_padding_beyond_the_lengths_has_no_influence_and_no_gradient():
    encoder, x = RecurrentEncoder((6, 3), 5), torch.randn(5, 6, 3)
    padding = torch.arange(6) >= LENGTHS[:, None]
    other = x.masked_fill(padding[..., None], torch.nan).requires_grad_()
    assert torch.equal(encoder(x, lengths=LENGTHS), encoder(other, lengths=LENGTHS))
    encoder(other, lengths=LENGTHS).square().sum().backward()
    assert not other.grad[padding].any()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_a_sequence_of_which_nothing_was_seen_has_the_state_zero():
    encoder, x = RecurrentEncoder((6, 3), 5), torch.randn(2, 6, 3)
    mask = torch.tensor([True, False])[:, None, None].expand_as(x)
    features = encoder(x, mask)
    torch.testing.assert_close(features[0], encoder(x[0]))
    assert not features[1].any()


def test_lengths_may_have_several_batch_dims_and_small_integers():
    encoder, x = RecurrentEncoder((6, 3), 5), torch.randn(2, 2, 6, 3)
    lengths = torch.tensor([[1, 2], [3, 6]], dtype=torch.uint8)
    expected = encoder(x.flatten(0, 1), lengths=lengths.flatten()).unflatten(0, (2, 2))
    torch.testing.assert_close(encoder(x, lengths=lengths), expected)


def test_given_lengths_are_data_of_a_graph_but_no_input():
    encoder, x = RecurrentEncoder((6, 3), 5).double(), torch.randn(5, 6, 3).double()
    y = torch.randn_like(x)
    assert_replays(lambda v: encoder(v, lengths=LENGTHS), x, y, encoder)
    with pytest.raises(NotRecordable, match="Python reads a number"):
        record(lambda: [encoder(x, lengths=LENGTHS)], [x, LENGTHS])


# ------------------------------------------------------------------ SetEncoder

def test_the_order_of_a_set_does_not_matter():
    encoder = SetEncoder((6, 3)).double()
    x, mask = torch.randn(4, 6, 3).double(), torch.rand(4, 6, 3) > 0.6
    order = torch.randperm(6)
    torch.testing.assert_close(encoder(x[:, order]), encoder(x))
    torch.testing.assert_close(encoder(x[:, order], mask[:, order]), encoder(x, mask))


def test_unseen_elements_are_as_if_absent():
    encoder, x = SetEncoder((6, 3)), torch.randn(4, 6, 3)
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[:, :4] = True
    torch.testing.assert_close(encoder(x, mask), encoder(x[:, :4]))


def test_an_empty_set_has_finite_features_and_gradients():
    encoder, x = SetEncoder((6, 3)), torch.randn(2, 6, 3)
    mask = torch.tensor([True, False])[:, None, None].expand_as(x)
    features = encoder(x, mask)
    features.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    torch.testing.assert_close(features[1], encoder.rho(torch.zeros(1, 257))[0])


def test_the_size_of_a_set_matters():
    encoder, element = SetEncoder((6, 3)), torch.randn(1, 3)
    assert not torch.allclose(encoder(element), encoder(element.expand(5, -1)))


# ------------------------------------------------------------------ features_of, takes_mask

def test_features_are_those_of_the_last_linear_layer_if_nothing_else_tells():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 7), nn.ReLU())
    assert features_of(plain) == 7
    plain.output_dim = 8
    assert features_of(plain) == 8


def test_only_forward_methods_with_a_mask_take_one():
    assert takes_mask(SetEncoder((6, 3)))
    assert takes_mask(RecurrentEncoder((6, 3)))
    assert not takes_mask(nn.Sequential(nn.Linear(3, 4)))


# ------------------------------------------------------------------ mistakes

CONV = ConvEncoder((1, 28, 28))
GRU, SET, MLP = RecurrentEncoder((6, 3)), SetEncoder((6, 3)), MLPEncoder((3,))
ROWS, STEPS = torch.zeros(5, 3), torch.zeros(5, 6, 3)


@mistakes(
    (lambda: CONV(torch.zeros(5, 27, 28)),
     "ConvEncoder expected `x` of shape (*batch, 1, 28, 28), got (5, 27, 28)."),
    (lambda: CONV(torch.zeros(28, 28)),
     "ConvEncoder expected `x` of shape (*batch, 1, 28, 28), got (28, 28)."),
    (lambda: GRU(torch.zeros(5, 6, 4)),
     "RecurrentEncoder expected `x` of shape (*batch, T, 3), got (5, 6, 4)."),
    (lambda: GRU(torch.zeros(5, 0, 3)),
     "RecurrentEncoder expected `x` of shape (*batch, T, 3), got (5, 0, 3)."),
    (lambda: SET(torch.zeros(3)),
     "SetEncoder expected `x` of shape (*batch, N, 3), got (3,)."),
    (lambda: MLP([[0.0] * 3]),
     "MLPEncoder expected `x` to be a tensor of shape (*batch, 3), got list."),
    (lambda: MLP(ROWS.int()),
     "MLPEncoder expected `x` to hold floating-point numbers, got torch.int32. "
     "Convert it: x.float()."),
    (lambda: MLP(ROWS.double()),
     "MLPEncoder expected `x` of dtype torch.float32, as its parameters, got torch.float64. "
     "Convert one: x.to(torch.float32), or mlpencoder.to(torch.float64)."),
    (lambda: MLP(ROWS, torch.ones(5, 3)),
     "MLPEncoder expected `mask` to be a boolean tensor of the shape of `x`, (5, 3), "
     "got torch.float32 of shape (5, 3)."),
    (lambda: SET(STEPS, torch.ones(5, 6, dtype=torch.bool)),
     "SetEncoder expected `mask` to be a boolean tensor of the shape of `x`, (5, 6, 3), "
     "got torch.bool of shape (5, 6)."),
    (lambda: MLP(ROWS, True),
     "MLPEncoder expected `mask` to be a boolean tensor of the shape of `x`, (5, 3), got bool."),
    (lambda: GRU(STEPS, lengths=torch.ones(4, dtype=torch.long)),
     "RecurrentEncoder expected `lengths` to be a tensor of integers of shape (5,), the batch "
     "shape of `x`, got torch.int64 of shape (4,)."),
    (lambda: GRU(STEPS, lengths=torch.ones(5)),
     "RecurrentEncoder expected `lengths` to be a tensor of integers of shape (5,), the batch "
     "shape of `x`, got torch.float32 of shape (5,)."),
    (lambda: GRU(STEPS, lengths=[1] * 5),
     "RecurrentEncoder expected `lengths` to be a tensor of integers of shape (5,), the batch "
     "shape of `x`, got list."),
    (lambda: GRU(STEPS, lengths=torch.arange(5)),
     "RecurrentEncoder expected `lengths` between 1 and 6, got 0 to 4. "
     "Leave empty sequences out."),
    (lambda: GRU(STEPS, lengths=torch.arange(3, 8)),
     "RecurrentEncoder expected `lengths` between 1 and 6, got 3 to 7. "
     "Leave empty sequences out."),
    (lambda: check_lengths("Mine", torch.tensor([0])),
     "Mine expected `lengths` between 1 and inf, got 0 to 0. Leave empty sequences out."),
    (lambda: GRU(pack_sequence([torch.zeros(2, 4)])),
     "RecurrentEncoder expected packed sequences of shape (T, 3), got (T, 4)."),
    (lambda: GRU(pack_sequence([torch.zeros(2, 3)]), lengths=LENGTHS),
     "RecurrentEncoder takes no `mask` and no `lengths` with a packed sequence, which knows its "
     "lengths. Leave them out."),
    (lambda: GRU(pack_sequence([torch.zeros(2, 3).double()])),
     "RecurrentEncoder expected `x` of dtype torch.float32, as its parameters, got "
     "torch.float64. Convert one: x.to(torch.float32), or recurrentencoder.to(torch.float64)."),
    (lambda: features_of(nn.Flatten()),
     "Flatten expected an `output_dim`, the number of features it returns, got none, and no "
     "nn.Linear that tells it. Set it: encoder.output_dim = 64."),
)
def test_a_wrong_input_is_named(mistake, message):
    with says(message):
        mistake()


@mistakes(
    (lambda: MLPEncoder(784), "MLPEncoder expected `event_shape` to be a sequence of integers, "
                              "got 784. For one: event_shape=(64,)."),
    (lambda: MLPEncoder((0, 3)), "MLPEncoder expected `event_shape` to be an integer >= 1, "
                                 "got 0."),
    (lambda: MLPEncoder((3,), 64), "MLPEncoder expected `hidden_dims` to be a sequence of "
                                   "integers, got 64. For one hidden layer: hidden_dims=(64,)."),
    (lambda: MLPEncoder((3,), activation="relu"),
     "MLPEncoder expected `activation` to be a constructor of a module "
     "such as nn.ReLU, got 'relu'."),
    (lambda: ConvEncoder((784,)),
     "ConvEncoder expected `event_shape` to be (C, H, W) or (H, W), got (784,)."),
    (lambda: ConvEncoder(28), "ConvEncoder expected `event_shape` to be (C, H, W) or (H, W), "
                              "got 28."),
    (lambda: ConvEncoder((28, 28), 32), "ConvEncoder expected `channels` to be a sequence of "
                                        "integers, got 32. For one: channels=(64,)."),
    (lambda: ConvEncoder((28, 28), strides=(2,)),
     "ConvEncoder expected `strides` to be an integer or a sequence of 2, one for each of "
     "`channels`, got (2,)."),
    (lambda: ConvEncoder((28, 28), strides=0), "ConvEncoder expected `strides` to be an integer "
                                               ">= 1, got 0."),
    (lambda: ConvEncoder((28, 28), kernel_size=4),
     "ConvEncoder expected `kernel_size` to be odd, so that a kernel has a middle, got 4. "
     "Take 5."),
    (lambda: ConvEncoder((28, 28), hidden_dim=2.0),
     "ConvEncoder expected `hidden_dim` to be an integer >= 1, got 2.0."),
    (lambda: ConvEncoder((28, 28), activation=nn.ReLU()),
     "ConvEncoder expected `activation` to be a constructor of a module "
     "such as nn.ReLU, got ReLU()."),
    (lambda: RecurrentEncoder((3,)),
     "RecurrentEncoder expected `event_shape` to be (T, F), got (3,)."),
    (lambda: RecurrentEncoder((6, 3), 0),
     "RecurrentEncoder expected `hidden_dim` to be an integer >= 1, got 0."),
    (lambda: RecurrentEncoder((6, 3), num_layers=0),
     "RecurrentEncoder expected `num_layers` to be an integer >= 1, got 0."),
    (lambda: SetEncoder("NF"), "SetEncoder expected `event_shape` to be (N, F), got 'NF'."),
    (lambda: SetEncoder((6, 3), output_dims=64),
     "SetEncoder expected `output_dims` to be a sequence of integers, got 64. "
     "For one: output_dims=(64,)."),
)
def test_a_wrong_option_is_named(mistake, message):
    with says(message):
        mistake()
