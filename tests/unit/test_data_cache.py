"""The token cache: built whole or not at all, by one, and found again."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import packing
from megatron_switchlora.data.packing import PreparedData, open_prepared, prepare
from tests.dist.launch import REPOSITORY, end_ranks, join_all, stand_alone, warm_interpreters

from .test_data_packing import config, tokens


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return config(tmp_path)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def no_build(*args: object, **kwargs: object) -> None:
    raise AssertionError("built again")


def test_second_time_opens_the_cache(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data)
    before = stamps(first.folder)
    monkeypatch.setattr(packing, "_build", no_build)
    second = prepare(data)
    assert stamps(second.folder) == before
    assert (second.folder, second.unigram_val_ppl) == (first.folder, first.unigram_val_ppl)
    third = open_prepared(first.folder)
    assert np.array_equal(tokens(third.train), tokens(first.train))
    assert third.tokenizer_dir == first.tokenizer_dir


def prepare_slowly(data: DataConfig, place: Path, env: dict[str, str]) -> None:
    """In a process of its own: says that it builds, if it does, and where the cache is."""
    stand_alone(place.with_suffix(".out"), env)
    build = packing._build

    def slow(*given: Any) -> list[str]:
        place.write_text("built\n")
        time.sleep(2)
        return build(*given)

    packing._build = slow
    folder = prepare(data).folder
    with place.open("a") as file:
        file.write(str(folder))


def test_of_several_processes_one_builds(data: DataConfig, tmp_path: Path) -> None:
    """Four at once, with the cache on a disk that they share; the build is slowed to make them meet."""
    places = [tmp_path / f"said{number}" for number in range(4)]
    processes = [
        warm_interpreters().Process(target=prepare_slowly, args=(data, place, dict(os.environ))) for place in places
    ]
    try:
        for process in processes:
            process.start()
        statuses = join_all(processes, 60)
    finally:
        end_ranks([process for process in processes if process.pid is not None])
    assert statuses == [0] * 4, [place.with_suffix(".out").read_text() for place in places]
    said = [place.read_text().split() for place in places]
    assert sorted(map(len, said)) == [1, 1, 1, 2] and len({words[-1] for words in said}) == 1, said


def test_the_command_prepares_what_a_run_opens(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/pretrain.py --prepare_only, under a launcher of two ranks: rank 0 alone builds."""
    options = [f"--data.{name}={value}" for name, value in vars(data).items() if value is not None]
    command = [sys.executable, "launch/pretrain.py", "--prepare_only", *options]
    said = []
    for rank in "10":
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    monkeypatch.setattr(packing, "_build", no_build)
    found = prepare(data)
    assert said[0] == "" and f"{found.folder}: {found.train.num_tokens:,} tokens to train on" in said[1]


def test_other_inputs_give_other_folders(data: DataConfig) -> None:
    folders = [prepare(data).folder]
    data.vocab_size = 280
    folders.append(prepare(data).folder)
    data.tokenizer = "char"
    folders.append(prepare(data).folder)
    data.val_files = None
    folders.append(prepare(data).folder)
    os.utime(data.patterns()[0], ns=(5, 5))
    folders.append(prepare(data).folder)
    assert len(set(folders)) == 5


def test_cache_dir_is_chosen(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prepare(data).folder.parent == tmp_path / "home/.cache/megatron_switchlora"
    data.cache_dir = "~/mine"
    assert prepare(data).folder.parent == tmp_path / "home/mine"


def test_failed_build_leaves_nothing(data: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "_unigram_perplexity", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(data)
    assert list((tmp_path / "xdg/megatron_switchlora").iterdir()) == []


def test_a_cache_published_meanwhile_is_used(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks, which two build on at once."""

    def no_locks(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    original = packing._build
    theirs: list[PreparedData] = []
    before: dict[str, tuple[int, int]] = {}

    def slow(*args: object) -> list[str]:
        monkeypatch.setattr(packing, "_build", original)
        theirs.append(prepare(data))
        before.update(stamps(theirs[0].folder))
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_build", slow)
    ours = prepare(data)
    assert ours.folder == theirs[0].folder
    assert before and stamps(ours.folder) == before
    assert list(ours.folder.parent.iterdir()) == [ours.folder]


def test_unwritable_cache(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    data.cache_dir = str(tmp_path / "file/cache")
    with pytest.raises(UserError, match=r"Cannot write the data cache .*file/cache .*data\.cache_dir"):
        prepare(data)


def test_full_disk(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write_header", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        prepare(data)


def test_mistakes_in_files_and_tokenizer_come_through(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('{"text": "cut')
    with pytest.raises(UserError, match=r"val\.jsonl, line 1"):
        prepare(data)
    data.tokenizer = "./nowhere"
    with pytest.raises(UserError, match=r"data\.tokenizer '\./nowhere'"):  # before the corpus is read
        prepare(data)
