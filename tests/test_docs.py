"""The README and the pages of the documentation run as they stand, and describe all public names.

``make docs`` builds the pages and follows their links.
"""

import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pytest

from pyro_nfvi import NFVI

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
sys.path.insert(0, str(DOCS / "_extensions"))
import blocks  # noqa: E402
import check_site  # noqa: E402

WIDTH = 88  # characters of a line of code that a page shows without scrolling
WITH_CODE = [path for path in blocks.pages(DOCS) if "```python" in path.read_text()]
SLOW = ("amortized", "choosing_a_guide", "compiled_loop", "diagnostics", "index", "migrating",
        "recipe", "scaling")  # run by the build of the site as well
ROOMS = ("calibration", "diagnostics", "engine", "flows", "guides", "inference", "plots", "vae",
         "testing")
HERE = importlib.import_module("pyro_nfvi")


def test_the_readme_runs_from_top_to_bottom(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    defaults = {**NFVI.__init__.__kwdefaults__, "num_steps": 1500}  # time for a test
    monkeypatch.setattr(NFVI.__init__, "__kwdefaults__", defaults)
    pyro.clear_param_store()
    namespace: dict = {}
    found = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(found) >= 3
    for block in found:
        exec(compile(block, str(README), "exec"), namespace)
    assert "Verdict: good" in capsys.readouterr().out
    assert namespace["idata"]["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert namespace["draws"]["theta"].shape == (100, 8)
    assert not namespace["mean_field"].summary().trusted
    assert namespace["calibration"].calibrated
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "mean_field.nc"}
    plt.close("all")


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"])
def test_the_project_files_are_there(name):
    assert (README.parent / name).stat().st_size > 500


# ------------------------------------------------------------------ the pages

def page_param(path):
    """A page as a parameter of a test."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))


@pytest.mark.parametrize("path", [page_param(path) for path in WITH_CODE])
def test_the_code_of_a_page_runs(path):
    for result in blocks.run(path.read_text(), str(path)):
        assert result.block.code.strip()
        assert result.printed or not result.block.raises


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_no_code_of_a_page_is_left_out_or_too_wide(path):
    text = path.read_text()
    found = blocks.blocks_of(text)
    assert text.count("```python") == len(found), "a fence that does not close"
    wide = [line for block in found for line in block.code.splitlines() if len(line) > WIDTH]
    assert not wide, f"wider than {WIDTH} characters: {wide}"


def test_blocks_share_a_namespace_print_draw_and_fail_as_told():
    text = ("```python\nimport matplotlib.pyplot as plt\nx = 2\n```\n"
            "- a list\n\n  ```python\n  print(x + 1)\n  _ = plt.plot([x])\n  ```\n"
            "```python raises\nraise KeyError(x)\n```\n")
    first, second, third = blocks.run(text, "page")
    assert (first.printed, second.printed, third.printed) == ("", "3", "KeyError: 2")
    assert [len(result.pictures) for result in (first, second, third)] == [0, 1, 0]
    with pytest.raises(AssertionError, match="page, line 2: expected an error"):
        blocks.run("```python raises\nx = 1\n```\n", "page")


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">b</a> <a href="#here">a')
    (tmp_path / "b.html").write_text('<a href="https://pyro.ai">Pyro</a><script src="//cdn/x.js">')
    assert check_site.problems(tmp_path) == [
        "a.html links to b.html#there, which is not there",
        "b.html fetches //cdn/x.js from outside"]


# ------------------------------------------------------------------ the reference

@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_in_the_reference(room):
    pages = [(DOCS / "api" / f"{name}.md").read_text() for name in (room, "inference")]
    names = importlib.import_module(f"pyro_nfvi.{room}").__all__
    missing = [name for name in names
               if not any(f":: {name}\n" in page for page in pages)]
    assert not missing, f"not in docs/api/{room}.md: {missing}"


def test_every_name_of_the_package_is_on_its_page():
    page = (DOCS / "api" / "pyro_nfvi.md").read_text()
    flows = importlib.import_module("pyro_nfvi.flows").__all__
    missing = [name for name in HERE.__all__ if name not in flows
               and f":: {name}\n" not in page and f"`~pyro_nfvi.{name}`" not in page]
    assert not missing, f"not in docs/api/pyro_nfvi.md: {missing}"


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_has_an_example(room):
    module = importlib.import_module(f"pyro_nfvi.{room}".rstrip("."))
    parser = doctest.DocTestParser()
    missing = [name for name in module.__all__ if callable(getattr(module, name))
               and not parser.get_examples(inspect.getdoc(getattr(module, name)) or "")]
    assert not missing, f"no example in the docstrings of {missing}"
