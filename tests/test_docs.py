"""The README's Python runs as it stands."""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pytest

from pyro_nfvi import NFVI

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_runs_from_top_to_bottom(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    defaults = {**NFVI.__init__.__kwdefaults__, "num_steps": 1500}  # time for a test
    monkeypatch.setattr(NFVI.__init__, "__kwdefaults__", defaults)
    pyro.clear_param_store()
    namespace: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
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
