"""Norm, finite check and clip of the gradients, on the device: of one head, or of each of several LTE heads.

A spike of one of several heads would slow down the others, if all were clipped by one norm. So each head has its own.
The squares of a head's gradients are summed over what this rank holds, then over the ranks that hold other parts.
Replicated tensors count on the first tensor-parallel rank only. The head's gradients are scaled by c / (norm + 1e-6)
where that is below 1. No number is read on the host, which would wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Axis, is_split


class HeadClip:
    """Measure the gradient norms of the heads, and clip by them; `limit` 0 only measures.

    `ranks` is the axis of ranks that hold other parts of the gradients, of one rank if there are none. `norms` [heads]
    are those of the last step, before the clip. `refused` tells whether one of them is not finite.
    """

    def __init__(self, limit: float, heads: int, ranks: Axis, tp: Axis, device: torch.device) -> None:
        self.limit, self.ranks, self.tp = limit, ranks, tp
        self.norms = torch.zeros(heads, dtype=torch.float64, device=device)
        self.refused = torch.zeros((), dtype=torch.bool, device=device)
        self.measured = False
        self._factors: dict[torch.dtype, list[Tensor]] = {}

    @torch.no_grad()
    def measure(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the norms of all (parameter, gradient) here, before the optimizer's step. Collective."""
        held: dict[tuple[int, bool], list[Tensor]] = {}
        for param, grad in gradients:
            counts = is_split(param) or self.tp.rank == 0
            held.setdefault((param.head, counts), []).append(grad)  # type: ignore[attr-defined]
        squares = torch.zeros_like(self.norms)
        for (head, counts), grads in held.items():
            norms = torch._foreach_norm(grads, 2, dtype=at_least_fp32(grads[0].dtype))
            square = torch.stack(norms).double().square().sum()
            squares[head] += square if counts else 0 * square  # a copy adds nothing, unless it is not finite
        if self.ranks.size > 1:
            dist.all_reduce(squares, group=self.ranks.group)
        self.norms, self.measured = squares.sqrt(), True
        self.refused = self.norms.isfinite().all().logical_not()
        self._factors.clear()

    def known_refusal(self) -> Optional[bool]:
        """Return `refused` if it can be read without waiting for a device, else None."""
        return bool(self.refused) if self.refused.device.type == "cpu" else None

    def factors(self, dtype: torch.dtype) -> Optional[list[Tensor]]:
        """Return the factor of each head's gradients, or None where nothing is clipped."""
        if self.limit <= 0:
            return None
        if dtype not in self._factors:
            self._factors[dtype] = list((self.limit / (self.norms + 1e-6)).clamp(max=1.0).to(dtype))
        return self._factors[dtype]
