"""The results in benchmarks/: the shipped settings find every run again, and ask for none that is there."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.study.comparison.report import of_method
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runner import Runner
from megatron_switchlora.study.comparison.settings import Point, read_setting, run_key
from megatron_switchlora.study.comparison.sweeps import compare
from tests.dist.launch import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
NAMES = sorted(
    path.stem.removeprefix("compare_")
    for path in BENCHMARKS.glob("compare_*.json")
    if (REPOSITORY / "tools" / "settings" / f"{path.stem.removeprefix('compare_')}.yaml").is_file()
)
# Seeds of the second best that were never run, and a method that the setting has no more.
NEVER_RUN = {
    "tiny_shakespeare_rank6": {
        f"{method} dense_lr 0.08 seed {seed}" for method in ("lora_plus lr 0.01", "mhlora lr 0.0001") for seed in (3, 4)
    },
    "books_5m_seeds": {f"full lr 0.002 dense_lr 0.08 seed {seed}" for seed in (1, 2)},
}
UNSEEN = {"tiny_shakespeare": {"lte_16"}}


class Asking(Runner):
    """Notes the runs that it would start."""

    asked: set[str]

    def train(self, key: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError(key)

    def stop(self) -> None:
        pass

    def clean(self, key: str) -> None:
        raise AssertionError(key)

    def loss(self, method: str, point: Point, seed: int, sweep: bool) -> float:
        key = run_key(method, point, seed, self.setting.run_options(method, point, seed, sweep))
        if key in self.results.content["runs"]:
            return super().loss(method, point, seed, sweep)
        self.asked.add(key.rsplit(" ", 1)[0])
        return math.inf


def test_results_of_five_settings_are_shipped() -> None:
    assert len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_shipped_results_are_found_again(name: str, tmp_path: Path) -> None:
    setting = read_setting(Path(name), None, {})
    out = shutil.copy(BENCHMARKS / f"compare_{name}.json", tmp_path / "out.json")
    results = Results(Path(out))
    found = sum(len(of_method(setting, results, method)) for method in setting.methods)
    unseen = {run["method"] for run in results.content["runs"].values()} - set(setting.methods)
    left = [run for run in results.content["runs"].values() if run["method"] in unseen]
    assert unseen == UNSEEN.get(name, set()) and found + len(left) == len(results.content["runs"]) > 0
    assert results.device == "cpu"
    runner = Asking(setting, results, tmp_path / "work", jobs=1)
    runner.asked = set()
    compare(setting, runner)
    assert runner.asked == NEVER_RUN.get(name, set())
