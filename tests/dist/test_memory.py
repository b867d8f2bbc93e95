"""`model/memory.py` against the tensors DeepSpeed 0.19.8 really keeps, on two data ranks."""

from __future__ import annotations

import pytest

from tests.dist.launch import run_ranks

CLASSES = [("fp32", "0"), ("fp32", "1"), ("fp32", "2"), ("bf16", "0"), ("bf16", "1"), ("bf16", "2"), ("bf16", "1f")]


def test_memory_and_gradient_bytes_are_as_planned() -> None:
    for rank in run_ranks(2, "tests.dist.memory_worker", {"classes": CLASSES}):
        assert len(rank) == len(CLASSES)
        for key, ratios in rank.items():
            print(key, {name: round(ratio, 5) for name, ratio in ratios.items()})
            assert ratios["gradients"] == 1, key
            assert ratios["between steps"] == pytest.approx(1, abs=2e-3), (key, ratios)
            assert ratios["in a step"] == pytest.approx(1, abs=2e-3), (key, ratios)
