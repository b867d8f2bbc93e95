"""What a run writes beside metrics.jsonl: TensorBoard's events, W&B's run, a trace of a few steps. None changes it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.run.folder import read_meta
from tests.equality.observe import tensor_digests
from tests.system.commands import Place
from tests.unit.test_loggers import curves, events, single
from tests.wandb_files import read_run

TRACED = ["--train.profile", "5-7"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("logging"))


def trace_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def spans(trace: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Begin and end of the traced steps, by name."""
    named = [each for each in trace if re.fullmatch(r"step \d+", each["name"]) and each.get("cat") == "user_annotation"]
    return {each["name"]: (each["ts"], each["ts"] + each["dur"]) for each in named}


def test_a_trace_has_the_steps_that_were_asked_for(place: Place) -> None:
    """And no others: what it holds lies between the first one's begin and the last one's end."""
    status, output = place.run("alone", place.options("run", *TRACED, "--log.tensorboard", "true"))
    assert status == 0, output
    run = place.folder / "run"
    (path,) = (run / "profile").iterdir()
    assert path.name == "rank0.steps_5-7.json.gz" and f"steps 5 to 7 are traced in {path}" in output
    trace = trace_of(path)
    steps = spans(trace)
    assert list(steps) == ["step 5", "step 6", "step 7"]
    operators = [each for each in trace if each.get("cat") == "cpu_op"]
    assert len(operators) > 300 and any("mm" in each["name"] for each in operators)
    begin, end = steps["step 5"][0], steps["step 7"][1]
    assert all(begin <= each["ts"] and each["ts"] + each["dur"] <= end for each in operators)
    assert events(run) == single(curves(run)) and {"loss", "val_loss", "lr"} <= events(run).keys()


@pytest.mark.full
def test_logging_and_tracing_change_no_result(place: Place) -> None:
    """Two ranks, stopped within the traced steps and resumed: the same bits as the plain run's."""
    for name, more in (("plain", []), ("logged", [*TRACED, "--log.tensorboard", "true", "--log.wandb", "offline"])):
        status, output = place.run("2 ranks", place.options(name, *more, "--train.stop_after_steps", "6"))
        assert status == 75, output
        status, output = place.run("2 ranks", place.options(name, *more))
        assert status == 0 and "warning" not in output, output
    plain, logged = place.folder / "plain", place.folder / "logged"
    assert tensor_digests(plain / "final", "") == tensor_digests(logged / "final", "")
    assert [r["loss"] for r in place.records("plain") if "loss" in r] == [
        r["loss"] for r in place.records("logged") if "loss" in r
    ]
    assert events(logged) == single(curves(logged))
    traces = {path.name: list(spans(trace_of(path))) for path in (logged / "profile").iterdir()}
    assert traces == {"rank0.steps_5-6.json.gz": ["step 5", "step 6"], "rank0.steps_7-7.json.gz": ["step 7"]}
    assert not (plain / "profile").exists() and not (plain / "tensorboard").exists() and not (plain / "wandb").exists()
    starts = [read_run(path) for path in sorted(logged.glob("wandb/offline-run-*/*.wandb"))]
    assert [start["id"] for start in starts] == [read_meta(logged)["wandb"]["id"]] * 2
    rows = [(row["_step"], row["loss"]) for start in starts for row in start["rows"] if "loss" in row]
    assert rows == curves(logged)["loss"]
