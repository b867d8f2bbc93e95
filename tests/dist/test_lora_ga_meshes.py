"""LoRA-GA on dp 4, dp 2 x tp 2 and tp 4 equals one process: gradients, factors, zero padding, none gathered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks

DEGREES = [1, 2, 4]  # tensor-parallel degrees in a world of 4
CASES: list[dict[str, Any]] = [
    {"rank": 3},
    {"rank": 7, "oversample": 0, "power_iterations": 8},
    {"rank": 5, "direction": "random", "scale": "weight"},
    {"rank": 24, "samples": 40},  # Q is all of the 48 columns, more than a rank's rows
    {"rank": 5, "vectors": "gaussian"},
]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, "tests.dist.lora_ga_worker", {"degrees": DEGREES, "cases": CASES})


@pytest.mark.parametrize("tp", DEGREES)
def test_gradients_and_factors_equal_one_process(ranks: list[dict[str, Any]], tp: int) -> None:
    found = [rank[str(tp)] for rank in ranks]
    gradients = max(entry["gradients"] for entry in found)
    factors = {case: max(entry["factors"][case] for entry in found) for case in found[0]["factors"]}
    pissa = max(entry["pissa"] for entry in found)
    print(f"\ndp {4 // tp} x tp {tp}: gradients {gradients:.1e}, factors {factors}, PiSSA's {pissa:.1e}")
    assert len(factors) == len(CASES)
    assert gradients < 1e-12
    assert pissa < 1e-9  # where a rank's library gives other bits, too
    assert max(factors.values()) < 1e-9  # a singular vector is as exact as its value is apart from the next


def test_a_decomposition_hands_over_no_gradient(ranks: list[dict[str, Any]]) -> None:
    """Gate is [75, 48], down [48, 75], and Q = 12: four passes and the core sum [48, Q], five bases gather [Q, Q]; the
    signs of down's 2r right vectors, which are split, take a value each. The first rank hands on four bases [48, Q],
    five of the stacked triangles, and the core's vectors and values. A rank's part of the gradient has 1,824 or 912
    values."""
    for rank in ranks:
        for kind, signs in (("gate_proj", []), ("down_proj", [6])):
            assert rank["1"]["traffic"][kind] == []
            for tp in (2, 4):
                handed = [48 * 12] * 4 + [tp * 12 * 12] * 5 + [12 * 12 + 12 + 12 * 48]
                summed = signs + [12 * 12] * 5 + [48 * 12] * 5
                assert sorted(rank[str(tp)]["traffic"][kind]) == sorted(summed + handed), kind
