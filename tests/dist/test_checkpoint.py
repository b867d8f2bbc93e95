"""Checkpoints by fresh engines: bit for bit on the same mesh, the same trajectory on every other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_grid import BF16_STAGES, GALORE, METHODS, NEEDS_GALORE, PADDED, RESTARTS, STAGES, WIDE, worst
from tests.equality.covering import covering_array, pairs_of, possible_pairs

pytestmark = pytest.mark.timeout(900)
STEPS, SAVED = 11, 6


def run_mesh(dp: int, tp: int, cases: list[dict[str, Any]], heads: int = 1) -> list[list[dict[str, Any]]]:
    """Results by rank and case."""
    payload = {"tp": tp, "heads": heads, "cases": cases}
    return run_ranks(heads * dp * tp, "tests.dist.checkpoint_worker", payload, timeout=400)


def name(case: dict[str, Any]) -> str:
    return "-".join(case[key] for key in ("method", "stage", "precision", "tag") if key in case)


def cases_of(methods: tuple[str, ...], fp32: tuple[str, ...], bf16: tuple[str, ...]) -> list[dict[str, Any]]:
    pairs = [(stage, "fp32") for stage in fp32] + [(stage, "bf16") for stage in bf16]
    return [{"method": m, "stage": stage, "precision": precision} for m in methods for stage, precision in pairs]


def relora(*classes: tuple[str, str]) -> list[dict[str, Any]]:
    """Restarts at steps 5 and 10: one behind the checkpoint, one after it."""
    return [{"method": "relora", "stage": stage, "precision": p, "changes": RESTARTS} for stage, p in classes]


FACTORS = {"method": [*METHODS, "relora"], "stage": list(BF16_STAGES), "precision": ["fp32", "bf16"]}


def valid(row: dict[str, Any]) -> bool:
    return row["precision"] == "bf16" or row["stage"] in STAGES


FULL_GRID: list[dict[str, Any]] = [  # every pair of method, stage and precision
    row | ({"changes": RESTARTS} if row["method"] == "relora" else {}) for row in covering_array(FACTORS, valid)
]
SMALL_GRID = [
    *cases_of(("switchlora",), ("0", "2"), ("1f",)),
    *cases_of(("full",), ("2",), ()),
    *cases_of(("lora",), (), ("1",)),
    *relora(("2", "fp32")),
]
BASE = {"method__base_spread": "dp"}
LORA_GA = {"method": "lora", "stage": "2", "precision": "fp32",
           "changes": {"method__init": "lora_ga", "method__rslora": True, **BASE}}  # fmt: skip
FOUR_BITS = {"method": "lora", "stage": "1", "precision": "bf16", "tag": "nf4",
             "changes": {**WIDE, "method__init": "classic", "method__base_precision": "nf4"}}  # fmt: skip
MOVES = [  # W's rows spread over data ranks before the checkpoint, and after it
    {"method": method, "stage": stage, "precision": precision, "changes": before, "tag": f"then {then}",
     "then": {"method__base_spread": then}}
    for method, stage, precision, before, then in (
        ("switchlora", "1", "bf16", BASE, "none"),
        ("switchlora", "1", "fp32", {}, "dp"),
    )
]  # fmt: skip


@pytest.mark.full
def test_every_pair_of_method_stage_and_precision_is_saved() -> None:
    bare = [{name: row[name] for name in FACTORS} for row in FULL_GRID]
    assert not possible_pairs(FACTORS, valid) - set().union(*map(pairs_of, bare))


def check_same_mesh(dp: int, tp: int, cases: list[dict[str, Any]], folder: Path) -> None:
    """What accumulates is empty at a save: two data ranks take one micro-batch per step, one process has two."""
    micro, runs = {"train__micro_batch_size": 4}, []
    for case in cases:
        changes = PADDED | micro | case.get("changes", {})
        place = {**case, "changes": changes, "steps": STEPS, "folder": str(folder / name(case))}
        after = {**place, "changes": changes | case.get("then", {})}
        runs += [{**place, "first": 0, "save_at": SAVED}, {**after, "first": SAVED}]
    for rank, results in enumerate(run_mesh(dp, tp, runs)):
        for index, case in enumerate(cases):
            whole, resumed = results[2 * index : 2 * index + 2]
            where = (rank, name(case))
            assert "then" in case or resumed["loaded"] == whole["saved"], where  # else a rank has other slices
            for kind in ("losses", "norms", "switched"):
                assert resumed[kind] == whole[kind][SAVED:], (where, kind)
            assert len(set(whole["losses"])) == STEPS, where  # it does move
            assert resumed["export_gap"] < (1e-6 if case["precision"] == "fp32" else 5e-3), where
            if case["method"] == "switchlora":
                assert whole["facts"]["frozen"] > 0 and whole["facts"]["wrapped"] > 0, (where, whole["facts"])


@pytest.mark.guard_of("tests/dist/test_checkpoint.py::test_the_grid_on_the_same_mesh[dp2tp2]")
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path) -> None:
    check_same_mesh(2, 2, [*SMALL_GRID[:-2], FOUR_BITS, SMALL_GRID[-1], LORA_GA, *MOVES], tmp_path)


@pytest.mark.full
@NEEDS_GALORE
def test_galore_resumes_to_the_bit(tmp_path: Path) -> None:
    check_same_mesh(2, 1, [GALORE], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "cases"),
    [((1, 1), SMALL_GRID), ((2, 2), [*FULL_GRID, LORA_GA, FOUR_BITS, *MOVES])],
    ids=["dp1tp1", "dp2tp2"],
)
def test_the_grid_on_the_same_mesh(tmp_path: Path, mesh: tuple[int, int], cases: list[dict[str, Any]]) -> None:
    """Every pair of method and class on dp 2 x tp 2, some on one process. Dp 2 alone saves the partitions of this mesh
    and tp 2 alone its shards, so they have no case."""
    check_same_mesh(*mesh, cases, tmp_path)


ON_ALL = pytest.mark.guard_of("tests/dist/test_checkpoint.py::{test}[all]")


@pytest.mark.parametrize(
    ("others", "methods"),
    [
        pytest.param([((1, 1), "1")], ("switchlora",), marks=ON_ALL),
        pytest.param([((1, 4), "0"), ((4, 1), "2"), ((1, 1), "1")], ("switchlora",), marks=pytest.mark.full),
    ],
    ids=["one process", "all"],
)
def test_another_mesh_continues_the_same_trajectory(
    tmp_path: Path, others: list[tuple[tuple[int, int], str]], methods: tuple[str, ...]
) -> None:
    """Saved at dp 2 x tp 2, ZeRO 1, W spread over data ranks; resumed on `others` ((dp, tp), stage), and without
    padding; what these save is resumed at dp 2 x tp 2, W whole.

    Switchlora's state is lora's and its bank, slots and counters, so lora has no case of its own.
    """
    changes = {**PADDED, **BASE, "train__micro_batch_size": 2}
    shared = {"precision": "fp32", "changes": changes, "steps": 20}
    home = [
        {**shared, "method": m, "stage": "1", "first": 0, "save_at": 8, "folder": str(tmp_path / m)} for m in methods
    ]
    base = dict(zip(methods, run_mesh(2, 2, home)[0], strict=True))
    back, largest = [], 0.0
    for mesh, stage in others:
        cases = []
        for m in methods:
            target = tmp_path / f"{m}-{mesh[0]}-{mesh[1]}" / "checkpoints"
            target.mkdir(parents=True)
            (target / "step-00000008").symlink_to(tmp_path / m / "checkpoints" / "step-00000008")
            bare = {**shared, "changes": {**changes, "model__pad_multiple": 1}}
            cases.append({**bare, "method": m, "stage": stage, "first": 8, "save_at": 14, "folder": str(target.parent)})
            whole = {"changes": {**changes, "method__base_spread": "none"}}
            back.append({**shared, **whole, "method": m, "stage": "2", "first": 14, "folder": str(target.parent)})
        for m, found in zip(methods, run_mesh(*mesh, cases)[0], strict=True):
            assert found["switched"] == base[m]["switched"][8:], (mesh, m)
            largest = max(largest, *(worst(found[kind], base[m][kind][8:]) for kind in ("losses", "norms")))
    for case, found in zip(back, run_mesh(2, 2, back)[0], strict=True):
        assert found["switched"] == base[case["method"]]["switched"][14:], case
        largest = max(largest, *(worst(found[kind], base[case["method"]][kind][14:]) for kind in ("losses", "norms")))
    print(f"\nother meshes and back: losses and norms within {largest:.1e} of the uninterrupted run")
    assert largest < 1e-5


LTE: dict[str, Any] = {"method__lte__merge_interval": 3, "method__alpha": 14.0, **PADDED}
LTE_FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("1", "fp32", {}),
    ("0", "bf16", {"method__lte__local_heads": 2}),
    ("2", "fp32", {"method__lte__inner": "switchlora", "method__alpha": 1.0}),
    ("1", "fp32", {"method__lte__base": "nf4", "method__lte__merge_form": "reset", "method__lte__redraw_A": True}),
]


def lte_case(folder: Path, stage: str, precision: str, form: dict[str, Any], **more: Any) -> dict[str, Any]:
    place = str(folder / str(abs(hash(json.dumps(form)))))
    return {
        "method": "lte",
        "stage": stage,
        "precision": precision,
        "changes": {**LTE, **form},
        "folder": place,
        **more,
    }


def check_lte(folder: Path, dp: int, tp: int, forms: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Saved between two merges, at step 8 of 10, resumed to the bit."""
    runs = []
    for form in forms:
        runs += [lte_case(folder, *form, steps=10, first=0, save_at=8), lte_case(folder, *form, steps=10, first=8)]
    for rank, results in enumerate(run_mesh(dp, tp, runs, heads=2)):
        for index, form in enumerate(forms):
            whole, resumed = results[2 * index : 2 * index + 2]
            assert resumed["loaded"] == whole["saved"], (rank, form)
            for kind in ("losses", "norms", "switched"):
                assert resumed[kind] == whole[kind][8:], (rank, form, kind)
            assert resumed["export_gap"] < (1e-6 if form[1] == "fp32" else 5e-3), (rank, form)


@pytest.mark.guard_of("tests/dist/test_checkpoint.py::test_lte_resumed_on_larger_heads_to_the_bit[dp2]")
def test_lte_resumed_between_merges_to_the_bit(tmp_path: Path) -> None:
    check_lte(tmp_path, 1, 1, LTE_FORMS[:2])


@pytest.mark.full
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2)], ids=["dp2", "tp2"])
def test_lte_resumed_on_larger_heads_to_the_bit(tmp_path: Path, dp: int, tp: int) -> None:
    """Every form with two data ranks a head, which implies one. With two tensor-parallel ones those forms whose further
    state is split: the bank, and W in 4 bits."""
    reset: tuple[str, str, dict[str, Any]] = (
        "0", "fp32", {"method__lte__merge_form": "reset", "method__lte__local_heads": 2},
    )  # fmt: skip
    forms = [*LTE_FORMS, reset] if tp == 1 else LTE_FORMS[2:]
    wide = WIDE if tp > 1 else {}
    check_lte(tmp_path, dp, tp, [(s, p, {**c, **(wide if "method__lte__base" in c else {})}) for s, p, c in forms])


@pytest.mark.full
def test_heads_change_after_a_merge(tmp_path: Path) -> None:
    """Two heads on ranks, saved after a merge, go on as four in a process (those that switch on ranks) and as one: the
    mean model stays, and so do the factors of the heads that stay; the others begin. Every form of merge and base."""
    shared: dict[str, Any] = {"method": "lte", "stage": "1", "precision": "fp32", "steps": 9}
    forms: list[dict[str, Any]] = [
        {},
        {"method__lte__merge_form": "reset"},
        {"method__lte__base": "nf4"},
        {"method__lte__inner": "switchlora", "method__alpha": 1.0},
    ]
    places = [tmp_path / str(number) for number in range(len(forms))]
    begun = [
        {**shared, "changes": {**LTE, **form}, "folder": str(place), "first": 0, "save_at": 6}
        for form, place in zip(forms, places, strict=True)
    ]
    run_mesh(1, 1, begun, heads=2)
    for ranks in (1, 4):
        cases, wanted = [], []
        for form, place in zip(forms, places, strict=True):
            for heads in (4, 1) if ranks == 1 and "method__lte__inner" not in form else (ranks,):
                folder = place / f"{ranks} x {heads}" / "checkpoints"
                folder.mkdir(parents=True)
                (folder / "step-00000006").symlink_to(place / "checkpoints" / "step-00000006")
                local = {"method__lte__local_heads": heads, "train__micro_batch_size": heads} if ranks == 1 else {}
                changes = {**LTE, **form, **local}
                cases.append({**shared, "changes": changes, "folder": str(folder.parent), "first": 6})
                wanted.append((min(2, heads), max(0, heads - 2)))
        results = run_mesh(1, 1, cases, heads=ranks)
        for index, case in enumerate(cases):
            found = [rank[index] for rank in results]
            assert all(rank["export_gap"] < 1e-6 for rank in found), case
            assert tuple(sum(rank[kind] for rank in found) for kind in ("kept", "fresh")) == wanted[index], case
