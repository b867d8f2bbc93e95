"""The output layer and its mean cross entropy together, a chunk of tokens at a time.

    z = W x,   loss = mean over tokens of  log sum_v exp(z_v - M) - (z_target - M),   M the maximum

The logits of all tokens never exist at once. Each chunk's gradients are formed in the forward pass, g = softmax(z) -
onehot, dx = g W and dW += g^T x, and the backward pass scales them. dW is summed over chunks in at least fp32.

The vocabulary may be split over tensor-parallel ranks. A chunk then takes two all-reduces: the maximum, then the sum
together with the target's logit, one and two numbers per token. dx is this rank's part. Columns of padding are left
out.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Split

CHUNK = 2**24  # logits at a time: 64 MiB in fp32


def chunk_tokens(vocabulary: int) -> int:
    """Return the tokens of a chunk, of which a rank holds this many columns of logits."""
    return max(1, CHUNK // vocabulary)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, split: Split) -> Tensor:
    """Return the mean cross entropy of all tokens, in at least fp32.

    x [..., D] may need a gradient that is summed over tensor-parallel ranks afterwards (`enter_block`). weight [local
    vocabulary, D], targets [...].
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), split)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, split: Split) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        share = 1 / len(x) if needs_x or needs_weight else None
        losses = x.new_empty(len(x), dtype=at_least_fp32(x.dtype))
        dx = torch.empty_like(x) if needs_x else None
        dweight: Optional[Tensor] = None
        size = chunk_tokens(len(weight))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            losses[part], grad = _chunk(x[part], weight, targets[part], split, share)
            if dx is not None:
                torch.mm(grad, weight, out=dx[part])
            if needs_weight:
                product = grad.t() @ x[part]
                if dweight is None:
                    dweight = product if size >= len(x) else product.to(losses.dtype)
                else:
                    dweight += product
                del product  # before the next chunk needs the memory
            del grad
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dx, dweight)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Optional[Tensor], ...]:
        dx, dweight = ctx.saved_tensors
        dx = dx * scale.to(dx.dtype) if dx is not None else None
        if dweight is not None:
            dweight = torch.mul(dweight, scale, out=dweight.new_empty(dweight.shape, dtype=ctx.dtype))
        return dx, dweight, None, None


def _chunk(x: Tensor, weight: Tensor, targets: Tensor, split: Split, share: Optional[float]) -> tuple[Tensor, Tensor]:
    """Return the losses of some tokens and, with a `share`, the gradient of their logits in x's precision."""
    logits = (x @ weight.t()).to(at_least_fp32(x.dtype))
    if split.real < split.local:
        logits[:, split.real :] = -torch.inf
    losses = _losses(logits, targets, split, share)
    return losses, logits if share is None else logits.to(x.dtype)


def _losses(logits: Tensor, targets: Tensor, split: Split, share: Optional[float]) -> Tensor:
    """Return the losses of some tokens; with a `share` replace their logits by `share` times the loss's gradient."""
    axis = split.axis
    top = logits.amax(-1)
    if axis.size > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
    logits -= top.unsqueeze(-1)
    local, here = split.locate(targets)
    local = local.unsqueeze(-1)
    picked = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0.0)
    exponentials = logits.exp_()
    sums = torch.stack([exponentials.sum(-1), picked])
    if axis.size > 1:
        dist.all_reduce(sums, group=axis.group)
    if share is not None:
        exponentials.mul_((share / sums[0]).unsqueeze(-1))
        exponentials.scatter_add_(-1, local, (here.to(logits.dtype) * -share).unsqueeze(-1))
    return sums[0].log() - sums[1]
