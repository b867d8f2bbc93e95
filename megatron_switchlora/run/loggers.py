"""Pass rank 0's records to TensorBoard and Weights & Biases, as decorations whose failure does not stop the run.

They get the records of metrics.jsonl with the same keys, and a resumed run continues its curves:
    TensorBoard    events after the checkpoint are purged, as TensorBoard's own writer does it
    W&B            the run's id is in meta.json; records that an earlier start has logged are left out
A logger that is switched on later, or has failed, first gets the missing records of earlier starts. meta.json holds
what it has got.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.run.figures import decorating

Record = dict[str, Any]


@dataclass(frozen=True)
class LogStart:
    """Where loggers start."""

    folder: Path
    """The run folder."""
    config: RunConfig
    kept: list[Record] = field(default_factory=list)
    """The records of earlier starts that stay."""
    resumed: Optional[int] = None
    """The step of the checkpoint from which a run resumes in its folder; None for a new one."""
    wandb: dict[str, Any] = field(default_factory=dict)
    """W&B's entry in meta.json, as `wandb_entry` returns it."""
    complete: bool = False
    """Whether TensorBoard has got every record of earlier starts."""


class Logger(Protocol):
    """What gets a copy of every record."""

    def log(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...

    def entries(self, complete: bool) -> dict[str, Any]:
        """Return the entries in meta.json of a logger that gets every record, or of one that has failed."""
        ...


def own_folder(folder: Path) -> Path:
    """Create a folder of the run's, unless it is a link.

    Raises:
        OSError: it is a link, or cannot be created.
    """
    if folder.is_symlink():
        raise OSError(f"{folder} is a link, and nothing is written through links")
    folder.mkdir(exist_ok=True)
    return folder


class TensorBoard:
    """Writes event files to the run folder's tensorboard/, one event per record."""

    def __init__(self, start: LogStart) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # seconds
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = own_folder(start.folder / "tensorboard")
        first = not any(folder.glob("*.tfevents.*"))
        self._writer = EventFileWriter(str(folder), flush_secs=30)
        if not first:
            purged = start.resumed + 1 if start.resumed and start.complete else 0
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=purged, session_log=restart))
        for record in start.kept if first or not start.complete else ():
            self.log(record)

    def log(self, record: Record) -> None:
        """Add an event; TensorBoard keeps numbers in single precision."""
        numbers = {key: value for key, value in record.items() if key != "step" and value is not None}
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        event = self._event(wall_time=time.time(), step=record["step"], summary=self._summary(value=values))
        self._writer.add_event(event)

    def flush(self) -> None:
        """Write what waits in memory."""
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Write what waits in memory, and close the file."""
        self._writer.flush()  # raises what has failed in TensorBoard's thread, unlike `close`
        self._writer.close()

    def entries(self, complete: bool) -> dict[str, Any]:
        """Return whether the events are complete."""
        return {"tensorboard": complete}


def position(record: Record) -> list[int]:
    """Return a record's place in the order of records: its step, and 1 for an evaluation."""
    return [record["step"], int("val_loss" in record)]


def wandb_entry(before: dict[str, Any], logged: list[Record], resumed: Optional[int], chosen: bool) -> dict[str, Any]:
    """Return W&B's entry in meta.json: the run's id, the last record that it has got, and whether it gets more.

    It gets none until it has started; then `WandB.entries` is the entry.
    `before` is the entry of the previous start, whose records were `logged`. A run that starts from step 0 gets a new
    id, since W&B refuses steps that it already has. The entry is empty if W&B was never `chosen`.
    """
    if not resumed or set(before) != {"id", "until", "chosen"}:
        return {"id": secrets.token_hex(4), "until": [-1, 0], "chosen": False} if chosen else {}
    until = max([before["until"], *map(position, logged)]) if before["chosen"] else before["until"]
    return {"id": before["id"], "until": until, "chosen": False}


class WandB:
    """Writes a W&B run to the run folder's wandb/, and sends it with log.wandb online."""

    def __init__(self, start: LogStart) -> None:
        import wandb  # seconds

        own_folder(start.folder / "wandb")
        log, offline = start.config.log, start.config.log.wandb == "offline"
        self._id, self._until = start.wandb["id"], start.wandb["until"]
        settings = wandb.Settings(
            console="off", silent=offline, disable_git=True, disable_code=True, init_timeout=60, finish_timeout=300
        )
        self._run = wandb.init(
            dir=str(start.folder), mode="offline" if offline else "online", id=self._id,
            name=start.folder.absolute().name, project=log.wandb_project, entity=log.wandb_entity,
            group=log.wandb_group, config=start.config.to_dict(), resume=None if offline else "allow",
            allow_val_change=True, reinit="create_new", settings=settings,
        )  # fmt: skip
        for record in start.kept:
            self.log(record)

    def log(self, record: Record) -> None:
        """Add a record, unless an earlier start has added it."""
        if position(record) > self._until:
            self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])
            self._until = position(record)

    def flush(self) -> None:
        """Do nothing: W&B's own process writes what it has got."""

    def close(self, failed: bool) -> None:
        """Wait until W&B has written everything, or until its time-out."""
        self._run.finish(exit_code=int(failed))

    def entries(self, complete: bool) -> dict[str, Any]:
        """Return the run's id and the last record that it has got."""
        return {"wandb": {"id": self._id, "until": self._until, "chosen": complete}}


class Loggers:
    """Loggers by name; one that fails gives a warning and gets no more records.

    `update_meta` adds their entries to meta.json.
    """

    def __init__(
        self, print_line: Callable[[str], None] = print, update_meta: Callable[..., None] = lambda **entries: None
    ) -> None:
        self._open: dict[str, Logger] = {}
        self._print_line, self._update_meta = print_line, update_meta

    def add(self, name: str, make: Callable[[LogStart], Logger], start: LogStart) -> None:
        """Open a logger."""
        with decorating(f"{name}, which gets no records,", self._print_line):
            self._open[name] = make(start)
            self._note(self._open[name], complete=True)

    def _note(self, logger: Logger, complete: bool) -> None:
        with contextlib.suppress(OSError):  # a full disk: the next update of meta.json writes these entries, too
            self._update_meta(**logger.entries(complete))

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name in list(self._open):
            logger = self._open.pop(name)
            with decorating(f"{name}, which gets no more records,", self._print_line):
                act(logger)
                self._open[name] = logger
            if name not in self._open:
                self._note(logger, complete=False)

    def log(self, record: Record) -> None:
        """Pass a record to all."""
        self._each(lambda logger: logger.log(record))

    def flush(self) -> None:
        """Write what waits in memory."""
        self._each(lambda logger: logger.flush())

    def close(self, failed: bool = False) -> None:
        """Close all, those of a run that has `failed` as such; a second call does nothing."""
        self._each(lambda logger: logger.close(failed))
        self._open.clear()


def open_loggers(start: LogStart, print_line: Callable[[str], None], update_meta: Callable[..., None]) -> Loggers:
    """Return the loggers that the run's options choose."""
    loggers, log = Loggers(print_line, update_meta), start.config.log
    if log.tensorboard:
        loggers.add("TensorBoard", TensorBoard, start)
    if log.wandb != "none":
        loggers.add("Weights & Biases", WandB, start)
    return loggers
