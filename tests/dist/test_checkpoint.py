"""Checkpoints by fresh engines: bit for bit on the same mesh, the same trajectory on every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_grid import BF16_STAGES, METHODS, PADDED, STAGES, worst

pytestmark = pytest.mark.timeout(900)
STEPS, SAVED = 14, 8


def run_mesh(dp: int, tp: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results by rank and case."""
    return run_ranks(dp * tp, "tests.dist.checkpoint_worker", {"tp": tp, "cases": cases}, timeout=400)


def name(case: dict[str, Any]) -> str:
    return f"{case['method']}-{case['stage']}-{case['precision']}"


def cases_of(methods: tuple[str, ...], fp32: tuple[str, ...], bf16: tuple[str, ...]) -> list[dict[str, Any]]:
    pairs = [(stage, "fp32") for stage in fp32] + [(stage, "bf16") for stage in bf16]
    return [{"method": m, "stage": stage, "precision": precision} for m in methods for stage, precision in pairs]


FULL_GRID = cases_of(METHODS, STAGES, BF16_STAGES)
SMALL_GRID = [*cases_of(("switchlora",), STAGES, ("1f",)), *cases_of(("full",), ("2",), ()), *cases_of(("lora",), (), ("1",))]


def check_same_mesh(dp: int, tp: int, cases: list[dict[str, Any]], folder: Path) -> None:
    shared = {"changes": PADDED, "steps": STEPS}
    runs = []
    for case in cases:
        place = {**case, **shared, "folder": str(folder / name(case))}
        runs += [{**place, "first": 0, "save_at": SAVED}, {**place, "first": SAVED}]
    for rank, results in enumerate(run_mesh(dp, tp, runs)):
        for index, case in enumerate(cases):
            whole, resumed = results[2 * index : 2 * index + 2]
            where = (rank, name(case))
            assert resumed["loaded"] == whole["saved"], where
            for kind in ("losses", "norms", "switched"):
                assert resumed[kind] == whole[kind][SAVED:], (where, kind)
            assert len(set(whole["losses"])) == STEPS, where  # it does move
            if case["method"] == "switchlora":
                assert whole["facts"]["frozen"] > 0 and whole["facts"]["wrapped"] > 0, (where, whole["facts"])


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    check_same_mesh(2, 2, SMALL_GRID, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda mesh: f"dp{mesh[0]}tp{mesh[1]}")
def test_the_full_grid_on_the_same_mesh(tmp_path: Path, mesh: tuple[int, int]) -> None:
    check_same_mesh(*mesh, FULL_GRID, tmp_path)


@pytest.mark.parametrize(
    ("others", "methods"),
    [
        ([((1, 1), "1")], ("switchlora",)),
        pytest.param([((1, 4), "0"), ((4, 1), "2"), ((1, 1), "1")], METHODS, marks=pytest.mark.full),
    ],
    ids=["one process", "all"],
)
def test_another_mesh_continues_the_same_trajectory(
    tmp_path: Path, others: list[tuple[tuple[int, int], str]], methods: tuple[str, ...]
) -> None:
    """Saved at dp 2 x tp 2, ZeRO 1; resumed on `others` ((dp, tp), stage); what these save goes on at dp 2 x tp 2."""
    changes = {**PADDED, "train__micro_batch_size": 2}
    shared = {"precision": "fp32", "changes": changes, "steps": 20}
    home = [{**shared, "method": m, "stage": "1", "first": 0, "save_at": 8, "folder": str(tmp_path / m)} for m in methods]
    base = dict(zip(methods, run_mesh(2, 2, home)[0], strict=True))
    back, largest = [], 0.0
    for mesh, stage in others:
        cases = []
        for m in methods:
            target = tmp_path / f"{m}-{mesh[0]}-{mesh[1]}" / "checkpoints"
            target.mkdir(parents=True)
            (target / "step-00000008").symlink_to(tmp_path / m / "checkpoints" / "step-00000008")
            cases.append({**shared, "method": m, "stage": stage, "first": 8, "save_at": 14, "folder": str(target.parent)})
            back.append({**shared, "method": m, "stage": "2", "first": 14, "folder": str(target.parent)})
        for m, found in zip(methods, run_mesh(*mesh, cases)[0], strict=True):
            assert found["switched"] == base[m]["switched"][8:], (mesh, m)
            largest = max(largest, *(worst(found[kind], base[m][kind][8:]) for kind in ("losses", "norms")))
    for case, found in zip(back, run_mesh(2, 2, back)[0], strict=True):
        assert found["switched"] == base[case["method"]]["switched"][14:], case
        largest = max(largest, *(worst(found[kind], base[case["method"]][kind][14:]) for kind in ("losses", "norms")))
    print(f"\nother meshes and back: losses and norms within {largest:.1e} of the uninterrupted run")
    assert largest < 1e-5
