"""Read plain text, one document per file exactly as it stands, and JSON lines, one document per line.

A byte order mark at the start of a file is not part of the text. The size of a document is limited where the size of
the file does not limit it: in compressed files, and in lines.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.findings import EMPTY, JSON_OBJECTS, MARKUP, BadDocument, Findings
from megatron_switchlora.data.forms import (
    MARK,
    Source,
    form_of,
    lines_are_objects,
    markup_by_name,
    not_text_by_content,
    not_text_by_name,
)

LONGEST = 1 << 30  # bytes of a document; a decompression bomb of a few MB must not fill the memory
ADVICE = "leave it out, or convert it to JSON lines, Parquet or UTF-8 text"


def plain_text(source: Source, stream: BinaryIO, findings: Findings) -> Iterator[str]:
    """Yield the one document of a text file."""
    try:
        text = _decoded(source, stream, findings)
    except BadDocument as document:
        findings.bad(f"{source}", document)
        return
    if text.strip():
        yield text
    else:
        findings.note(EMPTY, f"{source}")


def _decoded(source: Source, stream: BinaryIO, findings: Findings) -> str:
    """Return a file's text.

    Raises:
        BadDocument: the file is not plain text in UTF-8.
    """
    refuse_name(source)
    content = stream.read(LONGEST + 1) if form_of(source)[1] else stream.read()
    if form_of(source)[1] and len(content) > LONGEST:
        raise UserError(_too_long(f"{source}"))
    if what := not_text_by_content(content):
        raise BadDocument(f"this is {what}, no plain text in UTF-8", ADVICE)
    content = content.removeprefix(MARK)
    if (place := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, place) + 1
        raise BadDocument(f"line {line} holds a NUL byte, so this is no plain text", ADVICE)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadDocument(f"line {line} is not UTF-8 ({error.reason})", "convert the file to UTF-8") from None
    if lines_are_objects(content):
        findings.note(JSON_OBJECTS, f"{source}")
    if markup_by_name(source):
        findings.note(MARKUP, f"{source}")
    return text


def refuse_name(source: Source) -> None:
    """Refuse a file that would be read as text if its name means another format.

    Raises:
        BadDocument: the name means another format.
    """
    if what := not_text_by_name(source):
        advice = f"{ADVICE}; if it is text, rename it to .txt"
        raise BadDocument(f"by its name this is {what}, no plain text", advice)


def json_texts(source: Source, stream: BinaryIO, text_field: str, findings: Findings) -> Iterator[str]:
    """Yield the documents of a file with one JSON object per line."""
    rows = 0
    for number, line in enumerate(_lines(source, stream), start=1):
        if number == 1:
            line = line.removeprefix(MARK)
            what = not_text_by_content(line)
            require(what is None, f"{source}: this is {what}, no JSON lines in UTF-8: {ADVICE}.")
        if not line.strip():
            continue
        rows += 1
        try:
            text = _json_text(line, text_field)
        except BadDocument as document:
            findings.bad(f"{source}, line {number}", document)
            continue
        if text is not None and text.strip():
            yield text
        else:
            findings.note(EMPTY, f"{source}, line {number}")
    if not rows:
        findings.note(EMPTY, f"{source}")


def _lines(source: Source, stream: BinaryIO) -> Iterator[bytes]:
    # `readline` of a hub file ignores its limit
    reader = stream if isinstance(stream, io.BufferedIOBase) else io.BufferedReader(cast(io.RawIOBase, stream))
    number = 1
    while line := reader.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise UserError(_too_long(f"{source}, line {number}"))
        yield line
        number += 1


def _too_long(place: str) -> str:
    return f"{place}: longer than {LONGEST >> 20} MiB, the limit of a document: split it, or check how it was made."


def _json_text(line: bytes, text_field: str) -> str | None:
    """Return the text of a JSON object, or None for a null.

    Raises:
        BadDocument: the line is not a JSON object, or has no text in this field.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))  # joined files may have byte order marks inside
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise BadDocument(f"not JSON in UTF-8, one object per line ({error})", "repair the file") from None
    if not isinstance(row, dict):
        raise BadDocument(f"a JSON {type(row).__name__}, not an object", "give one object per line")
    text = _field(row, text_field)
    if text is None:
        return None
    if not isinstance(text, str):
        fault = f"field {text_field!r} holds {type(text).__name__}, not a string"
        raise BadDocument(fault, "repair it, or set data.text_field to the field of the text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadDocument("half a surrogate pair (\\ud800) is not text", "repair the line") from None
    return text


def _field(row: dict[str, Any], text_field: str) -> Any:
    """Return a field by its whole name, else by a path of names joined by dots; null within the path is null."""
    if text_field in row:
        return row[text_field]
    value: Any = row
    for name in text_field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            fields = ", ".join(map(repr, value if isinstance(value, dict) else row)) or "none"
            raise BadDocument(f"no field {text_field!r} (there are: {fields})", "set data.text_field")
        value = value[name]
    return value
