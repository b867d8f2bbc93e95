"""The run folder: what a run leaves behind, and who may write where.

    config.yaml, ds_config.json   resolved configuration
    meta.json                     versions, git revision, mesh, counts, data, outcome
    metrics.jsonl                 one object a step, one an evaluation
    metrics.head_XX.jsonl         one a step of each LTE head, from its first rank
    loss.png, tokenizer/, final/  curve, tokenizer, the merged model in Hugging Face's format
    checkpoints/                  published checkpoints
    metrics.dropped.jsonl         records that were written after the checkpoint from which a run was resumed
But for the heads' records only rank 0 writes, and holds a lock on the folder. Files are replaced by renames.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional, TextIO

from safetensors import SafetensorError

from megatron_switchlora.config import RunConfig, UserError
from megatron_switchlora.disk import replace_text
from megatron_switchlora.train.records import RecordFile, keep_records, read_records
from megatron_switchlora.yaml_text import dump_yaml

RUN_FILES = ("config.yaml", "ds_config.json", "metrics.jsonl", "meta.json", "tokenizer", "checkpoints", "final")


def holds_run(folder: Path) -> bool:
    """Whether there is something of a run in the folder."""
    return any((folder / name).exists() for name in RUN_FILES)


def refuse_folder(folder: Path) -> None:
    """Raises: UserError, if the folder holds a run or could not be made."""
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found:
        raise UserError(
            f"The output folder {folder} already holds a run ({', '.join(found)}), which is never overwritten: choose "
            "another --output_dir or move the folder away."
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"The output folder {folder} cannot be made: {parent} is not a folder that can be written.")


def create_folder(folder: Path) -> Path:
    """Make the folder and claim it with an empty metrics.jsonl, which only one of two runs can do.

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
    raise UserError(f"A hundred runs have taken {Path('runs') / base}: give --output_dir.")


def _git(*arguments: str) -> Optional[str]:
    """What git says of the tree this package lies in, if it is one."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, Optional[str]]:
    """Versions of what computes, and the git revision with a mark if the tree is changed."""
    found: dict[str, Optional[str]] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("megatron_switchlora", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    revision = _git("rev-parse", "HEAD")
    found["git_revision"] = revision and revision + ("-changed" if _git("status", "--porcelain", "-uno") else "")
    return found


def lock_folder(folder: Path) -> TextIO:
    """Lock a run folder for the life of the process, or of the returned file.

    Raises:
        UserError: another process writes there, or nobody may.
    """
    with in_folder(folder):
        file = (folder / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is running in {folder}: wait for its end, or choose another.") from None
    return file


def read_meta(folder: Path) -> dict[str, Any]:
    """A run's meta.json; empty if there is none, or a crash of the machine has left it torn."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Raises: UserError, if what is written in the folder inside meets a full or read-only disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room or give access, then start again with this --output_dir; "
            "the run goes on from its newest checkpoint."
        ) from None


class RunFolder:
    """Writes one run's files; on ranks other than 0 nothing is written, but for the records of LTE heads whose first
    rank this is: those are named by `heads`. Records of an earlier start up to `keep_steps` stay, those of rank 0 are
    `history` on all ranks; with None the folder is new."""

    def __init__(self, path: Path, writes: bool, keep_steps: Optional[int] = None, heads: Iterable[int] = ()) -> None:
        self.path, self.writes = path, writes
        self.meta: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        if keep_steps is not None:
            self.history = [r for r in read_records(path / "metrics.jsonl") if keep_steps and r["step"] <= keep_steps]
            if writes:
                keep_records(path / "metrics.jsonl", keep_steps, path / "metrics.dropped.jsonl")
                self.meta = read_meta(path)
        self.metrics = RecordFile(path / "metrics.jsonl") if writes else None
        self.heads: dict[int, RecordFile] = {}
        for head in heads:
            own = path / f"metrics.head_{head:02d}.jsonl"
            keep_records(own, keep_steps or 0)
            self.heads[head] = RecordFile(own)

    def write_config(self, config: RunConfig, ds_config: dict[str, Any]) -> None:
        if self.writes:
            replace_text(self.path / "config.yaml", dump_yaml(config.to_dict()))
            replace_text(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")

    def update_meta(self, **entries: Any) -> None:
        """Add entries to meta.json."""
        self.meta.update(entries)
        if self.writes:
            replace_text(self.path / "meta.json", json.dumps(self.meta, indent=2) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl."""
        self.history.append(record)
        if self.metrics is not None:
            self.metrics.log(record)

    def _files(self) -> list[RecordFile]:
        return [*([self.metrics] if self.metrics else []), *self.heads.values()]

    def flush(self) -> None:
        """Make the records durable."""
        for file in self._files():
            file.flush()

    def plot(self) -> None:
        """loss.png: training loss of every step and validation loss."""
        if not self.writes:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(r["step"], r[key]) for r in self.history if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(self.path / "loss.png", dpi=120)

    def close(self) -> None:
        for file in self._files():
            file.close()
