"""Records of a run: one JSON object a line, appended without buffering, numbers in full precision.

A line that cannot be written (a full disk) waits for the next one, so a file never holds a torn line but
after a crash of the machine, which may leave anything; readers stop there. A run that goes on keeps the
records up to its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.disk import replace_text


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, kept within the range of a float."""
    return math.exp(min(loss, 700.0))


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; what follows the first torn line is left out."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # also bytes that are no text
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


def keep_records(path: Path, steps: int, dropped: Optional[Path] = None) -> None:
    """Leave the records up to `steps`; later ones go to the end of `dropped`, if given."""
    records = read_records(path)
    kept = [record for record in records if steps and record["step"] <= steps]
    if dropped is not None and len(kept) < len(records):
        with dropped.open("a", encoding="utf-8") as file:
            file.writelines(map(as_line, records[len(kept) :]))
    replace_text(path, "".join(map(as_line, kept)))


class RecordFile:
    """Appends to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self._written = path.stat().st_size

    def log(self, record: dict[str, Any]) -> None:
        """Append an object. Warns if it has to wait: the disk is full."""
        self._waiting.append(as_line(record))
        self._write()

    def _write(self) -> None:
        data = "".join(self._waiting).encode()
        try:
            if self.file.write(data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self._written)  # no torn line
            if len(self._waiting) == 1:
                warnings.warn(f"{self.path} cannot be written ({error}): records wait.", stacklevel=3)
            return
        self._waiting = []
        self._written += len(data)

    def flush(self) -> None:
        """Make the records durable."""
        if self._waiting:
            self._write()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        self.file.close()
