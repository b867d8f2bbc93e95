"""Find phrases in the package's prose that read as if translated: `python -m tests.english`, in `make checks`.

Prose is comments and texts, so docstrings, messages and help too; of scripts and YAML it is comments alone. codespell
checks single words; this checks phrases.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COUNTED = (
    "bytes?|numbers?|floats?|tokens?|samples?|steps?|draws?|vectors?|rows?|times|once|twice|[MG]B|FLOPs|seconds?|one"
)
UNITS = "step|token|layer|side|rank|head|micro-batch|row|block|group|axis|node|host|line|file|run|second|byte|method"
# Each phrase, with what to write instead.
PHRASES = {
    rf"(?:{COUNTED}) an? (?:{UNITS})(?! \w+s\b)": "per step, per layer",
    r"(?:go|goes|going|went|gone) on (?:with|from|after|in|at|until|where)|go on": "resume, continue",
    r"anew": "again, re-initialise",
    r"(?:come|comes|coming|came) apart": "differ",
    r"(?:train|measure|time|count|compute|list|log|show)\w* (?:\w+ ){0,3}apart": "separately",
    r"likewise": "each, per layer, also, or the words themselves",
    r"(?:lay|lays|laid|laying) down": "publish, store",
    r"(?:is|are|was|be|been) (?:told|said)|to (?:say|tell) of|there is to (?:say|tell)": "report, print, describe",
    r"(?:say|says|said) (?:what|which|how|who|why|where|whether|so|something)": "report, describe, state",
    r"what (?:it|they) (?:say|says|said)": "report, describe, state",
    r"in silence": "silently",
    r"in the mean(?! \w)": "on average",
    r"so many": "this many, a number of",
    r"for want of": "for lack of",
    r"to be had": "available",
    r"(?:has|have) gone": "is gone",
    r"of (?:ours|theirs|yours)": "our, their, your",
    r"(?:stand|stands|stood) (?:in|beside|there|here|with|under|at|on|among)": "is, are, occur",
    r"fp32 at least": "at least fp32",
}
PATTERNS = {re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE): instead for phrase, instead in PHRASES.items()}


Reader = Callable[[str], Iterator[tuple[int, str]]]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every comment and text, with those that follow one another joined."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for kind, run in groupby((token for token in tokens if token.type != tokenize.NL), lambda token: token.type):
        if kind in kinds:
            parts = list(run)
            texts = (re.sub(r"^\w*[\"']+|[\"']+$|^#", "", part.string) for part in parts)
            yield parts[0].start[0], " ".join(" ".join(texts).split())


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every run of lines that are comments, in a script or YAML."""
    lines = enumerate(source.splitlines(), 1)
    for is_comment, run in groupby(lines, lambda entry: entry[1].lstrip().startswith("#")):
        if is_comment:
            entries = list(run)
            yield entries[0][0], " ".join(" ".join(line.lstrip(" #") for _, line in entries).split())


READERS: dict[str, Reader] = {".py": prose, ".sh": comments, ".sbatch": comments, ".yaml": comments}


def translated(source: str, read: Reader = prose) -> list[tuple[int, str, str]]:
    """Return (line, phrase, what to write instead) of every phrase to replace."""
    return [
        (line, match.group(), instead)
        for line, text in read(source)
        for pattern, instead in PATTERNS.items()
        for match in pattern.finditer(text)
    ]


def main() -> int:
    """Print every phrase to replace; return how many there are."""
    count = 0
    paths = sorted(path for folder in ("megatron_switchlora", "launch", "tools") for path in (ROOT / folder).rglob("*"))
    for path in paths:
        place, read = path.relative_to(ROOT), READERS.get(path.suffix)
        if read:
            for line, phrase, instead in translated(path.read_text(encoding="utf-8"), read):
                print(f"{place}:{line}: {phrase!r}: write {instead}")
                count += 1
    return count


if __name__ == "__main__":
    sys.exit(main() > 0)
