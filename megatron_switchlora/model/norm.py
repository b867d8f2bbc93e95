"""RMSNorm, and that of several LTE heads in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.shard import declare
from megatron_switchlora.model.elementwise import Elementwise
from megatron_switchlora.model.heads import copies


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(nn.Parameter(torch.ones(hidden_size)), shard=None)
        self.eps, self.elementwise = eps, Elementwise()

    def forward(self, x: Tensor) -> Tensor:
        return self.elementwise.norm(x, self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm."""
        return self.elementwise.add_norm(x, delta, self.weight, self.eps)

    def for_heads(self, heads: int) -> HeadsNorm:
        """Return the norms of several LTE heads, equal at first."""
        return HeadsNorm(self, heads)


class HeadsNorm(nn.Module):
    """RMSNorm with weights [hidden] a head; x holds the heads' samples, one head after the other."""

    def __init__(self, base: RMSNorm, heads: int) -> None:
        super().__init__()
        self.weight, self.eps, self.elementwise = copies(base.weight, heads), base.eps, base.elementwise

    def forward(self, x: Tensor) -> Tensor:
        return self.elementwise.norm(self._by_head(x), self._weights(), self.eps).flatten(0, 1)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm."""
        x, delta = self._by_head(x), self._by_head(delta)
        total, y = self.elementwise.add_norm(x, delta, self._weights(), self.eps)
        return total.flatten(0, 1), y.flatten(0, 1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (len(self.weight), -1))

    def _weights(self) -> Tensor:
        """Return the heads' weights [K, 1, 1, hidden]."""
        return torch.stack(list(self.weight))[:, None, None]
