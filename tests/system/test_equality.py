"""Ten cases of tests/equality with this tree against itself: what is compared is the same whenever it runs, and a
change of the mathematics shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY
from tests.equality.__main__ import differences
from tests.equality.cases import name_of, rows, world_of
from tests.equality.observe import Observed, Tree, observe, open_tree
from tests.system.commands import write_corpus

CASES = [row for row in rows() if world_of(row) <= 2][::2][:10]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return open_tree(REPOSITORY, tmp_path_factory.mktemp("options"))


def train(tree: Tree, row: dict, folder: Path) -> Observed:
    return observe(tree, row, folder / "run", write_corpus(folder / "corpus"), whole=False)


@pytest.mark.full
@pytest.mark.parametrize("row", CASES, ids=name_of)
def test_a_tree_equals_itself(row: dict, tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = train(tree, row, tmp_path), train(tree, row, tmp_path / "again")
    assert len(first) > 50
    assert not differences(first, second)
    if row is CASES[0]:  # one shows what a change makes of it
        (tmp_path / "changed").mkdir()
        changed = row | {"variant": row["variant"] | {"train.seed": 1}}
        assert len(differences(first, train(tree, changed, tmp_path / "changed"))) > 20
