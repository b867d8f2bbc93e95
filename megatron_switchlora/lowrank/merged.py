"""The merged form of an adapted linear: one dense product with W_eff = W + s B A.

    forward   y  = x W_eff^T
    backward  dx = dy W_eff,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

FLOPs per token, for W [m, n]:

    merged     4 m n + 4 r (m + n), and 2 m n r each time W_eff is formed
    split      4 m n + 6 r (m + n), with y = W x + s B (A x)
    full-rank  6 m n

Nothing of width r is kept for the backward pass. One pass over the fp32 W forms W_eff in the precision of x. In bf16
the product B A is rounded once before it is added, and W_eff once after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.config.run import RunConfig


@dataclass(frozen=True)
class Form:
    """How adapted layers compute: `compute` is auto, merged or split; `cache` is how long W_eff is kept."""

    compute: str = "auto"
    cache: str = "micro_batch"


def choose_form(config: RunConfig) -> Form:
    """Return how adapted layers compute in a run.

    With `method.merged_cache` "auto" W_eff lasts over the micro-batches of a step where that costs no memory: all
    layers' are held in a backward pass anyway, unless activations are checkpointed.
    """
    cache = config.method.merged_cache
    if cache == "auto":
        cache = "micro_batch" if config.train.activation_checkpointing else "accumulation"
    return Form(config.method.compute, cache)


@torch.no_grad()
def merge(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return W + s B A [out, in] in the factors' precision; weight [out, in], A [r, in], B [r, out]."""
    if weight.dtype == A.dtype:
        return torch.addmm(weight, B.t(), A, alpha=scaling)
    product = B.t() @ A
    return torch.add(weight, product, alpha=scaling, out=torch.empty_like(product))


def prefers_merged(tokens: int, out_features: int, in_features: int, formed: float) -> bool:
    """Return whether the merged form costs fewer FLOPs than the split form for a micro-batch.

    The merged form saves 2 r (m + n) per token and costs 2 m n r each time W_eff is formed. `formed` is how often that
    is per micro-batch: less than once if W_eff lasts over several.
    """
    return tokens * (out_features + in_features) > formed * out_features * in_features


def uses_merged(form: Form, tokens: int, shape: tuple[int, int], micro_batches: int, trains: bool) -> bool:
    """Return whether a layer whose W has this local shape (out, in) computes in the merged form.

    `form.compute` decides, or with "auto" the FLOPs. W_eff may last over the micro-batches of a step, or be formed
    again for the backward pass, if there is one.
    """
    if form.compute != "auto":
        return form.compute == "merged"
    formed = {"recompute": 2 if trains else 1, "accumulation": 1 / micro_batches}.get(form.cache, 1)
    return prefers_merged(tokens, *shape, formed)


class MergedLinear(torch.autograd.Function):
    """Compute `apply(x, A, B, weight, merged, scaling, keep)`.

    `merged` is W_eff if it is known already, else None. With `keep` W_eff stays in memory until the backward pass;
    without it is formed again there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, merged: Optional[Tensor], scaling: float, keep: bool
    ) -> Tensor:
        if merged is None:
            merged = merge(weight, A, B, scaling)
        ctx.scaling, ctx.keep = scaling, keep
        ctx.save_for_backward(x, A, B, merged if keep else weight)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        x, A, B, matrix = ctx.saved_tensors
        merged = matrix if ctx.keep else merge(matrix, A, B, ctx.scaling)
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        flat_x, flat_dy = x.reshape(-1, x.size(-1)), dy.reshape(-1, dy.size(-1))
        # beta 0 ignores the first argument; the scaling is applied before the result is rounded
        dA = torch.addmm(A, (flat_dy @ B.t()).t(), flat_x, beta=0, alpha=ctx.scaling)
        dB = torch.addmm(B, (flat_x @ A.t()).t(), flat_dy, beta=0, alpha=ctx.scaling)
        return dx, dA, dB, None, None, None, None
