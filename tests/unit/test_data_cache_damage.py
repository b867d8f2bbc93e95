"""The token cache: whatever became of its files is found, named and built again; killed builds leave nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import TrainLoader, cache, loader, packing
from megatron_switchlora.data.loader import BatchOrder
from megatron_switchlora.data.packing import open_prepared, prepare
from tests.dist.launch import end_ranks, join_all, stand_alone, warm_interpreters

from .test_data_cache import no_build
from .test_data_packing import TRAIN, config, documents, tokens

Change = Callable[[bytes], bytes]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    found = config(tmp_path)
    found.cache_dir = str(tmp_path / "cache")
    return found


def zeros(content: bytes) -> bytes:
    return content[:-40] + bytes(40)


def odd_token(content: bytes) -> bytes:
    return content[:-10] + b"\xff\xff" + content[-8:]


def other_shape(content: bytes) -> bytes:
    return content.replace(b"(", b"(-", 1).replace(b"),", b"),", 1)


def pickled(content: bytes) -> bytes:
    return b"\x80\x04" + content[2:]


def changed_meta(change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> Change:
    """What meta.json becomes; sealed: by somebody who knows how its sum is made."""

    def damage(content: bytes) -> bytes:
        meta = json.loads(content)
        found = change(meta) or meta
        if sealed and isinstance(found, dict):
            found["sha256"] = cache._own_sum(found)
        return json.dumps(found).encode()

    return damage


DAMAGES: dict[str, tuple[str, Change | None]] = {
    "short": ("train.npy", lambda content: content[:-2]),
    "long": ("train.npy", lambda content: content + b"\0\0"),
    "gone": ("val.npy", None),
    "zeros": ("train.npy", zeros),
    "zeros in val": ("val.npy", zeros),
    "odd token": ("train.npy", odd_token),
    "dtype": ("train.npy", lambda content: content.replace(b"<u2", b"<i2")),
    "objects": ("train.npy", lambda content: content.replace(b"'<u2'", b"'|O8'"[:5])),
    "shape": ("train.npy", other_shape),
    "pickle": ("train.npy", pickled),
    "header": ("train.npy", lambda content: content[:10] + b"{" * 100 + content[110:]),
    "tokenizer cut": ("tokenizer/tokenizer.json", lambda content: content[:-2]),
    "tokenizer changed": ("tokenizer/tokenizer.json", lambda content: content.replace(b"the", b"eth", 1)),
    "meta cut": ("meta.json", lambda content: content[:-2]),
    "meta gone": ("meta.json", None),
    "meta is a list": ("meta.json", lambda content: b"[]"),
    "brackets": ("meta.json", lambda content: b"[" * 100_000),
    "meta not UTF-8": ("meta.json", lambda content: b"\xff" + content),
    "number changed": ("meta.json", changed_meta(lambda meta: meta.update(vocab_size=400), sealed=False)),
    "types": ("meta.json", changed_meta(lambda meta: meta.update(vocab_size="300"))),
    "files is a list": ("meta.json", changed_meta(lambda meta: meta.update(files=["train.npy"]))),
    "entry of types": ("meta.json", changed_meta(lambda meta: meta["files"].update({"train.npy": {"size": "1"}}))),
    "strange name": ("meta.json", changed_meta(lambda meta: meta["files"].update({"a\0b": 5}))),
    "no val": ("meta.json", changed_meta(lambda meta: meta.pop("val") and meta)),
    "infinite": ("meta.json", changed_meta(lambda meta: meta.update(unigram_val_ppl=float("inf")))),
}


def harm(path: Path, change: Change | None) -> None:
    if change is None:
        path.unlink()
        return
    content = path.read_bytes()
    assert change(content) != content
    with path.open("r+b") as file:  # in place
        file.truncate(file.write(change(content)))
    os.utime(path, ns=(6, 6))  # the clock may be coarse


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_told_and_built_anew(data: DataConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data)
    victim, change = DAMAGES[name]
    path = first.folder / victim
    content, expected = path.read_bytes(), tokens(first.train).tolist()
    harm(path, change)
    again = prepare(data)
    assert (again.folder, tokens(again.train).tolist()) == (first.folder, expected)
    assert victim == "meta.json" or path.read_bytes() == content
    assert list(first.folder.parent.iterdir()) == [first.folder]
    (note,) = again.notes
    assert Path(victim).name in note and "built again" in note and "\n" not in note and "pickle" not in note
    monkeypatch.setattr(packing, "_build", no_build)
    assert prepare(data).notes == []


@pytest.mark.parametrize("name", ["short", "gone", "objects", "meta is a list", "brackets"])
def test_a_damaged_cache_is_not_opened(data: DataConfig, name: str) -> None:
    folder = prepare(data).folder
    victim, change = DAMAGES[name]
    harm(folder / victim, change)
    with pytest.raises(UserError, match=rf"not a complete data cache \(.*{victim}"):
        open_prepared(folder)


def test_a_damaged_cache_that_cannot_be_built_anew(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(data).folder
    monkeypatch.setattr(packing, "_build", no_build)
    os.utime(folder / "train.npy", ns=(5, 5))
    monkeypatch.setattr(packing.os, "access", lambda path, mode: False)  # root may write everywhere
    assert documents(prepare(data), prepare(data).train) == TRAIN
    harm(folder / "train.npy", zeros)
    with pytest.raises(UserError, match=r"is damaged \(the content of train\.npy has changed .*data\.cache_dir"):
        prepare(data)


def test_why_it_is_built_anew_is_told_where_that_fails(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(data).folder
    harm(folder / "train.npy", zeros)

    def fail(*args: object) -> None:
        raise UserError("The dataset cannot be opened.")

    monkeypatch.setattr(packing, "_build", fail)
    with pytest.raises(UserError, match=r"cannot be opened\. The data cache .* is damaged \(the content of train\.npy"):
        prepare(data)
    assert folder.exists()


# --- what a start does not see is found when it is read


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (odd_token, "holds token 65535, but the vocabulary has 2"),
        (lambda content: content[: len(content) // 2 * 2 - 40], "ends before token"),
    ],
)
def test_damage_under_a_running_job(data: DataConfig, change: Change, told: str) -> None:
    """Sizes and times of an opened file are not looked at again."""
    store = prepare(data).train
    samples = store.samples(4)
    reader = TrainLoader(samples, BatchOrder(len(samples), 4, 0), 4, loader.Reader())
    harm(store.path, change)
    with pytest.raises(UserError, match=rf"train\.npy {told}"):
        for k in range(len(samples) // 4 + 1):
            reader.micro_batches(k)
    with pytest.raises(UserError, match=rf"train\.npy {told}"):
        store.fingerprint()


def test_a_failing_disk(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(data)

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(loader.os, "pread", fail)
    with pytest.raises(UserError, match=r"train\.npy cannot be read .*Input/output error"):
        prepared.train.samples(4).batch([0])
    monkeypatch.undo()
    os.utime(prepared.folder / "val.npy", ns=(5, 5))
    monkeypatch.setattr(cache, "_digest", fail)
    monkeypatch.setattr(packing.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"is damaged \(val\.npy: .*Input/output error"):
        prepare(data)


# --- what has been moved or comes from an older version


def test_a_copied_cache_is_read_once(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(prepare(data).folder.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    data.cache_dir = str(tmp_path / "copy")
    monkeypatch.setattr(packing, "_build", no_build)
    digest, read = cache._digest, []

    def spy(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    monkeypatch.setattr(cache, "_digest", spy)
    assert documents(prepare(data), prepare(data).train) == TRAIN
    assert {"train.npy", "val.npy", "tokenizer.json"} <= set(read) and len(read) == len(set(read))


def test_a_cache_without_sums_gets_them(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(data).folder
    meta = json.loads((folder / "meta.json").read_text())
    old = {**meta, "files": {name: entry["size"] for name, entry in meta["files"].items()}}
    del old["sha256"]
    (folder / "meta.json").write_text(json.dumps(old))
    build = packing._build
    monkeypatch.setattr(packing, "_build", no_build)
    assert open_prepared(folder).train.num_tokens == meta["train"]["tokens"]
    assert prepare(data).notes == []
    assert json.loads((folder / "meta.json").read_text()) == meta
    monkeypatch.setattr(packing, "_build", build)
    harm(folder / "train.npy", zeros)
    assert "train.npy has changed" in prepare(data).notes[0]


def test_a_damaged_cache_published_meanwhile_gives_way(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packing._build

    def slow(*args: object) -> list[str]:
        notes = original(*args)  # type: ignore[arg-type]
        folder = packing._cache_dir(data) / packing._cache_key(data)
        folder.mkdir()
        (folder / "train.npy").write_bytes(b"half")
        return notes

    monkeypatch.setattr(packing, "_build", slow)
    prepared = prepare(data)
    assert documents(prepared, prepared.train) == TRAIN


# --- killed builds


def build_until_killed(data: DataConfig, output: Path, env: dict[str, str]) -> None:
    """In a process of its own: killed just before publication."""
    stand_alone(output, env)
    cache.publish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    prepare(data)


def test_what_a_killed_build_leaves_is_removed(data: DataConfig, tmp_path: Path) -> None:
    place = Path(data.cache_dir or "")
    arguments = (data, tmp_path / "out", dict(os.environ))
    process = warm_interpreters().Process(target=build_until_killed, args=arguments)
    try:
        process.start()
        assert join_all([process], 60) == [-signal.SIGKILL], (tmp_path / "out").read_text()
    finally:
        end_ranks([process])
    (left,) = [path for path in place.iterdir() if path.is_dir()]  # and the file of its lock
    assert left.name.startswith(".") and (left / "build/meta.json").exists()
    (place / "mine").mkdir()  # not a build's
    of_another_key = place / f".{'0' * 20}-7-abc_1"
    shutil.copytree(left, of_another_key)
    living, foreign = (place / f".{'0' * 20}-{number}-abc_1" for number in (8, 9))
    for folder, host in ((living, socket.gethostname()), (foreign, "elsewhere")):
        folder.mkdir()
        (folder / cache.ALIVE).write_text(host)
    with (living / cache.ALIVE).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prepared = prepare(data)
        assert documents(prepared, prepared.train) == TRAIN
        assert set(place.iterdir()) == {prepared.folder, place / "mine", living, foreign}
        assert "of 2 killed build(s)" in prepared.notes[0]
    for path in (foreign, foreign / cache.ALIVE):
        os.utime(path, (1, 1))  # quiet for long
    data.vocab_size = 290
    other = prepare(data)
    assert set(place.iterdir()) == {prepared.folder, other.folder, place / "mine"}
