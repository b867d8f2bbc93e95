"""What the data's section of a run configuration must fulfil, as far as no file is read."""

from __future__ import annotations

from dataclasses import fields

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.rules_model import LARGEST_SIZE
from megatron_switchlora.config.run import DataConfig


def validate_data(d: DataConfig) -> None:
    """Raises: UserError, with the rule, the values and what to change."""
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
    of_hf = [f for f in fields(d) if f.name.startswith("hf_") or f.name in ("max_documents", "max_val_documents")]
    given = [f.name for f in of_hf if getattr(d, f.name) != f.default]
    require(d.source == "hf" or not given, f"data.{', data.'.join(given)} belong to data.source hf, not {d.source}.")
    for name in ("max_documents", "max_val_documents"):
        value = getattr(d, name)
        require(value is None or value >= 1, f"data.{name} must be at least 1 or null for all, not {value}.")
    require(0 < d.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, it is {d.val_fraction}.")
    require(
        257 <= d.vocab_size <= LARGEST_SIZE,
        f"data.vocab_size must lie between 257 (256 bytes and an end mark) and 2^24, it is {d.vocab_size}.",
    )
    require(d.max_bytes >= 1, f"data.max_bytes must be positive, not {d.max_bytes}.")
