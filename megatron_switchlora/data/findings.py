"""Collect what users should know about the files of a corpus.

Documents that are left out and files that look like another format are counted, with the first places of each kind.
They are reported once, when the tokens are made, not at every start.
"""

from __future__ import annotations

from collections import Counter

from megatron_switchlora.config.errors import UserError

EMPTY = "Documents without text, left out"
BAD = "Documents that cannot be read, left out (data.on_bad_document skip)"
JSON_OBJECTS = (
    "Files read as plain text although their lines are JSON objects (if these are documents, rename to .jsonl)"
)
MARKUP = "Files read as plain text, tags and all, although their names say markup"
EXAMPLES = 3


class BadDocument(Exception):
    """A document that cannot be read in a file whose other documents can: its fault, and advice."""

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}: {advice}")
        self.fault = fault


class Findings:
    """Counts and first places by kind; with `skip`, documents that cannot be read are left out."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    def note(self, kind: str, place: str) -> None:
        self._counts[kind] += 1
        places = self._places.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(place)

    def bad(self, place: str, document: BadDocument) -> None:
        """Count a document that cannot be read.

        Raises:
            UserError: such documents must not be left out.
        """
        if not self.skip:
            raise UserError(f"{place}: {document}, or leave such documents out with data.on_bad_document skip.")
        self.note(BAD, f"{place}: {document.fault}")

    def sentences(self) -> list[str]:
        """Return one sentence per kind, printable whatever the names of the files."""
        sentences = []
        for kind, places in self._places.items():
            more = "; ..." if self._counts[kind] > len(places) else ""
            text = f"{kind}: {self._counts[kind]} ({'; '.join(places)}{more})."
            sentences.append(text.encode("utf-8", "backslashreplace").decode())
        return sentences
