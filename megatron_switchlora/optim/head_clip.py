"""Clip the gradients of several LTE heads in one process, each by its own norm.

DeepSpeed clips by the norm of all gradients. One head's spike would then slow down the others, and the result would
differ from that of heads on ranks of their own. Here the squares of a head's gradients are summed over its pieces on
this rank, then over the ranks that hold other pieces. Replicated tensors count on the first tensor-parallel rank only.
The head's gradients are scaled by c / (norm + 1e-6) where that is below 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Axis, is_split
from megatron_switchlora.optim.layout import Piece


class HeadClip:
    """Measure and clip the gradient norms of the heads; `limit` 0 only measures.

    `dp` is the axis over which masters are partitioned, of one rank if they are not. `norms` [heads] are those of the
    last step, before the clip.
    """

    def __init__(self, limit: float, heads: int, dp: Axis, tp: Axis, device: torch.device) -> None:
        self.limit, self.dp, self.tp = limit, dp, tp
        self.norms = torch.zeros(heads, dtype=torch.float64, device=device)
        self.measured = False

    @torch.no_grad()
    def measure(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the norms of all (parameter, gradient) here, before the optimizer's step. Collective."""
        squares = torch.zeros_like(self.norms)
        for param, grad in gradients:
            if is_split(param) or self.tp.rank == 0:
                squares[param.head] += torch.linalg.vector_norm(grad, dtype=at_least_fp32(grad.dtype)).double() ** 2  # type: ignore[attr-defined]
        for axis in (self.dp, self.tp):
            if axis.size > 1:
                dist.all_reduce(squares, group=axis.group)
        self.norms, self.measured = squares.sqrt(), True

    @torch.no_grad()
    def scale(self, pieces: list[Piece]) -> None:
        """Scale the gradients of these pieces' masters in place."""
        if self.limit > 0:
            factors = (self.limit / (self.norms + 1e-6)).clamp(max=1.0)
            for piece in pieces:
                gradient(piece).mul_(factors[piece.param.head])  # type: ignore[attr-defined]


def gradient(piece: Piece) -> Tensor:
    """Return the piece's [rows, width] view of its master's gradient."""
    grad = piece.master.grad
    assert grad is not None
    return piece.block(grad)
