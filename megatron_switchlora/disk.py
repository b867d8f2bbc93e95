"""Handle files that other programs, people or crashes may have changed.

Writers follow no symbolic link. Readers report damage of any kind as one error.
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
    """Return a path that a user has typed, with ~ expanded.

    The shell does not expand ~ in --option=~/x or inside a file.

    Raises:
        ValueError: this machine does not know the home folder that ~ stands for.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{text!r} begins with a home folder that this machine does not know: write the whole path, "
            "or put ./ before it"
        ) from None


def settle_home(env: MutableMapping[str, str]) -> Optional[str]:
    """Set HOME to a folder for caches where there is no home folder; return a notice, or None.

    Containers with arbitrary user ids have no home folder; some of them use / as one. Call this before importing
    libraries that keep caches.

    Raises:
        ValueError: the place for the caches belongs to another user.
    """
    home = os.path.expanduser("~")
    existing = next((path for path in (Path(home), *Path(home).parents) if path.is_dir()), Path("/"))
    if home != "~" and ((home != "/" and str(existing) == home) or os.access(existing, os.W_OK)):
        return None
    place = Path(tempfile.gettempdir()) / f"megatron_switchlora-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError(f"{place} belongs to another user: set HOME to a folder of your own")
    env["HOME"] = str(place)
    return f"there is no home folder (HOME): caches are kept in {place}; set HOME to choose another"


def shown(path: object) -> str:
    """Return a path for people to read; marks replace what is not UTF-8."""
    return str(path).encode(errors="replace").decode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, not JSON, nested too deeply, or larger than `LARGEST_JSON`.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path.name} is larger than {LARGEST_JSON >> 20} MiB")
    return parse_json(path.read_text(encoding="utf-8"))


def open_no_follow(path: Path, flags: int) -> BinaryIO:
    """Open a regular file for writing, unbuffered; create it if `flags` contain O_CREAT.

    Raises:
        OSError: ELOOP if the path is a symbolic link, EINVAL if it is a pipe or a device, or any other error of `open`.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a plain file", str(path))
    access = {os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    return os.fdopen(handle, access, buffering=0)  # type: ignore[return-value]


def take_lock(file: BinaryIO, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return whether this process holds the lock.

    Without `wait` the result is False while another process holds the lock.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write all of `content` to an unbuffered file, which may accept less per call."""
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
    """Flush a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            make_durable(path)


def aside_name(path: Path) -> Path:
    """Return a new hidden name beside `path`, under which to build what will become `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def remove_asides(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed writers of these names left under names of `aside_name`.

    The caller must hold the lock of the folder.
    """
    ours = re.compile(rf"\.(?:{'|'.join(names)})\.[0-9a-f]{{8}}")
    for path in list(folder.iterdir()):
        if ours.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it is there; the target of a link stays.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves either the old file or the new one.

    A symbolic link at `path` is replaced, not followed.

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
    """Write a text file, as UTF-8, in the way of `replace_bytes`."""
    replace_bytes(path, text.encode())


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder leads out of it through links.

    In the cache of the Hugging Face hub snapshots are links into blobs/, so the folder that counts is the whole
    repository's.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    return not path.resolve().is_relative_to(home)
