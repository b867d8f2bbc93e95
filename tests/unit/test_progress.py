"""Progress bars: on rank 0's terminal alone, over the work that takes seconds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.checkpoint.files import Checkpoint
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.data.packing import prepare
from megatron_switchlora.hf.export import export_dense
from megatron_switchlora.hf.start import import_model
from megatron_switchlora.startup import progress as module
from megatron_switchlora.startup.progress import progress
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runner import Runner
from megatron_switchlora.study.comparison.settings import Contender, Point, Setting
from tests.unit.test_convert import LORA_GA, save, trained


class Screen(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_only_rank_0_on_a_terminal_shows_bars(
    terminal: bool, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("RANK", rank)
    assert list(progress(range(3), "Counting", "numbers", delay=0.0)) == [0, 1, 2]
    assert ("Counting: 100%" in screen.getvalue() and "3/3" in screen.getvalue()) == shown
    assert shown or not screen.getvalue()


def work(kind: str, folder: Path) -> Callable[[], object]:
    """Prepare a kind of work; return what does it."""
    if kind == "Tokenising train":
        (folder / "text.txt").write_text("some words and more of them\n\n" * 99)
        data = DataConfig(source="files", files=str(folder / "text.txt"), vocab_size=300, cache_dir=str(folder / "c"))
        return lambda: prepare(data, progress=True)
    if kind == "PiSSA's decomposition":
        return lambda: trained("lora", method__init="pissa")
    if kind.startswith("LoRA-GA"):
        return lambda: trained("lora", **LORA_GA)
    checkpoint: Checkpoint = save(trained("full"), folder / "checkpoint")
    if kind == "Exporting":
        return lambda: export_dense(checkpoint, folder / "out")
    export_dense(checkpoint, folder / "hf")
    return lambda: import_model(folder / "hf", folder / "imported")


KINDS = (
    "Tokenising train", "Exporting", *(pytest.param(kind, marks=pytest.mark.full) for kind in (
        "PiSSA's decomposition", "LoRA-GA's gradients", "LoRA-GA's factors", "Importing")),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_work_that_takes_seconds_shows_a_bar(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, bars = work(kind, tmp_path), []

    def recorded(items: object, **shown: object) -> object:
        bars.append(module_tqdm(items, **shown))
        return bars[-1]

    module_tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", recorded)
    monkeypatch.setattr(sys, "stderr", Screen(True))
    act()
    bar = next(each for each in bars if each.desc == kind)
    assert bar.n > 0 and bar.total in (None, bar.n)


class Instant(Runner):
    """Runs that end at once."""

    def train(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"val_loss": 3.0, "diverged": False, "device": "cpu", "data": "f00d"}

    def stop(self) -> None:
        pass

    def clean(self, key: str) -> None:
        pass


def test_a_comparison_shows_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(True)
    monkeypatch.setattr(sys, "stderr", screen)
    setting = Setting("small", {"full": Contender(0.01)})
    runner = Instant(setting, Results(tmp_path / "results.json"), tmp_path / "work", 1)
    assert runner.loss("full", Point(0.01), 0, False) == 3.0
    runner.close_bar()
    assert "full lr 0.01" in screen.getvalue() and "1 runs" in screen.getvalue()
    assert ": 3.0000" in capsys.readouterr().out
