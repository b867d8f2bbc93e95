"""tools/check_gpu.py tries itself on the CPU; its stages are limited and its verdict can be bad."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megatron_switchlora.study import gpu_check
from megatron_switchlora.study.gpu_check import LIMITS, TOTAL, compare_engines, limited, verdict
from tests.system.commands import Place


def test_tiny_on_the_cpu(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "found.json")]
    status, output = place.script("tools/check_gpu.py", *words, timeout=300)
    assert status == 0 and "all stages are right" in output, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "cpu" and len(found["commit"]) >= 7 and found["machine"]["torch"]
    assert set(found["reference"]["methods"]) >= {"full", "switchlora", "lte"}
    assert len(found["engines"]["cases"]) == 3
    assert {"full", "switchlora", "switchlora accumulation"} == found["speed"].keys()
    for entry in found["speed"].values():
        assert entry["tokens per second"] > 0 and entry["planned bytes"] > 0
        assert entry["seconds by kind"]["products with W"] > 0
    assert found["speed"]["switchlora"]["seconds by kind"]["forming W + sBA"] > 0
    assert {"y = x W^T, F 170", "dA of q, k, v, r 16"} < found["products"].keys() and found["parts"]["swiglu"]["ours"]
    assert "transformers compiled" in found["peers compiled"]["entries"] and not found["peers"]["left_out"]
    wrong = copy.deepcopy(found)
    wrong["reference"]["right"], wrong["speed"] = False, {"failed": "Traceback\nOutOfMemoryError: 1 GB"}
    assert [line.split(":")[0] for line in verdict(wrong)] == ["reference", "speed"]


def test_a_stage_cannot_hold_the_others(tmp_path: Path) -> None:
    started, began = tmp_path / "started", time.perf_counter()

    def hang() -> dict:
        child = subprocess.Popen(["sleep", "600"])
        started.write_text(str(child.pid))
        return {"status": child.wait()}

    assert "had not ended" in limited(hang, 3)["failed"]
    assert time.perf_counter() - began < 60
    stat = Path(f"/proc/{started.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "what a stage started ends with it"
    assert "ZeroDivisionError" in limited(lambda: {"a": 1 / 0}, 20)["failed"]
    assert "ended with status 3" in limited(lambda: os._exit(3), 20)["failed"]
    assert limited(lambda: {"a": 1}, 20) == {"a": 1}


def test_it_keeps_within_eight_minutes() -> None:
    assert sum(LIMITS.values()) <= TOTAL <= 480


@pytest.mark.parametrize("wrong", [None, "losses", "switched", "healthy", "missing"])
def test_engines_are_compared(wrong: str | None) -> None:
    case = {"losses": [4.0, 3.0], "norms": [1.0, 1.0], "switched": [2, 0], "healthy": True}
    cpu = {"full zero0 fp32": case}
    here = copy.deepcopy(cpu)
    changed = {"losses": [4.0, 3.001], "switched": [2, 1], "healthy": False}
    if wrong == "missing":
        here["full zero1 fp32"] = case
    elif wrong:
        here["full zero0 fp32"][wrong] = changed[wrong]
    assert compare_engines(here, cpu)["right"] == (wrong is None)


def test_what_is_no_number_is_a_difference() -> None:
    assert gpu_check.largest_difference([float("nan"), 1.0], [1.0, 1.0]) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--out", str(tmp_path / "check.json")])
    assert "torch sees no GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
