"""Gather the pages of the site in build/docs, for zensical: `make docs`.

The pages are written to be read on GitHub, so they link to files all over the repository. The site can only hold what
lies in one folder. Each linked file outside docs/ is copied into it, and the links to it are rewritten. The README
becomes the home page.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "docs"
# Code comes first, so that what looks like a link in it is none.
CODE = r"(?P<code>^[ ]*(?P<fence>```+|~~~+).*?^[ ]*(?P=fence)[ ]*$|`[^`\n]+`)"
TOKENS = re.compile(CODE + r"|\]\((?P<link>[^()\s]+)\)", re.MULTILINE | re.DOTALL)


def rewrite_links(text: str, change: Callable[[str], str]) -> str:
    """Return a page in which the target of every Markdown link and image is changed."""

    def replaced(match: re.Match[str]) -> str:
        return match.group() if match["code"] else f"]({change(match['link'])})"

    return TOKENS.sub(replaced, text)


def find_links(text: str) -> list[str]:
    """Return the targets of the links and images of a page, in order."""
    return [match["link"] for match in TOKENS.finditer(text) if match["link"]]


def is_external(link: str) -> bool:
    """Return whether a link leads out of the repository."""
    return re.match(r"[a-z]+:", link) is not None


def resolve(page: Path, link: str) -> Path:
    """Return the file that a link leads to, without its anchor; the page itself for an anchor alone."""
    path = link.partition("#")[0]
    return Path(os.path.normpath(page.parent / path)) if path else page


def place_of(source: Path) -> Path:
    """Return where a file of the repository lies in the site, relative to its root."""
    path = source.relative_to(ROOT)
    if path == Path("README.md"):
        return Path("index.md")
    return path.relative_to("docs") if path.is_relative_to("docs") else path


def gather(target: Path = TARGET) -> None:
    """Write all pages, and the files that they link to, into an empty folder."""
    shutil.rmtree(target, ignore_errors=True)
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    done: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in done or not source.is_file():  # zensical refuses a link to a page that does not exist
            continue
        done.add(source)
        place = target / place_of(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, place)
            continue
        text = source.read_text(encoding="utf-8")
        waiting += [resolve(source, link) for link in find_links(text) if not is_external(link)]
        place.write_text(rewrite_links(text, partial(_moved, source)), encoding="utf-8")


def _moved(page: Path, link: str) -> str:
    """Return a link of a page as it is in the site."""
    if is_external(link) or link.startswith("#"):
        return link
    place = place_of(resolve(page, link))
    path = os.path.relpath(place, place_of(page).parent)
    return path + "".join(link.partition("#")[1:])


if __name__ == "__main__":
    gather()
