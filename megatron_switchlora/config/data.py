"""The data section of the run configuration, and those of its rules that need no file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Optional, Union

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.model import LARGEST_SIZE


@dataclass
class DataConfig:
    """The text and its tokenizer."""

    source: Literal["stdlib", "files", "hf"] = option("stdlib", resume="free", basic=True)
    """stdlib: the sources of Python's standard library on this machine; files: text, JSON lines (C4's .json.gz),
    Parquet; hf: a dataset of the Hugging Face hub, tokenised while it streams."""
    files: Union[list[str], str, None] = option(None, resume="free", results=False, path=True, basic=True)
    """Training files or glob patterns (source files): one, or a list."""
    val_files: Union[list[str], str, None] = option(None, resume="free", results=False, path=True)
    """Validation files or patterns; without them the last val_fraction of the training text is held out."""
    val_fraction: float = option(0.1, resume="free")
    """Share of the text (by characters, at its end) held out when there are no val_files."""
    text_field: str = option("text", resume="free")
    """Field of a JSON object, or column of a Parquet file, that holds the text; a.b: field b of a."""
    on_bad_document: Literal["error", "skip"] = option("error", resume="free")
    """What to do with a document that cannot be read (no such field, broken JSON, not UTF-8, no text): error ends the
    build, skip leaves the document out and counts it. Truncated or damaged files always end the build."""
    hf_name: str = option("allenai/c4", resume="free", path=True)
    """Dataset of source hf: a name on the hub, or a folder of the same layout. Its files must be JSON lines or
    Parquet."""
    hf_config: Optional[str] = option("en", resume="free")
    """Configuration of the dataset; null if it has only one. In a folder whose README.md names none, it is the
    subfolder."""
    hf_split: str = option("train", resume="free")
    """Split to train on."""
    hf_val_split: str = option("validation", resume="free")
    """Split to validate on."""
    hf_revision: Optional[str] = option(None, resume="free")
    """Commit, tag or branch on the hub; by default main. A full commit hash needs no network once data is cached."""
    max_documents: Optional[int] = option(46_000_000, resume="free")
    """Training documents to take at most, from the start of hf_split (default: the paper's share of C4); null: all."""
    max_val_documents: Optional[int] = option(10_000, resume="free")
    """Validation documents to take at most, from the start of hf_val_split; null: all."""
    max_bytes: int = option(10_000_000, resume="free")
    """Size limit of the stdlib corpus."""
    tokenizer: str = option("bpe", resume="free", path=True)
    """bpe: byte-level BPE trained on the training text; char: its characters; else a Hugging Face folder or name."""
    vocab_size: int = option(2048, resume="free")
    """Vocabulary size of a trained bpe tokenizer."""
    add_bos: bool = option(False, resume="free")
    """Begin every document with the tokenizer's begin mark, for imported models that were pre-trained with one."""
    cache_dir: Optional[str] = option(None, resume="free", results=False, path=True)
    """Folder for tokenised data; by default the folder megatron_switchlora in ~/.cache, or in $XDG_CACHE_HOME."""

    def patterns(self, validation: bool = False) -> list[str]:
        """Return the file patterns as a list."""
        given = self.val_files if validation else self.files
        return [given] if isinstance(given, str) else list(given or [])


def check_data(d: DataConfig) -> None:
    """Check the rules of this section alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    if d.source == "files":
        require(bool(d.files), "data.source files needs data.files: give file names or glob patterns.")
    else:
        require(
            not d.files and not d.val_files,
            f"data.files and data.val_files belong to data.source files, not {d.source}.",
        )
    if d.source == "hf":
        require(
            d.tokenizer not in ("bpe", "char"),
            f"data.source hf keeps no text to build a {d.tokenizer} tokenizer from: give a Hugging Face name or folder "
            "as data.tokenizer, such as t5-base or the tokenizer/ of an earlier run.",
        )
        require(
            d.hf_split != d.hf_val_split,
            f"data.hf_split and data.hf_val_split are both {d.hf_split!r}: validate on another split.",
        )
    given = [f"data.{f.name}" for f in fields(d) if f.name.startswith("hf_") and getattr(d, f.name) != f.default]
    require(
        d.source == "hf" or not given,
        f"{', '.join(given)} {'belongs' if len(given) == 1 else 'belong'} to data.source hf, not {d.source}: leave "
        f"{'it' if len(given) == 1 else 'them'} out, or set data.source hf.",
    )
    for name in ("max_documents", "max_val_documents"):
        value = getattr(d, name)
        require(value is None or value >= 1, f"data.{name} must be at least 1 or null for all, not {value}.")
    require(0 < d.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, it is {d.val_fraction}.")
    require(
        257 <= d.vocab_size <= LARGEST_SIZE,
        f"data.vocab_size must lie between 257 (256 bytes and an end mark) and 2^24, it is {d.vocab_size}.",
    )
    require(d.max_bytes >= 1, f"data.max_bytes must be positive, not {d.max_bytes}.")


def unused_limits(d: DataConfig) -> list[str]:
    """Return the limits of a hub dataset that are given and change nothing, since the text comes from elsewhere."""
    limits = [f for f in fields(d) if f.name in ("max_documents", "max_val_documents")]
    return [f"data.{f.name}" for f in limits if d.source != "hf" and getattr(d, f.name) not in (f.default, None)]
