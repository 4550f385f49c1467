"""One self-contained HTML page about a fit: no script, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import metadata, resources
from os import PathLike
from string import Template
from typing import Any

import numpy as np

import pyro_nfvi
from pyro_nfvi._files import check_path, write_text
from pyro_nfvi.plots.components import badness
from pyro_nfvi.plots.pictures import Picture
from pyro_nfvi.plots.svg import DARK, LIGHT, data_uri, svg
from pyro_nfvi.plots.text import printable

OWNER = "Posterior.report"
MAX_ROWS = 200  # of the table of estimates
WORDS = {"ok": "✓ Passed", "warn": "! Take care", "fail": "✕ Failed", "skipped": "– Not made"}
PACKAGES = ("torch", "pyro-ppl", "arviz", "arviz-base", "arviz-stats")
PHONE, HALF, ROW = 4.1, 5.5, 11.2  # inches; for a phone, and for half a row and a row elsewhere
PIXELS = 96  # of a style sheet, in an inch


def write_page(path: str | PathLike, *, title: str, report: Any, table: Any,
               pictures: Sequence[Picture] | Callable[[], Sequence[Picture]],
               numbers: Mapping[str, Any] | None = None, facts: Mapping[str, Any] | None = None,
               subtitle: str = "") -> None:
    """Write a page about a fit, whole or not at all.

    It holds all that it shows, asks for nothing from a network, and runs no script.

    Args:
        path: The file; its folder has to exist.
        title: What the page is about.
        report: Checks with a verdict, as ``posterior.diagnose()`` returns.
        table: Estimates, a pandas DataFrame.
        pictures: Pictures, or a function that makes them once the path is known to be good.
        numbers: What stands out, by name.
        facts: How it was fitted, by name.
        subtitle: One line below the title.

    Raises:
        ValueError: If the folder does not exist, or the path is one.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from pyro_nfvi.diagnostics import Check, Report
        >>> report = Report((Check("fit", "ok", "ran to its end"),), "Verdict: good.", True,
        ...                 (-3.0, 0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "page.html")
        ...     write_page(path, title="A fit", report=report, pictures=[],
        ...                table=pd.DataFrame({"mean": [0.1]}, index=["x"]))
        ...     "<title>A fit" in path.read_text()
        True
    """
    check_path(OWNER, path)
    made = pictures() if callable(pictures) else pictures
    write_text(path, page(title=title, report=report, table=table, pictures=made,
                          numbers=numbers or {}, facts=facts or {}, subtitle=subtitle))


def page(*, title: str, report: Any, table: Any, pictures: Sequence[Picture],
         numbers: Mapping[str, Any], facts: Mapping[str, Any], subtitle: str = "") -> str:
    """The page of :func:`write_page` as text."""
    template = resources.files("pyro_nfvi.plots").joinpath("page.html")
    version = f"pyro_nfvi {_text(pyro_nfvi.__version__)}"
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=_text(title), subtitle=_text(subtitle), generator=version,
        light=_colours(LIGHT), dark=_colours(DARK),
        tone="ok" if report.trusted else "fail",
        heading="✓ Verdict: trusted" if report.trusted else "✕ Verdict: not trusted",
        verdict=_text(_verdict(report.verdict)), numbers=_numbers(numbers),
        checks=_checks(report.checks), table=_estimates(table, report.site_pareto_k),
        pictures="\n".join(map(_picture, pictures)),
        facts=_facts(facts),
        footer=f"Written by {version}. This file holds all that it shows: it asks "
               "for nothing from a network and runs no script.")


def versions() -> dict[str, str]:
    """Versions of the packages behind a fit, of those that are installed.

    Example:
        >>> versions()["pyro_nfvi"] == pyro_nfvi.__version__
        True
    """
    found = {"pyro_nfvi": pyro_nfvi.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------ text

def _text(words: Any) -> str:
    """Words of anybody as HTML that shows them as they are."""
    return escape(printable(words))


def _number(value: Any) -> str:
    """A number as a reader wants it: three decimals, or three digits if it is far from one."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        return _text(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(float(value), "–")
    small = value != 0 and abs(value) < 1e-3
    return f"{value:.3g}" if small or abs(value) >= 1e6 else f"{value:,.3f}"


def _verdict(words: str) -> str:
    """A verdict without the word, which the heading has."""
    start, _, rest = words.partition(":")
    words = rest.strip() if start.strip().lower() == "verdict" and rest.strip() else words
    return words[:1].upper() + words[1:]


def _colours(scheme: Mapping[str, str]) -> str:
    return "; ".join(f"--{name}: {color}" for name, color in scheme.items())


# ------------------------------------------------------------------ parts

def _numbers(numbers: Mapping[str, Any]) -> str:
    if not numbers:
        return ""
    return f'<dl class="numbers">\n{_pairs(numbers, "<div>", "</div>")}\n</dl>'


def _facts(facts: Mapping[str, Any]) -> str:
    if not facts:
        return "<p>Nothing is known about the fit.</p>"
    return f'<dl class="facts">\n{_pairs(facts)}\n</dl>'


def _pairs(items: Mapping[str, Any], before: str = "", after: str = "") -> str:
    return "\n".join(f"{before}<dt>{_text(name)}</dt><dd>{_number(value)}</dd>{after}"
                     for name, value in items.items())


def _checks(checks: Iterable[Any]) -> str:
    """A row for each check: name, outcome, value, what it means and what to do."""
    rows = "\n".join(map(_check, checks))
    if not rows:
        return "<p>No check was made.</p>"
    return _scrolling("checks", "What was looked at, what was found, and what helps.",
                      ["Check", "Outcome", "Value", "What it means"], rows)


def _check(check: Any) -> str:
    known = check.status if check.status in WORDS else "skipped"
    status = WORDS.get(check.status, _text(check.status))
    action = _text(check.action.removeprefix("What helps:").strip())
    action = f"<p><strong>What helps:</strong> {action}</p>" if action else ""
    return (f'<tr role="row"><th role="rowheader" scope="row">{_text(check.name)}</th>'
            f'<td role="cell" class="{known}"><span class="status">{status}</span></td>'
            f'<td role="cell" class="value">{_value(check.value)}</td>'
            f'<td role="cell"><p>{_text(check.words)}</p>{action}</td></tr>')


def _value(value: float | None) -> str:
    """A number beside words that give it: three digits will do."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else _number(float(value))
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _estimates(table: Any, pareto_k: Mapping[str, float]) -> str:
    """The table of estimates; of a long one the sites with the worst k-hat."""
    if table is None or not len(table):
        return "<p>There are no estimates.</p>"
    places = list(range(len(table)))
    note = ""
    if len(table) > MAX_ROWS:
        places = sorted(places, key=lambda i: -_badness(table.index[i], pareto_k))[:MAX_ROWS]
        note = (f"<p>Of {len(table):,} rows the {MAX_ROWS} with the worst k-hat of their site are "
                "shown; posterior.summary().table has all.</p>\n")
    values = [table.iloc[:, column].tolist() for column in range(table.shape[1])]
    rows = "\n".join(_row(table.index[i], [column[i] for column in values]) for i in places)
    caption = "Statistics of each number of the posterior."
    return note + _scrolling("estimates", caption, ["Number", *table.columns], rows)


def _badness(label: Any, pareto_k: Mapping[str, float]) -> float:
    return badness(pareto_k, str(label), str(label).partition("[")[0])


def _row(name: Any, values: Sequence[Any]) -> str:
    cells = "".join(f'<td role="cell">{_number(value)}</td>' for value in values)
    return f'<tr role="row"><th role="rowheader" scope="row">{_text(name)}</th>{cells}</tr>'


def _scrolling(kind: str, caption: str, names: Iterable[Any], rows: str) -> str:
    """A table that scrolls on its own where it is too wide, also by the keyboard.

    Its roles are written out: a table that is laid out otherwise on a phone stays one.
    """
    head = "".join(f'<th role="columnheader" scope="col">{_text(name)}</th>' for name in names)
    return (f'<div class="scroll" role="region" aria-labelledby="{kind}-caption" tabindex="0">\n'
            f'<table role="table" class="{kind}">\n'
            f'<caption id="{kind}-caption">{_text(caption)}</caption>\n'
            f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
            f'<tbody role="rowgroup">\n{rows}\n</tbody>\n</table>\n</div>')


def _picture(picture: Picture) -> str:
    """A picture under its heading; a missing one is said in words."""
    start = f"<section{' class=wide' * picture.wide}>\n<h3>{_text(picture.title)}</h3>\n"
    if picture.draw is None:
        return f'{start}<p class="missing">{_text(picture.caption)}</p>\n</section>'
    return (f"{start}<figure>\n{_image(picture)}\n"
            f"<figcaption>{_text(picture.caption)}</figcaption>\n</figure>\n</section>")


def _image(picture: Picture) -> str:
    """A picture in two sizes, so that its words stay readable on a phone."""
    phone, desk = svg(picture, PHONE), svg(picture, ROW if picture.wide else HALF)
    return (f'<picture>\n<source media="print, (min-width: 48rem)" {_size(desk)} '
            f'srcset="{data_uri(desk)}">\n<img alt="{_text(picture.alt)}" {_size(phone)} '
            f'src="{data_uri(phone)}">\n</picture>')


def _size(drawing: str) -> str:
    """Width and height in pixels, so that a page does not jump while it loads."""
    box = drawing.split('viewBox="', 1)[1].split('"', 1)[0].split()
    width, height = (round(float(points) * PIXELS / 72) for points in box[2:])
    return f'width="{width}" height="{height}"'
