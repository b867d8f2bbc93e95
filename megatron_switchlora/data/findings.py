"""What a build finds in the files of a corpus that its user should know of.

Documents that are left out and files that look like something else are counted, each kind with its first places. The
sentences are told once, when the tokens are made, not at every start.
"""

from __future__ import annotations

from collections import Counter

from megatron_switchlora.config.errors import UserError

EMPTY = "Documents without text, left out"
BAD = "Documents that cannot be read, left out (data.on_bad_document skip)"
JSON_OBJECTS = (
    "Files read as plain text although their lines are JSON objects (if they hold documents, name them .jsonl)"
)
MARKUP = "Files read as plain text, tags and all, although their names say markup"
EXAMPLES = 3


class BadDocument(Exception):
    """A document that cannot be read, in a file whose others can: the fault, and what to do about it."""

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(f"{fault}: {advice}")
        self.fault = fault


class Findings:
    """Counts and first places; `skip` says that documents which cannot be read are left out."""

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
            UserError: such documents are not to be left out.
        """
        if not self.skip:
            raise UserError(f"{place}: {document}, or leave such documents out with data.on_bad_document skip.")
        self.note(BAD, f"{place}: {document.fault}")

    def sentences(self) -> list[str]:
        """One for each kind, printable whatever the names of the files."""
        lines = []
        for kind, places in self._places.items():
            more = "; ..." if self._counts[kind] > len(places) else ""
            text = f"{kind}: {self._counts[kind]} ({'; '.join(places)}{more})."
            lines.append(text.encode("utf-8", "backslashreplace").decode())
        return lines
