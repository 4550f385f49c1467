"""Sphinx extension: the code of every page runs, and its output stands below it.

Nothing on a page is pasted in. Results are kept beside the built pages until the page or the
library changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

import blocks
from gallery import package_code
from sphinx.util import logging

logger = logging.getLogger(__name__)
WIDTH = 88  # characters of a line of code


def read(app: Any, docname: str, source: list[str]) -> None:
    """Add to the text of a page what its blocks print and draw."""
    path = Path(app.env.doc2path(docname))
    if path not in blocks.pages(Path(app.srcdir)):
        return
    text, folder = source[0], Path(app.outdir).parent / "executed"
    how = Path(blocks.__file__).read_text()
    key = hashlib.sha256(f"{text}{how}{package_code()}".encode()).hexdigest()[:16]
    name = docname.replace("/", "_")
    kept = folder / f"{name}-{key}.json"
    if not kept.exists():
        try:
            results = blocks.run(text, str(path))
        except Exception as error:
            logger.exception("%s: the code of the page fails: %s", docname, error)
            logger.warning("%s: %s: %s", docname, type(error).__name__, error)
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([_kept(result, folder, f"{name}-{key}-{i}")
                                    for i, result in enumerate(results)]))
    found = json.loads(kept.read_text())
    for block, result in reversed(list(zip(blocks.blocks_of(text), found, strict=True))):
        shown = indent(_shown(app, docname, result, block.raises), block.indent)
        text = text[:block.end] + shown + text[block.end:]
    source[0] = text.replace("```python raises", "```python")


def _kept(result: blocks.Result, folder: Path, name: str) -> dict[str, Any]:
    pictures = []
    for i, picture in enumerate(result.pictures):
        path = folder / f"{name}-{i}.png"
        path.write_bytes(picture)
        pictures.append(path.name)
    return {"printed": result.printed, "pictures": pictures}


def _shown(app: Any, docname: str, result: dict[str, Any], raises: bool) -> str:
    """Markdown of the output, behind the block."""
    shown, depth = "", docname.count("/")
    if result["printed"]:
        kind, lines = "error" if raises else "output", result["printed"].split("\n")
        printed = "\n".join(wrapped for line in lines for wrapped in _wrapped(line))
        shown += f"\n\n````{{code-block}} text\n:class: {kind}\n\n{printed}\n````"
    for name in result["pictures"]:
        up = "../" * depth
        shown += (f"\n\n```{{raw}} html\n<img class=\"picture\" loading=\"lazy\" alt=\"Picture "
                  f"drawn by the code above\" src=\"{up}_static/executed/{name}\">\n```")
        app.env.metadata[docname].setdefault("executed", []).append(name)
    return shown


def _wrapped(line: str) -> list[str]:
    """The line, in several if it is wider than a page."""
    return wrap(line, WIDTH, subsequent_indent="    ", break_long_words=False) or [""]


def copy_pictures(app: Any, error: Exception | None) -> None:
    """Put the pictures of all pages beside them."""
    if error is not None or app.builder.format != "html":
        return
    folder, target = Path(app.outdir).parent / "executed", Path(app.outdir) / "_static/executed"
    target.mkdir(parents=True, exist_ok=True)
    used = {name for data in app.env.metadata.values() for name in data.get("executed", [])}
    for name in used:
        (target / name).write_bytes((folder / name).read_bytes())


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("source-read", read)
    app.connect("build-finished", copy_pictures)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
