"""Every method trains, is evaluated, exported and resumed on a pretend GPU as on the CPU.

What cannot run there: DeepSpeed, whose accelerators are fixed, and collectives, which need NCCL. tests/gpu has a real
device. The meshes that PlainRun cannot form (heads on ranks, tensor parallelism) run the same layers there and here.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.dist.launch import run_ranks

full = pytest.mark.full
NEEDS_GALORE = pytest.mark.skipif(find_spec("galore_torch") is None, reason="galore-torch is not installed")
LTE: dict[str, Any] = {"method__lte__local_heads": 2, "method__lte__merge_interval": 2, "optim__lr": 1e-5}
CASES: list[Any] = [
    pytest.param("full", {}, marks=full),
    pytest.param("lora", {"optim__lora_plus_ratio": 4.0, "optim__weight_decay": 0.1}, marks=full),
    ("lora", {"method__init": "classic", "train__activation_checkpointing": True}),
    pytest.param("lora", {"method__init": "semi_orthogonal", "method__compute": "split"}, marks=full),
    pytest.param("lora", {"method__init": "pissa", "method__merged_cache": "recompute"}, marks=full),
    pytest.param("lora", {"method__init": "lora_ga", "method__merged_cache": "accumulation"}, marks=full),
    pytest.param("lora", {"method__base_precision": "nf4"}, marks=full),
    pytest.param("relora", {"method__relora__interval": 2}, marks=full),
    ("relora", {"method__relora__interval": 2, "method__relora__moments": "prune"}),
    pytest.param("mhlora", {"method__mhlora__heads": 2, "method__alpha": 14.0}, marks=full),
    pytest.param("switchlora", {}, marks=full),
    pytest.param("switchlora", {"method__switch__selection": "random"}, marks=full),
    pytest.param("switchlora", {"method__switch__selection": "independent"}, marks=full),
    pytest.param("switchlora", {"method__init": "classic", "model__tie_embeddings": True}, marks=full),
    pytest.param("switchlora", {"method__init": "lora_ga"}, marks=full),
    ("switchlora", {"method__switch__bank_device": "host"}),
    pytest.param("lte", LTE, marks=full),
    pytest.param("lte", {**LTE, "method__lte__merge_form": "reset"}, marks=full),
    pytest.param("lte", {**LTE, "method__lte__merge_form": "reset", "method__lte__redraw_A": True}, marks=full),
    pytest.param("lte", {**LTE, "method__lte__local_heads": 1}, marks=full),
    pytest.param(
        "lte", {"method__lte__local_heads": 1, "method__lte__inner": "switchlora", "method__lte__merge_interval": 2},
        marks=full,
    ),
    ("lte", {**LTE, "method__lte__base": "nf4", "train__activation_checkpointing": True}),
    pytest.param("galore", {"method__galore__update_gap": 2}, marks=[full, NEEDS_GALORE]),
]  # fmt: skip


def named(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{k.split('__', 1)[1]}={v}" for k, v in value.items())


@pytest.mark.parametrize(("name", "changes"), CASES, ids=named)
def test_a_method_lives_on_the_gpu_as_on_the_cpu(name: str, changes: dict[str, Any]) -> None:
    (result,) = run_ranks(1, "tests.pretend.training_worker", {"changes": {"name": name, **changes}})
    found, wanted = result["losses"]
    worst = max(abs(mine[0] - theirs[0]) / theirs[0] for mine, theirs in zip(found, wanted, strict=True))
    print(f"{name} {changes}: losses differ by {worst:.1e}")
    assert worst < 1e-6
    assert [mine[2] for mine in found] == [theirs[2] for theirs in wanted]  # vectors switched
    assert result["again"] == found[-1] and result["fingerprints_equal"] and result["tensors"] > 10
    assert result["evaluated"][0] == pytest.approx(result["evaluated"][1], rel=1e-6)
    # An entry whose gradient is rounding alone moves by up to the rate in either direction: GaLore forms such entries.
    assert result["exported"] < (1e-3 if name == "galore" else 1e-5)
