"""Switching preserves the function: one switch, a thousand folds, and what a bf16 W would lose."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.distributed.linear import ColumnParallelLinear
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.distributed.shard import Axis, named_generator
from megatron_switchlora.lowrank.bank import CandidateBank
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.init import draw_vectors, factor_std
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.rows import RowNumbers
from megatron_switchlora.lowrank.schedule import ScheduleConfig, end_step, initial_state, plan_step
from megatron_switchlora.lowrank.switch import LayerSwitcher

M, N, R = 160, 96, 12


def drift_after_folds(folds: int, weight_dtype: torch.dtype, factor_dtype: torch.dtype) -> float:
    """Relative change of W + sBA (formed in float64) over at least `folds` switches of one linear."""
    base = ColumnParallelLinear(N, M, Axis())
    base.weight.data.normal_(0, 0.02, generator=named_generator(0, "W"))
    linear = LowRankLinear(base, R, 1 / R).to(factor_dtype)
    linear.weight = base.weight.detach().to(weight_dtype)
    bank = CandidateBank("device", "tp", lone_mesh())
    config = ScheduleConfig((min(M, N),), R, 4.0, 1.0, 10**6, 2, "ring", 0)
    state = initial_state(config)
    for side, factor, length in (("A", linear.lora_A, N), ("B", linear.lora_B, M)):
        std = factor_std(side, "switchlora", M, N, R)  # type: ignore[arg-type]
        vectors = draw_vectors(min(M, N), length, std, named_generator(0, side)).to(factor_dtype)
        bank.add(side, 0, vectors, None)
        factor.data.copy_(vectors[state.slots[side][0]])
    linear.add_product(-1.0)
    bank.place(factor_dtype, torch.device("cpu"), [[("A", 0)], [("B", 0)]])
    switcher = LayerSwitcher([linear], RowNumbers([[linear.lora_A, linear.lora_B]]), bank)

    def effective() -> torch.Tensor:
        product = linear.lora_B.detach().double().t() @ linear.lora_A.detach().double()
        return linear.weight.double() + product * linear.scaling

    before, done, step = effective(), 0, 0
    while done < folds:
        plan, indices = plan_step(config, state, step), Indices()
        tables = switcher.tables(plan, indices)
        indices.send(torch.device("cpu"))
        switcher.apply(tables, bank.fetch(tables.exchanges, indices).result(), indices)
        done += plan.count
        end_step(state)
        step += 1
    return float((effective() - before).norm() / before.norm())


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_one_switch_and_a_thousand_in_fp32(factor_dtype: torch.dtype) -> None:
    one = drift_after_folds(1, torch.float32, factor_dtype)
    thousand = drift_after_folds(1000, torch.float32, factor_dtype)
    print(
        f"\nfactors {factor_dtype}: relative drift of the function {one:.1e} after one step, "
        f"{thousand:.1e} after 1,000 folds"
    )
    assert one < 1e-6
    assert thousand < 1e-5


def test_bf16_base_would_drift() -> None:
    """Why W is kept in fp32: the number in docs/log.md."""
    drift = drift_after_folds(1000, torch.bfloat16, torch.bfloat16)
    print(f"\nbf16 W: relative drift {drift:.1e} after 1,000 folds")
    assert drift > 1e-2


def test_float64_folds_are_exact() -> None:
    assert drift_after_folds(1000, torch.float64, torch.float64) < 1e-13
