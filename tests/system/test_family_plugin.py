"""A model family in one file under tests: without a change to the package it trains on two ranks, resumes, plans, is
evaluated, exported and imported again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.plugins import load_plugins
from megatron_switchlora.model.protocol import build_on_meta
from tests.system.commands import Place

TOY = ["--plugins", "tests.toy_family", "--model.family", "toy", "--model.max_position_embeddings", "40"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where `whole` has been trained, on two ranks with switching."""
    place = Place(tmp_path_factory.mktemp("toy_family"))
    status, output = place.run("2 ranks", place.options("whole", *TOY))
    assert status == 0 and "Trained a toy of" in output, output
    return place


def losses(place: Place, run: str) -> list[float]:
    return [record["loss"] for record in place.records(run) if "loss" in record]


def test_it_trains_and_is_evaluated(place: Place) -> None:
    assert sum(record.get("switched", 0) for record in place.records("whole")) > 0
    assert losses(place, "whole")[-1] < losses(place, "whole")[0]
    status, output = place.run("alone", ["--evaluate_only", "--output_dir", str(place.folder / "whole")])
    assert status == 0 and f"{place.records('whole')[-1]['val_loss']:.6f}" in output, output


def test_it_resumes(place: Place) -> None:
    cut = place.options("cut", *TOY, "--train.stop_after_steps", "5")
    assert place.run("2 ranks", cut)[0] == 75
    status, output = place.run("2 ranks", cut[:-2])
    assert status == 0, output
    assert losses(place, "cut") == losses(place, "whole")
    status, output = place.run("alone", [word for word in cut[:-2] if word not in TOY[2:4]])
    assert status == 2 and "model.family is 'toy' there and 'llama' here" in output, output


def test_it_goes_out_and_back(place: Place) -> None:
    """Exported, imported, exported again it is the same; a run of another method begins from it."""
    status, output = place.script("tools/convert_hf.py", "export", "whole", "exported", "--dtype", "fp32")
    assert status == 0, output
    tensors = load_file(place.folder / "exported" / "model.safetensors")
    assert "blocks.0.up.weight" in tensors and tensors["positions.weight"].shape == (40, 32)
    assert load_file(place.folder / "whole" / "final" / "model.safetensors").keys() == tensors.keys()
    assert json.loads((place.folder / "exported" / "config.json").read_text())["model_type"] == "toy"
    status, output = place.script("tools/convert_hf.py", "import", "exported", "imported")
    assert status == 2 and "model_type 'toy'" in output and "--plugins" in output, output
    words = ["import", "exported", "imported", "--plugins", "tests.toy_family"]
    status, output = place.script("tools/convert_hf.py", *words)
    assert status == 0, output
    status, output = place.script("tools/convert_hf.py", "export", "imported", "again", "--dtype", "fp32")
    assert status == 0, output
    again = load_file(place.folder / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    start = ["--config", str(place.folder / "imported" / "model.yaml"), "--train.init_from", "imported"]
    start += ["--data.tokenizer", "imported/tokenizer", "--method.name", "full", "--train.steps", "3"]
    status, output = place.run("alone", place.options("onward", *start))
    assert status == 0, output
    last = place.records("whole")[-1]["val_loss"]
    assert place.records("onward")[0]["val_loss"] == pytest.approx(last, abs=1e-5)


def test_tensor_parallel_ranks_and_heads_train_it(place: Place) -> None:
    for run, *more in (("one",), ("split", "--parallel.tp", "2")):
        status, output = place.run("2 ranks" if more else "alone", place.options(run, *TOY, *more))
        assert status == 0, output
    assert losses(place, "split") == pytest.approx(losses(place, "one"), abs=1e-5)
    heads = ["--method.name", "lte", "--method.lte.local_heads", "2", "--method.lte.merge_interval", "3"]
    status, output = place.run("alone", place.options("heads", *TOY, *heads, "--method.alpha", "4"))
    assert status == 0, output
    assert losses(place, "heads")[-1] < losses(place, "heads")[0]


def test_it_plans_and_refuses(place: Place) -> None:
    options = place.options("none", *TOY, "--dry_run", "--dry_run_world", "2")
    at = options.index("--output_dir")
    del options[at : at + 2]
    status, output = place.run("alone", options)
    load_plugins(["tests.toy_family"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "max_position_embeddings": 40}
    shape = ModelConfig(family="toy", pad_multiple=1, **sizes)
    total = sum(param.numel() for param in build_on_meta(shape, 300).parameters())
    (line,) = (line for line in output.splitlines() if "full-rank training  " in line)
    assert status == 0 and f" {total:,} " in line, output
    status, output = place.run("alone", [*options, "--train.seq_len", "41"])
    assert status == 2 and "train.seq_len 41 must not be longer than model.max_position_embeddings 40" in output
    status, output = place.run("alone", [*options, "--model.family", "nobody"])
    assert status == 2 and "model.family must be one of llama, toy, not 'nobody': choose one of them" in output
