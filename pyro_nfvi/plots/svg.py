"""Pictures as SVG that follows the reader's colour scheme."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from pyro_nfvi.plots.pictures import Picture

LIGHT = {"paper": "#ffffff", "ink": "#1b1f24", "muted": "#5b6470", "c0": "#1a6fc4",
         "c1": "#c2410c"}
DARK = {"paper": "#14181f", "ink": "#e6e9ee", "muted": "#9aa5b4", "c0": "#5aa9f5",
        "c1": "#f59152"}
GREYS = {"#808080": "muted", "#999999": "muted"}  # of pictures that fit any style


def svg(picture: Picture, width: float) -> str:
    """The picture as SVG that follows the reader's colour scheme; words stay words.

    Nothing of matplotlib's state is changed: neither the current figure nor the backend, and the
    style only while it is drawn.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    assert picture.draw is not None
    buffer = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks, browsers have
        mpl.rcdefaults()
        mpl.rcParams.update(_style())
        figure = Figure(figsize=(width, 3.0), layout="constrained")
        picture.draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _recoloured(buffer.getvalue())


def data_uri(drawing: str) -> str:
    """SVG as an address that holds all of it."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()


def _style() -> Any:
    from cycler import cycler

    ink, muted = LIGHT["ink"], LIGHT["muted"]
    return {
        "svg.fonttype": "none", "svg.hashsalt": "pyro_nfvi", "savefig.dpi": 200, "font.size": 9.5,
        "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": muted, "xtick.color": muted, "ytick.color": muted,
        "xtick.labelcolor": ink, "ytick.labelcolor": ink, "text.color": ink,
        "axes.labelcolor": ink, "axes.titlecolor": ink, "figure.facecolor": LIGHT["paper"],
        "axes.facecolor": "none", "axes.prop_cycle": cycler(color=[LIGHT["c0"], LIGHT["c1"]])}


def _recoloured(drawing: str) -> str:
    """Colours by name, for a light page and for a dark one, and the reader's own font."""
    names = {color: name for name, color in LIGHT.items()} | GREYS
    drawing = drawing[drawing.index("<svg"):]
    drawing = re.sub(r" *<metadata>.*?</metadata>\n", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", partial(_named, names), drawing)
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", drawing)
    drawing = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), drawing)
    return drawing.replace('<style type="text/css">', f'<style type="text/css">{_schemes()}', 1)


def _named(names: Mapping[str, str], match: re.Match) -> str:
    use, color = match.groups()
    return f"{use}: var(--{names[color]})" if color in names else match[0]


def _schemes() -> str:
    light, dark = (";".join(f"--{name}:{color}" for name, color in scheme.items())
                   for scheme in (LIGHT, DARK))
    return f":root{{{light}}} @media (prefers-color-scheme: dark){{:root{{{dark}}}}} "
