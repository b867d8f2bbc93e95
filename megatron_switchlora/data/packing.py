"""Tokens: the corpus as two flat arrays on disk, made once and mapped into memory afterwards.

`prepare` tokenises into `<cache>/<key>/`: train.npy and val.npy (all documents one after the other, an end mark after
each, with data.add_bos a begin mark before), tokenizer/ and meta.json. The key hashes what the content depends on, so
another file, option or library version is another folder. The folder is built aside, made durable and renamed: it is
there whole or not at all. Of several processes, on nodes that share the disk too, one builds and the others wait for
it. A folder that is not as it was built (`cache.py`) is built anew.
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
from tqdm import tqdm
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

FORMAT = 1  # raise it whenever the same input would give other files
TRAINING_CHARACTERS = 32_000_000  # a BPE learns from about so much text at most, taken evenly from all of it
PIECE = 100_000  # characters: long documents are cut, to spread them over the tokenizer's threads
BATCH = 4_000_000  # characters handed to the tokenizer at once; bounds memory


@dataclass
class PreparedData:
    """A published cache folder, opened."""

    folder: Path
    train: TokenStore
    val: TokenStore
    tokenizer_dir: Path
    vocab_size: int
    """Entries of the tokenizer; every token is smaller."""
    unigram_val_ppl: float
    """Perplexity of the validation tokens under the training tokens' frequencies, add-one smoothed."""
    bytes_per_val_token: float
    """UTF-8 bytes of validation text per token, end marks counted as tokens."""
    notes: list[str] = field(default_factory=list)
    """What to tell of the build, if there has been one: documents left out, odd files, damage."""


def prepare(data: DataConfig, *, progress: bool = False) -> PreparedData:
    """Tokenise the corpus, or open the cache of an earlier time.

    Raises:
        UserError: anything wrong with the corpus or the tokenizer; a cache folder that cannot be written.
    """
    data = pinned(data)  # once, so that the name of the cache and what goes into it are of one commit
    place = _cache_dir(data)
    folder = place / _cache_key(data)
    with contextlib.suppress(cache.Damaged):
        if not cache.touched(folder):
            return open_prepared(folder)
    if folder.exists() and not os.access(place, os.W_OK):
        return _open_read_only(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with cache.alone(place / f".{folder.name}.lock"):
            damage = cache.fault(folder)
            notes = [] if damage is None else _fill(data, folder, damage, progress)
    except OSError as error:
        raise UserError(f"Cannot write the data cache {place} ({error}): make room or set data.cache_dir.") from error
    except MemoryError as error:
        raise UserError(
            f"There is not enough memory to tokenise the corpus ({error or 'out of memory'}): give more, or cut long "
            "documents."
        ) from error
    return replace(open_prepared(folder), notes=notes)


def open_prepared(folder: Path) -> PreparedData:
    """Open a cache folder that `prepare` has published.

    Raises:
        UserError: the folder is not a whole cache.
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
        f"The data cache {folder} is damaged ({damage}), and nothing can be written beside it to build it anew: "
        "remove it or set data.cache_dir.",
    )
    return open_prepared(folder)


def _fill(data: DataConfig, folder: Path, damage: str, progress: bool) -> list[str]:
    """Build the folder, for what is wrong with it or because it is not there; what there is to tell."""
    notes = [f"The data cache {folder} was damaged ({damage}) and has been built anew."] if folder.exists() else []
    if removed := cache.remove_leftovers(folder.parent):
        notes.append(f"Removed from {folder.parent} what killed builds had left there ({removed} in number).")
    with cache.scratch_folder(folder) as scratch:
        try:
            notes += _build(data, scratch / "build", scratch / "documents", progress)
        except UserError as error:
            because = (
                f" The data cache {folder} is damaged ({damage}), else it would be used." if folder.exists() else ""
            )
            raise UserError(f"{error}{because}") from error
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
    """Make the content of a cache folder; what its user should know of the corpus."""
    build.mkdir()
    built = data.tokenizer in BUILT
    if not built:  # before the corpus is read: a mistyped name shows at once
        tokenizer = build_tokenizer(data, iter(()))
    corpus = load_corpus(data, documents, progress=progress)
    # Built tokenizers give the same tokens when a text is cut where `_pieces` cuts; of others this is not known.
    longest = PIECE if built else None
    if built:
        stored = cast(datasets.Dataset, corpus.train)  # the configuration refuses to build one from a stream
        stride = math.ceil(int(characters(stored).sum()) / TRAINING_CHARACTERS) if data.tokenizer == "bpe" else 1
        texts = (text for text, _ in _pieces(corpus.train, longest))
        tokenizer = build_tokenizer(data, islice(texts, 0, None, stride))
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
    """Raises: UserError, if a text gives unknown tokens only, of which no perplexity means anything."""
    marks = {tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    require(
        int(counts.sum()) > int(counts[list(marks)].sum()),
        f"The {text} text holds nothing but what the tokenizer {data.tokenizer} does not know, so that each of its "
        f"tokens is {tokenizer.unk_token or 'an end mark'}: choose another text or data.tokenizer.",
    )


def _pieces(documents: Iterable[dict[str, str]], longest: int | None) -> Iterator[tuple[str, bool]]:
    """Texts in order, each with whether it ends its document; cut after `longest` characters, where that is exact.

    No token of a built tokenizer can lie across a line feed that follows anything but white space: GPT-2's pattern
    never joins the two, and looks ahead only past white space.
    """
    for row in documents:
        text, start = row["text"], 0
        while longest and (cut := _next_cut(text, start + longest)) is not None:
            yield text[start:cut], False
            start = cut
        yield text[start:], True


def _next_cut(text: str, position: int) -> int | None:
    """The first line feed at or after a position that does not follow white space."""
    while (position := text.find("\n", position)) > 0:
        if not text[position - 1].isspace():
            return position
        position += 1
    return None


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in groups of about BATCH characters."""
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
    """Write the tokens of all documents, an end mark after each and perhaps a begin mark before, to a .npy file.

    Returns:
        Numbers of documents, tokens and UTF-8 bytes, and how often each token occurs (int64 [vocabulary]).
    """
    dtype = np.dtype(np.uint16 if len(tokenizer) < 65536 else np.uint32)
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    begin = np.array([tokenizer.bos_token_id] if add_bos else [], dtype=dtype)
    backend = tokenizer.backend_tokenizer  # its plain batch call is half again as fast as the one around it
    backend.no_truncation()
    backend.no_padding()
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    num_bytes = num_documents = 0
    first = True  # whether the next piece begins a document
    rows = tqdm(documents, desc=f"Tokenising {path.stem}", unit=" documents", disable=not progress)
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        for batch in _batches(_pieces(rows, longest)):
            encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            parts: list[np.ndarray] = []
            for (text, last), encoding in zip(batch, encodings, strict=True):
                parts += [begin[: int(first)], np.array(encoding.ids, dtype=dtype), end[: int(last)]]
                first = last
                num_bytes += len(text.encode())
                num_documents += last
            tokens = np.concatenate(parts)
            require(
                int(tokens.max(initial=0)) < len(counts),
                f"The tokenizer gives token {tokens.max(initial=0)} but has only {len(counts)} entries: choose a "
                "data.tokenizer whose numbers have no gaps.",
            )
            counts += np.bincount(tokens, minlength=len(counts))
            file.write(tokens.tobytes())
        file.seek(0)
        _write_header(file, dtype, int(counts.sum()))
    return {"documents": num_documents, "tokens": int(counts.sum()), "bytes": num_bytes}, counts


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The header of a 1-D .npy file; numpy pads it, so that it can be overwritten with another length."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _unigram_perplexity(train: np.ndarray, val: np.ndarray) -> float:
    """Perplexity of the val counts under the train counts, one added to each of the vocabulary."""
    log_probability = np.log(train + 1.0) - math.log(int(train.sum()) + len(train))
    return math.exp(-float(val @ log_probability) / int(val.sum()))
