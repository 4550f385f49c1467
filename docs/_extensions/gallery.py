"""Sphinx extension: the gallery, a page for each example, run while the documentation is built.

An example is a script in percent format: a docstring (title, question, how to run it), then cells
of Markdown and of Python. Each runs in a process of its own, cell by cell; what a cell prints and
the pictures it saves go below it on the page. Results are kept, and made anew as soon as code of
the script or of the package (docstrings aside) or a version below them changes.

In ``conf.py``: put this folder on ``sys.path``, and ``"gallery"`` among the extensions, beside
``"myst_parser"`` and ``"sphinx_design"``. ``-D gallery_run=0`` builds without running anything:
examples without fresh results are then shown without outputs.

    python docs/_extensions/gallery.py [--force] [NAME ...]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, PAGES = ROOT / "examples", ROOT / "docs" / "gallery" / "_generated"
GROUPS = {
    "First fits": ("eight_schools", "golf_putting", "logistic_regression"),
    "Hard shapes": ("funnel", "growth_curves", "sparse_regression"),
    "Series, curves and mixtures": ("nile", "gaussian_process", "change_point", "old_faithful"),
    "Densities and networks": ("density_estimation", "amortized_groups", "vae"),
}
HIDDEN = "remove-cell"  # as Jupyter Book calls it: run, not shown
TIMEOUT = 3600  # seconds for one example, on a machine with much else to do
THUMBNAIL = (640, 400)


# ---------------------------------------------------------------------- scripts


@dataclass
class Cell:
    """A piece of a script.

    Attributes:
        source: Markdown without its comment signs, or Python.
        code: Whether it is Python.
        hidden: Whether the page leaves it out.
        line: Lines of the script before it, so that errors name the right one.
    """

    source: str
    code: bool
    hidden: bool = False
    line: int = 0


@dataclass
class Example:
    """A script in percent format.

    Attributes:
        name: Its file, without the ending.
        title: First line of its docstring.
        question: The paragraph after it.
        cells: What follows the docstring.
    """

    name: str
    title: str
    question: str
    cells: list[Cell] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The script."""
        return EXAMPLES / f"{self.name}.py"

    @property
    def folder(self) -> Path:
        """Where its results are kept."""
        return PAGES / self.name


def read(path: Path) -> Example:
    """Read a script.

    Raises:
        ValueError: If it has no docstring with a title and a question, or no cells.
    """
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"\n\s*\n", ast.get_docstring(ast.parse(text)) or "")
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    if len(parts) < 2 or not starts:
        raise ValueError(f"{path.name} should begin with a docstring of a title and a question, "
                         "and go on in cells that begin with '# %%'.")
    cells = [_cell(lines, start, end)
             for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return Example(path.stem, parts[0].rstrip("."), " ".join(parts[1].split()), cells)


def _cell(lines: list[str], start: int, end: int) -> Cell:
    head, body = lines[start], lines[start + 1:end]
    if "[markdown]" in head:
        words = [re.sub(r"^# ?", "", line) for line in body]
        return Cell("\n".join(words).strip(), code=False)
    return Cell("\n".join(body).strip("\n"), True, HIDDEN in head, start + 1)


def examples() -> list[Example]:
    """All examples, in the order of the gallery; those that no group names come last."""
    known = [name for names in GROUPS.values() for name in names]
    others = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in known)
    return [read(EXAMPLES / f"{name}.py") for name in (*known, *others)]


# ---------------------------------------------------------------------- running


def run_cells(example: Example, out: Path) -> dict[str, Any]:
    """Run a script in this process; what each of its cells printed and drew."""
    sys.argv = [str(example.path), "--out", str(out)]
    names = {"__name__": "__main__", "__file__": str(example.path), "__doc__": example.title}
    start, cells = _processor_seconds(), []
    for cell in example.cells:
        before, printed = _pictures(out), io.StringIO()
        if cell.code:
            source = "\n" * cell.line + cell.source
            with contextlib.redirect_stdout(printed):
                exec(compile(source, example.path, "exec"), names)
        new = sorted(path for path, when in _pictures(out).items() if before.get(path) != when)
        cells.append({"text": printed.getvalue().rstrip(), "pictures": new})
    return {"seconds": _processor_seconds() - start, "cells": cells}


def _processor_seconds() -> float:
    """Of this process and of those it has started, such as the compiler."""
    return sum(os.times()[:4])


def _pictures(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}


def results(example: Example, run: bool = True, force: bool = False) -> dict[str, Any] | None:
    """Results of an example: kept ones if they are fresh, else new ones, if it may run.

    Raises:
        RuntimeError: If the example fails.
    """
    file, digest = example.folder / "results.json", fingerprint(example)
    if file.exists() and not force:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["digest"] == digest:
            return kept
    if not run:
        return None
    shutil.rmtree(example.folder, ignore_errors=True)
    example.folder.mkdir(parents=True)
    fresh = {"digest": digest, **_in_a_process(example)}
    _thumbnail(example, fresh)
    file.write_text(json.dumps(fresh, indent=1), encoding="utf-8")  # last: it makes the rest count
    return fresh


def _in_a_process(example: Example) -> dict[str, Any]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(Path(__file__).resolve()), "--run", example.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"The example {example.name} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _thumbnail(example: Example, found: dict[str, Any]) -> None:
    """Its first picture on paper of one size for all, so that cards line up."""
    from PIL import Image, ImageOps

    pictures = [name for cell in found["cells"] for name in cell["pictures"]]
    if not pictures:
        raise RuntimeError(f"The example {example.name} saved no picture.")
    with Image.open(example.folder / pictures[0]) as picture:
        small = ImageOps.pad(picture.convert("RGB"), THUMBNAIL, color="white")
    small.save(example.folder / "thumbnail.jpg", quality=88)


def fingerprint(example: Example) -> str:
    """Changes with the script's code, with the package's code, and with the versions below both.

    Words may change without a new run: pages are written anew at each build.
    """
    cells = [cell.source if cell.code else "" for cell in example.cells]
    parts = [package_code(), inspect.getsource(run_cells), *cells]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def package_code() -> str:
    """Versions, and a hash of the package's code without docstrings and comments."""
    versions = [f"{name} {importlib.metadata.version(name)}"
                for name in ("torch", "pyro-ppl", "arviz", "matplotlib", "numpy")]
    digest = hashlib.sha256(f"{sys.version_info[:2]} {versions}".encode())
    for path in sorted((ROOT / "pyro_nfvi").rglob("*.py")):
        digest.update(ast.dump(_bare(ast.parse(path.read_bytes()))).encode())
    return digest.hexdigest()


def _bare(tree: ast.AST) -> ast.AST:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


# ---------------------------------------------------------------------- pages


def page(example: Example, found: dict[str, Any] | None) -> str:
    """The page of an example, in MyST Markdown."""
    script = f"../../../examples/{example.name}.py"
    parts = [f"# {example.title}", example.question]
    outputs = found["cells"] if found else [{"text": "", "pictures": []}] * len(example.cells)
    for cell, output in zip(example.cells, outputs, strict=True):
        if cell.source and not cell.hidden:
            parts.append(_fenced("python", cell.source) if cell.code else cell.source)
        if output["text"]:
            parts.append(_fenced("{code-block} text\n:class: output", output["text"]))
        parts += [f"```{{image}} {example.name}/{name}\n:alt: {example.title}\n"
                  ":class: picture\n```" for name in output["pictures"]]
    link = f"{{download}}`{example.name}.py <{script}>`"
    parts.append(f"---\n{_how(found)} The whole script: {link}.")
    return "\n\n".join(parts) + "\n"


def _fenced(kind: str, body: str) -> str:
    return f"```{kind}\n{body}\n```" if kind == "python" else f"```{kind}\n\n{body}\n```"


def _how(found: dict[str, Any] | None) -> str:
    if found is None:
        return "This build of the documentation did not run the example: outputs are left out."
    ours, torch = (importlib.metadata.version(name) for name in ("pyro-nfvi", "torch"))
    return (f"Run while this page was built, with pyro_nfvi {ours} and torch {torch}, in "
            f"{found['seconds']:.0f} s of processor time.")


def cards(found: dict[str, dict[str, Any] | None]) -> str:
    """Grids of cards, one a group, and the table of contents, for ``index.md`` to include."""
    known = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "More": tuple(sorted(set(found) - known))}
    parts = []
    for title, names in groups.items():
        if names:
            inner = "\n\n".join(_card(read(EXAMPLES / f"{name}.py"), found[name]) for name in names)
            parts.append(f"## {title}\n\n````{{grid}} 1 2 3 3\n:gutter: 3\n\n{inner}\n````")
    contents = "\n".join(f"_generated/{name}" for names in groups.values() for name in names)
    parts.append(f"```{{toctree}}\n:hidden:\n\n{contents}\n```")
    return "\n\n".join(parts) + "\n"


def _card(example: Example, found: dict[str, Any] | None) -> str:
    picture = f":img-top: _generated/{example.name}/thumbnail.jpg\n:img-alt: {example.title}\n"
    return (f"```{{grid-item-card}} {example.title}\n:link: _generated/{example.name}\n"
            f":link-type: doc\n{picture if found else ''}\n{example.question}\n```")


def build(run: bool = True, force: bool = False, names: tuple[str, ...] = ()) -> None:
    """Run what has to be run, several at a time, and write pages and cards.

    Args:
        run: Whether examples may run.
        force: Whether to run them although their results are fresh.
        names: Those to run by force. Default: all.
    """
    PAGES.mkdir(parents=True, exist_ok=True)
    known = examples()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {example.name: pool.submit(results, example, run,
                                             force and example.name in (names or [example.name]))
                   for example in known}
        found = {name: future.result() for name, future in futures.items()}
    for example in known:
        _write(PAGES / f"{example.name}.md", page(example, found[example.name]))
    _write(PAGES / "cards.inc", cards(found))
    for old in {path.stem for path in PAGES.glob("*.md")} - set(found):
        (PAGES / f"{old}.md").unlink()
        shutil.rmtree(PAGES / old, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Write what has changed: Sphinx reads again what is newer."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Build the gallery before Sphinx looks for pages."""
    app.add_config_value("gallery_run", True, "env")
    app.connect("builder-inited", lambda app: build(run=app.config.gallery_run))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    """Build the gallery's pages without the rest of the documentation."""
    parser = argparse.ArgumentParser(description="Run the examples and write their pages.")
    parser.add_argument("names", nargs="*", help="examples to run although nothing changed")
    parser.add_argument("--force", action="store_true", help="run all of them")
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        example = read(EXAMPLES / f"{options.run}.py")
        print(json.dumps(run_cells(example, example.folder)))
    else:
        build(force=options.force or bool(options.names), names=tuple(options.names))
        print(f"pages in {PAGES}")


if __name__ == "__main__":
    main()
