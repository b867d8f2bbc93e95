"""The run folder: what a run leaves behind, and who may write where.

    config.yaml, ds_config.json   resolved configuration
    meta.json                     versions, git revision, mesh, counts, data, outcome
    metrics.jsonl                 one object a step, one an evaluation
    loss.png, tokenizer/, final/  curve, tokenizer, the merged model in Hugging Face's format
Only rank 0 writes. A folder that holds a run already is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import yaml

from megatron_switchlora.config import RunConfig, UserError

RUN_FILES = ("config.yaml", "metrics.jsonl", "meta.json", "final")


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


class RunFolder:
    """Writes one run's files; on ranks other than 0 nothing is written."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.meta: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8") if writes else None

    def write_config(self, config: RunConfig, ds_config: dict[str, Any]) -> None:
        if self.writes:
            text = yaml.safe_dump(config.to_dict(), sort_keys=False)
            (self.path / "config.yaml").write_text(text, encoding="utf-8")
            (self.path / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")

    def update_meta(self, **entries: Any) -> None:
        """Add entries to meta.json."""
        self.meta.update(entries)
        if self.writes:
            (self.path / "meta.json").write_text(json.dumps(self.meta, indent=2) + "\n", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Append an object to metrics.jsonl, numbers in full precision."""
        self.history.append(record)
        if self._metrics is not None:
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            self._metrics.flush()

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
        if self._metrics is not None:
            self._metrics.close()
