"""The runs of tools/compare.py: what is finished, in one JSON file, and starting what is missing.

A run is a command of launch/pretrain.py with its own folder, so that a second start of the same command goes on from
its newest checkpoint, or finds it finished. Its numbers come from its metrics.jsonl and meta.json. A folder's name ends
with the text's fingerprint, so that a run of another text is never taken for it. `Results` is written by atomic renames
after every run; a finished run's checkpoints and final model are then deleted (--keep keeps them).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any, Optional

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import open_no_follow, take_lock
from megatron_switchlora.run.folder import lock_folder, read_meta
from megatron_switchlora.run.machine import machine
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.startup.signals import REQUEUE
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.settings import Point, Setting, run_key
from megatron_switchlora.study.places import ROOT

SCRIPT = ROOT / "launch" / "pretrain.py"
DIVERGED = ("not finite, so the step was", "the last update has destroyed the model")  # what launch/pretrain.py says


class Stopped(Exception):
    """A run was asked to stop, and has left a checkpoint."""


class Runner:
    """Starts runs, at most `jobs` at once. As a context it holds the work folder and ends what it has started."""

    def __init__(
        self,
        setting: Setting,
        results: Results,
        work: Path,
        data: Optional[Path] = None,
        jobs: int = 1,
        keep: bool = False,
        text: Optional[str] = None,
    ) -> None:
        require(jobs >= 1, f"--jobs must be at least 1, not {jobs}.")
        self.setting, self.results, self.work = setting, results, work.absolute()
        self.data, self.keep, self.text = data, keep, text
        self._turns = threading.Semaphore(jobs)
        self._starting = threading.Lock()
        self._stopping = False
        self._started: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Runner:
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.work)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._lock.close()

    def stop(self) -> None:
        """Start nothing more, and ask what runs to leave a checkpoint and end: SIGTERM to each one's process group."""
        with self._starting:
            self._stopping = True
        for process in list(self._started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in list(self._started):
            process.wait()

    def losses(self, method: str, points: Iterable[Point]) -> list[float]:
        """Validation losses at seed 0, in the sweep's length."""
        return self._all([(method, point, 0, bool(self.setting.sweep_options)) for point in points])

    def seeds(self, method: str, point: Point, seeds: Iterable[int]) -> list[float]:
        """Validation losses at full length."""
        return self._all([(method, point, seed, False) for seed in seeds])

    def _all(self, runs: list[tuple[str, Point, int, bool]]) -> list[float]:
        with ThreadPoolExecutor(len(runs)) as pool:
            return list(pool.map(lambda run: self.loss(*run), runs))

    def loss(self, method: str, point: Point, seed: int, sweep: bool) -> float:
        """Validation loss at the end of a run, from the results or by running it; infinite if it diverged."""
        options = self.setting.run_options(method, point, seed, sweep)
        key = run_key(method, point, seed, options)
        if key not in self.results.content["runs"]:
            with self._turns:
                name = f"{key} text {self.text[:8]}" if self.text else key
                folder = self.work / re.sub(r"[^\w.+-]+", "_", name)
                diverged = self.train(method, options, folder)
                run = read_run(folder, diverged) | {
                    "method": method, "lr": point.lr, "dense_lr": point.dense_lr, "seed": seed, "sweep": sweep
                }  # fmt: skip
                self.results.add(key, run)
                print(f"{key}: {'diverged' if diverged else format(run['val_loss'], '.4f')}", flush=True)
                if not self.keep:
                    for name in ("checkpoints", "final"):
                        shutil.rmtree(folder / name, ignore_errors=True)
        value = self.results.content["runs"][key]["val_loss"]
        return math.inf if value is None else float(value)

    def command(self, method: str, point: Point, seed: int) -> list[str]:
        """The line that starts a run, but for its folder."""
        return self._line(method, self.setting.run_options(method, point, seed, False))

    def _line(self, method: str, options: dict[str, Any]) -> list[str]:
        launcher, _ = self.setting.launch(method)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            values = {"python": sys.executable, "script": str(SCRIPT), "port": probe.getsockname()[1]}
        try:
            start = [word.format(**values) for word in shlex.split(launcher)]
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"The launcher {launcher!r} may have {{python}}, {{script}} and {{port}}: {error}."
            ) from None
        return start + self.setting.command_line(options, self.data)

    def _wait_for(self, folder: Path) -> None:
        """A run that outlived a killed compare.py ends first, or this comparison: it holds the lock of its folder."""
        if not (folder / ".lock").exists():
            return
        with open_no_follow(folder / ".lock", os.O_RDWR) as file:
            announced = False
            while not self._stopping:
                if take_lock(file):
                    return
                if not announced:
                    print(f"{folder.name} still runs, from an earlier comparison: waiting for its end", flush=True)
                announced = True
                time.sleep(0.2)

    def train(self, method: str, options: dict[str, Any], folder: Path, may_stop: bool = False) -> bool:
        """Start or continue a run and wait for its end; returns whether it diverged.

        Raises:
            Stopped: it was asked to stop (unless it may).
            UserError: it failed, with the end of what it said.
        """
        self._wait_for(folder)
        log = folder.with_name(f"{folder.name}.log")
        with open_no_follow(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            begin = os.fstat(file.fileno()).st_size
            with self._starting:
                if self._stopping:
                    raise Stopped("no new run")
                process = subprocess.Popen(
                    [*self._line(method, options), "--output_dir", str(folder)], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                self._started.add(process)
            status = process.wait()
            self._started.discard(process)
        said = log.read_bytes()[begin:].decode(errors="replace")
        if any(words in said for words in DIVERGED):
            return True
        if status == REQUEUE or "stopped after step" in said or self._stopping:
            if may_stop and not self._stopping:
                return False
            raise Stopped(f"{folder.name} has left a checkpoint")
        require(status == 0, f"A run failed with status {status}; the end of {log}:\n{said[-2000:]}")
        return False


def text_of(config: RunConfig) -> Optional[str]:
    """Fingerprint of the tokens that a run would read, prepared if they are not yet; None for the hub, whose dataset is
    among a run's options."""
    if config.data.source == "hf":
        return None
    from megatron_switchlora.data.packing import prepare  # seconds, for which --help and --report need not wait
    from megatron_switchlora.train.dataset import data_identity

    data = prepare(config.data, progress=True)
    for note in data.notes:
        print(f"warning: {note}", flush=True)
    return str(data_identity(data, data.vocab_size)["data"])


def read_run(folder: Path, diverged: bool) -> dict[str, Any]:
    """What the table and the plot need of a run: outcome, curve, counts, memory."""
    records, meta = read_records(folder / "metrics.jsonl"), read_meta(folder)
    steps = [record for record in records if "loss" in record]
    needed = {"tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "dp_bytes"}
    require(
        (diverged or "val_loss" in meta) and all(needed <= set(record) for record in steps),
        f"meta.json or metrics.jsonl in {folder} is damaged, so the run's numbers are lost: move the folder away, and "
        "the same command runs it again.",
    )
    tokens = steps[0]["tokens"] // steps[0]["step"] if steps else 0
    return {
        "val_loss": None if diverged else meta["val_loss"],
        "diverged": diverged,
        "steps": len(steps),
        "curve": [[r["step"], r["step"] * tokens, r["val_loss"]] for r in records if "val_loss" in r],
        "seconds": max((record["seconds"] for record in steps), default=0.0),
        "step_seconds": median(step_seconds(steps)) if steps else None,
        "peak_memory_bytes": max((record["peak_memory_bytes"] for record in steps), default=None),
        "dp_bytes": steps[-1]["dp_bytes"] if steps else None,
        "merge_bytes": mean(record.get("merge_bytes", 0) for record in steps) if steps else None,
        "device": meta.get("device"),
        "trainable": meta.get("parameters", {}).get("trainable"),
        "full_rank": meta.get("parameters", {}).get("full_rank"),
        "vocab_size": meta.get("vocab_size"),
        "revision": meta.get("versions", {}).get("git_revision"),
        "torch": meta.get("versions", {}).get("torch"),
        "data": meta.get("data"),
        "machine": machine(),
    }


def step_seconds(steps: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step, from its speed."""
    return [record["tokens"] / record["step"] / record["tokens_per_second"] for record in steps]
