"""Covering arrays: few rows in which every possible pair of two factors' values occurs at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]
TRIES = 60  # complete rows that are tried for every row taken


def pairs_of(row: Row) -> set[Pair]:
    """Return all pairs of a row's values, each with its factors in the row's order."""
    return set(itertools.combinations(row.items(), 2))


def possible_pairs(factors: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> set[Pair]:
    """Return the pairs that occur in some valid row."""
    found: set[Pair] = set()
    for values in itertools.product(*factors.values()):
        row = dict(zip(factors, values, strict=True))
        if valid(row):
            found |= pairs_of(row)
    return found


def covering_array(factors: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]) -> list[Row]:
    """Return valid rows that hold every possible pair; the same ones at every call.

    Greedy: each row begins with a pair that is still missing, and is the best of some random completions.
    """
    draw = random.Random(0)
    missing = possible_pairs(factors, valid)
    rows: list[Row] = []
    while missing:
        start = min(missing, key=repr)
        candidates = [row for _ in range(TRIES) if (row := _completed(factors, start, valid, draw))]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def _completed(
    factors: Mapping[str, Sequence[Any]], start: Pair, valid: Callable[[Row], bool], draw: random.Random
) -> Row:
    """Return a random valid row that holds the pair."""
    fixed = dict(start)
    while True:
        row = {name: fixed.get(name, draw.choice(values)) for name, values in factors.items()}
        if valid(row):
            return row
