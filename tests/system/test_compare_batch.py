"""tools/compare.py --batch with the real trainer: bits of the runs, a kill, the limit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_switchlora.study.comparison.runner import read_run
from tests.dist.launch import REPOSITORY, descendants, end, run_ranks
from tests.system.commands import SMALL, Place

OF_THE_CLOCK = ("seconds", "step_seconds", "peak_memory_bytes", "wall", "versions")
RUNS = {
    "wild": ["--method.name=full", "--optim.lr=1e20", "--optim.clip=0", "--train.warmup_steps=0"],
    "switchlora": ["--method.name=switchlora", "--train.seed=3"],
    "again": ["--method.name=switchlora", "--train.seed=3"],
}


def outcome(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in OF_THE_CLOCK}


def trace(folder: Path) -> tuple[list[Any], str]:
    """Return what each step and evaluation gave, and the digest of the final weights."""
    keys = ("step", "loss", "grad_norm", "lr", "switched", "val_loss", "tokens", "dp_bytes")
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    weights = (folder / "final" / "model.safetensors").read_bytes()
    return [[line.get(key) for key in keys] for line in lines], hashlib.sha256(weights).hexdigest()


def test_runs_of_a_batch_are_those_of_the_launched_command(tmp_path: Path) -> None:
    """Bit for bit, after another run in the same process too; what a run gives does not depend on those before it."""
    place = Place(tmp_path)
    options = [*SMALL, "--data.files", f"{place.corpus}/*.txt"]
    status, output = place.run("alone", place.options("launched", *RUNS["switchlora"]))
    assert status == 0, output
    (cache,) = (tmp_path / "cache" / "megatron_switchlora").iterdir()
    for path in place.corpus.iterdir():
        path.unlink()
    runs = {name: [*options, *own] for name, own in RUNS.items()}
    payload = {"cache": str(cache), "folder": str(tmp_path / "batch"), "runs": runs}
    (answers,) = run_ranks(1, "tests.system.batch_worker", payload)
    found = dict(zip(RUNS, answers, strict=True))
    assert found["wild"]["diverged"] and found["switchlora"]["steps"] == 12
    for name in ("switchlora", "again"):
        assert outcome(found[name]) == outcome(read_run(tmp_path / "launched", False)), name
        assert trace(tmp_path / "batch" / name) == trace(tmp_path / "launched"), name
    assert sum(line[4] or 0 for line in trace(tmp_path / "launched")[0]) > 10, "vectors were switched"


@pytest.mark.full
def test_a_killed_batch_keeps_its_runs_and_a_late_run_is_ended(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = dict(zip((word.removeprefix("--") for word in SMALL[::2]), SMALL[1::2], strict=True))
    shared = {name: yaml.safe_load(value) for name, value in words.items() if not name.startswith("optim.")}
    shared["data.files"] = "{data}/*.txt"
    methods = {
        name: {"options": {"method.name": "switchlora", "train.steps": steps}, "lr": 0.01}
        for name, steps in (("short", 12), ("endless", 10**6))
    }
    setting = {"options": shared, "sweep": "none", "seeds": 1, "best": {"methods": 0}, "methods": methods}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(setting))
    command = [sys.executable, str(REPOSITORY / "tools" / "compare.py"), "short.yaml", "--data", str(place.corpus)]
    command += ["--batch", "found.json", "--out", "known.json", "--processes", "2"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=place.env, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)

    def kept() -> list[str]:
        path = tmp_path / "found.json"
        return [run["method"] for run in json.loads(path.read_text())["runs"].values()] if path.exists() else []

    try:
        deadline = time.monotonic() + 150
        while not (kept() and list(tmp_path.glob("runs/compare/short/batch/endless*/metrics.jsonl"))):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.1)
        started = descendants(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(started) >= 2 and not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    finally:
        end([process])
    assert kept() == ["short"]
    command += ["--processes", "1", "--minutes", "0.2"]
    done = subprocess.run(  # without a limit it would take hours; the imports of a busy machine are not limited
        command, env=place.env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "0 new runs on" in done.stdout or "when the time was over" in done.stdout, done.stdout
    assert kept() == ["short"] and not (tmp_path / "known.json").exists()
