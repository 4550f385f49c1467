"""What a release promises beside the code: measured tables, files, types, a wheel that works."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pyro_nfvi

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PLAIN = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*words: str) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=PLAIN, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------ measured tables

def test_every_table_of_the_readme_is_the_measured_one():
    run("benchmarks/run.py", "--check")
    assert len(re.findall(r"<!-- table: \w+ -->", README.read_text())) >= 5


def test_a_table_that_was_edited_by_hand_is_found(tmp_path):
    code = ("import sys; sys.path.insert(0, 'benchmarks'); import run\n"
            "text = run.README.read_text()\n"
            "assert run.stale(text) == [] and run.written(text) == text\n"
            "edited = text.replace('| NFVI |', '| NFVI, the best |')\n"
            "assert run.stale(edited) == ['guides'], run.stale(edited)\n"
            "assert run.written(edited) == text\n")
    run("-c", code)


def test_the_benchmarks_say_what_is_missing_and_still_run():
    listed = run("benchmarks/run.py", "--list")
    for name in ["guides", "flows", "posteriors"]:
        assert f"| {name} |" in listed
    for package in ["pymc", "numpyro", "zuko"]:
        found = find_spec(package) is not None
        assert (f"{package} not installed" in listed) != found
    left_out = run("benchmarks/run.py", "posteriors", "loo", "--quick")
    assert "it needs --posteriors PATH or $PYRO_NFVI_POSTERIORS" in left_out
    assert "it has no quick form" in left_out


def test_every_benchmark_is_in_the_list():
    listed = run("benchmarks/run.py", "--list")
    helpers = {"run", "tables", "guides_models", "guides_fits", "pathologies",
               "posteriors_baselines"}
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - helpers
    missing = [name for name in scripts if f"| {name} |" not in listed and "_worker_" not in name]
    assert not missing, f"benchmarks/run.py does not know {missing}"


def test_a_wrong_name_of_a_table_is_refused_with_the_right_ones():
    done = subprocess.run([sys.executable, "benchmarks/run.py", "guide"], cwd=ROOT, env=PLAIN,
                          text=True, capture_output=True)
    assert done.returncode == 2
    assert "no table guide; there are: guides," in done.stderr


# ------------------------------------------------------------------ files

@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_inside_the_project_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    broken = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not broken, f"{page} links to {broken}"


def test_version_and_licence_are_the_same_everywhere():
    citation, project = (ROOT / "CITATION.cff").read_text(), (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {pyro_nfvi.__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
    assert 'license = "Apache-2.0"' in project
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_citation_file_has_what_its_schema_requires():
    keys = re.findall(r"^(\S[\w-]*):", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert {"cff-version", "message", "title", "authors"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_there_are_issue_templates_for_errors_posteriors_and_wishes():
    assert {path.stem for path in TEMPLATES} == {"bug", "posterior", "feature", "config"}


def test_what_the_issue_templates_ask_to_run_runs():
    texts = [path.read_text() for path in TEMPLATES]
    codes = {code for text in texts for code in re.findall(r'python -c "(.*?)"', text)}
    assert len(codes) == 1  # the same in all
    assert f"'pyro_nfvi': '{pyro_nfvi.__version__}'" in run("-c", codes.pop())


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split()
    described = re.findall(r"^([a-z-]+):.*?## \S", text, flags=re.MULTILINE)
    assert sorted(targets) == sorted(described)


# ------------------------------------------------------------------ types and wheel

def test_the_package_says_that_it_has_types():
    assert (Path(pyro_nfvi.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy comes with the extra 'lint'")
def test_a_strict_reader_of_types_knows_the_public_names(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull,
         "--follow-imports", "silent", "--cache-dir", str(tmp_path), "tests/typed_use.py"],
        cwd=ROOT, text=True, capture_output=True)
    mine = [line for line in done.stdout.splitlines() if line.startswith("tests/typed_use.py")]
    assert not mine, "\n".join(mine)
    assert "Success" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_the_smoke_test_of_the_wheel_passes_here():
    assert f"pyro_nfvi {pyro_nfvi.__version__} works" in run("tests/smoke.py")
