"""Text: which documents a run trains and validates on.

A corpus is two rows of documents (train, val), each a dict with the key "text". Source `stdlib` needs no download:
Python's own sources, every 20th file held out. Source `files` takes the user's (`files.py`). Both are kept on disk by
Arrow, as `datasets.Dataset`s. Source `hf` is a dataset of the hub (`stream.py`), read once and never kept.
`corpus_identity` describes the same choice from names, sizes and times alone: it keys the cache.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import pyarrow.compute as pc

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.files import file_texts, files_identity
from megatron_switchlora.data.findings import Findings
from megatron_switchlora.data.stream import stream_identity, stream_texts

FEATURES = datasets.Features({"text": datasets.Value("large_string")})  # 64-bit offsets: a document may exceed 2 GB
# pydoc_data is one generated file, a tenth of all; wherever it fell, it would dominate the held-out text
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
HOLD_OUT_EVERY, HOLD_OUT_AT = 20, 10


@dataclass
class Corpus:
    """Documents of a run, {"text": ...} each, and what identifies them (JSON-able). Of a stream: to be read once."""

    train: Iterable[dict[str, str]]
    val: Iterable[dict[str, str]]
    identity: dict[str, object]
    findings: Findings
    """What is left out or odd: all of it once the documents have been read."""


def corpus_identity(data: DataConfig) -> dict[str, object]:
    """What the corpus depends on, without reading it: file names, sizes and modification times (ns), and options.

    Raises:
        UserError: a file that is missing, a directory or no text by its name, a pattern without match, no standard
            library, a hub dataset whose commit cannot be looked up.
    """
    if data.source == "stdlib":
        listed = [[name, size] for name, size in _stdlib_files(data.max_bytes)]
        return {"source": "stdlib", "python": platform.python_version(), "files": listed}
    return files_identity(data) if data.source == "files" else stream_identity(data)


def load_corpus(data: DataConfig, scratch: Path, *, progress: bool = False) -> Corpus:
    """Read the corpus; its Arrow files lie in the folder `scratch`, which must outlive the datasets.

    Raises:
        UserError: as `corpus_identity`, and for every file that is unreadable, damaged, cut off, not UTF-8, not what
            its name says or without the text field; no text at all; nothing to hold out. Of a stream: these and broken
            connections as it is read.
    """
    identity = corpus_identity(data)
    findings = Findings(skip=data.on_bad_document == "skip")
    if data.source == "hf":
        streamed_train, streamed_val = stream_texts(data, scratch, findings)
        return Corpus(_rows(streamed_train), _rows(streamed_val), identity, findings)
    if data.source == "stdlib":
        train_texts, val_texts = _stdlib_texts(data.max_bytes)
    else:
        train_texts, val_texts = file_texts(data, findings)
    train = _store(train_texts, scratch / "train", progress)
    if val_texts is None:
        return Corpus(*_split(train, data.val_fraction), identity, findings)
    return Corpus(train, _store(val_texts, scratch / "val", progress), identity, findings)


def characters(documents: datasets.Dataset) -> np.ndarray:
    """Characters (code points) of each document, int64 [documents]."""
    return np.asarray(pc.utf8_length(documents.data.column("text")), dtype=np.int64)


def _rows(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    for text in texts:
        yield {"text": text}


def _store(texts: Iterable[str], folder: Path, progress: bool) -> datasets.Dataset:
    """Write documents to `folder` as a dataset; what goes wrong in reading them comes out as it was raised."""

    def rows() -> Iterator[dict[str, str]]:  # `from_generator` wants a function
        return _rows(texts)

    bars_were_off = datasets.are_progress_bars_disabled()
    if not progress:
        datasets.disable_progress_bars()
    try:  # the folder is new, so the fingerprint need not say what is in it
        return cast(
            datasets.Dataset,
            datasets.Dataset.from_generator(rows, features=FEATURES, cache_dir=str(folder), fingerprint="documents"),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (UserError, OSError, MemoryError)):
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
    sources = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_LIBRARY]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        sources += [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths if path.is_file()]
    sources.sort()
    total = np.cumsum([size for _, size in sources])
    fitting = sources[: int(np.searchsorted(total, max_bytes, side="right"))]
    require(
        bool(fitting),
        f"No source of Python's standard library in {root} fits data.max_bytes {max_bytes} ({len(sources)} there): "
        "raise it, or use data.source files if this Python comes without sources.",
    )
    return fitting


def _stdlib_texts(max_bytes: int) -> tuple[Iterator[str], Iterator[str] | None]:
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
