"""RMSNorm, and that of several LTE heads in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import declare
from megatron_switchlora.model.heads import copies


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, the mean square in at least fp32."""
    high = x.to(at_least_fp32(x.dtype))
    return (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(nn.Parameter(torch.ones(hidden_size)), shard=None)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * normalised(x, self.eps)

    def for_heads(self, heads: int) -> HeadsNorm:
        """Return the norms of several LTE heads, equal at first."""
        return HeadsNorm(self, heads)


class HeadsNorm(nn.Module):
    """RMSNorm with weights [hidden] a head."""

    def __init__(self, base: RMSNorm, heads: int) -> None:
        super().__init__()
        self.weight, self.eps = copies(base.weight, heads), base.eps

    def forward(self, x: Tensor) -> Tensor:
        by_head = normalised(x, self.eps).unflatten(0, (len(self.weight), -1))
        return (torch.stack(list(self.weight))[:, None, None] * by_head).flatten(0, 1)
