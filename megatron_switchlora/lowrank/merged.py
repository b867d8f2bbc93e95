"""The merged form of an adapted linear: one dense product with W_eff = W + s B A.

    forward   y  = x W_eff^T
    backward  dx = dy W_eff,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

FLOPs per token, for W [m, n]:

    merged     4 m n + 4 r (m + n), and 2 m n r each time W_eff is formed
    split      4 m n + 6 r (m + n), with y = W x + s B (A x)
    full-rank  6 m n

Layers with the same x, as q, k and v, run backward together. Each dy W_eff is added to one dx by its product. All A are
one matrix for x A^T, and all (dy B)^T one for dA. So there are fewer products and no additions of gradients. Each y
stays a product of its own: a joined y would be read in strides, and a joined dy would have to be copied.

Nothing of width r is kept for the backward pass. One pass over the fp32 W forms W_eff in the precision of x. In bf16
the product B A is rounded once before it is added, and W_eff once after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.linear import sum_of_products
from megatron_switchlora.lowrank.rows import adjacent


@dataclass(frozen=True)
class Form:
    """How adapted layers compute: `compute` is auto, merged or split; `cache` is how long W_eff is kept."""

    compute: str = "auto"
    cache: str = "micro_batch"


def choose_form(config: RunConfig) -> Form:
    """Return how adapted layers compute in a run.

    With `method.merged_cache` "auto" W_eff lasts over the micro-batches of a step where that costs no memory: all
    layers' are held in a backward pass anyway, unless activations are checkpointed. Where the rows of W are spread
    over ranks, W_eff is gathered once per step. From W in 4 bits it is never formed.
    """
    if config.method.facts.quantised:
        return Form("split")
    if config.method.base_spread != "none":
        return Form("merged", "accumulation")
    cache = config.method.merged_cache
    if cache == "auto":
        cache = "micro_batch" if config.train.activation_checkpointing else "accumulation"
    return Form(config.method.compute, cache)


@torch.no_grad()
def merge(weight: Tensor, A: Tensor, B: Tensor, scaling: float, out: Optional[Tensor] = None) -> Tensor:
    """Return W + s B A [out, in] in the factors' precision; weight [out, in], A [r, in], B [r, out].

    It is written into `out` if that is given.
    """
    out = A.new_empty(weight.shape) if out is None else out
    if weight.dtype == A.dtype:
        return torch.addmm(weight, B.t(), A, alpha=scaling, out=out)
    return torch.add(weight, B.t() @ A, alpha=scaling, out=out)


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


def merged_linears(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor]], scaling: float, keep: bool
) -> tuple[Tensor, ...]:
    """Return y of each layer (A, B, matrix) that takes this x; all of them run backward at once.

    With `keep` a matrix is W_eff, which stays in memory until the backward pass. Else it is W, and W_eff is formed
    twice.
    """
    return MergedLinears.apply(x, scaling, keep, *(tensor for kind in zip(*layers, strict=True) for tensor in kind))


class MergedLinears(torch.autograd.Function):
    """Compute `apply(x, scaling, keep, *A, *B, *matrices)`; see `merged_linears`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, keep: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.scaling, ctx.keep = scaling, keep
        ctx.save_for_backward(x, *tensors)
        return tuple(F.linear(x, M if keep else merge(M, A, B, scaling)) for A, B, M in _layers(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Optional[Tensor], ...]:
        x, *tensors = ctx.saved_tensors
        layers, scaling = _layers(tensors), ctx.scaling
        flat_x, flat_dy = x.reshape(-1, x.size(-1)), [dy.reshape(-1, dy.size(-1)) for dy in gradients]
        dx = None
        if ctx.needs_input_grad[0]:
            matrices = (M if ctx.keep else merge(M, A, B, scaling) for A, B, M in layers)
            dx = sum_of_products(flat_dy, matrices).view(x.shape)
        all_A = _joined([A for A, _, _ in layers])
        ranks = [len(A) for A, _, _ in layers]
        low_dy = flat_x.new_empty(len(flat_x), len(all_A))
        for dy, (_, B, _), part in zip(flat_dy, layers, low_dy.split(ranks, 1), strict=True):
            torch.mm(dy, B.t(), out=part)
        # beta 0 ignores the first argument; the scaling is applied before the result is rounded
        dA = torch.addmm(all_A, low_dy.t(), flat_x, beta=0, alpha=scaling).split(ranks)
        low_x = (flat_x @ all_A.t()).split(ranks, 1)
        dB = (
            torch.addmm(B, low.t(), dy, beta=0, alpha=scaling)
            for low, dy, (_, B, _) in zip(low_x, flat_dy, layers, strict=True)
        )
        return dx, None, None, *dA, *dB, *(None for _ in layers)


def _layers(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (A, B, matrix) of each layer, of all A, all B and all matrices."""
    count = len(tensors) // 3
    return list(zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :], strict=True))


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """Return factors [r, n] as one matrix; one group of the optimizer holds them as such."""
    if len(factors) == 1:
        return factors[0]
    found = adjacent(factors)
    return torch.cat(list(factors)) if found is None else found
