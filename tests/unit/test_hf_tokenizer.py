"""What is saved of a tokenizer adds to a prompt what training added to a text, and runs nobody's code."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.hf_tokenizer import save_tokenizer, tokenizer_files
from megatron_switchlora.data.tokenizer import build_tokenizer
from tests.hf_tokenizers import TEMPLATES, configure, llama_like, sentencepiece_only
from tests.unit.test_data_stream import t5_like

TEXT = "the end of one text"
KINDS: dict[str, Callable[[Path], Path]] = {
    "t5": t5_like,  # its class puts the end mark behind, whatever its tokenizer.json says
    "llama": llama_like,
    "flags": lambda folder: configure(llama_like(folder), add_bos_token=True, add_eos_token=True),
    "sentencepiece": lambda folder: sentencepiece_only(
        folder, "tokenizer.model", tokenizer_class="LlamaTokenizer", add_bos_token=True
    ),
    "spiece": lambda folder: sentencepiece_only(folder, "spiece.model", tokenizer_class="T5Tokenizer"),
}  # fmt: skip


def saved(source: Path, out: Path, add_bos: bool = False) -> Path:
    """A tokenizer's folder as training leaves it, beside the configuration of a model."""
    save_tokenizer(build_tokenizer(DataConfig(tokenizer=str(source), add_bos=add_bos), iter(())), out)
    (out / "config.json").write_text('{"model_type": "llama"}')
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_the_beginning_of_a_document(tmp_path: Path, kind: str) -> None:
    source = KINDS[kind](tmp_path / "source")
    theirs = AutoTokenizer.from_pretrained(source)
    wanted = theirs.backend_tokenizer
    wanted.no_truncation()
    wanted.no_padding()
    plain = wanted.encode(TEXT, add_special_tokens=False).ids
    assert wanted.encode(TEXT).ids != plain and len(plain) > 3
    begun = [] if theirs.bos_token_id is None else [True]
    for add_bos in (False, *begun):
        out = saved(source, tmp_path / str(add_bos), add_bos)
        expected = [theirs.bos_token_id] * add_bos + plain
        for _ in range(2):  # and once more saved: a checkpoint's is exported
            ours = AutoTokenizer.from_pretrained(out)
            assert ours(TEXT)["input_ids"] == expected
            assert Tokenizer.from_file(str(out / "tokenizer.json")).encode(TEXT).ids == expected
            assert ours(TEXT, add_special_tokens=False)["input_ids"] == plain
            assert ours.get_vocab() == theirs.get_vocab()
            assert ours.special_tokens_map == theirs.special_tokens_map
            assert ours.all_special_tokens == theirs.all_special_tokens
            out = saved(out, tmp_path / f"{add_bos} again", add_bos)


def test_a_begin_mark_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.add_bos needs a tokenizer with a begin mark, but this one has no bos_tok"
    ):
        saved(t5_like(tmp_path / "t5"), tmp_path / "out", add_bos=True)


def test_templates_and_models_go_along(tmp_path: Path) -> None:
    """Several chat templates, names of marks that only this model has, sides, and the SentencePiece model itself."""
    source = sentencepiece_only(
        tmp_path / "source", "tokenizer.model", tokenizer_class="LlamaTokenizer", padding_side="left",
        model_max_length=77, image_token="<image>", extra_special_tokens=["<more>"],
        chat_template=[{"name": name, "template": text} for name, text in TEMPLATES.items()],
    )  # fmt: skip
    out = saved(source, tmp_path / "out")
    names = {path.relative_to(out).as_posix() for path in tokenizer_files(out)}
    assert names == {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    ours = AutoTokenizer.from_pretrained(saved(out, tmp_path / "again"))
    assert (tmp_path / "again" / "tokenizer.model").is_file()
    assert ours.chat_template == TEMPLATES
    assert (ours.padding_side, ours.model_max_length, ours.image_token) == ("left", 77, "<image>")
    assert "<more>" in ours.all_special_tokens


def test_a_sentencepiece_model_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sentencepiece_only(tmp_path / "source", "tokenizer.model")
    assert len(AutoTokenizer.from_pretrained(saved(source, tmp_path / "out"))) > 40
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError, match=r"the package that reads it is missing. Install it with pip install sentencepiece."
    ):
        saved(source, tmp_path / "none")


@pytest.mark.parametrize("declared", ["Odd", "LlamaTokenizer"])
def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str
) -> None:
    """A class that transformers knows is taken instead; another is refused."""
    auto_map = {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}
    source = configure(llama_like(tmp_path / "source"), tokenizer_class=declared, auto_map=auto_map)
    (source / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if declared == "Odd":
        with pytest.raises(UserError, match=r"needs Python code that lies beside it, which is never run") as caught:
            saved(source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    else:
        out = saved(source, tmp_path / "out")
        assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
        assert not list(out.glob("*.py"))
    assert sys.stdin.tell() == 0 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    source = llama_like(tmp_path / "source", chat_template=TEMPLATES)
    private = tmp_path / "private"
    private.write_text((source / "tokenizer.json").read_text())
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(private)
    with pytest.raises(UserError, match=rf"{name} is a link to .*private, out of its folder, and is not followed"):
        saved(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_model_of_no_known_class(tmp_path: Path) -> None:
    source = sentencepiece_only(tmp_path / "source", "spiece.model")
    with pytest.raises(UserError, match=r"has no tokenizer\.json, and nothing in it names the tokenizer's class"):
        saved(source, tmp_path / "out")
