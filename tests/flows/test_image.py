"""Flows of images: masks, convolutions, scales, actnorm's start, and bits a dimension."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn import functional as F

from pyro_nfvi import AutoFlow, flows, testing
from pyro_nfvi.flows import (
    Compose,
    ConvNet,
    Coupling,
    Dequantization,
    Diagonal,
    Flow,
    Inverse,
    LowRank,
    LULinear,
    Pixelwise,
    RationalQuadraticSpline,
    Split,
    Squeeze,
    Triangular,
    channel_mask,
    checkerboard_mask,
    glow,
    realnvp_image,
)
from pyro_nfvi.testing import perturb
from tests.flows.test_errors import mistakes, says

SHAPES = [(1, 4, 4), (2, 2, 2), (3, 2, 4)]
small_glow = partial(glow, num_layers=2, hidden_channels=8)
small_realnvp = partial(realnvp_image, num_layers=2, hidden_channels=8)


def convolutional(shape, mask, context_dim=0, **options):
    return Coupling(math.prod(shape), context_dim, mask=mask, conditioner=partial(
        ConvNet, shape, hidden_channels=8), **options)


def slopes(bijection, count=5):
    """Where a coordinate depends on another, at some points."""
    bijection = bijection.double()
    points = torch.randn(count, bijection.input_dim).double()
    return sum(torch.func.jacrev(lambda u: bijection(u)[0])(u).abs() for u in points) > 0


def digits():
    from sklearn.datasets import load_digits
    return torch.tensor(load_digits().data).float()


# ------------------------------------------------------------------ properties of larger images

@pytest.mark.parametrize(("shape", "context_dim"), [((1, 4, 4), 0), ((3, 2, 4), 0),
                                                    ((1, 4, 2), 2)], ids=str)
@pytest.mark.parametrize("recipe", [small_glow, small_realnvp], ids=["glow", "realnvp_image"])
def test_a_recipe_keeps_every_promise_on_images(recipe, shape, context_dim, device):
    def make():
        return recipe(math.prod(shape), context_dim, image_shape=shape).to(device)
    testing.check_bijection(make, context_dim, skip=[testing.check_compiles])


@pytest.mark.parametrize("layer", [Diagonal, Triangular, LULinear, LowRank, Coupling],
                         ids=lambda layer: layer.__name__)
def test_a_context_reaches_every_pixel(layer):
    testing.check_bijection(lambda: Pixelwise(layer(2, 2), (2, 3, 1)), 2, skip=[
        testing.check_compiles, testing.check_gradients, testing.check_copies])


@pytest.mark.parametrize("make", [
    lambda: Pixelwise(LULinear(2), (2, 2, 2)),
    lambda: Pixelwise(Coupling(3, transformer=RationalQuadraticSpline(4)), (3, 1, 2)),
    lambda: Squeeze(Split(Diagonal(3), 8), (1, 4, 2)),
    lambda: Squeeze(Coupling(12), (1, 2, 6), block=(1, 3)),
    lambda: convolutional((2, 3, 3), checkerboard_mask((2, 3, 3))),
    lambda: convolutional((3, 1, 3), channel_mask((3, 1, 3), flip=True),
                          transformer=RationalQuadraticSpline(4)),
    lambda: convolutional((1, 3, 3), torch.arange(9) % 4 == 0),
], ids=["1x1-convolution", "pixelwise-spline", "squeeze-split", "squeeze-block", "checkerboard",
        "channels-spline", "odd-mask"])
def test_a_part_keeps_every_promise_on_images(make):
    testing.check_bijection(make, skip=[testing.check_compiles])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [glow, realnvp_image])
def test_a_recipe_compiles_in_one_graph_on_images(recipe):
    testing.check_compiles(lambda: recipe(64, image_shape=(1, 8, 8)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)], ids=str)
@pytest.mark.parametrize("recipe", [glow, realnvp_image])
def test_the_inverse_is_exact_to_a_ten_thousandth_in_float32(recipe, shape, device):
    dim = math.prod(shape)
    bijection = perturb(recipe(dim, image_shape=shape), 0.3).to(device)
    with torch.no_grad():
        for there, back in ((bijection, bijection.inverse), (bijection.inverse, bijection)):
            x = torch.randn(200, dim, device=device)
            assert (back(there(x)[0])[0] - x).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 2, 2), (1, 3, 3)], ids=str)
def test_the_real_nvp_of_images_lets_every_pixel_move_every_other(shape):
    recipe = partial(realnvp_image, num_layers=4, hidden_channels=8)
    assert slopes(perturb(recipe(math.prod(shape), image_shape=shape))).all()


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 2, 2), (3, 3, 3)], ids=str)
def test_glow_lets_every_pixel_move_every_other(shape):
    recipe = partial(glow, num_layers=4, hidden_channels=8)
    assert slopes(perturb(recipe(math.prod(shape), image_shape=shape))).all()


# ------------------------------------------------------------------ masks and convolutions

@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 3, 4), (1, 1, 5), (2, 4, 1)], ids=str)
def test_neighbours_never_move_together_on_a_checkerboard(shape):
    mask = checkerboard_mask(shape).reshape(shape)
    assert (mask[:, 1:] ^ mask[:, :-1]).all()
    assert (mask[:, :, 1:] ^ mask[:, :, :-1]).all()
    assert torch.equal(~mask.flatten(), checkerboard_mask(shape, flip=True))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_half_of_the_channels_move_at_every_pixel(channels):
    mask = channel_mask((channels, 2, 3)).reshape(channels, 6)
    assert mask.any(1).tolist() == [k >= channels // 2 for k in range(channels)]
    assert torch.equal(mask.any(1), mask.all(1))
    assert torch.equal(~mask.flatten(), channel_mask((channels, 2, 3), flip=True))


@pytest.mark.parametrize("mask", [
    checkerboard_mask((2, 3, 4)), channel_mask((2, 3, 4)), torch.arange(24) % 5 == 2])
def test_a_convolutional_coupling_moves_the_mask_by_what_stays_near(mask):
    layer = perturb(Coupling(24, mask=mask, conditioner=partial(
        ConvNet, (2, 3, 4), hidden_channels=8, num_blocks=0)))
    seen = slopes(layer, 20)
    place = torch.arange(24) % 12
    near = ((place // 4)[:, None] - place // 4).abs().maximum(
        ((place % 4)[:, None] - place % 4).abs()) <= 1
    expected = torch.eye(24).bool() | (mask[:, None] & ~mask & near)
    assert torch.equal(seen, expected)


def test_a_convolution_is_the_same_function_everywhere():
    shape = (2, 6, 6)
    network = perturb(ConvNet(shape, channel_mask(shape), 0, 2, hidden_channels=4, num_blocks=0))
    x = torch.zeros(2, 6, 6)
    x[0, 2, 2] = x[1, 3, 3] = 1.0  # one row and column further
    params = network(x.flatten(1)).reshape(2, 2, 6, 6)
    torch.testing.assert_close(params[0, :, 1:4, 1:4], params[1, :, 2:5, 2:5])


def test_a_context_steers_every_pixel():
    layer = perturb(convolutional((1, 2, 2), checkerboard_mask((1, 2, 2)), context_dim=3)).double()
    context = torch.randn(3).double()
    slope = torch.func.jacrev(lambda c: layer(torch.ones(4).double(), c)[0])(context)
    assert (slope[checkerboard_mask((1, 2, 2))] != 0).all()


def test_a_conditioner_of_ones_own_is_called_with_mask_and_sizes():
    calls = []

    def linear(mask, context_dim, num_params):
        calls.append((mask.tolist(), context_dim, num_params))
        return nn.Linear(1 + context_dim, num_params * 2)
    layer = Coupling(3, 4, mask=[True, False, True], conditioner=linear)
    assert calls == [([True, False, True], 4, 2)]
    testing.check_log_det(lambda: layer)


# ------------------------------------------------------------------ squeeze, split, pixels

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_squeeze_is_that_of_torch_up_to_the_order_of_channels(shape):
    channels, height, width = shape
    layer = Squeeze(Diagonal(math.prod(shape)), shape)
    image = torch.randn(5, *shape)
    theirs = F.pixel_unshuffle(image, 2)  # (c, a, b) where ours is (a, b, c)
    theirs = theirs.unflatten(1, (channels, 4)).transpose(1, 2).flatten(1)
    assert torch.equal(layer._take(image.flatten(1)), theirs)
    assert torch.equal(layer._put(theirs, image), image.flatten(1))


def test_a_pixelwise_linear_map_is_a_1x1_convolution():
    inner = perturb(LULinear(3))
    layer, image = Pixelwise(inner, (3, 4, 5)), torch.randn(7, 3, 4, 5)
    z, log_det = layer(image.flatten(1))
    kernel = inner.factor()
    theirs = F.conv2d(image, kernel[..., None, None], inner.shift())
    torch.testing.assert_close(z, theirs.flatten(1))
    torch.testing.assert_close(log_det, (20 * kernel.det().log()).expand(7))


def test_what_a_split_lets_leave_stays():
    layer, u = perturb(Split(Coupling(4), 6)), torch.randn(5, 6)
    z, _ = layer(u)
    assert torch.equal(z[:, 4:], u[:, 4:])
    assert not torch.equal(z[:, :4], u[:, :4])


@pytest.mark.parametrize(("recipe", "shape", "num_scales", "splits", "squeezes"), [
    (glow, (1, 8, 8), None, 1, 2), (glow, (1, 8, 8), 4, 2, 3), (glow, (3, 8, 8), 1, 0, 0),
    (glow, (5, 1, 1), None, 0, 0), (glow, (1, 28, 28), None, 1, 2),
    (realnvp_image, (1, 8, 8), None, 2, 2), (realnvp_image, (1, 8, 8), 1, 0, 0),
    (realnvp_image, (1, 28, 28), None, 2, 2), (realnvp_image, (1, 7, 7), None, 0, 0)])
def test_the_channels_leave_between_the_scales(recipe, shape, num_scales, splits, squeezes):
    bijection = recipe(math.prod(shape), image_shape=shape, num_layers=1, hidden_channels=4,
                       num_scales=num_scales)
    kinds = [type(module) for module in bijection.modules()]
    assert (kinds.count(Split), kinds.count(Squeeze)) == (splits, squeezes)


# ------------------------------------------------------------------ actnorm's start

def recorded(monkeypatch):
    """The noise side of every diagonal layer that is passed from now on."""
    seen, inverse = [], Diagonal._inverse

    def recording(self, z, context):
        u, log_det = inverse(self, z, context)
        seen.append(u)
        return u, log_det
    monkeypatch.setattr(Diagonal, "_inverse", recording)
    return seen


@pytest.mark.parametrize("context_dim", [0, 2], ids=["no-context", "context"])
@pytest.mark.parametrize("recipe", [small_glow, small_realnvp, flows.nice],
                         ids=["glow", "realnvp_image", "nice"])
def test_samples_reach_every_actnorm_standardized(recipe, context_dim, monkeypatch):
    options = {} if recipe is flows.nice else {"image_shape": (1, 4, 4)}
    flow = Flow(perturb(recipe(16, context_dim, **options), 0.0 if context_dim else 0.5)).double()
    samples = (3 + 2 * torch.randn(6, 50, 16).double().cumsum(-1))
    context = torch.randn(50, 2).double() if context_dim else None
    flow.initialize(samples, context)
    seen = recorded(monkeypatch)
    flow.log_prob(samples.flatten(0, 1),
                  None if context is None else context.repeat(6, 1))
    assert len(seen) == sum(isinstance(m, Diagonal) for m in flow.modules())
    for u in seen:
        spread, mean = torch.var_mean(u.flatten(0, -2), 0, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=1e-10)


@pytest.mark.parametrize("recipe", [small_glow, small_realnvp])
def test_no_pass_takes_the_start_from_its_data(recipe):
    flow = Flow(recipe(16, image_shape=(1, 4, 4))).train()
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.log_prob(5 + 3 * torch.randn(20, 16)).sum().backward()
    flow.rsample_and_log_prob((20,))
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


def test_a_start_leaves_the_flow_to_be_trained_and_the_random_state_alone():
    flow, before = Flow(small_glow(16, image_shape=(1, 4, 4))), torch.get_rng_state()
    flow.initialize(torch.ones(20, 16) + torch.arange(20)[:, None])
    assert torch.equal(torch.get_rng_state(), before)
    flow.log_prob(torch.randn(5, 16)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize("value", [0.0, 5.0, 1e6])
def test_a_coordinate_that_never_varies_keeps_its_scale(value):
    flow = Flow(Diagonal(2))
    flow.initialize(torch.stack([torch.full((50,), value), torch.randn(50)], -1))
    assert flow.bijection.log_scale.value[0] == 0
    assert flow.bijection.shift.value[0] == value


def test_layers_without_such_a_start_and_inside_an_inverse_stay():
    flow = Flow(perturb(Compose([LULinear(3), Inverse(Diagonal(3)), Coupling(3)])))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.initialize(torch.randn(20, 3))
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


@mistakes(
    (lambda: Flow(Diagonal(3)).initialize(torch.zeros(1, 3)),
     "Flow.initialize expected `samples` to hold two points or more, got 1."),
    (lambda: Flow(Diagonal(3)).initialize(torch.zeros(0, 3)),
     "Flow.initialize expected `samples` to hold two points or more, got 0."),
    (lambda: Flow(Diagonal(3)).initialize(torch.tensor([[0.0, 1.0, math.nan]] * 2)),
     "Flow.initialize expected `samples` to be finite, got nan."),
    (lambda: Flow(Diagonal(3)).initialize(torch.zeros(5, 4)),
     "Diagonal expected `samples` of shape (*batch, 3), got (5, 4)."),
    (lambda: Flow(Diagonal(3, 1)).initialize(torch.zeros(5, 3)),
     "Diagonal expected `context` of shape (*batch, 1), got None. ..."),
)
def test_wrong_samples_to_start_from_are_named(mistake, message):
    with says(message):
        mistake()


# ------------------------------------------------------------------ bits a dimension

def test_the_log_det_of_a_dequantization_is_that_of_autograd():
    pixels, x = Dequantization(17), torch.arange(17).double()

    def moved(x):
        torch.manual_seed(0)
        share = (x + torch.rand_like(x)) / 17
        return torch.logit(0.05 + 0.9 * share)
    torch.manual_seed(0)
    z, log_det = pixels.dequantize(x)
    torch.testing.assert_close(z, moved(x))
    torch.testing.assert_close(
        log_det, torch.func.jacrev(moved)(x).logdet(), rtol=0, atol=1e-10)


def test_the_chance_of_a_level_is_that_of_its_cell():
    pixels, count = Dequantization(num_levels=5, margin=0.1), 20_000
    flow = Flow(Diagonal(1)).double()
    x = torch.arange(5).double()
    z, log_det = pixels.dequantize(x[:, None, None].expand(5, count, 1))
    chances = (flow.log_prob(z) + log_det).exp().detach()
    edges = torch.logit(0.1 + 0.8 * torch.arange(6).double() / 5)
    cells = torch.distributions.Normal(0, 1).cdf(edges).diff()
    error = chances.std(1) / count ** 0.5
    assert ((chances.mean(1) - cells).abs() < 4 * error + 1e-12).all()
    bits = pixels.bits_per_dim(flow, x[:, None], num_samples=100).detach()
    assert (bits > -cells.log2() - 0.05).all()  # a bound, within its Monte Carlo error


def test_uniform_pixels_take_the_bits_of_their_levels():
    pixels = Dequantization(num_levels=8, margin=1e-6)
    logistic = Flow(Diagonal(2).double())
    z, log_det = pixels.dequantize(torch.randint(8, (50, 2)).double())
    log_q = -(F.softplus(z) + F.softplus(-z)).sum(-1)  # of which uniform pixels are a draw
    bits = -(log_q + log_det) / (2 * math.log(2))
    torch.testing.assert_close(bits, torch.full_like(bits, 3), rtol=0, atol=1e-5)
    worse = pixels.bits_per_dim(logistic, torch.randint(8, (2000, 2)).double())
    assert worse.shape == (2000,)
    assert worse.mean() > 3


@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_every_level_comes_back(num_levels, dtype):
    x = torch.arange(num_levels).repeat(2000, 1).to(dtype)
    pixels = Dequantization(num_levels)
    z, _ = pixels.dequantize(x)
    assert z.dtype == (dtype if dtype.is_floating_point else torch.get_default_dtype())
    assert torch.equal(pixels.quantize(z), x.long())


def test_beyond_the_ends_are_the_first_and_the_last_level():
    pixels = Dequantization(17)
    assert pixels.quantize(torch.tensor([-50.0, -4.0, 4.0, 50.0])).tolist() == [0, 0, 16, 16]


@mistakes(
    (lambda: Dequantization(1),
     "Dequantization expected `num_levels` to be an integer >= 2, got 1."),
    (lambda: Dequantization(16, margin=0.5),
     "Dequantization expected `margin` to be a number between 0 and 0.5, got 0.5."),
    (lambda: Dequantization(16, margin="0"),
     "Dequantization expected `margin` to be a number between 0 and 0.5, got '0'."),
    (lambda: Dequantization(16).dequantize(torch.tensor([[3, 16]])),
     "Dequantization expected `x` to hold whole numbers from 0 to 15, got 16. "
     "Say how many levels there are: Dequantization(num_levels=...)."),
    (lambda: Dequantization(16).dequantize(torch.tensor([[0.5]])),
     "Dequantization expected `x` to hold whole numbers from 0 to 15, got 0.5. ..."),
    (lambda: Dequantization(16).dequantize(torch.tensor([[math.nan]])),
     "Dequantization expected `x` to hold whole numbers from 0 to 15, got nan. ..."),
    (lambda: Dequantization(16).dequantize([1, 2]),
     "Dequantization expected `x` to be a tensor of shape (*batch, input_dim), got list."),
    (lambda: Dequantization(16).bits_per_dim(Flow(Diagonal(2)), torch.zeros(5, 2), num_samples=0),
     "Dequantization expected `num_samples` to be an integer >= 1, got 0."),
)
def test_wrong_pixels_are_named(mistake, message):
    with says(message):
        mistake()


# ------------------------------------------------------------------ learning

@pytest.mark.parametrize("recipe", [small_glow, small_realnvp], ids=["glow", "realnvp_image"])
def test_the_bits_of_digits_fall(recipe):
    x, pixels = digits(), Dequantization(17)
    train, test = x[:1400], x[1400:]
    flow = Flow(recipe(64, image_shape=(1, 8, 8)))
    before = pixels.bits_per_dim(flow, test).mean().detach()
    flow.initialize(pixels.dequantize(train)[0])
    started = pixels.bits_per_dim(flow, test).mean().detach()
    optimizer = torch.optim.Adam(flow.parameters(), 3e-2)
    for step in range(40):
        optimizer.zero_grad()
        pixels.bits_per_dim(flow, train[step % 20::20]).mean().backward()
        optimizer.step()
    trained = pixels.bits_per_dim(flow, test).mean().detach()
    assert started < before - 0.3
    assert trained < started - 0.5


def image_model():
    x = pyro.sample("x", dist.Normal(torch.zeros(16), torch.ones(16)).to_event(1))
    pyro.sample("y", dist.Normal(x.reshape(*x.shape[:-1], 4, 4).diff(dim=-1), 0.1).to_event(2),
                obs=torch.zeros(4, 3))


@pytest.mark.parametrize("recipe", [small_glow, small_realnvp], ids=["glow", "realnvp_image"])
def test_an_image_flow_is_a_recipe_for_guides(recipe):
    guide = AutoFlow(image_model, partial(recipe, image_shape=(1, 4, 4)))
    svi = SVI(image_model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10]) - 100


# ------------------------------------------------------------------ wrong images

@mistakes(
    (partial(glow, 64, image_shape=(1, 8, 7)),
     "glow expected `image_shape` (C, H, W) with C * H * W = input_dim = 64, got (1, 8, 7)."),
    (partial(realnvp_image, 64, image_shape=(8, 8)),
     "realnvp_image expected `image_shape` to be 3 positive integers (C, H, W), got (8, 8)."),
    (partial(glow, 64, image_shape=64),
     "glow expected `image_shape` to be 3 positive integers (C, H, W), got 64."),
    (partial(glow, 0, image_shape=(1, 0, 8)),
     "glow expected `input_dim` to be an integer >= 1, got 0."),
    (partial(glow, 64, image_shape=(1.0, 8, 8)),
     "glow expected `image_shape` to be 3 positive integers (C, H, W), got (1.0, 8, 8)."),
    (partial(glow, 49, image_shape=(1, 7, 7)),
     "glow expected an `image_shape` of several channels, or of even sides and a `num_scales` of 2 "
     "or more, got (1, 7, 7) and None. Pad the images, or take realnvp_image."),
    (partial(glow, 64, image_shape=(1, 8, 8), num_scales=1),
     "glow expected an `image_shape` of several channels, ..., got (1, 8, 8) and 1. ..."),
    (partial(glow, 64, image_shape=(1, 8, 8), num_scales=5),
     "glow expected `num_scales` of at most 4, as often as the sides of image_shape=(1, 8, 8) can "
     "be halved, got 5. Pad the images."),
    (partial(realnvp_image, 49, image_shape=(1, 7, 7), num_scales=2),
     "realnvp_image expected `num_scales` of at most 1, ..., got 2. Pad the images."),
    (partial(realnvp_image, 64, image_shape=(1, 8, 8), num_scales=0),
     "realnvp_image expected `num_scales` to be an integer >= 1, got 0."),
    (partial(glow, 64, image_shape=(1, 8, 8), hidden_channels=0),
     "ConvNet expected `hidden_channels` to be an integer >= 1, got 0."),
    (partial(glow, 64, image_shape=(1, 8, 8), num_blocks=-1),
     "ConvNet expected `num_blocks` to be an integer >= 0, got -1."),
    (partial(glow, 64, image_shape=(1, 8, 8), activation="relu"),
     "ConvNet expected `activation` to be a constructor of a module such as nn.ReLU, got 'relu'."),
    (partial(Squeeze, Diagonal(49), (1, 7, 7)),
     "Squeeze expected `image_shape` whose height and width are multiples of block=(2, 2), "
     "got (1, 7, 7). Pad the images."),
    (partial(Squeeze, Diagonal(4), (1, 2, 2), block=2),
     "Squeeze expected `block` to be 2 positive integers (b1, b2), got 2."),
    (partial(Squeeze, Diagonal(3), (1, 2, 2)),
     "Squeeze expected `bijection` to be a Bijection of 4 coordinates, one for each number of "
     "image_shape=(1, 2, 2), got Diagonal of 3."),
    (partial(Pixelwise, LULinear(2), (3, 2, 2)),
     "Pixelwise expected `bijection` to be a Bijection of 3 coordinates, one for each channel of "
     "image_shape=(3, 2, 2), got LULinear of 2."),
    (partial(Pixelwise, nn.Linear(3, 3), (3, 2, 2)),
     "Pixelwise expected `bijection` to be a Bijection of 3 coordinates, ..., got Linear."),
    (partial(Split, Diagonal(4), 4),
     "Split expected `bijection` to be a Bijection of fewer than input_dim=4 coordinates, "
     "got Diagonal of 4."),
    (partial(Split, Diagonal(4), 4.5),
     "Split expected `input_dim` to be an integer >= 1, got 4.5."),
    (partial(checkerboard_mask, (3, 1, 1)),
     "checkerboard_mask expected `image_shape` of two or more pixels, got (3, 1, 1). "
     "Take channel_mask."),
    (partial(channel_mask, (1, 4, 4)),
     "channel_mask expected `image_shape` of two or more channels, got (1, 4, 4). "
     "Take checkerboard_mask, or Squeeze first."),
    (partial(ConvNet, (1, 2, 2), torch.ones(4).bool(), 0, 2),
     "ConvNet expected `mask` to hold 4 booleans, one for each number of image_shape=(1, 2, 2), "
     "both true and false, got ..."),
    (partial(ConvNet, (1, 2, 2), channel_mask((2, 2, 2)), 0, 2),
     "ConvNet expected `mask` to hold 4 booleans, ..."),
    (partial(ConvNet, (1, 2, 2), checkerboard_mask((1, 2, 2)), 0, 2, kernel_size=2),
     "ConvNet expected `kernel_size` to be odd, so that a kernel has a middle, got 2. Take 3."),
    (partial(Coupling, 8, conditioner=partial(ConvNet, (1, 3, 3))),
     "ConvNet expected `mask` to hold 9 booleans, ..."),
    (partial(Coupling, 3, conditioner="conv"),
     "Coupling expected `conditioner` to be a constructor of a network such as "
     "partial(ConvNet, (1, 8, 8)), got 'conv'."),
    (partial(Coupling, 3, conditioner=nn.Linear(1, 4)),
     "Coupling expected `conditioner` to be a constructor of a network such as ..."),
    (lambda: glow(64, image_shape=(1, 8, 8))(torch.zeros(5, 1, 8, 8)),
     "Compose expected `u` of shape (*batch, 64), got (5, 1, 8, 8)."),
)
def test_a_wrong_image_is_named(mistake, message):
    with says(message):
        mistake()
