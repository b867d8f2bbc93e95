"""Rank of what training changed: classic LoRA at most r, SwitchLoRA's init at most 2r, SwitchLoRA more."""

from __future__ import annotations

import torch

from megatron_switchlora.config.run import RunConfig
from tests.plain import PlainRun, make_batches, small_config

RANK = 5


def update_ranks(config: RunConfig) -> list[int]:
    """Singular values above 1e-3 of the largest, for each adapted matrix's change over 40 steps (float64)."""
    run = PlainRun(config, torch.float64)
    before = {name: linear.effective_weight() for name, linear in run.method.linears.items()}
    for step, batch in enumerate(make_batches(config, 40)):
        run.step(step, batch)
    ranks = []
    for name, linear in run.method.linears.items():
        values = torch.linalg.svdvals(linear.effective_weight() - before[name])
        ranks.append(int((values > 1e-3 * values[0]).sum()))
    return ranks


def test_ranks_of_trained_updates() -> None:
    common = {"method__rank": RANK, "optim__lr": 0.02}
    classic = update_ranks(small_config("lora", method__init="classic", **common))
    start = update_ranks(small_config("lora", **common))
    switching = update_ranks(small_config("switchlora", **common))
    print(f"\nranks of updates at r = {RANK}: classic {classic}, SwitchLoRA's init {start}, SwitchLoRA {switching}")
    assert max(classic) <= RANK
    assert RANK < max(start) <= 2 * RANK
    assert min(switching) > 2 * RANK
