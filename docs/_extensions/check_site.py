"""Check built pages: each link inside the site leads somewhere, nothing is fetched from outside.

Run it as ``python docs/_extensions/check_site.py build/docs/html``.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page links to, what it fetches, and the names it can be linked by.

    Attributes:
        links: Addresses of its links.
        fetched: Addresses of what a browser loads along with it.
        anchors: Names of its places.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down one element."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        place = values.get(FETCHED.get(tag, ""))
        if place and values.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.fetched.append(place)


def problems(folder: Path) -> list[str]:
    """One line for each link that leads nowhere, and for each thing fetched from outside."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        found += [f"{name} fetches {place} from outside" for place in page.fetched
                  if urlsplit(place).netloc]
        found += [f"{name} links to {link}, which is not there"
                  for link in dict.fromkeys(page.links + page.fetched)
                  if not _is_there(link, path, pages)]
    return found


def _is_there(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True  # somebody else's
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target in pages:
        return unquote(parts.fragment) in pages[target].anchors
    return target.exists()


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"All links of {sys.argv[1]} lead somewhere.")
    sys.exit(bool(found))
