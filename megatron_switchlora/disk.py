"""Files that other programs, people or crashes may have changed: no link is followed where we write, and damage of any
kind is one error where we read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO, Optional

LARGEST_JSON = 1 << 28  # bytes; a manifest of ten thousand ranks has a hundredth of it


def user_path(text: str) -> Path:
    """A path that a user has typed, with ~ expanded. The shell does not expand it in --option=~/x or in a file.

    Raises:
        ValueError: ~ stands for a home folder that this machine does not know.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{text!r} begins with a home folder that this machine does not know: write the whole path, or ./ before it"
        ) from None


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
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError(f"{place} belongs to somebody else: set HOME to a folder of your own")
    env["HOME"] = str(place)
    return f"there is no home folder (HOME): caches are kept in {place}; set HOME to choose another"


def shown(path: object) -> str:
    """A path for people to read: a name that is not UTF-8 gets marks for what cannot be shown."""
    return str(path).encode(errors="replace").decode()


def parse_json(text: str | bytes) -> Any:
    """Raises: ValueError, if it is not UTF-8, not JSON, or nested deeper than anything of ours."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: not UTF-8, not JSON, nested deeper or larger than any file of ours.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is larger than {LARGEST_JSON >> 20} MiB")
    return parse_json(path.read_text(encoding="utf-8"))


def open_no_follow(path: Path, flags: int) -> BinaryIO:
    """Open a plain file for writing, unbuffered; make it if `flags` hold O_CREAT.

    Raises:
        OSError: ELOOP if the path itself is a link, EINVAL if it is a pipe or device, and whatever else is in the way.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a plain file", str(path))
    access = {os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    return os.fdopen(handle, access, buffering=0)  # type: ignore[return-value]


def take_lock(file: BinaryIO, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return whether it is locked, which without `wait` another may prevent.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def make_durable(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_tree_durable(folder: Path) -> None:
    """Flush a folder and all that is in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            make_durable(path)


def aside_name(path: Path) -> Path:
    """A fresh name beside `path`, hidden, under which what will be `path` is made."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def remove_asides(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed writers of these names have left under names of `aside_name`; the folder must be locked."""
    ours = re.compile(rf"\.(?:{'|'.join(names)})\.[0-9a-f]{{8}}")
    for path in list(folder.iterdir()):
        if ours.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, whose target stays; it need not be there.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old or the new one. A link at `path` is replaced, not followed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    aside = aside_name(path)
    with open_no_follow(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        try:
            write_all(file, content)
            os.fsync(file.fileno())
            aside.rename(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def replace_text(path: Path, text: str) -> None:
    """The same for text, as UTF-8."""
    replace_bytes(path, text.encode())


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder leads out of it through links. In the cache of the Hugging Face hub, whose snapshots
    are links into blobs/, the folder is that of the whole repository."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    return not path.resolve().is_relative_to(home)
