"""Records of a run: one JSON object a line, appended without buffering, numbers in full precision.

A line that cannot be written (a full disk) waits for the next one, so a file never holds a torn line but after a crash
of the machine or a fault of the disk, which may leave anything anywhere: readers pass over what is no record. A run
that goes on keeps the records up to its checkpoint, in order; all else is set aside, byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.disk import open_no_follow, parse_json, replace_bytes, write_all

LONGEST = 1 << 20  # bytes of a line; a record has a thousandth of it


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, kept within the range of a float."""
    return math.exp(min(loss, 700.0))


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(line: bytes) -> Optional[dict[str, Any]]:
    """A line's record: an object of finite numbers, of which one is its step; None if it is no such thing."""
    try:
        record = parse_json(line)
        whole = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
        return record if whole and all(map(_is_number, record.values())) else None
    except (ValueError, OverflowError):  # also bytes that are no text, and numbers beyond a float
        return None


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _lines(path: Path) -> Iterator[tuple[bytes, Optional[dict[str, Any]]]]:
    """Every line as it is, with its record; none if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            yield line, _record(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without what is none.

    Raises:
        OSError: it cannot be read.
    """
    return [record for _, record in _lines(path) if record is not None]


@dataclass
class Sorted:
    """Lines of a file of records: those kept, in order, and those set aside for being of later steps, repeated, or no
    record."""

    kept: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    aside: list[bytes] = field(default_factory=list)
    later: int = 0

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for record, _ in self.kept]


def sort_records(path: Path, steps: int) -> Sorted:
    """What of a file goes on with a run from its checkpoint after `steps` steps.

    Raises:
        OSError: it cannot be read.
    """
    result = Sorted()
    if path.is_symlink():  # to somebody's file, of which nothing is copied here
        return result
    seen: set[tuple[int, bool]] = set()
    for line, record in _lines(path):
        whole = line if line.endswith(b"\n") else line + b"\n"
        if record is None:
            result.aside.append(whole)
            continue
        kind, later = (record["step"], "val_loss" in record), not steps or record["step"] > steps
        if later or kind in seen:
            result.aside.append(whole)
            result.later += later
        else:
            seen.add(kind)
            result.kept.append((record, whole))
    result.kept.sort(key=lambda entry: entry[0]["step"])  # a step's loss stays before its evaluation
    return result


def keep_records(path: Path, steps: int) -> tuple[Sorted, str]:
    """Leave the records up to `steps` in a file; the rest goes to the end of metrics.dropped*.jsonl. Returns what it
    held and a sentence on what was set aside, if anything was.

    Raises:
        OSError: the folder cannot be written, or the other file is a link.
    """
    result = sort_records(path, steps)
    note = ""
    if result.aside:
        dropped = path.with_name(path.name.replace("metrics.", "metrics.dropped.", 1))
        with open_no_follow(dropped, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            write_all(file, b"".join(result.aside))
            os.fsync(file.fileno())
        odd = len(result.aside) - result.later
        parts = [f"{result.later} record(s) after step {steps}"] * (result.later > 0)
        parts += [f"{odd} damaged or repeated line(s)"] * (odd > 0)
        note = f"{path.name}: {' and '.join(parts)} moved to {dropped.name}"
    replace_bytes(path, b"".join(line for _, line in result.kept))
    return result, note


class RecordFile:
    """Appends to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_no_follow(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._waiting: list[str] = []
        self._written = os.fstat(self.file.fileno()).st_size

    def in_place(self) -> bool:
        """Whether the file is still the one at its path."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

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
        """Make the records durable, or warn."""
        if self._waiting:
            self._write()
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            warnings.warn(f"{self.path} cannot be written ({error}): its end may be lost.", stacklevel=2)

    def close(self) -> None:
        """Make the records durable.

        Raises:
            OSError: some of them cannot be written.
        """
        if self._waiting:
            self._write()
        with self.file:
            if self._waiting:
                raise OSError(f"{len(self._waiting)} records of {self.path.name} still wait for room")
            os.fsync(self.file.fileno())
