"""Train SwitchLoRA (arXiv 2406.06564): LoRA whose vectors are switched against candidates during training.

Each step plans its switches from (seed, step), after the last backward pass and before the clip. For each switch it
    1. exchanges the vectors with the bank, and folds the difference into W
    2. copies the new rows to the fp32 masters
    3. zeroes the counterpart's moments and step counter, and freezes the counterpart for N steps
The switched vector keeps its own moments. Its stored gradient stays valid. The counterpart's gradient is stale and is
masked in the same step. The plan is a pure function of (seed, step), so the step also plans the next one. It starts to
fetch that step's rows from the bank, after its own rows are written back, while training continues.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.slices import TensorSlice, shard_slice
from megatron_switchlora.lowrank.bank import CandidateBank, Fetch
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.rows import RowNumbers
from megatron_switchlora.lowrank.schedule import (
    ScheduleConfig,
    StepPlan,
    SwitchState,
    end_step,
    initial_state,
    mean_switch_rate,
    plan_step,
)
from megatron_switchlora.lowrank.switch import LayerSwitcher, StepTables
from megatron_switchlora.methods.adapter_options import AdapterFacts
from megatron_switchlora.methods.base import Flow, Method, Replica
from megatron_switchlora.methods.lora import Lora, head_seed
from megatron_switchlora.methods.switch_options import SwitchOptions, check_switching
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.optim.row_states import RowChanges


@register
class SwitchLoraFacts(AdapterFacts):
    """Facts of SwitchLoRA: adapters whose vectors are switched."""

    name = "switchlora"
    about = "adapters whose vectors are switched against candidates"
    sections = {"switch": SwitchOptions}  # noqa: RUF012
    inits = frozenset({"switchlora", "classic", "lora_ga"})
    switches = True

    @property
    def kind(self) -> type[Method]:
        return SwitchLora

    @property
    def default_lr(self) -> float:
        """The paper's rate, for every trainable tensor."""
        return 0.02

    def check(self, config: RunConfig) -> None:
        super().check(config)
        check_switching(config)


@dataclass
class PlannedStep:
    """A step planned ahead: its switches, the state after planning, and the fetch of its candidates.

    `tables` and `changes` are what the switches do to factors, bank, W and optimizer, by rows in `indices`.
    """

    step: int
    plan: StepPlan
    state: SwitchState
    tables: StepTables
    changes: RowChanges
    indices: Indices
    fetch: Fetch


class SwitchLora(Lora):
    """Drive SwitchLoRA; `switching` holds the layers with spare candidates (min(m, n) > rank), in layer order."""

    bank: CandidateBank
    schedule: ScheduleConfig
    state: SwitchState

    def _draw_factors(self) -> None:
        """Draw the candidates of every layer; the live vectors are among them."""
        switch, train = self.config.method.switch, self.config.train
        spare = {n: x for n, x in self.linears.items() if min(x.out_features, x.in_features) > x.rank}
        self.switching: list[LowRankLinear] = list(spare.values())
        self.schedule = ScheduleConfig(
            candidates=tuple(min(x.out_features, x.in_features) for x in self.switching),
            rank=self.config.method.rank,
            interval0=switch.interval0,
            ratio=switch.ratio,
            total_steps=switch.total_steps or train.steps,
            freeze_steps=switch.freeze_steps,
            selection=switch.selection,
            seed=head_seed(train.seed, self.mesh.rank("lte")),
        )
        self.state = initial_state(self.schedule)
        self._planned: Optional[PlannedStep] = None
        self.bank = CandidateBank(switch.bank_device, switch.bank_spread, self.mesh)
        like = torch.empty((), dtype=torch.bfloat16 if train.precision == "bf16" else None)  # as DeepSpeed casts them
        for layer, (name, linear) in enumerate(spare.items()):
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                vectors = self._draw_vectors(side, name, self.schedule.candidates[layer])  # type: ignore[arg-type]
                self.bank.add(side, layer, vectors, factor.shard, like.to(factor.device))  # type: ignore[attr-defined]
                self._fill_factor(factor, vectors.index_select(0, torch.from_numpy(self.state.slots[side][layer])))
        for name, linear in self.linears.items():
            if name not in spare:
                self._fill_factor(linear.lora_A, self._draw_vectors("A", name, linear.rank))
                self._fill_factor(linear.lora_B, self._draw_vectors("B", name, linear.rank))

    def allocate(self) -> None:
        super().allocate()
        keys = {factor: key for key, factor in self._switching_factors().items()}
        runs = RowNumbers(group["params"] for group in self.param_groups()).runs
        factor = next(iter(keys))
        self.bank.place(factor.dtype, factor.device, [[keys[p] for p in run.params if p in keys] for run in runs])

    def _switching_factors(self) -> dict[tuple[str, int], nn.Parameter]:
        """Return the factors that switch by side and layer."""
        sides = ((layer, linear, side) for layer, linear in enumerate(self.switching) for side in "AB")
        return {(side, layer): linear.lora_A if side == "A" else linear.lora_B for layer, linear, side in sides}

    def start(self, optimizer: RowAdamW) -> None:
        super().start(optimizer)
        self.switcher = LayerSwitcher(self.switching, optimizer.numbers, self.bank)

    @property
    def kinds(self) -> dict[str, str]:
        place = "in host memory" if self.bank.location == "host" else self.config.train.precision
        return {**super().kinds, **dict.fromkeys(("bank_A", "bank_B"), f"candidate bank, {place}")}

    def flows(self, partitioned: bool) -> Iterator[tuple[Flow, float]]:
        """Yield also the rows that other ranks hold of the candidates to switch in."""
        yield from super().flows(partitioned)
        schedule = self.schedule
        rate = mean_switch_rate(self.config.train.steps, schedule.ratio, schedule.total_steps)
        every = schedule.interval0 / rate if rate else math.inf
        for held in sorted(self.bank.held.values(), key=lambda held: held.group or ""):
            if held.group:
                values = schedule.rank * held.rows.size(1)
                yield Flow("bank", "", held.group, "all_reduce", values * held.rows.element_size()), every

    def before_step(self, step: int) -> int:
        super().before_step(step)
        ahead = self._planned
        planned = ahead if ahead is not None and ahead.step == step else self._plan(step, copy.deepcopy(self.state))
        self.state = planned.state
        new = self.switcher.apply(planned.tables, planned.fetch.result(), planned.indices)
        self.optimizer.rows.apply(planned.changes, new, planned.indices)
        self.optimizer.freeze(planned.changes, planned.indices)
        self._planned = None
        if step + 1 < self.config.train.steps:
            following = copy.deepcopy(self.state)
            end_step(following)
            self._planned = self._plan(step + 1, following)
        return planned.plan.count

    def _plan(self, step: int, state: SwitchState) -> PlannedStep:
        """Plan a step, advance `state`, send the step's indices, and start to fetch its candidates."""
        plan, indices = plan_step(self.schedule, state, step), Indices()
        tables = self.switcher.tables(plan, indices)
        frozen = self.switcher.numbers_of({side: left > 0 for side, left in state.frozen.items()})
        changes = self.optimizer.rows.plan(tables.switched, tables.counterparts, frozen, indices)
        indices.send(self.bank.device)
        fetch = self.bank.fetch(tables.exchanges, indices)
        return PlannedStep(step, plan, state, tables, changes, indices, fetch)

    def forget_plan(self) -> None:
        """Drop the plan of the next step after a change to state or bank. Collective, as the fetch is."""
        if self._planned is not None:
            self._planned.fetch.result()
        self._planned = None

    def after_step(self, step: int) -> None:
        super().after_step(step)
        end_step(self.state)

    def loaded(self) -> None:
        super().loaded()
        self.forget_plan()

    def slices(self) -> Iterator[TensorSlice]:
        """Add the banks NAME.bank_A and NAME.bank_B [C, length], and the schedule's integers switch.*."""
        yield from super().slices()
        names = {linear: name for name, linear in self.linears.items()}
        for layer, linear in enumerate(self.switching):
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                held = self.bank.held[side, layer]
                splits = filter(None, [held.split, factor.shard])  # type: ignore[attr-defined]
                yield shard_slice(f"{names[linear]}.bank_{side}", held.rows, splits, self.bank.group)
        for kind in ("pointer", "slots", "frozen"):
            for side, values in getattr(self.state, kind).items():
                yield shard_slice(f"switch.{kind}_{side}", torch.from_numpy(values), [], "head")

    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        if self.bank.group:
            yield from (Replica(name, rows, self.bank.group) for name, rows in self.bank.tensors())
        for kind in ("pointer", "slots", "frozen"):
            for side, values in getattr(self.state, kind).items():
                yield Replica(f"{kind}_{side}", torch.from_numpy(values), "head")
