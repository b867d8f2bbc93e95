"""Stream a dataset of the Hugging Face hub, or a folder laid out like one, without keeping its text.

`datasets` lists the files of a config and split. The strict readers of `files` read one file after the other, through
the hub's file system if it is not local. Documents go straight to the tokenizer.

`load_dataset(streaming=True)` is not used for two reasons. Its readers are lenient. After a lost connection it retries
above the decompressor, which silently loses text that was read before. The hub's file system instead requests the
missing bytes again. An error that it cannot repair ends the build.
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
    """Return the configuration with a hub dataset's commit written out; return others unchanged.

    Only a hub dataset without a full commit hash asks the hub.

    Raises:
        UserError: the commit cannot be looked up, or a revision is given for a local folder.
    """
    if data.source != "hf" or _folder(data) or COMMIT.fullmatch(data.hf_revision or ""):
        return data
    try:
        commit = HfApi().dataset_info(data.hf_name, revision=data.hf_revision, timeout=60).sha
    except Exception as error:  # no network, offline mode, unknown dataset or revision: each has its own type
        raise UserError(
            f"data.hf_name {data.hf_name!r} is no folder here, and the commit of data.hf_revision "
            f"{data.hf_revision or 'main'!r} cannot be looked up on the Hugging Face hub ({first_line(error)}): "
            "correct them, or, without a network, set data.hf_revision to the full commit hash of the cached data."
        ) from error
    return replace(data, hf_revision=commit)


def stream_identity(data: DataConfig) -> dict[str, object]:
    """Return what the stream depends on: options, and the commit or the folder's files.

    Files are given by name, size and modification time (ns).

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
    """Return training and validation documents, read on demand.

    Raises:
        UserError: at once, if the dataset, config or split does not exist or has files of another format; while
            reading, on any error.
    """
    by_split = _files(pinned(data), scratch)
    train, val = (_split_files(data, split, by_split) for split in (data.hf_split, data.hf_val_split))
    return (
        _stream(data, data.hf_split, train, data.max_documents, findings),
        _stream(data, data.hf_val_split, val, data.max_val_documents, findings),
    )


def _split_files(data: DataConfig, split: str, by_split: dict[str, list[Source]]) -> list[Source]:
    """Return the files of a split, checked by name."""
    if split not in by_split:
        splits = ", ".join(map(repr, by_split)) or "none"
        raise UserError(
            f"The {_title(data)} has no split {split!r} (there are: {splits}): set data.hf_split or data.hf_val_split."
        )
    other = [name for name in by_split[split] if form_of(name)[0] == "text"]
    require(
        not other,
        f"data.source hf reads JSON lines and Parquet only, but split {split!r} of {_title(data)} holds "
        f"{(other or [''])[0]}: choose another dataset or data.source files.",
    )
    return by_split[split]


def _stream(data: DataConfig, split: str, files: list[Source], limit: int | None, findings: Findings) -> Iterator[str]:
    """Yield documents of the files up to the limit."""
    return require_text(_head(data, split, files, limit, findings), f"split {split!r} of {_title(data)}", findings)


def _head(data: DataConfig, split: str, files: list[Source], limit: int | None, findings: Findings) -> Iterator[str]:
    count = 0
    for name in files:
        texts = documents(name, data.text_field, findings)
        while limit is None or count < limit:
            try:
                text = next(texts, None)
            except Exception as error:  # errors of a connection have no common type
                raise UserError(
                    f"Split {split!r} of {_title(data)} could be read for {count} documents only, so none are kept: "
                    f"{first_line(error)} (if the connection failed, try again, or fetch the dataset with `hf "
                    "download` and give its folder as data.hf_name)"
                ) from error
            if text is None:
                break
            yield text
            count += 1


def _files(data: DataConfig, scratch: Path) -> dict[str, list[Source]]:
    """Return the files of each split, in order."""
    folder = _folder(data)
    try:
        by_name = folder is None or _names_configs(folder)
        builder = datasets.load_dataset_builder(
            str(folder.resolve() if folder else data.hf_name),
            name=data.hf_config if by_name else None,
            data_dir=None if by_name else data.hf_config,
            revision=data.hf_revision,
            cache_dir=str(scratch),  # so that no copy of another revision is used, and nothing remains
        )
    except Exception as error:  # network, hub and `datasets` raise many types
        raise UserError(
            f"The {_title(data)} cannot be opened ({first_line(error)}): correct data.hf_name, data.hf_config or "
            "data.hf_revision."
        ) from error
    by_split = builder.config.data_files or {}
    return {str(split): [n if n.startswith(HUB) else Path(n) for n in names] for split, names in by_split.items()}


def _names_configs(folder: Path) -> bool:
    """Return whether a dataset card lists the configs; else they are the subfolders, as in C4."""
    card = folder / "README.md"
    return card.exists() and bool(DatasetCard.load(card).data.get("configs"))


def _folder(data: DataConfig) -> Path | None:
    """Return data.hf_name as a local folder, or None if it is not one."""
    folder = user_path(data.hf_name)
    if not folder.is_dir():
        return None
    require(
        data.hf_revision is None,
        f"data.hf_revision {data.hf_revision} belongs to a dataset of the hub, but data.hf_name {data.hf_name} is a "
        "folder here: leave data.hf_revision out.",
    )
    return folder


def _title(data: DataConfig) -> str:
    return f"dataset {data.hf_name} ({data.hf_config or 'its only config'})"
