"""What a rank hands to collectives in a step, by kind, from the configuration alone; and what of it a wire carries.

    gradients        of each group of parameters over dp, once a step (at ZeRO 2 at every micro-batch)
    parameters       ZeRO's all-gather of what the ranks have updated
    bank             rows of the candidates on their way to the ranks that switch them in, in the mean over a run
    tensor parallel  activations and gradients of activations over tp, with those of the replicated factors
    merges           of LTE heads, in the mean of a step: factors or products, and dense tensors
A `Flow` counts what a rank gives to its collectives, as `distributed/recorder.py` records it. A ring sends of an
all-reduce 2 (N - 1) / N of what a rank gave, of an all-gather N - 1 times: `on_the_wire`. Left out are scalars
(losses, norms, votes), ZeRO's padding to equal parts, and evaluations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.parallel import shard_size
from megatron_switchlora.config.run import RunConfig, accumulation_steps, compute_bytes
from megatron_switchlora.distributed.mesh import COMPOSITE_GROUPS
from megatron_switchlora.lowrank.schedule import mean_switch_rate
from megatron_switchlora.methods.lte.merging import merge_sends_factors
from megatron_switchlora.model.protocol import family_of
from megatron_switchlora.planning.counts import ParameterCounts, count_here, count_run, count_shard, projections

FP32 = 4
PARTS = ("adapters", "matrices", "embedding", "head", "norms")

Kind = Literal["gradients", "parameters", "bank", "tensor parallel", "merges"]


@dataclass(frozen=True)
class Flow:
    """Bytes that a rank gives to one kind of collective in a step. `part` is a group of parameters, or empty; `axis`
    is an axis or composite group of the mesh."""

    kind: Kind
    part: str
    axis: str
    op: str
    bytes: float


def on_the_wire(op: str, given: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring of so many, where it gave `given` bytes."""
    return given * {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1}[op]


def flows(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """What a rank of the mesh {"lte", "dp", "tp"} gives in a step of this run."""
    found = [
        *_gradients(config, vocab_size, mesh, zero),
        *_parameters(config, vocab_size, mesh, zero),
        *_bank(config, mesh),
        *_tensor_parallel(config, mesh),
    ]
    interval = config.method.facts.merge_interval
    if interval is not None:
        merges = merge_flows(config, vocab_size, mesh, zero)
        found += [replace(flow, bytes=flow.bytes / interval) for flow in merges]
    return [flow for flow in found if flow.bytes]


def _gradients(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """Stage 2 reduces at every micro-batch, all others once a step; fp32 sums are cast to bf16 on their way."""
    if mesh["dp"] == 1:
        return []
    times = accumulation_steps(config, mesh["dp"]) if zero.stage == 2 else 1
    counts = count_here(config, vocab_size, mesh["tp"])
    each = times * compute_bytes(config)
    return [Flow("gradients", part, "dp", "all_reduce", each * count) for part, count in trainable_parts(counts)]


def trainable_parts(counts: ParameterCounts) -> list[tuple[str, int]]:
    """The groups of parameters that train, with their sizes."""
    frozen = {"adapters" if counts.full_rank else "matrices"}
    if counts.dense_frozen:
        frozen |= {"embedding", "head", "norms"}
    return [(part, getattr(counts, part)) for part in PARTS if part not in frozen and getattr(counts, part)]


def _parameters(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    if zero.stage == 0 or mesh["dp"] == 1:
        return []
    here = count_here(config, vocab_size, mesh["tp"]).trainable / mesh["dp"]
    return [Flow("parameters", "", "dp", "all_gather", here * compute_bytes(config))]


def _bank(config: RunConfig, mesh: dict[str, int]) -> list[Flow]:
    """Candidates of a factor that tensor parallelism splits lie where they are used, or spread over dp; those of the
    replicated one over tp, or over the whole head. An all-reduce completes the rows that a step switches in."""
    method = config.method
    if not method.facts.switches:
        return []
    switch = method.switch
    steps = config.train.steps
    rate = mean_switch_rate(steps, switch.ratio, switch.total_steps or steps)
    axis = {"split": "dp", "replicated": "head"} if switch.bank_spread == "dp" else {"replicated": "tp"}
    values = dict.fromkeys(("split", "replicated"), 0)
    for p in projections(config.model):
        if min(p.out_features, p.in_features) > method.rank:
            split, replicated = (p.in_features, p.out_features) if p.row_parallel else (p.out_features, p.in_features)
            values["split"] += shard_size(split, mesh["tp"])
            values["replicated"] += replicated
    each = method.rank / switch.interval0 * rate * config.model.num_layers * compute_bytes(config)
    return [
        Flow("bank", "", group, "all_reduce", each * values[side])
        for side, group in axis.items()
        if axis_size(mesh, group) > 1
    ]


def axis_size(mesh: dict[str, int], axis: str) -> int:
    """Ranks of an axis of the mesh, or of a composite group."""
    return math.prod(mesh[name] for name in COMPOSITE_GROUPS.get(axis, (axis,)))


def _tensor_parallel(config: RunConfig, mesh: dict[str, int]) -> list[Flow]:
    """Count what tensor parallelism sums.

    Forward: the embedding's vectors, and what a layer's blocks (attention, feed-forward) give, again where a layer is
    computed again for backward; the maximum, the sum and the target's logit of each token in fp32. Backward: the
    gradient of what enters the blocks and the head, with those of a replicated factor of each linear.
    """
    if mesh["tp"] == 1:
        return []
    train, layers, size = config.train, config.model.num_layers, compute_bytes(config)
    tokens = train.micro_batch_size * train.seq_len
    sums = family_of(config.model).sums_per_layer
    again = (sums - 1) * train.activation_checkpointing  # the recomputation ends before the last sum
    vectors = 1 + layers * (sums + again + sums) + 1 - config.freezes_dense  # what enters layer 1 has no gradient then
    factors = 0
    if config.method.facts.adapts:
        whole = [p.out_features if p.row_parallel else p.in_features for p in projections(config.model)]
        factors = layers * config.method.adapter_rank * config.method.facts.heads_here * sum(whole)
    given = (vectors * tokens * config.model.hidden_size + factors) * size + 3 * tokens * FP32
    return [Flow("tensor parallel", "", "tp", "all_reduce", accumulation_steps(config, mesh["dp"]) * given)]


def merge_flows(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """What a rank gives in one merge of LTE heads: over the heads the factors of each layer, or their fp32 product;
    within a head the fp32 sums that become each W, where its ranks keep the origin in parts; and the fp32 means of the
    dense tensors, which put ZeRO's partitions together on the way."""
    method, counts = config.method, count_run(config, vocab_size, mesh["tp"])
    facts = method.facts
    if not facts.merges:
        return []
    layers, origins, sent = config.model.num_layers, 0, {"all_gather": 0, "all_reduce": 0}
    for m, n in (p.shard(mesh["tp"]) for p in projections(config.model)):
        origins += layers * FP32 * shard_size(m, mesh["dp"]) * n * facts.keeps_origins
        if merge_sends_factors(config, m, n):
            sent["all_gather"] += layers * facts.heads_here * method.rank * (m + n) * compute_bytes(config)
        else:
            sent["all_reduce"] += layers * FP32 * m * n
    dense = FP32 * (counts.dense - counts.frozen_dense)  # the heads here are summed first
    over = "data" if zero.stage > 0 or zero.fp32_accumulation else "lte"
    found = [
        *(Flow("merges", "adapters", "lte", op, given) for op, given in sent.items()),
        Flow("merges", "matrices", "dp", "all_gather", origins),
        Flow("merges", "dense", over, "all_reduce", dense),
    ]
    return [flow for flow in found if flow.bytes and axis_size(mesh, flow.axis) > 1]


def gradient_bytes(config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero) -> tuple[int, int]:
    """Bytes of gradients that a rank gives in a step: with this method, and with full-rank training."""
    mesh = {"lte": config.parallel.lte_heads, "dp": dp, "tp": tp}
    given = round(sum(flow.bytes for flow in _gradients(config, vocab_size, mesh, zero)))
    return given, round(full_rank_bytes(given, config, vocab_size, tp))


def merge_bytes(config: RunConfig, vocab_size: int, tp: int) -> int:
    """Bytes that a rank gives to collectives across LTE heads in one merge."""
    if config.parallel.lte_heads == 1:
        return 0
    mesh = {"lte": config.parallel.lte_heads, "dp": 1, "tp": tp}
    return round(sum(flow.bytes for flow in merge_flows(config, vocab_size, mesh, Zero())))


def full_rank_bytes(given: float, config: RunConfig, vocab_size: int, tp: int) -> float:
    """Gradient bytes of full-rank training where this method's are `given`: it reduces the same way, over a rank's
    part of all parameters."""
    full = count_shard(config.model, config.method, vocab_size, tp).full_total
    return given * full / count_here(config, vocab_size, tp).trainable


def describe_saving(given: float, full: float) -> str:
    """How `given` compares with full-rank training's bytes."""
    return f"{1 - given / full:.1%} saved" if given <= full else f"{given / full - 1:.1%} more"
