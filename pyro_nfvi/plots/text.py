"""Words on pictures and pages: labels as they are written, and what is not shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_LABEL = 24  # characters
WORST, LEAST = "worst k-hat first", "those that agree least first"


def printable(words: Any) -> str:
    """Text on one line, without the characters that a file of XML cannot hold."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
                   for c in " ".join(str(words).split()))


def short(label: str, most: int = MAX_LABEL) -> str:
    """A label with its middle left out where it is long."""
    label = printable(label)
    half = (most - 1) // 2
    return label if len(label) <= most else f"{label[:most - 1 - half]}…{label[-half:]}"


def left_out(count: int, what: str, order: str) -> str:
    """That some are not shown, in words; nothing if all are."""
    return f"{order}; {count:,} more {what} left out" if count > 0 else ""


def order_words(pareto_k: Mapping[str, float] | None, reference: Any) -> str:
    """By what the components that are shown were chosen."""
    if pareto_k:
        return WORST
    return "in the model's order" if reference is None else "farthest from the reference first"
