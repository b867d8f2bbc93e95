"""Compute the cross entropy over a vocabulary that is split over tensor-parallel ranks.

    loss = log sum_v exp(z_v - M) - (z_target - M),   M the maximum over all ranks

The forward pass runs two all-reduces: the maximum, then the sum together with the target's logit, one and two numbers
per token. The backward pass runs none, since the gradient softmax - onehot is local. Columns of padding are left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Split


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, split: Split) -> Tensor:
        group = split.axis.group
        logits = logits[..., : split.real]
        top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits = logits - top.unsqueeze(-1)
        local, here = split.locate(targets)
        local = local.unsqueeze(-1)
        picked = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0.0)
        softmax = logits.exp_()
        sums = torch.stack([softmax.sum(-1), picked])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(softmax.div_(sums[0].unsqueeze(-1)), local, here)
        ctx.padding = split.local - split.real
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, here = ctx.saved_tensors
        result = softmax.scatter_add(-1, local, -here.unsqueeze(-1).to(softmax.dtype)) * grad.unsqueeze(-1)
        return F.pad(result, (0, ctx.padding)), None, None


def token_cross_entropy(logits: Tensor, targets: Tensor, split: Split) -> Tensor:
    """Return the cross entropy of each token, in at least fp32.

    logits [..., local vocabulary], targets [...] -> [...].
    """
    logits = logits.to(at_least_fp32(logits.dtype))
    if split.axis.size > 1:
        return _SplitCrossEntropy.apply(logits, targets, split)
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view_as(targets)
