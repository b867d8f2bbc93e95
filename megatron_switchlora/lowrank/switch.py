"""Apply one switch: fold the difference into W, so that the function does not change.

A's row i to slot j (B's switch mirrors it):

    W += s B[:, i] (A_old - A_new);  bank[slot of i] = A_old;  A[i] = A_new

The difference is formed from the rows as the forward pass uses them, the low-precision ones under bf16, and added to
the fp32 W. One product adds A's and B's changes of a layer, so that W is read and written once. Under tensor
parallelism everything is local: the rows are this rank's shards. The caller handles the optimizer's state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_switchlora.lowrank.bank import CandidateBank
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.schedule import LayerSwitch


@torch.no_grad()
def switch_rows(linear: LowRankLinear, bank: CandidateBank, switch: LayerSwitch, new: Tensor) -> tuple[Tensor, Tensor]:
    """Switch one side of a layer to the fetched rows `new` [count, length], in the factor and the bank.

    Returns left [count, out] and right [count, in], for `fold` to add: W += s left^T right.
    """
    factor, counterpart = (linear.lora_A, linear.lora_B) if switch.side == "A" else (linear.lora_B, linear.lora_A)
    positions = torch.from_numpy(switch.positions).to(factor.device)
    old = factor.index_select(0, positions)
    bank.put_back(switch, old)
    factor.index_copy_(0, positions, new)
    difference = old.to(linear.weight.dtype) - new.to(linear.weight.dtype)
    other = counterpart.index_select(0, positions).to(linear.weight.dtype)
    return (other, difference) if switch.side == "A" else (difference, other)


@torch.no_grad()
def fold(linear: LowRankLinear, changes: list[tuple[Tensor, Tensor]]) -> None:
    """Add the changes of a layer's switches to W."""
    left, right = (torch.cat(sides) for sides in zip(*changes, strict=True))
    linear.weight.addmm_(left.t(), right, alpha=linear.scaling)
