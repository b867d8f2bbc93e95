"""Publish, verify and prune checkpoint folders, so that a checkpoint is either complete or absent.

A folder is written under another name, made durable, then published by a rename.
    checkpoints/step-00000100/
        manifest.json         format, step, size and SHA-256 of every other file, and its own SHA-256
        state.json            configuration, data, mesh, versions, position in the schedule
        tensors-00000.safetensors ...   one per rank (`archive.py`)
        tokenizer/
    checkpoints/.building-step-00000100/    an unfinished save
    checkpoints/.deleting-step-00000050/    an unfinished prune
Names that start with a dot are never read. No file is unpickled. A folder step-... without manifest and tensors is not
a checkpoint and is ignored. A folder with tensors but no manifest is a damaged checkpoint, and an error.
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

FORMAT = 1  # raise it when older code can no longer read what is written
NAME = re.compile(r"step-([0-9]{8,15})")
HASH = re.compile(r"[0-9a-f]{64}")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def publish(building: Path, final: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Check the sizes of `files` (entries of `describe`), write the manifest, and rename the folder.

    Raises:
        OSError: a file is missing or has another size (ranks that do not share the folder), or the disk is full.
    """
    for name, entry in files.items():
        if (building / name).stat().st_size != entry["size"]:
            raise OSError(f"{building / name} has another size than its rank wrote: do all hosts share the folder?")
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
        make_durable(path)  # each rank has already made its own files durable


def seal(folder: Path, step: int) -> None:
    """Turn a folder that only this process has filled into a checkpoint."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    make_tree_durable(folder)
    write_manifest(folder, step, {str(path.relative_to(folder)): describe(path) for path in paths})


def build_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a new folder under another name, then rename it to `out`.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists already and is not overwritten: give a new folder.")
    building = out.with_name(f".building-{out.name}")
    try:
        remove(building)  # left by a conversion that was killed
        _fill_durably(building, fill)
        building.rename(out)
        make_durable(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or give another folder.") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Call `fill` on a new folder under another name, then replace `path` by it; a link is not followed.

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
    """Return the entries of a `checkpoints` folder, sorted; none if there is no folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give access, or repair its disk.") from None


def _is_checkpoint(path: Path) -> bool:
    """Return whether a folder has a checkpoint's name and a checkpoint's files, or cannot be read."""
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
    """Return the published checkpoints in a `checkpoints` folder, oldest first.

    Raises:
        UserError: it cannot be read.
    """
    return sorted(filter(_is_checkpoint, _entries(folder)), key=step_of)


def strays(folder: Path) -> list[Path]:
    """Return the entries that are named like a checkpoint but are not one."""
    return [path for path in _entries(folder) if path.name.startswith("step-") and not _is_checkpoint(path)]


def leftovers(folder: Path) -> list[Path]:
    """Return the folders of unfinished saves and prunes."""
    return sorted(folder.glob(".building-*")) + sorted(folder.glob(".deleting-*"))


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints except the last `keep_last` and those at multiples of `keep_every` steps (0: none)."""
    for path in published(folder)[:-keep_last]:
        if not keep_every or step_of(path) % keep_every:
            aside = path.with_name(f".deleting-{path.name}")
            path.rename(aside)
            shutil.rmtree(aside)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest has been read."""

    folder: Path
    step: int
    files: dict[str, dict[str, Any]]

    def faults(self, names: Iterable[str]) -> list[str]:
        """Return a sentence for each of the named files that is missing or damaged."""
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
        """Return the verified content of state.json.

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
            damaged(self.folder, "state.json has fields of other types than a checkpoint's")
        return {"step": self.step, **state}

    def archive(self) -> Archive:
        """Open the checkpoint's tensors; check `faults` first."""
        return Archive([self.folder / name for name in sorted(self.files) if name.endswith(".safetensors")])


def _is_state(state: Any) -> bool:
    """Return whether the fields of state.json that are present have the right types.

    The fields of the configuration are checked by whoever reads it.
    """
    kinds = {"step": int, "vocab_size": int, "data": str, "tokenizer": str, "config": dict}
    return isinstance(state, dict) and all(type(state[key]) is kind for key, kind in kinds.items() if key in state)


def damaged(folder: Path, fault: str) -> NoReturn:
    """Raise the error of a damaged checkpoint, with advice.

    Raises:
        UserError: always.
    """
    others = [path.name for path in published(folder.parent) if path.name != folder.name]
    advice = f"move it away to resume from {others[-1]}" if others else "move it away (there is no other)"
    raise UserError(f"Checkpoint {shown(folder)} is damaged: {fault}. Restore it, or {advice}.")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest, but none of its other files.

    Raises:
        UserError: the folder is not a checkpoint, its save is unfinished, its manifest is damaged, or its format is
            newer.
    """
    if folder.name.startswith("."):
        raise UserError(f"{folder} is an unfinished save: give a published checkpoint (step-...).")
    content = _read_manifest(folder)
    if content["format"] > FORMAT:
        raise UserError(
            f"Checkpoint {folder} has format {content['format']}, but this code reads formats up to {FORMAT}: use the "
            "version of megatron_switchlora that wrote it, or a newer one."
        )
    if not _are_files(content.get("files")) or type(content.get("step")) is not int or content["step"] < 0:
        damaged(folder, "manifest.json lacks entries of a checkpoint's manifest")
    outside = [name for name in content["files"] if _reaches_out(name)]
    if outside:
        raise UserError(f"Checkpoint {folder}: its manifest lists {outside[0]}, which is outside of the folder.")
    if "state.json" not in content["files"]:
        raise UserError(f"Checkpoint {folder}: its manifest lists no state.json.")
    named = NAME.fullmatch(folder.name)
    if named and int(named[1]) != content["step"]:
        raise UserError(f"Checkpoint {folder} is of step {content['step']}: restore its name.")
    return Checkpoint(folder, content["step"], content["files"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a manifest that matches its own SHA-256 and has a format."""
    try:
        manifest = read_json(folder / "manifest.json")
        content, sha256 = manifest["content"], manifest["sha256"]
        intact, has_format = _own_digest(content) == sha256, type(content["format"]) is int
    except (FileNotFoundError, NotADirectoryError):
        if _is_checkpoint(folder):
            damaged(folder, "it has lost its manifest.json")
        raise UserError(
            f"{folder} is not a checkpoint: it has no manifest.json. Give a folder step-... of a run's checkpoints/."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        damaged(folder, f"manifest.json cannot be read ({error})")
    if not intact or not has_format:
        damaged(folder, "manifest.json " + ("has no format" if intact else "does not match its own SHA-256"))
    return content


def _are_files(files: Any) -> bool:
    """Return whether every name has a size and a digest."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and HASH.fullmatch(entry["sha256"])
        for entry in files.values()
    )


def _reaches_out(name: str) -> bool:
    """Return whether a file's name is a path outside of its folder."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name


def verified(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify all of its files in this process.

    Raises:
        UserError: as `open_checkpoint`; or files are missing or damaged, and the message names them.
    """
    checkpoint = open_checkpoint(folder)
    faults = checkpoint.faults(checkpoint.files)
    if faults:
        damaged(folder, "; ".join(faults))
    return checkpoint
