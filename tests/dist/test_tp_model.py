"""The tensor-parallel model equals transformers on 2, 3 and 4 ranks, padded or not, by Megatron's collectives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_model_worker import BATCH, LENGTH

HEADS = {2: 4, 3: 6, 4: 4}
METHODS = [
    {"name": "full"},
    {"name": "lora", "rank": 5, "compute": "split"},
    {"name": "lora", "rank": 5, "compute": "merged"},
    {"name": "switchlora", "rank": 5, "compute": "merged", "merged_cache": "recompute"},
]


def shapes(tp: int) -> dict[str, Any]:
    heads = HEADS[tp]
    return {
        "even": {"shape": {"intermediate_size": 72, "num_heads": heads}, "vocab": 60},
        "padded": {"shape": {"intermediate_size": 77, "num_heads": heads}, "vocab": 61},
        "grouped": {"shape": {"intermediate_size": 77, "num_heads": 2 * tp, "num_kv_heads": tp}, "vocab": 61},
        "tied": {"shape": {"intermediate_size": 77, "num_heads": heads, "tie_embeddings": True}, "vocab": 61},
    }


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.long)])
def ranks(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    payload = {"tp": request.param, "shapes": shapes(request.param), "methods": METHODS, "heads": HEADS[request.param]}
    return request.param, run_ranks(request.param, "tests.dist.tp_model_worker", payload, timeout=150)


def test_logits_and_gradients_equal_transformers(ranks: tuple) -> None:
    tp, results = ranks
    for result in results:
        for name, found in result["parity"].items():
            assert found["shapes_equal"] and found["initial_equal"], (tp, name)
            for key in ("logits", "loss", "gradients"):
                assert found[key] < 1e-5, (tp, name, key, found[key])
    worst = {key: max(f[key] for r in results for f in r["parity"].values()) for key in ("logits", "loss", "gradients")}
    print(f"\ntp {tp} against transformers: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))


def test_gradients_of_adapters_equal_one_process(ranks: tuple) -> None:
    tp, results = ranks
    worst = max(gap for result in results for gap in result["adapters"])
    print(f"\ntp {tp}: gradients of adapted models within {worst:.1e}")
    assert len(results[0]["adapters"]) == len(METHODS) - 1
    assert worst < 1e-5


def test_collectives_are_megatrons(ranks: tuple) -> None:
    """Forward: the embedding, two a layer, and two small ones of the loss; a low-rank layer adds none. Backward: two a
    layer and one before the head; the replicated factors' gradients ride with them."""
    tp, results = ranks
    layers, hidden, tokens = 2, 48, BATCH * LENGTH
    for method, found in zip(METHODS, results[0]["traffic"], strict=True):
        assert found["forward"]["calls"] == 1 + 2 * layers + 2, (tp, method)
        assert found["forward"]["values"] == (1 + 2 * layers) * tokens * hidden + 3 * tokens, (tp, method)
        assert found["backward"]["calls"] == 2 * layers + 1, (tp, method)
        factors = found["replicated_factors"]
        assert (factors > 0) == (method["name"] != "full")
        assert found["backward"]["values"] == (2 * layers + 1) * tokens * hidden + factors, (tp, method)
