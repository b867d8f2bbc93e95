"""Tokenizers give the text back, are the same every time and load with transformers."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.tokenizer import build_tokenizer, tokenizer_identity

TEXTS = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8") for name in ("argparse.py", "textwrap.py")
]
STRANGE = [
    "",
    "  two  spaces , a comma ; don't ! 's  \n\n\t x",
    "\r\n\x00\x1c\u2028\ufeff",
    "ünï 日本語 🎉👩‍👩‍👧 e\u0301",
    "<|endoftext|> <unk> [PAD]",
]


def build(tokenizer: str, texts: list[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    return build_tokenizer(DataConfig(tokenizer=tokenizer, vocab_size=vocab_size), iter(texts))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_bpe_gives_every_text_back_and_learns() -> None:
    tokenizer = build("bpe", TEXTS)
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    for text in TEXTS + STRANGE:
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert len(encode(tokenizer, TEXTS[0])) < 0.5 * len(TEXTS[0])
    assert encode(tokenizer, " a word\n") == encode(tokenizer, " a") + encode(tokenizer, " word") + encode(
        tokenizer, "\n"
    )


def test_bpe_is_the_same_in_another_process() -> None:
    program = (
        "import sys, pathlib; from megatron_switchlora.config.data import DataConfig;"
        "from megatron_switchlora.data.tokenizer import build_tokenizer;"
        "texts = [pathlib.Path(name).read_text(encoding='utf-8') for name in sys.argv[1:]];"
        "tokenizer = build_tokenizer(DataConfig(vocab_size=600), iter(texts));"
        "sys.stdout.write(tokenizer.backend_tokenizer.to_str())"
    )
    files = [str(Path(sysconfig.get_path("stdlib")) / name) for name in ("argparse.py", "textwrap.py")]
    command = [sys.executable, "-c", program, *files]
    other = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=120).stdout
    assert other == build("bpe", TEXTS).backend_tokenizer.to_str()


def test_char_is_one_sorted_token_a_character() -> None:
    text = "To be,\n\n or  not !\t'tis é日🎉\r\n"
    tokenizer = build("char", [text[:9], text[9:]])
    alphabet = sorted(set(text))
    assert len(tokenizer) == len(alphabet) + 2
    assert encode(tokenizer, text) == [alphabet.index(character) for character in text]
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "TXY") == [alphabet.index("T")] + 2 * [tokenizer.unk_token_id]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.unk_token == "<unk>"
    assert tokenizer.eos_token_id not in encode(tokenizer, text)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_saved_folder_loads_and_encodes_identically(tmp_path: Path, kind: str) -> None:
    tokenizer = build(kind, TEXTS)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), build(str(tmp_path), [])):
        assert len(loaded) == len(tokenizer)
        assert (loaded.eos_token_id, loaded.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
        for text in TEXTS + STRANGE:
            assert encode(loaded, text) == encode(tokenizer, text)
            assert loaded.decode(encode(loaded, text)) == tokenizer.decode(encode(tokenizer, text))
            assert kind == "char" or loaded.decode(encode(loaded, text)) == text


def test_identity_names_what_matters(tmp_path: Path) -> None:
    def identity(name: str, vocab_size: int = 600) -> dict[str, object]:
        return tokenizer_identity(DataConfig(tokenizer=name, vocab_size=vocab_size))

    assert identity("bpe") == {"bpe": 600}  # caches of earlier versions keep their names
    assert identity("bpe") != identity("bpe", 601)
    assert tokenizer_identity(DataConfig(vocab_size=600, add_bos=True)) == {"bpe": 600, "add_bos": True}
    assert identity("char") == identity("char", 601)
    build("char", ["abc"]).save_pretrained(tmp_path)
    before = identity(str(tmp_path))
    assert identity(str(tmp_path / "." / "")) == before
    build("char", ["abcd"]).save_pretrained(tmp_path)
    assert identity(str(tmp_path)) != before


def test_tokenizers_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'\./no/such/folder' is neither bpe nor char"):
        build("./no/such/folder", [])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'no-such/name'.*\(the Hugging Face hub cannot be reached from here\)"
    ) as caught:
        build("no-such/name", [])
    assert "\n" not in str(caught.value)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"broken' is neither bpe nor char") as caught:
        build(str(tmp_path / "broken"), [])
    assert "cannot be reached" not in str(caught.value)
    endless = PreTrainedTokenizerFast(tokenizer_object=build("char", ["abc"]).backend_tokenizer)
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match=r"endless' has no end mark"):
        build(str(tmp_path / "endless"), [])
