"""Tokenizers: byte-level BPE or characters, built from the training text, or any from Hugging Face.

All come out as `PreTrainedTokenizerFast` (Rust `tokenizers`), so a saved folder loads with
`AutoTokenizer.from_pretrained`, here and elsewhere. Built ones give every text back exactly: BPE works on bytes,
with GPT-2's pre-tokenisation; "char" is a BPE without merges, which makes each character of the training text one
token (numbered in sorted order, as nanoGPT does) and every other "<unk>". The end mark doubles as begin mark.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..config import DataConfig, UserError, require

END = "<|endoftext|>"
UNKNOWN = "<unk>"
BUILT = ("bpe", "char")


def tokenizer_identity(data: DataConfig) -> dict[str, object]:
    """What the tokenizer depends on besides the training text (JSON-able, for the cache key)."""
    if data.tokenizer == "bpe":
        return {"bpe": data.vocab_size}
    folder = Path(data.tokenizer).expanduser()
    if data.tokenizer == "char" or not folder.is_dir():
        return {"name": data.tokenizer}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {"name": str(folder.resolve()), "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]}


def build_tokenizer(data: DataConfig, train_texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train or load the tokenizer `data.tokenizer` names; `train_texts` is read only where one is trained.

    Returns:
        A fast tokenizer with an end mark (eos). "bpe" has at most data.vocab_size entries, end mark included.

    Raises:
        UserError: a tokenizer that cannot be loaded, is not a fast one or has no end mark.
    """
    if data.tokenizer == "bpe":
        return _wrap(_train_bpe(train_texts, data.vocab_size))
    if data.tokenizer == "char":
        return _wrap(_characters(train_texts), unk_token=UNKNOWN)
    return _load(data.tokenizer)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text is unknown
        show_progress=False,
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
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON and network errors alike
        offline = " (the Hugging Face hub cannot be reached from here)" if _is_offline(error) else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.tokenizer {name!r} is neither bpe nor char and does not load as a Hugging Face tokenizer{offline}: "
            f"{reason} Give bpe, char, the folder of a saved tokenizer or a hub name."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UserError(f"data.tokenizer {name!r} is a {kind}, not a fast tokenizer: choose one with a tokenizer.json.")
    require(
        tokenizer.eos_token_id is not None,
        f"data.tokenizer {name!r} has no end mark to separate documents: set its eos_token and save it again.",
    )
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _is_offline(error: BaseException) -> bool:
    """Whether an error or one of its causes says that the hub was not reached."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
