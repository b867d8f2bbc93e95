"""The adapted linear: y = W x + s B A x with a frozen W (SwitchLoRA, arXiv 2406.06564, eq. 1 and 4).

W is a persistent fp32 buffer, not a parameter. DeepSpeed would cast a parameter to bf16, and tens of thousands of folds
into a bf16 W would drift by per cent. One LoRA vector is one contiguous row:

    weight  [out, in]    W, fp32 (or float64 in tests)
    lora_A  [rank, in]
    lora_B  [rank, out]  B transposed, so that column i of the paper's B is row i

Under tensor parallelism a column-parallel layer splits W and B on out and replicates A. A row-parallel layer splits W
and A on in and replicates B. So s B A has exactly the shard's shape, and the forward pass gains no collective. Each
rank computes a part of the replicated factor's gradient, and `enter_block` sums the parts.

W's rows may be spread over data-parallel ranks (`lowrank/spread.py`); `weight` then holds this rank's. Or W may be held
in 4 bits (`lowrank/nf4.py`), without `weight`.

The layer computes in the merged form (`lowrank/merged.py`) or in the split form, both in the activation's precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.linear import ParallelLinear
from megatron_switchlora.distributed.shard import Axis, Split, declare
from megatron_switchlora.lowrank.merged import Form, merge, merged_linears, uses_merged
from megatron_switchlora.lowrank.nf4 import Nf4Matrix
from megatron_switchlora.lowrank.spread import GatheredMatrix, spread_rows


class LowRankLinear(nn.Module):
    """Replace a parallel linear; its weight becomes the frozen base.

    `in_features` and `out_features` are the full sizes, `shape` is that of this rank's W if its rows are not spread.
    They are spread over the axis `over`, if it has several ranks.
    """

    weight: Tensor
    bias: Optional[nn.Parameter]

    def __init__(
        self,
        base: ParallelLinear,
        rank: int,
        scaling: float,
        form: Optional[Form] = None,
        micro_batches: int = 1,
        over: Optional[Axis] = None,
    ) -> None:
        super().__init__()
        self.micro_batches = micro_batches  # of a step
        self.in_features, self.out_features = base.in_features, base.out_features
        self.tp, self.split, self.row_parallel = base.tp, base.split, base.split_dim == 1
        self.rank, self.scaling, self.form = rank, scaling, form or Form()
        weight = base.weight.detach()
        self.shape = out_local, in_local = weight.size(0), weight.size(1)
        self.owned = spread_rows(out_local, over) if over is not None and over.size > 1 else None
        self.register_buffer("weight", weight if self.owned is None else self.owned.take(weight).clone())
        A = nn.Parameter(self.weight.new_empty(self.rank, in_local))
        B = nn.Parameter(self.weight.new_empty(self.rank, out_local))
        along = replace(self.split, dim=1)
        self.lora_A = declare(A, shard=along if self.row_parallel else None, rows=True)
        self.lora_B = declare(B, shard=None if self.row_parallel else along, rows=True)
        self.quantised: Optional[Nf4Matrix] = None
        self.bias = base.bias
        self._merged: Optional[Tensor] = None
        self.gathered: Optional[GatheredMatrix] = None

    @property
    def splits(self) -> list[Split]:
        """How `weight` was cut from the full W, the last cut first."""
        return [self.split] if self.owned is None else [self.owned, self.split]

    def partial_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.lora_B,) if self.row_parallel else (self.lora_A,)

    def forward(self, x: Tensor, *entered: Tensor) -> Tensor:
        A, B = self._entered(entered)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                y = self._product(x.to(dtype), A.to(dtype), B.to(dtype))
        else:
            y = self._product(x, A, B)
        y = leave(self.tp, y) if self.row_parallel else y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._merged_form(x, A, B) if self._merges(x) else self._split_form(x, A, B)

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
        tokens = x.numel() // self.shape[1]
        return uses_merged(self.form, tokens, self.shape, self.micro_batches, torch.is_grad_enabled())

    def _split_form(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        high = F.linear(x, self.weight.to(x.dtype)) if self.quantised is None else self.quantised.linear(x)
        return torch.add(high, F.linear(x, A) @ B, alpha=self.scaling)

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
        """Drop the cached W_eff, since W or a factor has changed; a gathered one stays until the next gather."""
        if self.owned is None:
            self._merged = None

    def place_merged(self) -> None:
        """Allocate the whole W_eff in the factors' final precision, if the rows of W are spread."""
        if self.owned is not None:
            self.gathered = GatheredMatrix(self.owned, self.shape[1], self.lora_A.detach())
            self._merged = self.gathered.whole

    @torch.no_grad()
    def gather_merged(self) -> dist.Work:
        """Form this rank's rows of W_eff, and start to gather the others'. Collective over the ranks of `over`."""
        assert self.gathered is not None, "the rows of W are not spread"
        merge(self.weight, *self._factors_of_rows(), self.scaling, out=self.gathered.own)
        return self.gathered.gather()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [r, out] as they are, without gradients."""
        return self.lora_A.detach(), self.lora_B.detach()

    def _factors_of_rows(self) -> tuple[Tensor, Tensor]:
        """Return A, and the columns of B that belong to the rows of `weight`."""
        A, B = self.factors()
        return A, B if self.owned is None else replace(self.owned, dim=1).take(B)

    @torch.no_grad()
    def add_product(self, sign: float) -> None:
        """Set W <- W + sign s B A, from the factors as the forward pass uses them, in W's precision."""
        A, B = (factor.to(self.weight.dtype) for factor in self._factors_of_rows())
        self.weight.addmm_(B.t(), A, alpha=sign * self.scaling)
        self.forget_merged()

    def quantise(self, kernels: bool) -> None:
        """Hold W in 4 bits from here on, in the split form; with `kernels` bitsandbytes dequantises it."""
        self.quantised = Nf4Matrix(self.weight, kernels)
        del self.weight

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return this rank's shard of W + s B A [out, in], in W's precision. Collective where its rows are spread.

        W in 4 bits counts as fp32.
        """
        weight = self.weight if self.quantised is None else self.quantised.dequantised(torch.float32)
        A, B = (factor.to(weight.dtype) for factor in self._factors_of_rows())
        return self._all_rows(merge(weight, A, B, self.scaling))

    def whole_weight(self) -> Tensor:
        """Return this rank's shard of W [out, in]. Collective where its rows are spread."""
        return self._all_rows(self.weight)

    def _all_rows(self, rows: Tensor) -> Tensor:
        return rows if self.owned is None else self.owned.gather(rows)
