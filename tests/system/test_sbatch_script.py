"""launch/slurm/pretrain.sbatch with stand-ins for Slurm's commands: what it does at the ends of a start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY, clean_environment, end

STAND_INS = {
    "srun": 'echo "$@" >> "$CALLS/srun"; trap "exit 75" USR1; echo ready > "$CALLS/ready"; '
    'for i in $(seq 100); do [ "$SRUN_ENDS" ] && exit "$SRUN_ENDS"; sleep 0.1; done',
    "squeue": 'case "$*" in *%e*) echo "$JOB_ENDS" ;; *) echo RUNNING ;; esac',
    "scontrol": 'echo "$@" >> "$CALLS/scontrol"; kill -KILL $PPID',  # Slurm ends the shell that is requeued
    "nvidia-smi": 'for i in $(seq "${CARDS:-0}"); do echo "GPU $i: H100"; done',
}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def start(stand_ins: Path, notice: bool = False, **variables: str) -> tuple[int, str, Path]:
    """Status and output of a start of the script, and where the stand-ins have noted their calls."""
    calls = stand_ins.parent
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4",
           "SLURM_JOB_NODELIST": "n[1-2]", "PYTHON": sys.executable, "CALLS": str(calls), "SRUN_ENDS": ""}  # fmt: skip
    env = clean_environment(calls)
    process = subprocess.Popen(
        ["bash", "launch/slurm/pretrain.sbatch", "--train.steps", "9"], cwd=REPOSITORY, text=True,
        env={**env, "PATH": f"{stand_ins}:{env['PATH']}", **job, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        if notice:
            deadline = time.monotonic() + 20
            while not (calls / "ready").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=30)
    finally:
        end([process])
    return process.returncode, output, calls


def test_a_start_that_is_asked_to_stop_goes_back_into_the_queue(stand_ins: Path) -> None:
    status, output, calls = start(stand_ins, notice=True)
    assert "job 7 goes back into the queue" in output and (calls / "scontrol").read_text() == "requeue 7\n", output
    assert status == -signal.SIGKILL
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=4" in (calls / "srun").read_text()
    assert "launch/pretrain.py --output_dir runs/pretrain-7 --train.steps 9" in (calls / "srun").read_text()


def test_it_trains_in_a_container(stand_ins: Path) -> None:
    """Under pyxis, with the container's Python, which the submitting host need not have."""
    image = {"CONTAINER_IMAGE": "docker://registry#switchlora:1", "CONTAINER_MOUNTS": "/data:/data", "PYTHON": ""}
    status, output, calls = start(stand_ins, SRUN_ENDS="0", **image)
    assert status == 0, output
    words = (calls / "srun").read_text()
    assert f"--container-image=docker://registry#switchlora:1 --container-workdir={REPOSITORY} " in words
    assert f"--container-mounts={REPOSITORY}:{REPOSITORY},/data:/data python3 -u launch/pretrain.py" in words


@pytest.mark.parametrize(("left", "goes_on"), [("+300 seconds", False), ("+9 hours", True), ("N/A", True)])
def test_only_a_limit_that_is_all_notice_ends_a_job_that_is_stopped_at_once(
    stand_ins: Path, left: str, goes_on: bool
) -> None:
    """One that is preempted soon after its fourth start has time left, or no limit at all."""
    ends = subprocess.run(["date", "-d", left, "+%FT%T"], capture_output=True, text=True).stdout.strip() or left
    status, output, calls = start(stand_ins, notice=True, SLURM_RESTART_COUNT="3", JOB_ENDS=ends)
    assert (calls / "scontrol").exists() == goes_on, output
    assert ("raise --time" in output) == (not goes_on) and (status == 2) == (not goes_on)


@pytest.mark.parametrize(("left", "saved"), [("+200 seconds", False), ("+200 seconds", True), ("+9 hours", False)])
def test_a_limit_that_ends_before_the_first_checkpoint_ends_the_job(stand_ins: Path, left: str, saved: bool) -> None:
    """In the fourth start; as data does that takes longer to prepare than the limit allows."""
    folder = stand_ins.parent / "run"
    (folder / "checkpoints" / ("step-00000003" if saved else "other")).mkdir(parents=True)
    ends = subprocess.run(["date", "-d", left, "+%FT%T"], capture_output=True, text=True).stdout.strip()
    more = {"SLURM_RESTART_COUNT": "3", "JOB_ENDS": ends, "OUTPUT_DIR": str(folder), "SECONDS": "3000"}
    status, output, calls = start(stand_ins, notice=True, **more)
    goes_on = saved or left == "+9 hours"
    assert (calls / "scontrol").exists() == goes_on, output
    assert ("--prepare_only" in output) == (not goes_on) and (status == 2) == (not goes_on), output


def test_a_failed_run_is_not_requeued(stand_ins: Path) -> None:
    status, _, calls = start(stand_ins, SRUN_ENDS="3")
    assert status == 3 and not (calls / "scontrol").exists()


@pytest.mark.parametrize("ranks", ["abc", "0", "-1", "1.5"])
def test_ranks_that_are_no_number_are_refused(stand_ins: Path, ranks: str) -> None:
    status, output, calls = start(stand_ins, RANKS_PER_NODE=ranks)
    assert status == 2 and f"RANKS_PER_NODE must be a whole number above 0, not '{ranks}'" in output, output
    assert not (calls / "srun").exists()


def test_gpus_that_slurm_was_not_asked_for_are_not_left_idle(stand_ins: Path) -> None:
    status, output, calls = start(stand_ins, CARDS="8")
    assert status == 2 and "the node has 8 GPUs and Slurm was asked for none: give --gpus-per-node" in output, output
    assert not (calls / "srun").exists()
    status, output, calls = start(stand_ins, CARDS="8", SLURM_GPUS_ON_NODE="8", SRUN_ENDS="0")
    assert status == 0 and "--ntasks=16 --ntasks-per-node=8 --cpus-per-task=1" in (calls / "srun").read_text(), output
