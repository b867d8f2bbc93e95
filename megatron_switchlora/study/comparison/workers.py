"""The processes of a batch as seen from tools/compare.py: each is given runs in turn, and a time for each."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.disk import open_no_follow
from megatron_switchlora.shipped import ROOT


class Ended(Exception):
    """The process is gone; the text describes what it left."""


class Worker:
    """A process of `worker.py`, whose output goes to `log`."""

    def __init__(self, requested: str, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        with open_no_follow(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_switchlora.study.comparison.worker", requested],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, text=True,
                env={**environment, "PYTHONPATH": path},
            )  # fmt: skip
        self._lines: queue.Queue[Optional[str]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._device: Optional[str] = None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def device(self, seconds: float) -> str:
        """Return what its runs compute on, once it has imported what they need.

        Raises:
            TimeoutError: it needs longer; it is ended.
            Ended: it has ended.
        """
        if self._device is None:
            self._device = str(self._reply(seconds)["device"])
        return self._device

    def train(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return a run's figures, or why it has `failed`.

        Raises:
            TimeoutError: it took longer; the process is ended.
            Ended: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Ended(str(error)) from None
        return self._reply(seconds)

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.end()
            raise TimeoutError from None
        if line is None:
            status, end = self._process.wait(), self.log.read_bytes()[-2000:].decode(errors="replace")
            raise Ended(f"its process ended with status {status}; the end of {self.log}:\n{end}")
        return dict(json.loads(line))

    @property
    def alive(self) -> bool:
        """Whether it can take a run."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
