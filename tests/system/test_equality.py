"""Ten cases of tests/equality with this tree against itself: what is compared is the same whenever it runs, and a
change of the mathematics shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY
from tests.equality.__main__ import differences
from tests.equality.cases import FACTORS, name_of, rows, world_of
from tests.equality.covering import Row
from tests.equality.observe import Observed, Tree, observe, open_tree
from tests.system.commands import write_corpus

COVERED = ("method", "zero", "tp", "dp", "precision", "resumed")


def ten_cases() -> list[Row]:
    """Return cases of at most two ranks with every value of each factor, few of them resumed: these start twice."""
    left = sorted((row for row in rows() if world_of(row) <= 2), key=lambda row: row["resumed"])
    chosen: list[Row] = []
    while len(chosen) < 10:
        seen = {(factor, row[factor]) for row in chosen for factor in COVERED}
        best = max(left, key=lambda row: len({(factor, row[factor]) for factor in COVERED} - seen))
        chosen.append(best)
        left.remove(best)
    return chosen


CASES = ten_cases()
CHANGED = next(row for row in CASES if world_of(row) == 1 and not row["resumed"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return open_tree(REPOSITORY, tmp_path_factory.mktemp("options"))


def train(tree: Tree, row: Row, folder: Path) -> Observed:
    return observe(tree, row, folder / "run", write_corpus(folder / "corpus"), whole=False)


def test_ten_cases_hold_every_method_and_axis() -> None:
    for factor in COVERED:
        assert {row[factor] for row in CASES} == set(FACTORS[factor])


@pytest.mark.full
@pytest.mark.parametrize("row", CASES, ids=name_of)
def test_a_tree_equals_itself(row: Row, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = train(tree, row, tmp_path), train(tree, row, tmp_path / "again")
    assert len(first) > 50
    assert not differences(first, second)
    if row is CHANGED:  # one shows what a change makes of it
        (tmp_path / "changed").mkdir()
        changed = row | {"variant": row["variant"] | {"train.seed": 1}}
        assert len(differences(first, train(tree, changed, tmp_path / "changed"))) > 20
