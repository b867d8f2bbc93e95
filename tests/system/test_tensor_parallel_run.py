"""A tensor-parallel run as users start it: it equals the run of one process, exports, evaluates, and is watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.dist.launch import run_ranks
from tests.system.commands import Place
from tests.system.soak import comparable

SPLIT = ["--parallel.tp", "2"]
ODD = ["--model.intermediate_size", "49", "--optim.lr", "0.002", "--train.check_interval", "5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("tensor_parallel"))
    for run, launcher, more in (("split", "torchrun", SPLIT), ("whole", "alone", [])):
        status, output = place.run(launcher, place.options(run, *ODD, *more))
        assert status == 0, output
        assert f"x tp {2 if more else 1} on cpu" in output
    return place


def test_it_is_the_run_of_one_process(place: Place) -> None:
    largest = 0.0
    for mine, theirs in zip(place.records("split"), place.records("whole"), strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & set(theirs):
            largest = max(largest, abs(mine[key] / theirs[key] - 1))
        assert mine.get("switched") == theirs.get("switched")
    print(f"\nlosses and norms within {largest:.1e}")
    assert largest < 1e-5
    assert all(record["dp_bytes"] == 0 for record in place.records("split") if "loss" in record)  # one data rank


@pytest.mark.full
def test_its_export_has_no_padding_and_evaluates_anywhere(place: Place) -> None:
    split, whole = (load_file(place.folder / run / "final" / "model.safetensors") for run in ("split", "whole"))
    assert split["model.layers.0.mlp.down_proj.weight"].shape == (32, 49)
    for name, tensor in whole.items():
        assert float((split[name] - tensor).norm() / tensor.norm()) < 1e-5, name
    recorded = place.records("split")[-1]["val_loss"]
    for launcher in ("alone", "2 ranks", "3 ranks"):
        status, output = place.run(launcher, ["--evaluate_only", "--output_dir", str(place.folder / "split")])
        assert status == 0, output
        (said,) = [line for line in output.splitlines() if "validation loss" in line]
        assert float(said.split("validation loss ")[1].split(",")[0]) == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parallel.tp", "3"], "model.num_heads 2 must be a multiple of parallel.tp 3"),
        pytest.param(
            ["--parallel.tp", "4", "--model.num_heads", "4"],
            "world of 2 ranks must be a multiple of",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["--parallel.tp", "2", "--model.num_kv_heads", "1"],
            "model.num_kv_heads 1 must be a multiple of parallel.tp 2",
            marks=pytest.mark.full,
        ),
    ],
)
def test_meshes_that_do_not_divide_are_refused(place: Place, more: list[str], message: str) -> None:
    statuses, output = place.run_pair(place.options("refused", *more))
    assert statuses == [2, 2]
    assert output.count("error: ") == 1 and message in output and "Traceback" not in output, output
    assert not (place.folder / "refused").exists()


@pytest.mark.full
def test_a_warm_start_at_tp_2_is_that_of_one_process_and_resumes_at_its_border(place: Place) -> None:
    warm = [*ODD, "--method.full_rank_steps", "5"]
    for run, launcher, more in (("warm 1", "alone", []), ("warm 2", "2 ranks", SPLIT)):
        status, output = place.run(launcher, place.options(run, *warm, *more))
        assert status == 0, output
    halves = [*warm, *SPLIT]
    status, output = place.run("2 ranks", place.options("halves", *halves, "--train.stop_after_steps", "5"))
    assert status != 0 and "stopped after step 5" in output, output
    status, output = place.run("2 ranks", place.options("halves", *halves))
    assert status == 0 and "resumes after step 5 " in output, output
    assert comparable(place.records("halves")) == comparable(place.records("warm 2"))
    for mine, theirs in zip(place.records("warm 2"), place.records("warm 1"), strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & set(theirs):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (key, theirs)
        assert mine.get("switched") == theirs.get("switched")


@pytest.mark.full
def test_the_periodic_check_names_what_came_apart(place: Place, tmp_path: Path) -> None:
    """One element of a replicated parameter, of a factor and of the bank changes on one of four ranks."""
    options = place.options(str(tmp_path), *ODD, *SPLIT, "--data.cache_dir", str(tmp_path / "cache"))
    cases = {
        "model.layers.1.post_attention_layernorm.weight": "rank 0 and 1",  # over tp
        "model.layers.0.mlp.up_proj.lora_A": "rank 0 and 1",
        "model.layers.0.mlp.up_proj.weight": "rank 1 and 3",  # over dp
        "bank_A.4": "rank 1 and 3",
    }
    payload = {"options": options, "targets": list(cases)}
    ranks = run_ranks(4, "tests.system.corrupt_worker", payload, timeout=200)
    for found in ranks:
        for target, where in cases.items():
            message = found[target]
            assert f"{target} differs between {where}" in message, message
            assert "After step 5" in message
    assert json.dumps(ranks[0]) == json.dumps(ranks[3])
