"""LTE and a full-rank warm start by the command line: stopped, killed, resumed, evaluated, exported."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.dist.launch import end
from tests.system.commands import Place
from tests.system.soak import comparable
from tests.system.test_signals import wait_for_steps, worker_pids

HEADS = [
    "--method.name", "lte", "--parallel.lte_heads", "2", "--method.lte.merge_interval", "3", "--optim.lr", "0.001",
    "--method.full_rank_steps", "4", "--checkpoint.interval", "5", "--checkpoint.keep_last", "9",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a run left alone, `whole`: four full-rank steps, then two heads."""
    place = Place(tmp_path_factory.mktemp("heads"))
    status, output = place.run("2 ranks", place.options("whole", *HEADS))
    assert status == 0, output
    assert "after 4 steps of full-rank training lte begins" in output
    given = "method.switch.interval0, method.switch.freeze_steps"
    unused = f"warning: {given}: without effect in method.name lte with method.lte.inner lora."
    assert output.count("warning: ") == 1 and unused in output, output
    merges = [record["merge_bytes"] for record in place.records("whole") if "merge_bytes" in record]
    assert len(merges) == 8 and sum(merges) > 8_000  # two merges in the eight steps of heads
    assert f"Between heads: no gradients; merges, {sum(merges) / 8e6:.3f} MB per step" in output
    return place


def of_heads(place: Place, run: str) -> list[list[dict]]:
    files = sorted((place.folder / run).glob("metrics.head_*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_every_head_writes_its_records(place: Place) -> None:
    whole = [record for record in place.records("whole") if "loss" in record]
    first, second = of_heads(place, "whole")
    assert [record["step"] for record in first] == [record["step"] for record in second] == list(range(5, 13))
    for a, b, mean in zip(first, second, whole[4:], strict=True):
        assert a["loss"] != b["loss"]
        assert mean["loss"] == pytest.approx((a["loss"] + b["loss"]) / 2, rel=1e-12)
    merged = [record["step"] for record in whole[4:] if record["merge_bytes"]]
    assert merged == [7, 10]
    assert max(record["control_bytes"] for record in whole[4:]) <= 64
    evaluations = [record for record in place.records("whole") if "val_loss" in record]
    sent = [(record["step"], record.get("eval_merge_bytes")) for record in evaluations]
    assert sent == [(0, None), (6, whole[6]["merge_bytes"]), (12, whole[6]["merge_bytes"])]
    assert [record["dp_bytes"] > 0 for record in whole] == [True] * 4 + [False] * 8  # a head has one data rank


@pytest.mark.full
def test_stopped_before_the_method_begins_it_goes_on_to_the_bit(place: Place) -> None:
    options = place.options("stopped", *HEADS)
    for steps, ends in (("3", 75), (None, 0)):
        status, output = place.run("2 ranks", [*options, *(["--train.stop_after_steps", steps] if steps else [])])
        assert status == ends, output
    assert comparable(place.records("stopped")) == comparable(place.records("whole"))
    assert of_heads(place, "stopped") == of_heads(place, "whole")


@pytest.mark.full
def test_killed_between_merges_it_goes_on_to_the_bit(place: Place) -> None:
    process = place.start("deepspeed", place.options("killed", *HEADS))
    try:
        wait_for_steps(process, 9)
        for pid in worker_pids(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        end([process])
    status, output = place.run("2 ranks", place.options("killed", *HEADS))
    assert status == 0 and "resumes after step" in output, output
    assert comparable(place.records("killed")) == comparable(place.records("whole"))
    assert of_heads(place, "killed") == of_heads(place, "whole")


def test_the_mean_model_is_evaluated_and_exported(place: Place, tmp_path: Path) -> None:
    """final/ is what the last evaluation saw, and the checkpoint's export is final/."""
    run = place.folder / "whole"
    status, output = place.run("alone", ["--evaluate_only", "--output_dir", str(run)])
    assert status == 0
    assert float(output.split("validation loss ")[1].split(",")[0]) == pytest.approx(
        place.records("whole")[-1]["val_loss"], abs=2e-6
    )
    words = ["export", str(run), str(tmp_path / "hf"), "--dtype", "fp32"]
    status, output = place.script("tools/convert_hf.py", *words)
    assert status == 0, output
    exported, final = load_file(tmp_path / "hf" / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    assert set(exported) == set(final)
    assert max(float((exported[name] - tensor).abs().max()) for name, tensor in final.items()) < 1e-6


def test_other_heads_only_after_a_merge(place: Place) -> None:
    """Step 10, six steps after the method's own start, follows a merge; step 5 does not."""
    more = ["--parallel.lte_heads", "1", "--method.lte.local_heads", "2", "--train.micro_batch_size", "4", "--resume"]
    found = {}
    for steps in (5, 10):
        checkpoint = place.folder / "whole" / "checkpoints" / f"step-{steps:08d}"
        found[steps] = place.run("alone", [*place.options(f"local_{steps}", *HEADS), *more, str(checkpoint)])
    assert found[5][0] == 2 and "heads can change only right after a merge" in found[5][1], found[5]
    assert found[10][0] == 0, found[10][1]
    assert len(of_heads(place, "local_10")) == 2


@pytest.mark.full
def test_tied_embeddings_in_bf16_with_local_heads(place: Place, tmp_path: Path) -> None:
    """The head is the embedding in the full-rank phase, in every LTE head, in the mean model and in its export."""
    more = ["--parallel.lte_heads", "1", "--method.lte.local_heads", "2", "--model.tie_embeddings", "true"]
    status, output = place.run("alone", place.options("tied", *HEADS, *more, "--train.precision", "bf16"))
    assert status == 0, output
    run = place.folder / "tied"
    words = ["export", str(run), str(tmp_path / "hf"), "--dtype", "fp32"]
    status, output = place.script("tools/convert_hf.py", *words)
    assert status == 0, output
    exported, final = load_file(tmp_path / "hf" / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    assert set(exported) == set(final) and "lm_head.weight" not in final
    for name, tensor in final.items():  # the running mean is rounded to the precision of compute
        assert float((exported[name].bfloat16().float() - tensor).abs().max()) <= float(tensor.abs().max()) * 2**-8
