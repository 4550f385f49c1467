"""The picture of the README: eight schools by NUTS, by Pyro's AutoNormal and by NFVI.

    python benchmarks/picture.py        # docs/images/eight_schools.png, results/picture.json

The model is centered, so that the posterior narrows as the spread between schools goes to zero.
NUTS is NumPyro's, on the noncentered form of the same posterior. AutoNormal is trained until
it is still: 3,000 steps of 16 particles, the rate falling from 0.03. Draws are unweighted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from guides_fits import TUNED, nfvi, numpyro_nuts, pyro_guide
from guides_models import CASES, Arrays

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "eight_schools.png"
RESULT = Path(__file__).with_name("results") / "picture.json"
SHOWN = 2000
INK, COLOURS = "#444444", ["#777777", "#c2571a", "#1f6fb4"]


def fits() -> tuple[dict[str, Arrays], dict[str, dict[str, Any]]]:
    """Draws by method, and what is known of those that are guides."""
    case, twin = CASES["schools, centered"], CASES["schools, noncentered"]
    chains, _ = numpyro_nuts(twin, 0)
    exact = {**chains, "theta": chains["mu"][:, None] + chains["tau"][:, None] * chains["shift"]}
    normal, normal_row = pyro_guide(case, 0, name="AutoNormal", budget=TUNED)
    flow, flow_row = nfvi(case, 0)
    said = {"k": flow_row["k"], "summary": [flow_row["numbers"], flow_row["verdict"]]}
    return ({"NUTS": exact, "AutoNormal": normal, "NFVI": flow},
            {"AutoNormal": {"k": normal_row["k"]}, "NFVI": said})


def draw(found: dict[str, Arrays], said: dict[str, dict[str, Any]]) -> None:
    """Three clouds beside each other, on white, so that dark pages show them as well."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(8.4, 2.9), sharex=True, sharey=True,
                                layout="constrained", facecolor="white")
    rng = np.random.default_rng(0)
    for ax, colour, (name, draws) in zip(axes, COLOURS, found.items(), strict=True):
        chosen = rng.permutation(len(draws["tau"]))[:SHOWN]
        ax.scatter(draws["theta"][chosen, 0], np.log(draws["tau"][chosen]), s=5, alpha=0.35,
                   color=colour, linewidths=0)
        judged = f", k-hat {said[name]['k']:.2f}" if name in said else ""
        ax.set_title(name + judged, fontsize=10, color=INK)
        ax.set_xlabel("effect of the first school", fontsize=9, color=INK)
        ax.tick_params(colors=INK, labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
    axes[0].set(xlim=(-20, 40), ylim=(-4, 4))
    axes[0].set_ylabel("log spread between schools", fontsize=9, color=INK)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Fit, draw, and write down what is seen."""
    found, said = fits()
    draw(found, said)
    RESULT.write_text(json.dumps(said, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
