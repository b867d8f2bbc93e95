"""SwitchLoRA (arXiv 2406.06564): LoRA whose vectors are switched against candidates while training.

In a step, after the last backward and before the clip: plan this step's switches from (seed, step), and
for each fold the difference into W, exchange the vectors with the bank, copy the new rows to the fp32
masters, zero the counterpart's moments and step counter and hold it still for N steps. The switched
vector keeps its own moments. Rewriting rows changes no stored gradient; the counterpart's is stale now
and is masked in this very step.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from megatron_switchlora.lowrank.bank import CandidateBank
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.schedule import (
    ScheduleConfig,
    StepPlan,
    SwitchState,
    end_step,
    initial_state,
    plan_step,
)
from megatron_switchlora.lowrank.switch import apply_switch
from megatron_switchlora.methods.lora import Lora
from megatron_switchlora.optim.row_adamw import RowAdamW


class SwitchLora(Lora):
    """`switching` are the layers with spare candidates (min(m, n) > rank), in layer order."""

    bank: CandidateBank
    schedule: ScheduleConfig
    state: SwitchState

    def _draw_factors(self) -> None:
        """Draw the candidates of every layer; the live vectors are members."""
        method, train = self.config.method, self.config.train
        spare = {n: x for n, x in self.linears.items() if min(x.out_features, x.in_features) > x.rank}
        self.switching: list[LowRankLinear] = list(spare.values())
        self.schedule = ScheduleConfig(
            candidates=tuple(min(x.out_features, x.in_features) for x in self.switching),
            rank=method.rank,
            interval0=method.interval0,
            ratio=method.switch_ratio,
            total_steps=method.switch_total_steps or train.steps,
            freeze_steps=method.freeze_steps,
            selection=method.selection,
            seed=train.seed,
        )
        self.state = initial_state(self.schedule)
        self.bank = CandidateBank(method.bank_device)
        for layer, (name, linear) in enumerate(spare.items()):
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                vectors = self._draw_vectors(side, name, self.schedule.candidates[layer])  # type: ignore[arg-type]
                self.bank.add(side, layer, vectors)
                factor.data.copy_(vectors[torch.from_numpy(self.state.slots[side][layer])])
        for name, linear in self.linears.items():
            if name not in spare:
                linear.lora_A.data.copy_(self._draw_vectors("A", name, linear.rank))
                linear.lora_B.data.copy_(self._draw_vectors("B", name, linear.rank))

    def start(self, optimizer: RowAdamW) -> None:
        factor = next(iter(self.linears.values())).lora_A
        self.bank.place(factor.dtype, factor.device)
        super().start(optimizer)

    def before_step(self, step: int) -> int:
        plan = plan_step(self.schedule, self.state, step)
        self._apply(plan)
        self.optimizer.set_frozen(self._frozen_rows())
        return plan.count

    def _apply(self, plan: StepPlan) -> None:
        for switch in plan.switches:
            linear = self.switching[switch.layer]
            factor, counterpart = linear.lora_A, linear.lora_B
            if switch.side == "B":
                factor, counterpart = counterpart, factor
            apply_switch(linear, self.bank, switch)
            rows = torch.from_numpy(switch.positions)
            self.optimizer.rows_rewritten(factor, rows)
            self.optimizer.reset_rows(counterpart, rows)

    def _frozen_rows(self) -> dict[nn.Parameter, Tensor]:
        """Masked rows of each factor in this step."""
        frozen: dict[nn.Parameter, Tensor] = {}
        for side in "AB":
            for linear, left in zip(self.switching, self.state.frozen[side], strict=True):
                rows = np.flatnonzero(left)
                if len(rows):
                    frozen[linear.lora_A if side == "A" else linear.lora_B] = torch.from_numpy(rows)
        return frozen

    def after_step(self, step: int) -> None:
        end_step(self.state)

    def replicated_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().replicated_state()
        yield from self.bank.tensors()
        for kind in ("pointer", "slots", "frozen"):
            for side, values in getattr(self.state, kind).items():
                yield f"{kind}_{side}", torch.from_numpy(values)
