"""LTE's Algorithm 1 in one process, naive: a reference run for each head, merged by the formulas of its paper.

Each head is a `tests.numerics.reference.Reference` with its own frozen W. In effective weights E_n = W_n + s B_n A_n a
merge forms M = mean_n E_n; the reset form sets W <- M and B <- 0, the reset-less form W_n <- M - s B_n A_n, which is
y = M x + s (B_n A_n - B'_n A'_n) x with the primed factors folded. Nothing of the package is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
            mean = self.mean_weight(name)
            for head in self.heads:
                if self.reset:
                    head.W[name].copy_(mean)
                    head.B[name].zero_()
                else:
                    head.W[name].copy_(mean - head.cfg.scaling * head.B[name] @ head.A[name])
        for name in self.heads[0].dense:
            mean = self.mean_dense(name)
            for head in self.heads:
                head.dense[name].copy_(mean)
