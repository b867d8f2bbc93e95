"""The trace of train.profile: the steps that were asked for and no others, as JSON that Perfetto reads."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.run.folder import RunFolder
from megatron_switchlora.run.profile import StepTrace


def trace_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def spans(trace: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Begin and end of the traced steps, by name."""
    named = [each for each in trace if re.fullmatch(r"step \d+", each["name"]) and each.get("cat") == "user_annotation"]
    return {each["name"]: (each["ts"], each["ts"] + each["dur"]) for each in named}


def operators(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in trace if each.get("cat") == "cpu_op"]


def train(trace: StepTrace, first: int, last: int) -> None:
    """Each step is a product of a size of its own."""
    for number in range(first, last + 1):
        with trace.step(number):
            torch.ones(number, number) @ torch.ones(number, number)
        trace.recorded(number)
    trace.close()


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    printed: list[str] = []
    train(StepTrace(tmp_path, TrainConfig(profile="3-5").profiled, printed.append), 1, 9)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank0.steps_3-5.json.gz" and printed == [f"steps 3 to 5 are traced in {path}"]
    trace = trace_of(path)
    steps = spans(trace)
    assert list(steps) == ["step 3", "step 4", "step 5"]
    products = [each for each in operators(trace) if each["name"] == "aten::mm"]
    assert len(products) == 3
    for product, (begin, end) in zip(products, steps.values(), strict=True):
        assert begin <= product["ts"] <= end
    begin, end = steps["step 3"][0], steps["step 5"][1]
    assert all(begin <= each["ts"] and each["ts"] + each["dur"] <= end for each in operators(trace))


def test_a_trace_is_written_after_the_record(tmp_path: Path) -> None:
    """Not within the step, whose time the record holds."""
    run = RunFolder(tmp_path, writes=True)
    run.open_loggers(replace(RunConfig(), train=TrainConfig(profile="1-2")), print)
    for number in (1, 2):
        with run.trace.step(number):
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert not (tmp_path / "profile").exists()
        run.log({"step": number, "loss": 1.0})
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0.steps_1-2.json.gz"]
    run.close()


@pytest.mark.parametrize(("first", "last", "names"), [(1, 4, ["3-4"]), (5, 9, ["5-5"]), (6, 9, []), (1, 2, [])])
def test_a_start_traces_its_own_steps(tmp_path: Path, first: int, last: int, names: list[str]) -> None:
    train(StepTrace(tmp_path, (3, 5), print), first, last)
    assert [path.name for path in tmp_path.glob("profile/*")] == [f"rank0.steps_{name}.json.gz" for name in names]


def test_an_error_within_a_step_ends_the_trace(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, (1, 2), print)
    with pytest.raises(ValueError, match="bad"), trace.step(1):
        raise ValueError("bad")
    trace.close()
    assert not (tmp_path / "profile").exists()
    train(StepTrace(tmp_path, (1, 1), print), 1, 1)  # the profiler can start again
    assert list((tmp_path / "profile").iterdir())


def test_a_trace_that_cannot_be_written_warns(tmp_path: Path) -> None:
    printed: list[str] = []
    (tmp_path / "theirs").mkdir()
    (tmp_path / "profile").symlink_to(tmp_path / "theirs")
    train(StepTrace(tmp_path, (1, 1), printed.append), 1, 3)
    assert len(printed) == 1 and printed[0].startswith("warning: the trace of train.profile failed (OSError:")
    assert not list((tmp_path / "theirs").iterdir())
