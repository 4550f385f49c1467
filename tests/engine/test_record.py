"""Recording: what becomes the graph, what becomes a constant or a draw, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

from pyro_nfvi.engine.c.ir import Unsupported
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.draws import Draw, Replay
from pyro_nfvi.engine.record import NotRecordable, Recording, record


@pytest.fixture(autouse=True)
def _no_validation() -> Iterator[None]:
    """Distributions read their arguments to validate them, which no graph can."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(False)
    yield
    td.Distribution.set_default_validate_args(before)


Function = Callable[..., Sequence[Tensor]]


def values(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def replayed(function: Function, *shapes: tuple[int, ...], grad: bool = False) -> Recording:
    """Record with some inputs and draws, then compare with eager code at others."""
    first, second = ([v.requires_grad_(grad) for v in values(*shapes, seed=s)] for s in (0, 1))
    torch.manual_seed(0)
    recording = record(lambda: function(*first), first)
    torch.manual_seed(1)
    expected = function(*second)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    draws = [draw.once() for draw in recording.draws]
    assert torch.equal(torch.get_rng_state(), after)  # draws use it as eager code does
    with torch.no_grad():
        actual = recording.graph(*second, *draws)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-12, atol=1e-12)
    assert_pure(recording)
    return recording


def assert_pure(recording: Recording) -> None:
    """No operation writes into a tensor, or draws."""
    for op in operations(recording):
        assert not getattr(op, "_schema", None) or not op._schema.is_mutable
        assert torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ())


def operations(recording: Recording) -> list:
    return [n.target for n in recording.graph.graph.nodes if n.op == "call_function"]


def names(recording: Recording) -> list[str]:
    return [getattr(op, "_opname", op.__name__) for op in operations(recording)]


# ------------------------------------------------------------------ what a graph computes

LAYER = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def gradient(x: Tensor, y: Tensor) -> list[Tensor]:
    value = (torch.logsumexp(x * y, -1) + x.prod(-1)).sum()
    return [value, *torch.autograd.grad(value, [x, y])]


def second_gradient(x: Tensor, y: Tensor) -> list[Tensor]:
    slope, = torch.autograd.grad((x.tanh() * y.exp()).sum(), x, create_graph=True)
    return list(torch.autograd.grad(slope.square().sum(), [x, y]))


def functional(x: Tensor, y: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in LAYER.named_parameters()}
    weights["0.weight"] = torch.cat([x, y])[:4]
    return [torch.func.functional_call(LAYER, weights, (y,))]


def joint_density(x: Tensor, y: Tensor) -> list[Tensor]:
    scale = nn.functional.softplus(y[0])
    covariance = x.mT @ x + torch.eye(3)
    return [td.Normal(x, scale).log_prob(torch.ones(3, dtype=x.dtype)).sum(),
            td.MultivariateNormal(y[0], covariance).log_prob(y[1]),
            td.Gamma(scale, 2.0).log_prob(torch.full((3,), 0.5, dtype=x.dtype)),
            td.Categorical(logits=x).log_prob(torch.tensor([0, 2])),
            td.MixtureSameFamily(td.Categorical(logits=x),
                                 td.Normal(y, 1.0)).log_prob(y[:, 0])]


@pytest.mark.parametrize("function", [
    lambda x, y: [x * y + 1, (x - y).exp().sum(0), torch.einsum("ij,kj->ik", x, y)],
    lambda x, y: [x.T[1:][:, :1].reshape(-1), x.view(3, 2).unbind(1)[1], *y.chunk(2, 1)],
    lambda x, y: [torch.where(x > y, x, 0).mean(1), x.amax(1), x.max(1).values, x.argmax(1)],
    lambda x, y: [x.var(0), x.std(), torch.softmax(y, 1), nn.functional.gelu(x), x.norm(dim=1)],
    lambda x, y: [torch.diag_embed(x), x.repeat(2, 1), x.tile(2), x.roll(1, 0), x.diff(dim=1)],
    lambda x, y: [x[:, [0, 2, 0]], x[torch.tensor([True, False])], x[..., None, 0], x[-1]],
    lambda x, y: [torch.cdist(x, y), torch.cumsum(x, 1), torch.outer(x[0], y[1])],
    lambda x, y: [x, y, x], lambda x, y: [x.detach() + 1, x.clone(), torch.zeros(2) + 1],
    lambda x, y: [torch.func.vmap(lambda a, b: (a * b).sum())(x, y)],
    lambda x, y: [torch.func.vmap(torch.func.grad(lambda a: a.sin().sum()))(x)],
    lambda x, y: [torch.func.jacrev(lambda a: a.square() * y)(x)],
    lambda x, y: [torch.func.vmap(lambda a: torch.func.vmap(lambda b: (a * b).sum())(y))(x)],
    lambda x, y: [LAYER(x), LAYER(y).sum()], functional, joint_density], ids=range(16))
def test_a_graph_computes_what_the_function_does(function):
    replayed(function, (2, 3), (2, 3))


@pytest.mark.parametrize("function", [gradient, second_gradient])
def test_gradients_taken_inside_become_part_of_the_graph(function):
    replayed(function, (2, 3), (2, 3), grad=True)


def test_gradients_with_respect_to_something_made_inside_are_recorded():
    def function(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            z = (x * 2).detach().requires_grad_()
            return [torch.autograd.grad((z * x).sin().sum(), z)[0]]
    replayed(function, (3,))


def test_a_function_without_inputs_is_constant():
    recording = record(lambda: [torch.ones(3).exp()], [])
    assert operations(recording) == []
    torch.testing.assert_close(recording.graph()[0], torch.ones(3).exp())


def test_integers_and_masks_are_inputs_too():
    x, = values((4,))
    places, mask = torch.tensor([0, 3, 1]), torch.tensor([True, False, True])
    recording = record(lambda: [torch.where(mask, x[places], 0)], [x, places, mask])
    other = torch.tensor([2, 2, 0])
    torch.testing.assert_close(recording.graph(x, other, ~mask)[0], torch.where(~mask, x[other], 0))


def test_inputs_are_recognized_by_identity_and_equal_tensors_are_not_them():
    x, = values((3,))
    twin = x.clone()
    recording = record(lambda: [x + twin], [x])
    torch.testing.assert_close(recording.graph(10 * x)[0], 10 * x + twin)


def test_inputs_may_share_memory():
    x, = values((2, 3))
    flat, row = x.view(-1), x[1]
    recording = record(lambda: [x + 1, flat * 2, row.exp()], [x, flat, row])
    a, b, c = values((2, 3), (6,), (3,), seed=5)
    for made, expected in zip(recording.graph(a, b, c), [a + 1, b * 2, c.exp()], strict=True):
        torch.testing.assert_close(made, expected)


def test_a_view_made_outside_of_an_input_depends_on_it():
    x, = values((2, 3))
    row = x[1]
    recording = record(lambda: [row * 2], [x])
    other, = values((2, 3), seed=5)
    torch.testing.assert_close(recording.graph(other)[0], other[1] * 2)


def test_shapes_and_types_are_noted_on_every_value():
    x, = values((2, 3))
    recording = record(lambda: [x.T.float().sum(0) > 0], [x])
    *_, last = (n for n in recording.graph.graph.nodes if n.op == "call_function")
    assert (last.meta["shape"], last.meta["dtype"]) == ((2,), torch.bool)


def test_what_is_not_used_is_left_out():
    x, = values((3,))

    def function() -> list[Tensor]:
        x.exp().sum()
        return [x * 2]
    assert names(record(function, [x])) == ["mul"]


# ------------------------------------------------------------------ constants

def test_work_on_data_alone_becomes_a_constant():
    x, data = values((3,), (50, 3))
    recording = record(lambda: [x * (data.T @ data).diagonal().log()], [x])
    assert names(recording) == ["mul"]
    assert [b.shape for b in recording.graph.buffers()] == [(3,)]


def test_a_mask_of_data_picks_places_once():
    x, data = values((5,), (5,))
    recording = record(lambda: [x[data > 0], x[data.nonzero()[:, 0]]], [x])
    torch.testing.assert_close(recording.graph(x + 1)[0], (x + 1)[data > 0])
    assert "nonzero" not in names(recording)


def test_python_may_read_data():
    x, data = values((3,), (3,))
    recording = record(lambda: [x * float(data[0]) if data.sum() < 100 else x], [x])
    assert names(recording) == ["mul"]


def test_a_constant_changed_after_its_use_keeps_what_was_used():
    def function(x: Tensor) -> list[Tensor]:
        weights = torch.ones(3, dtype=x.dtype)
        before = x * weights
        weights.mul_(5)
        weights[0] = 7
        return [before, x * weights, x + weights[:1]]
    replayed(function, (3,))


# ------------------------------------------------------------------ in place

def filled_by_slices(x: Tensor) -> list[Tensor]:
    out = torch.zeros(3, 4, dtype=x.dtype)
    out[1] = x
    out[:, ::2] *= 2
    out[0, 1:3] = x[:2].exp()
    return [out, out.sum(0), out[1]]


def views_follow(x: Tensor) -> list[Tensor]:
    y = x * 2
    row, column, transposed = y[1], y[:, 0], y.T
    before = row + 0
    y.add_(1)
    row.mul_(3)
    transposed[0, 0] = 5
    return [before, y, row, column, transposed, transposed.sum(1)]


def transposed_views(x: Tensor) -> list[Tensor]:
    y = x + 1
    y.T.exp_()
    z = x.T.contiguous().T
    z.sub_(y)
    w = x.T.clone()
    w.mul_(2)
    return [y, z, w]


def by_indices(x: Tensor) -> list[Tensor]:
    out = torch.zeros(4, 3, dtype=x.dtype)
    out[torch.tensor([2, 0])] = x
    out.index_put_((torch.tensor([1, 1]),), x, accumulate=True)
    out.scatter_(0, torch.tensor([[3, 3, 3]]), x[:1])
    out.index_add_(0, torch.tensor([0, 2]), x)
    return [out]


def by_masks(x: Tensor) -> list[Tensor]:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    out = torch.zeros(2, 3, dtype=x.dtype)
    out[mask] = x[0]
    square = torch.zeros(2, 3, 3, dtype=x.dtype)
    square[..., torch.ones(3, 3).tril().bool()] = torch.cat([x, x], 1)
    masked = x.exp()
    masked[mask] = 0
    masked[x > 0.5] = -1
    return [out, square, masked, x.clone().masked_fill_(mask, 2.0)]


def many_ways(x: Tensor) -> list[Tensor]:
    y = torch.empty_like(x).copy_(x[0])
    y += x
    y.clamp_(-1, 1).sqrt_().nan_to_num_(0.5)
    z = x.new_zeros(2, 3).addcmul_(x, y, value=0.5)
    z.fill_diagonal_(2.0) if z.shape[0] == z.shape[1] else z.zero_()
    z[...] = y
    w = torch.ones(6, dtype=x.dtype).view(2, 3)
    w.view(-1)[1:4] -= x.flatten()[2:5]
    whole = torch.zeros(3, dtype=torch.int64)
    whole += (x[0] > 0).long()
    return [y, z, w, whole, x.relu().add_(y).lerp_(x, 0.3)]


def itself(x: Tensor) -> list[Tensor]:
    y = x.clone()
    y.add_(y)
    y[0].mul_(y[1])
    y[:, 1:].copy_(y[:, :-1].clone())
    return [y]


def out_of_order(x: Tensor) -> list[Tensor]:
    y = torch.zeros(2, 3, dtype=x.dtype)
    constant = x + y
    y[0] = x[0]
    y[1].add_(1)
    total = y.sum()
    y.zero_()
    return [constant, total, y + x]


def from_numbers(x: Tensor) -> list[Tensor]:
    out = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
    out[1:] = x[0, :2]
    return [out * 2]


@pytest.mark.parametrize("function", [
    from_numbers, filled_by_slices, views_follow, transposed_views, by_indices, by_masks, many_ways,
    itself, out_of_order])
def test_changes_of_own_tensors_become_pure(function):
    replayed(function, (4,) if function is filled_by_slices else (2, 3))


def test_changes_inside_a_loop_become_pure():
    def function(x: Tensor) -> list[Tensor]:
        path = torch.zeros(6, dtype=x.dtype)
        path[0] = x[0]
        for t in range(1, 6):
            path[t] = 0.5 * path[t - 1] + x[t].tanh()
        return [path]
    replayed(function, (6,))


def test_gradients_flow_through_changes_in_place():
    def function(x: Tensor) -> list[Tensor]:
        out = torch.zeros(2, 3, dtype=x.dtype)
        out[0] = x.exp()
        out[1, 1:] += x[:2] * out[0, :2].clone()
        return list(torch.autograd.grad(out.square().sum(), x))
    replayed(function, (3,), grad=True)


def outside_changed(x: Tensor, data: Tensor) -> list[Tensor]:
    data.add_(x)
    return [data]


def outside_changed_by_view(x: Tensor, data: Tensor) -> list[Tensor]:
    data.view(-1)[1:].mul_(x[1:])
    return [data * 2]


def outside_changed_by_data(x: Tensor, data: Tensor) -> list[Tensor]:
    data[0] = 3.0
    return [data * x]


def input_changed(x: Tensor, data: Tensor) -> list[Tensor]:
    x.add_(1)
    return [x * 2]


def input_changed_by_view(x: Tensor, data: Tensor) -> list[Tensor]:
    x.detach()[:1].zero_()
    return [x * 2]


@pytest.mark.parametrize("function", [outside_changed, outside_changed_by_view, input_changed,
                                      outside_changed_by_data, input_changed_by_view])
def test_a_change_of_an_outside_tensor_is_refused_and_not_made(function):
    x, data = values((3,), (3,))
    held = x.clone(), data.clone()
    with pytest.raises(NotRecordable, match="outlives the run|in place"):
        record(lambda: function(x, data), [x])
    assert torch.equal(x, held[0])
    assert torch.equal(data, held[1])


# ------------------------------------------------------------------ refusals

READS = "reads a number that depends on a parameter or a latent"
SHAPES = "shape depends on a parameter or a latent"
DRAWS = "distribution depends on a parameter or a latent"


@pytest.mark.parametrize(("function", "message"), [
    (lambda x: [x * x.sum().item()], READS),
    (lambda x: [x * float(x[0])], READS),
    (lambda x: [x if x[0] > 0 else -x], READS),
    (lambda x: [x] if torch.equal(x, x + 1) else [-x], READS),
    (lambda x: [x] if torch.allclose(x, x + 1) else [-x], READS),
    (lambda x: [x[int(x[0] > 0)]], READS),
    (lambda x: [x[x > 0]], SHAPES),
    (lambda x: [x.nonzero()], SHAPES),
    (lambda x: [x.unique()], SHAPES),
    (lambda x: [torch.masked_select(x, x > 0)], SHAPES),
    (lambda x: [torch.normal(x, 1.0)], DRAWS),
    (lambda x: [torch.bernoulli(x.sigmoid())], DRAWS),
    (lambda x: [torch.poisson(x.exp())], DRAWS),
    (lambda x: [torch.multinomial(x.exp(), 2)], DRAWS),
    (lambda x: [td.Gamma(x.exp(), 1.0).rsample()], DRAWS),
    (lambda x: [x.clone().normal_(0, x.abs().sum().item())], READS)], ids=range(16))
def test_what_cannot_be_one_graph_is_refused(function, message):
    x, = values((3,))
    with pytest.raises(NotRecordable, match=message):
        record(lambda: function(x), [x])


def test_what_depends_on_a_draw_is_refused_like_a_latent():
    x, = values((3,))
    with pytest.raises(NotRecordable, match=READS):
        record(lambda: [x * torch.randn(()).item()], [x])
    with pytest.raises(NotRecordable, match=DRAWS):
        record(lambda: [x + torch.bernoulli(torch.rand(3))], [x])


def test_a_refusal_leaves_no_trace():
    x, = values((3,))
    with pytest.raises(NotRecordable):
        record(lambda: [x * x.sum().item()], [x])
    assert (x * x.sum().item()).shape == (3,)
    assert names(record(lambda: [x + 1], [x])) == ["add"]


def test_errors_of_the_function_are_its_own():
    x, = values((3,))
    with pytest.raises(ZeroDivisionError):
        record(lambda: [x / (1 // 0)], [x])


# ------------------------------------------------------------------ draws

def drawn_in_part(x: Tensor) -> list[Tensor]:
    noise = torch.zeros(2, 3, dtype=x.dtype)
    noise[1].normal_()
    kept = noise + x
    noise[:, 1:].uniform_()
    return [noise + x, kept]


@pytest.mark.parametrize(("function", "count"), [
    (lambda x: [x + torch.randn(2, 3), x + torch.rand(3), x * torch.randn(2, 1).exp()], 3),
    (lambda x: [x + torch.normal(torch.zeros(2, 3), torch.ones(3))], 1),
    (lambda x: [x + torch.normal(0.0, 2.0, (2, 3))], 1),
    (lambda x: [x * torch.bernoulli(torch.full((2, 3), 0.3))], 1),
    (lambda x: [x * torch.empty(2, 3).bernoulli_(0.3), x + torch.empty(3).exponential_(2.0)], 2),
    (lambda x: [x[:, torch.randperm(3)]], 1),
    (lambda x: [x[:, torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 2)]], 1),
    (lambda x: [x[torch.randint(2, (4,))]], 1),
    (lambda x: [nn.functional.dropout(x, 0.4)], 1),
    (lambda x: [td.Normal(x, x.exp()).rsample((4,)), td.Laplace(x, 1.0).rsample()], 2),
    (lambda x: [td.StudentT(torch.tensor(4.0), x, 1.0).rsample()], 2),
    (lambda x: [td.Gamma(torch.tensor(2.0), 1.0).sample((3,)) * x], 1),
    (lambda x: [torch.randn_like(x) + x, torch.rand_like(x.T) + x.T], 2),
    (lambda x: [torch.empty_like(x).normal_() + x, x.new_empty(3).uniform_() + x], 2),
    (lambda x: [torch.func.vmap(lambda a: a + torch.randn(3), randomness="same")(x)], 1),
    (lambda x: [torch.func.vmap(lambda a: a + torch.randn(3), randomness="different")(x)], 1),
    (lambda x: [torch.func.vmap(nn.functional.dropout, randomness="different")(x)], 1),
    (drawn_in_part, 2)], ids=range(18))
def test_a_random_operation_becomes_a_draw(function, count):
    recording = replayed(function, (2, 3))
    assert len(recording.draws) == count


def test_a_draw_that_is_not_used_is_made_all_the_same():
    def function(x: Tensor) -> list[Tensor]:
        torch.randn(7)
        return [x + torch.randn(3)]
    assert len(replayed(function, (3,)).draws) == 2


def test_recording_uses_the_random_state_as_one_run():
    x, = values((3,))
    torch.manual_seed(3)
    record(lambda: [x + torch.randn(3), x * torch.rand(2, 1)], [x])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn(3), torch.rand(2, 1)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_draw_keeps_its_arguments_whatever_becomes_of_them():
    x, = values((3,))
    means = torch.zeros(3)

    def function() -> list[Tensor]:
        return [x + torch.normal(means, 1e-3)]
    draw, = record(function, [x]).draws
    means.fill_(100.0)
    assert draw.once().abs().max() < 1


@pytest.mark.parametrize("draw", [lambda: torch.randn(4, 3, 2), lambda: torch.rand(()),
                                  lambda: torch.randperm(5), lambda: torch.empty(3).exponential_(),
                                  lambda: torch.normal(torch.zeros(2, 3), 1.0)], ids=range(5))
def test_many_draws_have_the_shape_and_type_of_one(draw):
    recorded, = record(lambda: [draw() + 0], []).draws
    once, many = recorded.once(), recorded.many(6)
    assert many.shape == (6, *once.shape)
    assert (recorded.shape, recorded.dtype) == (once.shape, once.dtype) == (
        many.shape[1:], many.dtype)
    assert recorded.num_bytes == once.nbytes
    assert len({tuple(m.flatten().tolist()) for m in many}) > 1


def test_many_normal_draws_lie_with_the_particles_innermost_and_are_independent():
    recorded, = record(lambda: [torch.randn(50, 4) + 0], []).draws
    many = recorded.many(200)
    assert many[0].stride() == (1, 50)
    assert abs(many.mean().item()) < 4 / math.sqrt(many.numel())
    assert abs(many.var().item() - 1) < 0.05


def test_replay_hands_over_draws_made_before():
    def function() -> list[Tensor]:
        return [torch.randn(3) * 2, torch.empty(2).exponential_() + 1, torch.randperm(4)]
    draws = [torch.arange(3.0), torch.tensor([5.0, 6.0]), torch.tensor([3, 2, 1, 0])]
    state = torch.get_rng_state()
    with Replay(draws):
        a, b, c = function()
    assert torch.equal(torch.get_rng_state(), state)
    assert (a.tolist(), b.tolist(), c.tolist()) == ([0, 2, 4], [6, 7], [3, 2, 1, 0])


def test_replayed_draws_do_not_change_when_the_function_changes_them():
    draws = [torch.ones(3)]
    with Replay(draws):
        torch.randn(3).add_(1)
    assert draws[0].tolist() == [1, 1, 1]


def test_a_replay_that_runs_out_of_draws_says_so():
    with pytest.raises(RuntimeError, match="more random numbers"), Replay([]):
        torch.randn(3)


def test_a_recording_and_a_replay_agree():
    x, = values((2, 3))

    def function() -> list[Tensor]:
        return [nn.functional.dropout(x, 0.5) + torch.randn(3, dtype=x.dtype), td.Normal(
            x, 1.0).rsample()]
    recording = record(function, [x])
    draws = [draw.once() for draw in recording.draws]
    with Replay(draws):
        expected = function()
    for made, e in zip(recording.graph(x, *draws), expected, strict=True):
        torch.testing.assert_close(made, e)
    assert all(isinstance(draw, Draw) for draw in recording.draws)


# ------------------------------------------------------------------ what a review found

def test_a_draw_keeps_the_tensor_of_its_probabilities():
    p, x = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.randn(4)
    recording = record(lambda: [x * torch.empty(4).bernoulli_(p)], [x])
    for _ in range(5):
        assert torch.equal(recording.draws[0].once(), p)
        assert torch.equal(recording.draws[0].many(3), p.expand(3, 4))


def test_a_distribution_that_checks_its_arguments_by_itself_is_recorded():
    x = torch.randn(3)
    prior = torch.distributions.Normal(0.0, 1.0, validate_args=True).expand([3])
    recording = record(lambda: [prior.log_prob(x)], [x])
    assert torch.equal(recording.graph(x)[0], prior.log_prob(x))


def test_single_numbers_may_be_assigned_one_by_one():
    x = torch.randn(4, dtype=torch.float64)

    def path():
        h = torch.zeros(4, dtype=torch.float64)
        h[0] = x[0]
        for t in range(1, 4):
            h[t] = 0.9 * h[t - 1] + x[t]
        return [h]
    recording = record(path, [x])
    value, = CProgram(recording, [x], [])([x], [])
    torch.testing.assert_close(value, path()[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [
    lambda x: x.round(decimals=2),
    lambda x: torch.linalg.cholesky_ex(x @ x.mT).info.float()], ids=["decimals", "info"])
def test_what_c_would_get_wrong_it_refuses(function):
    x = torch.randn(3, 3)
    with pytest.raises(Unsupported):
        CProgram(record(lambda: [function(x)], [x]), [x], [])


def test_a_division_of_integers_by_zero_does_not_end_the_process():
    x, k = torch.tensor([7, 8]), torch.tensor([2, 3])
    recording = record(lambda: [torch.div(x, k, rounding_mode="floor"), x % k,
                                torch.div(x, k, rounding_mode="trunc")], [x, k])
    program = CProgram(recording, [x, k], [])
    assert [v.tolist() for v in program([x, k], [])] == [[3, 2], [1, 2], [3, 2]]
    program([x, k * 0], [])


def test_compiled_code_refuses_tensors_of_another_shape_or_type():
    x = torch.randn(4)
    program = CProgram(record(lambda: [x * 2], [x]), [x], [])
    for other in (torch.randn(3), torch.randn(4).double()):
        with pytest.raises(ValueError, match="other shapes or types"):
            program([other], [])


def test_a_transposition_in_place_is_recorded_as_in_a_recurrent_network_with_the_batch_first():
    network, x = torch.nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    recording = record(lambda: [network(x)[0]], [x])
    y = torch.randn(2, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(recording.graph(y)[0], network(y)[0])
