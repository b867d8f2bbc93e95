"""Create, lock and write the run folder.

    config.yaml, ds_config.json   resolved configuration
    meta.json                     versions, git revision, mesh, counts, data, outcome
    metrics.jsonl                 one object per step and per evaluation
    metrics.head_XX.jsonl         one object per step of an LTE head, from its first rank
    loss.png, tokenizer/, final/  curve, tokenizer, the merged model in Hugging Face's format
    checkpoints/                  published checkpoints
    metrics.dropped*.jsonl        records written after the checkpoint from which a run was resumed, and damaged lines
    tensorboard/, wandb/          the records for TensorBoard and W&B, if log.* chooses them
    profile/                      a trace of the steps of train.profile
Except for the heads' records only rank 0 writes, and it holds a lock on the folder. Files are replaced by renames.
Links in the folder are replaced or refused, and never written through. Only `checkpoints` may be a link.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Optional

from safetensors import SafetensorError

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.yaml_text import dump_yaml
from megatron_switchlora.disk import open_no_follow, read_json, remove_asides, replace_text, shown, take_lock
from megatron_switchlora.distributed.head_names import LABEL, head_label
from megatron_switchlora.run.figures import decorating, new_figure, save_figure
from megatron_switchlora.run.loggers import Loggers, LogStart, open_loggers, wandb_entry
from megatron_switchlora.run.metrics_log import RecordFile, as_line, keep_records, read_records, sort_records
from megatron_switchlora.run.profile import StepTrace

RUN_FILES = ("config.yaml", "ds_config.json", "metrics.jsonl", "meta.json", "tokenizer", "checkpoints", "final")
ASIDES = (*map(re.escape, RUN_FILES), "loss\\.png", rf"metrics\.{LABEL}\.jsonl")
META: dict[str, type] = {  # all entries of meta.json that are read anywhere
    "finished": bool, "branched_from": str, "resumed_at": list, "data": str, "val_loss": float, "device": str,
    "parameters": dict, "vocab_size": int, "versions": dict, "wandb": dict,
    "tensorboard": bool,
}  # fmt: skip


def _files_of_run(folder: Path) -> list[str]:
    """Return the names of a run's files in the folder.

    An empty `checkpoints` does not count, as it may be prepared, for example as a link to a larger disk.
    """
    files = [name for name in RUN_FILES if os.path.lexists(folder / name)]
    with contextlib.suppress(OSError):  # an unreadable folder gives an error when it is read
        if "checkpoints" in files and not os.listdir(folder / "checkpoints"):
            files.remove("checkpoints")
    return files


def holds_run(folder: Path) -> bool:
    """Return whether the folder holds any file of a run."""
    return bool(_files_of_run(folder))


def refuse_folder(folder: Path) -> None:
    """Require that the folder holds no run and can be created.

    Raises:
        UserError: it holds a run, or cannot be created.
    """
    for link in (folder / "checkpoints", folder, *folder.absolute().parents):
        if link.is_symlink() and not link.exists():
            raise UserError(
                f"The output folder {folder} cannot be used: {link} is a link to {os.readlink(link)}, which does not "
                "exist. Create that folder, or remove the link."
            )
    files = _files_of_run(folder)
    if files:
        raise UserError(
            f"The output folder {folder} already holds a run ({', '.join(files)}), which is never overwritten: choose "
            "another --output_dir, or move the folder away."
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"The output folder {folder} cannot be made: {parent} is not a folder with write access. Choose another "
            "--output_dir."
        )
    if (folder / ".lock").is_symlink():
        raise _is_link(folder / ".lock")


def _is_link(path: Path) -> UserError:
    return UserError(f"{path} is a link, and nothing is written through links: remove it, or choose another folder.")


def create_folder(folder: Path) -> Path:
    """Create the folder and claim it with an empty metrics.jsonl, which only one run can create.

    Raises:
        UserError: it holds a run, or cannot be written.
    """
    refuse_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch(exist_ok=False)
    except FileExistsError:
        raise UserError(f"The output folder {folder} was just taken by another run: choose another.") from None
    except OSError as error:
        raise UserError(
            f"The output folder {folder} cannot be written: {error.strerror}. Choose another --output_dir."
        ) from None
    return folder


def default_folder(method: str) -> Path:
    """Create runs/<method>-<date>-<time>, numbered if another run has taken that second.

    Raises:
        UserError: runs/ cannot be written.
    """
    base = f"{method}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 100):
        folder = Path("runs") / (base if number == 1 else f"{base}-{number}")
        if not folder.exists():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return create_folder(folder)
    raise UserError(f"A hundred runs already use the name {Path('runs') / base}: give --output_dir.")


def lock_folder(folder: Path) -> BinaryIO:
    """Lock a run folder until the returned file is closed.

    Raises:
        UserError: another process writes there, the folder cannot be written, or the lock is a link.
    """
    if (folder / ".lock").is_symlink():
        raise _is_link(folder / ".lock")
    with in_folder(folder):
        file = open_no_follow(folder / ".lock", os.O_RDWR | os.O_CREAT)
        if not take_lock(file):
            raise UserError(f"Another process is running in {folder}: wait until it ends, or choose another folder.")
        remove_asides(folder, ASIDES)
    return file


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a run's meta.json, without entries of an unexpected type.

    It is empty if there is no file, or a crash of the machine has damaged it.
    """
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError):
        return {}
    meta = meta if isinstance(meta, dict) else {}
    return {key: value for key, value in meta.items() if isinstance(value, META.get(key, object))}


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Turn errors of writing to the folder into advice.

    Raises:
        UserError: the disk is full or read-only.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room or give access, then start again with this --output_dir; "
            "the run resumes from its newest checkpoint."
        ) from None


class RunFolder:
    """Write one run's files: rank 0 writes all but the records of LTE heads.

    This rank writes the records of `heads`, whose first rank it is. Records of an earlier start stay up to
    `keep_steps`; with None the folder is new. `history` holds rank 0's records on all ranks.
    """

    def __init__(self, path: Path, writes: bool, keep_steps: Optional[int] = None, heads: Iterable[int] = ()) -> None:
        self.path, self.writes = path, writes
        self.meta: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.loggers, self.trace, self._resumed = Loggers(), StepTrace(path, None, print), keep_steps
        self._logged: list[dict[str, Any]] = []  # the records of earlier starts, those that do not stay included
        if keep_steps is not None:
            self.meta = read_meta(path)
            if "wandb" in self.meta and writes and not (path / "metrics.jsonl").is_symlink():
                self._logged = read_records(path / "metrics.jsonl")
            self.history = self._kept(path / "metrics.jsonl", keep_steps, writes)
        self.metrics = RecordFile(path / "metrics.jsonl") if writes else None
        self.heads: dict[int, RecordFile] = {}
        for head in heads:
            records = path / f"metrics.{head_label(head)}.jsonl"
            self._kept(records, keep_steps or 0, True)
            self.heads[head] = RecordFile(records)
        stat = path.stat()
        self._identity = (stat.st_dev, stat.st_ino)

    def _kept(self, path: Path, steps: int, writes: bool) -> list[dict[str, Any]]:
        """Return the records of a file that stay; add to `notes` what happens to the others."""
        if not writes:
            return sort_records(path, steps).records
        exists = path.exists() and not path.is_symlink()
        kept, note = keep_records(path, steps)
        self.notes += [note] * bool(note)
        lost = steps - sum("loss" in record for record in kept.records)
        if steps and not exists:
            self.notes.append(f"{path.name} was missing: it starts again after step {steps}")
        elif steps and lost > 0 and path.stem == "metrics" and "branched_from" not in self.meta:  # a branch starts late
            self.notes.append(f"{path.name} has no record of {lost} of the {steps} earlier steps")
        return kept.records

    def write_config(self, config: RunConfig, ds_config: dict[str, Any]) -> None:
        if self.writes:
            replace_text(self.path / "config.yaml", dump_yaml(config.to_dict()))
            replace_text(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")

    def update_meta(self, **entries: Any) -> None:
        """Add entries to meta.json."""
        self.meta.update(entries)
        if self.writes:
            replace_text(self.path / "meta.json", json.dumps(self.meta, indent=2) + "\n")

    def open_loggers(self, config: RunConfig, print_line: Callable[[str], None]) -> None:
        """Pass rank 0's records from now on to the loggers that the options choose, too, and trace its steps."""
        if self.writes:
            chosen = config.log.wandb != "none"
            entry = wandb_entry(self.meta.get("wandb", {}), self._logged, self._resumed, chosen)
            complete = self.meta.get("tensorboard", False)
            self.update_meta(**({"wandb": entry} if entry else {}), tensorboard=False)  # until they have started
            start = LogStart(self.path, config, self.history, self._resumed, entry, complete)
            self.loggers = open_loggers(start, print_line, self.update_meta)
            self.trace = StepTrace(self.path, config.train.profiled, print_line)

    def log(self, record: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl, pass it to the loggers, and write a trace that ends with it."""
        self.history.append(record)
        if self.metrics is not None:
            self.metrics.log(record)
        self.loggers.log(record)
        self.trace.recorded(record["step"])

    def _files(self) -> list[RecordFile]:
        return [*([self.metrics] if self.metrics else []), *self.heads.values()]

    def flush(self) -> None:
        """Make the records durable."""
        for file in self._files():
            file.flush()
        self.loggers.flush()

    def require_there(self, what: str = "nothing can be saved") -> None:
        """Require that the run's folder is still in place; rewrite a metrics.jsonl that was deleted or replaced.

        Raises:
            UserError: the folder has vanished or was replaced; `what` is what fails because of it.
        """
        status = self.path.stat() if self.path.is_dir() else None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise UserError(
                f"The run folder {self.path} has vanished, so {what} and the run stops: restore it and start again "
                "with the same command line."
            )
        if self.metrics is not None and not self.metrics.in_place():
            keep_records(self.metrics.path, 0)  # move away what an editor has written there
            replace_text(self.metrics.path, "".join(map(as_line, self.history)))
            self.metrics.file.close()
            self.metrics = RecordFile(self.metrics.path)

    def plot(self) -> None:
        """Draw loss.png: the training loss of every step, and the validation loss."""
        if self.writes:
            with decorating("drawing loss.png"):
                self._plot()

    def _plot(self) -> None:
        figure = new_figure(7, 4.5)
        axes = figure.add_subplot()
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(r["step"], r[key]) for r in self.history if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=shown(self.path.name))
        axes.grid(alpha=0.3)
        save_figure(figure, self.path / "loss.png")

    def close(self) -> None:
        """Close the records, the trace and the loggers.

        Raises:
            OSError: some records cannot be written.
        """
        for file in self._files():
            file.close()
        self.trace.close()
        self.loggers.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the trace and the loggers of a run that an error ends."""
        self.trace.close()
        self.loggers.close(failed=error is not None)
