"""LTE heads on ranks: the plain reference of Algorithm 1 in float64, then under DeepSpeed with dp, tp and ZeRO."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_grid import WIDE

full = pytest.mark.full
SWITCHES: dict[str, Any] = {"method__lte__inner": "switchlora", "method__alpha": 1.0}
DELTA: dict[str, Any] = {"method__lte__merge_traffic": "delta"}
RESET: dict[str, Any] = {"method__lte__merge_form": "reset"}
MERGED = [{}, RESET, DELTA, SWITCHES, {"method__lte__local_heads": 2}]
BUCKETED = [{}, DELTA, SWITCHES]


def run(ranks: int, heads: int, tp: int, cases: list[dict[str, Any]], timeout: float = 280) -> list[list[dict]]:
    """Results by case, then by rank."""
    found = run_ranks(ranks, "tests.dist.lte_worker", {"heads": heads, "tp": tp, "cases": cases}, timeout)
    return [list(case) for case in zip(*found, strict=True)]


def check_reference(results: list[dict[str, Any]]) -> None:
    worst = max(max(result["gaps"].values()) for result in results)
    print(f"\nfurthest from the reference: {worst:.1e}")
    assert worst < 1e-9


def check_merges_in_fp32(results: list[dict[str, float]]) -> None:
    gap, spread = (max(result[key] for result in results) for key in ("gap", "spread"))
    print(f"\na merge moves the mean by {gap:.1e} of its largest entry; heads were {spread:.1e} from it")
    assert gap < 1e-6 and spread > 1e-3


def check_deepspeed(results: list[dict[str, Any]], merges: int, bar: float = 1e-5, of_mean: float = 3e-5) -> None:
    """Against the reference within the bar, the mean model within its own; nothing crosses heads but at merges, and
    there what the formula says."""
    gaps = {key: max(result[key] for result in results) for key in ("gap", "loss_gap", "norm_gap")}
    print(f"\nfrom the reference: mean model {gaps['gap']:.1e} of its largest entry, losses {gaps['loss_gap']:.1e}, "
          f"norms {gaps['norm_gap']:.1e} relative")  # fmt: skip
    assert max(gaps["loss_gap"], gaps["norm_gap"]) < bar and gaps["gap"] < of_mean
    for result in results:
        assert result["differing"] == []
        assert result["cast_gap"] == 0.0
        assert result["odd_origin"] in (None, True)
        assert result["losses"] == results[0]["losses"]
        assert max(result["control_bytes"]) + result["check_bytes"] <= 64
        sent = [number for number in result["merge_bytes"] if number]
        assert sent == [result["sent"]] * merges
        assert all(number == 0 for step, number in enumerate(result["merge_bytes"]) if (step + 1) % 3)


@pytest.mark.timeout(320)
def test_two_heads_on_two_ranks() -> None:
    cases = [
        {"changes": {}, "steps": 12},
        {"changes": SWITCHES, "steps": 12},
        {
            "changes": {
                "method__lte__local_heads": 2,
                "method__lte__merge_form": "reset",
                "method__lte__merge_traffic": "delta",
            },
            "steps": 12,
        },
        {"changes": {"method__lte__base": "nf4"}, "steps": 9, "twin": True},
        {"changes": {"method__lte__base": "nf4", "method__lte__merge_form": "reset", "method__lte__redraw_A": True},
         "steps": 8, "twin": True},
        {"changes": {}, "steps": 9, "stage": "0"},
        {"changes": {"method__lte__local_heads": 2}, "steps": 9, "stage": "2"},
        *({"changes": {"train__precision": precision, "method__compute": "auto"}, "steps": 5, "stage": stage,
           "as_lora": True} for precision, stage in (("fp32", "1"), ("bf16", "0"))),
        *({"changes": changes | {"method__lte__merge_interval": "never", "optim__lr": 0.01}, "steps": 6, "fp32": True}
          for changes in MERGED),
        *({"changes": changes, "steps": 6, "bucket": 40_000} for changes in BUCKETED),
        {"changes": {"method__init": "switchlora", "method__alpha": 1.0}, "steps": 7, "ends": True},
        {"changes": {"method__rank": 20, "method__alpha": 40.0}, "steps": 6, "stage": "0"},
    ]  # fmt: skip
    found = run(2, 2, 1, cases)
    for results in found[:3]:
        check_reference(results)
    for results in found[3:5]:
        assert max(result["gap"] for result in results) < 1e-9
    for results in found[5:7]:
        check_deepspeed(results, merges=3)
    assert [result["odd_origin"] for result in found[5]] == [True, True]
    assert all(result["alike"] for results in found[7:9] for result in results)
    for results in found[9 : 9 + len(MERGED)]:
        check_merges_in_fp32(results)
    *bucketed, ends, mixed = found[9 + len(MERGED) :]
    for results in bucketed:  # two merges, each of some buckets of some layers
        check_reference(results)
        assert all(2 * 3 < result["calls"] < 2 * result["layers"] for result in results)
    assert max(result["gap"] for result in ends) < 1e-12 and min(result["switching"] for result in ends) > 1e-4
    check_deepspeed(mixed, merges=2)
    assert mixed[0]["ways"] == [False, True]  # of keys and values the products are fewer bytes


@full
@pytest.mark.timeout(320)
def test_two_heads_of_two_tensor_parallel_ranks_under_zero_1() -> None:
    """And one head on all four ranks, never merged, is LoRA to the bit."""
    alone: list[dict[str, Any]] = [
        {"changes": {"train__precision": precision, "method__compute": "auto"}, "steps": 5, "stage": stage,
         "as_lora": True} for precision, stage in (("fp32", "1"), ("bf16", "2"))
    ]  # fmt: skip
    found = run(4, 2, 2, [{"changes": {}, "steps": 10, "stage": "1"}, *alone])
    check_deepspeed(found[0], merges=3)
    assert all(result["alike"] for results in found[1:] for result in results)


@full
@pytest.mark.timeout(620)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_form_under_every_stage(tp: int) -> None:
    """Two heads of two data-parallel ranks, or of two tensor-parallel ones: every pair of form, stage and mesh."""
    forms: list[dict[str, Any]] = [
        {"method__lte__merge_form": "reset"},
        {"method__lte__merge_traffic": "delta"},
        SWITCHES,
        {"method__lte__local_heads": 2, "method__lte__merge_form": "reset"},
        {"method__lte__local_heads": 2},
    ]
    stages = "02" if tp == 1 else "1"  # on one data rank they are the same arithmetic
    cases = [{"changes": form, "steps": 7, "stage": stage} for form in forms for stage in stages]
    plain = len(cases)
    in_4_bits = {"method__lte__base": "nf4", **(WIDE if tp > 1 else {})}
    cases += [{"changes": {**in_4_bits, **more}, "steps": 7, "stage": "1"} for more in ({}, RESET)]
    if tp == 1:  # in bf16 they are dequantised by bitsandbytes' kernels, where these work
        cases.append({"changes": {**in_4_bits, "train__precision": "bf16"}, "steps": 7, "stage": "0"})
    found = run(4, 2, tp, cases, timeout=600)
    for case, results in zip(cases[:plain], found, strict=False):
        # after a switch Adam's first steps of a row have the size of the rate, whatever the rounding they are made of
        check_deepspeed(results, merges=2, bar=5e-5 if case["changes"] is SWITCHES else 1e-5)
    for case, results in zip(cases[plain:], found[plain:], strict=True):
        if case["changes"].get("train__precision") == "bf16":
            check_deepspeed(results, merges=2, bar=1e-2, of_mean=0.08)
        else:  # rounding may choose the other one of two levels, and Adam makes a step of a gradient near zero
            check_deepspeed(results, merges=2, bar=5e-3, of_mean=2e-3)
        # once per head in host memory, no fp32 matrix beside it
        assert {result["frozen_entries"] for result in results} == {0}
        assert sum(result["origin_entries"] for result in results) == 2 * results[0]["entries"] * tp


@pytest.mark.long
@pytest.mark.timeout(320)
def test_every_form_equals_the_reference_for_40_steps() -> None:
    """Each runs 12 steps above or 40 steps in one process (tests/numerics/test_lte.py) in shorter sets."""
    forms: list[dict[str, Any]] = [
        {},
        {"method__lte__merge_form": "reset"},
        {"method__lte__merge_traffic": "delta"},
        SWITCHES,
        {"method__lte__local_heads": 2},
        {"method__lte__merge_interval": "never"},
    ]
    for results in run(2, 2, 1, [{"changes": form, "steps": 40} for form in forms]):
        check_reference(results)
