"""Seal, check and publish the folders of the token cache, and allow one builder at a time.

meta.json lists every file with its size, SHA-256 and modification time, and ends with a SHA-256 of itself. The start of
a run checks only sizes, times and headers. If a file's modification time has changed, the holder of the cache's lock
reads the whole file once before it is trusted again. A killed builder loses the lock. The next builder removes the
unfinished folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.loader import TokenStore
from megatron_switchlora.disk import make_durable, open_no_follow, read_json, replace_text, take_lock

SPLITS = ("train", "val")
BUILDING = re.compile(r"\.[0-9a-f]{20}-\d+-\w+")
ALIVE = "alive"  # a file in the build folder that the builder keeps locked
QUIET = 3600  # seconds; on some file systems one host does not see the locks of another
ABANDONED = 7 * 86400  # seconds; as long as ranks wait for a build


class Damaged(Exception):
    """A cache folder differs from what was built; the message names the file and the reason."""


# --- content of a folder


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Make a build durable and write its meta.json."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        make_durable(path)  # before its time is read: some file systems set the time only here
    files = {path.relative_to(folder).as_posix(): _entry(path, _digest(path)) for path in sorted(paths)}
    _write_meta(folder, {**meta, "files": files})
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            make_durable(path)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json.

    Raises:
        Damaged: it is not as a build writes it.
    """
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError) as error:
        raise Damaged(f"meta.json: {error}") from None
    sealed = isinstance(meta, dict) and meta.get("sha256", _own_sum(meta)) == _own_sum(meta)
    if not sealed or not _as_built(meta):
        raise Damaged("meta.json is not as the build wrote it")
    return dict(meta)


def touched(folder: Path) -> list[str]:
    """Return the names of the files that must be read before they are trusted.

    These are files whose modification time has changed, and files without a checksum.

    Raises:
        Damaged: a file is missing or has another size, or a token file has another header.
    """
    meta = read_meta(folder)
    untrusted = []
    for name, entry in meta["files"].items():
        size, time_ns = (entry, None) if isinstance(entry, int) else (entry["size"], entry["mtime_ns"])
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise Damaged(f"{name}: {error}") from None
        except ValueError:
            raise Damaged(f"meta.json lists {name!r}, which is not a valid file name") from None
        if status.st_size != size:
            raise Damaged(f"{name} has {status.st_size} bytes, not {size}")
        if status.st_mtime_ns != time_ns:
            untrusted.append(name)
    for split in SPLITS:
        _open_tokens(folder, split, meta)
    return untrusted


def open_tokens(folder: Path, split: str) -> TokenStore:
    """Open the tokens of one split.

    Raises:
        Damaged: the tokens or meta.json are not as built.
    """
    return _open_tokens(folder, split, read_meta(folder))


def confirm(folder: Path) -> None:
    """Read the touched files; if they are as built, record their times and checksums for the next start.

    The caller holds the cache's lock if the cache is writable.

    Raises:
        Damaged: a file is not as built.
    """
    names = touched(folder)
    if not names:
        return
    meta = read_meta(folder)
    for name in names:
        try:
            entry = _entry(folder / name, _digest(folder / name))
        except OSError as error:
            raise Damaged(f"{name}: {error}") from None
        recorded = meta["files"][name]
        if isinstance(recorded, dict) and recorded["sha256"] != entry["sha256"]:
            raise Damaged(f"the content of {name} has changed since it was built")
        meta["files"][name] = entry
    with contextlib.suppress(OSError):  # if the folder is read-only, each start reads the files again
        _write_meta(folder, meta)


def fault(folder: Path) -> str | None:
    """Return why a folder is not a valid cache, or None."""
    try:
        confirm(folder)
    except Damaged as damage:
        return str(damage)
    return None


def _entry(path: Path, digest: str) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "sha256": digest, "mtime_ns": status.st_mtime_ns}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sum(meta: dict[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    replace_text(folder / "meta.json", json.dumps({**meta, "sha256": _own_sum(meta)}, indent=1))


def _as_built(meta: dict[str, Any]) -> bool:
    """Return whether a meta.json holds all entries that are read, with valid types.

    Older caches have no checksums.
    """
    try:
        counts = [meta["vocab_size"], *(meta[split][name] for split in SPLITS for name in ("tokens", "bytes"))]
        entries = [entry for entry in meta["files"].values() if isinstance(entry, dict)]
        sizes = [entry["size"] if isinstance(entry, dict) else entry for entry in meta["files"].values()]
        return (
            {"train.npy", "val.npy", "tokenizer/tokenizer.json"} <= set(meta["files"])
            and all(type(count) is int and count > 0 for count in counts)
            and all(type(size) is int for size in sizes)
            and all(type(entry["mtime_ns"]) is int and type(entry["sha256"]) is str for entry in entries)
            and math.isfinite(meta["unigram_val_ppl"])
        )
    except (KeyError, TypeError, AttributeError, OverflowError):
        return False


def _open_tokens(folder: Path, split: str, meta: dict[str, Any]) -> TokenStore:
    try:
        store = TokenStore(folder / f"{split}.npy", meta["vocab_size"])
    except UserError as error:
        raise Damaged(str(error)) from None
    if store.num_tokens != meta[split]["tokens"]:
        raise Damaged(f"{split}.npy has {store.num_tokens} tokens, not {meta[split]['tokens']}")
    return store


# --- one builder at a time


@contextlib.contextmanager
def builder_lock(path: Path) -> Iterator[None]:
    """Hold the builders' lock, also against other nodes that share the disk; a killed builder loses it."""
    with open_no_follow(path, os.O_RDWR | os.O_CREAT) as file:
        with contextlib.suppress(OSError):  # a file system without locks: each process builds, one build is published
            take_lock(file, wait=True)
        try:
            yield
        finally:  # a process that waits for the removed file then finds the cache; without a cache, two may build it
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder beside the one to build, with a locked file that marks its builder as alive."""
    prefix = f".{folder.name}-{os.getpid()}-"
    with TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
        starting = Path(name) / "starting"
        with open_no_follow(starting, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            with contextlib.suppress(OSError):  # a file system without locks: then other builders leave the folder
                take_lock(file)
            file.write(socket.gethostname().encode())
            starting.rename(starting.with_name(ALIVE))  # only once it is locked
            yield Path(name)


def remove_leftovers(cache: Path) -> int:
    """Remove the folders of builds that were killed, and return their number."""
    builds = [path for path in cache.iterdir() if BUILDING.fullmatch(path.name) and not path.is_symlink()]
    dead = [path for path in builds if path.is_dir() and _is_dead(path)]
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    return len(dead)


def _is_dead(folder: Path) -> bool:
    try:
        with open_no_follow(folder / ALIVE, os.O_RDWR) as file:
            if not take_lock(file):  # its builder is alive
                return False
            same_host = file.read() == socket.gethostname().encode()
            return same_host or _unchanged(folder) > QUIET
    except FileNotFoundError:  # from a version without such files, or from a builder killed at its very start
        return _unchanged(folder) > ABANDONED
    except OSError:  # the file system has no locks
        return False


def _unchanged(folder: Path) -> float:
    """Return the seconds since anything in a folder was written; 0 if a file disappears meanwhile."""
    try:
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except OSError:
        return 0.0


def publish(build: Path, folder: Path, scratch: Path) -> None:
    """Move a build to its place, unless another process has published a valid one; replace a damaged one."""
    for attempt in range(3):
        try:
            os.rename(build, folder)
            make_durable(folder.parent)
            return
        except OSError:
            if attempt == 2 or not folder.exists():
                raise
        if fault(folder) is None:
            return
        os.rename(folder, scratch / f"damaged{attempt}")
