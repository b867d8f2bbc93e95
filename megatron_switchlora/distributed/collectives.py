"""Tensor-parallel collectives as autograd functions.

    enter   f: forward nothing,             backward one all-reduce of all gradients together
    leave   g: forward all-reduce,          backward nothing
    gather  forward all-gather of columns,  backward this rank's columns

`from_first`, which has no backward pass, gives the first rank's tensors to all. f and g are those of Megatron-LM (arXiv
1909.08053, section 3). On an axis of one rank each returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.shard import Axis, Split


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=ctx.group)
        flat_grads = flat.split([grad.numel() for grad in grads])
        return None, *(flat_grad.view(grad.shape) for flat_grad, grad in zip(flat_grads, grads, strict=True))


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return split.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.split.take(grad), None


def enter(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Pass replicated tensors into split computation.

    Each rank computes a part of their gradients. The backward pass sums these parts over the axis in one all-reduce,
    once all of them are there. Tensors that need no gradient pass unchanged; the others must have one dtype.
    """
    if axis.size == 1:
        return tensors
    needed = [tensor for tensor in tensors if tensor.requires_grad]
    entered = iter(_Enter.apply(axis.group, *needed) if needed else ())
    return tuple(next(entered) if tensor.requires_grad else tensor for tensor in tensors)


def leave(axis: Axis, x: Tensor) -> Tensor:
    """Return the sum of the ranks' x, computed in place: x must be a fresh result."""
    return x if axis.size == 1 else _Leave.apply(x, axis.group)


def from_first(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the first rank's tensors on every rank; the ranks' have the same shapes and one dtype.

    A decomposition that each rank computes of the same matrix needs it, since libraries promise no equal bits.
    """
    if axis.size == 1:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.broadcast(flat, group=axis.group, group_src=0)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def gather_columns(split: Split, x: Tensor) -> Tensor:
    """Return all columns of x [..., local], without padding; `split.dim` must be the last dimension of x."""
    return split.unpadded(x) if split.axis.size == 1 else _Gather.apply(x, split)
