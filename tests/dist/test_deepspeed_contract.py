"""DeepSpeed 0.19.8's internals as the package relies on them, in all its optimizer classes, on two data ranks.

An upgrade that moves them fails here and not in a run.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "tests.dist.contract_worker", {}, timeout=200)


@pytest.fixture(scope="module")
def split_ranks() -> list[dict[str, Any]]:
    """Two tensor-parallel ranks."""
    return run_ranks(2, "tests.dist.contract_worker", {"tp": 2}, timeout=200)


@pytest.mark.full
def test_a_bad_step_on_one_tensor_parallel_rank_is_refused_on_all(split_ranks: list) -> None:
    for rank in split_ranks:
        assert len(rank["poison"]) == 15
        for key, seen in rank["poison"].items():
            assert not seen["healthy"] and seen["unchanged"], key
            assert seen["found"] is not None, key  # what one rank sends, the other receives
    for key, seen in split_ranks[0]["poison"].items():
        if key.endswith("output"):
            assert seen["found"] == "the output of model.layers.1.mlp.up_proj", key
    assert all(all(facts.values()) for rank in split_ranks for facts in rank["contract"].values())
    check_norms(split_ranks)


def test_internals_are_as_relied_upon(ranks: list) -> None:
    for rank in ranks:
        assert len(rank["contract"]) == 7
        for key, facts in rank["contract"].items():
            assert all(facts.values()), (key, facts)
        assert "every_element_owned_once" in rank["contract"]["bf16 1f"]


def test_a_bad_step_is_refused_on_every_rank_and_class(ranks: list) -> None:
    for rank in ranks:
        assert len(rank["poison"]) == 15
        for key, seen in rank["poison"].items():
            assert not seen["healthy"], key
            assert seen["unchanged"], key


def check_norms(ranks: list) -> None:
    for rank in ranks:
        assert rank["norm_gaps"] == ranks[0]["norm_gaps"]
        for key, gaps in rank["norm_gaps"].items():
            print(f"own norm against DeepSpeed's, {key}: {gaps}")
            assert gaps["first norm"] < 1e-6, key
            assert max(gaps.values()) < (1e-6 if key.startswith("fp32") else 1e-2), key


def test_norm_and_clip_are_those_of_deepspeed(ranks: list) -> None:
    check_norms(ranks)


def test_fp32_sums_of_micro_batches_are_nearer_to_exact(ranks: list) -> None:
    gaps = ranks[0]["sum_gaps"]
    print(f"gradient of 16 micro-batches in bf16, relative error by class: {gaps}")
    assert gaps == ranks[1]["sum_gaps"]
    assert 0 < gaps["1f"] < 0.8 * min(gaps["1"], gaps["2"])
    assert gaps["1f"] < 2.0**-8  # what is sent is rounded to bf16, whatever the sum


def test_the_first_bad_layer_is_named(ranks: list) -> None:
    for key, seen in ranks[0]["poison"].items():
        if key.endswith("output"):
            assert seen["found"] == "the output of model.layers.1.mlp.up_proj", key
        else:
            # the gradient of this layer's output is made bad, so its own factors are the first to get a bad one
            assert seen["found"] is not None, key
            assert seen["found"].startswith("the gradient of "), key
            assert "model.layers.1" in seen["found"], key
    assert all(seen["found"] is None for seen in ranks[1]["poison"].values())


def test_corrupted_replicas_are_named(ranks: list) -> None:
    for rank in ranks:
        assert rank["equal"] == []
        assert rank["corrupted"] == [
            "model.layers.1.mlp.up_proj.weight differs between rank 0 and 1",
            "bank_B.4 differs between rank 0 and 1",
        ]


def test_unequal_ranks_are_refused_at_the_start(ranks: list) -> None:
    for rank in ranks:
        assert rank["refused"].startswith("The ranks start with different values: bank_A.2 differs"), rank["refused"]


def test_checkpointing_reaches_the_model(ranks: list) -> None:
    assert all(rank["checkpointing"] is True for rank in ranks)
