"""The wider grid of `make test-full`: selections, weight decay, checkpointing, host bank, classic init, all in bf16 too;
tensor-parallel meshes up to eight ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_grid import PADDED, gaps, grid, run_mesh
from tests.dist.test_zero_parity import BF16_STAGES, STAGES, worst

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "changes": {"optim__weight_decay": 0.1}},
    "classic": {"method": "lora", "changes": {"method__init": "classic"}},
    "random": {"method": "switchlora", "changes": {"method__selection": "random"}},
    "independent": {"method": "switchlora", "changes": {"method__selection": "independent"}},
    "decay": {"method": "switchlora", "changes": {"optim__weight_decay": 0.1, "method__freeze_steps": 0}},
    "tied": {"method": "switchlora", "changes": {"model__tie_embeddings": True, "method__bank_device": "host"}},
    "checkpointing": {"method": "switchlora", "changes": {"train__activation_checkpointing": True}},
    "no clip": {"method": "switchlora", "changes": {"optim__clip": 0.0, "optim__dense_lr": 0.0005}},
}
CASES = [
    {"name": name, "stage": stage, "precision": precision, "steps": 20, **variant}
    for name, variant in VARIANTS.items()
    for precision, stages in (("fp32", STAGES), ("bf16", BF16_STAGES))
    for stage in stages
]


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {dp: run_ranks(dp, "tests.dist.parity_worker", {"cases": CASES}, timeout=420)[0] for dp in (1, 2)}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_mesh_and_stage_agrees(results: dict, name: str) -> None:
    runs = {
        (dp, case["precision"], case["stage"]): run
        for dp, found in results.items()
        for case, run in zip(CASES, found, strict=True)
        if case["name"] == name
    }
    base = runs[1, "fp32", "0"]
    assert len(runs) == 2 * (len(STAGES) + len(BF16_STAGES))
    gaps = {"fp32": 0.0, "bf16": 0.0}
    for (_, precision, _), run in runs.items():
        assert run["switched"] == base["switched"]
        assert run["cast_gap"] == 0.0
        gaps[precision] = max(gaps[precision], worst(run["losses"], base["losses"]))
    print(f"\n{name}: losses within {gaps['fp32']:.1e} (fp32), {gaps['bf16']:.1e} (bf16) of fp32 at stage 0")
    assert gaps["fp32"] < 1e-6
    assert gaps["bf16"] < 5e-3


SIX_HEADS = {**PADDED, "model__num_heads": 6, "model__num_kv_heads": 3}  # heads of 8
TWELVE = {**PADDED, "train__global_batch_size": 12}
TP_MESHES = {(2, 1): PADDED, (1, 2): PADDED, (2, 2): PADDED, (1, 4): PADDED, (2, 4): PADDED, (1, 3): SIX_HEADS, (3, 2): TWELVE}


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The cases of each shape on one process."""
    return [(shape, run_mesh(1, 1, grid(shape))) for shape in (PADDED, SIX_HEADS, TWELVE)]


@pytest.mark.parametrize("mesh", TP_MESHES)
def test_tensor_parallel_meshes_equal_one_process(alone: list, mesh: tuple[int, int]) -> None:
    cases = grid(TP_MESHES[mesh])
    (base,) = [runs for shape, runs in alone if shape == TP_MESHES[mesh]]
    if mesh == (2, 4):  # eight ranks: SwitchLoRA alone
        base = [run for case, run in zip(cases, base, strict=True) if case["method"] == "switchlora"]
        cases = grid(methods=("switchlora",))
    runs = run_mesh(*mesh, cases, timeout=600)
    found = gaps(cases, runs, base)
    print(f"\ndp {mesh[0]} x tp {mesh[1]}: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
    assert found["fp32 losses"] < 1e-5 and found["fp32 norms"] < 1e-5
    assert found["bf16 losses"] < 5e-3 and found["bf16 norms"] < 5e-2
    for first in range(0, len(cases) - len(BF16_STAGES), len(STAGES)):  # a method's stages
        stages = runs[first : first + len(STAGES)]
        assert max(worst(run[key], stages[0][key]) for run in stages[1:] for key in ("losses", "norms")) < 1e-6
