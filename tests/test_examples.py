"""The examples run, and find what they promise; the gallery shows what came out."""

import ast
import importlib.util
import json
import re
import runpy
import sys
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load_gallery():
    """The Sphinx extension as a module."""
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs/_extensions/gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


gallery = load_gallery()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example as a script, and returns its names."""
    def run_example(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(tmp_path), *options])
        with matplotlib.rc_context():
            names = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        assert not plt.get_fignums()
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return names
    return run_example


# ---------------------------------------------------------------------- what every example keeps


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_page_in_one_form(name):
    example = gallery.read(ROOT / "examples" / f"{name}.py")
    words = "\n".join(cell.source for cell in example.cells if not cell.code)
    code = "\n".join(cell.source for cell in example.cells if cell.code)
    assert len(example.title) < 70
    assert "?" in example.question
    assert re.search("^## The (data|model)$|^## Two moons$", words, re.MULTILINE)
    assert re.search("^## What (the verdict|these numbers) means?( here)?$", words, re.MULTILINE)
    assert f'out / "{name}.png"' in code
    assert "set_rng_seed" in code
    assert "seed=0" in code
    assert "plt.show" not in code
    for cell in example.cells:
        assert cell.source
        if cell.code:
            ast.parse(cell.source)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_one_place_in_the_gallery(name):
    places = [name for names in gallery.GROUPS.values() for name in names]
    assert places.count(name) == 1
    assert set(places) == set(NAMES)


# ---------------------------------------------------------------------- runs


def test_golf_putting_prefers_the_geometry(run, capsys):
    names = run("golf_putting")
    assert names["curve"].summary().trusted
    assert names["stroke"].summary().trusted
    assert names["stroke"].elbo[0] - names["curve"].elbo[0] > 90
    assert capsys.readouterr().out.count("Verdict: good") == 2


def test_the_change_in_coal_mining_is_where_others_found_it(run):
    names = run("change_point")
    assert names["posterior"].summary().trusted
    assert names["years"][names["probability"].mean(0).argmax()] in range(1887, 1893)
    assert names["fall"].mean() == pytest.approx(0.70, abs=0.02)


@pytest.mark.slow
def test_eight_schools_agrees_with_nuts(run, tmp_path):
    names = run("eight_schools")
    assert names["posterior"].summary().trusted
    assert names["second"].summary().trusted
    assert names["gap"] < 0.1  # posterior standard deviations
    assert (tmp_path / "eight_schools.nc").exists()


@pytest.mark.slow
def test_logistic_regression_predicts_held_out_biopsies(run, tmp_path):
    names = run("logistic_regression")
    assert names["summary"].trusted
    assert not names["mean_field"].summary().trusted
    assert names["accuracy"] > 0.93
    assert names["ratio"].min() < 0.6  # the mean-field guide is too narrow
    assert (tmp_path / "logistic_regression.nc").exists()


@pytest.mark.slow
def test_the_funnel_is_found_by_a_flow_and_not_by_a_gaussian(run):
    names = run("funnel")
    assert names["posterior"].summary().trusted
    assert names["reparametrized"].summary().trusted
    assert not names["gaussian"].summary().trusted
    assert names["flow"]["v"].std() == pytest.approx(3.0, abs=0.25)
    assert names["wrong"]["v"].std() < 1


@pytest.mark.slow
def test_growth_foretells_hidden_weights(run):
    names = run("growth_curves")
    assert names["summary"].trusted
    assert names["growth"].mean() == pytest.approx(6.2, abs=0.2)
    assert 14 <= names["inside"].sum() <= 20  # 18 of 20 expected; less than 14: 1 in 400


@pytest.mark.slow
def test_the_horseshoe_is_mended_by_integrating_out_the_effects(run):
    names = run("sparse_regression")
    assert not names["first"].summary().trusted
    assert names["posterior"].summary().trusted
    effects = dict(zip(names["names"], np.median(names["effects"], axis=0), strict=True))
    assert effects["body mass"] == pytest.approx(0.33, abs=0.03)
    assert abs(effects["age"]) < 0.03


@pytest.mark.slow
def test_the_gaussian_process_foretells_held_out_readings(run):
    names = run("gaussian_process")
    assert names["posterior"].summary().trusted
    assert 35 <= names["inside"].sum() <= 44  # 40 of 44 expected; less than 35: 1 in 200


@pytest.mark.slow
def test_the_nile_fell(run):
    names = run("nile")
    assert names["posterior"].summary().trusted
    assert (names["fall"] > 0).double().mean() > 0.95
    assert names["sigma"].mean() == pytest.approx(123, abs=5)  # Durbin & Koopman: 122.9


@pytest.mark.slow
def test_labels_switch_and_are_pinned(run):
    names = run("old_faithful")
    assert names["both"].summary().trusted
    assert names["posterior"].summary().trusted
    first = names["swapping"][:, 0] > 70
    assert 0.4 < first.double().mean() < 0.6  # both labellings, one as often as the other
    assert names["mean"].mean(0).tolist() == pytest.approx([54.6, 80.1], abs=0.3)


@pytest.mark.slow
def test_an_emulator_stands_in_for_a_likelihood(run):
    names = run("density_estimation")
    assert -names["moons"].log_prob(names["new"]).mean() < 1.3  # a Gaussian has 1.92
    assert names["emulated"].summary().trusted
    assert names["gap"] < 0.5  # posterior standard deviations


@pytest.mark.slow
def test_amortized_effects_agree_with_posteriors_of_their_own(run):
    names = run("amortized_groups")
    assert names["posterior"].summary().trusted
    assert names["error"].mean() < 0.4  # posterior standard deviations, of new groups


@pytest.mark.slow
def test_a_flow_is_worth_a_nat_of_digits(run, tmp_path):
    names = run("vae")
    gaussian, flow = (names["vaes"][name].log_likelihood(names["judged"], num_samples=100)
                      for name in ("Gaussian", "flow"))
    assert flow.value > gaussian.value + 0.3
    assert (tmp_path / "vae.nc").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("arrays", "shape"), [
    ({name: np.zeros((5, 98), np.uint8) for name in ("train", "valid", "test")}, (5, 28, 28)),
    ({"images": np.zeros((500, 560), np.uint8)}, (100, 28, 20))], ids=["mnist", "faces"])
def test_the_vae_reads_files_of_images(arrays, shape, run, tmp_path):
    np.savez(tmp_path / "images.npz", **arrays)
    names = run("vae", "--data", str(tmp_path / "images.npz"), "--epochs", "1")
    assert names["train"].shape == shape


def test_the_vae_refuses_other_files(run, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", pixels=np.zeros((3, 5)))
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    for name, words in (("other", "it holds pixels"), ("broken", "is not a readable npz file")):
        with pytest.raises(SystemExit):
            run("vae", "--data", str(tmp_path / f"{name}.npz"))
        assert words in capsys.readouterr().err


# ---------------------------------------------------------------------- the gallery


SCRIPT = '''
"""A title.

A question, over
two lines?

    python examples/tiny.py
"""

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt

# %% tags=["remove-cell"]
out = Path(sys.argv[2])

# %% [markdown]
# ## The data
# Some *words*.
#
# More.

# %%
answer = 6 * 7
print("the answer", answer)

# %%
figure, ax = plt.subplots()
figure.savefig(out / "tiny.png")
plt.close(figure)
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small example in a gallery of its own."""
    for name in ("EXAMPLES", "PAGES"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(gallery, name, tmp_path / name)
    monkeypatch.setattr(gallery, "GROUPS", {"First": ("tiny",)})
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def in_this_process(example):
        return gallery.run_cells(example, example.folder)

    monkeypatch.setattr(gallery, "_in_a_process", in_this_process)
    path = tmp_path / "EXAMPLES" / "tiny.py"
    path.write_text(SCRIPT.lstrip())
    return path


def test_a_page_shows_words_code_output_and_pictures(tiny):
    gallery.build()
    page = (gallery.PAGES / "tiny.md").read_text()
    assert page.startswith("# A title\n\nA question, over two lines?\n")
    assert "## The data\nSome *words*.\n\nMore." in page
    assert '```python\nanswer = 6 * 7\nprint("the answer", answer)\n```' in page
    assert "```{code-block} text\n:class: output\n\nthe answer 42\n```" in page
    assert "```{image} tiny/tiny.png\n:alt: A title\n" in page
    assert "sys.argv" not in page  # the hidden cell
    assert (gallery.PAGES / "tiny" / "thumbnail.jpg").exists()
    cards = (gallery.PAGES / "cards.inc").read_text()
    assert "## First" in cards
    assert ":link: _generated/tiny\n" in cards
    assert cards.endswith("```{toctree}\n:hidden:\n\n_generated/tiny\n```\n")


def test_an_example_runs_again_only_when_something_changed(tiny, monkeypatch):
    gallery.build()
    results = gallery.PAGES / "tiny" / "results.json"
    first = results.stat().st_mtime_ns
    gallery.build()
    assert results.stat().st_mtime_ns == first
    gallery.build(force=True)
    second = results.stat().st_mtime_ns
    assert second > first
    tiny.write_text(tiny.read_text().replace("6 * 7", "6 * 8"))
    gallery.build()
    assert "the answer 48" in (gallery.PAGES / "tiny.md").read_text()
    third = results.stat().st_mtime_ns
    monkeypatch.setattr(gallery, "package_code", lambda: "another package")
    gallery.build()
    assert results.stat().st_mtime_ns > third


def test_a_build_without_runs_says_so(tiny):
    gallery.build(run=False)
    page = (gallery.PAGES / "tiny.md").read_text()
    assert "did not run the example" in page
    assert "{image}" not in page
    assert ":img-top:" not in (gallery.PAGES / "cards.inc").read_text()


def test_pages_of_examples_that_are_gone_go_too(tiny):
    (gallery.PAGES / "old").mkdir()
    (gallery.PAGES / "old.md").write_text("# Old\n")
    gallery.build(run=False)
    assert [path.name for path in gallery.PAGES.glob("*")].count("old.md") == 0
    assert not (gallery.PAGES / "old").exists()


def test_only_code_makes_a_package_another_one():
    def bare(text):
        return ast.dump(gallery._bare(ast.parse(textwrap.dedent(text))))

    before = bare('''
        """Module."""
        def f(x):
            """Doc."""
            return x  # why
        ''')
    assert bare("def f(x):\n    return x\n") == before
    assert bare("def f(x):\n    return x + 1\n") != before


def test_a_script_of_another_form_is_refused(tiny):
    tiny.write_text('"""A title."""\nprint(1)\n')
    with pytest.raises(ValueError, match="a docstring of a title and a question"):
        gallery.read(tiny)


@pytest.mark.slow
def test_an_example_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "PAGES", tmp_path)
    missing = gallery.Example("no_such_example", "Title", "Question?")
    with pytest.raises(RuntimeError, match="The example no_such_example failed"):
        gallery._in_a_process(missing)


@pytest.mark.slow
def test_an_example_runs_in_a_process_of_its_own():
    found = gallery._in_a_process(gallery.read(ROOT / "examples" / "golf_putting.py"))
    assert json.dumps(found).count("Verdict: good") == 2
