"""What a rank's memory holds, by kind, from the configuration alone.

The peak is what is always there plus the larger of two phases: forward and backward, where activations
live, and the optimizer's step, where fp32 gradients do. Tensors are counted with their tensor-parallel
padding; ZeRO's alignment, tensors that straddle two partitions, temporaries of one operation, libraries
and the allocator's gaps are left out. Gradients, masters and buckets are those of deepspeed 0.19.8's
classes (see `optim/layout.py`). Activations are a formula, of which the model's family knows its layers' part.
All sizes are bytes. tp and dp are the mesh's; a "token" is one of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Optional

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.parallel import shard_size
from megatron_switchlora.config.run import RunConfig, accumulation_steps, compute_bytes
from megatron_switchlora.distributed.cross_entropy import chunk_tokens
from megatron_switchlora.distributed.mesh import ranks_of_host
from megatron_switchlora.lowrank.merged import choose_form, uses_merged
from megatron_switchlora.lowrank.spread import TILE
from megatron_switchlora.model.protocol import Projection, family_of, logits_size, projections
from megatron_switchlora.planning.counts import FP32, HOST, RankTensors, rank_tensors, whole_tensors

FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed copies at once where ZeRO does not reduce: stage 0, fp32 sums

Phase = Literal["always", "backward", "step", "host"]


@dataclass(frozen=True)
class Item:
    """Bytes of one kind and when they are there."""

    kind: str
    bytes: int
    phase: Phase


def peak_bytes(items: list[Item]) -> int:
    """Return the most that a rank's device holds at once."""
    return phase_bytes(items, "always") + max(phase_bytes(items, "backward"), phase_bytes(items, "step"))


def phase_bytes(items: list[Item], phase: Phase) -> int:
    return sum(item.bytes for item in items if item.phase == phase)


def memory_items(
    config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero, node: Optional[int] = None
) -> list[Item]:
    """List everything that a rank holds, largest first within a phase; kinds without bytes are left out.

    `node` data ranks are on a host, by default those that fit on one of 8 ranks.
    """
    node = ranks_of_host(dp, tp, HOST) if node is None else node
    tensors = rank_tensors(config, vocab_size, tp, dp, node)
    items = [
        *_weights(config, tensors),
        *_compute_copies(config, tp, dp, node),
        *_optimizer(config, tensors, dp, zero),
        *_gradients(config, tensors, dp, zero),
        *_activations(config, vocab_size, tp, dp),
    ]
    order = ("always", "backward", "step", "host")
    return sorted((item for item in items if item.bytes), key=lambda item: (order.index(item.phase), -item.bytes))


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Return the bytes of all tensors of a checkpoint, whatever the mesh.

    Headers, tokenizer and counters of rows that ZeRO's partitions cut are left out.
    """
    return whole_tensors(config, vocab_size).totals["checkpoint"]


def _weights(config: RunConfig, tensors: RankTensors) -> list[Item]:
    """List parameters and what the method keeps; LoRA-GA sums the gradients of all matrices before the first step."""
    precision, size, matrices = config.train.precision, compute_bytes(config), tensors.fixed["matrices"]
    summed = config.method.init == "lora_ga" and config.method.ga.vectors == "gradient"
    return [
        Item(f"trainable parameters, {precision}", tensors.trained.total() * size, "always"),
        Item(f"frozen embedding, head and norms, {precision}", (tensors.fixed.total() - matrices) * size, "always"),
        *(
            Item(kind, count, "host" if kind.endswith("in host memory") else "always")
            for kind, count in tensors.kept_bytes.items()
        ),
        Item("LoRA-GA's gradients before step 1, in host memory", matrices * FP32 * summed, "host"),
    ]


def is_merged(config: RunConfig, projection: Projection, tp: int, micro_batches: int) -> bool:
    """Return whether a layer computes with W + sBA on a rank's shard."""
    if config.method.facts.shares_base:
        return False
    tokens = config.train.micro_batch_size * config.train.seq_len
    return uses_merged(choose_form(config), tokens, projection.shard(tp), micro_batches, trains=True)


def base_ranks(config: RunConfig, dp: int, node: int) -> int:
    """Return the number of ranks over which the rows of each frozen W are spread."""
    return {"none": 1, "dp": dp, "node": node}[config.method.base_spread]


def _compute_copies(config: RunConfig, tp: int, dp: int, node: int) -> list[Item]:
    """List what is kept for backward: W + sBA of merged layers, and W in bf16 for split ones.

    In fp32 split layers use W itself; from 4 bits they form it again for backward.
    Checkpointing keeps one decoder layer's at a time, unless the cache lasts over the micro-batches.
    Where the rows of W are spread, W + sBA has memory of its own, with the padding of the ranks' rows.
    """
    if not config.method.facts.adapts:
        return []
    method, layers, size = config.method, config.model.num_layers, compute_bytes(config)
    micro_batches, ranks = accumulation_steps(config, dp), base_ranks(config, dp, node)
    if ranks > 1:
        shapes = [p.shard(tp) for p in projections(config.model)]
        gathered = sum(shard_size(m, ranks, TILE) * ranks * n for m, n in shapes)
        return [Item(f"W + sBA, {config.train.precision}, gathered", layers * size * gathered, "always")]
    at_once = 1 if config.train.activation_checkpointing else layers
    forms = [(p.shard(tp), is_merged(config, p, tp, micro_batches)) for p in projections(config.model)]
    merged = [size * m * n for (m, n), is_merged in forms if is_merged]
    casts = size != FP32 and not method.facts.quantised
    split = [size * m * n for (m, n), is_merged in forms if not is_merged and casts]
    held = {
        "micro_batch": at_once * sum(merged),
        "accumulation": layers * sum(merged),
        "recompute": max(merged, default=0),
    }[choose_form(config).cache]
    return [
        Item(f"W + sBA, {config.train.precision}", held, "backward"),
        Item("W for the split form, bf16", at_once * sum(split), "backward"),
        Item("factors of the heads side by side", at_once * _stacked_factors(config, tp), "backward"),
    ]


def _stacked_factors(config: RunConfig, tp: int) -> int:
    """Return bytes of a layer's factors, those of all heads side by side, with those of the last merge."""
    method = config.method
    if not method.facts.shares_base or (method.facts.heads_here == 1 and not method.facts.resetless):
        return 0
    times = method.facts.heads_here * (2 if method.facts.resetless else 1)
    shapes = [p.shard(tp) for p in projections(config.model)]
    return times * method.rank * sum(m + n for m, n in shapes) * compute_bytes(config)


def _optimizer(config: RunConfig, tensors: RankTensors, dp: int, zero: Zero) -> list[Item]:
    share = 1 if zero.stage == 0 else dp
    no_copy = zero.stage == 0 and config.train.precision == "fp32"
    masters = 0 if no_copy else shard_size(tensors.trained.total(), share) * FP32
    state: Counter[str] = Counter()
    for (kind, _), count in tensors.state.items():
        state[kind] += shard_size(count, share) * FP32
    return [Item("fp32 masters", masters, "always"), *(Item(kind, count, "always") for kind, count in state.items())]


def _gradients(config: RunConfig, tensors: RankTensors, dp: int, zero: Zero) -> list[Item]:
    """List gradients, the buckets they are reduced in, and their fp32 form for the optimizer's step."""
    count, size, precision = tensors.trained.total(), compute_bytes(config), config.train.precision
    name, in_step = f"gradients, {precision}", "fp32 gradients of the step"
    if zero.fp32_accumulation:
        copies = min(count, FALLBACK_BUCKET) * (FP32 + size)
        return [
            Item(name, count * size, "always"),
            Item("gradient sums, fp32", count * FP32, "always"),
            Item("copies to reduce", copies, "step"),
        ]
    if zero.stage == 0:
        fp32_form = 0 if size == FP32 else count * FP32
        copies = min(count, FALLBACK_BUCKET) * size * (dp > 1)
        return [
            Item(name, count * size, "always"),
            Item(in_step, fp32_form, "step"),
            Item("copies to reduce", copies if not fp32_form else 0, "step"),  # gone when the fp32 form comes
        ]
    part = shard_size(count, dp) * size
    in_backward = count * size
    if zero.stage == 2:  # the sum of earlier micro-batches, and this one's part
        in_backward = part * min(2, accumulation_steps(config, dp))
    flat = shard_size(max(tensors.groups.values()), dp) * FP32  # the optimizer takes one group at a time
    return [
        Item(name, in_backward, "backward"),
        Item("buckets to reduce", zero.bucket * size, "backward"),
        Item(name, part, "step"),
        Item(in_step, flat, "step"),
    ]


def layer_activation_bytes(config: RunConfig, tp: int, micro_batches: int = 1) -> int:
    """Return the bytes per token that autograd keeps of one decoder layer for the backward pass."""
    model, size = config.model, compute_bytes(config)
    lowrank = 0
    if config.method.facts.adapts:
        split = [p for p in projections(model) if not is_merged(config, p, tp, micro_batches)]
        times = 2 if config.method.facts.shares_base and config.method.facts.resetless else 1
        lowrank = size * config.method.adapter_rank * times * len(split)
    return family_of(model).kept_bytes(model, tp, size, config.train.compile != "off") + lowrank


def _activations(config: RunConfig, vocab_size: int, tp: int, dp: int) -> list[Item]:
    """Estimate what a micro-batch keeps."""
    model, train, size = config.model, config.train, compute_bytes(config)
    tokens = train.micro_batch_size * train.seq_len
    logits = _logits(config, logits_size(model, vocab_size, tp), tokens)
    layer = tokens * layer_activation_bytes(config, tp, accumulation_steps(config, dp))
    head_trains = 0 if config.freezes_dense else size
    kept = tokens * ((size + head_trains) * model.hidden_size + FP32)  # the last norm's input, and the head's
    how = "with" if train.activation_checkpointing else "without"
    if train.activation_checkpointing:  # the layers' inputs, and one layer computed again once the logits are gone
        kept += tokens * model.num_layers * size * model.hidden_size + max(0, layer - logits)
    else:
        kept += model.num_layers * layer
    return [
        Item(f"activations {how} checkpointing (estimate)", kept, "backward"),
        Item("a chunk of logits, the head's gradient (estimate)", logits, "backward"),
    ]


def _logits(config: RunConfig, columns: int, tokens: int) -> int:
    """Return the bytes of the loss: the gradients of the head and its input, and a chunk of logits.

    The gradients are complete as the backward pass begins. Those of several chunks are summed in fp32. A chunk's logits
    are there in fp32 and in the precision of compute, or there with a chunk's gradient of the head.
    """
    size, heads = compute_bytes(config), config.method.facts.heads_here
    width, trains = config.model.hidden_size, not config.freezes_dense
    of_one = tokens // heads
    chunk = min(of_one, chunk_tokens(columns)) * columns
    chunks = of_one * columns > chunk
    weight = columns * width * trains
    sums = weight * (heads * FP32 if chunks else (heads - 1) * size)
    return size * tokens * width + sums + max(chunk * (FP32 + size * (size != FP32)), (chunk + weight) * size)
