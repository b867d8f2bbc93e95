"""LTE's Algorithm 1 in one process, naive: a reference run for each head, merged by the formulas of its paper.

Each head is a `tests.numerics.reference.Reference` with its own frozen W. In effective weights E_n = W_n + s B_n A_n a
merge forms M = mean_n E_n; the reset form sets W <- M and B <- 0, the reset-less form W_n <- M - s B_n A_n, which is
y = M x + s (B_n A_n - B'_n A'_n) x with the primed factors folded. Over a base in 4 bits a layer applies
Q(M) x + s (...) x, Q to NF4 and back, and M itself is what merges go on from. Of the package there are NF4's levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_switchlora.lowrank.nf4 import LEVELS
from tests.numerics.reference import Reference


class LteReference:
    def __init__(self, heads: list[Reference], interval: int | None, reset: bool) -> None:
        self.heads, self.interval, self.reset = heads, interval, reset

    def step(
        self, step: int, tokens: list[list[Tensor]], lr: float, dense_lr: float
    ) -> tuple[list[float], list[float]]:
        """Losses and gradient norms of the heads; `tokens` are each head's micro-batches."""
        done = [head.step(step, mine, lr, dense_lr) for head, mine in zip(self.heads, tokens, strict=True)]
        if self.interval and (step + 1) % self.interval == 0:
            self.merge()
        return [each["loss"] for each in done], [each["grad_norm"] for each in done]

    def mean_weight(self, name: str) -> Tensor:
        return torch.stack([head.effective_weight(name) for head in self.heads]).mean(0)

    def mean_dense(self, name: str) -> Tensor:
        return torch.stack([head.dense[name].detach() for head in self.heads]).mean(0)

    @torch.no_grad()
    def merge(self) -> None:
        for name in self.heads[0].names:
            self.take(name, self.mean_weight(name))
        for name in self.heads[0].dense:
            mean = self.mean_dense(name)
            for head in self.heads:
                head.dense[name].copy_(mean)

    def take(self, name: str, mean: Tensor) -> None:
        """Make every head compute the mean."""
        for head in self.heads:
            if self.reset:
                head.W[name].copy_(mean)
                head.B[name].zero_()
            else:
                head.W[name].copy_(mean - head.cfg.scaling * head.B[name] @ head.A[name])


class QuantisedLteReference(LteReference):
    """Heads that apply the mean in 4 bits, beside their factors."""

    @torch.no_grad()
    def __init__(self, heads: list[Reference], interval: int | None, reset: bool) -> None:
        super().__init__(heads, interval, reset)
        self.exact: dict[str, Tensor] = {}
        for name in heads[0].names:
            self.take(name, heads[0].effective_weight(name).detach())

    def mean_weight(self, name: str) -> Tensor:
        """M and what the heads have learnt since."""
        return self.exact[name] + super().mean_weight(name) - in_4_bits(self.exact[name])

    def take(self, name: str, mean: Tensor) -> None:
        self.exact[name] = mean.clone()
        super().take(name, in_4_bits(mean))


def in_4_bits(matrix: Tensor) -> Tensor:
    """A matrix in fp32, each value as the nearest level times the largest magnitude among its 64 of a row."""
    levels = torch.tensor(LEVELS)
    found = matrix.float()
    for block in found.split(64, dim=1):
        scale = block.abs().amax(1, keepdim=True)
        nearest = (block.unsqueeze(-1) / scale.unsqueeze(-1) - levels).abs().argmin(-1)
        block.copy_(levels[nearest] * scale)
    return found.to(matrix.dtype)
