"""Text: which documents a run trains and validates on.

A corpus is two `datasets.Dataset`s (train, val) with one column "text", one row a document, kept on disk by
Arrow. Source `stdlib` needs no download: Python's own sources, every 20th file held out. Source `files` reads
plain text (one document a file, exactly as it stands) and JSON lines (one document a line), compressed or not.
The files are read here, strictly, and handed to `Dataset.from_generator`: the "json" and "text" loaders of
`datasets` are lenient (numbers become text, dates are rewritten, a missing field becomes None, "\\r\\n" becomes
"\\n", a second file with one more field fails), and a damaged corpus must never pass silently.
`corpus_identity` describes the same choice from names, sizes and times alone: it keys the cache.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import DataConfig, UserError, require

FEATURES = datasets.Features({"text": datasets.Value("large_string")})  # 64-bit offsets: a document may exceed 2 GB
# pydoc_data is one generated file, a tenth of all; wherever it fell, it would dominate the held-out text
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
HOLD_OUT_EVERY, HOLD_OUT_AT = 20, 10
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass
class Corpus:
    """Documents of a run: datasets with one column "text", and what identifies them (JSON-able)."""

    train: datasets.Dataset
    val: datasets.Dataset
    identity: dict[str, object]


def corpus_identity(data: DataConfig) -> dict[str, object]:
    """What the corpus depends on, without reading it: file names, sizes and modification times (ns), and options.

    Raises:
        UserError: a file that is missing, empty or a directory, a pattern without match, no standard library.
    """
    if data.source == "stdlib":
        listed = [[name, size] for name, size in _stdlib_files(data.max_bytes)]
        return {"source": "stdlib", "python": platform.python_version(), "files": listed}
    train, val = _chosen_files(data)
    return {
        "source": "files",
        "text_field": data.text_field,
        "train": [_stamp(path) for path in train],
        "val": [_stamp(path) for path in val] if val else data.val_fraction,
    }


def load_corpus(data: DataConfig, scratch: Path, *, progress: bool = False) -> Corpus:
    """Read the corpus; its Arrow files lie in the folder `scratch`, which must outlive the datasets.

    Raises:
        UserError: as `corpus_identity`, and for every file that is unreadable, damaged, cut off, not UTF-8, without
            text, not JSON lines or without the text field; nothing to hold out.
    """
    identity = corpus_identity(data)
    train_texts, val_texts = _stdlib_texts(data.max_bytes) if data.source == "stdlib" else _file_texts(data)
    train = _store(train_texts, scratch / "train", progress)
    if val_texts is None:
        return Corpus(*_split(train, data.val_fraction), identity)
    return Corpus(train, _store(val_texts, scratch / "val", progress), identity)


def characters(documents: datasets.Dataset) -> np.ndarray:
    """Characters (code points) of each document, int64 [documents]."""
    return np.asarray(pc.utf8_length(documents.data.column("text")), dtype=np.int64)


def _store(texts: Iterable[str], folder: Path, progress: bool) -> datasets.Dataset:
    """Write documents to `folder` as a dataset; what goes wrong in reading them comes out as it was raised."""

    def rows() -> Iterator[dict[str, str]]:
        for text in texts:
            yield {"text": text}

    bars_were_off = datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:  # the folder is new, so the fingerprint need not say what is in it
        return cast(
            datasets.Dataset,
            datasets.Dataset.from_generator(rows, features=FEATURES, cache_dir=str(folder), fingerprint="documents"),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError)):
            raise error.__cause__ from None
        raise
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()


def _split(documents: datasets.Dataset, val_fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cut the text, in document order, at character int(total * (1 - val_fraction))."""
    ends = np.cumsum(characters(documents))
    total = int(ends[-1])
    cut = int(total * (1 - val_fraction))
    require(
        0 < cut < total,
        f"{total} characters of text are too few to hold out data.val_fraction {val_fraction:g}: give more text or "
        "data.val_files.",
    )
    middle = int(np.searchsorted(ends, cut))  # the first document that ends at the cut or after it
    text = documents[middle]["text"]
    inside = len(text) - int(ends[middle] - cut)
    head, tail = (datasets.Dataset.from_dict({"text": [part]}, FEATURES) for part in (text[:inside], text[inside:]))
    held_out = [tail] if text[inside:] else []
    if middle + 1 < len(documents):  # `select` refuses an empty range at the end
        held_out.append(documents.select(range(middle + 1, len(documents))))
    train = datasets.concatenate_datasets([documents.select(range(middle)), head])
    return train, datasets.concatenate_datasets(held_out)


# --- Python's standard library


def _stdlib_files(max_bytes: int) -> list[tuple[str, int]]:
    """Relative names and sizes of the sources, sorted, as many as fit into max_bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths if path.is_file()]
    found.sort()
    total = np.cumsum([size for _, size in found])
    fitting = found[: int(np.searchsorted(total, max_bytes, side="right"))]
    require(
        bool(fitting),
        f"No source of Python's standard library in {root} fits data.max_bytes {max_bytes} ({len(found)} there): raise "
        "it, or use data.source files if this Python comes without sources.",
    )
    return fitting


def _stdlib_texts(max_bytes: int) -> tuple[Iterator[str], Iterator[str]]:
    names = [name for name, _ in _stdlib_files(max_bytes)]
    train = [name for i, name in enumerate(names) if i % HOLD_OUT_EVERY != HOLD_OUT_AT]
    val = [name for i, name in enumerate(names) if i % HOLD_OUT_EVERY == HOLD_OUT_AT]
    require(
        bool(val),
        f"The stdlib corpus needs more than {HOLD_OUT_AT} files to hold one out; data.max_bytes {max_bytes} gives "
        f"{len(names)}: raise it.",
    )
    return _sources(train), _sources(val)


def _sources(names: list[str]) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding
        if text.strip():
            yield text


# --- files of the user


def _file_texts(data: DataConfig) -> tuple[Iterator[str], Iterator[str] | None]:
    train, val = _chosen_files(data)
    train_texts = (text for path in train for text in _documents(path, data.text_field))
    val_texts = (text for path in val for text in _documents(path, data.text_field))
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


def _documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file that have text, in order."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    with _reading(path) as stream:
        is_json = name.endswith((".json", ".jsonl"))
        texts = _json_texts(path, stream, text_field) if is_json else _plain_text(path, stream)
        empty = True
        for text in texts:
            if text.strip():
                empty = False
                yield text
    require(not empty, f"{path} holds no document with text: fill it or leave it out of the data files.")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; every failure to read them is a UserError that names the file."""
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        compressed = path.suffix.lower() in COMPRESSED
        advice = "if it is damaged or cut off, fetch it again" if compressed else "check the file and its rights"
        raise UserError(f"{path} cannot be read ({error}): {advice}.") from error


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="zstd"))))
    return path.open("rb")


def _plain_text(path: Path, stream: BinaryIO) -> Iterator[str]:
    content = stream.read()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8.") from None


def _json_texts(path: Path, stream: BinaryIO, text_field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
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
