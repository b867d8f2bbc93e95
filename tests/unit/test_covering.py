"""The cases of tests/equality hold every pair that the package takes."""

from __future__ import annotations

from tests.equality.cases import FACTORS, VARIANTS, name_of, rows, valid
from tests.equality.covering import pairs_of, possible_pairs
from tests.equality.names import RENAMED, words_for


def test_every_possible_pair_occurs_once_at_least() -> None:
    made = rows()
    bare = [{name: row[name] for name in FACTORS} for row in made]
    needed = possible_pairs(FACTORS, valid)
    assert len(needed) > 200
    assert not needed - set().union(*map(pairs_of, bare))
    assert all(map(valid, bare))
    assert len({name_of(row) for row in made}) == len(made) < 50
    assert [options for _, options in VARIANTS if not any(row["variant"] == options for row in made)] == []


def test_a_commit_is_given_its_own_names(monkeypatch) -> None:
    monkeypatch.setitem(RENAMED, "new.name", "old.name")
    assert words_for({"new.name": 1, "same": True}, ["old.name", "same"]) == ["--old.name=1", "--same=true"]
    assert words_for({"new.name": 1}, ["new.name"]) == ["--new.name=1"]
