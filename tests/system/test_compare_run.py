"""tools/compare.py with the real trainer: stopped amid a run by a signal, gone on by the same command, to the table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.dist.launch import REPOSITORY, end
from tests.system.commands import SMALL, Place

WORDS = dict(zip((word.removeprefix("--") for word in SMALL[::2]), SMALL[1::2], strict=True))


@pytest.mark.full
def test_a_comparison_is_stopped_and_goes_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    shared = {name: yaml.safe_load(value) for name, value in WORDS.items() if not name.startswith("optim.")}
    shared |= {"train.steps": 120, "train.eval_interval": 40, "checkpoint.interval": 5, "data.files": "{data}/*.txt"}
    methods = {
        "switchlora": {"options": {"method.name": "switchlora"}, "lr": 0.01},
        "wild": {"options": {"method.name": "full", "optim.clip": 0, "train.warmup_steps": 0}, "lr": 1e20},
    }
    setting = {"options": shared, "sweep": "none", "seeds": 1, "best": {"methods": 0}, "methods": methods}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(setting))
    command = [sys.executable, str(REPOSITORY / "tools" / "compare.py"), "short.yaml", "--data", str(place.corpus)]
    command += ["--out", "out.json"]
    process = subprocess.Popen(command, env=place.env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("runs/compare/short/switchlora*/checkpoints/step-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # as `timeout` and terminals do: to the process, and to its group
        output = process.communicate(timeout=60)[0].decode()
    finally:
        end([process])
    assert process.returncode == 75 and "the same command continues" in output, output
    done = subprocess.run(
        command, env=place.env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    runs = {run["method"]: run for run in json.loads((tmp_path / "out.json").read_text())["runs"].values()}
    assert runs["wild"]["diverged"] and runs["switchlora"]["steps"] == 120
    assert [entry[0] for entry in runs["switchlora"]["curve"]] == list(range(0, 121, 40))
    (log,) = tmp_path.glob("runs/compare/short/switchlora*.log")
    assert "resumes after step" in log.read_text()
