"""What parts of a step copy to the GPU and wait for."""

from __future__ import annotations

from typing import Any

from tests.dist.launch import run_ranks


def found_of(part: str) -> Any:
    return run_ranks(1, "tests.pretend.parts_worker", {"part": part})[0]


def test_a_4_bit_layer_neither_copies_nor_waits() -> None:
    for counts in found_of("nf4").values():
        assert counts["launches"] > 5
        assert counts["uploads"] == counts["downloads"] == counts["waits"] == 0


def test_a_merge_reads_origins_from_pinned_memory_without_a_wait() -> None:
    found = found_of("merge")
    assert found["pinned"] and found["layers"] == 3 * 7
    assert found["counts"]["uploads"] == found["layers"]
    assert found["counts"]["waits"] == found["counts"]["downloads"] == 0


def test_grouped_heads_are_repeated_in_fp32() -> None:
    found = found_of("attention")
    assert found["given"] == [[4, False], [2, True], [2, True]]  # fp32 and bf16 on the GPU, fp32 on the CPU
    assert found["error"] < 1e-6


def test_lora_ga_finds_its_factors_on_the_gpu() -> None:
    found = found_of("gradient_pass")
    assert found["matrices"] == 7 and found["places"] == ["cpu"]
    assert found["error"] < 1e-9
