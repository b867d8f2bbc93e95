"""The folders of the token cache: what one must hold, whether it still does, and who may build one.

meta.json names every file with its size, its SHA-256 and its modification time, and ends with its own sum. A start
looks at sizes, times and headers alone. A file whose time has changed is read whole once, by the holder of the cache's
lock, before it is believed again. Who is killed lets go of the lock, and of the folder it was building in: the next
builder removes that.
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
ALIVE = "alive"  # of a folder that is built in: a file that the builder holds locked
QUIET = 3600  # seconds; not every file system shows one host the locks of another
ABANDONED = 7 * 86400  # seconds; as long as ranks wait for a build


class Damaged(Exception):
    """A folder is not what was built: names the file and says why."""


# --- what is in a folder


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Make a build durable and write its meta.json."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        make_durable(path)  # first: a file system may set the time only then
    files = {path.relative_to(folder).as_posix(): _entry(path, _digest(path)) for path in sorted(paths)}
    _write_meta(folder, {**meta, "files": files})
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            make_durable(path)


def read_meta(folder: Path) -> dict[str, Any]:
    """Read meta.json. Raises: Damaged, if it is not as a build writes it."""
    try:
        meta = read_json(folder / "meta.json")
    except (OSError, ValueError) as error:
        raise Damaged(f"meta.json: {error}") from None
    sealed = isinstance(meta, dict) and meta.get("sha256", _own_sum(meta)) == _own_sum(meta)
    if not sealed or not _as_built(meta):
        raise Damaged("meta.json is not as the build wrote it")
    return dict(meta)


def touched(folder: Path) -> list[str]:
    """Names of the files that must be read before they are believed, for their times or for want of a sum.

    Raises:
        Damaged: a file is missing, has another size or, of tokens, another header.
    """
    meta = read_meta(folder)
    changed = []
    for name, entry in meta["files"].items():
        size, time_ns = (entry, None) if isinstance(entry, int) else (entry["size"], entry["mtime_ns"])
        try:
            status = (folder / name).stat()
        except OSError as error:
            raise Damaged(f"{name}: {error}") from None
        except ValueError:
            raise Damaged(f"meta.json holds {name!r}, which is no file's name") from None
        if status.st_size != size:
            raise Damaged(f"{name} has {status.st_size} bytes, not {size}")
        if status.st_mtime_ns != time_ns:
            changed.append(name)
    for split in SPLITS:
        _open_tokens(folder, split, meta)
    return changed


def open_tokens(folder: Path, split: str) -> TokenStore:
    """Raises: Damaged."""
    return _open_tokens(folder, split, read_meta(folder))


def confirm(folder: Path) -> None:
    """Read the files that have been touched, and note times and sums for the next start if they are as they were built.
    The cache's lock is held where it can be.

    Raises:
        Damaged: a file is not.
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
        known = meta["files"][name]
        if isinstance(known, dict) and known["sha256"] != entry["sha256"]:
            raise Damaged(f"the content of {name} has changed since it was built")
        meta["files"][name] = entry
    with contextlib.suppress(OSError):  # where nothing can be written, each start reads them
        _write_meta(folder, meta)


def fault(folder: Path) -> str | None:
    """Why a folder is no cache, or None."""
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
    """Whether everything that is read of a meta.json is there, and of its type; sums came later than the rest."""
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


# --- who may build


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One builder at a time, also of several nodes that share the disk; who is killed lets go."""
    with open_no_follow(path, os.O_RDWR | os.O_CREAT) as file:
        with contextlib.suppress(OSError):  # a file system without locks: each builds its own, one is published
            take_lock(file, wait=True)
        try:
            yield
        finally:  # who waits for the file that goes finds the cache; if there is none, two may build it
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the one to build, which is known as a living builder's while this lasts."""
    prefix = f".{folder.name}-{os.getpid()}-"
    with TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
        starting = Path(name) / "starting"
        with open_no_follow(starting, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            with contextlib.suppress(OSError):  # a file system without locks: nobody can tell, nobody removes it
                take_lock(file)
            file.write(socket.gethostname().encode())
            starting.rename(starting.with_name(ALIVE))  # locked before it has this name
            yield Path(name)


def remove_leftovers(cache: Path) -> int:
    """Remove the folders of builds that were killed, and return their number."""
    unfinished = [path for path in cache.iterdir() if BUILDING.fullmatch(path.name) and not path.is_symlink()]
    dead = [path for path in unfinished if path.is_dir() and _is_dead(path)]
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    return len(dead)


def _is_dead(folder: Path) -> bool:
    try:
        with open_no_follow(folder / ALIVE, os.O_RDWR) as file:
            if not take_lock(file):  # its builder lives
                return False
            here = file.read() == socket.gethostname().encode()
            return here or _unchanged(folder) > QUIET
    except FileNotFoundError:  # of a version without such files, or killed in the first moment
        return _unchanged(folder) > ABANDONED
    except OSError:  # the file system has no locks
        return False


def _unchanged(folder: Path) -> float:
    """Seconds since anything in a folder was written; 0 where something has just gone."""
    try:
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except OSError:
        return 0.0


def publish(build: Path, folder: Path, scratch: Path) -> None:
    """Move a build to its place, unless another process has published a sound one; a damaged one gives way."""
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
