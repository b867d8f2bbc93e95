"""Linear layers and the embedding, split over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053).

    ColumnParallelLinear    weight [out, in], split on out: needs all of x, returns a part of y
    RowParallelLinear       weight [out, in], split on in: takes a part of x, sums y over the ranks
    VocabParallelEmbedding  weight [vocabulary, hidden], split on the vocabulary, summed over the ranks

A size that does not divide, or of which a rank's part is no multiple of `multiple`, is padded with zero rows or
columns. They stay zero: a padded output meets a padded, zero input of the next layer, so its gradient is zero. Padded
words are in no text, and the loss leaves their logits out.

A block calls `enter_block` once. Its backward pass sums the gradient of x over the ranks. The same sum includes
replicated parameters of which each rank computes a part of the gradient, as in a low-rank layer. Linears of the block
that take the same x go through `apply_together`. There are no biases, as in LLaMA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.distributed.collectives import enter, leave
from megatron_switchlora.distributed.shard import Axis, Split, declare


class ParallelLinear(nn.Module):
    """Compute y = x W^T with x [..., in] and W [out, in]; the base of the two splits.

    `in_features` and `out_features` are the full sizes.
    """

    split_dim: int
    bias: Optional[nn.Parameter]

    def __init__(self, in_features: int, out_features: int, tp: Axis, multiple: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.tp = in_features, out_features, tp
        shape = [out_features, in_features]
        self.split = Split(self.split_dim, shape[self.split_dim], tp, multiple)
        shape[self.split_dim] = self.split.local
        self.weight = declare(nn.Parameter(torch.empty(shape)), shard=self.split)
        self.register_parameter("bias", None)

    def partial_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the replicated parameters of whose gradient every rank computes a part."""
        return ()

    def forward(self, x: Tensor, *entered: Tensor) -> Tensor:
        """Apply the layer; `entered` are the partial parameters as `enter_block` returned them."""
        y = F.linear(x, self.weight)
        return leave(self.tp, y) if self.split_dim == 1 else y

    def effective_weight(self) -> Tensor:
        """Return this rank's shard of the matrix [out, in] that the layer applies."""
        return self.weight.detach()


class ColumnParallelLinear(ParallelLinear):
    """Split on the output features: q, k, v, gate, up and lm_head."""

    split_dim = 0

    @staticmethod
    def together(
        linears: Sequence[ColumnParallelLinear], x: Tensor, entered: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return y of each layer; see `apply_together`."""
        return _Linears.apply(x, *(linear.weight for linear in linears))


class RowParallelLinear(ParallelLinear):
    """Split on the input features: o and down."""

    split_dim = 1


def enter_block(x: Tensor, linears: Sequence[nn.Module], tp: Axis) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Enter x and the partial parameters of a block's linears; return both.

    Pass each linear's entered parameters to its forward.
    """
    partial = [linear.partial_parameters() for linear in linears]  # type: ignore[operator]
    x, *flat = enter(tp, x, *(param for params in partial for param in params))
    waiting = iter(flat)
    return x, [tuple(next(waiting) for _ in params) for params in partial]


def apply_together(
    linears: Sequence[nn.Module], x: Tensor, entered: Sequence[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return y of linears that take the same x, which `enter_block` returned with the `entered` parameters.

    Their class computes them at once if it has `together` itself, which may return None. An inherited one is ignored,
    since a subclass may compute something else. A module with hooks is called on its own.
    """
    kind = type(linears[0])
    if "together" in vars(kind) and all(type(each) is kind and not _has_hooks(each) for each in linears):
        outputs: Optional[tuple[Tensor, ...]] = kind.together(linears, x, entered)  # type: ignore[attr-defined]
        if outputs is not None:
            return outputs
    return tuple(linear(x, *partial) for linear, partial in zip(linears, entered, strict=True))


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def sum_of_products(gradients: Iterable[Tensor], matrices: Iterable[Tensor]) -> Tensor:
    """Return the sum of all dy [T, m] times W [m, n]: each product adds to the sum of those before."""
    pairs = zip(gradients, matrices, strict=True)
    dy, matrix = next(pairs)
    total = dy @ matrix
    for dy, matrix in pairs:
        torch.addmm(total, dy, matrix, out=total)  # counted by FlopCounterMode, as addmm_ is not
    return total


class _Linears(torch.autograd.Function):
    """Compute x W^T for each of the weights; backward adds up dx within the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Optional[Tensor], ...]:
        x, *weights = ctx.saved_tensors
        flat_x, flat_dy = x.reshape(-1, x.size(-1)), [dy.reshape(-1, dy.size(-1)) for dy in gradients]
        needs_x, *needed = ctx.needs_input_grad
        dx = sum_of_products(flat_dy, weights).view(x.shape) if needs_x else None
        return dx, *(dy.t() @ flat_x if need else None for dy, need in zip(flat_dy, needed, strict=True))


class VocabParallelEmbedding(nn.Module):
    """Embed token ids [...] as vectors [..., hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: Axis, multiple: int = 1) -> None:
        super().__init__()
        self.split = Split(0, vocab_size, tp, multiple)
        self.weight = declare(nn.Parameter(torch.empty(self.split.local, hidden_size)), shard=self.split)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.split.axis.size == 1:
            return F.embedding(tokens, self.weight)
        local, here = self.split.locate(tokens)
        vectors = F.embedding(local, self.weight)
        return leave(self.split.axis, vectors.masked_fill(~here.unsqueeze(-1), 0.0))
