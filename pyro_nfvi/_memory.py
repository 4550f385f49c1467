"""Memory: how much there is, how much a computation takes, and a refusal in time."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_nfvi._random import forked_rng

GIGABYTE = 1e9
UNKNOWN = sys.maxsize  # bytes, where no system says how many are free: nothing is refused
COPIES = 12  # of the parameters: moments, snapshots, what is trusted, gradients that are compared
FIXED = 30_000_000  # bytes of code and graphs, whatever the step
EAGER = 0.5  # of what a step computes that is alive at once, if it is not recorded
FEW, MORE = 2, 4  # particles of the two steps that tell what each further one takes
NO_LIMIT = 2 ** 60  # bytes above which a limit means that there is none


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be used on a device: free ones, within the limits of the process's group.

    On CUDA, what torch has reserved but does not use counts as free. Where nobody knows, it is
    more than any machine has.

    Args:
        device: The device. What is neither the CPU nor CUDA shares the CPU's memory.

    Example:
        >>> available_memory() > 2 ** 20
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    readers = {"linux": _linux, "darwin": _macos, "win32": _windows}
    with suppress(OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return readers[sys.platform]() if sys.platform in readers else UNKNOWN
    return UNKNOWN


def check_memory(owner: str, needed: float, what: str, advice: str,
                 device: torch.device | str = "cpu") -> None:
    """Refuse what does not fit into the memory that is free.

    Args:
        owner: Who needs the memory.
        needed: Bytes.
        what: What for.
        advice: The way out, as a sentence without its end.
        device: Where.

    Raises:
        ValueError: If fewer bytes are free.
    """
    free = available_memory(device)
    if needed > free:
        raise ValueError(f"{owner} would need about {_shown(needed)} for {what}, but "
                         f"{_shown(free)} are free. {advice}.")


def computed_bytes(function: Callable[[], Any]) -> int:
    """Bytes of all tensors that a function makes, views aside, whether or not they live long.

    The random state is as before.

    Example:
        >>> computed_bytes(lambda: torch.ones(1000).double().view(10, 100) + 1)
        20000
    """
    counter = _Counter()
    with forked_rng(), counter:
        function()
    return counter.total


def step_bytes(step: Callable[[int], Any], num_particles: int, parameters: Sequence[Tensor] = (),
               *, recorded: bool = True) -> int:
    r"""Memory of a training step, from two steps of a few particles.

    While a step is recorded everything in it is alive; this is the most that it ever takes, and
    linear in the number of particles :math:`P`. With :math:`b(P)` the bytes computed and
    :math:`\theta` the parameters,

    .. math:: b(2) + \frac{P - 2}{2} \left(b(4) - b(2)\right) + 12\,|\theta| + 30\,\mathrm{MB}

    Args:
        step: Computes the value and its gradients with so many particles.
        num_particles: Number of particles.
        parameters: What is trained.
        recorded: Whether the step is recorded; if not, about half of it is alive at once.

    Example:
        >>> w = torch.zeros(10, dtype=torch.double)
        >>> step_bytes(lambda n: torch.ones(n, 10, dtype=torch.double) * w, 10 ** 6, [w])
        190000960
    """
    few, more = (computed_bytes(lambda n=n: step(n)) for n in (FEW, MORE))  # type: ignore[misc]
    each = max(more - few, 0) / (MORE - FEW)
    own = sum(p.numel() * p.element_size() for p in parameters)
    live = 1.0 if recorded else EAGER
    return int(live * max(few + each * (num_particles - FEW), each) + COPIES * own + FIXED)


class _Counter(TorchDispatchMode):
    """Adds up the memory of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        old = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in old:
                self.total += leaf.numel() * leaf.element_size()
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shown(count: float) -> str:
    return f"{count / GIGABYTE:.2g} GB" if count < 10 * GIGABYTE else f"{count / GIGABYTE:,.0f} GB"


# ---------------------------------------------------------------------- what the systems say

def _linux(root: Path = Path("/")) -> int:
    """The least of what the machine has free and what each group of the process may still take."""
    text = (root / "proc/meminfo").read_text()
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    free = 1024 * int(found.group(1)) if found else UNKNOWN
    return max(min([free, *_group_limits(root)]), 0)


def _group_limits(root: Path) -> Iterator[int]:
    """What the control groups of the process, and those around them, leave (versions 1 and 2)."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, place = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / place.lstrip("/")
        for group in (folder, *folder.parents):  # in a container the path may lie outside
            if group == base.parent:
                break
            yield from _left(group, *names)


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # "max", or no such file
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        cached = 0
        with suppress(OSError):
            found = re.search(rf"^{reclaimable} (\d+)", (group / "memory.stat").read_text(),
                              re.MULTILINE)
            cached = int(found.group(1)) if found else 0
        if most < NO_LIMIT:
            yield most - used + cached


def _macos() -> int:
    """Pages that are free, or that the system gives up when asked."""
    text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True,
                          timeout=5).stdout
    return _macos_pages(text)


def _macos_pages(text: str) -> int:
    size = re.search(r"page size of (\d+) bytes", text)
    kinds = re.findall(r"Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", text)
    if not size or not kinds:
        return UNKNOWN
    return int(size.group(1)) * sum(map(int, kinds))


def _windows() -> int:
    """Physical memory that is free, by GlobalMemoryStatusEx."""
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong),  # noqa: RUF012
                    *((name, ctypes.c_ulonglong) for name in (
                        "total", "free", "total_page", "free_page", "total_virtual",
                        "free_virtual", "free_extended"))]
    status = Status(length=ctypes.sizeof(Status))
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    return int(status.free) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else UNKNOWN
