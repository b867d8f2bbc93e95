"""Switches layer by layer and AdamW piece by piece: the plain form, with which the batched one is compared.

Each layer has its own calls, and each part of a parameter its own step. Nothing here uses the tables of
`lowrank/switch.py`, `lowrank/bank.py`, `optim/row_states.py` or the blocks of `optim/layout.py`.
"""

from __future__ import annotations

import copy
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.schedule import LayerSwitch, StepPlan, SwitchState, end_step, plan_step
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.optim.layout import Piece
from megatron_switchlora.optim.row_adamw import RowAdamW


def adamw_of_piece_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, frozen: Optional[Tensor],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Take one AdamW step on [rows, width]; `frozen` holds the rows that must not move."""
    step += 1
    if frozen is not None:
        grad.index_fill_(0, frozen, 0.0)
    if weight_decay != 0:
        decay = torch.full_like(step, 1 - lr * weight_decay, dtype=param.dtype)
        if frozen is not None:
            decay.index_fill_(0, frozen, 1.0)
        param.mul_(decay[:, None])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    steps = step.double()
    step_size = (-lr / (1 - beta1**steps)).to(param.dtype)
    correction = (1 - beta2**steps).sqrt().to(param.dtype)
    denominator = exp_avg_sq.sqrt().div_(correction[:, None]).add_(eps)
    param.addcdiv_(exp_avg * step_size[:, None], denominator)


class PerPieceAdamW(RowAdamW):
    """Steps every piece alone; frozen rows are kept by parameter."""

    frozen_rows: dict[nn.Parameter, Tensor]

    def _update(self, masters: list[Tensor], group: dict[str, Any], refused: Optional[Tensor]) -> None:
        assert self.layout is not None
        for master in masters:
            for piece in self.layout.by_master[master]:
                assert master.grad is not None
                adamw_of_piece_(
                    piece.block(master), piece.block(master.grad), *self._views(piece), frozen=self._frozen_in(piece),
                    lr=group["lr"], weight_decay=group["weight_decay"], beta1=self.betas[0], beta2=self.betas[1],
                    eps=self.eps,
                )  # fmt: skip

    def _frozen_in(self, piece: Piece) -> Optional[Tensor]:
        rows = self.frozen_rows.get(piece.param)
        local = piece.local_rows(rows) if rows is not None else None
        return local if local is not None and len(local) else None


class PerLayerSwitchLora(SwitchLora):
    """Switches one side of one layer after the other."""

    def build_optimizer(self) -> RowAdamW:
        optim = self.config.optim
        return PerPieceAdamW(self.param_groups(), beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)

    def before_step(self, step: int) -> int:
        if self._next is None:
            self._next = self._plan_and_fetch(step, copy.deepcopy(self.state))
        plan, self.state, new = self._next
        changes: dict[LowRankLinear, list[tuple[Tensor, Tensor]]] = {}
        for switch, rows in zip(plan.switches, new, strict=True):
            linear = self.switching[switch.layer]
            changes.setdefault(linear, []).append(self._switch(linear, switch, rows))
        for linear, each in changes.items():
            left, right = (torch.cat(sides) for sides in zip(*each, strict=True))
            linear.weight.addmm_(left.t(), right, alpha=linear.scaling)
        factors = self._switching_factors()
        assert isinstance(self.optimizer, PerPieceAdamW)
        self.optimizer.frozen_rows = {
            factors[side, layer]: torch.from_numpy(left).nonzero().squeeze(1)
            for side in "AB"
            for layer, left in enumerate(self.state.frozen[side])
        }
        following = copy.deepcopy(self.state)
        end_step(following)
        self._next = self._plan_and_fetch(step + 1, following)
        return plan.count

    _next: Optional[tuple[StepPlan, SwitchState, list[Tensor]]] = None

    def _plan_and_fetch(self, step: int, state: SwitchState) -> tuple[StepPlan, SwitchState, list[Tensor]]:
        plan = plan_step(self.schedule, state, step)
        held = self.bank.held
        return plan, state, [held[s.side, s.layer].rows[torch.from_numpy(s.new_slots)] for s in plan.switches]

    @torch.no_grad()
    def _switch(self, linear: LowRankLinear, switch: LayerSwitch, new: Tensor) -> tuple[Tensor, Tensor]:
        factor, counterpart = linear.lora_A, linear.lora_B
        if switch.side == "B":
            factor, counterpart = counterpart, factor
        positions = torch.from_numpy(switch.positions)
        old = factor.index_select(0, positions)
        self.bank.held[switch.side, switch.layer].rows.index_copy_(0, torch.from_numpy(switch.old_slots), old)
        factor.data.index_copy_(0, positions, new)
        difference = old.to(linear.weight.dtype) - new.to(linear.weight.dtype)
        other = counterpart.index_select(0, positions).to(linear.weight.dtype)
        self.optimizer.rows_rewritten(factor, positions)
        self.optimizer.reset_rows(counterpart, positions)
        return (other, difference) if switch.side == "A" else (difference, other)
