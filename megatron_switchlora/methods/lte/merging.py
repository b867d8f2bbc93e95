"""What LTE heads give each other at a merge: means over all heads, layer by layer, in coalesced buckets.

    products   (s/N) sum_n B_n A_n of every layer, in fp32. Either the factors are all-gathered over the heads,
               stacked, and multiplied in one GEMM: (N - K) r (m + n) values received; or the K heads here are
               multiplied and the product is all-reduced: 2 m n (H - 1) / H values, with H = N / K groups of
               ranks. The smaller is taken; no rank ever holds N products.
    matrices   the mean of E_n = W_n + s B_n A_n, all-reduced: where switches have changed each W_n
    dense      the mean of the fp32 masters of embedding, norms and head: one all-reduce that also puts ZeRO's
               partitions together
Under tensor parallelism everything is a rank's own shard. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config.run import RunConfig, compute_bytes
from megatron_switchlora.distributed.buckets import grouped
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.optim.row_adamw import RowAdamW

BUCKET_BYTES = 64 << 20  # of what a rank holds of one collective, unless one tensor is larger


def merge_sends_factors(config: RunConfig, out_features: int, in_features: int) -> bool:
    """Whether a merge of LTE heads moves the factors of a layer whose W is [out, in] on a rank, and not their product:
    by `method.lte.merge_traffic`, or whatever is less. Received are (N - K) r (m + n) values in the precision of
    compute, or 2 m n (H - 1) / H in fp32. Heads that switch move their weights."""
    lte, facts, groups = config.method.lte, config.method.facts, config.parallel.lte_heads
    if facts.switches:
        return False
    if lte.merge_traffic != "auto":
        return lte.merge_traffic == "factors"
    values = (config.heads - lte.local_heads) * config.method.rank * (out_features + in_features)
    factors = values * compute_bytes(config)
    return factors <= 2 * out_features * in_features * (groups - 1) / groups * 4


class Adapted(Protocol):
    """A layer with the factors A [K r, in] and B [K r, out] of the K heads here."""

    scaling: float

    def factors(self) -> tuple[Tensor, Tensor]: ...


def product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale B A [out, in] of A [R, in] and B [R, out], in at least fp32."""
    return (B.to(at_least_fp32(B.dtype)).t() @ A.to(at_least_fp32(A.dtype))).mul_(scale)


@torch.no_grad()
def mean_products(layers: Sequence[Adapted], config: RunConfig, lte: Axis) -> Iterator[Tensor]:
    """(s/N) sum_n B_n A_n [out, in] of each layer in turn, alike on all heads. Collective over `lte`, whatever is done
    with the results."""
    runs: list[tuple[bool, list[Adapted]]] = []
    for layer in layers:
        A, B = layer.factors()
        gathers = merge_sends_factors(config, B.size(1), A.size(1))
        if not runs or runs[-1][0] != gathers:
            runs.append((gathers, []))
        runs[-1][1].append(layer)
    for gathers, run in runs:
        if gathers:
            for bucket in grouped(run, lambda layer: _factor_bytes(layer) * lte.size, BUCKET_BYTES):
                yield from _products_of_factors(bucket, config.heads, lte)
        else:
            for bucket in grouped(run, _product_bytes, BUCKET_BYTES):
                products = [product(*layer.factors(), layer.scaling / config.heads) for layer in bucket]
                yield from _summed(products, lte)


def _factor_bytes(layer: Adapted) -> int:
    return sum(factor.nbytes for factor in layer.factors())


def _product_bytes(layer: Adapted) -> int:
    A, B = layer.factors()
    return 4 * A.size(1) * B.size(1)


def _products_of_factors(bucket: list[Adapted], heads: int, lte: Axis) -> Iterator[Tensor]:
    flat = torch.cat([factor.reshape(-1) for layer in bucket for factor in layer.factors()])
    everyone = [torch.empty_like(flat) for _ in range(lte.size)] if lte.size > 1 else [flat]
    if lte.size > 1:
        dist.all_gather(everyone, flat, group=lte.group)
    start = 0
    for layer in bucket:
        stacked = []
        for factor in layer.factors():
            end = start + factor.numel()
            stacked.append(torch.cat([flat[start:end].view_as(factor) for flat in everyone]))
            start = end
        yield product(stacked[0], stacked[1], layer.scaling / heads)


def _summed(tensors: list[Tensor], axis: Axis) -> Iterator[Tensor]:
    """The sums of tensors over an axis, of one dtype, in one all-reduce."""
    if axis.size == 1:
        yield from tensors
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        yield part.view(tensor.shape)


@torch.no_grad()
def mean_matrices(layers: Sequence[LowRankLinear], heads: int, lte: Axis) -> Iterator[Tensor]:
    """mean_n (W_n + s B_n A_n) [out, in] of each layer in turn. Collective over `lte`."""
    for bucket in grouped(layers, lambda layer: layer.weight.nbytes, BUCKET_BYTES):
        yield from _summed([layer.effective_weight().div_(heads) for layer in bucket], lte)


@torch.no_grad()
def mean_dense(
    params: dict[str, list[nn.Parameter]], optimizer: RowAdamW, heads: int, lte: Axis, data: Axis
) -> Iterator[tuple[str, Tensor]]:
    """Each name with the mean over all heads of its parameters, given those of the K heads here, from the masters.
    Collective over `data` where ZeRO partitions the masters, else over `lte`."""
    axis = data if optimizer.partitioned else lte
    for bucket in grouped(params.items(), lambda item: 4 * item[1][0].numel(), BUCKET_BYTES):
        sums = [optimizer.sum_of_masters(same).div_(heads) for _, same in bucket]
        yield from zip((name for name, _ in bucket), _summed(sums, axis), strict=True)
