"""Prepare the run's data once per node, and identify it for checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_switchlora.checkpoint.files import Checkpoint
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.parallel import require_shard
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.packing import PreparedData, open_prepared, prepare
from megatron_switchlora.data.stream import pinned
from megatron_switchlora.distributed.consensus import gather_texts, on_one_rank
from megatron_switchlora.startup.environment import Ranks


def prepare_data(config: RunConfig, ranks: Ranks) -> PreparedData:
    """Tokenise on the first rank of every node, and open the cache on all ranks. Collective over the world.

    Rank 0 prints the notes of all nodes' builds. The commit of a hub dataset is looked up once for all nodes and stored
    in `config`, so that the run records its data.
    """
    commit = on_one_rank(ranks.rank == 0, lambda: pinned(config.data).hf_revision or "")
    config.data.hf_revision = commit or None
    first = ranks.local_rank == 0
    notes: list[str] = []

    def fill() -> str:
        data = prepare(config.data, progress=ranks.rank == 0)
        notes.extend(data.notes)
        return str(data.folder)

    folder = on_one_rank(first, fill)
    data = open_prepared(Path(folder))
    all_notes = [note for text in gather_texts(json.dumps(notes)) for note in json.loads(text)]
    all_notes += vocabulary_notes(config, data)
    for note in dict.fromkeys(all_notes if ranks.rank == 0 else []):
        print(f"warning: {note}", flush=True)
    return data


def vocabulary_notes(config: RunConfig, data: PreparedData) -> list[str]:
    """Return a note if the embedding has many more rows than the tokenizer has tokens.

    A few more, as padding, are usual; many come from a configuration that was written for another tokenizer.
    """
    size, tokens = config.model.vocab_size or data.vocab_size, data.vocab_size
    if size <= 1.5 * tokens:
        return []
    return [
        f"model.vocab_size is {size} and the tokenizer has {tokens} tokens, so {size - tokens} rows of embedding and "
        "lm_head are never used: give model.vocab_size null for the tokenizer's size, or another data.tokenizer."
    ]


def vocabulary_size(config: RunConfig, data: PreparedData) -> int:
    """Return the size of the model's vocabulary.

    Raises:
        UserError: it is smaller than the tokenizer's, or too small for the tensor-parallel ranks.
    """
    size = config.model.vocab_size or data.vocab_size
    require(
        size >= data.vocab_size,
        f"model.vocab_size {size} is smaller than the tokenizer's {data.vocab_size}: raise it or leave it out.",
    )
    require_shard("The vocabulary", size, config.parallel.tp)
    return size


def data_identity(data: PreparedData, vocab_size: int) -> dict[str, Any]:
    """Return what a checkpoint stores about text and tokenizer: fingerprints of the tokens and the vocabulary."""
    tokens = hashlib.sha256()
    for store in (data.train, data.val):
        tokens.update(store.fingerprint())
    return {
        "data": tokens.hexdigest()[:20],
        "tokenizer": vocabulary_digest(data.tokenizer_dir),
        "vocab_size": vocab_size,
    }


def vocabulary_digest(folder: Path) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary, independent of how its folder was written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{folder / 'tokenizer.json'} is damaged ({error}): restore it.") from None
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def require_tokenizer(initial: Checkpoint, data: PreparedData) -> None:
    """Require that weights to start from were trained with the run's tokenizer.

    Raises:
        UserError: they come with another tokenizer.
    """
    folder = initial.folder / "tokenizer"
    require(
        not (folder / "tokenizer.json").is_file() or vocabulary_digest(folder) == vocabulary_digest(data.tokenizer_dir),
        f"train.init_from {initial.folder} holds a model with another tokenizer than the run's, so its embedding would "
        f"belong to other tokens: give --data.tokenizer {folder}.",
    )
