"""The pages of the documentation as tests read them: their code blocks, the commands in these, what stands in code.

A block of commands is fenced as ```bash. Tests run it, unless a comment directly above says why not: `<!-- long -->`,
`<!-- cluster -->` and the other MARKERS, after which a reason may follow.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARKERS = {
    "long": "takes longer than a test may",
    "cluster": "needs Slurm, MPI or several hosts",
    "hosts": "needs virtual hosts, as root",
    "gpu": "needs a GPU",
    "needs": "needs a file or folder that is the reader's",
    "installs": "changes what is installed",
    "example": "no run's YAML, but a file of another kind",
}
FENCE = re.compile(
    r"(?:<!--[ ]*(?P<marker>[\w-]+)[^>]*-->\n)?"
    r"[ ]*(?P<fence>```+)(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^[ ]*(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    kind: str
    marker: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a page, split into words."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Return the README and all pages of docs/."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, kind: str) -> list[Block]:
    """Return the fenced blocks of one kind."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, each["kind"], each["marker"] or "", each["text"]) for each in found if each["kind"] == kind]


def commands(block: Block) -> list[Command]:
    """Return the commands of a block of ```bash, without comments and without variables set before them."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [Command(block.page, tuple(words)) for words in map(_without_variables, split) if words]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return words


def code_words(page: Path) -> Iterator[str]:
    """Yield the words of a page that are set in code, outside fenced blocks too."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        yield from block["text"].replace("\\\n", " ").split()
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        yield from code.split()


def prose(page: Path) -> str:
    """Return a page without code and tables: programs write most of these."""
    return re.sub(r"`[^`\n]+`|^\|.*$", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}
