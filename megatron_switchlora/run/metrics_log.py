"""Append the records of a run, one JSON object per line, unbuffered and with numbers in full precision.

A line that cannot be written, for example on a full disk, waits for the next one. So a file holds an incomplete line
only after a crash of the machine or a fault of the disk. As these can leave any content, readers ignore lines that are
not records. A resumed run keeps the records up to its checkpoint, in order. All other lines are moved to another file,
byte for byte.
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

LONGEST = 1 << 20  # bytes of a line, about a thousand times a record


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats, within the range of a float."""
    return math.exp(min(loss, 700.0))


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(line: bytes) -> Optional[dict[str, Any]]:
    """Return a line's record, an object of finite numbers with a step, or None if the line is not a record."""
    try:
        record = parse_json(line)
        has_step = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
        return record if has_step and all(map(_is_number, record.values())) else None
    except (ValueError, OverflowError):  # also bytes that are not text, and numbers beyond a float
        return None


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _lines(path: Path) -> Iterator[tuple[bytes, Optional[dict[str, Any]]]]:
    """Yield every line unchanged, with its record; nothing if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            yield line, _record(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without lines that are not records.

    Raises:
        OSError: it cannot be read.
    """
    return [record for _, record in _lines(path) if record is not None]


@dataclass
class Sorted:
    """The lines of a file of records, sorted into those to keep and the others."""

    kept: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    """Records with their lines, in order."""
    aside: list[bytes] = field(default_factory=list)
    """Lines of later steps, repeated lines, and lines that are not records."""
    later: int = 0
    """How many of `aside` are of later steps."""

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for record, _ in self.kept]


def sort_records(path: Path, steps: int) -> Sorted:
    """Sort the lines of a file by whether a run keeps them that resumes after `steps` steps.

    Raises:
        OSError: it cannot be read.
    """
    lines = Sorted()
    if path.is_symlink():  # a link to somebody's file, from which nothing may be copied
        return lines
    seen: set[tuple[int, bool]] = set()
    for line, record in _lines(path):
        ended = line if line.endswith(b"\n") else line + b"\n"
        if record is None:
            lines.aside.append(ended)
            continue
        kind, later = (record["step"], "val_loss" in record), not steps or record["step"] > steps
        if later or kind in seen:
            lines.aside.append(ended)
            lines.later += later
        else:
            seen.add(kind)
            lines.kept.append((record, ended))
    lines.kept.sort(key=lambda entry: entry[0]["step"])  # stable, so a step's loss stays before its evaluation
    return lines


def keep_records(path: Path, steps: int) -> tuple[Sorted, str]:
    """Leave the records up to `steps` in a file, and append all other lines to metrics.dropped*.jsonl.

    Returns:
        The sorted lines, and a sentence about the moved lines or "".

    Raises:
        OSError: the folder cannot be written, or the other file is a link.
    """
    lines = sort_records(path, steps)
    note = ""
    if lines.aside:
        dropped = path.with_name(path.name.replace("metrics.", "metrics.dropped.", 1))
        with open_no_follow(dropped, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            write_all(file, b"".join(lines.aside))
            os.fsync(file.fileno())
        faulty = len(lines.aside) - lines.later
        moved = [f"{lines.later} record(s) after step {steps}"] * (lines.later > 0)
        moved += [f"{faulty} damaged or repeated line(s)"] * (faulty > 0)
        note = f"{path.name}: {' and '.join(moved)} moved to {dropped.name}"
    replace_bytes(path, b"".join(line for _, line in lines.kept))
    return lines, note


class RecordFile:
    """A file to which records are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_no_follow(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._waiting: list[str] = []
        self._written = os.fstat(self.file.fileno()).st_size

    def in_place(self) -> bool:
        """Return whether the file is still the one at its path."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def log(self, record: dict[str, Any]) -> None:
        """Append an object, or warn that it waits because the disk is full."""
        self._waiting.append(as_line(record))
        self._write()

    def _write(self) -> None:
        data = "".join(self._waiting).encode()
        try:
            if self.file.write(data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(self._written)  # leave no incomplete line
            if len(self._waiting) == 1:
                warnings.warn(
                    f"{self.path} cannot be written ({error}): records wait in memory. Make room.", stacklevel=3
                )
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
                raise OSError(f"{len(self._waiting)} records of {self.path.name} still wait for room on the disk")
            os.fsync(self.file.fileno())
