"""Recording: a Python function of tensors becomes one pure graph of tensor operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_nfvi.engine.decompositions import decomposition
from pyro_nfvi.engine.draws import Draw, fills, is_random

aten = torch.ops.aten
_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default,
           aten._unsafe_index_put.default}
# Draws whose argument only says which shape: they fill a new tensor.
LIKE = {aten.randn_like.default: aten.normal_.default,
        aten.rand_like.default: aten.uniform_.default}
READS = ("Python reads a number that depends on a parameter or a latent: a condition, float(...) "
         "or .item() ({})")
CHECKS = {aten._linalg_check_errors.default}  # no result, but an error: they stay in the graph


class NotRecordable(RuntimeError):
    """The function cannot be one graph; the message says why.

    Example:
        >>> x = torch.ones(3)
        >>> try:
        ...     _ = record(lambda: [2 * x if x.sum() > 0 else x], [x])
        ... except NotRecordable as problem:
        ...     print(type(problem).__name__)
        NotRecordable
    """


@dataclass(frozen=True)
class Recording:
    """A function as one pure graph.

    Attributes:
        graph: ``(*inputs, *draws) -> outputs``, calling it runs operation by operation.
        draws: The random operations, whose results the graph takes as inputs.
        num_inputs: Number of other inputs.
        freezes: Whether a constant came from a tensor that requires a gradient.

    Example:
        >>> x = torch.ones(3)
        >>> found = record(lambda: [x + torch.randn(3)], [x])
        >>> found.num_inputs, len(found.draws)
        (1, 1)
    """

    graph: fx.GraphModule
    draws: tuple[Draw, ...]
    num_inputs: int
    freezes: bool = False

    @property
    def num_computed(self) -> int:
        """How many numbers one run computes, views aside."""
        shapes = (node.meta.get("shape") for node in self.graph.graph.nodes
                  if node.op == "call_function")
        return sum(math.prod(shape) for shape in shapes if shape is not None)


def record(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Recording:
    """Run a function once and write down what depends on its inputs or on random numbers.

    The function takes its inputs from where it finds them: they are recognized by identity.
    Work on other tensors runs now, once, and its results become constants of the graph. In-place
    operations on what the function made itself become pure ones.

    Args:
        function: The function; its results are a sequence of tensors.
        inputs: The tensors it depends on.

    Returns:
        The graph and the random operations in it.

    Raises:
        NotRecordable: If Python reads a value that depends on an input (a condition, a number, a
            shape), if a random operation depends on one, or if the function changes a tensor that
            it did not make.

    Example:
        >>> x = torch.ones(3)
        >>> graph = record(lambda: [2 * x + torch.ones(3).exp()], [x]).graph
        >>> torch.allclose(graph(torch.zeros(3))[0], torch.tensor(1.0).exp())
        True

    References:
        He & Zou (2021) and the make_fx tracer of PyTorch, which this follows; the difference is
        that work on data alone is not recorded.
    """
    recorder = _Recorder(inputs)
    token = _RECORDING.set(True)
    try:
        with recorder:
            outputs = function()
    finally:
        _RECORDING.reset(token)
    return recorder.finish(outputs)


def is_recording() -> bool:
    """Whether a function is being recorded: a layer may then offer itself as one operation."""
    return not torch.compiler.is_compiling() and _RECORDING.get()


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.root, self.draws = fx.Graph(), nn.Module(), []  # type: ignore[var-annotated]
        self.nodes: dict[int, fx.Node] = {}  # of tensors that depend on an input, by identity
        self.constants: dict[int, tuple[fx.Node, int]] = {}  # and of those that do not
        self.wholes: dict[int, tuple[Tensor, fx.Node]] = {}  # storage -> what covers it
        self.made: set[int] = set()  # storages made while recording
        self.alive: list[Tensor] = []  # so that no identity is used twice
        self.num_inputs, self.freezes = len(inputs), False
        for i, tensor in enumerate(inputs):
            self._follow(tensor, self.graph.placeholder(f"input_{i}"))

    def finish(self, outputs: Sequence[Tensor]) -> Recording:
        self.graph.output(tuple(self._node(output) for output in outputs))
        self.graph.eliminate_dead_code(lambda node: node.op == "placeholder"
                                       or node.op == "output" or node.target in CHECKS)
        module = fx.GraphModule(self.root, self.graph)
        return Recording(module, tuple(self.draws), self.num_inputs, self.freezes)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depends = any(self._is_followed(leaf) for leaf in tree_leaves((args, kwargs)))
        if op in LIKE:
            op, args, kwargs = LIKE[op], (torch.empty_like(args[0], **kwargs),), {}
            self._note(args, ())
        if is_random(op):
            return self._draw(op, args, kwargs)
        if op._schema.is_mutable:
            return self._mutate(op, args, kwargs, depends)
        if not depends:
            given = () if op is aten.lift_fresh.default else (args, kwargs)  # torch.tensor(...)
            return self._note(op(*args, **kwargs), given)
        if op is aten.index_put.default and _is_fill(*args):
            with self:
                return _fill(*args[:3])
        if op is aten._is_all_true.default:  # a distribution's own check of its arguments
            return self._note(torch.ones((), dtype=torch.bool, device=args[0].device), ())
        _refuse_reading(op, args, self)
        if op in INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        rule = decomposition(op)
        if rule is not None:
            with self:
                return rule(*args, **kwargs)
        return self._record(op, args, kwargs)

    def _record(self, op: Any, args: Any, kwargs: Any) -> Any:
        if op is aten.as_strided.default:  # which counts on an order of the memory
            self._cover(args[0])
            result = op(*args, **kwargs)
            self._follow(result, self._view_of_memory(result))
            return result
        node = self.graph.call_function(op, *self._as_nodes((args, kwargs)))
        result = self._note(op(*args, **kwargs), (args, kwargs))
        if isinstance(result, (bool, int, float)):
            raise NotRecordable(READS.format(op))
        if isinstance(result, Tensor):
            self._follow(result, node)
        elif result is not None:
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._follow(part, self.graph.call_function(operator.getitem, (node, i)))
        return result

    def _draw(self, op: Any, args: Any, kwargs: Any) -> Tensor:
        parameters = args[1:] if fills(op) else args
        if any(self._is_followed(leaf) for leaf in tree_leaves((parameters, kwargs))):
            raise NotRecordable(f"it draws random numbers whose distribution depends on a "
                                f"parameter or a latent ({op})")
        if fills(op):
            self._refuse_outside(op, args[0])
            if _dense_order(args[0]) is None:
                self._cover(args[0])
        result: Tensor = self._note(op(*args, **kwargs), (args, kwargs))
        held = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
        self.draws.append(Draw(op, held, kwargs, result.shape, result.dtype, result.device))
        node = _noted(self.graph.placeholder(f"draw_{len(self.draws) - 1}"), result)
        if fills(op):
            self._overwrite(result, node)
        else:
            self._follow(result, node)
        return result

    def _mutate(self, op: Any, args: Any, kwargs: Any, depends: bool) -> Any:
        target = args[0]
        if not isinstance(target, Tensor) or not op._schema.arguments[0].alias_info:
            raise NotRecordable(f"it writes into a tensor by {op}")
        self._refuse_outside(op, target)
        if not depends:
            self._forget_constants(_storage(target))
            return op(*args, **kwargs)
        pure = _pure_twin(op)
        if torch.Tag.inplace_view in op.tags:  # squeeze_, say: another shape of the same memory
            node = self.graph.call_function(pure, (self._node(target), *args[1:]), kwargs)
            result = op(*args, **kwargs)
            self._follow(target, node)
            return result
        self._cover(target)
        before = self._note(target.clone(), ())
        with self:
            self._follow(before, self._node(target))
            value = pure(before, *args[1:], **kwargs)
            if value.dtype != target.dtype or value.shape != target.shape:
                value = value.to(target.dtype).expand(target.shape)
        node = self._node(value)
        result = op(*args, **kwargs)
        self._overwrite(target, node)
        return result

    def _refuse_outside(self, op: Any, target: Tensor) -> None:
        if _storage(target) not in self.made:
            raise NotRecordable(f"it changes a tensor that outlives the run, in place ({op})")

    def _overwrite(self, target: Tensor, node: fx.Node) -> None:
        """Make ``node`` the contents of ``target`` and of every view of its memory."""
        storage, order = _storage(target), _dense_order(target)
        if order is not None:
            whole, whole_node = target, node
        else:
            whole_node = self._flat(storage)
            whole = self.wholes[storage][0]
            whole_node = self._emit(aten.index_put.default, whole_node, [self._places(target)],
                                    node, like=whole)
        for tensor in self.alive:
            if id(tensor) in self.nodes and _storage(tensor) == storage:
                del self.nodes[id(tensor)]
        self.nodes[id(target)] = node
        self.wholes[storage] = (whole, whole_node)
        self.alive.append(target)
        self._forget_constants(storage)

    def _cover(self, target: Tensor) -> None:
        """Follow the memory of ``target``, with what it holds before it is written to."""
        storage = _storage(target)
        if storage not in self.wholes:
            size = target.untyped_storage().nbytes() // target.dtype.itemsize
            flat = target.detach().as_strided((size,), (1,), 0)
            self.wholes[storage] = (flat, self._constant(self._note(flat.clone(), ())))
            self.alive.append(flat)

    def _flat(self, storage: int) -> fx.Node:
        """All of a piece of memory, as one row."""
        whole, node = self.wholes[storage]
        if whole.dim() != 1:
            order = _dense_order(whole)
            whole = whole.detach().permute(order)
            node = self._emit(aten.permute.default, node, order, like=whole)
            whole = whole.view(-1)
            node = self._emit(aten.view.default, node, [-1], like=whole)
            self.wholes[storage] = (whole, node)
            self.alive.append(whole)
        return node

    def _follow(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = _noted(node, tensor)
        self.alive.append(tensor)
        storage = _storage(tensor)
        if storage not in self.wholes and _dense_order(tensor) is not None:
            self.wholes[storage] = (tensor, node)

    def _is_followed(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and (id(leaf) in self.nodes
                                             or _storage(leaf) in self.wholes)

    def _as_nodes(self, values: Any) -> Any:
        return tree_map(lambda v: self._node(v) if isinstance(v, Tensor) else v, values)

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)]
        if _storage(tensor) in self.wholes:  # a view of memory that was written to
            return self._view_of_memory(tensor)
        return self._constant(tensor)

    def _view_of_memory(self, tensor: Tensor) -> fx.Node:
        return self._emit(aten.index.Tensor, self._flat(_storage(tensor)),
                          [self._places(tensor)], like=tensor)

    def _places(self, tensor: Tensor) -> fx.Node:
        """Where the elements of a view stand in its memory."""
        size = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        numbers = torch.arange(size, device=tensor.device)
        return self._constant(numbers.as_strided(*_geometry(tensor)).contiguous())

    def _emit(self, op: Any, *args: Any, like: Tensor) -> fx.Node:
        return _noted(self.graph.call_function(op, args), like)

    def _constant(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.constants:
            name = f"constant_{len(self.constants)}"
            self.freezes |= tensor.requires_grad
            value = tensor.detach()
            value = value.clone() if _storage(tensor) in self.made else value
            while hasattr(self.root, name):
                name += "_"
            self.root.register_buffer(name, value)
            node = _noted(self.graph.get_attr(name), value)
            self.constants[id(tensor)] = (node, _storage(tensor))
            self.alive.append(tensor)
        return self.constants[id(tensor)][0]

    def _forget_constants(self, storage: int) -> None:
        self.constants = {key: (node, place) for key, (node, place) in self.constants.items()
                          if place != storage}

    def _note(self, result: Any, given: Any) -> Any:
        """Remember which memory is new: a view of an argument has none."""
        old = {_storage(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in old:
                self.made.add(_storage(leaf))
        return result


def _refuse_reading(op: Any, args: Any, recorder: _Recorder) -> None:
    if op in (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default):
        raise NotRecordable(READS.format(op))
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] \
        if op in INDEXED else []
    dynamic = torch.Tag.dynamic_output_shape in op.tags and op not in INDEXED
    if dynamic or any(recorder._is_followed(mask) for mask in masks):
        raise NotRecordable(f"a shape depends on a parameter or a latent ({op})")


def _is_fill(x: Tensor, indices: Sequence[Tensor | None], value: Tensor, *accumulate: bool) -> bool:
    """Whether an assignment writes one number wherever a single mask is true."""
    first = indices[0]
    return first is not None and len(indices) == 1 and first.dtype == torch.bool \
        and value.numel() == 1 and not any(accumulate)


def _fill(x: Tensor, indices: Sequence[Tensor], value: Tensor) -> Tensor:
    mask = indices[0]
    mask = mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))
    return torch.where(mask, value.reshape(()), x)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks, which are constants, as the places where they are true."""
    places: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        places += index.nonzero().unbind(1) if is_mask else [index]  # type: ignore[union-attr]
    return places


def _pure_twin(op: Any) -> Callable:
    """The operation that returns what ``op`` writes."""
    name, overload = op._opname, op._overloadname
    if op is aten.copy_.default:
        return lambda before, source, *_: source.to(before.dtype).expand(before.shape).clone()
    if op is aten.zero_.default:
        return torch.zeros_like
    if op is aten.transpose_.default:
        return aten.transpose.int
    twin = getattr(aten, name[:-1], None)
    if not name.endswith("_") or twin is None or overload not in twin.overloads():
        raise NotRecordable(f"it writes into a tensor by {op}, which has no pure form")
    pure: Callable = getattr(twin, overload)
    return pure


def _noted(node: fx.Node, tensor: Tensor) -> fx.Node:
    """The node, with the shape and type of its value written on it."""
    node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
    return node


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _covers(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.dtype.itemsize == tensor.untyped_storage().nbytes()


def _dense_order(tensor: Tensor) -> list[int] | None:
    """The permutation that makes a tensor contiguous, if it fills its memory."""
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), tensor.shape[d] != 1))
    return order if _covers(tensor) and tensor.permute(order).is_contiguous() else None


def _geometry(tensor: Tensor) -> tuple[list[int], list[int], int]:
    return list(tensor.shape), list(tensor.stride()), tensor.storage_offset()
