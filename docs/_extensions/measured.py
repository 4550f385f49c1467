"""Sphinx extension: a page for each table of ``benchmarks/results``, and links that lead to it.

Pages are read in the repository as well, where ``../benchmarks/results/flows.md`` is the file
itself; on the site that file is the page ``measured/flows``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LINK = re.compile(r"\]\(\.\./benchmarks/results/(\w+\.md)\)")
PAGE = "```{{include}} ../../benchmarks/results/{name}\n:relative-images:\n```\n"


def write_pages(app: Any) -> None:
    """Write what has changed: Sphinx reads again what is newer."""
    folder = Path(app.srcdir) / "measured"
    wanted = {path.name: PAGE.format(name=path.name) for path in RESULTS.glob("*.md")}
    for page in folder.glob("*.md"):
        if page.name not in {"index.md", *wanted}:
            page.unlink()
    for name, text in wanted.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def relink(app: Any, docname: str, source: list[str]) -> None:
    """Rewrite the links of one page."""
    source[0] = LINK.sub(r"](measured/\1)", source[0])


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("builder-inited", write_pages)
    app.connect("source-read", relink)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
