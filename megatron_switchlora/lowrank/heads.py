"""K adapters over one frozen base: the LTE heads of one process (arXiv 2402.16828).

    reset       y_k = W x_k + s B_k A_k x_k
    reset-less  y_k = M x_k + s (B_k A_k - B'_k A'_k) x_k,  primed: the factors at the last merge

The heads share W or M [out, in], in fp32 or in 4 bits, so a head's last merge cannot be folded into it. x [K b, S, in]
holds the heads' samples, one head after the other. The low-rank product is one batched GEMM over heads per factor, in
the split form.

Each head's factors are parameters of their own, lora_A.k [r, in] and lora_B.k [r, out]. Optimizer, checkpoint and merge
treat them like those of a head on ranks of its own. Tensor parallelism is that of `lowrank/linear.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.linear import ParallelLinear
from megatron_switchlora.distributed.shard import Split, declare
from megatron_switchlora.lowrank.nf4 import Nf4Matrix


def stack(tensors: Iterable[Tensor]) -> Tensor:
    """Stack K tensors as [K, ...]; a single tensor becomes a view."""
    listed = list(tensors)
    return listed[0].unsqueeze(0) if len(listed) == 1 else torch.stack(listed)


class HeadsLinear(nn.Module):
    """Replace a parallel linear; its weight becomes the frozen base of `heads` heads."""

    weight: Tensor
    merged_A: Tensor
    merged_B: Tensor

    def __init__(self, base: ParallelLinear, heads: int, rank: int, scaling: float, resetless: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.tp, self.split, self.row_parallel = base.tp, base.split, base.split_dim == 1
        self.heads, self.rank, self.scaling, self.resetless = heads, rank, scaling, resetless
        weight = base.weight.detach()
        self.register_buffer("weight", weight)
        self.quantised: Optional[Nf4Matrix] = None
        out_local, in_local = weight.shape
        along = replace(self.split, dim=1)
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        for head in range(self.heads):
            A, B = (nn.Parameter(weight.new_empty(self.rank, length)) for length in (in_local, out_local))
            self.lora_A.append(declare(A, shard=along if self.row_parallel else None, rows=True, head=head))
            self.lora_B.append(declare(B, shard=None if self.row_parallel else along, rows=True, head=head))
        if self.resetless:
            self.register_buffer("merged_A", weight.new_zeros(self.heads, self.rank, in_local))
            self.register_buffer("merged_B", weight.new_zeros(self.heads, self.rank, out_local))

    def partial_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.lora_B if self.row_parallel else self.lora_A)

    def forward(self, x: Tensor, *entered: Tensor) -> Tensor:
        A_KRD = stack(entered if entered and not self.row_parallel else self.lora_A)
        B_KRF = stack(entered if entered and self.row_parallel else self.lora_B)
        if self.resetless:
            A_KRD = torch.cat([A_KRD, self.merged_A], 1)
            B_KRF = torch.cat([B_KRF, -self.merged_B], 1)
        x_KTD = x.reshape(self.heads, -1, x.size(-1))
        low = torch.bmm(torch.bmm(x_KTD, A_KRD.transpose(1, 2)), B_KRF).view(*x.shape[:-1], -1)
        high = F.linear(x, self.weight.to(x.dtype)) if self.quantised is None else self.quantised.linear(x)
        y = torch.add(high, low, alpha=self.scaling)
        return leave(self.tp, y) if self.row_parallel else y

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the shared matrix, by name; they are filled in place."""
        return {"weight": self.weight} if self.quantised is None else self.quantised.tensors()

    def base_split(self, tensor: Tensor) -> Split:
        """Return how one of these tensors is cut over tensor-parallel ranks."""
        return self.split if self.quantised is None else self.quantised.split_of(tensor, self.split)

    def place(self) -> None:
        """Cast the factors of the last merge to the final precision of the heads' factors."""
        if self.resetless:
            dtype = self.lora_A[0].dtype
            self.merged_A, self.merged_B = self.merged_A.to(dtype), self.merged_B.to(dtype)

    def quantise(self, kernels: bool) -> None:
        """Hold the shared matrix in 4 bits from here on."""
        self.quantised = Nf4Matrix(self.weight, kernels)
        del self.weight

    @torch.no_grad()
    def set_base(self, matrix: Tensor) -> None:
        """Replace the shared matrix."""
        if self.quantised is None:
            self.weight.copy_(matrix)
        else:
            self.quantised.store(matrix)

    @torch.no_grad()
    def remember_factors(self) -> None:
        """Store the present factors as those of the last merge."""
        if self.resetless:
            self.merged_A = stack(self.lora_A).detach().clone()
            self.merged_B = stack(self.lora_B).detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [K r, in] and B [K r, out] of the heads here, head by head."""
        return stack(self.lora_A).detach().flatten(0, 1), stack(self.lora_B).detach().flatten(0, 1)
