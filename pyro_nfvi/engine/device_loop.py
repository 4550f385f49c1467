"""Adam steps that never wait for the host: what a GPU runs between two looks at the outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_nfvi.engine.adam import CLIP_FACTOR, CLIP_WINDOW, SNAPSHOT_EVERY, AdamState

WARM_UPS = 3  # runs before a capture, in which libraries allocate their workspaces


class DeviceLoop:
    """The steps of :class:`AdamState`, on tensors alone.

    A step that is not finite leaves everything as it was, and so do those after it: the host
    learns of it when it next looks.

    Args:
        graph: ``(*parameters, *draws) -> (ELBO, *gradients of its negative)``.
        state: What to optimise.
        draws: Example draws of one step.
        capture: Whether to capture a step as a CUDA graph.
    """

    def __init__(self, graph: Callable, state: AdamState, draws: Sequence[Tensor],
                 capture: bool = True) -> None:
        self.graph, self.state = graph, state
        self.draws = [draw.clone() for draw in draws]
        like = state.live
        self.window = torch.full((CLIP_WINDOW,), torch.nan, dtype=like.dtype, device=like.device)
        self.rate, self.elbo, self.norm = (like.new_zeros(()) for _ in range(3))
        self.alive = torch.ones((), dtype=torch.bool, device=like.device)
        self.step, self.saved_step = (torch.zeros((), dtype=torch.long, device=like.device)
                                      for _ in range(2))
        self.launch: Callable[[], None] = self._captured() if capture else self._step

    @torch.no_grad()
    def run(self, rates: Sequence[float], draws: Sequence[Tensor], elbo: list[float]) -> None:
        """Run Adam steps on draws ``(num_steps, *shape)``; those made add to ``elbo``."""
        self._load()
        device, before = self.window.device, self.state.step
        all_rates = torch.tensor(rates, dtype=self.window.dtype).to(device, non_blocking=True)
        seen = []
        for i in range(len(rates)):
            torch._foreach_copy_([self.rate, *self.draws], [all_rates[i], *(d[i] for d in draws)])
            self.launch()
            seen.append(torch.stack([self.elbo, self.norm]))
        self.state.step, self.state.saved_step = self.step.item(), self.saved_step.item()
        values, norms = torch.stack(seen, -1)[:, :self.state.step - before].tolist()
        self.state.norms.extend(norms)
        elbo.extend(values)

    def _load(self) -> None:
        """Take over the state as the host has it."""
        norms = list(self.state.norms)
        self.window.fill_(torch.nan)
        self.window[:len(norms)] = torch.tensor(norms, dtype=self.window.dtype)
        self.window.copy_(self.window.roll(self.state.step % CLIP_WINDOW - len(norms)))
        self.step.fill_(self.state.step)
        self.saved_step.fill_(self.state.saved_step)
        self.alive.fill_(True)

    @torch.no_grad()
    def _step(self) -> None:
        state = self.state
        value, *gradients = self.graph(*state.views(), *self.draws)
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        norm = torch.linalg.vector_norm(gradient)
        self.alive.logical_and_(value.isfinite() & norm.isfinite())
        limit = CLIP_FACTOR * self.window.nanquantile(0.5).nan_to_num(nan=torch.inf)
        gradient = gradient * (limit / (norm + 1e-6)).clamp(max=1)
        place = (self.step % CLIP_WINDOW).unsqueeze(0)
        self.step.add_(self.alive)
        state.live.copy_(torch.where(self.alive, self._updated(gradient), state.live))
        self.elbo.copy_(value)
        self.norm.copy_(torch.minimum(norm, limit))
        kept = torch.where(self.alive, self.norm, self.window[place])
        self.window.index_copy_(0, place, kept)
        snapshot = self.alive & ((self.step - 1) % SNAPSHOT_EVERY == 0)
        state.saved.copy_(torch.where(snapshot, state.live, state.saved))
        self.saved_step.copy_(torch.where(snapshot, self.step, self.saved_step))

    def _updated(self, gradient: Tensor) -> Tensor:
        """Parameters and moments after the step."""
        theta, m, v = self.state.live
        count = self.step.to(gradient.dtype)
        m = torch.lerp(m, gradient, 0.1)
        v = 0.999 * v + 0.001 * gradient * gradient
        root = (v / (1 - 0.999 ** count)).sqrt() + 1e-8
        return torch.stack([theta - self.rate / (1 - 0.9 ** count) * m / root, m, v])

    def _captured(self) -> Callable[[], None]:
        """The step as one launch; capturing leaves the state as it was."""
        held = [self.state.live, self.state.saved, self.window, self.step, self.saved_step]
        before = [t.clone() for t in held]
        launch = captured(self._step)
        torch._foreach_copy_(held, before)
        return launch


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """A function of tensors that stay where they are, as one launch of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
