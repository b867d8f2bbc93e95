"""Cases of tensor-parallel parity, run on a mesh, and how far they are from one process."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.dist.launch import run_ranks

METHODS = ("full", "lora", "switchlora")
STAGES = ("0", "1", "2")
BF16_STAGES = ("0", "1", "2", "1f")
STEPS, SHORT = 20, 6  # in the full set, and every day
# odd sizes: 75 and the vocabulary of 61 are padded on every mesh, to 64 or 128 on a rank
PADDED = {"model__intermediate_size": 75, "model__num_kv_heads": 4, "model__pad_multiple": 64}
WIDE = {"model__hidden_size": 128, "model__intermediate_size": 256}  # whole blocks of 4 bits on a rank
RESTARTS = {"method__relora__interval": 5, "method__relora__warmup": 2, "method__relora__moments": "prune",
            "method__relora__keep": 0.05}  # fmt: skip


NEEDS_GALORE = pytest.mark.skipif(
    find_spec("galore_torch") is None, reason="galore-torch is not installed: pip install '.[galore]'"
)
GALORE = {"method": "galore", "stage": "0", "precision": "fp32", "changes": {"method__galore__update_gap": 5}}


def grid(
    shape: dict[str, Any] = PADDED, methods: tuple[str, ...] = METHODS, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Methods at every stage in fp32, switchlora in every bf16 class too."""
    fp32 = [
        {"method": m, "stage": s, "precision": "fp32", "steps": steps, "changes": shape}
        for m in methods
        for s in STAGES
    ]
    bf16 = [
        {"method": "switchlora", "stage": s, "precision": "bf16", "steps": steps, "changes": shape} for s in BF16_STAGES
    ]
    return [*fp32, *bf16]


def on_mesh(case: dict[str, Any], dp: int) -> dict[str, Any]:
    """Return the case with two micro-batches per step of one data rank, as two have: each is a pass of its own."""
    return {**case, "changes": {"train__micro_batch_size": 4, **case.get("changes", {})}} if dp == 1 else case


def run_mesh(dp: int, tp: int, cases: list[dict[str, Any]], timeout: float = 280) -> list[dict[str, Any]]:
    """Results of rank 0; all ranks must say the same, hold equal replicas and keep the padding at zero."""
    given = [on_mesh(case, dp) for case in cases]
    ranks = run_ranks(dp * tp, "tests.dist.parity_worker", {"cases": given, "tp": tp}, timeout)
    for rank, found in enumerate(ranks):
        for case, mine, first in zip(cases, found, ranks[0], strict=True):
            where = (dp, tp, rank, case)
            assert mine["losses"] == first["losses"], where
            assert mine["norms"] == first["norms"], where
            assert mine["differing"] == [], where
            assert mine["padding"] == 0.0, where
            if mine["bank"]:
                assert mine["bank"]["whole"] and mine["bank"]["held_twice"] == 0, where
                assert mine["bank"]["bytes"] == mine["bank"]["expected_bytes"], where
            if case["method"] == "relora":
                check_restarts(mine, case["steps"] // 5)
    return ranks[0]


def check_restarts(run: dict[str, Any], restarts: int) -> None:
    """What a run with RESTARTS must have seen."""
    assert run["restarts"] == restarts > 0
    assert run["function_change"] < 1e-6
    assert run["master_gap"] == run["reset_left"] == run["wrongly_pruned"] == 0


def worst(a: list[float], b: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def gaps(cases: list[dict[str, Any]], found: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """Largest differences from `base` (the same cases on one process), by precision and kind; switches must agree."""
    result: dict[str, float] = {}
    for case, mine, theirs in zip(cases, found, base, strict=True):
        assert mine["switched"] == theirs["switched"], case
        for kind in ("losses", "norms"):
            key = f"{case['precision']} {kind}"
            result[key] = max(result.get(key, 0.0), worst(mine[kind], theirs[kind]))
    return result
