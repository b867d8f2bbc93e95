"""Tokenise the corpus once into two flat arrays on disk.

`prepare` writes `<cache>/<key>/`:
    train.npy, val.npy    all documents, each followed by an end mark, and with data.add_bos preceded by a begin mark
    tokenizer/            the tokenizer
    meta.json             sizes, checksums and counts
The key hashes what the content depends on, so another file, option or library version gives another folder. The folder
is built elsewhere, made durable and renamed, so it is either complete or absent. One process builds it, and all others
wait, also on other nodes that share the disk. A folder that is not as built (`cache.py`) is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import datasets
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

import megatron_switchlora.data.cache as cache
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.corpus import characters, corpus_identity, load_corpus
from megatron_switchlora.data.hf_tokenizer import save_tokenizer
from megatron_switchlora.data.loader import TokenStore
from megatron_switchlora.data.stream import pinned
from megatron_switchlora.data.tokenizer import BUILT, build_tokenizer, tokenizer_identity
from megatron_switchlora.disk import user_path
from megatron_switchlora.startup.progress import progress as shown_progress

FORMAT = 1  # raise it whenever the same input would give different files
TRAINING_CHARACTERS = 32_000_000  # about the most text that a BPE is trained on, taken evenly from the whole
PIECE = 100_000  # characters; long documents are cut to spread them over the tokenizer's threads
BATCH = 4_000_000  # characters passed to the tokenizer at once; bounds memory


@dataclass
class PreparedData:
    """A published cache folder, opened."""

    folder: Path
    train: TokenStore
    val: TokenStore
    tokenizer_dir: Path
    vocab_size: int
    """Entries of the tokenizer; every token is below this number."""
    unigram_val_ppl: float
    """Perplexity of the validation tokens under the training tokens' frequencies, with add-one smoothing."""
    bytes_per_val_token: float
    """UTF-8 bytes of validation text per token; end marks count as tokens."""
    notes: list[str] = field(default_factory=list)
    """What to report about a build: documents left out, unusual files, damage."""


def prepare(data: DataConfig, *, progress: bool = False) -> PreparedData:
    """Tokenise the corpus, or open the cache of an earlier call.

    Raises:
        UserError: the corpus or the tokenizer has a fault, or the cache folder cannot be written.
    """
    data = pinned(data)  # once, so that the cache's name and its content belong to one commit
    place = _cache_dir(data)
    folder = place / _cache_key(data)
    with contextlib.suppress(cache.Damaged):
        if not cache.touched(folder):
            return open_prepared(folder)
    if folder.exists() and not os.access(place, os.W_OK):
        return _open_read_only(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with cache.builder_lock(place / f".{folder.name}.lock"):
            damage = cache.fault(folder)
            notes = [] if damage is None else _fill(data, folder, damage, progress)
    except OSError as error:
        raise UserError(f"Cannot write the data cache {place} ({error}): make room, or set data.cache_dir.") from error
    except MemoryError as error:
        raise UserError(
            f"There is not enough memory to tokenise the corpus ({error or 'out of memory'}): use a machine with more "
            "memory, or cut long documents."
        ) from error
    return replace(open_prepared(folder), notes=notes)


def open_prepared(folder: Path) -> PreparedData:
    """Open a cache folder that `prepare` has published.

    Raises:
        UserError: the folder is not a complete cache.
    """
    try:
        cache.touched(folder)
        meta = cache.read_meta(folder)
        train, val = (cache.open_tokens(folder, split) for split in cache.SPLITS)
    except cache.Damaged as damage:
        raise UserError(f"{folder} is not a complete data cache ({damage}): prepare the data again.") from None
    return PreparedData(
        folder=folder,
        train=train,
        val=val,
        tokenizer_dir=folder / "tokenizer",
        vocab_size=int(meta["vocab_size"]),
        unigram_val_ppl=float(meta["unigram_val_ppl"]),
        bytes_per_val_token=meta["val"]["bytes"] / meta["val"]["tokens"],
    )


def _open_read_only(folder: Path) -> PreparedData:
    damage = cache.fault(folder)
    require(
        damage is None,
        f"The data cache {folder} is damaged ({damage}) and cannot be built again, as its folder is read-only: remove "
        "it, or set data.cache_dir.",
    )
    return open_prepared(folder)


def _fill(data: DataConfig, folder: Path, damage: str, progress: bool) -> list[str]:
    """Build a missing or damaged folder; return the notes to report."""
    notes = [f"The data cache {folder} was damaged ({damage}) and has been built again."] if folder.exists() else []
    if removed := cache.remove_leftovers(folder.parent):
        notes.append(f"Removed the folders of {removed} killed build(s) from {folder.parent}.")
    with cache.scratch_folder(folder) as scratch:
        try:
            notes += _build(data, scratch / "build", scratch / "documents", progress)
        except UserError as error:
            reason = (
                f" The data cache {folder} is damaged ({damage}), so it must be built again." if folder.exists() else ""
            )
            raise UserError(f"{error}{reason}") from error
        cache.publish(scratch / "build", folder, scratch)
    return notes


# --- the cache folder


def _cache_dir(data: DataConfig) -> Path:
    if data.cache_dir:
        return user_path(data.cache_dir)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "megatron_switchlora"


def _cache_key(data: DataConfig) -> str:
    content = {
        "format": FORMAT,
        "corpus": corpus_identity(data),
        "tokenizer": tokenizer_identity(data),
        "tokenizers": tokenizers.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


# --- building


def _build(data: DataConfig, build: Path, documents: Path, progress: bool) -> list[str]:
    """Make the content of a cache folder; return what the user should know about the corpus."""
    build.mkdir()
    built = data.tokenizer in BUILT
    if not built:  # before the corpus is read, so that a mistyped name fails at once
        tokenizer = build_tokenizer(data, iter(()))
    corpus = load_corpus(data, documents, progress=progress)
    # Built tokenizers give the same tokens if a text is cut where `_pieces` cuts. For others this is unknown.
    longest = PIECE if built else None
    if built:
        stored = cast(datasets.Dataset, corpus.train)  # a stream is an error of the configuration
        stride = math.ceil(int(characters(stored).sum()) / TRAINING_CHARACTERS) if data.tokenizer == "bpe" else 1
        texts = (text for text, _ in _pieces(corpus.train, longest))
        tokenizer = build_tokenizer(data, islice(texts, 0, None, stride), progress)
    save_tokenizer(tokenizer, build / "tokenizer")
    train, train_counts = _tokenise(tokenizer, corpus.train, longest, build / "train.npy", progress, data.add_bos)
    val, val_counts = _tokenise(tokenizer, corpus.val, longest, build / "val.npy", progress, data.add_bos)
    for text, counts in (("training", train_counts), ("validation", val_counts)):
        _require_known(data, tokenizer, text, counts)
    meta = {
        "vocab_size": len(tokenizer),
        "train": train,
        "val": val,
        "unigram_val_ppl": _unigram_perplexity(train_counts, val_counts),
        "corpus": corpus.identity,
    }
    cache.seal(build, meta)
    return corpus.findings.sentences()


def _require_known(data: DataConfig, tokenizer: PreTrainedTokenizerFast, text: str, counts: np.ndarray) -> None:
    """Require that a text gives known tokens, as the perplexity of unknown tokens means nothing.

    Raises:
        UserError: all tokens of the text are unknown or marks.
    """
    marks = {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    require(
        int(counts.sum()) > int(counts[list(marks)].sum()),
        f"The {text} text holds nothing but what the tokenizer {data.tokenizer} does not know, so each of its tokens "
        f"is {tokenizer.unk_token or 'an end mark'}: choose another text or data.tokenizer.",
    )


def _pieces(documents: Iterable[dict[str, str]], longest: int | None) -> Iterator[tuple[str, bool]]:
    """Yield texts in order, each with whether it ends its document, cut where the tokens stay the same.

    A text is cut at the first line feed after `longest` characters that does not follow white space. No token of a
    built tokenizer spans such a place: GPT-2's pattern never joins the two characters, and looks ahead only past white
    space.
    """
    for row in documents:
        text, start = row["text"], 0
        while longest and (cut := _next_cut(text, start + longest)) is not None:
            yield text[start:cut], False
            start = cut
        yield text[start:], True


def _next_cut(text: str, position: int) -> int | None:
    """Return the first line feed at or after a position that does not follow white space."""
    while (position := text.find("\n", position)) > 0:
        if not text[position - 1].isspace():
            return position
        position += 1
    return None


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yield pieces in groups of about BATCH characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[dict[str, str]],
    longest: int | None,
    path: Path,
    progress: bool,
    add_bos: bool,
) -> tuple[dict[str, int], np.ndarray]:
    """Write the tokens of all documents to a .npy file, with an end mark after each.

    With `add_bos` a begin mark precedes each document.

    Returns:
        The numbers of documents, tokens and UTF-8 bytes, and how often each token occurs (int64 [vocabulary]).
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) < 65536 else np.uint32)
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    begin = np.array([tokenizer.bos_token_id] if add_bos else [], dtype=dtype)
    backend = tokenizer.backend_tokenizer  # its own batch call is 1.5 times as fast as the wrapper's
    backend.no_truncation()
    backend.no_padding()
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    num_bytes = num_documents = 0
    first = True  # whether the next piece starts a document
    rows = shown_progress(documents, f"Tokenising {path.stem}", "documents") if progress else documents
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        for batch in _batches(_pieces(rows, longest)):
            encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            arrays: list[np.ndarray] = []
            for (text, last), encoding in zip(batch, encodings, strict=True):
                arrays += [begin[: int(first)], np.array(encoding.ids, dtype=dtype), end[: int(last)]]
                first = last
                num_bytes += len(text.encode())
                num_documents += last
            tokens = np.concatenate(arrays)
            require(
                int(tokens.max(initial=0)) < len(counts),
                f"The tokenizer gives token {tokens.max(initial=0)} but has only {len(counts)} entries: choose a "
                "data.tokenizer whose token ids have no gaps.",
            )
            counts += np.bincount(tokens, minlength=len(counts))
            file.write(tokens.tobytes())
        file.seek(0)
        _write_header(file, dtype, int(counts.sum()))
    return {"documents": num_documents, "tokens": int(counts.sum()), "bytes": num_bytes}, counts


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Write the header of a 1-D .npy file; numpy pads it, so another length can overwrite it."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _unigram_perplexity(train: np.ndarray, val: np.ndarray) -> float:
    """Return the perplexity of the val counts under the train counts, with one added to each train count."""
    log_probability = np.log(train + 1.0) - math.log(int(train.sum()) + len(train))
    return math.exp(-float(val @ log_probability) / int(val.sum()))
