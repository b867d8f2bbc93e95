"""Records in TensorBoard and W&B: the same as in metrics.jsonl, also after resuming; failures warn once."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.log import LogConfig, check_log
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.run.folder import RunFolder, read_meta
from megatron_switchlora.run.loggers import Loggers, LogStart
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.startup import loggers as needs
from megatron_switchlora.startup.loggers import check_loggers
from tests.wandb_files import read_run

BOARD, OFFLINE = LogConfig(tensorboard=True), LogConfig(wandb="offline", wandb_project="p", wandb_group="g")
FINISHED = "finished"


def records_of(first: int, last: int) -> list[dict[str, Any]]:
    """Records of steps, with an evaluation after every second one; before the first step, too."""
    found: list[dict[str, Any]] = [{"step": 0, "val_loss": 9.5}] if first == 1 else []
    for step in range(first, last + 1):
        found.append({"step": step, "loss": 1 / step, "tokens": step * 123456789, "mfu": None})
        found += [{"step": step, "val_loss": 2 / step}] if step % 2 == 0 else []
    return found


def train(path: Path, log: LogConfig, first: int, last: int, keep: int | None, end: str = FINISHED) -> list[str]:
    """Log steps first..last after a resume from step `keep`; returns what was printed."""
    printed: list[str] = []
    path.mkdir(exist_ok=True)
    folder = RunFolder(path, writes=True, keep_steps=keep)
    config = replace(RunConfig(), log=log)
    with folder:
        folder.update_meta(steps=last)
        folder.open_loggers(config, printed.append)
        for record in records_of(first, last):
            folder.log(record)
        folder.flush()
        if end == FINISHED:
            folder.close()
    return printed


def events(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event that TensorBoard shows, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(each.step, each.value) for each in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def curves(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of every number in metrics.jsonl, by key."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in read_records(path / "metrics.jsonl"):
        for key, value in record.items():
            if key != "step" and value is not None:
                found.setdefault(key, []).append((record["step"], value))
    return found


def single(found: dict[str, list[tuple[int, Any]]]) -> dict[str, list[tuple[int, float]]]:
    return {key: [(step, float(np.float32(value))) for step, value in points] for key, points in found.items()}


@pytest.fixture(autouse=True)
def ordered_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number the files of events from 10: TensorBoard reads those of one second and process in order of their names."""
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer._global_uid", SimpleNamespace(get=count(10).__next__)
    )


def test_events_are_the_records(tmp_path: Path) -> None:
    """After a kill at step 8 the run resumes from step 5, in another file of events."""
    run = tmp_path / "run"
    train(run, BOARD, 1, 8, None, end="killed")
    assert events(run) == single(curves(run)) and max(events(run)["loss"])[0] == 8
    train(run, BOARD, 6, 12, 5)
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert events(run) == single(curves(run))
    assert [step for step, _ in events(run)["loss"]] == list(range(1, 13))
    train(run, BOARD, 1, 3, 0)  # without a checkpoint the run starts again
    assert events(run) == single(curves(run)) and len(events(run)["loss"]) == 3


def test_events_that_are_switched_on_later_begin_at_the_first_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, LogConfig(), 1, 4, None)
    assert not (run / "tensorboard").exists()
    train(run, BOARD, 5, 6, 4)
    assert events(run) == single(curves(run)) and len(events(run)["loss"]) == 6


def test_events_have_the_steps_of_a_start_without_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, BOARD, 1, 4, None)
    train(run, LogConfig(), 5, 8, 4)
    train(run, BOARD, 9, 10, 8)
    assert events(run) == single(curves(run)) and len(events(run)["loss"]) == 10
    train(run, BOARD, 11, 12, 10)
    assert events(run) == single(curves(run)) and len(events(run)["loss"]) == 12


@pytest.mark.parametrize("where", ["__init__", "add_event", "flush", "close"])
def test_events_have_the_steps_after_a_failure(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def fail(*given: object, **named: object) -> None:
        raise OSError("no space")

    run = tmp_path / "run"
    train(run, BOARD, 1, 4, None)
    with monkeypatch.context() as patch:
        patch.setattr(EventFileWriter, where, fail)
        (warning,) = train(run, BOARD, 5, 8, 4)
    assert "no space" in warning
    train(run, BOARD, 9, 10, 8)
    assert events(run) == single(curves(run)) and len(events(run)["loss"]) == 10


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_nothing_is_logged_through_a_link(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
    (warning,) = train(tmp_path / "run", BOARD if name == "tensorboard" else OFFLINE, 1, 2, None)
    assert "gets no records, failed" in warning and "is a link, and nothing is written through links" in warning
    assert not list((tmp_path / "theirs").iterdir()) and len(curves(tmp_path / "run")["loss"]) == 2


@pytest.mark.parametrize("where", ["log", "flush", "close"])
def test_a_logger_that_fails_warns_once(tmp_path: Path, where: str) -> None:
    printed: list[str] = []
    calls: list[str] = []

    class Failing:
        def __init__(self, start: LogStart) -> None:
            pass

        def entries(self, complete: bool) -> dict[str, Any]:
            return {}

        def __getattr__(self, name: str) -> Any:
            def act(*given: object) -> None:
                calls.append(name)
                if name == where:
                    raise OSError("no space")

            return act

    loggers = Loggers(printed.append)
    loggers.add("Board", Failing, LogStart(tmp_path, RunConfig()))
    for step in range(3):
        loggers.log({"step": step})
    loggers.flush()
    loggers.close()
    loggers.close()
    (warning,) = printed
    assert warning.startswith("warning: Board, which gets no more records, failed (OSError: no space)")
    assert calls.count(where) == 1 and calls[-1] == where


class FakeRun:
    """What the logger uses of a W&B run."""

    def __init__(self, rows: list[tuple[str, int, dict[str, Any]]], id: str, **given: Any) -> None:
        self.rows, self.id, self.given = rows, id, given

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((self.id, step, values))

    def finish(self, exit_code: int) -> None:
        self.rows.append((self.id, -1, {"exit": exit_code}))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, Any]]]:
    """What W&B gets, over all starts: (id, step, values)."""
    found: list[tuple[str, int, dict[str, Any]]] = []
    fake = SimpleNamespace(init=lambda **given: FakeRun(found, **given), Settings=lambda **given: given)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return found


def test_wandb_continues_the_run_without_doubles(tmp_path: Path, rows: list[tuple[str, int, dict[str, Any]]]) -> None:
    """Steps that were logged before a kill are left out when they are trained again."""
    run = tmp_path / "run"
    train(run, OFFLINE, 1, 9, None, end="killed")
    train(run, OFFLINE, 6, 12, 5)
    train(run, LogConfig(), 13, 14, 12)  # a start without W&B
    train(run, OFFLINE, 15, 16, 14)
    logged = [(step, values) for _, step, values in rows if step >= 0]
    assert logged == [
        (record["step"], {key: value for key, value in record.items() if key != "step"}) for record in records_of(1, 16)
    ]
    assert {id for id, _, _ in rows} == {read_meta(run)["wandb"]["id"]}
    train(run, OFFLINE, 1, 2, 0)  # from step 0: another run, since W&B would leave all steps out
    assert len({id for id, _, _ in rows}) == 2 and rows[-2][1] == 2


@pytest.mark.parametrize("failing", ["init", "log"])
def test_wandb_gets_later_what_it_could_not_get(
    tmp_path: Path,
    rows: list[tuple[str, int, dict[str, Any]]],
    failing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a failure at the start, or in its middle, a resumed run adds all other records once."""

    def fail_init(**given: Any) -> None:
        raise OSError("no network")

    def fail_log(run: FakeRun, values: dict[str, Any], step: int) -> None:
        if step == 3:
            raise OSError("no network")
        run.rows.append((run.id, step, values))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if failing == "init":
            patch.setattr(sys.modules["wandb"], "init", fail_init)
        else:
            patch.setattr(FakeRun, "log", fail_log)
        (warning,) = train(run, OFFLINE, 1, 4, None)
    assert "no network" in warning
    train(run, OFFLINE, 5, 6, 4)
    assert [step for _, step, _ in rows if step >= 0] == [record["step"] for record in records_of(1, 6)]
    assert len({id for id, _, _ in rows}) == 1


def test_a_run_that_an_error_ends_has_failed_in_wandb(
    tmp_path: Path, rows: list[tuple[str, int, dict[str, Any]]]
) -> None:
    folder = RunFolder(tmp_path, writes=True)
    with pytest.raises(UserError), folder:
        folder.open_loggers(replace(RunConfig(), log=OFFLINE), print)
        raise UserError("not finite")
    assert rows[-1][2] == {"exit": 1}
    train(tmp_path / "run", OFFLINE, 1, 1, None)
    assert rows[-1][2] == {"exit": 0}


def test_only_rank_0_logs(tmp_path: Path, rows: list[tuple[str, int, dict[str, Any]]]) -> None:
    folder = RunFolder(tmp_path, writes=False)
    folder.open_loggers(replace(RunConfig(), log=replace(OFFLINE, tensorboard=True)), print)
    folder.log({"step": 1, "loss": 1.0})
    folder.close()
    assert not rows and not list(tmp_path.iterdir())


@pytest.mark.full
def test_wandb_writes_a_run_that_it_can_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself, offline: two starts, whose files together are metrics.jsonl."""
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    run = tmp_path / "my run"
    assert train(run, OFFLINE, 1, 8, None) == []
    assert train(run, OFFLINE, 6, 12, 5) == []
    wandb.teardown()  # as at the end of a process: its own process writes what it has got
    starts = [read_run(path) for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]
    assert len(starts) == 2
    for start in starts:
        assert start["id"] == read_meta(run)["wandb"]["id"] and start["exit"] == 0
        assert (start["project"], start["group"], start["name"]) == ("p", "g", "my run")
        assert start["config"]["log"]["wandb"] == "offline"
        assert start["config"]["train"] == RunConfig().to_dict()["train"]
    found: dict[str, list[tuple[int, Any]]] = {}
    for row in (row for start in starts for row in start["rows"]):
        for key in ("loss", "tokens", "val_loss"):
            if key in row:
                found.setdefault(key, []).append((row["_step"], row[key]))
    assert found == curves(run)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.wandb offline needs .*: pip install 'megatron_switchlora\[wandb\]'"):
        check_loggers(OFFLINE, {})
    with pytest.raises(UserError, match=r"log\.tensorboard needs .*: pip install tensorboard"):
        check_loggers(BOARD, {})
    check_loggers(LogConfig(), {})


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (LogConfig(wandb="online", wandb_project="a/b"), r"wandb_project must have none of .*'a/b'"),
        (LogConfig(wandb="online", wandb_project=""), "between 1 and 128 letters, not 0"),
        (LogConfig(wandb="online", wandb_entity="x" * 129), "wandb_entity must have .* not 129"),
        (LogConfig(wandb_group="g"), r"log\.wandb_group belong to Weights & Biases, but log\.wandb is none"),
    ],
)
def test_rules(log: LogConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_log(log)
    check_log(LogConfig())
