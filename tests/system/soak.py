#!/usr/bin/env python3
"""Kill a two-rank SwitchLoRA run again and again, continue it by the same command, and compare with one left alone.

    python -m tests.system.soak --kills 100 --out benchmarks/soak_cpu.json

Kills are SIGKILL: at a random moment on one rank or both, or by the process itself at a chosen point of data, switch,
step, record, save, publication, deletion or loading (`kill_worker.POINTS`).
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_switchlora.checkpoint.files import open_checkpoint, published
from megatron_switchlora.disk import user_path
from megatron_switchlora.run.machine import machine, versions
from tests.dist.launch import REPOSITORY, end, free_port
from tests.system.commands import Place
from tests.system.kill_worker import POINTS, RANK_0_ONLY

VOLATILE = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")


def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what may differ between two runs."""
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in records]


class Pair:
    """Two ranks of one run, started by hand."""

    def __init__(self, place: Place, options: list[str], kill_at: dict[int, str]) -> None:
        port = str(free_port())
        self.processes = []
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        for rank in range(2):
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            env = {**place.env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "KILL_AT": kill_at.get(rank, "")}
            command = [sys.executable, "-m", "tests.system.kill_worker", *options]
            self.processes.append(
                subprocess.Popen(
                    command, env=env, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=self.outputs[rank],
                    stderr=subprocess.STDOUT, text=True, start_new_session=True,
                )
            )  # fmt: skip

    def wait_for_training(self, records: Path, before: int, seconds: float) -> None:
        """Until the run writes records, or ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            if records.is_file() and records.stat().st_size not in (0, before):
                return
            time.sleep(0.02)

    def finish(self, seconds: float) -> tuple[list[int], bool]:
        """Exit statuses, and whether a rank had to be helped."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        hung = any(process.poll() is None for process in self.processes)
        end(self.processes)
        return [process.returncode for process in self.processes], hung

    def text(self, rank: int) -> str:
        self.outputs[rank].seek(0)
        return self.outputs[rank].read()


def choose_kill(rng: random.Random) -> tuple[str, dict[int, str], list[int], float]:
    """Its name; points by rank; ranks to kill from outside and after how many seconds of training."""
    if rng.random() < 0.3:
        ranks = rng.choice([[0], [1], [0, 1]])
        return f"random moment, ranks {ranks}", {}, ranks, rng.uniform(0.0, 1.5)
    point = rng.choice(sorted(POINTS))
    rank = 0 if point in RANK_0_ONLY else rng.randrange(2)
    largest = {"load": 60, "switch": 60, "reopen": 4}.get(point, 8)
    return point, {rank: f"{point}:{rng.randint(1, largest)}"}, [], 0.0


def soak(place: Place, kills: int, seed: int, options: list[str], log: Any = print) -> dict[str, Any]:
    """Run until so many kills have happened and the run is done; the run is prolonged by nothing: its options set its
    length, and a new run begins (with the next seed) if it ends before."""
    rng = random.Random(seed)
    found: dict[str, Any] = {"kills": 0, "runs": 0, "by_point": collections.Counter(), "lost_steps": 0, "helped": 0}
    while found["kills"] < kills:
        found["runs"] += 1
        line = [*options, "--train.seed", str(found["runs"])]
        alone = Pair(place, [*line, "--output_dir", str(place.folder / f"whole{found['runs']}")], {})
        assert alone.finish(600)[0] == [0, 0], alone.text(0)
        run = f"run{found['runs']}"
        _one_run(place, run, line, kills, rng, found, log)
        whole, mine = (comparable(place.records(name)) for name in (f"whole{found['runs']}", run))
        assert mine == whole, f"records of {run} differ from the run left alone"
    found["by_point"] = dict(sorted(found["by_point"].items()))
    return found


def _one_run(
    place: Place, run: str, line: list[str], kills: int, rng: random.Random, found: dict[str, Any], log: Any
) -> None:
    folder = place.folder / run
    while True:
        last = published(folder / "checkpoints")
        steps = open_checkpoint(last[-1]).step if last else 0
        reached = len([record for record in place.records(run) if "loss" in record]) if last else 0
        name, points, ranks, delay = ("none", {}, [], 0.0) if found["kills"] >= kills else choose_kill(rng)
        records = folder / "metrics.jsonl"
        before = records.stat().st_size if records.is_file() else 0
        pair = Pair(place, [*line, "--output_dir", str(folder)], points)
        if ranks:
            pair.wait_for_training(records, before, 120)
            time.sleep(delay)
            for rank in ranks:
                pair.processes[rank].kill()
        statuses, hung = pair.finish(90)
        said = pair.text(0)
        if steps and "resumes after step" in said:
            assert f"resumes after step {steps} " in said, (steps, said)
            found["lost_steps"] = max(found["lost_steps"], reached - steps)
        if -9 in statuses:
            found["kills"] += 1
            found["by_point"][name] += 1
            found["helped"] += hung
            log(f"kill {found['kills']}: {name} {points or ''}; {run} had published step {steps}", flush=True)
        if statuses == [0, 0]:
            return
        assert -9 in statuses, (name, statuses, said, pair.text(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=user_path, required=True)
    arguments = parser.parse_args()
    options = ["--train.steps", "60", "--train.eval_interval", "20"]
    options += ["--checkpoint.interval", "3", "--checkpoint.keep_every", "15"]
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        place.env["OMP_NUM_THREADS"] = "1"
        found = soak(place, arguments.kills, arguments.seed, [*place.options("unused")[:-2], *options])
    found |= {"seconds": round(time.time() - began), "machine": machine(), "versions": versions()}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
