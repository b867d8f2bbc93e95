"""From a Hugging Face folder through runs to exports: the tokenizer as trained with, the marks, who may read files."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf_tokenizers import TEMPLATES, llama_like
from tests.system.commands import Place
from tests.unit.test_data_stream import t5_like

SHORT = ["--train.steps", "2", "--train.warmup_steps", "1", "--train.eval_interval", "2", "--checkpoint.interval", "1"]
GENERATION = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
MARKS = {"bos_token_id": 1, "eos_token_id": [2, 9], "pad_token_id": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hand_over"))


def folders(place: Place, run: str, out: str) -> list[Path]:
    """All that hold the tokenizer of a run: its own, its checkpoint's, the final model and an export."""
    status, output = place.script("tools/convert_hf.py", "export", run, out)
    assert status == 0, output
    last = place.folder / run / "checkpoints" / "step-00000002" / "tokenizer"
    return [place.folder / run / "tokenizer", last, place.folder / run / "final", place.folder / out]


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_prompts_of_a_t5_tokenizer_do_not_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pipeline goes on with the text. The group may read everything, others nothing, as the umask says."""
    options = place.options("t5", *SHORT, "--data.tokenizer", str(t5_like(place.folder / "t5_like")))
    monkeypatch.setitem(place.env, "UMASK", "027")
    status, output = place.run("alone", options)
    assert status == 0, output
    for folder in folders(place, "t5", "t5_out"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer("the text")["input_ids"] == tokenizer("the text", add_special_tokens=False)["input_ids"]
    final = place.folder / "t5" / "final"
    assert {key: content(final / "config.json")[key] for key in MARKS} == {
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0
    }  # fmt: skip
    pipeline = transformers.pipeline("text-generation", model=str(final), max_new_tokens=3, return_tensors=True)
    tokens = pipeline("the text")[0]["generated_token_ids"]
    prompt = tokenizer("the text", add_special_tokens=False)["input_ids"]
    assert tokens[: len(prompt)] == prompt and len(tokens) > len(prompt)
    assert modes(place.folder / "t5") | modes(place.folder / "t5_out") == {0o640}


@pytest.fixture(scope="module")
def start(place: Place) -> Path:
    """An imported LLaMA with a begin mark, several end marks and chat templates."""
    source = llama_like(place.folder / "source", chat_template=TEMPLATES)
    config = transformers.LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **MARKS
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**GENERATION)
    model.save_pretrained(source)
    status, output = place.script("tools/convert_hf.py", "import", "source", "start")
    assert status == 0 and "--data.tokenizer start/tokenizer" in output
    return place.folder / "start"


def test_an_imported_model_is_handed_on(place: Place, start: Path) -> None:
    status, output = place.script("tools/convert_hf.py", "export", "start", "back")
    assert status == 0, output
    back = content(place.folder / "back" / "config.json")
    assert {key: back[key] for key in MARKS} == MARKS
    assert content(place.folder / "back" / "generation_config.json").items() >= GENERATION.items()
    theirs = transformers.AutoTokenizer.from_pretrained(place.folder / "source")
    assert transformers.AutoTokenizer.from_pretrained(place.folder / "back")("one").input_ids == theirs("one").input_ids

    options = ["--config", str(start / "model.yaml"), "--train.init_from", str(start), "--method.name", "lora"]
    options += ["--data.tokenizer", str(start / "tokenizer"), "--data.add_bos", "true"]
    status, output = place.run("alone", [*place.options("first", *SHORT), *options])
    assert status == 0, output
    second = ["--config", str(start / "model.yaml"), "--train.init_from", "first", "--method.name", "lora"]
    second += ["--data.tokenizer", "first/tokenizer", "--train.stop_after_steps", "1"]
    status, output = place.run("alone", [*place.options("second", *SHORT), *second])
    assert status == 75, output
    status, output = place.run("alone", [*place.options("second", *SHORT), *second[:-2]])  # and resumed
    assert status == 0, output
    for run, begin in (("first", [1]), ("second", [])):
        for folder in folders(place, run, f"{run}_out"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            assert tokenizer("one two")["input_ids"] == begin + theirs("one two", add_special_tokens=False)["input_ids"]
            assert tokenizer.chat_template == TEMPLATES
            if (folder / "config.json").exists():
                assert {key: content(folder / "config.json")[key] for key in MARKS} == MARKS
                generation = content(folder / "generation_config.json")
                assert generation.items() >= {**GENERATION, "bos_token_id": 1, "pad_token_id": 0}.items()
    for name in ("start", "first", "first_out"):
        assert modes(place.folder / name) == {0o644}, name
