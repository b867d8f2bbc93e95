"""The output layer and its mean cross entropy together, a chunk of tokens at a time.

    z = W x,   loss = mean over tokens of  log sum_v exp(z_v - M) - (z_target - M),   M the maximum

The logits of all tokens never exist at once. Each chunk's gradients are formed in the forward pass, g = softmax(z) -
onehot, dx = g W and dW += g^T x, and the backward pass scales them. dW is summed over chunks in at least fp32.

Where functions are compiled, three of them handle a chunk: its maxima, its sums and its gradient. Each is one pass over
the logits as the product wrote them. In eager mode the logits in fp32 become their gradient in place.

The vocabulary may be split over tensor-parallel ranks. A chunk then takes two all-reduces: the maximum, then the sum
together with the target's logit, one and two numbers per token. dx is this rank's part. Columns of padding are left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Split

Run = Callable[..., Any]
"""Runs one of the functions of this module on its inputs, compiled."""

CHUNK = 2**24  # logits at a time: 64 MiB in fp32


def chunk_tokens(vocabulary: int) -> int:
    """Return the tokens of a chunk, of which a rank holds this many columns of logits."""
    return max(1, CHUNK // vocabulary)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, split: Split, run: Optional[Run] = None) -> Tensor:
    """Return the mean cross entropy of all tokens, in at least fp32; `run` compiles functions.

    x [..., D] may need a gradient that is summed over tensor-parallel ranks afterwards (`enter_block`). weight [local
    vocabulary, D], targets [...].
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), split, run)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, split: Split, run: Optional[Run]) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        share = 1 / len(x) if needs_x or needs_weight else None
        losses = x.new_empty(len(x), dtype=at_least_fp32(x.dtype))
        dx = torch.empty_like(x) if needs_x else None
        dweight: Optional[Tensor] = None
        size = chunk_tokens(len(weight))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            if run is None:  # nothing here holds the logits
                losses[part], grad = _in_place(x[part] @ weight.t(), targets[part], split, share)
            else:
                losses[part], grad = _in_passes(x[part] @ weight.t(), targets[part], split, share, run)
            if grad is None:
                continue
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
        return dx, dweight, None, None, None


def row_maxima(logits: Tensor, real: int) -> Tensor:
    """Return the largest of the first `real` logits of each row, in at least fp32."""
    return _high(logits, real).amax(-1)


def row_sums(logits: Tensor, top: Tensor, local: Tensor, here: Tensor, real: int) -> Tensor:
    """Return [2, rows]: the sum of exp(z - top), and the target's z - top where it is here, else 0."""
    low = _high(logits, real) - top.unsqueeze(-1)
    picked = (logits.gather(-1, local).squeeze(-1).to(low.dtype) - top).masked_fill(~here, 0.0)
    return torch.stack([low.exp().sum(-1), picked])


def row_gradients(
    logits: Tensor, top: Tensor, sums: Tensor, local: Tensor, here: Tensor, real: int, share: float
) -> Tensor:
    """Return share (softmax(z) - onehot) in the precision of the logits."""
    softmax = (_high(logits, real) - top.unsqueeze(-1)).exp() / sums[0].unsqueeze(-1)
    at_target = (torch.arange(logits.size(-1), device=logits.device) == local) & here.unsqueeze(-1)
    return (share * torch.where(at_target, softmax - 1, softmax)).to(logits.dtype)


def _high(logits: Tensor, real: int) -> Tensor:
    """Return logits in at least fp32, those of padding -inf."""
    high = logits.to(at_least_fp32(logits.dtype))
    if real == logits.size(-1):
        return high
    return torch.where(torch.arange(logits.size(-1), device=logits.device) < real, high, -torch.inf)


def _in_passes(
    logits: Tensor, targets: Tensor, split: Split, share: Optional[float], run: Run
) -> tuple[Tensor, Optional[Tensor]]:
    """Return the losses of some tokens and, with a `share`, their logits' gradient, by compiled functions."""
    axis = split.axis
    top = run(row_maxima, logits, split.real)
    if axis.size > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
    local, here = split.locate(targets)
    local = local.unsqueeze(-1)
    sums = run(row_sums, logits, top, local, here, split.real)
    if axis.size > 1:
        dist.all_reduce(sums, group=axis.group)
    grad = None if share is None else run(row_gradients, logits, top, sums, local, here, split.real, share)
    return sums[0].log() - sums[1], grad


def _in_place(logits: Tensor, targets: Tensor, split: Split, share: Optional[float]) -> tuple[Tensor, Optional[Tensor]]:
    """Return what `_in_passes` does, in eager mode."""
    dtype = logits.dtype
    logits = logits.to(at_least_fp32(dtype))  # nobody else holds the low ones: they are gone
    if split.real < split.local:
        logits[:, split.real :] = -torch.inf
    losses = _losses(logits, targets, split, share)
    return losses, None if share is None else logits.to(dtype)


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
