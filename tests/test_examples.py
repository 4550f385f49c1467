"""The examples run, and find what they promise."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pyro_nfvi import NFVI

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", [pytest.param("centred", marks=pytest.mark.slow), "non_centred"])
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


def test_a_vae_of_digits_draws_and_writes(tmp_path, monkeypatch, capsys):
    example = load("vae")
    monkeypatch.setattr(example, "NUM_JUDGED", 40)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path), "--epochs", "40",
                                      "--posterior", "planar"])
    example.main()
    printed = capsys.readouterr().out
    assert float(printed.split("held-out ELBO")[1].split()[0]) > -115
    assert {p.name for p in tmp_path.iterdir()} == {"vae_digits.png", "vae_digits.nc"}


def test_a_vae_reads_files_of_images_and_refuses_others(tmp_path):
    example = load("vae")
    bits = {name: np.zeros((3, 98), np.uint8) for name in ("train", "valid", "test")}
    np.savez(tmp_path / "mnist.npz", **bits)
    np.savez(tmp_path / "faces.npz", images=np.zeros((500, 560), np.uint8))
    np.savez(tmp_path / "other.npz", pixels=np.zeros((3, 5)))
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    assert example.from_file(tmp_path / "mnist.npz").train.shape == (3, 28, 28)
    assert example.from_file(tmp_path / "faces.npz").train.shape == (100, 28, 20)
    with pytest.raises(ValueError, match=r"should hold .* it holds pixels \(5,\)"):
        example.from_file(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="is not a readable npz file"):
        example.from_file(tmp_path / "broken.npz")


@pytest.mark.slow
def test_amortized_effects_agree_with_posteriors_of_their_own(tmp_path, monkeypatch):
    example = load("amortized_groups")
    monkeypatch.setattr(example, "NFVI", partial(NFVI, num_steps=1000, progress=False))
    errors = example.run(num_groups=8, num_steps=600, out=tmp_path)
    assert errors["groups"] < 0.4  # posterior standard deviations
    assert errors["new"] < 1.5  # eight groups are few to learn to read others from
    assert [p.name for p in tmp_path.iterdir()] == ["amortized_groups.png"]


def test_two_moons_are_learned_and_drawn(tmp_path):
    assert load("density_estimation").moons(600, tmp_path) < 1.4  # a Gaussian has 1.92
    assert {p.name for p in tmp_path.iterdir()} == {"moons.png", "moons_fit.png"}


@pytest.mark.slow
def test_an_emulator_stands_in_for_a_likelihood():
    example = load("density_estimation")
    assert example.infer(example.emulate(2000)) < 0.8  # posterior standard deviations


@pytest.mark.slow
def test_eight_schools_demo_runs_as_a_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    load("eight_schools").main()
    assert len(list(tmp_path.iterdir())) == 4
