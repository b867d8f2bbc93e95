"""Files that other programs, people or crashes may have changed: no link is followed where we write, and damage of any
kind is one error where we read.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, BinaryIO, Optional


def user_path(text: str) -> Path:
    """A path that a user has typed, with ~ expanded. The shell does not expand it in --option=~/x or in a file.

    Raises:
        ValueError: nobody is known by that name here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text} begins with a home folder that is not known here: write the path in full") from None


def settle_home(env: MutableMapping[str, str]) -> Optional[str]:
    """Where there is no home folder, as in containers with arbitrary user ids (some call it /), name one for the caches
    of all libraries, before they are imported; returns what to say of it.

    Raises:
        ValueError: somebody else has taken its place.
    """
    home = os.path.expanduser("~")
    existing = next((path for path in (Path(home), *Path(home).parents) if path.is_dir()), Path("/"))
    if home != "~" and ((home != "/" and str(existing) == home) or os.access(existing, os.W_OK)):
        return None
    place = Path(tempfile.gettempdir()) / f"megatron_switchlora-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"{place} belongs to somebody else: set HOME to a folder of your own")
    env["HOME"] = str(place)
    return f"there is no home folder (HOME): caches are kept in {place}; set HOME to choose another"


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
