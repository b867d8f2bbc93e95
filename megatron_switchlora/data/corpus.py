"""Choose the documents that a run trains and validates on.

A corpus is two sequences of documents (train, val). A document is a dict with the key "text".
    stdlib    Python's own sources, which need no download; every 20th file is held out
    files     the user's files (`files.py`)
    hf        a dataset of the Hugging Face hub (`stream.py`), read once and never kept
Arrow keeps the first two on disk as `datasets.Dataset`s. `corpus_identity` identifies a corpus from names, sizes and
times alone. It is part of the cache's key.
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
from megatron_switchlora.startup.progress import shows_progress

FEATURES = datasets.Features({"text": datasets.Value("large_string")})  # 64-bit offsets: a document may exceed 2 GB
# pydoc_data is one generated file with a tenth of all text; if it were held out, it would dominate the held-out text
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
HOLD_OUT_EVERY, HOLD_OUT_AT = 20, 10


@dataclass
class Corpus:
    """Documents of a run, each {"text": ...}; those of a stream can be read only once."""

    train: Iterable[dict[str, str]]
    val: Iterable[dict[str, str]]
    identity: dict[str, object]
    """What identifies the documents, ready for JSON."""
    findings: Findings
    """Documents left out and unusual files; complete once all documents have been read."""


def corpus_identity(data: DataConfig) -> dict[str, object]:
    """Return what the corpus depends on, without reading it.

    This is file names, sizes, modification times (ns) and options.

    Raises:
        UserError: a file is missing, is a directory, or has a name that means another format. A pattern matches no
            file. There is no standard library. The commit of a hub dataset cannot be looked up.
    """
    if data.source == "stdlib":
        names_and_sizes = [[name, size] for name, size in _stdlib_files(data.max_bytes)]
        return {"source": "stdlib", "python": platform.python_version(), "files": names_and_sizes}
    return files_identity(data) if data.source == "files" else stream_identity(data)


def load_corpus(data: DataConfig, scratch: Path, *, progress: bool = False) -> Corpus:
    """Read the corpus; its Arrow files lie in the folder `scratch`, which must outlive the datasets.

    A stream raises these errors while it is read.

    Raises:
        UserError: as `corpus_identity`. A file is unreadable, damaged, cut off, not UTF-8, of another format than its
            name says, or without the text field. There is no text at all, or none to hold out. A connection breaks.
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
    """Return the number of characters (code points) of each document, int64 [documents]."""
    return np.asarray(pc.utf8_length(documents.data.column("text")), dtype=np.int64)


def _rows(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    for text in texts:
        yield {"text": text}


def _store(texts: Iterable[str], folder: Path, progress: bool) -> datasets.Dataset:
    """Write documents to `folder` as a dataset; pass errors of reading them on unchanged."""

    def rows() -> Iterator[dict[str, str]]:  # `from_generator` takes a function
        return _rows(texts)

    bars_were_off = datasets.are_progress_bars_disabled()
    if not (progress and shows_progress()):
        datasets.disable_progress_bars()
    try:  # the folder is new, so the fingerprint need not depend on its content
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
        f"{total} characters of text are too few to hold out data.val_fraction {val_fraction:g} of them: give more "
        "text or data.val_files.",
    )
    middle = int(np.searchsorted(ends, cut))  # the first document that ends at or after the cut
    text = documents[middle]["text"]
    inside = len(text) - int(ends[middle] - cut)
    head, tail = (datasets.Dataset.from_dict({"text": [part]}, FEATURES) for part in (text[:inside], text[inside:]))
    held_out = [tail] if text[inside:] else []
    if middle + 1 < len(documents):  # `select` raises for an empty range at the end
        held_out.append(documents.select(range(middle + 1, len(documents))))
    train = datasets.concatenate_datasets([documents.select(range(middle)), head])
    return train, datasets.concatenate_datasets(held_out)


# --- Python's standard library


def _stdlib_files(max_bytes: int) -> list[tuple[str, int]]:
    """Return the relative names and sizes of the sources, sorted, as many as fit into `max_bytes`."""
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
        f"No source of Python's standard library in {root} fits into data.max_bytes {max_bytes} (it has {len(sources)} "
        "sources): raise data.max_bytes, or use data.source files if this Python comes without sources.",
    )
    return fitting


def _stdlib_texts(max_bytes: int) -> tuple[Iterator[str], Iterator[str] | None]:
    names = [name for name, _ in _stdlib_files(max_bytes)]
    train = [name for i, name in enumerate(names) if i % HOLD_OUT_EVERY != HOLD_OUT_AT]
    val = [name for i, name in enumerate(names) if i % HOLD_OUT_EVERY == HOLD_OUT_AT]
    require(
        bool(val),
        f"The stdlib corpus needs more than {HOLD_OUT_AT} files to hold one out; data.max_bytes {max_bytes} gives "
        f"{len(names)}: raise data.max_bytes.",
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
