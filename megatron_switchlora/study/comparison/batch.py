"""Many runs in one call that has a time limit: tools/compare.py --batch.

A few processes (`workers.py`) share the device and train one run after the other, on the CPU one process. A run that
would not fit into the time that is left, by what earlier runs of its method took, is not begun; one that is not over at
the limit is ended and has no result. A run that fails ends its method's part of the comparison. The results are
written after every run, so that whoever kills the call loses the runs under way and no other.
"""

from __future__ import annotations

import os
import queue
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Self

import torch

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig, TrainConfig
from megatron_switchlora.startup.environment import cpu_threads
from megatron_switchlora.startup.signals import REQUEUE
from megatron_switchlora.study.comparison.inputs import Inputs, text_options
from megatron_switchlora.study.comparison.made import Made
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runner import Runner, Stopped, Unfinished
from megatron_switchlora.study.comparison.settings import Setting
from megatron_switchlora.study.comparison.sweeps import attempt, compare
from megatron_switchlora.study.comparison.workers import Ended, Worker

SHARING = 4  # processes of one GPU, unless --processes says otherwise
RESERVE = 3.0  # seconds before the limit, for the end of the processes and of this one
ADDED = {"checkpoint.interval": 0, "resume": "none"}  # to each run's options; no number depends on them


@dataclass(frozen=True)
class Pace:
    """What a run of a method took: seconds beside its steps, and per step."""

    beside: float
    per_step: float

    def seconds(self, steps: int) -> float:
        """Return what this number of steps would take."""
        return self.beside + steps * self.per_step


def default_processes(requested: str) -> int:
    """Return how many processes train at once, for a value of train.device."""
    if requested == "cpu" or not torch.cuda.device_count():
        return 1
    return min(SHARING, os.cpu_count() or 1)


def age() -> float:
    """Return the seconds since this process was started, imports included; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):  # not Linux
        return 0.0


def environment_of(env: Mapping[str, str], processes: int) -> dict[str, str]:
    """Return the environment of each process: several divide the cores, where nothing else gives their threads."""
    if processes == 1:
        return dict(env)
    return {**env, "OMP_NUM_THREADS": str(cpu_threads(0, processes, env)[0])}


def require_batch(setting: Setting, configs: dict[str, RunConfig]) -> None:
    """Check that each run is one process, and that all have one device and text.

    Raises:
        UserError: naming the method of others.
    """
    for name in setting.selected:
        ranks = setting.launch(name)[1]
        require(
            ranks == 1,
            f"A batch's runs are one process each, but those of {name} have {ranks} ranks: leave it out with "
            "--methods.",
        )
    devices = {name: configs[name].train.device for name in setting.selected}
    require(
        len(set(devices.values())) == 1,
        f"All runs of a batch have one train.device, but the methods have {devices}: give --set train.device=cuda.",
    )
    text_options(setting)


class BatchRunner(Runner):
    """Trains in `processes` workers until `deadline` on the clock. As a context it holds the work folder."""

    def __init__(
        self,
        setting: Setting,
        results: Results,
        work: Path,
        inputs: Inputs,
        data: Optional[Path],
        requested: str,
        processes: int,
        deadline: float,
        make_worker: Callable[[str, Path, dict[str, str]], Worker] = Worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(setting, results, work, processes)
        self.inputs, self.data = inputs, data
        self.requested, self.processes, self.deadline = requested, processes, deadline
        self.failures: dict[str, str] = {}
        self.left_out: list[str] = []
        self._make_worker, self._clock = make_worker, clock
        self._paces: dict[str, Pace] = {}
        self._workers: queue.Queue[Worker] = queue.Queue()
        self._started: list[Worker] = []
        self._stopping = False

    def __enter__(self) -> Self:
        super().__enter__()
        self._made = Made(self.work)
        self._made.remove_all()
        for _ in range(self.processes):
            self._workers.put(self._start())
        return self

    def _start(self) -> Worker:
        log = self._made.claim(f"worker{len(self._started)}.log")
        worker = self._make_worker(self.requested, log, environment_of(os.environ, self.processes))
        self._started.append(worker)
        return worker

    def stop(self) -> None:
        """End all processes; a run under way has no result."""
        self._stopping = True
        for worker in self._started:
            worker.end()

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - self._clock()

    def device(self) -> str:
        """Return what the processes compute on.

        Raises:
            Unfinished: they did not start in time.
            UserError: they cannot start.
        """
        worker = self._workers.get()
        try:
            return worker.device(self.left())
        except TimeoutError:
            raise Unfinished("No process had imported what runs need when the time was over.") from None
        except Ended as end:
            raise UserError(f"No run can be started here: {end}") from None
        finally:
            self._workers.put(worker)

    def expected(self, method: str, steps: int) -> float:
        """Return the seconds of a run by earlier ones of its method, else of the slowest; 0 before the first."""
        known = [self._paces[method]] if method in self._paces else list(self._paces.values())
        return max((pace.seconds(steps) for pace in known), default=0.0)

    def train(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Have a worker train a run.

        Raises:
            Unfinished: it does not fit into the time, or failed.
            Stopped: the batch was asked to stop.
        """
        worker = self._workers.get()  # there is one: no more runs have their turn at once
        try:
            return self._train(worker, key, method, options)
        except TimeoutError:
            self.left_out.append(key)
            raise Unfinished(f"{key} was not over at the limit and is ended.") from None
        except Ended as end:
            if self._stopping:
                raise Stopped("runs under way have no result") from None
            raise self._failed(key, str(end)) from None
        finally:
            alive = worker.alive or self._stopping or self.left() <= 0
            self._workers.put(worker if alive else self._start())

    def _train(self, worker: Worker, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        expected = self.expected(method, options.get("train.steps", TrainConfig().steps))
        if self._stopping or expected >= self.left():
            self.left_out.append(key)
            raise Unfinished(f"{key} is not begun: it takes about {expected:.0f} s and {self.left():.0f} s are left.")
        worker.device(self.left())
        try:
            folder = self._made.claim(self.folder(key).name)
        except UserError as error:
            raise self._failed(key, str(error)) from None
        line = self.setting.command_line(options | ADDED, self.data)
        task = {"words": line, "cache": str(self.inputs.cache.absolute()), "folder": str(folder)}
        figures = worker.train(task, self.left())
        if "failed" in figures:
            raise self._failed(key, figures["failed"])
        wall, steps = figures.pop("wall"), figures["steps"]
        if steps:
            self._paces[method] = Pace(max(0.0, wall - figures["seconds"]), figures["seconds"] / steps)
        return figures | {"revision": figures["revision"] or self.inputs.revision}

    def clean(self, key: str) -> None:
        """Remove the run's folder."""
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def _failed(self, key: str, why: str) -> Unfinished:
        self.failures[key] = why
        return Unfinished(f"{key} failed: {why}")


def take_known(results: Results, known: Results, device: str) -> None:
    """Begin with the runs that are known already on the device, so that a batch runs what is missing."""
    results.require_device(device, "This batch")
    if known.device in (None, device):
        results.merge(known)
    else:
        print(f"{known.path} holds runs on {known.device}, which do not count on {device}.", flush=True)


def run_batch(runner: BatchRunner, known: Results) -> int:
    """Run what is missing, as far as the time allows, report it, and return the exit status."""
    with runner:
        device = attempt(runner.device)
        if device is None:
            return REQUEUE
        take_known(runner.results, known, device)
        before = len(runner.results.content["runs"])
        complete = compare(runner.setting, runner)
    print(summary(runner, before))
    return 2 if runner.failures else 0 if complete else REQUEUE


def summary(runner: BatchRunner, before: int) -> str:
    """Return what a batch has done and what is left, in sentences."""
    new = len(runner.results.content["runs"]) - before
    lines = [f"{new} new runs on {runner.results.device} are in {runner.results.path}."]
    if runner.left_out:
        lines.append(f"{len(runner.left_out)} runs, and what depends on them, had no time: the same command continues.")
    lines += [f"error: {key} failed: {why}" for key, why in runner.failures.items()]
    return "\n".join(lines)
