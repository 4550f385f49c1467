"""What tables of benchmarks share: markdown, numbers of few digits, and where they were made."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def number(x: float | None) -> str:
    """Two digits or so."""
    if x is None or math.isnan(x):
        return "-"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    if abs(x) >= 1e5:
        return f"{x:.1e}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; numbers are rounded."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cells in rows:
        shown = [cell if isinstance(cell, str) else str(cell) if isinstance(cell, int) else
                 number(cell) for cell in cells]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """Version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(packages: Sequence[str]) -> str:
    """One line about processor, Python, and packages, those that are not there included."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    words = [f"{name} {installed(name) or 'not installed'}" for name in packages]
    return ", ".join([f"{processor}, {os.cpu_count()} cores; Python {platform.python_version()}",
                      *words])


def parse(text: str) -> list[list[dict[str, str]]]:
    """The tables of a markdown text, each a list of rows, cells by the head of their column."""
    found: list[list[dict[str, str]]] = []
    head: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if head is None:
            head = cells
            found.append([])
        elif not set(line) <= set("|-: "):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found
