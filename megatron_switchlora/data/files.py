"""Files of documents: text, JSON lines and Parquet, read strictly.

Plain text is one document a file, exactly as it stands; JSON lines hold one document a line, Parquet one a row. Text
and JSON lines may be compressed. The loaders of `datasets` are lenient (numbers become text, dates are rewritten, a
missing field becomes None, "\\r\\n" becomes "\\n", one number among the texts of a block turns its neighbours into
quoted JSON) and therefore not used: a damaged corpus must never pass silently. Every fault is a `UserError` that names
the file and the place.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem

from ..config import DataConfig, UserError, require

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ROWS = 1024  # of a Parquet file, decoded at once; bounds memory
HUB = "hf://"
Source = Path | str  # a file here, or the address of one on the hub


# --- data.source files


def files_identity(data: DataConfig) -> dict[str, object]:
    """Names, sizes and modification times (ns) of the files, and options."""
    train, val = _chosen_files(data)
    return {
        "source": "files",
        "text_field": data.text_field,
        "train": [_stamp(path) for path in train],
        "val": [_stamp(path) for path in val] if val else data.val_fraction,
    }


def file_texts(data: DataConfig) -> tuple[Iterator[str], Iterator[str] | None]:
    """Training and validation documents (the latter None where they are to be held out)."""
    train, val = _chosen_files(data)
    train_texts = (text for path in train for text in documents(path, data.text_field))
    val_texts = (text for path in val for text in documents(path, data.text_field))
    return train_texts, val_texts if val else None


def _chosen_files(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """Training and validation files (the latter may be none)."""
    train = _expand("data.files", data.patterns())
    val = _expand("data.val_files", data.patterns(validation=True))
    require(bool(train), "data.source files needs data.files: give file names or glob patterns.")
    known = {path.resolve() for path in train}
    for path in val:
        require(path.resolve() not in known, f"{path} is in both data.files and data.val_files: take it out of one.")
    return train, val


def _expand(option: str, patterns: list[str]) -> list[Path]:
    """The files the patterns name, absolute, each once, every pattern's sorted."""
    found: dict[Path, Path] = {}
    for pattern in patterns:
        literal = Path(pattern).expanduser()
        if os.path.exists(literal) or not has_magic(pattern):
            require(
                not os.path.isdir(literal), f"{option}: {pattern} is a directory: give {pattern}/*.txt or the like."
            )
            require(os.path.isfile(literal), f"{option}: there is no file {pattern}: correct the path.")
        names = [literal] if os.path.exists(literal) else sorted(glob(str(literal), recursive=True))
        matches = [Path(name) for name in names if os.path.isfile(name)]
        require(bool(matches), f"{option}: no file matches the pattern {pattern}: correct it.")
        for path in matches:
            require(path.stat().st_size > 0, f"{option}: the file {path} is empty (0 bytes): fill it or leave it out.")
            found.setdefault(path.resolve(), path.absolute())  # a link's own name tells the format
    return list(found.values())


def _stamp(path: Path) -> list[str | int]:
    status = path.stat()
    return [path.name, str(path.resolve()), status.st_size, status.st_mtime_ns]


# --- one file


def form_of(source: Source) -> tuple[str, str]:
    """What a file holds by its name, "json", "parquet" or "text", and the suffix of its compression or ""."""
    name = str(source).lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    if name.endswith((".json", ".jsonl")):
        return "json", compression
    return "parquet" if name.endswith(".parquet") else "text", compression


def documents(source: Source, text_field: str) -> Iterator[str]:
    """The documents of one file that have text, in order.

    Raises:
        UserError: the file is unreadable, damaged, cut off, not UTF-8, without text, not what its name says or without
            the field.
    """
    form, _ = form_of(source)
    with _reading(source) as stream:
        if form == "text":
            texts = _plain_text(source, stream)
        else:
            texts = (_json_texts if form == "json" else _parquet_texts)(source, stream, text_field)
        empty = True
        for text in texts:
            if text.strip():
                empty = False
                yield text
    require(not empty, f"{source} holds no document with text: fill it or leave it out of the data files.")


@contextmanager
def _reading(source: Source) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; every failure to read them is a UserError that names the file."""
    try:
        with _open(source) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        form, compression = form_of(source)
        damaged = bool(compression) or form == "parquet"
        advice = "if it is damaged or cut off, fetch it again" if damaged else "check the file and its rights"
        raise UserError(f"{source} cannot be read ({first_line(error)}): {advice}.") from error


def first_line(error: Exception) -> str:
    """What an error says, for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _open(source: Source) -> Iterator[BinaryIO]:
    form, compression = form_of(source)
    require(
        not (form == "parquet" and compression),
        f"{source}: a Parquet file is compressed inside, not as a whole: decompress it first.",
    )
    with (
        source.open("rb") if isinstance(source, Path) else HfFileSystem().open(source, "rb") as raw,
        _decompressed(raw, compression) as stream,
    ):
        yield stream


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    match compression:
        case ".gz":
            return cast(BinaryIO, gzip.open(raw))
        case ".bz2":
            return cast(BinaryIO, bz2.open(raw))
        case ".xz":
            return cast(BinaryIO, lzma.open(raw))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, pa.CompressedInputStream(raw, "zstd"))))
    return raw


def _plain_text(source: Source, stream: BinaryIO) -> Iterator[str]:
    content = stream.read()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8.") from None


def _json_texts(source: Source, stream: BinaryIO, text_field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise UserError(f"{where}: not JSON in UTF-8, one object a line ({error}): repair the file.") from None
        require(isinstance(row, dict), f"{where}: a JSON {type(row).__name__}, not an object: give one object a line.")
        if text_field not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where}: no field {text_field!r} (there are: {there}): set data.text_field.")
        text = row[text_field]
        require(
            isinstance(text, str),
            f"{where}: field {text_field!r} holds {type(text).__name__}, not a string: repair it, or set "
            "data.text_field to the field of the text.",
        )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: half a surrogate pair (\\ud800) is no text: repair the line.") from None
        yield text


def _parquet_texts(source: Source, stream: BinaryIO, text_field: str) -> Iterator[str]:
    # Buffered instead of read ahead: a column of a row group need not fit into memory.
    file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    schema = file.schema_arrow
    if text_field not in schema.names:
        there = ", ".join(map(repr, schema.names)) or "none"
        raise UserError(f"{source}: no column {text_field!r} (there are: {there}): set data.text_field.")
    kind = schema.field(text_field).type
    require(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind),
        f"{source}: column {text_field!r} holds {kind}, not strings: set data.text_field to the column of the text.",
    )
    for group in range(file.num_row_groups):
        row = 0
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[text_field]):
            for value in batch.column(0):
                yield _parquet_text(value, f"{source}, row group {group}, row {row}")
                row += 1
        expected = file.metadata.row_group(group).num_rows
        require(
            row == expected,
            f"{source}, row group {group}: {row} rows instead of {expected}: the file is damaged, fetch it again.",
        )


def _parquet_text(value: pa.Scalar, where: str) -> str:
    """A cell's text; `where` counts groups and rows from 0, as pyarrow does."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}): write the file again.") from None
    require(isinstance(text, str), f"{where}: a null, not a string: leave such rows out of the file.")
    return text
