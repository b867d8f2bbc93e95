"""`planning/memory.py` against the tensors DeepSpeed 0.19.8 really keeps, on two data ranks, at tp 1 and 2."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks

# precision, stage, and where the rows of W lie
CLASSES = [
    ("fp32", "0", "none"),
    ("fp32", "1", "dp"),
    ("bf16", "0", "none"),
    ("bf16", "2", "dp"),
    ("bf16", "1f", "none"),
]
TP_CLASSES = [("fp32", "2", "none"), ("bf16", "1", "dp")]
TOLERANCE = 2e-3  # batches, and tensors that straddle two partitions


@pytest.mark.parametrize(("tp", "classes"), [(1, CLASSES), pytest.param(2, TP_CLASSES, marks=pytest.mark.full)])
def test_memory_and_gradient_bytes_are_as_planned(tp: int, classes: list[tuple[str, str, str]]) -> None:
    for rank in run_ranks(2 * tp, "tests.dist.memory_worker", {"classes": classes, "tp": tp}):
        assert len(rank) == len(classes)
        for key, ratios in rank.items():
            print(key, {name: round(ratio, 5) for name, ratio in ratios.items()})
            assert ratios["gradients"] == 1, key
            assert ratios["between steps"] == pytest.approx(1, abs=TOLERANCE), (key, ratios)
            # on a busy machine gloo's threads free a copy before the peak
            assert -TOLERANCE < ratios["in a step"] - 1 < 0.05, (key, ratios)


SOME = [
    *({"method": method, "stage": "0", "changes": {}} for method in ("full", "lora")),
    {"method": "switchlora", "stage": "1s", "changes": {"train__precision": "bf16"}},
    {"method": "lte", "stage": "1s", "changes": {"method__lte__local_heads": 2}},
]
METHODS, PEAK_STAGES = ("full", "lora", "switchlora"), ("0", "1s", "2s")
FORMS: list[dict[str, Any]] = [{}, {"train__activation_checkpointing": True}, {"train__precision": "bf16"}]
PEAKS: list[dict[str, Any]] = [
    # a Latin square: every pair of method, stage and form
    *({"method": method, "stage": stage, "changes": FORMS[(m + s) % 3]}
      for m, method in enumerate(METHODS) for s, stage in enumerate(PEAK_STAGES)),
    *({"method": "lora", "stage": "0", "changes": changes}
      for changes in ({"method__compute": "split"}, {"method__merged_cache": "accumulation"},
                      {"method__merged_cache": "recompute"})),
    {"method": "mhlora", "stage": "0", "changes": {"method__mhlora__heads": 4}},
    *({"method": "lte", "stage": "1s", "changes": {"method__lte__local_heads": heads, "method__lte__merge_form": form}}
      for heads, form in ((1, "resetless"), (2, "reset"), (4, "resetless"), (4, "reset"))),
    # last: what this class of DeepSpeed's leaves behind would be freed while the next case is measured
    {"method": "lora", "stage": "1f", "changes": {"train__precision": "bf16"}},
]  # fmt: skip


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME, id="some", marks=pytest.mark.guard_of("tests/dist/test_memory.py::{test}[all]")),
        pytest.param(PEAKS, id="all", marks=pytest.mark.full),
    ],
)
def test_the_peak_of_a_step_is_as_planned(cases: list[dict[str, Any]]) -> None:
    """What the allocator sees on one rank: there gloo's threads, whose frees the profiler misses, hold nothing."""
    (found,) = run_ranks(1, "tests.dist.peak_worker", {"tp": 1, "cases": cases})
    assert len(found) == len(cases)
    for case, (measured, predicted) in zip(cases, found, strict=True):
        error = predicted / measured - 1
        print(f"{case['method']} {case['stage']} {case['changes']}: {error:+.1%}")
        tolerance = 0.12 if case["stage"] == "2s" else 0.06 if case["method"] == "lte" else 0.03
        assert abs(error) < tolerance, case
