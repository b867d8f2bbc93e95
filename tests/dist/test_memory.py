"""`train/memory.py` against the tensors DeepSpeed 0.19.8 really keeps, on two data ranks, at tp 1 and 2."""

from __future__ import annotations

import pytest

from tests.dist.launch import run_ranks

CLASSES = [("fp32", "0"), ("fp32", "1"), ("bf16", "0"), ("bf16", "2"), ("bf16", "1f")]
TP_CLASSES = [("fp32", "2"), ("bf16", "1")]
TOLERANCE = 2e-3  # batches, and tensors that straddle two partitions


@pytest.mark.parametrize(("tp", "classes"), [(1, CLASSES), pytest.param(2, TP_CLASSES, marks=pytest.mark.full)])
def test_memory_and_gradient_bytes_are_as_planned(tp: int, classes: list[tuple[str, str]]) -> None:
    for rank in run_ranks(2 * tp, "tests.dist.memory_worker", {"classes": classes, "tp": tp}):
        assert len(rank) == len(classes)
        for key, ratios in rank.items():
            print(key, {name: round(ratio, 5) for name, ratio in ratios.items()})
            assert ratios["gradients"] == 1, key
            assert ratios["between steps"] == pytest.approx(1, abs=TOLERANCE), (key, ratios)
            assert ratios["in a step"] == pytest.approx(1, abs=TOLERANCE), (key, ratios)
