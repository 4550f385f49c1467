"""Configuration of the documentation; ``make docs`` builds it, with and without a network."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import pyro_nfvi  # noqa: E402

project = "pyro_nfvi"
author = copyright = "The pyro_nfvi developers"  # noqa: A001
version = release = pyro_nfvi.__version__

extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton",
    "sphinx_design", "executed", "gallery", "inventories", "measured", "public_names"]
exclude_patterns = ["_extensions", "_static", "gallery/_generated/*/*"]
nitpicky = True  # a reference that leads nowhere is an error
nitpick_ignore_regex = [  # names of others, beyond those of inventories.py
    (r"py:.*", r"(torch|pyro|arviz|xarray|numpy|matplotlib|pandas|typing|collections|os)\..*")]
nitpick_ignore = [("py:class", "DensityHistory")]

# ------------------------------------------------------------------ text

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
copybutton_prompt_text = ">>> |... |$ "
copybutton_prompt_is_regexp = False
copybutton_exclude = ".linenos, .gp, .go"

# ------------------------------------------------------------------ the library's own words

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True,
                           "exclude-members": "extra_repr"}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 79
toc_object_entries_show_parents = "hide"
add_module_names = False

# ------------------------------------------------------------------ pages

html_theme = "furo"
html_title = "pyro_nfvi"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_css_files = ["style.css"]
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7fb2e8", "color-brand-content": "#7fb2e8"}}

# MathJax in one file, a copy that lies beside the pages: they need no network.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
mathjax_path = "tex-svg-full.js"
html_static_path = ["_static", str(Path(_mathjax.origin).parent / "static/mathjax" / mathjax_path)]
mathjax3_config = {"svg": {"fontCache": "global", "scale": 0.92}, "options": {"enableMenu": False}}
