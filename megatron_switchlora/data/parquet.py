"""Read a Parquet file, one document per row, from a column of strings or a field of a column of structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.findings import EMPTY, BadDocument, Findings
from megatron_switchlora.data.forms import Source

ROWS = 1024  # rows decoded at once; bounds memory


def parquet_texts(source: Source, stream: BinaryIO, text_field: str, findings: Findings) -> Iterator[str]:
    """Yield the documents that have text, in order.

    Raises:
        UserError: the column does not exist or does not hold strings; rows are missing; or a text is not UTF-8.
        pa.ArrowException: the file is damaged.
    """
    # Buffered reads, as a column of a row group may not fit into memory.
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
    """Return the column of the text, and the fields within it if the text lies in a struct.

    A column with the whole name takes precedence.
    """
    path = [text_field] if text_field in schema.names else text_field.split(".")
    names, kind = schema.names, None
    for depth, name in enumerate(path):
        if name not in names:
            listed = ", ".join(map(repr, names)) or "none"
            inside = f" in {'.'.join(path[:depth])!r}" if depth else ""
            raise UserError(f"{source}: no column {text_field!r} (there are{inside}: {listed}): set data.text_field.")
        require(
            names.count(name) == 1,
            f"{source}: {names.count(name)} columns are named {name!r}, so it is unknown which holds the text: write "
            "the file again with different names.",
        )
        field = kind.field(name) if kind is not None else schema.field(name)
        kind = field.type
        names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
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
    """Return a cell's text, or None if it has none or is left out.

    `group` and `row` count from 0, as in pyarrow.
    """
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
