"""A dead rank ends the others; Ctrl-C ends all of them cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.dist.launch import descendants, end
from tests.system.commands import Place

LONG = ["--train.steps", "100000"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def wait_for_steps(process: subprocess.Popen[str], steps: int = 3) -> str:
    """Read the output until the run is under way, or so many steps have passed."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(f"step {steps:>6}/"):
            return seen
    raise AssertionError(f"ended early:\n{seen}")


def worker_pids(leader: int) -> list[int]:
    """The ranks: processes below `leader` that run pretrain.py itself."""
    found = []
    for pid in descendants(leader):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        script = next((word for word in words[1:] if not word.startswith("-")), "")
        if script.endswith("pretrain.py"):
            found.append(pid)
    return found


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of the processes that are still there after at most `seconds`."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=pytest.mark.full) for name in ("deepspeed", "torchrun", "mpirun")]
)
def test_a_dead_rank_ends_the_others(place: Place, launcher: str) -> None:
    process = place.start(launcher, place.options("run", *LONG))
    try:
        wait_for_steps(process)
        workers = worker_pids(process.pid)
        assert len(workers) == 2
        everyone = descendants(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        assert wait_until_gone(everyone, 30) == []
        assert process.wait(10) != 0
    finally:
        end([process])


@pytest.mark.parametrize("launcher", [pytest.param("deepspeed", marks=pytest.mark.full), "alone"])
def test_ctrl_c_ends_all_ranks_cleanly(place: Place, launcher: str) -> None:
    process = place.start(launcher, place.options("run", *LONG))
    try:
        wait_for_steps(process)
        everyone = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process of the group gets it
        output, _ = process.communicate(timeout=30)
        assert wait_until_gone(everyone, 10) == []
        assert process.returncode != 0
        assert output.count("stopped by SIG") == 1, output
        assert 'pretrain.py", line' not in output, output
    finally:
        end([process])
    assert place.records("run")[-1]["step"] >= 3  # no torn line
