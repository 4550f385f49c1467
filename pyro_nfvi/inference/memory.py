"""What the stages of a fit will take of the memory, said before they start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from pyro_nfvi._memory import check_memory, computed_bytes, step_bytes
from pyro_nfvi.flows import Flow
from pyro_nfvi.inference import lbfgs, pathfinder
from pyro_nfvi.inference.importance import CHUNK_BYTES, NUM_SAMPLES
from pyro_nfvi.inference.initialization import MORE_STARTS, NUM_STARTS
from pyro_nfvi.inference.score import BACKWARD, BATCH_BYTES

SAMPLE_COPIES = 3  # of all draws, while they are weighed and looked at


def check_start_memory(flow: Flow, log_joint: Callable[[Tensor], Tensor]) -> None:
    """Refuse a Gaussian stage, and the draws that judge it, for which there is no memory.

    Args:
        flow: The guide's flow, whose latents are counted.
        log_joint: The model and its data.

    Raises:
        ValueError: If fewer bytes are free than it takes.
    """
    zeros = flow.base.zeros
    needed = start_bytes(log_joint, zeros)
    check_memory("NFVI", needed, f"the Gaussian stage ({NUM_STARTS} starts and {NUM_SAMPLES:,} "
                 f"draws of {len(zeros):,} latents)", _advice(zeros), zeros.device)


def check_step_memory(flow: Flow, log_joint: Callable[[Tensor], Tensor], objective: Callable,
                      num_particles: int, parameters: Sequence[Tensor], *, recorded: bool = True
                      ) -> None:
    """Refuse to train a flow if there is no memory for a step and the draws that judge it.

    Args:
        flow: The flow.
        log_joint: The model and its data.
        objective: What is maximised.
        num_particles: Draws of each step.
        parameters: Tensors to optimise.
        recorded: Whether the step is recorded, as every ``compile`` but ``"eager"`` does.

    Raises:
        ValueError: If fewer bytes are free than it takes.
    """
    def step(count: int) -> None:
        elbo = objective(flow, log_joint, count)[0]
        torch.autograd.grad(-elbo.mean(), list(parameters), materialize_grads=True)
    zeros, needed = flow.base.zeros, 0
    with suppress(RuntimeError, ValueError, TypeError):  # a step then says itself what is wrong
        needed = step_bytes(step, num_particles, parameters, recorded=recorded)
    needed = max(needed, sample_bytes(zeros))
    size = sum(p.numel() for p in parameters)
    check_memory("NFVI", needed, f"the flow ({num_particles:,} particles x {len(zeros):,} latents, "
                 f"{size:,} parameters)", "Take fewer particles (num_particles), a smaller guide "
                 f"(AutoFlow(model, realnvp, num_layers=2)) or minibatches{_half(zeros)}",
                 zeros.device)


@torch.no_grad()
def start_bytes(log_joint: Callable[[Tensor], Tensor], zeros: Tensor) -> int:
    """Most memory of the Gaussian stage: paths, their memories, scores, and draws.

    Args:
        log_joint: The model and its data.
        zeros: A point.
    """
    number, dim = zeros.element_size() * zeros.numel(), zeros.numel()
    memory = min(max(6, dim), 20)
    paths = MORE_STARTS * (2 * pathfinder.NUM_STEPS + 6 * memory + 4 * lbfgs.WORKING) * number
    one = 0.0
    with suppress(torch.linalg.LinAlgError):
        one = computed_bytes(lambda: log_joint(zeros.expand(2, -1))) / 2
    scores = max(BATCH_BYTES, (1 + BACKWARD) * one)
    return int(max(paths + scores, sample_bytes(zeros)))


def sample_bytes(zeros: Tensor) -> int:
    """Memory of the draws that judge a fit.

    Args:
        zeros: A point.
    """
    return int(SAMPLE_COPIES * NUM_SAMPLES * zeros.numel() * zeros.element_size() + CHUNK_BYTES)


def _advice(zeros: Tensor) -> str:
    return f"Take minibatches, or a machine with more memory{_half(zeros)}"


def _half(zeros: Tensor) -> str:
    return ", or half the memory (dtype=torch.float32)" if zeros.dtype == torch.float64 else ""
