"""Read documents strictly from files of text, JSON lines and Parquet.

A text file is one document. JSON lines hold one document per line, and Parquet one per row. `forms.py` tells the
formats apart. `texts.py` and `parquet.py` read them. Text and JSON lines may be compressed.

Every fault is a `UserError` that names the file and the place. Documents without text are left out and counted
(`findings.py`). With data.on_bad_document skip, unreadable documents are too.

The loaders of `datasets` are not used, since a damaged corpus must never pass silently and they are lenient. In them
numbers become text, dates are rewritten, a missing field becomes None, and "\\r\\n" becomes "\\n". One number among the
texts of a block turns the other texts into quoted JSON.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
from huggingface_hub import HfFileSystem

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.findings import BadDocument, Findings
from megatron_switchlora.data.forms import Source, form_of, may_be_julia, starts_with_object
from megatron_switchlora.data.parquet import parquet_texts
from megatron_switchlora.data.texts import json_texts, plain_text, refuse_name
from megatron_switchlora.disk import user_path

HUB = "hf://"
FAULTS = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError)  # raised by a file that cannot be read
AS_EVER = (".json", ".jsonl", ".parquet")  # read as before the identity had an entry "reading"


# --- data.source files


def files_identity(data: DataConfig) -> dict[str, object]:
    """Return the files' names, sizes and modification times (ns), and options."""
    train, val = _chosen_files(data)
    identity: dict[str, object] = {
        "source": "files",
        "text_field": data.text_field,
        "train": [_stamp(path) for path in train],
        "val": [_stamp(path) for path in val] if val else data.val_fraction,
    }
    if not all(str(path).lower().removesuffix(form_of(path)[1]).endswith(AS_EVER) for path in train + val):
        identity["reading"] = 2
    return identity | reading_options(data)


def reading_options(data: DataConfig) -> dict[str, object]:
    """Return the reading options that identify a corpus, except those with their default value."""
    return {} if data.on_bad_document == "error" else {"on_bad_document": data.on_bad_document}


def file_texts(data: DataConfig, findings: Findings) -> tuple[Iterator[str], Iterator[str] | None]:
    """Return training and validation documents, the latter as None if they are to be held out of the former.

    Raises:
        UserError: as `documents`; also at the end, if there are no documents.
    """
    train, val = _chosen_files(data)
    return _texts(data, train, findings), _texts(data, val, findings) if val else None


def _texts(data: DataConfig, paths: list[Path], findings: Findings) -> Iterator[str]:
    texts = (text for path in paths for text in documents(path, data.text_field, findings))
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return require_text(texts, f"{paths[0]}{more}", findings)


def _chosen_files(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """Return training and validation files; the latter may be empty."""
    skip = data.on_bad_document == "skip"
    train = _expand("data.files", data.patterns(), skip)
    val = _expand("data.val_files", data.patterns(validation=True), skip)
    require(bool(train), "data.source files needs data.files: give file names or glob patterns.")
    train_paths = {path.resolve() for path in train}
    for path in val:
        require(
            path.resolve() not in train_paths,
            f"{path} is in both data.files and data.val_files: remove it from one of them.",
        )
    return train, val


def _expand(option: str, patterns: list[str], skip: bool) -> list[Path]:
    """Return the absolute paths that match the patterns, each once, sorted within a pattern.

    Without `skip`, a name that means another format is an error.
    """
    paths: dict[Path, Path] = {}
    for pattern in patterns:
        literal = user_path(pattern)
        if os.path.exists(literal) or not has_magic(pattern):
            require(
                not os.path.isdir(literal), f"{option}: {pattern} is a directory: give {pattern}/*.txt or the like."
            )
            require(os.path.isfile(literal), f"{option}: no file {pattern} exists: correct the path.")
        names = [literal] if os.path.exists(literal) else sorted(glob(str(literal), recursive=True))
        matches = [Path(name) for name in names if os.path.isfile(name)]
        require(bool(matches), f"{option}: no file matches the pattern {pattern}: correct it.")
        for path in matches:
            if not skip:
                _require_form(option, path)
            paths.setdefault(path.resolve(), path.absolute())  # keep a link's own name, which shows the format
    return list(paths.values())


def _require_form(option: str, path: Path) -> None:
    """Raise at the start the error that reading the file would raise later."""
    if form_of(path)[0] == "text":
        try:
            refuse_name(path)
        except BadDocument as document:
            raise UserError(
                f"{option}: {path}: {document}, or leave such files out with data.on_bad_document skip."
            ) from None


def _stamp(path: Path) -> list[str | int]:
    status = status_of(path)
    return [path.name, str(path.resolve()), status.st_size, status.st_mtime_ns]


def status_of(path: Path) -> os.stat_result:
    """Return a file's size and times.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): check the file and its disk.") from error


# --- one file


def documents(source: Source, text_field: str, findings: Findings | None = None) -> Iterator[str]:
    """Yield the documents of one file that have text, in order.

    `findings` collects documents left out and unusual files.

    Raises:
        UserError: the file is unreadable, damaged, cut off or of another format than its name says. A document is too
            large. A document is not UTF-8 or lacks the field, and must not be left out.
    """
    findings = findings or Findings()
    with _reading(source) as stream:
        match _form(source, stream):
            case "text":
                yield from plain_text(source, stream, findings)
            case "json":
                yield from json_texts(source, stream, text_field, findings)
            case _:
                yield from parquet_texts(source, stream, text_field, findings)


def require_text(texts: Iterator[str], where: str, findings: Findings) -> Iterator[str]:
    """Yield the texts.

    Raises:
        UserError: there are none; raised at the end.
    """
    empty = True
    for text in texts:
        empty = False
        yield text
    left_out = " ".join(["", *findings.sentences()]) if findings.skip else ""
    require(not empty, f"There is no document with text in {where}: give files that have text.{left_out}")


def _form(source: Source, stream: BinaryIO) -> str:
    form, _ = form_of(source)
    if form == "json" and may_be_julia(source) and isinstance(source, Path):
        head = cast(io.BufferedReader, stream).peek(1000)
        return "json" if starts_with_object(head) else "text"
    return form


@contextmanager
def _reading(source: Source) -> Iterator[BinaryIO]:
    """Open a file's decompressed bytes; turn every failure to read them into a UserError that names the file."""
    try:
        with _open(source) as stream:
            yield stream
    except MemoryError as error:
        raise UserError(
            f"{source} cannot be read: a document in it needs more memory than is free: check how the file was made, "
            "or split it."
        ) from error
    except FAULTS as error:
        form, compression = form_of(source)
        damaged = bool(compression) or form == "parquet"
        advice = "if it is damaged or cut off, fetch it again" if damaged else "check the file and its permissions"
        raise UserError(f"{source} cannot be read ({first_line(error)}): {advice}.") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _open(source: Source) -> Iterator[BinaryIO]:
    form, compression = form_of(source)
    require(
        not (form == "parquet" and compression),
        f"{source}: a Parquet file is compressed inside, not as a whole: decompress it first.",
    )
    binary_format = compression or (".parquet" if form == "parquet" else "")
    with source.open("rb") if isinstance(source, Path) else HfFileSystem().open(source, "rb") as raw:
        if binary_format:
            filled = raw.seek(0, os.SEEK_END) > 0
            require(filled, f"{source} is empty (0 bytes), not a {binary_format} file: fetch it again or leave it out.")
            raw.seek(0)
        with _decompressed(raw, compression) as stream:
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
