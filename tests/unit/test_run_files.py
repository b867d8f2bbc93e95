"""What people, crashes and disks do to a run folder: links, damaged records and metadata, a folder that is gone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import read_json, replace_text
from megatron_switchlora.run.folder import RunFolder, create_folder, lock_folder, read_meta, refuse_folder
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.train.dataset import vocabulary_digest
from tests.unit.test_resume import choose, make_run

LINES = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 9)]
NO_RECORDS = [
    b"3", b'{"loss": 3}', b'{"step": "2"}', b'{"step": true}', b"\xff\xfe", b"\0" * 40, b'{"step": 2, "loss": "nan"}',
    b'{"step": 2, "loss": NaN}', b'{"step": 2, "loss": 1e999}', b'{"step": 2, "loss": {}}', b'{"step": -2}',
    b"[" * 100_000, b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", b'{"step": 2, "lo', b"",
]  # fmt: skip


@pytest.mark.parametrize("odd", NO_RECORDS, ids=range(len(NO_RECORDS)))
def test_a_line_that_is_no_record_costs_no_other(tmp_path: Path, odd: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0].encode() + odd + b"\n" + "".join(LINES[2:]).encode() + odd)
    assert [record["step"] for record in read_records(path)] == [1, 3, 4, 5, 6, 7, 8]
    folder = RunFolder(tmp_path, writes=True, keep_steps=5)
    folder.log({"step": 6, "loss": 2.0})
    assert path.read_text() == "".join([LINES[0], *LINES[2:5]]) + '{"step": 6, "loss": 2.0}\n'
    kept = (tmp_path / "metrics.dropped.jsonl").read_bytes()
    assert kept == odd + b"\n" + "".join(LINES[5:]).encode() + (odd and odd + b"\n")
    moved, missing = folder.notes
    assert moved == (
        f"metrics.jsonl: 3 record(s) after step 5 and {1 + bool(odd)} damaged or repeated line(s) moved to "
        "metrics.dropped.jsonl"
    )
    assert missing == "metrics.jsonl has no record of 1 of the 5 earlier steps"


def test_records_stay_in_order_and_each_step_once(tmp_path: Path) -> None:
    evaluation = json.dumps({"step": 2, "val_loss": 9.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text("".join([LINES[2], LINES[0], LINES[1], evaluation, LINES[1]]))
    folder = RunFolder(tmp_path, writes=True, keep_steps=3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join([*LINES[:2], evaluation, LINES[2]])
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == LINES[1]
    assert [record["step"] for record in folder.history] == [1, 2, 2, 3]
    others = RunFolder(tmp_path, writes=False, keep_steps=3)
    assert others.history == folder.history


def test_deleted_records_are_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True, keep_steps=5)
    assert folder.notes == ["metrics.jsonl was missing: it starts again after step 5"]


def test_the_records_of_heads_are_kept_aside_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(LINES[:5]))
    (tmp_path / "metrics.head_01.jsonl").write_bytes("".join(LINES).encode() + b"\xff\n")
    folder = RunFolder(tmp_path, writes=False, keep_steps=5, heads=[1])
    assert (tmp_path / "metrics.head_01.jsonl").read_text() == "".join(LINES[:5])
    aside = tmp_path / "metrics.dropped.head_01.jsonl"
    assert aside.read_bytes() == "".join(LINES[5:]).encode() + b"\xff\n"
    assert folder.notes[0].endswith("moved to metrics.dropped.head_01.jsonl")


LINKS = [".lock", "metrics.jsonl", "metrics.dropped.jsonl", "metrics.head_00.jsonl", "config.yaml", "meta.json",
         "ds_config.json", ".config.yaml", ".meta.json"]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("target", ["there", "not there"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, target: str) -> None:
    """In a folder that somebody else prepared, at a new start and when a run goes on."""
    theirs = tmp_path / "theirs"
    if target == "there":
        theirs.write_text("private")
    for run in (tmp_path / "new", make_run(tmp_path / "run", [5])):
        run.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(theirs)
        try:
            goes_on = choose(run)["keeps_records"]
            create_folder(run) if not goes_on else None
            with lock_folder(run):
                folder = RunFolder(run, True, 5 if goes_on else None, heads=[0])
                folder.update_meta(finished=True)
                folder.log({"step": 6, "loss": 1.0})
        except (UserError, OSError) as error:
            assert str(run) in str(error)
        assert theirs.exists() == (target == "there") and (target != "there" or theirs.read_text() == "private")
        own = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not any(b"private" in path.read_bytes() for path in own)  # nor does anything get out


def test_a_lock_that_is_a_link_or_a_pipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    for act in (lock_folder, refuse_folder):
        with pytest.raises(UserError, match=r"\.lock is a link, and nothing is written through links"):
            act(tmp_path)
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="Not a plain file"):
        lock_folder(tmp_path)


def test_what_killed_writers_left_is_removed_under_the_lock(tmp_path: Path) -> None:
    stale = [".config.yaml.0123abcd", ".metrics.head_07.jsonl.00000000", ".loss.png.ffffffff", ".final.00ff00ff"]
    mine = [".config.yaml.backup", ".notes.0123abcd", "config.yaml.0123abcd"]
    for name in (*stale[:3], *mine):
        (tmp_path / name).touch()
    (tmp_path / stale[3]).mkdir()
    lock_folder(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", *mine}


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "scratch")
    for folder in (run, run / "below"):
        with pytest.raises(UserError, match=r"run is a link to .*scratch, which does not exist\. Create that folder"):
            create_folder(folder)
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "large")
    with pytest.raises(UserError, match=r"checkpoints is a link to .*large, which does not exist"):
        refuse_folder(run)
    (tmp_path / "large").mkdir()
    assert not choose(run)["keeps_records"] and create_folder(run) == run  # a larger disk, made beforehand
    (tmp_path / "large" / "step-00000001").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        refuse_folder(run)


ODD_META: list[Any] = [
    [1], 3, None, {"finished": "yes"}, {"finished": 1}, {"branched_from": 3}, {"resumed_at": 5}, {"data": []},
    {"versions": "x"}, {"parameters": [1]}, {"val_loss": "low"},
]  # fmt: skip


@pytest.mark.parametrize("content", ODD_META, ids=str)
def test_metadata_of_other_types_is_as_if_it_were_not_there(tmp_path: Path, content: Any) -> None:
    run = make_run(tmp_path / "run", [5])
    (run / "meta.json").write_text(json.dumps(content))
    assert read_meta(run) == {} and choose(run)["folder"].endswith("step-00000005")
    assert choose(tmp_path / "new", "--resume", str(run))["folder"].endswith("step-00000005")


def test_deep_and_endless_json_is_refused(tmp_path: Path) -> None:
    for name in ("deep", "large"):
        (tmp_path / name).write_bytes(b"[" * 100_000)
    os.truncate(tmp_path / "large", 1 << 40)
    for name, message in (("deep", "nested too deeply"), ("large", "larger than")):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name)


def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    for how in ("removed", "moved", "replaced"):
        path = tmp_path / how
        path.mkdir()
        run = RunFolder(path, writes=True)
        run.require_there()
        shutil.rmtree(path) if how == "removed" else path.rename(tmp_path / f"{how} away")
        if how == "replaced":
            path.mkdir()
        with pytest.raises(UserError, match=rf"{how} has vanished, so nothing can be saved and the run stops"):
            run.require_there()


@pytest.mark.parametrize("how", ["deleted", "edited"])
def test_records_that_are_taken_away_are_written_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.jsonl"
    run = RunFolder(tmp_path, writes=True)
    run.log({"step": 1, "loss": 3.0})
    path.unlink() if how == "deleted" else replace_text(path, "my notes\n")
    run.log({"step": 2, "loss": 2.0})  # into the file that nobody sees
    run.require_there()
    run.log({"step": 3, "loss": 1.0})
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    assert how == "deleted" or (tmp_path / "metrics.dropped.jsonl").read_text() == "my notes\n"


def test_a_failing_disk_is_told_and_ends_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path, writes=True)

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    run.log({"step": 1, "loss": 3.0})
    with pytest.warns(UserWarning, match="Input/output error.*its end may be lost"):
        run.flush()
    with pytest.raises(OSError, match="Input/output error"):
        run.close()


def test_records_that_never_found_room_are_not_forgotten_at_the_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, writes=True)
    assert run.metrics is not None
    real, run.metrics.file = run.metrics.file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    real.close()
    with pytest.warns(UserWarning, match="records wait"):
        run.log({"step": 1, "loss": 3.0})
    with pytest.raises(OSError, match=r"1 records of metrics\.jsonl still wait for room"):
        run.close()


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"{}", b"\xff", b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged \(.*\): restore it"):
            vocabulary_digest(tmp_path)
