"""Save checkpoints while training continues.

`save` copies this rank's share of the state to host memory, and a thread writes it. Training waits only for the copy.
The threads of different ranks do not communicate. Instead each training step's control all-reduce carries `written`.
Once all ranks have written, `finish` gathers their reports and rank 0 publishes the checkpoint. A save that fails on
any rank, for example on a full disk, gives a warning. Earlier checkpoints stay, and the run continues.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.engine_state import Engine, own_share, state_slices
from megatron_switchlora.checkpoint.files import describe, leftovers, prune, publish, published, step_name
from megatron_switchlora.config.checkpoint import CheckpointConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import make_durable, remove
from megatron_switchlora.distributed.consensus import await_all, gather_texts, on_one_rank
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.planning.memory import checkpoint_bytes


@dataclass
class Writing:
    """A save in progress: what the writing thread needs, and its results."""

    step: int
    building: Path
    slices: list[TensorSlice]
    extra: dict[str, bytes]
    stall: float = 0.0
    started_at: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""
    thread: Optional[threading.Thread] = None


class Saver:
    """Write the checkpoints of a run into `folder`; `print_line` prints on rank 0.

    All methods except `written` are collective.
    """

    def __init__(self, folder: Path, engine: Engine, keep: CheckpointConfig, print_line: Callable[[str], None]) -> None:
        self.folder, self.engine, self.keep, self.print_line = folder, engine, keep, print_line
        self.expected = checkpoint_bytes(engine.config, engine.model.vocab_size)
        self.rank, self.device = dist.get_rank(), engine.device
        self.history: list[dict[str, float]] = []  # the published checkpoints, on rank 0
        self._host: dict[int, Tensor] = {}
        self._writing: Optional[Writing] = None

    @property
    def written(self) -> bool:
        """Whether this rank has a save that is fully written."""
        return self._writing is not None and not (self._writing.thread and self._writing.thread.is_alive())

    def save(self, step: int, extra: dict[str, bytes]) -> None:
        """Save the state after `step` steps, with rank 0's `extra` files."""
        started_at = time.perf_counter()
        self.finish()
        building = self.folder / f".building-{step_name(step)}"
        problem = on_one_rank(self.rank == 0, lambda: self._prepare(building))
        if problem:
            self._warn(step, problem)
            return
        writing = Writing(step, building, self._stage(), extra if self.rank == 0 else {})
        self._writing = writing
        if self.keep.background:
            writing.thread = threading.Thread(target=self._write, args=[writing], daemon=True)
            writing.thread.start()
        else:
            self._write(writing)
        writing.stall = time.perf_counter() - started_at

    def _prepare(self, building: Path) -> str:
        """Create an empty folder for a save, on rank 0; return why that fails, or "".

        Raises:
            UserError: the run folder has vanished.
        """
        if not self.folder.parent.is_dir():
            raise UserError(
                f"The run folder {self.folder.parent} has vanished, so nothing can be saved and the run stops: restore "
                "it and start again with the same command line."
            )
        try:
            remove(building)
            building.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return ""

    @torch.no_grad()
    def _stage(self) -> list[TensorSlice]:
        """Copy what this rank writes to host memory, which the next save uses again."""
        staged = []
        for number, held in enumerate(own_share(state_slices(self.engine), self.engine.mesh)):
            host = self._host.get(number)
            if host is None or host.shape != held.tensor.shape:
                pin = held.tensor.is_cuda
                host = torch.empty(held.tensor.shape, dtype=held.tensor.dtype, pin_memory=pin)
                self._host[number] = host
            host.copy_(held.tensor, non_blocking=True)
            staged.append(TensorSlice(held.name, held.shape, held.offset, host, held.group))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return staged

    def _write(self, writing: Writing) -> None:
        try:
            name = f"tensors-{self.rank:05d}.safetensors"
            write_slices(writing.building / name, writing.slices)
            for extra, content in writing.extra.items():
                path = writing.building / extra
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                make_durable(path)
            writing.files = {file: describe(writing.building / file) for file in (name, *writing.extra)}
        except Exception as error:  # `finish` reports it on all ranks
            writing.error = f"rank {self.rank}: {error}"
        writing.seconds = time.perf_counter() - writing.started_at

    def finish(self) -> None:
        """Wait on all ranks for the save in progress, if any, and publish it."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        if writing.thread:
            writing.thread.join()
        await_all()  # a disk may take longer than a collective waits
        report = {"files": writing.files, "error": writing.error, "seconds": writing.seconds}
        reports = [json.loads(text) for text in gather_texts(json.dumps(report))]
        errors = [report["error"] for report in reports if report["error"]]
        if self.rank == 0:
            self._publish(writing, reports, errors)
        await_all()

    def _publish(self, writing: Writing, reports: list[dict[str, Any]], errors: list[str]) -> None:
        files = {name: entry for report in reports for name, entry in report["files"].items()}
        try:
            if errors:
                raise OSError("; ".join(errors[:3]))
            publish(writing.building, self.folder / step_name(writing.step), writing.step, files)
        except OSError as error:
            shutil.rmtree(writing.building, ignore_errors=True)
            self._warn(writing.step, str(error))
            return
        size = sum(entry["size"] for entry in files.values())
        seconds = max(report["seconds"] for report in reports)
        self.history.append({"step": writing.step, "bytes": size, "stall": writing.stall, "seconds": seconds})
        self.print_line(
            f"checkpoint {step_name(writing.step)}: {size / 1e6:.2f} MB (by formula {self.expected / 1e6:.2f}); "
            f"training paused for {writing.stall:.3f} s, written after {seconds:.2f} s"
        )
        try:
            prune(self.folder, self.keep.keep_last, self.keep.keep_every)
        except (OSError, UserError) as error:
            self.print_line(f"warning: an old checkpoint cannot be deleted: {error}")

    def _warn(self, step: int, problem: str) -> None:
        try:
            last = published(self.folder)
            kept = f"the last one is {last[-1].name}" if last else "there is no earlier one"
        except UserError as error:
            kept = str(error)
        self.print_line(
            f"warning: checkpoint {step_name(step)} was not written ({problem}); {kept}. Training continues."
        )

    def clean(self) -> list[str]:
        """Remove saves and prunes that an earlier start left unfinished; return a sentence for each."""
        unfinished = leftovers(self.folder)
        for path in unfinished:
            with contextlib.suppress(OSError):
                remove(path)
        return [f"{path.name} was removed: an earlier start left it unfinished" for path in unfinished]
