"""Ways to run a recorded function, other than generated C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from pyro_nfvi.engine.adam import AdamState
from pyro_nfvi.engine.device_loop import DeviceLoop, captured
from pyro_nfvi.engine.draws import Replay
from pyro_nfvi.engine.record import Recording


class PythonProgram:
    """The function itself, at given inputs and draws.

    Args:
        function: The function, which takes its inputs from ``live``.
        live: Its inputs.
    """

    def __init__(self, function: Callable[[], Sequence[Tensor]], live: Sequence[Tensor]) -> None:
        self.function, self.live = function, list(live)

    def __call__(self, inputs: Sequence[Tensor], draws: Sequence[Tensor] | None = None
                 ) -> list[Tensor]:
        """Run it; without draws it makes its own."""
        with torch.no_grad():
            for tensor, value in zip(self.live, inputs, strict=True):
                if tensor.data_ptr() != value.data_ptr() and not torch.equal(tensor, value):
                    tensor.copy_(value)
        with nullcontext() if draws is None else Replay(draws):
            return [output.detach() for output in self.function()]


class GraphProgram:
    """The recorded graph, operation by operation.

    Args:
        recording: The graph.
    """

    def __init__(self, recording: Recording) -> None:
        self.graph: Callable = recording.graph

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        """Run the graph."""
        return list(self.graph(*inputs, *[draw.contiguous() for draw in draws]))


class InductorProgram(GraphProgram):
    """The recorded graph, compiled by torch's own compiler at the first call.

    Args:
        recording: The graph.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.graph = torch.compile(recording.graph, fullgraph=True, dynamic=False)


class CudaGraphProgram(GraphProgram):
    """The recorded graph, captured once and launched as a whole on a GPU.

    Args:
        recording: The graph.
        inputs: Example inputs.
        draws: Example draws.
        num_trained: How many of the inputs, from the first, are parameters.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor], draws: Sequence[Tensor],
                 num_trained: int = 0) -> None:
        super().__init__(recording)
        self.held = [t.detach().clone() for t in [*inputs, *draws]]
        self.example = [*inputs[num_trained:], *draws]
        self.outputs: list[Tensor] = []
        self.launch = captured(self._run)
        self.loop: DeviceLoop | None = None

    @torch.no_grad()
    def _run(self) -> None:
        self.outputs = list(self.graph(*self.held))

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], draws: Sequence[Tensor]) -> list[Tensor]:
        """Copy the inputs in and launch."""
        torch._foreach_copy_(self.held, [*inputs, *draws])
        self.launch()
        return [output.clone() for output in self.outputs]

    def steps(self, state: AdamState, rates: Sequence[float], draws: Sequence[Tensor],
              elbo: list[float]) -> None:
        """Run Adam steps on draws ``(num_steps, *shape)`` without waiting for the host."""
        if self.loop is None:
            self.loop = DeviceLoop(self.graph, state, self.example)
        self.loop.run(rates, draws, elbo)
