"""Decoders: shapes, exact image sizes, and newcomers' mistakes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyro_nfvi.vae.decoders import ConvDecoder, Decoder, MLPDecoder, RecurrentDecoder
from pyro_nfvi.vae.encoders import ConvEncoder
from tests.vae.test_encoders import assert_replays, mistakes, says

VAN_DEN_BERG = {"channels": (64, 64, 32, 32, 32, 32), "strides": (1, 2, 1, 2, 1), "gated": True}
DECODERS: dict[str, Callable[[], Decoder]] = {
    "mlp": lambda: MLPDecoder(2, (4, 3), 2, (16, 8)),
    "mlp-scalar": lambda: MLPDecoder(2, (), 2, (8,), nn.Tanh),
    "mlp-linear": lambda: MLPDecoder(2, (5,), hidden_dims=()),
    "conv": lambda: ConvDecoder(2, (2, 7, 5), 2, (4, 3, 3), kernel_size=3),
    "conv-gated": lambda: ConvDecoder(2, (7, 5), 3, (4, 3), (3,), gated=True),
    "recurrent": lambda: RecurrentDecoder(2, (6, 3), 2, 5),
    "recurrent-deep": lambda: RecurrentDecoder(2, (6, 3), 1, 5, num_layers=2),
}
each = pytest.mark.parametrize("name", DECODERS)


# ------------------------------------------------------------------ what all decoders promise

@each
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_parameters_have_the_leading_shape_of_the_latents(name, batch):
    decoder = DECODERS[name]()
    shape = (*batch, decoder.num_params, *decoder.event_shape)
    assert decoder(torch.randn(*batch, 2)).shape == shape


@each
def test_a_batch_equals_its_rows(name, device):
    decoder, z = DECODERS[name]().to(device), torch.randn(2, 3, 2, device=device)
    rows = torch.stack([decoder(row) for row in z.flatten(0, 1)])
    torch.testing.assert_close(decoder(z), rows.unflatten(0, (2, 3)))


@each
def test_gradients_reach_every_parameter(name):
    decoder = DECODERS[name]()
    decoder(torch.randn(20, 2)).square().sum().backward()
    idle = [key for key, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@each
def test_outputs_are_plain(name):
    decoder = DECODERS[name]()
    with torch.no_grad():
        list(decoder.output.parameters())[-1].fill_(-7.0)
    assert decoder(torch.zeros(2)).mean() < -2


@each
def test_double_precision_goes_through(name):
    decoder, z = DECODERS[name]().double(), torch.randn(3, 2)
    params = decoder(z.double())
    assert params.dtype == torch.float64
    torch.testing.assert_close(params.float(), decoder.float()(z))


@each
def test_decoders_copy_and_pickle(name):
    decoder, z = DECODERS[name](), torch.randn(3, 2)
    for copied in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(copied(z), decoder(z))


@each
def test_decoders_become_one_graph(name):
    decoder = DECODERS[name]().double()
    first, second = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    assert_replays(decoder, first, second, decoder)


# ------------------------------------------------------------------ ConvDecoder

@pytest.mark.parametrize("strides", [2, 3, (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("sides", [(28, 28), (28, 20), (8, 8), (7, 5), (1, 9)], ids=str)
def test_every_image_size_is_met_exactly(sides, kernel_size, strides):
    decoder = ConvDecoder(2, (3, *sides), 2, (4, 3, 3), strides, kernel_size)
    assert decoder.hidden(torch.randn(5, 2, 1, 1)).shape == (5, 3, *sides)
    assert decoder(torch.randn(5, 2)).shape == (5, 2, 3, *sides)


def test_the_gated_decoder_is_that_of_van_den_berg_et_al():
    decoder = ConvDecoder(64, (1, 28, 28), **VAN_DEN_BERG)
    layers = [(64, 64, 7), (64, 64, 5), (64, 32, 5), (32, 32, 5), (32, 32, 5), (32, 32, 5)]
    count = sum(2 * (a * b * k * k + b) for a, b, k in layers) + 32 + 1  # values, gates; output
    assert sum(p.numel() for p in decoder.parameters()) == count
    x, sizes = torch.randn(2, 64, 1, 1), []
    for layer in decoder.hidden:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes[1::2] == [(64, 7, 7), (64, 7, 7), (32, 14, 14), (32, 14, 14), (32, 28, 28),
                           (32, 28, 28)]


def test_the_decoder_goes_through_the_map_sizes_of_the_encoder():
    sizes = {"convolutions": [], "hidden": []}
    for module, name, x in ((ConvEncoder((13, 10)), "convolutions", torch.zeros(1, 1, 13, 10)),
                            (ConvDecoder(2, (13, 10)), "hidden", torch.zeros(1, 2, 1, 1))):
        for layer in getattr(module, name):
            x = layer(x)
            sizes[name].append(tuple(x.shape[-2:]))
    assert sizes["convolutions"][::2] == [(7, 5), (4, 3)]
    assert sizes["hidden"][::2] == [(4, 3), (7, 5), (13, 10)]


def test_parameters_come_before_channels():
    decoder = ConvDecoder(2, (2, 4, 4), num_params=3)
    z = torch.randn(5, 2)
    maps = decoder.output(decoder.hidden(z[..., None, None]))
    torch.testing.assert_close(decoder(z)[:, 1, 0], maps[:, 2])


# ------------------------------------------------------------------ RecurrentDecoder

def test_every_step_and_the_initial_state_come_from_the_latent():
    decoder, z = RecurrentDecoder(2, (4, 3), num_params=2, hidden_dim=5), torch.randn(2)
    cell = nn.GRUCell(2, 5)
    cell.load_state_dict({key.removesuffix("_l0"): value
                          for key, value in decoder.gru.state_dict().items()})
    state, steps = decoder.state(z).tanh(), []
    for _ in range(4):
        state = cell(z, state)
        steps.append(decoder.output(state).view(2, 3))
    torch.testing.assert_close(decoder(z), torch.stack(steps, 1))


# ------------------------------------------------------------------ mistakes

@mistakes(
    (lambda: MLPDecoder(2, (3,))(torch.zeros(5)),
     "MLPDecoder expected `z` of shape (*batch, 2), got (5,)."),
    (lambda: RecurrentDecoder(2, (6, 3))(torch.zeros(())),
     "RecurrentDecoder expected `z` of shape (*batch, 2), got ()."),
    (lambda: ConvDecoder(2, (8, 8))([0.0, 0.0]),
     "ConvDecoder expected `z` to be a tensor of shape (*batch, 2), got list."),
    (lambda: ConvDecoder(2, (8, 8))(torch.zeros(2).double()),
     "ConvDecoder expected `z` of dtype torch.float32, as its parameters, got torch.float64. "
     "Convert one: z.to(torch.float32), or convdecoder.to(torch.float64)."),
)
def test_a_wrong_latent_is_named(mistake, message):
    with says(message):
        mistake()


@mistakes(
    (lambda: MLPDecoder(0, (3,)), "MLPDecoder expected `latent_dim` to be an integer >= 1, "
                                  "got 0."),
    (lambda: MLPDecoder(2, 784), "MLPDecoder expected `event_shape` to be a sequence of integers, "
                                 "got 784. For one: event_shape=(64,)."),
    (lambda: MLPDecoder(2, (3,), 0), "MLPDecoder expected `num_params` to be an integer >= 1, "
                                     "got 0."),
    (lambda: MLPDecoder(2, (3,), hidden_dims=64),
     "MLPDecoder expected `hidden_dims` to be a sequence of integers, got 64. For one hidden "
     "layer: hidden_dims=(64,)."),
    (lambda: ConvDecoder(2, (8,)),
     "ConvDecoder expected `event_shape` to be (C, H, W) or (H, W), got (8,)."),
    (lambda: ConvDecoder(2, (8, 8), channels=()),
     "ConvDecoder expected `channels` to hold at least one number, that of the map made from the "
     "latent, got ()."),
    (lambda: ConvDecoder(2, (8, 8), channels=(64, 32), strides=(2, 2)),
     "ConvDecoder expected `strides` to be an integer or a sequence of 1, one fewer than "
     "`channels`, got (2, 2)."),
    (lambda: ConvDecoder(2, (8, 8), kernel_size=2),
     "ConvDecoder expected `kernel_size` to be odd, so that a kernel has a middle, got 2. "
     "Take 3."),
    (lambda: ConvDecoder(2, (8, 8), activation=None),
     "ConvDecoder expected `activation` to be a constructor of a module "
     "such as nn.ReLU, got None."),
    (lambda: RecurrentDecoder(2, (3,)),
     "RecurrentDecoder expected `event_shape` to be (T, F), got (3,)."),
    (lambda: RecurrentDecoder(2, (6, 3), hidden_dim=0),
     "RecurrentDecoder expected `hidden_dim` to be an integer >= 1, got 0."),
    (lambda: RecurrentDecoder(2, (6, 3), num_layers=0),
     "RecurrentDecoder expected `num_layers` to be an integer >= 1, got 0."),
)
def test_a_wrong_option_is_named(mistake, message):
    with says(message):
        mistake()
