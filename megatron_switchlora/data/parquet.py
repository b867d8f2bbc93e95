"""The rows of a Parquet file: one document each, from a column of strings or a field of a column of structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.findings import EMPTY, BadDocument, Findings
from megatron_switchlora.data.forms import Source

ROWS = 1024  # of a Parquet file, decoded at once; bounds memory


def parquet_texts(source: Source, stream: BinaryIO, text_field: str, findings: Findings) -> Iterator[str]:
    """The documents that have text, in order.

    Raises:
        UserError: no such column, or none of strings; rows that are missing; a text that is not UTF-8.
        pa.ArrowException: the file is damaged.
    """
    # Buffered instead of read ahead: a column of a row group need not fit into memory.
    file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    column, *inner = _path_of(source, file.schema_arrow, text_field)
    for group in range(file.num_row_groups):
        row = 0
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[text_field]):
            cells = batch.column(batch.schema.names.index(column))
            for value in pc.struct_field(cells, inner) if inner else cells:
                text = _text(value, source, group, row, findings)
                row += 1
                if text is not None:
                    yield text
        expected = file.metadata.row_group(group).num_rows
        require(
            row == expected,
            f"{source}, row group {group}: {row} rows instead of {expected}: the file is damaged, fetch it again.",
        )


def _path_of(source: Source, schema: pa.Schema, text_field: str) -> list[str]:
    """The column of the text, or column and fields within it; a column of the whole name comes first."""
    path = [text_field] if text_field in schema.names else text_field.split(".")
    there, kind = schema.names, None
    for depth, name in enumerate(path):
        if name not in there:
            known = ", ".join(map(repr, there)) or "none"
            inside = f" in {'.'.join(path[:depth])!r}" if depth else ""
            raise UserError(f"{source}: no column {text_field!r} (there are{inside}: {known}): set data.text_field.")
        require(
            there.count(name) == 1,
            f"{source}: {there.count(name)} columns are named {name!r}, so which holds the text is not known: write "
            "the file again with a name for each.",
        )
        field = kind.field(name) if kind is not None else schema.field(name)
        kind = field.type
        there = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    require(
        _is_text(kind),
        f"{source}: column {text_field!r} holds {kind}, not strings: set data.text_field to the column of the text.",
    )
    return path


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _text(value: pa.Scalar, source: Source, group: int, row: int, findings: Findings) -> str | None:
    """A cell's text, or None where it has none or is left out; groups and rows count from 0, as pyarrow does."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        fault = BadDocument(f"not UTF-8 ({error.reason})", "write the file again")
        findings.bad(f"{source}, row group {group}, row {row}", fault)
        return None
    if text is not None and text.strip():
        return str(text)
    findings.note(EMPTY, f"{source}, row group {group}, row {row}")
    return None
