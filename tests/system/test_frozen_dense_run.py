"""Runs whose embedding, head and norms are frozen: saved, resumed, exported, and their bytes as planned."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_switchlora.checkpoint.files import open_checkpoint
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.model.protocol import build_model, initialize_weights
from tests.system.commands import Place
from tests.system.soak import comparable

FROZEN = [
    "--model.pad_multiple",  # bytes are those of the counts shown
    "1",
    "--optim.dense_lr",
    "0",
    "--checkpoint.interval",
    "5",
    "--checkpoint.keep_last",
    "9",
    "--train.check_interval",
    "3",
]
CASES = {
    "switchlora": ["--method.name", "switchlora", "--train.precision", "bf16"],
    "tp": ["--method.name", "lora", "--parallel.tp", "2"],
    "heads": ["--method.name", "lte", "--parallel.lte_heads", "2", "--method.lte.merge_interval", "3"],
    "local": ["--method.name", "lte", "--method.lte.local_heads", "2", "--method.lte.merge_interval", "3"],
}
DENSE = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.full] * (c in ("tp", "local"))) for c in CASES])
def test_a_frozen_run(place: Place, case: str) -> None:
    """Stopped after seven steps and resumed it is the run left alone; its dense tensors are the initial ones."""
    options, stopped = (place.options(run, *CASES[case], *FROZEN) for run in (case, f"{case}-stopped"))
    status, output = place.run("2 ranks", options)
    assert status == 0, output
    status, output = place.run("2 ranks", [*stopped, "--train.stop_after_steps", "7"])
    assert status == 75, output
    status, output = place.run("2 ranks", stopped)
    assert status == 0 and "resumes after step 7 " in output, output
    assert comparable(place.records(case)) == comparable(place.records(f"{case}-stopped"))
    ours, theirs = (load_file(place.folder / run / "final" / "model.safetensors") for run in (case, f"{case}-stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    early = Weights(open_checkpoint(place.folder / case / "checkpoints" / "step-00000005"))
    model = build_model(replace(early.model, pad_multiple=1), early.vocab_size)
    initialize_weights(model, 0)
    initial = {name: value.to(early.precision).float() for name, value in model.state_dict().items()}
    for name in DENSE:
        assert torch.equal(ours[name].float(), initial[name]) and torch.equal(early.read(name), initial[name]), name
        assert f"{name}:exp_avg" not in early.archive and f"head_00/{name}" not in early.archive
    assert not torch.equal(ours[MATRIX].float(), early.read(MATRIX))

    formula = re.search(r"step-00000012: [\d.]+ MB \(by formula ([\d.]+)\)", output)
    files = (place.folder / case / "checkpoints" / "step-00000012").glob("*.safetensors")
    stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert formula and stored / 1e6 == pytest.approx(float(formula[1]), rel=0.03)
    meta = json.loads((place.folder / case / "meta.json").read_text())
    planned = place.run("alone", [*options, "--dry_run", "--dry_run_world", "2", "--model.vocab_size", "300"])[1]
    total = re.search(r"total +[\d.]+ M +([\d,]+)", planned)
    assert total and int(total[1].replace(",", "")) == meta["parameters"]["trainable"], planned
    records = [record for record in place.records(case) if "loss" in record]
    size = 2 if case == "switchlora" else 4
    data_ranks = {"switchlora": 2, "tp": 1, "heads": 1, "local": 2}[case]
    heads = 2 if case == "local" else 1
    given = size * heads * meta["parameters"]["trainable"] if data_ranks > 1 else 0
    assert {record["dp_bytes"] for record in records} == {given}
