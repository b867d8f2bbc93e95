"""Ten cases of tests/equality with this tree against itself: what is compared is the same whenever it runs, and a
change of the mathematics shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY
from tests.equality.__main__ import differences
from tests.equality.cases import name_of, rows, world_of
from tests.equality.observe import Tree, observe, open_tree
from tests.system.commands import write_corpus

CASES = [row for row in rows() if world_of(row) <= 2][::2][:10]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return open_tree(REPOSITORY, tmp_path_factory.mktemp("options"))


@pytest.mark.full
@pytest.mark.parametrize("row", CASES, ids=name_of)
def test_a_tree_equals_itself(row: dict, tree: Tree, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    first, second = (observe(tree, row, tmp_path / side, corpus, whole=False) for side in ("first", "second"))
    assert len(first) > 50
    assert not differences(first, second)
    changed = observe(tree, row | {"variant": row["variant"] | {"train.seed": 1}}, tmp_path / "c", corpus, whole=False)
    assert len(differences(first, changed)) > 20
