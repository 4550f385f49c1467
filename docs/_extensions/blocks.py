"""The Python of a page: its blocks, run in order, with what each prints and draws.

A block is fenced by ```` ```python ````; all blocks of a page share one namespace and a temporary
folder. ```` ```python raises ```` expects an error, whose words are then what it prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)```python(?P<options>[^\n]*)\n(?P<code>.*?)^ *```$",
                   re.M | re.S)
DPI = 160
PAGE = "page"  # name of the module that a page is


@dataclass(frozen=True)
class Block:
    """One block of code and where it is."""

    code: str
    line: int
    raises: bool
    indent: str  # of a block inside a list
    end: int  # position in the text, behind the closing fence


@dataclass(frozen=True)
class Result:
    """What a block printed, and the pictures it left open, as PNG files."""

    block: Block
    printed: str
    pictures: tuple[bytes, ...]


def blocks_of(text: str) -> list[Block]:
    """The blocks of Markdown text, in order."""
    return [Block(dedent(match["code"]), text.count("\n", 0, match.start("code")),
                  "raises" in match["options"].split(), match["indent"], match.end())
            for match in FENCE.finditer(text)]


def run(text: str, name: str) -> list[Result]:
    """Run the blocks of a page from a fresh state; an error says which line of it."""
    with _fresh_state() as namespace:
        return [_run_block(block, namespace, name) for block in blocks_of(text)]


def _run_block(block: Block, namespace: dict[str, Any], name: str) -> Result:
    printed = io.StringIO()
    code = compile("\n" * block.line + block.code, name, "exec")
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        if block.raises:
            print(_error_of(code, namespace, f"{name}, line {block.line + 1}"))
        else:
            exec(code, namespace)
    return Result(block, printed.getvalue().rstrip(), tuple(_pictures()))


def _error_of(code: Any, namespace: dict[str, Any], place: str) -> str:
    try:
        exec(code, namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{place}: expected an error, got none.")


def _pictures() -> Iterator[bytes]:
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=DPI, transparent=True)
        yield picture.getvalue()
    plt.close("all")


@contextlib.contextmanager
def _fresh_state() -> Iterator[dict[str, Any]]:
    """The namespace of a page; a folder of its own, the seed of all, and warnings as errors.

    The namespace is that of a module that can be imported, so that its classes can be pickled.
    """
    import matplotlib
    import pyro

    from pyro_nfvi import NFVI

    matplotlib.use("Agg")
    before, defaults = os.getcwd(), dict(NFVI.__init__.__kwdefaults__)
    page = sys.modules[PAGE] = ModuleType(PAGE)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        os.chdir(folder)
        NFVI.__init__.__kwdefaults__["progress"] = False
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        try:
            yield page.__dict__
        finally:
            del sys.modules[PAGE]
            NFVI.__init__.__kwdefaults__.update(defaults)
            pyro.clear_param_store()
            os.chdir(before)


def pages(docs: Path) -> list[Path]:
    """The pages whose code is run: all but those of the gallery and of the reference."""
    return sorted(path for path in docs.rglob("*.md")
                  if not {"gallery", "api", "measured"} & set(path.relative_to(docs).parts))
