"""A recorded graph as a library of C code, and the calls into it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_nfvi.engine.adam import AdamState
from pyro_nfvi.engine.c.blas import connect
from pyro_nfvi.engine.c.build import load
from pyro_nfvi.engine.c.ir import Unsupported
from pyro_nfvi.engine.c.lower import Lowering
from pyro_nfvi.engine.c.schedule import ALIGNMENT
from pyro_nfvi.engine.c.source import source
from pyro_nfvi.engine.record import Recording

Pointers = ctypes.Array
LONGEST, CHARACTERS_A_SECOND = 700_000, 35_000  # of code, for a compiler
SHORT = 100_000  # characters that are compiled for however few steps


class CProgram:
    """Compiled code of a recording; calling it gives new outputs.

    Args:
        recording: The graph.
        inputs: Example inputs, whose shapes and types are fixed from now on.
        draws: Example draws, whose strides are fixed too.
        num_trained: How many of the inputs, from the first, are parameters. If there are any, the
            first output is their ELBO, the others are the gradients of its negative, and
            :meth:`steps` is there.
        worth: Seconds that compilation may take.

    Raises:
        Unsupported: If an operation has no rule, a tensor is not on the CPU, or no compiler
            works.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor], draws: Sequence[Tensor],
                 num_trained: int = 0, worth: float = math.inf) -> None:
        examples = [_row_major(t) for t in inputs] + list(draws)
        graph = recording.graph
        if any(t.device.type != "cpu" for t in [*examples, *graph.buffers()]):
            raise Unsupported("tensors that are not on the CPU")
        lowering = Lowering(graph, examples)
        text = source(lowering, num_trained)
        if len(text) > min(LONGEST, max(SHORT, CHARACTERS_A_SECOND * worth)):
            raise Unsupported(f"{len(text) / 1e6:.2f} MB of code, which would take too long to "
                              "compile")
        self.library = load(text)
        connect(self.library)
        self.strides = [t.stride() for t in examples]
        self.kinds = [(tuple(t.shape), t.dtype) for t in examples]
        results = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        self.specs = [(n.meta["shape"], n.meta["dtype"]) for n in results]
        size = ctypes.c_int64.in_dll(self.library, "arena_bytes").value
        self.arena = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        self._arena = -(-self.arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        self.constants = [value for _, value in lowering.constants]
        self._constants = _pointers(self.constants)
        self._graph = self.library.graph
        self._graph.argtypes = [ctypes.c_void_p] * 4
        self._graph.restype = None
        if num_trained:
            self._steps = self.library.steps
            self._steps.argtypes = [ctypes.c_void_p if kind is None else kind for kind in (
                ctypes.c_int64, *[None] * 9, ctypes.c_int64, *[None] * 3)]
            self._steps.restype = None

    def __call__(self, inputs: Sequence[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph once.

        Raises:
            ValueError: If a tensor is not of the shape and type of the example.
        """
        given = [(tuple(t.shape), t.dtype) for t in (*inputs, *draws)]
        if given != self.kinds:
            raise ValueError("compiled code was called with tensors of other shapes or types than "
                             "it was compiled for")
        held = [t if t.stride() == strides else _strided(t, strides)
                for t, strides in zip([*inputs, *draws], self.strides, strict=True)]
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.specs]
        self._graph(_pointers(held), self._constants, _pointers(outputs), self._arena)
        return outputs

    def steps(self, state: AdamState, rates: Sequence[float], draws: Sequence[Tensor],
              elbo: list[float]) -> None:
        """Run Adam steps on draws ``(num_steps, *shape)``; stop before one that is not finite.

        Inputs that are no parameters come first among the draws.

        The ELBO of each step made is added to ``elbo``, also if Ctrl-C comes meanwhile.
        """
        count, known, dtype = len(rates), len(state.norms), state.live.dtype
        values, gradient = torch.empty(count, dtype=dtype), torch.empty(state.size, dtype=dtype)
        norms = torch.cat([torch.tensor(list(state.norms), dtype=dtype), values])
        done, saved_step = ctypes.c_int64(state.step), ctypes.c_int64(state.saved_step)
        outputs = [torch.empty((), dtype=dtype), *_parts(gradient, state.parameters)]
        try:
            self._steps(count, ctypes.byref(done), state.live.data_ptr(), state.saved.data_ptr(),
                        ctypes.byref(saved_step), (ctypes.c_double * count)(*rates),
                        _pointers(draws), self._constants, values.data_ptr(), norms.data_ptr(),
                        known, gradient.data_ptr(), _pointers(outputs), self._arena)
        finally:
            made = done.value - state.step
            state.step, state.saved_step = done.value, saved_step.value
            state.norms.extend(norms[known:known + made].tolist())
            elbo.extend(values[:made].tolist())


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of a flat tensor, one for each of the others."""
    return list(flat.split([t.numel() for t in like]))


def _pointers(tensors: Sequence[Tensor]) -> Pointers:
    return (ctypes.c_void_p * max(len(tensors), 1))(*[t.data_ptr() for t in tensors])


def _row_major(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor.detach())
