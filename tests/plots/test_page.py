"""page: one file that holds all it shows, for eyes, ears, phones, paper and dark rooms."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ET
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources

import matplotlib as mpl
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_nfvi import _arviz, _files
from pyro_nfvi.diagnostics import Check, Report
from pyro_nfvi.inference import History, Stage
from pyro_nfvi.plots import Picture, fit_pictures, versions, write_page
from pyro_nfvi.plots.page import MAX_ROWS, PHONE, page
from pyro_nfvi.plots.svg import DARK, LIGHT, svg

NASTY = '<script>alert("1")</script> & $x$ \x00\x1b"\'日本'
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open a page in")
VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


def rng():
    return np.random.default_rng(0)


def arviz_data(name="theta"):
    theta, y = rng().normal(size=(1, 400, 3)), rng().normal(size=(1, 400, 8))
    groups = {"posterior": {"mu": theta[..., 0], name: theta},
              "posterior_predictive": {"y": y}, "observed_data": {"y": np.zeros(8)}}
    return _arviz.inference_data(groups, {}, {}, {})


def report(trusted=True, name="theta"):
    checks = (Check("k-hat", "ok", "k-hat 0.31, should be below 0.70", value=0.31),
              Check("worst site", "warn", f"{name} has a heavy tail", "reparametrize it", 0.62),
              Check("chains", "fail", "they drift away", "What helps: a flow of more layers", 1e9),
              Check("restarts", "skipped", "no other fit to compare with"))
    words = "Verdict: good (k-hat below 0.5)." if trusted else "Verdict: do not trust these draws."
    return Report(checks, words, trusted, (-1.0, 0.1), {"mu": 0.1, name: 0.62})


def table(name="theta"):
    return pd.DataFrame({"mean": [1.0, -2.5, 1e-9, 1e12], "sd": [0.5, 1, 2, np.nan]},
                        index=["mu", *(f"{name}[{i}]" for i in range(3))])


def pictures(name="theta", **kwargs):
    history = History(list(np.linspace(-9, -1, 60)), stages=[Stage("Gaussian"), Stage("flow", 60)])
    return fit_pictures(**{
        "history": history, "log_ratios": rng().normal(size=1000), "data": arviz_data(name),
        "site_pareto_k": {"mu": 0.1, name: 0.62},
        "reference": {"mu": torch.randn(100, generator=torch.Generator().manual_seed(0))}} | kwargs)


def parts(name="theta", **kwargs):
    return {"title": name, "report": report(name=name), "table": table(name),
            "pictures": pictures(name), "numbers": {"ELBO": "-1.0 ± 0.1", name: 0.25},
            "facts": {"Guide": name, "Steps": 1200, "Seed": None, **versions()}} | kwargs


@cache
def text(name="theta"):
    return page(**parts(name))


class Reader(HTMLParser):
    """What a page has in it, and whether every element is closed in its turn."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.open, self.words = [], [], ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def drawings(content):
    """Every picture of a page as SVG."""
    return [base64.b64decode(uri).decode()
            for uri in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", content)]


# ------------------------------------------------------------------ what is on it

def test_the_page_has_the_verdict_the_checks_the_table_the_pictures_and_the_fit():
    words = Reader(text()).words
    for expected in ("Verdict: trusted", "Good (k-hat below 0.5).", "they drift away",
                     "What helps: a flow of more layers", "theta[2]", "-2.500", "1e-09", "1e+12",
                     "Marginals", "Pairs", "Predictive checks", "Tail of the weights",
                     "k-hat by site", "ELBO of each step", "1,200", "pyro_nfvi", "torch"):
        assert expected in words, expected
    assert words.count("What helps: What helps") == 0
    assert len(drawings(text())) == 2 * 6  # each for a phone and for a desk


def test_a_bad_verdict_does_not_look_like_a_good_one():
    bad = page(**parts(report=report(trusted=False), pictures=[]))
    assert "Verdict: not trusted" in bad
    assert 'class="verdict fail"' in bad
    assert "Do not trust these draws." in bad
    assert 'class="verdict ok"' in text()


def test_outcomes_are_told_by_words_and_signs_besides_colour():
    words = Reader(text()).words
    assert all(outcome in words for outcome in ("✓ Passed", "! Take care", "✕ Failed",
                                                "– Not made"))


def test_a_value_beside_words_has_three_digits_and_an_estimate_three_decimals():
    check = {name: Check(name, "ok", "words", value=value) for name, value in
             {"a": 9645.766, "b": 0.57512, "c": float("inf"), "d": -1e-7}.items()}
    content = page(**parts(report=Report(tuple(check.values()), "good", True, (0.0, 0.0)),
                           pictures=[]))
    assert re.findall(r'class="value">([^<]*)<', content) == ["9,646", "0.575", "∞", "-1e-07"]
    assert re.findall(r"<td role=\"cell\">(-2\.500|1e-09|1e\+12|–)</td>", content) == [
        "-2.500", "1e-09", "1e+12", "–"]


def test_a_long_table_shows_the_sites_with_the_worst_k_hat_and_says_so():
    rows = [f"{site}[{i}]" for site in "abc" for i in range(300)]
    long = pd.DataFrame({"mean": np.arange(900.0)}, index=rows)
    judged = Report((), "Verdict: good.", True, (0.0, 0.0), {"a": 0.1, "b": 0.9, "c": 0.2})
    content = page(**parts(table=long, report=judged, pictures=[]))
    names = re.findall(r'scope="row">([^<]*)<', content)
    assert names == [f"b[{i}]" for i in range(MAX_ROWS)]
    assert f"Of 900 rows the {MAX_ROWS} with the worst k-hat" in content


def test_what_is_missing_is_said_in_words():
    empty = fit_pictures()
    assert all(picture.draw is None and picture.caption.endswith(".") for picture in empty)
    content = page(title="x", report=Report((), "Verdict: good.", True, (0.0, 0.0)), table=None,
                   pictures=empty, numbers={}, facts={})
    reader = Reader(content)
    assert not reader.all("img", "table")
    assert "There is no trace" in reader.words
    assert "No check was made." in reader.words
    assert "There are no estimates." in reader.words
    assert content.count('class="missing"') == 6


def test_a_fit_without_steps_or_predictive_draws_says_why():
    made = _arviz.inference_data(
        {"posterior": {"mu": np.zeros((1, 50))}}, {}, {},
        {"left_out": "prior: it is improper; posterior_predictive: the model draws minibatches"})
    captions = {picture.title: picture.caption for picture in fit_pictures(
        history=History(stages=[Stage("Gaussian")]), data=made, log_ratios=np.full(9, -np.inf))}
    assert "made no step" in captions["ELBO of each step"]
    assert captions["Predictive checks"].endswith("The model draws minibatches.")
    assert "No draw has a finite importance weight." in captions["Tail of the weights"]
    assert "no two numbers" in captions["Pairs"]


def test_a_reference_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Posterior.report expected `reference` to have one of"):
        pictures(reference={"nu": np.zeros(10)})


def test_captions_say_what_is_left_out_and_how_far_the_reference_is():
    made = _arviz.inference_data({"posterior": {"x": rng().normal(size=(1, 50, 90))}}, {}, {}, {})
    shift = {"x": rng().normal(size=(200, 90)) + 4 * (np.arange(90) == 7)}
    marginals, pairs = fit_pictures(data=made, reference=shift)[:2]
    assert "66 more numbers left out" in marginals.caption
    assert "(x[7])" in marginals.caption
    assert "86 more numbers left out" in pairs.caption
    assert marginals.alt.startswith("Density curves. Mean and standard deviation: x[7] ")


# ------------------------------------------------------------------ text of anybody

def test_names_of_anybody_are_shown_as_they_are_and_run_nothing():
    content = text(NASTY)
    reader = Reader(content)
    assert not reader.all("script")
    shown = '<script>alert("1")</script> & $x$ \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}'
    assert reader.words.count(shown) > 5
    assert any(shown in image["alt"] for image in reader.all("img"))
    for drawing in drawings(content):
        ET.fromstring(drawing)


def test_a_lone_surrogate_does_not_keep_a_page_from_being_written(tmp_path):
    write_page(tmp_path / "page.html", **parts(title="\ud800", pictures=[]))
    assert "<h1>\N{REPLACEMENT CHARACTER}</h1>" in (tmp_path / "page.html").read_text("utf-8")


# ------------------------------------------------------------------ self-contained

def test_nothing_is_fetched_and_nothing_runs():
    reader = Reader(text())
    assert not reader.all("script", "link", "iframe", "object", "embed", "base", "form")
    for _, attrs in reader.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "srcset"):
            assert attrs.get(name, "data:image/svg+xml;").startswith("data:image/svg+xml;")
        assert attrs.get("href", "#").startswith("#")
    assert "url(" not in text()
    assert "@import" not in text()
    (policy,) = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_the_pictures_refer_to_nothing_outside_themselves():
    for drawing in drawings(text()):
        links = re.findall(r'(?:href|src)="([^"]*)"', drawing) + re.findall(r"url\(([^)]*)\)",
                                                                           drawing)
        assert all(link.startswith(("#", "data:image/png")) for link in links)
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", drawing)


def test_the_same_fit_gives_the_same_page():
    one, two = (page(**parts(pictures=pictures()[2:5])) for _ in range(2))
    assert one == two


# ------------------------------------------------------------------ for everybody

def test_headings_are_in_order_and_pictures_have_words():
    reader = Reader(text())
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert reader.all("html")[0]["lang"] == "en"
    assert all(len(image["alt"]) > 40 for image in reader.all("img"))
    assert {"width=device-width, initial-scale=1"} <= {m.get("content") for m in reader.all("meta")}


def test_tables_have_captions_and_heads_and_scroll_by_the_keyboard():
    reader = Reader(text())
    assert len(reader.all("caption")) == len(reader.all("table")) == 2
    assert {head["scope"] for head in reader.all("th")} == {"row", "col"}
    boxes = [attrs for attrs in reader.all("div") if attrs.get("class") == "scroll"]
    assert len(boxes) == 2
    assert all(box["tabindex"] == "0" and box["role"] == "region" for box in boxes)


def test_identifiers_are_unique_and_links_and_labels_find_them():
    elements = Reader(text()).elements
    counts = Counter(attrs["id"] for _, attrs in elements if "id" in attrs)
    assert set(counts.values()) == {1}
    links = {attrs["href"][1:] for _, attrs in elements if "href" in attrs}
    labels = {attrs["aria-labelledby"] for _, attrs in elements if "aria-labelledby" in attrs}
    assert links | labels <= set(counts)


def luminance(color):
    """Of the sRGB colour, as WCAG 2.2 defines it."""
    channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def schemes():
    """Colours of the page by name, for light and for dark."""
    blocks = re.findall(r":root \{(.*?)\}", text(), re.DOTALL)[:2]
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrasts_meet_wcag_aa(scheme):
    colors = schemes()[scheme]
    for words in ("ink", "muted", "link", "ok", "warn", "fail"):
        for ground in ("paper", "soft"):
            assert contrast(colors[words], colors[ground]) >= 4.5, (words, ground)
    for mark in ("c0", "c1"):
        assert contrast(colors[mark], colors["paper"]) >= 3, mark


def test_dots_that_are_pixels_are_seen_on_either_page():
    assert contrast(LIGHT["c0"], DARK["paper"]) >= 3
    assert contrast(LIGHT["c0"], LIGHT["paper"]) >= 3


# ------------------------------------------------------------------ matplotlib stays as it was

def test_the_style_of_the_user_is_neither_used_nor_changed():
    theirs = pictures()[2:]
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "text.usetex": True,
                         "figure.dpi": 33, "savefig.bbox": "tight"}):
        before = dict(mpl.rcParams)
        assert [svg(picture, PHONE) for picture in theirs] == drawings(text())[5::2]
        assert dict(mpl.rcParams) == before


def test_the_current_figure_and_the_backend_stay():
    figure = mpl.pyplot.figure()
    backend = mpl.get_backend()
    for picture in pictures()[2:]:
        svg(picture, PHONE)
    assert mpl.pyplot.get_fignums() == [figure.number]
    assert mpl.pyplot.gcf() is figure
    assert mpl.get_backend() == backend
    mpl.pyplot.close(figure)


def test_a_drawing_that_fails_leaves_the_style_as_it_was():
    def fail(figure):
        raise RuntimeError("no")
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError, match="no"):
        svg(Picture("t", "c", "a", fail), 4.0)
    assert dict(mpl.rcParams) == before


# ------------------------------------------------------------------ the file

def test_a_page_is_written_in_utf_8_and_replaces_an_older_one(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    write_page(str(path), **parts(pictures=lambda: []))
    assert path.read_bytes().decode("utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere/page.html", r"Posterior.report found no folder '.*nowhere' for 'page.html'\. Make"),
    ("", r"got the folder '.*'\. Name a file in it\."),
    ("file/page.html", r"Posterior.report found no folder '.*file' for 'page.html'\. Make"),
], ids=["missing-folder", "folder", "file-as-folder"])
def test_a_path_that_cannot_be_is_refused_before_anything_is_drawn(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / name, **parts(pictures=lambda: pytest.fail("drawn")))
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("path", [None, 3, b"x.html", ""])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="Posterior.report expected `path` to be the path of a fi"):
        write_page(path, **parts(pictures=[]))


def fail(*args):
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["drawing", "writing", "naming"])
def test_a_page_that_fails_leaves_no_file_and_the_old_one_as_it_was(tmp_path, monkeypatch, where):
    path = tmp_path / "page.html"
    path.write_text("old")
    made = [Picture("t", "c", "a", fail)] if where == "drawing" else []
    if where == "writing":
        monkeypatch.setattr(_files, "open", lambda *args: Full(open(*args)), raising=False)
    if where == "naming":
        monkeypatch.setattr(_files.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_page(path, **parts(pictures=made))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]


class Full:
    """A file on a full disk."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(content[:10])
        fail()


def test_the_template_is_a_file_of_the_package():
    template = resources.files("pyro_nfvi.plots").joinpath("page.html")
    assert template.is_file()


# ------------------------------------------------------------------ in a browser

LOOK = """
onload = () => setTimeout(() => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const pixel = image => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.drawImage(image, 0, 0);
    return [...canvas.getImageData(1, 1, 1, 1).data].slice(0, 3);
  };
  const images = [...page.images].filter(image => image.src.startsWith("data:"));
  out.textContent = JSON.stringify({
    images: [...page.images].map(image => [image.naturalWidth, image.clientWidth]),
    scroll: root.scrollWidth, width: root.clientWidth, inner: view.innerWidth,
    wide: [...page.querySelectorAll("body *")].filter(element => !element.closest(".scroll")
      && element.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName),
    fetched: view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
    paper: view.getComputedStyle(page.body).backgroundColor.match(/\\d+/g).map(Number),
    pixels: images.map(pixel), scripts: page.scripts.length,
    small: Math.min(...[...page.querySelectorAll("p, td, th, dd, dt, figcaption, a, caption")]
      .map(element => parseFloat(view.getComputedStyle(element).fontSize))),
  });
}, 300);
"""


def seen(folder, content, width, *options):
    """What a browser makes of a page in a window so wide."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin: 0"><iframe id="frame" '
        f'style="width: {width}px; height: 800px; border: 0" srcdoc="{html.escape(content)}">'
        f'</iframe><pre id="out"></pre><script>{LOOK}</script>', encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *options,
               "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout.decode("utf-8"), re.DOTALL)
    assert found, done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_a_browser_shows_every_picture_and_asks_for_nothing(tmp_path, width):
    look = seen(tmp_path, text("a_rather_long_name_" * 4), width)
    assert look["inner"] == width
    assert len(look["images"]) == 6
    assert all(natural > 0 and shown > 0 for natural, shown in look["images"])
    assert look["scroll"] <= look["width"]  # tables scroll, the page does not
    assert look["wide"] == []
    assert look["fetched"] == []
    assert look["scripts"] == 0
    assert look["small"] >= 14  # pixels
    assert all(shown <= width for _, shown in look["images"])
    if width == 390:  # a picture for a phone is not the one for a desk made small
        assert all(natural < 1.2 * shown for natural, shown in look["images"])


@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_pictures_have_the_ground_of_the_page_in_light_and_dark(tmp_path, scheme):
    look = seen(tmp_path, text(), 1280,
                f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    paper = {"dark": DARK, "light": LIGHT}[scheme]["paper"]
    assert look["paper"] == [int(paper[i:i + 2], 16) for i in (1, 3, 5)]
    assert all(pixel == look["paper"] for pixel in look["pixels"])


@pytest.fixture
def asked():
    """A server on this machine: its address, and the paths that somebody asked it for."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    paths = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


@needs_chromium
def test_the_look_through_a_browser_would_see_what_is_wrong(tmp_path, asked):
    address, paths = asked
    wrong = re.sub(r'<meta http-equiv="Content-Security[^>]*>', "", text()).replace(
        "<main>", f'<main><img alt="" src="{address}/x.png">'
                  '<p style="width: 600px; max-width: none">x</p><script></script>', 1)
    look = seen(tmp_path, wrong, 390)
    assert look["fetched"] == [f"{address}/x.png"]
    assert paths == ["/x.png"]
    assert min(natural for natural, _ in look["images"]) == 0
    assert look["scroll"] > look["width"]
    assert "P" in look["wide"]
    assert look["scripts"] == 1


@needs_chromium
def test_the_policy_of_the_page_keeps_out_what_somebody_adds(tmp_path, asked):
    address, paths = asked
    added = text().replace("<main>", f'<main><img alt="" src="{address}/x.png">', 1)
    assert seen(tmp_path, added, 390)["images"][0] == [0, 0]
    assert paths == []
