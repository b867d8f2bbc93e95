"""The runs of tools/compare.py as commands of launch/pretrain.py.

A run has a folder of its own, so that a second start of the same command resumes its newest checkpoint, or finds it
finished. Its numbers come from its metrics.jsonl and meta.json. A folder's name ends
with the text's fingerprint, so that a run of another text is never taken for it. `Results` is written by atomic renames
after every run; a finished run's checkpoints and final model are then deleted (--keep keeps them).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import open_no_follow, take_lock
from megatron_switchlora.shipped import shipped_folder
from megatron_switchlora.startup.signals import REQUEUE
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runner import DIVERGED, Runner, Stopped, read_run
from megatron_switchlora.study.comparison.settings import Point, Setting

SCRIPT = shipped_folder("launch") / "pretrain.py"


class CommandRunner(Runner):
    """Starts each run as a command, at most `jobs` at once."""

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
        super().__init__(setting, results, work, jobs)
        self.data, self.keep, self.text = data, keep, text
        self._starting = threading.Lock()
        self._stopping = False
        self._started: set[subprocess.Popen[bytes]] = set()

    def stop(self) -> None:
        """Start nothing more, and ask what runs to leave a checkpoint and end: SIGTERM to each one's process group."""
        with self._starting:
            self._stopping = True
        for process in list(self._started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in list(self._started):
            process.wait()

    def train(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """Start the run, or continue it in its folder."""
        folder = self.folder(key)
        return read_run(folder, self.execute(method, options, folder))

    def folder(self, key: str) -> Path:
        """Return where a run of this text lies."""
        return super().folder(f"{key} text {self.text[:8]}" if self.text else key)

    def clean(self, key: str) -> None:
        """Remove checkpoints and the final model, unless they are to be kept."""
        if not self.keep:
            for name in ("checkpoints", "final"):
                shutil.rmtree(self.folder(key) / name, ignore_errors=True)

    def command(self, method: str, point: Point, seed: int) -> list[str]:
        """Return the line that starts a run, but for its folder."""
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
        """Wait for the end of a run that outlived a killed compare.py, or of this comparison: it locks its folder."""
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

    def execute(self, method: str, options: dict[str, Any], folder: Path, may_stop: bool = False) -> bool:
        """Start or continue a run, wait for its end, and return whether it diverged.

        Raises:
            Stopped: it was asked to stop (unless it may).
            UserError: it failed, with the end of its output.
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
        output = log.read_bytes()[begin:].decode(errors="replace")
        if any(sentence in output for sentence in DIVERGED):
            return True
        if status == REQUEUE or "stopped after step" in output or self._stopping:
            if may_stop and not self._stopping:
                return False
            raise Stopped(f"{folder.name} has left a checkpoint")
        require(status == 0, f"A run failed with status {status}; the end of {log}:\n{output[-2000:]}")
        return False


def certain_device(setting: Setting, config: RunConfig) -> Optional[str]:
    """Return "cpu" where the setting's runs can only compute on the CPU, else None."""
    from megatron_switchlora.startup.device import torch  # seconds, for which --help need not wait

    started_here = all(setting.launch(name)[0] == Setting.launcher for name in setting.selected)
    no_gpu = started_here and not torch.cuda.device_count()
    return "cpu" if config.train.device == "cpu" or no_gpu else None


def text_of(config: RunConfig) -> Optional[str]:
    """Return the fingerprint of the tokens that a run would read, prepared if they are not yet.

    It is None for the hub, whose dataset is among a run's options.
    """
    if config.data.source == "hf":
        return None
    from megatron_switchlora.data.packing import prepare  # seconds, for which --help and --report need not wait
    from megatron_switchlora.train.dataset import data_identity

    data = prepare(config.data, progress=True)
    for note in data.notes:
        print(f"warning: {note}", flush=True)
    return str(data_identity(data, data.vocab_size)["data"])
