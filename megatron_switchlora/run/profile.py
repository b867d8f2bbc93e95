"""Trace the steps of `train.profile` on rank 0, with torch's profiler.

The trace goes to the run folder's profile/, as compressed JSON that Perfetto and Chrome read. It has the operators of
the host and the kernels of the GPU, and a span "step N" around each step. It is a decoration whose failure does not
stop the run.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Optional

import torch

from megatron_switchlora.run.figures import decorating
from megatron_switchlora.run.loggers import own_folder


class StepTrace:
    """Traces the steps from the first to the last of `steps`, counted from 1; None traces nothing."""

    def __init__(self, folder: Path, steps: Optional[tuple[int, int]], print_line: Callable[[str], None]) -> None:
        self._folder, self._steps, self._print_line = folder, steps, print_line
        self._profiler: Optional[torch.profiler.profile] = None
        self._done: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the body if it is a step to trace."""
        first, last = self._steps or (0, -1)
        if not first <= number <= last:
            yield
            return
        with decorating("the trace of train.profile", self._print_line):
            self._begin()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._done.append(number)

    def recorded(self, number: int) -> None:
        """Write the trace after the record of its last step, whose time would otherwise include the writing."""
        if self._steps is not None and number >= self._steps[1]:
            self.close()

    def _begin(self) -> None:
        if self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def close(self) -> None:
        """Write the trace of the steps so far, if it is not written; a run may end before the last step."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        with decorating("the trace of train.profile", self._print_line):
            profiler.stop()
            if self._done:
                path = self._write(profiler)
                self._print_line(f"steps {self._done[0]} to {self._done[-1]} are traced in {path}")

    def _write(self, profiler: torch.profiler.profile) -> Path:
        folder = own_folder(self._folder / "profile")
        path = folder / f"rank0.steps_{self._done[0]}-{self._done[-1]}.json.gz"
        with TemporaryDirectory(prefix=".trace-", dir=folder) as scratch:
            plain, packed = Path(scratch) / "trace.json", Path(scratch) / "trace.json.gz"
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target, 1 << 20)  # torch's own packs line by line, ten times as slow
            packed.replace(path)
        return path
