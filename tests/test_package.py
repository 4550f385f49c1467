"""The package as a whole: who imports whom, what importing does, what is public."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_nfvi
from pyro_nfvi import (
    calibration,
    diagnostics,
    engine,
    flows,
    guides,
    inference,
    plots,
    testing,
    vae,
)

ROOT = Path(pyro_nfvi.__file__).parent
ORDER = ["_shapes", "_random", "_memory", "_arviz", "_files", "engine", "flows", "guides",
         "inference", "diagnostics", "calibration", "plots", "storage", "posterior", "nfvi", "vae",
         "testing"]
ROOMS = [pyro_nfvi, engine, flows, guides, inference, diagnostics, calibration, plots, vae]
README = ROOT.parent / "README.md"


def room(path: Path) -> str:
    """First part of a file's place in the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file's import statements name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_nfvi"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names & set(ORDER)


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    place = ORDER.index(room(path))
    above = [name for name in imported_rooms(path) if ORDER.index(name) > place]
    assert not above, f"{path.name} in {room(path)} imports {above}, which lie above it"


def test_flows_do_not_import_pyro():
    nodes = [node for path in (ROOT / "flows").glob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert not [name for name in names if name.split(".")[0] == "pyro"]


def test_flows_work_in_a_process_without_pyro():
    code = ("import sys; sys.modules['pyro'] = None; from pyro_nfvi.flows import Flow, nsf; "
            "print(Flow(nsf(2))().sample().shape)")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_changes_nothing_in_torch_or_pyro():
    code = """
import random, numpy, torch, pyro, pyro.distributions as dist, warnings
def state():
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
            str(numpy.random.get_state()), random.getstate(), dist.Normal(0.0, 1.0)._validate_args,
            torch.distributions.Distribution._validate_args, pyro.settings.get(),
            dict(pyro.get_param_store()), len(warnings.filters), torch.get_num_threads(),
            pyro.infer.autoguide.AutoNormal, torch.distributions.Normal.log_prob)
before = state()
import pyro_nfvi, pyro_nfvi.testing
from pyro_nfvi import *
assert state() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_importing_does_not_import_arviz_or_matplotlib_pyplot():
    code = ("import sys; from pyro_nfvi import *; "
            "assert not {'arviz', 'matplotlib.pyplot', 'sklearn', 'zuko'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ROOMS, ids=lambda module: module.__name__)
def test_all_is_sorted_complete_and_importable(module):
    assert sorted(module.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)) == list(
        module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module", [*ROOMS, testing], ids=lambda module: module.__name__)
def test_every_public_object_has_a_docstring(module):
    public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    objects = [getattr(module, name) for name in public]
    bare = [o for o in objects if inspect.isclass(o) or inspect.isfunction(o)]
    missing = [o.__name__ for o in bare if not inspect.getdoc(o)]
    missing += [f"{o.__name__}.{name}" for o in bare if inspect.isclass(o)
                for name, member in vars(o).items()
                if inspect.isfunction(member) and not name.startswith("_")
                and not inspect.getdoc(getattr(o, name))]
    assert not missing, f"no docstring: {missing}"


@pytest.mark.parametrize("name", sorted(set(flows.__all__) - {
    "MLP", "MaskedMLP", "Base", "BaseDistribution", "Bijection", "FlowDistribution",
    "PartOfNoise", "Transformer"}))
def test_every_flow_has_its_place_in_the_readme(name):
    text = README.read_text()
    assert f"`{name}`" in text or f"{name}(" in text, f"{name} is not in the README's table"


def test_version_is_the_one_of_the_changelog():
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changelog or f"## {pyro_nfvi.__version__}" in changelog
