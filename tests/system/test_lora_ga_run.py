"""A run that begins with LoRA-GA, stopped and gone on with: the gradient is taken once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_switchlora.checkpoint.files import open_checkpoint
from tests.system.commands import Place
from tests.system.soak import comparable

LORA_GA = [
    "--method.name", "lora", "--method.init", "lora_ga", "--method.rslora", "true", "--method.alpha", "4",
    "--method.ga.samples", "16",
]  # fmt: skip
NO_GRADIENT = """
import sys
from megatron_switchlora.methods import ga_gradients

def refuse(*_):
    raise SystemExit("the gradient was taken again")

ga_gradients.mean_gradients = refuse
from megatron_switchlora.train.pretrain import main
main(sys.argv[1:])
"""


class Watched(Place):
    """A place whose lone runs take no gradient at their start."""

    def command(self, launcher: str, arguments: list[str]) -> list[str]:
        if launcher != "watched":
            return super().command(launcher, arguments)
        return [sys.executable, "-c", NO_GRADIENT, *arguments]


@pytest.mark.full
def test_a_resumed_run_is_the_same_to_the_bit_and_takes_no_gradient(tmp_path: Path) -> None:
    place = Watched(tmp_path)
    status, output = place.run("watched", place.options("refused", *LORA_GA))
    assert status != 0 and "the gradient was taken again" in output
    for run, last in (("whole", []), ("stopped", ["--train.stop_after_steps", "5"])):
        status, output = place.run("alone", place.options(run, *LORA_GA, *last))
        assert status == (75 if last else 0), output
    status, output = place.run("watched", place.options("stopped", *LORA_GA))
    assert status == 0 and "resumes after step 5 " in output, output
    assert comparable(place.records("stopped")) == comparable(place.records("whole"))
    files = [
        place.folder / run / "checkpoints" / "step-00000012" / "tensors-00000.safetensors"
        for run in ("stopped", "whole")
    ]
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys() and sum("lora_A_0" in name for name in ours) == 14
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    status, output = place.run(
        "alone",
        place.options("stopped2", *LORA_GA, "--method.ga.gamma", "4", "--resume", str(place.folder / "stopped")),
    )
    assert status == 2 and "method.ga.gamma is 16.0 there and 4.0 here" in output


@pytest.mark.full
def test_it_begins_from_an_imported_model_and_keeps_its_function(tmp_path: Path) -> None:
    place = Place(tmp_path)
    status, output = place.run("alone", place.options("first", "--method.name", "full", "--optim.lr", "0.002"))
    assert status == 0, output
    status, output = place.script("tools/convert_hf.py", "import", "first/final", "start")
    assert status == 0, output
    start = ["--config", str(place.folder / "start" / "model.yaml"), "--train.init_from", str(place.folder / "start")]
    start += ["--data.tokenizer", str(place.folder / "start" / "tokenizer")]
    status, output = place.run("alone", place.options("second", *LORA_GA, *start))
    assert status == 0, output
    first, second = place.records("first"), place.records("second")
    assert second[0]["step"] == 0 and second[0]["val_loss"] == pytest.approx(first[-1]["val_loss"], rel=1e-5)
    assert second[-1]["val_loss"] < first[-1]["val_loss"] < first[0]["val_loss"] - 0.1


@pytest.mark.full
def test_new_lte_heads_begin_from_gradients_too(tmp_path: Path) -> None:
    """With A = B = 0 they would never train."""
    place = Place(tmp_path)
    heads = [*LORA_GA, "--method.name", "lte", "--method.lte.merge_interval", "3", "--checkpoint.interval", "3"]
    status, output = place.run("alone", place.options("two", *heads, "--method.lte.local_heads", "2"))
    assert status == 0, output
    more = ["--method.lte.local_heads", "4", "--train.micro_batch_size", "4", "--resume"]
    checkpoint = place.folder / "two" / "checkpoints" / "step-00000009"
    status, output = place.run("alone", place.options("four", *heads, *more, str(checkpoint)))
    assert status == 0, output
    archive = open_checkpoint(place.folder / "four" / "checkpoints" / "step-00000012").archive()
    for head in range(4):
        for side in "AB":
            factor = archive.read(f"head_{head:02d}/model.layers.1.mlp.up_proj.lora_{side}")
            assert float(factor.norm(dim=1).min()) > 0.1
