"""Build a byte-level BPE or character tokenizer from the training text, or load one from Hugging Face.

All are `PreTrainedTokenizerFast` (Rust `tokenizers`), so a saved folder loads with `AutoTokenizer.from_pretrained`,
here and elsewhere. Built tokenizers decode to the original text.
    bpe     works on bytes, with GPT-2's pre-tokenisation
    char    is a BPE without merges: each character of the training text is one token, numbered in sorted order as in
            nanoGPT, and any other character is "<unk>"
The end mark also serves as begin mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.data.hf_tokenizer import TEMPLATES, as_trained, load_tokenizer
from megatron_switchlora.startup.progress import shows_progress

END = "<|endoftext|>"
UNKNOWN = "<unk>"
BUILT = ("bpe", "char")


def tokenizer_identity(data: DataConfig) -> dict[str, object]:
    """Return what the tokens depend on beside the text, ready for JSON, for the cache's key."""
    return {**_tokenizer_source(data), **({"add_bos": True} if data.add_bos else {})}


def _tokenizer_source(data: DataConfig) -> dict[str, object]:
    if data.tokenizer == "bpe":
        return {"bpe": data.vocab_size}
    folder = Path(data.tokenizer).expanduser()
    if data.tokenizer == "char" or not folder.is_dir():
        return {"name": data.tokenizer}
    files = sorted(path for path in [*folder.iterdir(), *(folder / TEMPLATES).glob("*")] if path.is_file())
    return {"name": str(folder.resolve()), "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]}


def build_tokenizer(data: DataConfig, train_texts: Iterator[str], progress: bool = False) -> PreTrainedTokenizerFast:
    """Train or load the tokenizer that `data.tokenizer` names; only training reads `train_texts`.

    With `progress` training a "bpe" shows bars on a terminal.

    Returns:
        A fast tokenizer with an end mark (eos). It puts before a prompt what training puts before a text. A "bpe" has
        at most data.vocab_size entries, including the end mark.

    Raises:
        UserError: the tokenizer cannot be loaded, is not a fast one, has no end mark, or lacks the begin mark that
            data.add_bos needs.
    """
    if data.tokenizer == "bpe":
        tokenizer = _wrap(_train_bpe(train_texts, data.vocab_size, progress and shows_progress()))
    elif data.tokenizer == "char":
        tokenizer = _wrap(_characters(train_texts), unk_token=UNKNOWN)
    else:
        tokenizer = _load(data.tokenizer)
    return as_trained(tokenizer, data.add_bos)


def _train_bpe(texts: Iterable[str], vocab_size: int, progress: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text is unknown
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters(texts: Iterable[str]) -> Tokenizer:
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    vocab = {character: i for i, character in enumerate(sorted(alphabet))}
    vocab[END], vocab[UNKNOWN] = len(vocab), len(vocab) + 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.add_special_tokens([END, UNKNOWN])
    tokenizer.decoder = decoders.Fuse()  # the default would put spaces between tokens
    return tokenizer


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False, **special
    )


def _load(name: str) -> PreTrainedTokenizerFast:
    folder = Path(name).expanduser()
    try:
        tokenizer = load_tokenizer(str(folder) if folder.is_dir() else name)
    except UserError as error:
        raise UserError(
            f"data.tokenizer {name!r} is neither bpe nor char, and {error} Give bpe, char, the folder of a saved "
            "tokenizer or a hub name."
        ) from error
    require(
        tokenizer.eos_token_id is not None,
        f"data.tokenizer {name!r} has no end mark to separate documents: set its eos_token and save it again.",
    )
    return tokenizer
