"""What a run continues from, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_switchlora.checkpoint.resume import choose as choose_start
from megatron_switchlora.checkpoint.resume_rules import compare, compare_data
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.run.folder import RunFolder, create_folder, lock_folder
from megatron_switchlora.run.metrics_log import read_records
from tests.unit.test_checkpoint_files import make_checkpoint

OPTIONS = ["--method.rank", "6", "--optim.lr", "0.01"]


def config(*more: str) -> RunConfig:
    return parse_arguments([*OPTIONS, *more]).config


def make_run(folder: Path, steps: list[int], finished: bool = False, stored: RunConfig | None = None) -> Path:
    """A run folder as a stopped run leaves it."""
    stored = stored or config()
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(stored.to_dict()))
    (folder / "meta.json").write_text(json.dumps({"finished": finished} if finished else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s + 1, "loss": 1.0}) + "\n" for s in range(12)))
    for step in steps:
        path = make_checkpoint(folder / "checkpoints", step)
        seal(path, {"config": stored.to_dict(), "data": "x"})
    return folder


def seal(path: Path, state: dict[str, Any]) -> None:
    """Replace a checkpoint's state and its manifest."""
    from megatron_switchlora.checkpoint.files import describe, publish

    checkpoint = json.loads((path / "manifest.json").read_text())["content"]
    (path / "state.json").write_text(json.dumps(state))
    checkpoint["files"]["state.json"] = describe(path / "state.json")
    building = path.with_name(".building-again")
    path.rename(building)
    publish(building, path, checkpoint["step"], checkpoint["files"])


def choose(run: Path | None, *more: str) -> dict[str, Any]:
    locks: list[Any] = []
    found = choose_start(config(*(["--output_dir", str(run)] if run else []), *more), locks)
    for lock in locks:
        lock.close()
    return found


def test_auto_takes_the_newest_of_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5, 10])
    assert choose(run)["folder"] == str(run / "checkpoints" / "step-00000010") and choose(run)["keeps_records"]
    assert choose(None)["folder"] == "" and choose(tmp_path / "new")["folder"] == ""
    (run / "checkpoints" / ".building-step-00000015").mkdir()
    assert choose(run)["folder"].endswith("step-00000010")


def test_without_a_checkpoint_the_same_configuration_begins_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    found = choose(run)
    assert found["keeps_records"] and not found["folder"] and "starts from step 0" in found["notes"][0]
    with pytest.raises(UserError, match=r"method.rank is 6 there and 7 here"):
        choose(run, "--method.rank", "7")
    (run / "final").mkdir()
    with pytest.raises(UserError, match=r"already holds a run"):
        choose(run)


def test_what_is_not_a_run_is_never_touched(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "meta.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"already holds a run"):
        choose(folder)
    (folder / "meta.json").unlink()
    (folder / "metrics.jsonl").touch()  # claimed by a run that was killed at once
    assert choose(folder)["keeps_records"]
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"already holds a run"):
        choose(folder)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [12], finished=True)
    assert choose(run)["finished"]
    with pytest.raises(UserError, match=r"optim.lr is 0.01 there and 0.5 here"):
        choose(run, "--optim.lr", "0.5")


def test_none_never_resumes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5])
    with pytest.raises(UserError, match=r"already holds a run"):
        choose(run, "--resume", "none")
    assert choose(tmp_path / "new", "--resume", "none")["folder"] == ""


def test_a_path_names_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5, 10])
    five, ten = (str(run / "checkpoints" / f"step-{n:08d}") for n in (5, 10))
    assert choose(tmp_path / "new", "--resume", str(run)) == {**choose(None), "folder": ten}
    assert choose(tmp_path / "new", "--resume", five)["folder"] == five
    assert choose(run, "--resume", ten)["keeps_records"]
    with pytest.raises(UserError, match=r"holds step-00000010, which is newer than"):
        choose(run, "--resume", five)
    other = make_run(tmp_path / "other", [5])
    with pytest.raises(UserError, match=r"already holds a run"):
        choose(other, "--resume", five)
    with pytest.raises(UserError, match=r"is not a checkpoint"):
        choose(tmp_path / "new", "--resume", str(tmp_path))


FREE = (
    "--parallel.tp 2 --train.micro_batch_size 4 --method.compute merged --method.base_spread dp "
    "--method.switch.bank_spread dp --train.eval_interval 9"
)


def test_what_may_differ_and_what_not() -> None:
    stored = config().to_dict()
    compare(config(*FREE.split()), stored, "it")
    for option, value in [
        ("model.hidden_size", "96"), ("method.name", "lora"), ("train.seq_len", "64"), ("train.seed", "3"),
        ("train.global_batch_size", "64"), ("method.alpha", "2.0"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"{option} is .* there and '?{value}'? here") as caught:
            compare(config(f"--{option}", value), stored, "it")
        assert "allow_changes" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot hold model.hidden_size"):
        config("--checkpoint.allow_changes", '["model.hidden_size"]')


def test_explicit_changes() -> None:
    stored = config().to_dict()
    changed = ["--optim.lr", "0.02", "--train.steps", "900"]
    with pytest.raises(UserError, match=re.escape('allow_changes \'["optim.lr", "train.steps"]\'')):
        compare(config(*changed), stored, "it")
    with pytest.raises(UserError) as caught:  # another method cannot be allowed, so nothing is advised
        compare(config(*changed, "--method.name", "lora"), stored, "it")
    assert "allow_changes" not in str(caught.value)
    compare(config(*changed, "--checkpoint.allow_changes", '["optim.lr", "train.steps"]'), stored, "it")
    compare(config(*changed, "--checkpoint.allow_changes", '["optim.*", "train.steps"]'), stored, "it")


def test_full_rank_does_not_ask_for_ranks() -> None:
    stored = config("--method.name", "full").to_dict()
    compare(config("--method.name", "full", "--method.rank", "9"), stored, "it")


def test_other_data_is_named() -> None:
    mine = config()
    state = {"data": "a" * 20, "tokenizer": "t" * 64, "vocab_size": 300, "config": config().to_dict()}
    here = {key: state[key] for key in ("data", "tokenizer", "vocab_size")}
    compare_data(mine, state, here)
    with pytest.raises(UserError, match=r"data is aaaa.* there and bbbb.*the files have changed"):
        compare_data(mine, state, {**here, "data": "b" * 20})
    other = config("--data.vocab_size", "400")
    with pytest.raises(UserError, match=r"vocab_size is 300 there and 400 here.*data.vocab_size is 2048 there and 400"):
        compare_data(other, state, {**here, "vocab_size": 400})
    allowed = config("--checkpoint.allow_changes", '["data"]')
    compare_data(allowed, state, {**here, "data": "b" * 20})
    with pytest.raises(UserError, match=r"tokenizer is tttt"):
        compare_data(allowed, state, {**here, "data": "b" * 20, "tokenizer": "u" * 64})


def test_records_after_the_checkpoint_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 9)]
    path.write_text("".join(lines) + '{"step": 9, "lo')
    folder = RunFolder(tmp_path, writes=True, keep_steps=5)
    assert [record["step"] for record in folder.history] == [1, 2, 3, 4, 5]
    folder.log({"step": 6, "loss": 2.0})
    assert path.read_text() == "".join(lines[:5]) + '{"step": 6, "loss": 2.0}\n'
    assert (tmp_path / "metrics.dropped.jsonl").read_text() == "".join(lines[5:]) + '{"step": 9, "lo\n'


def test_a_full_disk_lets_records_wait(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.log({"step": 1})
    real, folder.metrics.file = folder.metrics.file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.warns(UserWarning, match=r"records wait"):
        folder.log({"step": 2})
    folder.log({"step": 3})
    folder.metrics.file.close()
    folder.metrics.file = real
    folder.log({"step": 4})
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_two_processes_cannot_write_in_one_folder(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(UserError, match=r"Another process is running"):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs root to mount a read-only file system: {made.stderr.decode().strip()}")
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*Read-only file system"):
            lock_folder(tmp_path)
        with pytest.raises(UserError, match=r"cannot be (written|made)"):
            create_folder(tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_finished_run_can_be_prolonged_on_purpose(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [12], finished=True)
    longer = ["--train.steps", "900", "--checkpoint.allow_changes", '["train.steps"]']
    found = choose(run, *longer)
    assert not found["finished"] and found["folder"].endswith("step-00000012")


def test_checkpoints_alone_are_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5, 10])
    for name in ("config.yaml", "meta.json", "metrics.jsonl"):
        (run / name).unlink()
    with pytest.raises(UserError, match=r"already holds a run \(checkpoints\)"):
        choose(run, "--resume", "none")
    assert choose(run)["folder"].endswith("step-00000010")


@pytest.mark.parametrize("damage", ["{{: :", "", "[1]", "train: 3"])
def test_a_damaged_configuration_matters_without_a_checkpoint(tmp_path: Path, damage: str) -> None:
    run, young = make_run(tmp_path / "run", [5]), make_run(tmp_path / "young", [])
    for folder in (run, young):
        (folder / "config.yaml").write_text(damage)
        (folder / "meta.json").write_text("[1]")
    assert choose(run)["folder"].endswith("step-00000005")
    with pytest.raises(UserError, match=r"config\.yaml is damaged, and there is no checkpoint"):
        choose(young)


def test_a_branch_goes_on_by_the_same_command(tmp_path: Path) -> None:
    source = make_run(tmp_path / "run", [5])
    branch = make_run(tmp_path / "branch", [])
    again = ("--resume", str(source))
    with pytest.raises(UserError, match="already holds a run"):
        choose(branch, *again)
    five = str(source / "checkpoints" / "step-00000005")
    (branch / "meta.json").write_text(json.dumps({"branched_from": five}))
    assert (choose(branch, *again)["folder"], choose(branch, *again)["keeps_records"]) == (five, True)
    make_checkpoint(branch / "checkpoints", 8)
    seal(branch / "checkpoints" / "step-00000008", {"config": config().to_dict(), "data": "x"})
    assert choose(branch, *again)["folder"] == str(branch / "checkpoints" / "step-00000008")


def test_a_damaged_state_is_called_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5])
    state = run / "checkpoints" / "step-00000005" / "state.json"
    good = state.read_text()
    for bad in (good[:-4], good.replace('"lr": 0.01', '"lr": 0.02')):
        state.write_text(bad)
        with pytest.raises(UserError, match=r"is damaged: state.json"):
            choose(run)
    state.unlink()
    with pytest.raises(UserError, match=r"is damaged: state.json is missing"):
        choose(tmp_path / "new", "--resume", str(run))


def test_weights_alone_are_no_run(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 0)
    with pytest.raises(UserError, match=r"holds only weights.*--train.init_from"):
        choose(tmp_path / "new", "--resume", str(path))


def test_the_lock_comes_before_the_choice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5])
    held = lock_folder(run)
    with pytest.raises(UserError, match="Another process is running"):
        choose(run)
    held.close()


def test_a_torn_meta_is_no_obstacle(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5])
    (run / "meta.json").write_text("")
    assert choose(run)["folder"].endswith("step-00000005")


def test_the_newest_checkpoint_is_never_passed_over_in_silence(tmp_path: Path) -> None:
    """One that has lost its manifest stands in the way; what only has a checkpoint's name is told."""
    run = make_run(tmp_path / "run", [5, 10])
    checkpoints = run / "checkpoints"
    for name in ("step-00000015", "step-00000020"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-00000020" / "manifest.json").write_text("{}")
    (checkpoints / "step-12").touch()
    with pytest.raises(UserError, match=r"step-00000020 is damaged.*move it away to resume from step-00000010"):
        choose(run)
    (checkpoints / "step-00000020").rename(tmp_path / "away")
    found = choose(run)
    assert found["folder"].endswith("step-00000010")
    assert [note.split("/")[-1].split(" was")[0] for note in found["notes"]] == ["step-00000015", "step-12"]
    (checkpoints / "step-00000010" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000010.*lost its manifest.*move it away to resume from step-00000005"):
        choose(run)
    (checkpoints / "step-00000010").rename(tmp_path / "away too")
    assert choose(run)["folder"].endswith("step-00000005")


def test_a_run_by_a_link_to_its_checkpoints_is_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [5])
    (run / "checkpoints").rename(tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    for how in ("auto", str(run), str(run / "checkpoints" / "step-00000005")):
        assert choose(run, "--resume", how)["keeps_records"]
