"""A checkpoint is complete or absent: folders are written aside, made durable, then published by a rename.

    checkpoints/step-00000100/
        manifest.json         format, step, size and SHA-256 of every other file, and its own SHA-256
        state.json            configuration, data, mesh, versions, position in the schedule
        tensors-00000.safetensors ...   one a rank (`archive.py`)
        tokenizer/
    checkpoints/.building-step-00000100/    a save that has not ended; .deleting-*: a prune that has not
Nothing whose name begins with a dot is ever read. No file is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_switchlora.checkpoint.archive import Archive
from megatron_switchlora.config import UserError
from megatron_switchlora.disk import make_durable, make_tree_durable

FORMAT = 1  # raise it when older code could not read what is written
MEND = "Restore it, or move it away."
NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(building: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `files` (as `describe` says them), check that they are all there, and rename.

    Raises:
        OSError: a file is missing or has another size (ranks that do not share the folder), or the disk is full.
    """
    for name, entry in files.items():
        if (building / name).stat().st_size != entry["size"]:
            raise OSError(f"{building / name} has not the size that its rank wrote: is the folder on all hosts?")
    write_manifest(building, step, files)
    building.rename(final)
    make_durable(final.parent)


def write_manifest(building: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a folder and make it durable."""
    content = {"format": FORMAT, "step": step, "files": files}
    manifest = building / "manifest.json"
    text = json.dumps({"content": content, "sha256": _own_digest(content)}, indent=1)
    manifest.write_text(text + "\n", encoding="utf-8")
    for path in (manifest, *(folder for folder in building.rglob("*") if folder.is_dir()), building):
        make_durable(path)


def seal(folder: Path, step: int) -> None:
    """Make a folder that this process alone has filled a checkpoint."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    make_tree_durable(folder)
    write_manifest(folder, step, {str(path.relative_to(folder)): describe(path) for path in paths})


def build_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a new folder aside, then rename it to `out`.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already and is not overwritten: give a new folder.")
    building = out.with_name(f".building-{out.name}")
    try:
        shutil.rmtree(building, ignore_errors=True)  # of an earlier conversion that was killed
        building.mkdir(parents=True)
        fill(building)
        make_tree_durable(building)
        building.rename(out)
        make_durable(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or give another folder.") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def published(folder: Path) -> list[Path]:
    """The published checkpoints in a `checkpoints` folder, oldest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def leftovers(folder: Path) -> list[Path]:
    """Saves and prunes that were cut off."""
    return sorted(folder.glob(".building-*")) + sorted(folder.glob(".deleting-*"))


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints but the last `keep_last` and those at multiples of `keep_every` steps (0: none)."""
    for path in published(folder)[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            aside = path.with_name(f".deleting-{path.name}")
            path.rename(aside)
            shutil.rmtree(aside)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest was read."""

    folder: Path
    step: int
    files: dict[str, dict[str, Any]]

    def faults(self, names: Iterable[str]) -> list[str]:
        """What is wrong with some of its files, a sentence each."""
        found = []
        for name in names:
            path, entry = self.folder / name, self.files[name]
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != entry["size"]:
                found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
            elif digest(path) != entry["sha256"]:
                found.append(f"{name} is damaged: its SHA-256 is not the manifest's")
        return found

    def state(self) -> dict[str, Any]:
        """state.json, verified.

        Raises:
            UserError: it is missing or damaged.
        """
        faults = self.faults(["state.json"])
        if faults:
            raise UserError(f"Checkpoint {self.folder} is damaged: {faults[0]}. {MEND}")
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def archive(self) -> Archive:
        """Its tensors. Verify `faults` first."""
        return Archive([self.folder / name for name in sorted(self.files) if name.endswith(".safetensors")])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest; its files are not looked at yet.

    Raises:
        UserError: not a checkpoint, a save that has not ended, a damaged manifest, or a newer format.
    """
    if folder.name.startswith("."):
        raise UserError(f"{folder} is a checkpoint whose save has not ended: give a published one (step-...).")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        content, own = manifest["content"], manifest["sha256"]
        intact = _own_digest(content) == own
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a checkpoint: it has no manifest.json. Give a folder step-... of a run's checkpoints/."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Checkpoint {folder} is damaged: manifest.json cannot be read ({error}). {MEND}") from None
    if not intact:
        raise UserError(f"Checkpoint {folder} is damaged: manifest.json does not fit its own SHA-256. {MEND}")
    if content["format"] > FORMAT:
        raise UserError(
            f"Checkpoint {folder} has format {content['format']}, this code reads formats up to {FORMAT}: use the "
            "version of megatron_switchlora that wrote it, or a newer one."
        )
    strange = [name for name in content["files"] if Path(name).is_absolute() or ".." in Path(name).parts]
    if strange or "state.json" not in content["files"]:
        raise UserError(f"Checkpoint {folder}: its manifest names {strange[0] if strange else 'no state.json'}.")
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != content["step"]:
        raise UserError(f"Checkpoint {folder} is of step {content['step']}: give it back its name.")
    return Checkpoint(folder, content["step"], content["files"])


def verified(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify all of its files, on this process alone.

    Raises:
        UserError: as `open_checkpoint`, or files that are missing or damaged, named.
    """
    checkpoint = open_checkpoint(folder)
    faults = checkpoint.faults(checkpoint.files)
    if faults:
        raise UserError(f"Checkpoint {folder} is damaged: {'; '.join(faults)}. {MEND}")
    return checkpoint
