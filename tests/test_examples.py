"""The examples run, and find what they promise."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["centred", "non_centred"])
def test_eight_schools_agrees_with_nuts(form, tmp_path):
    pareto_k, gap = load("eight_schools").fit(form, 1500, tmp_path)
    assert pareto_k < 0.7
    assert gap < 0.1  # posterior standard deviations
    assert {p.suffix for p in tmp_path.iterdir()} == {".png", ".nc"}


def test_logistic_regression_predicts_held_out_biopsies(tmp_path, monkeypatch, capsys):
    example = load("logistic_regression")
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--num-steps", "300"])
    example.main()
    printed = capsys.readouterr().out
    assert "Verdict: good" in printed
    assert float(printed.split("accuracy ")[1].split(",")[0]) > 0.93
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_eight_schools_demo_runs_as_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    load("eight_schools").main()
    assert len(list(tmp_path.iterdir())) == 4
