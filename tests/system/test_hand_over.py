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


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def marks(folder: Path) -> dict[str, Any]:
    config = content(folder / "config.json")
    return {key: config[key] for key in MARKS}


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def ids(folder: Path, text: str, **options: Any) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text, **options)["input_ids"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hand_over"))


def folders(place: Path, run: str) -> list[Path]:
    """What a run leaves that holds its tokenizer: its own folder, a checkpoint's, the final model."""
    return [
        place / run / "tokenizer",
        place / run / "checkpoints" / "step-00000002" / "tokenizer",
        place / run / "final",
    ]


def test_prompts_of_a_t5_tokenizer_do_not_end(place: Place) -> None:
    """And the pipeline goes on with the text."""
    options = place.options("t5", *SHORT, "--data.tokenizer", str(t5_like(place.folder / "t5_like")))
    status, output = place.run("alone", options)
    assert status == 0, output
    plain = ids(place.folder / "t5_like", "the text", add_special_tokens=False)
    assert ids(place.folder / "t5_like", "the text") == [*plain, 1]
    for folder in folders(place.folder, "t5"):
        assert ids(folder, "the text") == plain
    final = place.folder / "t5" / "final"
    assert marks(final) == {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    pipeline = transformers.pipeline("text-generation", model=str(final), max_new_tokens=3, return_tensors=True)
    tokens = pipeline("the text")[0]["generated_token_ids"]
    assert tokens[: len(plain)] == plain and len(tokens) > len(plain)
    assert modes(place.folder / "t5") == {0o644}


@pytest.fixture
def start(place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An imported LLaMA with a begin mark, several end marks and chat templates; what follows is for the group only."""
    monkeypatch.setitem(place.env, "UMASK", "027")
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
    """Through a run with begin marks, stopped and resumed, to its final model and an export."""
    options = ["--config", str(start / "model.yaml"), "--train.init_from", str(start), "--method.name", "lora"]
    options += ["--data.tokenizer", str(start / "tokenizer"), "--data.add_bos", "true"]
    for stop, wanted in ((["--train.stop_after_steps", "1"], 75), ([], 0)):
        status, output = place.run("alone", [*place.options("run", *SHORT), *options, *stop])
        assert status == wanted, output
    status, output = place.script("tools/convert_hf.py", "export", "run", "out")
    assert status == 0, output
    plain = ids(place.folder / "source", "one two", add_special_tokens=False)
    for folder in [*folders(place.folder, "run"), place.folder / "out"]:
        assert ids(folder, "one two") == [1, *plain]
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
    for folder in (place.folder / "run" / "final", place.folder / "out"):
        assert marks(folder) == MARKS
        generation = {**GENERATION, "bos_token_id": 1, "pad_token_id": 0}
        assert content(folder / "generation_config.json").items() >= generation.items()
    assert modes(start) | modes(place.folder / "run") | modes(place.folder / "out") == {0o640}
