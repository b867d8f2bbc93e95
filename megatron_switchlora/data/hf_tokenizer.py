"""Load tokenizers from Hugging Face's folders without running their code, and save them as training used them.

Training tokenises a document's text alone, or with `data.add_bos` after a begin mark. A tokenizer's own class may add
other marks to a prompt: T5's class appends its end mark, whatever tokenizer.json says. So the saved tokenizer is the
plain fast tokenizer over the same backend. Its post-processor adds what training added, and a prompt equals the start
of a document. Chat templates, the SentencePiece model and all special tokens are saved with it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.disk import leads_out

# Beginnings and ends of the names of a tokenizer's files, in folders of transformers and of its predecessors.
BEGINNINGS = (
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece", "sentencepiece",
    "tekken",
)  # fmt: skip
ENDS = (".model", ".spm", ".tiktoken")
MODELS = (
    "tokenizer.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)  # one of these, or a file of ENDS, holds the vocabulary
TEMPLATES = "additional_chat_templates"
KEPT = (
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "split_special_tokens", "chat_template",
    "response_template", "chat_control_tokens",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder that belong to its tokenizer.

    The list is empty if no file holds a vocabulary, even if there are chat templates.
    """
    named = [p for p in folder.iterdir() if p.name.startswith(BEGINNINGS) or p.name.endswith(ENDS)]
    files = [path for path in named if path.suffix not in (".py", ".safetensors", ".bin") and path.is_file()]
    if not any(path.name in MODELS or path.name.endswith(ENDS) for path in files):
        return []
    return sorted([*files, *(folder / TEMPLATES).glob("*.jinja")])


def require_own(folder: Path, paths: Iterable[Path]) -> None:
    """Require that no path is a link out of the folder, as copies of its target would be readable by others.

    Raises:
        UserError: a path is such a link.
    """
    for path in paths:
        require(
            not leads_out(path, folder),
            f"{path} is a link to {path.resolve()}, out of its folder, and is not followed: put the file itself there.",
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer by folder or hub name; never run code from its folder, and never ask to.

    Raises:
        UserError: the tokenizer does not load, needs code of its own, or is not a fast one. A file is a link out of the
            folder.
    """
    if Path(name).is_dir():
        require_own(Path(name), tokenizer_files(Path(name)))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON and network errors alike
        raise UserError(f"{name} does not load as a Hugging Face tokenizer{_reason(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UserError(f"{name} is a {kind}, not a fast tokenizer: choose one with a tokenizer.json.")
    return tokenizer


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return ": it needs Python code that lies beside it, which is never run. Save it as a fast tokenizer first."
    if find_spec("sentencepiece") is None and "tiktoken" in str(error):  # transformers' message without the package
        return (
            ": its vocabulary is in a SentencePiece model only, and the package that reads it is missing. Install it "
            "with pip install sentencepiece."
        )
    if "instantiate the backend tokenizer" in str(error):  # the rest of the message lists what it has tried
        return (
            ": it has no tokenizer.json, and nothing in it names the tokenizer's class. Put the model's own "
            "tokenizer_config.json (with tokenizer_class) and config.json beside its other files."
        )
    offline = " (the Hugging Face hub cannot be reached from here)" if _is_offline(error) else ""
    return f"{offline}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _is_offline(error: BaseException) -> bool:
    """Return whether an error or one of its causes means that the hub was not reached."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def as_trained(tokenizer: PreTrainedTokenizerFast, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a plain tokenizer that puts before a prompt what training put before a text.

    That is the begin mark or nothing. The tokens are the same.

    Raises:
        UserError: `add_bos` is set, but the tokenizer has no begin mark.
    """
    require(
        not add_bos or tokenizer.bos_token_id is not None,
        "data.add_bos needs a tokenizer with a begin mark, but this one has no bos_token: set it and save the "
        "tokenizer again, or leave data.add_bos out.",
    )
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    marks: dict[str, Any] = {name: mark for name, mark in tokenizer._special_tokens_map.items() if mark is not None}
    named = {name: marks.pop(name) for name in list(marks) if name not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    kept = {name: value for name in KEPT if (value := getattr(tokenizer, name, None)) is not None}
    if named:
        kept["model_specific_special_tokens"] = named
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        add_bos_token=add_bos,
        add_eos_token=False,
        **marks,
        **kept,
    )
    plain.vocab_file = getattr(tokenizer, "vocab_file", None)
    return plain


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer's folder, with the SentencePiece model that it was read from for programs that want it.

    Raises:
        OSError: the disk is full.
        UserError: the name of a chat template cannot be a file's name.
    """
    try:
        tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise UserError(f"The tokenizer cannot be saved: {error} Correct its tokenizer_config.json.") from None
    source = Path(tokenizer.name_or_path or folder)
    models = [path for path in source.iterdir() if path.name.endswith(ENDS)] if source.is_dir() else []
    models += [Path(tokenizer.vocab_file)] if getattr(tokenizer, "vocab_file", None) else []
    for path in models:
        if path.name.endswith(ENDS) and path.is_file() and path.parent != folder:
            shutil.copyfile(path, folder / path.name)
