"""Sphinx extension: a name leads to where it is documented, however it is spelled.

``pyro_nfvi.nsf``, ``pyro_nfvi.flows.nsf`` and ``pyro_nfvi.flows.recipes.nsf`` are one object, and
the reference describes it once, in its room.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from sphinx.util.nodes import make_refnode

import pyro_nfvi


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """The documented name of the same object; plain text for one that is not public."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    entry = _entry(env, target)
    if entry is not None:
        name, place = entry
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, contnode,
                            name)
    return contnode if _found(target) is not None else None


def _entry(env: Any, target: str) -> Any:
    """Name and place of a documented object of the library: itself, or one of this last name."""
    objects, last = env.get_domain("py").objects, target.split(".")[-1]
    known = [name for name in objects if name.split(".")[-1] == last]
    if target.startswith("pyro_nfvi."):
        wanted = _found(target)
        known = [name for name in known if wanted is not None and _found(name) is wanted]
    elif "." in target:
        known = [name for name in known if name.endswith(f".{target}")]
    shortest = min(known, key=len, default=None)
    same = all(_found(name) is _found(known[0]) for name in known)
    return (shortest, objects[shortest]) if shortest and same else None


def _found(name: str) -> Any:
    """The object of a dotted name of the library, or None."""
    first, *rest = name.split(".")
    found: Any = pyro_nfvi if first == "pyro_nfvi" else None
    for part in rest:
        if not hasattr(found, part) and hasattr(found, "__path__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part, None)
    return _inside_module(name) if found is None and first == "pyro_nfvi" else found


def _inside_module(name: str) -> Any:
    """What a module holds whose name a function of its room has taken."""
    module, _, last = name.rpartition(".")
    with contextlib.suppress(ImportError):
        return getattr(importlib.import_module(module), last, None)
    return None


def keep_first_lines(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
                     ) -> None:
    """Break the first line of a property's docstring at its colon.

    Napoleon takes the words before a colon for the property's type.
    """
    if what == "property" and lines and ": " in lines[0]:
        before, after = lines[0].split(": ", 1)
        lines[:1] = [f"{before}:", after]


def plain_defaults(app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None,
                   returns: str | None) -> tuple[str | None, str | None]:
    """Write defaults that a dataclass makes anew as what Sphinx can read."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("missing-reference", resolve, priority=400)
    app.connect("autodoc-process-docstring", keep_first_lines, priority=400)
    app.connect("autodoc-process-signature", plain_defaults)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
