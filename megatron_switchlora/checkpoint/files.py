"""A checkpoint is complete or absent: folders are written aside, made durable, then published by a rename.

    checkpoints/step-00000100/
        manifest.json         format, step, size and SHA-256 of every other file, and its own SHA-256
        state.json            configuration, data, mesh, versions, position in the schedule
        tensors-00000.safetensors ...   one a rank (`archive.py`)
        tokenizer/
    checkpoints/.building-step-00000100/    a save that has not ended; .deleting-*: a prune that has not
Nothing whose name begins with a dot is ever read. No file is unpickled. What is named step-... and holds neither a
manifest nor tensors is no checkpoint and passed over; one that has lost its manifest stands in the way, by its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from megatron_switchlora.checkpoint.archive import Archive
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import aside_name, make_durable, make_tree_durable, read_json, remove, shown

FORMAT = 1  # raise it when older code could not read what is written
NAME = re.compile(r"step-([0-9]{8,15})")
HASH = re.compile(r"[0-9a-f]{64}")


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
        make_durable(path)  # the other files are already: each was by the rank that wrote it


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
    if os.path.lexists(out):
        raise UserError(f"{out} exists already and is not overwritten: give a new folder.")
    building = out.with_name(f".building-{out.name}")
    try:
        remove(building)  # of an earlier conversion that was killed
        _fill_durably(building, fill)
        building.rename(out)
        make_durable(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or give another folder.") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write a folder aside, then put it in place of what is at `path`: a link is replaced, not followed.

    Raises:
        OSError, SafetensorError: the disk is full, or the folder is gone.
    """
    building = aside_name(path)
    try:
        _fill_durably(building, fill)
        remove(path)
        building.rename(path)
        make_durable(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fill_durably(building: Path, fill: Callable[[Path], object]) -> None:
    building.mkdir(parents=True)
    fill(building)
    make_tree_durable(building)


def _entries(folder: Path) -> list[Path]:
    """What is in a `checkpoints` folder, if there is one.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give access, or mend its disk.") from None


def _is_checkpoint(path: Path) -> bool:
    """Whether it has a checkpoint's name and something of one in it, or something that cannot be looked at."""
    named = NAME.fullmatch(path.name)
    if not named or path.name != step_name(int(named[1])):
        return False
    try:
        inside = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return any(name in ("manifest.json", "state.json") or name.endswith(".safetensors") for name in inside)


def published(folder: Path) -> list[Path]:
    """The published checkpoints in a `checkpoints` folder, oldest first.

    Raises:
        UserError: it cannot be read.
    """
    return sorted(filter(_is_checkpoint, _entries(folder)), key=step_of)


def strays(folder: Path) -> list[Path]:
    """What is named like a checkpoint there and is none."""
    return [path for path in _entries(folder) if path.name.startswith("step-") and not _is_checkpoint(path)]


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
        return [fault for name in names if (fault := self._fault(name))]

    def _fault(self, name: str) -> str:
        path, entry = self.folder / name, self.files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            return "" if digest(path) == entry["sha256"] else f"{name} is damaged: its SHA-256 is not the manifest's"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    def state(self) -> dict[str, Any]:
        """state.json, verified.

        Raises:
            UserError: it is missing or damaged.
        """
        faults = self.faults(["state.json"])
        if faults:
            damaged(self.folder, faults[0])
        try:
            state = read_json(self.folder / "state.json")
        except (OSError, ValueError) as error:
            damaged(self.folder, f"state.json cannot be read ({error})")
        if not _is_state(state):
            damaged(self.folder, "state.json does not hold what a checkpoint's does")
        return {"step": self.step, **state}

    def archive(self) -> Archive:
        """Its tensors. Verify `faults` first."""
        return Archive([self.folder / name for name in sorted(self.files) if name.endswith(".safetensors")])


def _is_state(state: Any) -> bool:
    """Whether state.json's own fields have the right types, as far as they are there; the configuration's are those of
    whoever reads it."""
    kinds = {"step": int, "vocab_size": int, "data": str, "tokenizer": str, "config": dict}
    return isinstance(state, dict) and all(type(state[key]) is kind for key, kind in kinds.items() if key in state)


def damaged(folder: Path, fault: str) -> NoReturn:
    """Raises: UserError, with what to do about it."""
    others = [path.name for path in published(folder.parent) if path.name != folder.name]
    advice = f"move it away to go on from {others[-1]}" if others else "move it away (there is no other)"
    raise UserError(f"Checkpoint {shown(folder)} is damaged: {fault}. Restore it, or {advice}.")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest; its files are not looked at yet.

    Raises:
        UserError: not a checkpoint, a save that has not ended, a damaged manifest, or a newer format.
    """
    if folder.name.startswith("."):
        raise UserError(f"{folder} is a checkpoint whose save has not ended: give a published one (step-...).")
    content = _read_manifest(folder)
    if content["format"] > FORMAT:
        raise UserError(
            f"Checkpoint {folder} has format {content['format']}, this code reads formats up to {FORMAT}: use the "
            "version of megatron_switchlora that wrote it, or a newer one."
        )
    if not _are_files(content.get("files")) or type(content.get("step")) is not int or content["step"] < 0:
        damaged(folder, "manifest.json does not hold what a checkpoint's does")
    strange = [name for name in content["files"] if _reaches_out(name)]
    if strange or "state.json" not in content["files"]:
        raise UserError(f"Checkpoint {folder}: its manifest names {strange[0] if strange else 'no state.json'}.")
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != content["step"]:
        raise UserError(f"Checkpoint {folder} is of step {content['step']}: give it back its name.")
    return Checkpoint(folder, content["step"], content["files"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest that fits its own SHA-256, with a format."""
    try:
        manifest = read_json(folder / "manifest.json")
        content, own = manifest["content"], manifest["sha256"]
        intact, numbered = _own_digest(content) == own, type(content["format"]) is int
    except (FileNotFoundError, NotADirectoryError):
        if _is_checkpoint(folder):
            damaged(folder, "it has lost its manifest.json")
        raise UserError(
            f"{folder} is not a checkpoint: it has no manifest.json. Give a folder step-... of a run's checkpoints/."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        damaged(folder, f"manifest.json cannot be read ({error})")
    if not intact or not numbered:
        damaged(folder, "manifest.json " + ("has no format" if intact else "does not fit its own SHA-256"))
    return content


def _are_files(files: Any) -> bool:
    """Whether it has a size and a digest for every name."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and HASH.fullmatch(entry["sha256"])
        for entry in files.values()
    )


def _reaches_out(name: str) -> bool:
    """Whether a file's name is no path below its folder."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name


def verified(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify all of its files, on this process alone.

    Raises:
        UserError: as `open_checkpoint`, or files that are missing or damaged, named.
    """
    checkpoint = open_checkpoint(folder)
    faults = checkpoint.faults(checkpoint.files)
    if faults:
        damaged(folder, "; ".join(faults))
    return checkpoint
