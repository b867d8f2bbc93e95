"""A dataset of the Hugging Face hub, or a folder laid out like one, streamed: no text is kept.

`datasets` says which files make up a config and split. They are read one after the other by the strict readers of
`files`, through the hub's file system where they are not local, and go to the tokenizer as they come.
`load_dataset(streaming=True)` is not used: besides the lenient readers, it retries a lost connection above the
decompressor, where text read before the loss is silently left out. The hub's file system repeats the request for the
missing bytes instead, and what it cannot mend ends the build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path

import datasets
from huggingface_hub import DatasetCard, HfApi

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.files import HUB, documents, first_line, reading_options, require_text, status_of
from megatron_switchlora.data.findings import Findings
from megatron_switchlora.data.forms import Source, form_of
from megatron_switchlora.disk import user_path

COMMIT = re.compile("[0-9a-f]{40}")


def pinned(data: DataConfig) -> DataConfig:
    """The configuration with a hub dataset's commit written out, which alone asks the hub; others as they are.

    Raises:
        UserError: the commit cannot be looked up; a revision of a local folder.
    """
    if data.source != "hf" or _folder(data) or COMMIT.fullmatch(data.hf_revision or ""):
        return data
    try:
        commit = HfApi().dataset_info(data.hf_name, revision=data.hf_revision, timeout=60).sha
    except Exception as error:  # no network, offline mode, no such dataset or revision: each its own type
        raise UserError(
            f"data.hf_name {data.hf_name!r} is no folder here, and the commit of data.hf_revision "
            f"{data.hf_revision or 'main'!r} cannot be looked up on the Hugging Face hub ({first_line(error)}): "
            "correct them, or, without a network, set data.hf_revision to the full commit hash of the cached data."
        ) from error
    return replace(data, hf_revision=commit)


def stream_identity(data: DataConfig) -> dict[str, object]:
    """What the stream depends on: options and the commit, or a folder's file names, sizes and modification times (ns).

    Raises:
        UserError: as `pinned`.
    """
    data = pinned(data)
    folder = _folder(data)
    names = ("hf_config", "hf_split", "hf_val_split", "max_documents", "max_val_documents", "text_field")
    options = {"source": "hf", **{name: getattr(data, name) for name in names}, **reading_options(data)}
    if folder is None:
        return {**options, "name": data.hf_name, "revision": data.hf_revision}
    entries = sorted(glob("**", root_dir=folder, recursive=True))  # without hidden ones, such as .git
    stats = [(name, status_of(folder / name)) for name in entries if (folder / name).is_file()]
    files = [[name, status.st_size, status.st_mtime_ns] for name, status in stats]
    return {**options, "name": str(folder.resolve()), "files": files}


def stream_texts(data: DataConfig, scratch: Path, findings: Findings) -> tuple[Iterator[str], Iterator[str]]:
    """Training and validation documents, read as they are asked for.

    Raises:
        UserError: at once, for a dataset, config or split that is not there or has files of another format; while
            reading, for whatever ends it early.
    """
    files = _files(pinned(data), scratch)
    train, val = (_split_files(data, split, files) for split in (data.hf_split, data.hf_val_split))
    return (
        _stream(data, data.hf_split, train, data.max_documents, findings),
        _stream(data, data.hf_val_split, val, data.max_val_documents, findings),
    )


def _split_files(data: DataConfig, split: str, files: dict[str, list[Source]]) -> list[Source]:
    """The files of a split, checked by name."""
    if split not in files:
        there = ", ".join(map(repr, files)) or "none"
        raise UserError(
            f"The {_title(data)} has no split {split!r} (there are: {there}): set data.hf_split, hf_val_split."
        )
    other = [name for name in files[split] if form_of(name)[0] == "text"]
    require(
        not other,
        f"data.source hf reads JSON lines and Parquet only, but split {split!r} of {_title(data)} holds "
        f"{(other or [''])[0]}: choose another dataset or data.source files.",
    )
    return files[split]


def _stream(data: DataConfig, split: str, files: list[Source], limit: int | None, findings: Findings) -> Iterator[str]:
    """The first documents of the files; an end before the limit is the end of the last file."""
    return require_text(_head(data, split, files, limit, findings), f"split {split!r} of {_title(data)}", findings)


def _head(data: DataConfig, split: str, files: list[Source], limit: int | None, findings: Findings) -> Iterator[str]:
    count = 0
    for name in files:
        texts = documents(name, data.text_field, findings)
        while limit is None or count < limit:
            try:
                text = next(texts, None)
            except Exception as error:  # what a connection can raise has no common type
                raise UserError(
                    f"Split {split!r} of {_title(data)} could be read for {count} documents only, so none are kept: "
                    f"{first_line(error)} (if the connection is at fault, try again, or fetch the dataset with `hf "
                    "download` and give its folder as data.hf_name)"
                ) from error
            if text is None:
                break
            yield text
            count += 1


def _files(data: DataConfig, scratch: Path) -> dict[str, list[Source]]:
    """The files of each split, in order."""
    folder = _folder(data)
    try:
        by_name = folder is None or _names_configs(folder)
        builder = datasets.load_dataset_builder(
            str(folder.resolve() if folder else data.hf_name),
            name=data.hf_config if by_name else None,
            data_dir=None if by_name else data.hf_config,
            revision=data.hf_revision,
            cache_dir=str(scratch),  # so that no copy of another revision is found, and nothing stays behind
        )
    except Exception as error:  # network, hub and `datasets` raise all kinds
        raise UserError(
            f"The {_title(data)} cannot be opened ({first_line(error)}): correct data.hf_name, data.hf_config or "
            "data.hf_revision."
        ) from error
    by_split = builder.config.data_files or {}
    return {str(split): [n if n.startswith(HUB) else Path(n) for n in names] for split, names in by_split.items()}


def _names_configs(folder: Path) -> bool:
    """Whether a dataset card says what the configs are; else they are the subfolders, as in C4."""
    card = folder / "README.md"
    return card.exists() and bool(DatasetCard.load(card).data.get("configs"))


def _folder(data: DataConfig) -> Path | None:
    """The local folder that data.hf_name is, or None."""
    folder = user_path(data.hf_name)
    if not folder.is_dir():
        return None
    require(
        data.hf_revision is None,
        f"data.hf_revision {data.hf_revision} belongs to a dataset of the hub, but data.hf_name {data.hf_name} is a "
        "folder here: leave it out.",
    )
    return folder


def _title(data: DataConfig) -> str:
    return f"dataset {data.hf_name} ({data.hf_config or 'its only config'})"
