"""The adapted linear: y = W x + s B A x with a frozen W (SwitchLoRA, arXiv 2406.06564, eq. 1 and 4).

W is a persistent fp32 buffer, not a parameter. DeepSpeed would cast a parameter to bf16, and tens of thousands of folds
into a bf16 W would drift by per cent. One LoRA vector is one contiguous row:

    weight  [out, in]    W, fp32 (or float64 in tests)
    lora_A  [rank, in]
    lora_B  [rank, out]  B transposed, so that column i of the paper's B is row i

Under tensor parallelism a column-parallel layer splits W and B on out and replicates A. A row-parallel layer splits W
and A on in and replicates B. So s B A has exactly the shard's shape, and the forward pass gains no collective. Each
rank computes a part of the replicated factor's gradient, and `enter_block` sums the parts.

The layer computes in the merged form (`lowrank/merged.py`) or in the split form, both in the activation's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.linear import ParallelLinear
from megatron_switchlora.distributed.shard import declare
from megatron_switchlora.lowrank.merged import Form, merge, merged_linears, uses_merged


class LowRankLinear(nn.Module):
    """Replace a parallel linear; its weight becomes the frozen base.

    `in_features` and `out_features` are the full sizes.
    """

    weight: Tensor

    def __init__(
        self, base: ParallelLinear, rank: int, scaling: float, form: Optional[Form] = None, micro_batches: int = 1
    ) -> None:
        super().__init__()
        self.micro_batches = micro_batches  # of a step
        self.in_features, self.out_features = base.in_features, base.out_features
        self.tp, self.split, self.row_parallel = base.tp, base.split, base.split_dim == 1
        self.rank, self.scaling, self.form = rank, scaling, form or Form()
        self.register_buffer("weight", base.weight.detach())
        out_local, in_local = self.weight.shape
        A = nn.Parameter(self.weight.new_empty(self.rank, in_local))
        B = nn.Parameter(self.weight.new_empty(self.rank, out_local))
        along = replace(self.split, dim=1)
        self.lora_A = declare(A, shard=along if self.row_parallel else None, rows=True)
        self.lora_B = declare(B, shard=None if self.row_parallel else along, rows=True)
        self._merged: Optional[Tensor] = None

    def partial_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.lora_B,) if self.row_parallel else (self.lora_A,)

    def forward(self, x: Tensor, *entered: Tensor) -> Tensor:
        A, B = self._entered(entered)
        y = self._merged_form(x, A, B) if self._merges(x) else self._split_form(x, A, B)
        return leave(self.tp, y) if self.row_parallel else y

    @staticmethod
    def together(
        linears: Sequence[LowRankLinear], x: Tensor, entered: Sequence[tuple[Tensor, ...]]
    ) -> Optional[tuple[Tensor, ...]]:
        """Return y of column-parallel layers that all take the merged form, else None."""
        first = linears[0]
        alike = all((each.form, each.scaling) == (first.form, first.scaling) for each in linears)
        if not alike or any(each.row_parallel or not each._merges(x) for each in linears):
            return None
        factors = [each._entered(partial) for each, partial in zip(linears, entered, strict=True)]
        layers = [(A, B, each._matrix(A, B)) for each, (A, B) in zip(linears, factors, strict=True)]
        return merged_linears(x, layers, first.scaling, first.form.cache != "recompute")

    def _entered(self, entered: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return A and B, one of them as it entered the block."""
        if not entered:
            return self.lora_A, self.lora_B
        (factor,) = entered
        return (self.lora_A, factor) if self.row_parallel else (factor, self.lora_B)

    def _merges(self, x: Tensor) -> bool:
        out_local, in_local = self.weight.shape
        tokens = x.numel() // in_local
        return uses_merged(self.form, tokens, (out_local, in_local), self.micro_batches, torch.is_grad_enabled())

    def _split_form(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.add(F.linear(x, self.weight.to(x.dtype)), F.linear(x, A) @ B, alpha=self.scaling)

    def _merged_form(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        (y,) = merged_linears(x, [(A, B, self._matrix(A, B))], self.scaling, self.form.cache != "recompute")
        return y

    def _matrix(self, A: Tensor, B: Tensor) -> Tensor:
        """Return W_eff, or W where the backward pass is to form W_eff again."""
        if self.form.cache == "recompute":
            return self.weight
        if self.form.cache == "micro_batch":
            return merge(self.weight, A, B, self.scaling)
        if self._merged is None:
            self._merged = merge(self.weight, A, B, self.scaling)
        return self._merged

    def forget_merged(self) -> None:
        """Drop the cached W_eff, since W or a factor has changed."""
        self._merged = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [r, out] as they are, without gradients."""
        return self.lora_A.detach(), self.lora_B.detach()

    @torch.no_grad()
    def add_product(self, sign: float) -> None:
        """Set W <- W + sign s B A, from the factors as the forward pass uses them, in W's precision."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        self.weight.addmm_(B.t(), A, alpha=sign * self.scaling)
        self.forget_merged()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return this rank's shard of W + s B A [out, in], in W's precision."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        return merge(self.weight, A, B, self.scaling)
