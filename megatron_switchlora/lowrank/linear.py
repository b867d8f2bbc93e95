"""The adapted linear: y = W x + s B A x with a frozen W (SwitchLoRA, arXiv 2406.06564, eq. 1 and 4).

W is a persistent fp32 buffer, not a parameter: DeepSpeed would cast a parameter to bf16, and tens of
thousands of folds into a bf16 W would drift by per cent. One LoRA vector is one contiguous row:
    weight  [out, in]  W, fp32 (or float64 in tests)
    lora_A  [rank, in]
    lora_B  [rank, out]  B transposed, so that column i of the paper's B is row i
The split form computes x W^T and (x A^T) B in the activation's precision. Under tensor parallelism
A would be split with W's input (row-parallel), B with its output (column-parallel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.parallel.linear import ParallelLinear
from megatron_switchlora.parallel.shard import declare


class LowRankLinear(nn.Module):
    """Replaces a parallel linear; takes over its weight as the frozen base."""

    weight: Tensor

    def __init__(self, base: ParallelLinear, rank: int, scaling: float) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.scaling = rank, scaling
        self.register_buffer("weight", base.weight.detach())
        row_parallel = base.shard_dim == 1
        A = self.weight.new_empty(rank, self.in_features)
        B = self.weight.new_empty(rank, self.out_features)
        self.lora_A = declare(nn.Parameter(A), shard_dim=1 if row_parallel else None, rows=True)
        self.lora_B = declare(nn.Parameter(B), shard_dim=None if row_parallel else 1, rows=True)

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight.to(x.dtype))
        return torch.add(base, F.linear(x, self.lora_A) @ self.lora_B, alpha=self.scaling)

    @torch.no_grad()
    def add_product(self, sign: float) -> None:
        """W <- W + sign s B A, from the factors as the forward uses them, in W's precision."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        self.weight.addmm_(B.t(), A, alpha=sign * self.scaling)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + s B A [out, in], in W's precision."""
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        return torch.addmm(self.weight, B.t(), A, alpha=self.scaling)
