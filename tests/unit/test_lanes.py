"""Tests that keep two cores busy run one after the other, all others beside them."""

from __future__ import annotations

import pytest

from tests.dist.launch import REPOSITORY
from tests.lanes import BESIDE, OF_RANKS, RANKS, lane_of

pytest_plugins = ["pytester"]
SUITE = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_it(number):
    name = os.environ["PYTEST_XDIST_WORKER"] + " " + os.environ["PYTEST_CURRENT_TEST"]
    with open(pathlib.Path(__file__).parents[2] / "ran", "a") as ran:
        print(name, file=ran)
"""


def test_lanes_name_files_that_there_are() -> None:
    for file in BESIDE:
        assert (REPOSITORY / file).is_file() and file.startswith(OF_RANKS) and lane_of(f"{file}::test_x") == file
    assert lane_of("tests/dist/test_lte.py::test_x[a::b]") == RANKS
    assert lane_of("tests/unit/test_door.py::test_x") == "tests/unit/test_door.py"


def test_one_worker_has_all_ranks(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makeini("[pytest]\nnorecursedirs = .*\n")
    ranks = ("dist/test_a", "dist/test_b", "system/test_c")
    others = ("unit/test_d", "unit/test_e", "system/test_slurm")
    for name in (*ranks, *others):
        path = pytester.path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SUITE)
    result = pytester.runpytest_subprocess("-p", "tests.lanes", "-n", "2", "tests")
    result.assert_outcomes(passed=36)
    workers: dict[str, set[str]] = {}
    order = []
    for line in (pytester.path / "ran").read_text().splitlines():
        worker, file = line.split("::")[0].split(" ")
        name = file.removeprefix("tests/").removesuffix(".py")
        workers.setdefault(name, set()).add(worker)
        order.append(name)
    (lane,) = {worker for name in ranks for worker in workers[name]}  # whichever worker was ready first
    assert workers["system/test_slurm"] != {lane} and order.index("system/test_slurm") < order.index("unit/test_d")
    assert all(len(own) == 1 for own in workers.values())
