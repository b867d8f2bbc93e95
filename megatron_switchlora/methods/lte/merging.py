"""Compute means over all LTE heads for a merge, layer by layer, in coalesced buckets.

    products   (s/N) sum_n B_n A_n of every layer, in fp32
    matrices   the mean of E_n = W_n + s B_n A_n, all-reduced, for heads that switch and so change their W_n
    dense      the mean of the fp32 masters of embedding, norms and output layer, in one all-reduce that also
               assembles ZeRO's partitions
There are two ways to exchange a product, and the one that receives fewer bytes is used:
    factors    all-gather the factors of all heads, stack them, and multiply in one GEMM: (N - K) r (m + n) values
    delta      multiply the factors of the K heads here, and all-reduce the product: 2 m n (H - 1) / H values, with
               H = N / K groups of ranks
No rank holds N products at once. Under tensor parallelism each rank works on its own shards. These functions change no
parameter.
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

BUCKET_BYTES = 64 << 20  # a rank's share of one collective; a larger tensor gets a bucket of its own


def merge_sends_factors(config: RunConfig, out_features: int, in_features: int) -> bool:
    """Return whether a merge of LTE heads sends a layer's factors instead of their product.

    W is [out, in] on a rank. `method.lte.merge_traffic` decides; auto takes the way that receives fewer bytes. Factors
    are (N - K) r (m + n) values in the precision of compute. A product is 2 m n (H - 1) / H values in fp32. Heads that
    switch send weights, so the answer for them is False.
    """
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
    """Return scale B^T A [out, in] of A [R, in] and B [R, out], in at least fp32."""
    return (B.to(at_least_fp32(B.dtype)).t() @ A.to(at_least_fp32(A.dtype))).mul_(scale)


@torch.no_grad()
def mean_products(layers: Sequence[Adapted], config: RunConfig, lte: Axis) -> Iterator[Tensor]:
    """Yield (s/N) sum_n B_n A_n [out, in] of each layer, the same on all heads. Collective over `lte`.

    Every rank must consume all results.
    """
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
    gathered = [torch.empty_like(flat) for _ in range(lte.size)] if lte.size > 1 else [flat]
    if lte.size > 1:
        dist.all_gather(gathered, flat, group=lte.group)
    start = 0
    for layer in bucket:
        stacked = []
        for factor in layer.factors():
            end = start + factor.numel()
            stacked.append(torch.cat([buffer[start:end].view_as(factor) for buffer in gathered]))
            start = end
        yield product(stacked[0], stacked[1], layer.scaling / heads)


def _summed(tensors: list[Tensor], axis: Axis) -> Iterator[Tensor]:
    """Yield the sums over an axis of tensors of one dtype, in one all-reduce."""
    if axis.size == 1:
        yield from tensors
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=axis.group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        yield part.view(tensor.shape)


@torch.no_grad()
def mean_matrices(layers: Sequence[LowRankLinear], heads: int, lte: Axis) -> Iterator[Tensor]:
    """Yield mean_n (W_n + s B_n A_n) [out, in] of each layer. Collective over `lte`."""
    for bucket in grouped(layers, lambda layer: layer.weight.nbytes, BUCKET_BYTES):
        yield from _summed([layer.effective_weight().div_(heads) for layer in bucket], lte)


@torch.no_grad()
def mean_dense(
    params: dict[str, list[nn.Parameter]], optimizer: RowAdamW, heads: int, lte: Axis, data: Axis
) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with the mean of its fp32 masters over all heads.

    `params` holds the parameters of the K heads here. Collective over `data` where ZeRO partitions the masters, else
    over `lte`.
    """
    axis = data if optimizer.partitioned else lte
    for bucket in grouped(params.items(), lambda item: 4 * item[1][0].numel(), BUCKET_BYTES):
        sums = [optimizer.sum_of_masters(same).div_(heads) for _, same in bucket]
        yield from zip((name for name, _ in bucket), _summed(sums, axis), strict=True)
