"""Model cards: their numbers are the run's, the Hub's library reads them, they say where weights came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_switchlora.checkpoint.files import verified
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.hf.export import export_dense, export_peft
from megatron_switchlora.hf.model_card import CardFacts, card_facts, edited_card, hub_name, model_card, write_card
from megatron_switchlora.hf.start import import_model
from tests.plain import PlainRun, small_config
from tests.unit.test_convert import save, trained

META: dict[str, Any] = {
    "steps": 6, "val_loss": 2.34567, "val_ppl": 10.4402, "unigram_val_ppl": 87.654, "val_samples": 31, "data": "f00d",
    "parameters": {"trainable": 1234, "full_rank": 56789}, "versions": {"torch": "2.13.0", "GPU": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint of step 6, its records and its meta.json."""
    folder = tmp_path_factory.mktemp("runs") / "my | run"
    save(trained("switchlora"), folder / "checkpoints" / "step-00000006")
    records = [{"step": 3, "val_loss": 9.0}, {"step": 6, "loss": 1.0}, {"step": 6, "val_loss": META["val_loss"]}]
    records += [{"step": 9, "val_loss": 1.0}]  # after the checkpoint
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "meta.json").write_text(json.dumps(META))
    return folder


def loaded(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def rows(card: ModelCard) -> dict[str, str]:
    """The rows of the card's tables."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ") and line != "| | |"]
    return {line.split(" | ")[0].removeprefix("| "): line.split(" | ", 1)[1].removesuffix(" |") for line in lines}


def test_numbers_are_those_of_the_run(tmp_path: Path, run: Path) -> None:
    export_dense(verified(run / "checkpoints" / "step-00000006"), tmp_path / "out")
    card, config = loaded(tmp_path / "out"), small_config("switchlora")
    found = rows(card)
    assert found["Validation loss"] == f"{META['val_loss']:.4f} nats per token"
    assert found["Validation perplexity"] == f"{META['val_ppl']:.2f}"
    assert found["Perplexity of a unigram model of the training tokens"] == "87.65"
    assert found["Validation samples"] == f"31 of {config.train.seq_len} tokens"
    assert found["Trainable parameters"] == "1,234 of 56,789"
    assert found["Steps"] == f"6 of {config.train.steps}"
    assert found["Tokens"] == f"{6 * config.train.global_batch_size * config.train.seq_len:,}"
    assert found["Peak learning rates"].startswith("0.01, ")
    assert f"`method.rank` {config.method.rank}" in found["Its options"] and "galore" not in found["Its options"]
    assert found["Fingerprint of the tokens"] == "`f00d`" and found["Started from"] == "random initial values"
    assert card.text.startswith("\n# my \\| run\n") and "torch 2.13.0" in card.text and "GPU" not in card.text
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["tags"] == ["llama", "megatron_switchlora", "switchlora"]
    assert data["pipeline_tag"] == "text-generation" and not {"license", "datasets", "base_model"} & data.keys()


def test_a_step_without_a_measurement_has_no_number(tmp_path: Path, run: Path) -> None:
    """Nor has a checkpoint that was copied away from its run, of which only its own facts are known."""
    checkpoint = save(trained("full"), tmp_path / "copy")
    export_dense(checkpoint, tmp_path / "out")
    card = loaded(tmp_path / "out")
    assert "No validation loss was measured after step 6." in card.text
    assert "Validation loss" not in rows(card) and "Trainable parameters" not in rows(card)
    assert rows(card)["Method"] == "full"


def test_the_cards_of_peft(tmp_path: Path, run: Path) -> None:
    export_peft(verified(run / "checkpoints" / "step-00000006"), tmp_path / "out")
    adapter, base = loaded(tmp_path / "out" / "adapter"), loaded(tmp_path / "out" / "base")
    assert adapter.data.library_name == "peft" and "lora" in adapter.data.tags and "lora" not in base.data.tags
    assert base.data.library_name == "transformers" and "without the adapter in `../adapter`" in base.text
    assert "PeftModel.from_pretrained" in adapter.text and rows(adapter) == rows(base)


def test_weights_keep_saying_where_they_came_from(tmp_path: Path) -> None:
    """From the Hub's cache: in the import's own export, and in that of a run that began with it."""
    hub = tmp_path / "models--some-org--some.model" / "snapshots" / "abc"
    hub.parent.mkdir(parents=True)
    export_dense(save(PlainRun(small_config("full")), tmp_path / "made"), hub)
    import_model(hub, tmp_path / "imported")
    export_dense(verified(tmp_path / "imported"), tmp_path / "back")
    card = loaded(tmp_path / "back")
    assert card.data.base_model == "some-org/some.model" and "imported from the weights of" in card.text
    assert "## Training" not in card.text
    run = save(trained("lora"), tmp_path / "run")
    state = json.loads((run.folder / "state.json").read_text())
    weights = weights_of(tmp_path / "imported")
    assert weights.imported["source"] == str(hub)
    state |= {"imported": weights.imported}  # as the trainer hands it on
    state["config"]["train"]["init_from"] = "start/here"
    facts = card_facts(weights_with(state, weights), run)
    card = ModelCard(model_card(facts))
    assert card.data.base_model == "some-org/some.model"
    assert rows(card)["Started from"].startswith("the weights of `some-org/some.model`, imported from Hugging Face's")
    assert rows(card)["Started from"].endswith("(`start/here`)")


def weights_of(folder: Path) -> Any:
    from megatron_switchlora.checkpoint.weights import Weights

    return Weights(verified(folder))


def weights_with(state: dict[str, Any], weights: Any) -> Any:
    """The weights of an import as those of a run with this state."""
    weights.state, weights.config = state, state["config"]
    return weights


def test_hub_names() -> None:
    assert hub_name("/x/hub/models--meta-llama--Llama-3.2-1B/snapshots/0a") == "meta-llama/Llama-3.2-1B"
    assert hub_name("/x/hub/models--gpt2/snapshots/0a") == "gpt2"
    assert hub_name("/x/models--a--b/mine") is None and hub_name("/x/models--a--b/snapshots/0a/mine") is None
    assert hub_name("/home/me/llama") is None and hub_name(None) is None


@pytest.mark.parametrize(
    ("data", "datasets", "words"),
    [
        (DataConfig(source="hf", tokenizer="t5-base"), ["allenai/c4"], "`allenai/c4`, en, split train, validation on"),
        (DataConfig(source="hf", hf_name="/tmp", tokenizer="t5-base"), None, "`/tmp`, en, split train"),
        (DataConfig(source="hf", hf_name="/home/me/c4", tokenizer="t5-base"), None, "`/home/me/c4`, en, split train"),
        (DataConfig(source="hf", hf_name="../my/c4", tokenizer="t5-base"), None, "`../my/c4`, en, split train"),
        (DataConfig(source="hf", hf_name="~/c4", tokenizer="t5-base"), None, "`~/c4`, en, split train"),
        (DataConfig(source="hf", hf_name="imdb", tokenizer="t5-base"), ["imdb"], "`imdb`, en, split train"),
        (DataConfig(), None, "the sources of Python's standard library, at most 10,000,000 bytes"),
        (DataConfig(source="files", files=["a|b/*.txt", "c.txt"]), None, "`a\\|b/*.txt`, `c.txt`; 10% of the text"),
        (DataConfig(source="files", files="a", val_files="b"), None, "`a`; validation on `b`"),
    ],
)
def test_data(data: DataConfig, datasets: list[str] | None, words: str) -> None:
    config = replace(RunConfig(), data=data)
    card = ModelCard(model_card(CardFacts("x", config.model, 300, config, 4, None)))
    assert card.data.datasets == datasets and rows(card)["Data"].startswith(words)


def test_an_edited_card_is_kept(tmp_path: Path) -> None:
    """And one that a user has written; ours is replaced."""
    config = RunConfig()
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    texts = [model_card(CardFacts(name, config.model, 300, config, 4, None)) for name in ("first", "second")]
    path = old / "README.md"
    write_card(old, texts[0])
    assert edited_card(path) is None and path.read_text() == texts[0]
    write_card(new, texts[1], before=old)
    assert (new / "README.md").read_text() == texts[1]
    for own in (texts[0].replace("first", "mine"), "my card\n", texts[0] + "more\n", b"\xff"):
        path.write_bytes(own if isinstance(own, bytes) else own.encode())
        write_card(new, texts[1], before=old)
        assert (new / "README.md").read_bytes() == path.read_bytes()
    write_card(new, texts[1], before=tmp_path / "none")
    assert (new / "README.md").read_text() == texts[1]


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """A run in such a folder still gets its card, which counts as ours."""
    config = RunConfig()
    write_card(tmp_path, model_card(CardFacts("run-\udcff", config.model, 300, config, 4, None)))
    assert "# run-?\n" in (tmp_path / "README.md").read_text() and edited_card(tmp_path / "README.md") is None


def test_a_checkpoint_of_the_full_rank_steps() -> None:
    """Until the method begins every weight trains."""
    config = small_config("lora")
    config.method.full_rank_steps = 4
    cards = {}
    for step in (2, 4, 5):
        facts = CardFacts("x", config.model, 300, config, step, None, META)
        cards[step] = ModelCard(model_card(facts))
    for step in (2, 4):
        assert "trained at full rank, before lora begins at step 4." in cards[step].text
        assert rows(cards[step])["Trainable parameters"] == "all, until lora begins after step 4"
        assert "lora" not in cards[step].data.tags
    assert "trained with LoRA" in cards[5].text or "trained with lora" in cards[5].text
    assert rows(cards[5])["Trainable parameters"] == "1,234 of 56,789" and "lora" in cards[5].data.tags


@pytest.mark.parametrize("bad", [None, "31", [], float("inf"), True])
def test_entries_of_meta_that_are_no_numbers_are_left_out(bad: object) -> None:
    config = RunConfig()
    meta = META | {"val_samples": bad, "unigram_val_ppl": bad, "parameters": {"trainable": bad, "full_rank": bad}}
    facts = CardFacts("x", config.model, 300, config, 4, 2.0, meta)
    found = rows(ModelCard(model_card(facts)))
    assert "Validation loss" in found and "Validation samples" not in found and "Trainable parameters" not in found
    assert "Perplexity of a unigram model of the training tokens" not in found


def test_a_source_with_a_line_break() -> None:
    config = RunConfig()
    card = model_card(CardFacts("x", config.model, 300, None, 0, None, {}, "/home/my\n# model"))
    assert "from the weights of `/home/my # model`." in card
