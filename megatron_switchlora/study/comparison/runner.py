"""What a comparison asks for its losses: a `Runner` looks into the results and gets what is missing.

Two kinds get it: commands of launch/pretrain.py (`runs.py`), and processes that train many runs each (`batch.py`).
"""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import Any, Optional, Self

from tqdm import tqdm

from megatron_switchlora.config.errors import require
from megatron_switchlora.run.folder import lock_folder, read_meta
from megatron_switchlora.run.machine import machine
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.startup.progress import progress
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.settings import Point, Setting, run_key

DIVERGED = ("not finite, so the step was", "the last update has destroyed the model")  # the trainer's sentences


class Stopped(Exception):
    """A run was asked to stop, and may have left a checkpoint."""


class Unfinished(Exception):
    """A run has no result in this call; runs of other methods do not depend on it."""


class Runner(ABC):
    """Gets the losses of runs, at most `jobs` at once.

    As a context it holds the work folder, and ends what it has started.
    """

    def __init__(self, setting: Setting, results: Results, work: Path, jobs: int) -> None:
        self.setting, self.results, self.work = setting, results, work.absolute()
        self._turns = threading.Semaphore(jobs)
        self._bar = progress(None, "Runs", "runs", delay=0.0)
        self._running: set[str] = set()

    def __enter__(self) -> Self:
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.work)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.close_bar()
        self._lock.close()

    def close_bar(self) -> None:
        """Leave the bar as it is at the end."""
        self._bar.close()

    def folder(self, key: str) -> Path:
        """Return where a run lies."""
        return self.work / re.sub(r"[^\w.+-]+", "_", key)

    @abstractmethod
    def train(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Run what the results lack, and return its figures (`read_run`)."""

    @abstractmethod
    def stop(self) -> None:
        """Start nothing more, and end what runs."""

    @abstractmethod
    def clean(self, key: str) -> None:
        """Remove what a run, whose figures are kept by now, has left on the disk."""

    def losses(self, method: str, points: Iterable[Point]) -> list[float]:
        """Return validation losses at seed 0, in the sweep's length."""
        return self._all([(method, point, 0, bool(self.setting.sweep_options)) for point in points])

    def seeds(self, method: str, point: Point, seeds: Iterable[int]) -> list[float]:
        """Return validation losses at full length."""
        return self._all([(method, point, seed, False) for seed in seeds])

    def _all(self, runs: list[tuple[str, Point, int, bool]]) -> list[float]:
        with ThreadPoolExecutor(len(runs)) as pool:
            return list(pool.map(lambda run: self.loss(*run), runs))

    def loss(self, method: str, point: Point, seed: int, sweep: bool) -> float:
        """Return the validation loss at the end of a run, which is trained if need be; infinite if it diverged."""
        options = self.setting.run_options(method, point, seed, sweep)
        key = run_key(method, point, seed, options)
        if key not in self.results.content["runs"]:
            with self._turns:
                run = self._shown(key, method, options) | {
                    "method": method, "lr": point.lr, "dense_lr": point.dense_lr, "seed": seed, "sweep": sweep
                }  # fmt: skip
                self.results.add(key, run)
                tqdm.write(f"{key}: {'diverged' if run['diverged'] else format(run['val_loss'], '.4f')}")
                self.clean(key)
        value = self.results.content["runs"][key]["val_loss"]
        return math.inf if value is None else float(value)

    def _shown(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Train, and show on a terminal what is running and how many runs have ended."""
        self._running.add(key)
        self._bar.set_postfix_str(", ".join(sorted(self._running)))
        try:
            figures = self.train(key, method, options)
        finally:
            self._running.discard(key)
            self._bar.set_postfix_str(", ".join(sorted(self._running)))
        self._bar.update()
        return figures


def read_run(folder: Path, diverged: bool) -> dict[str, Any]:
    """Return what the table and the plot need of a run: outcome, curve, counts, memory, device."""
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
        "device": device_of(meta),
        "trainable": meta.get("parameters", {}).get("trainable"),
        "full_rank": meta.get("parameters", {}).get("full_rank"),
        "vocab_size": meta.get("vocab_size"),
        "revision": meta.get("versions", {}).get("git_revision"),
        "torch": meta.get("versions", {}).get("torch"),
        "data": meta.get("data"),
        "machine": machine(),
    }


def device_of(meta: dict[str, Any]) -> Optional[str]:
    """Return what a run computed on, from its meta.json: cpu, or the GPU's name."""
    name = meta.get("versions", {}).get("GPU")
    return str(name) if name else meta.get("device")


def step_seconds(steps: list[dict[str, Any]]) -> list[float]:
    """Return the seconds of each step, from its speed."""
    return [record["tokens"] / record["step"] / record["tokens_per_second"] for record in steps]
