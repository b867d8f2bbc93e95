"""The shipped sbatch script on a throw-away Slurm cluster of two hosts: the quick start's model, preempted, killed,
requeued and resumed."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from megatron_switchlora.run.metrics_log import read_records
from tests.dist.launch import REPOSITORY
from tests.system.hosts import Hosts, missing_parts
from tests.system.slurm import Slurm
from tests.system.soak import comparable

reason = missing_parts("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.skipif(reason is not None, reason=str(reason)),
]
STEPS = 30
QUICK_START = (
    f"--config launch/configs/cpu_quickstart.yaml --ds_config ds_configs/zero1.json --train.steps {STEPS} "
    "--train.warmup_steps 5 --train.eval_interval 10 --train.eval_samples 32 --train.threads 1 --checkpoint.interval 5"
).split()


class Jobs:
    """Submits the shipped script."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm, self.folder = slurm, slurm.folder

    def submit(self, run: str, *options: str, sbatch: tuple[str, ...] = ("--nodes=2",)) -> str:
        """The number of a job that trains in the folder `run`."""
        place = {"OUTPUT_DIR": str(self.folder / run), "PYTHON": sys.executable}
        output = f"--output={self.folder / run}.out"
        words = [*sbatch, output, f"--chdir={REPOSITORY}", "launch/slurm/pretrain.sbatch", *QUICK_START, *options]
        return self.slurm.submit(*words, **place)

    def records(self, run: str) -> list[dict[str, Any]]:
        return read_records(self.folder / run / "metrics.jsonl")

    def wait_for_step(self, run: str, step: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not any(record["step"] >= step for record in self.records(run)):
            assert time.monotonic() < deadline, self.output(run)
            time.sleep(0.1)

    def output(self, run: str) -> str:
        path = self.folder / f"{run}.out"
        return path.read_text() if path.exists() else "no output"

    def finish(self, job: str, run: str) -> None:
        assert self.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=180) == "COMPLETED", self.output(run)

    def dropped(self, run: str) -> bool:
        """Whether steps were done after the checkpoint from which it went on, and so done again."""
        return (self.folder / run / "metrics.dropped.jsonl").exists()

    def meta(self, run: str) -> dict[str, Any]:
        return json.loads((self.folder / run / "meta.json").read_text())

    def ranks(self) -> list[int]:
        """Processes of pretrain.py on the hosts, as the hosts number them."""
        return self.slurm.hosts.pids("^[^ ]*python[^ ]* -u launch/pretrain.py")

    def send(self, ranks: list[int], name: str) -> None:
        self.slurm.hosts.run("n1", ["kill", f"-{name}", *map(str, ranks)])

    def wait_for_notice(self, ranks: list[int], seconds: float = 200) -> None:
        """Wait until Slurm has sent USR1 to each of the ranks, which are stopped: the kernel keeps it for them."""
        notice = 1 << (signal.SIGUSR1 - 1)
        status = ["cat", *(f"/proc/{rank}/status" for rank in ranks)]
        deadline = time.monotonic() + seconds
        while True:
            kept = re.findall(r"ShdPnd:\s*(\w+)", self.slurm.hosts.run("n1", status))
            if all(int(mask, 16) & notice for mask in kept):
                return
            assert time.monotonic() < deadline, kept
            time.sleep(0.5)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with Hosts(tmp_path_factory.mktemp("cluster")) as hosts, Slurm(hosts) as slurm:
        yield Jobs(slurm)


@pytest.fixture(autouse=True)
def no_job_is_left(jobs: Jobs) -> Iterator[None]:
    """A failed test must not keep the hosts from the next."""
    yield
    jobs.slurm.run("scancel", "--user=root", "--signal=KILL", "--full")
    jobs.slurm.run("scancel", "--user=root")


@pytest.fixture(scope="module")
def whole(jobs: Jobs) -> list[dict[str, Any]]:
    """Records of a run across both hosts that nothing interrupts."""
    before = [jobs.slurm.hosts.sent_bytes(host) for host in ("n1", "n2")]
    job = jobs.submit("whole")
    jobs.finish(job, "whole")
    records = jobs.records("whole")
    handed_over = sum(record.get("dp_bytes", 0) for record in records)
    sent = [jobs.slurm.hosts.sent_bytes(host) - start for host, start in zip(("n1", "n2"), before, strict=True)]
    assert min(sent) > handed_over > STEPS * 1e6  # two ranks: each sends once what it hands over
    return records


def test_the_quick_start_trains_across_both_hosts(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    meta = jobs.meta("whole")
    assert meta["mesh"] == {"lte": 1, "dp": 2, "tp": 1} and meta["finished"]
    assert [record["step"] for record in whole if "loss" in record] == list(range(1, STEPS + 1))
    assert whole[-1]["val_loss"] < whole[0]["val_loss"] - 0.3
    assert "start 1: 2 nodes (n[1-2]) x 1 ranks" in jobs.output("whole")


@pytest.mark.long
def test_preempted_it_is_requeued_and_ends_with_the_same_losses(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    """As under a true time limit, whose test runs every time; here the notice is sent by hand."""
    job = jobs.submit("preempted")
    jobs.wait_for_step("preempted", 7)
    jobs.slurm.run("scancel", "--signal=USR1", "--batch", job)
    jobs.slurm.wait_for_start(job, 2)
    jobs.finish(job, "preempted")
    (at,) = jobs.meta("preempted")["resumed_at"]
    assert 7 <= at < STEPS and not jobs.dropped("preempted")
    assert comparable(jobs.records("preempted")) == comparable(whole)
    assert re.findall(r"start (\d):", jobs.output("preempted")) == ["1", "2"]
    assert f"job {job} goes back into the queue" in jobs.output("preempted")


def test_a_job_of_higher_priority_takes_its_place(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    """What PreemptMode=REQUEUE does, with a time of grace."""
    job = jobs.submit("displaced")
    jobs.wait_for_step("displaced", 7)
    sleeper = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={jobs.folder}/urgent.out", "--wrap=sleep 3")
    urgent = jobs.slurm.submit(*sleeper)
    jobs.slurm.wait_for(urgent, "RUNNING", "COMPLETED", seconds=60)
    assert jobs.slurm.state(job) == "PENDING", jobs.output("displaced")
    jobs.finish(urgent, "urgent")
    jobs.slurm.wait_for_start(job, 2)
    jobs.finish(job, "displaced")
    (at,) = jobs.meta("displaced")["resumed_at"]
    assert 7 <= at < STEPS and not jobs.dropped("displaced"), jobs.output("displaced")
    assert comparable(jobs.records("displaced")) == comparable(whole)


def test_scancel_leaves_a_checkpoint_to_go_on_from(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    """Slurm sends SIGTERM and waits for KillWait; the job does not come back by itself, the same command goes on."""
    more = ("--checkpoint.interval", "0")
    job = jobs.submit("cancelled", *more)
    jobs.wait_for_step("cancelled", 7)
    jobs.slurm.run("scancel", job)
    jobs.slurm.wait_for(job, "CANCELLED", seconds=30)
    again = jobs.submit("cancelled", *more)
    jobs.finish(again, "cancelled")
    (at,) = jobs.meta("cancelled")["resumed_at"]
    assert 7 <= at < STEPS and not jobs.dropped("cancelled")
    assert comparable(jobs.records("cancelled")) == comparable(whole)
    assert "goes back into the queue" not in jobs.output("cancelled")


def test_a_killed_rank_ends_the_job_and_a_requeue_goes_on(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    job = jobs.submit("killed")
    jobs.wait_for_step("killed", 7)
    pids = jobs.ranks()
    assert len(pids) == 2
    began = time.monotonic()
    jobs.send(pids[1:], "KILL")
    assert jobs.slurm.wait_for(job, "FAILED", "COMPLETED", seconds=12) == "FAILED"
    print(f"\nthe job ended {time.monotonic() - began:.1f} s after its rank")
    assert "goes back into the queue" not in jobs.output("killed")
    jobs.slurm.run("scontrol", "requeue", job)
    jobs.slurm.wait_for_start(job, 2)
    jobs.finish(job, "killed")
    (at,) = jobs.meta("killed")["resumed_at"]
    assert at % 5 == 0 and 0 < at < STEPS and comparable(jobs.records("killed")) == comparable(whole)


def test_under_a_time_limit_it_requeues_itself(jobs: Jobs, whole: list[dict[str, Any]]) -> None:
    """Three minutes at a time; Slurm, which looks each half minute, gives notice when 90 s or less are left. The ranks
    are held until then: however fast they are, steps are left for the second start, and few enough for it to end."""
    job = jobs.submit("limited", sbatch=("--nodes=2", "--time=3", "--signal=B:USR1@60"))
    jobs.wait_for_step("limited", 7)
    ranks = jobs.ranks()
    assert len(ranks) == 2
    jobs.send(ranks, "STOP")
    jobs.wait_for_notice(ranks)
    jobs.send(ranks, "CONT")
    jobs.slurm.wait_for_start(job, 2)
    jobs.finish(job, "limited")
    (at,) = jobs.meta("limited")["resumed_at"]
    assert 7 <= at < STEPS and not jobs.dropped("limited")
    assert comparable(jobs.records("limited")) == comparable(whole)
    assert re.findall(r"start (\d):", jobs.output("limited")) == ["1", "2"]
    assert f"job {job} goes back into the queue" in jobs.output("limited")


def test_notice_before_a_rank_listens(jobs: Jobs) -> None:
    """The ranks die of the signal; the job is requeued all the same."""
    job = jobs.submit("early")
    jobs.slurm.wait_for(job, "RUNNING")
    deadline = time.monotonic() + 20
    while len(jobs.ranks()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    jobs.slurm.run("scancel", "--signal=USR1", "--batch", job)
    jobs.slurm.wait_for(job, "PENDING", seconds=30)
    jobs.slurm.run("scancel", job)
    assert not (jobs.folder / "early" / "metrics.jsonl").exists()
    assert f"job {job} goes back into the queue" in jobs.output("early")


def test_a_sweep_is_a_job_array_whose_tasks_are_requeued_alone(jobs: Jobs) -> None:
    """Also the one whose own number is the array's. A task without a line in the file fails."""
    (jobs.folder / "rates.txt").write_text("--optim.lr 0.01\n--optim.lr 0.02 --method.rank 8\n")
    place = {"PYTHON": sys.executable, "OUTPUT_DIR": str(jobs.folder / "tasks")}
    lines = ["--array=0-2", "--nodes=1", f"--output={jobs.folder}/tasks-%a.out", f"--chdir={REPOSITORY}"]
    script = ["launch/slurm/pretrain.sbatch", "--sweep", str(jobs.folder / "rates.txt"), *QUICK_START]
    array = jobs.slurm.submit(*lines, *script, "--train.steps", "5000", **place)
    for task in (0, 1):
        jobs.wait_for_step(f"tasks-{task}", 1)
    for task in (1, 0):
        jobs.slurm.run("scancel", "--signal=USR1", "--batch", f"{array}_{task}")
        jobs.slurm.wait_for(f"{array}_{task}", "PENDING", seconds=60)
        assert f"job {array}_{task} goes back into the queue" in jobs.output(f"tasks-{task}")
        if task == 1:
            assert jobs.slurm.state(f"{array}_0") == "RUNNING"
    assert "start 2" not in jobs.output("tasks-0") + jobs.output("tasks-1")
    (reached,) = (max(record["step"] for record in jobs.records(f"tasks-{task}")) for task in (1,))
    jobs.slurm.wait_for_start(f"{array}_1", 2)
    jobs.wait_for_step("tasks-1", reached + 1)
    assert jobs.meta("tasks-1")["resumed_at"] == [reached] and not jobs.dropped("tasks-1")
    for task, (rate, rank) in enumerate(((0.01, 24), (0.02, 8))):
        options = yaml.safe_load((jobs.folder / f"tasks-{task}" / "config.yaml").read_text())
        assert (options["optim"]["lr"], options["method"]["rank"]) == (rate, rank)
    jobs.slurm.run("scancel", f"{array}_0", f"{array}_1")
    assert jobs.slurm.wait_for(f"{array}_2", "COMPLETED", "FAILED") == "FAILED", jobs.output("tasks-2")
    assert "line 3 of" in jobs.output("tasks-2") and "array task 2 has no options" in jobs.output("tasks-2")


def test_ranks_per_node_overrule_sbatchs_tasks(jobs: Jobs) -> None:
    place = {"PYTHON": "echo", "RANKS_PER_NODE": "2"}
    lines = ["--nodes=2", "--ntasks-per-node=1", f"--output={jobs.folder}/echo.out", f"--chdir={REPOSITORY}"]
    job = jobs.slurm.submit(*lines, "launch/slurm/pretrain.sbatch", **place)
    assert jobs.slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert jobs.output("echo").count("-u launch/pretrain.py --output_dir") == 4


def test_what_is_missing_is_named(jobs: Jobs) -> None:
    for change, told in (({"PYTHON": "/nowhere/python"}, "there is no /nowhere/python"), ({}, "no launch/pretrain.py")):
        place = {"PYTHON": sys.executable, **change}
        where = REPOSITORY if change else jobs.folder
        job = jobs.slurm.submit(
            "--nodes=1", f"--output={jobs.folder}/missing.out", f"--chdir={where}",
            str(REPOSITORY / "launch/slurm/pretrain.sbatch"), **place,
        )  # fmt: skip
        assert jobs.slurm.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
        assert told in jobs.output("missing")
        (jobs.folder / "missing.out").unlink()
