"""Files that other programs, people or crashes may have changed: no link is followed where we write, and damage of any
kind is one error where we read.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO


def user_path(text: str) -> Path:
    """A path that a user has typed, with ~ expanded. The shell does not expand it in --option=~/x or in a file."""
    return Path(text).expanduser()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: not UTF-8, not JSON, or nested deeper than any file of ours.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def open_no_follow(path: Path, flags: int) -> BinaryIO:
    """Open a file for writing, unbuffered; make it if `flags` hold O_CREAT.

    Raises:
        OSError: ELOOP if the path itself is a link, and whatever else is in the way.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    access = {os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    return os.fdopen(handle, access, buffering=0)  # type: ignore[return-value]


def make_durable(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old or the new one. A link at `path` is replaced, not followed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open_no_follow(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        try:
            remaining = memoryview(text.encode())
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
            aside.rename(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder leads out of it through links. In the cache of the Hugging Face hub, whose snapshots
    are links into blobs/, the folder is that of the whole repository."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    return not path.resolve().is_relative_to(home)


def make_tree_durable(folder: Path) -> None:
    """Flush all that a folder holds to the disk."""
    for path in [*folder.rglob("*"), folder]:
        make_durable(path)
