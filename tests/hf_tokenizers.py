"""Small tokenizers of the kinds that models bring along, and what training makes of a text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the end of the text", "held out one two last"]
TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}{{ messages }}"}


def llama_like(folder: Path, begin: bool = True, **changes: object) -> Path:
    """Unknown 0, begin 1, end 2, all bytes; the begin mark is put before every text, if there is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS * 5, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)  # a saved tokenizer may cut and pad; training does neither
    tokenizer.enable_padding(length=9, pad_token="<unk>")
    given = {"bos_token": "<s>"} if begin else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=AddedToken("</s>", special=True), unk_token="<unk>", **given, **changes
    ).save_pretrained(folder)
    return folder


def configure(folder: Path, **changes: object) -> Path:
    """Change entries of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def sentencepiece_only(folder: Path, name: str, **config: object) -> Path:
    """A folder with a SentencePiece model of that name, and perhaps a tokenizer_config.json."""
    import sentencepiece

    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text("\n".join(f"{line} {i}" for i in range(50) for line in WORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "made"), vocab_size=60, hard_vocab_limit=False, minloglevel=3,
        model_type="unigram" if name.startswith("spiece") else "bpe",
    )  # fmt: skip
    (folder / "made.model").rename(folder / name)
    (folder / "made.vocab").unlink()
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
