"""What a rank's memory holds, by kind, from the configuration alone.

The peak is what is always there plus the larger of two phases: forward and backward, where activations
live, and the optimizer's step, where fp32 gradients do. Tensors are counted with their tensor-parallel
padding; ZeRO's alignment, tensors that straddle two partitions, temporaries of one operation, libraries
and the allocator's gaps are left out. Gradients, masters and buckets are those of deepspeed 0.19.8's
classes (see `optim/layout.py`). Activations are a formula, of which the model's family knows its layers' part.
All sizes are bytes. tp and dp are the mesh's; a "token" is one of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.parallel import shard_size
from megatron_switchlora.config.run import RunConfig, accumulation_steps, compute_bytes
from megatron_switchlora.lowrank.merged import Form, uses_merged
from megatron_switchlora.model.protocol import family_of
from megatron_switchlora.planning.counts import (
    ParameterCounts,
    Projection,
    count_here,
    count_run,
    count_shard,
    decoder_shapes,
    dense_tensors,
    projections,
)

FP32 = 4
FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed copies at once where ZeRO does not reduce: stage 0, fp32 sums

Phase = Literal["always", "backward", "step", "host"]


@dataclass(frozen=True)
class Item:
    """Bytes of one kind and when they are there."""

    kind: str
    bytes: int
    phase: Phase


def peak_bytes(items: list[Item]) -> int:
    """The most a rank's device holds at once."""
    return phase_bytes(items, "always") + max(phase_bytes(items, "backward"), phase_bytes(items, "step"))


def phase_bytes(items: list[Item], phase: Phase) -> int:
    return sum(item.bytes for item in items if item.phase == phase)


def memory_items(config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero) -> list[Item]:
    """Everything a rank holds, largest first within a phase; kinds that a run does not have are left out."""
    items = [
        *_weights(config, vocab_size, tp, dp),
        *_bank(config, tp, dp),
        *_lora_ga(config, vocab_size, tp),
        *_optimizer(config, vocab_size, tp, dp, zero),
        *_gradients(config, vocab_size, tp, dp, zero),
        *_activations(config, vocab_size, tp, dp),
    ]
    order = ("always", "backward", "step", "host")
    return sorted((item for item in items if item.bytes), key=lambda item: (order.index(item.phase), -item.bytes))


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of all tensors of a checkpoint, whatever the mesh: master, two moments and step counters of what trains,
    the frozen W, the bank and the schedule's integers, A and B of the start where they are kept; of GaLore's
    matrices projected moments and projectors. Headers, tokenizer and doubled counters are left out."""
    counts, method, layers = count_run(config, vocab_size), config.method, config.model
    shapes = [(p.out_features, p.in_features) for p in projections(config.model)] * layers.num_layers
    dense = 0 if counts.dense_frozen else dense_tensors(layers, vocab_size, tp=1).tensors  # with a counter each
    counters = dense + len(shapes) * (2 * method.adapter_rank if method.facts.adapts else 1)
    moments, projectors = _moments(config, counts)
    total = config.heads * FP32 * (counts.trainable + 2 * moments + projectors + counters)
    total += _stored_bases(config, shapes, counts) + counts.frozen_dense * compute_bytes(config)
    if method.facts.keeps_initial:
        total += FP32 * counts.adapters
    if method.facts.switches:
        switching = [(m, n) for m, n in shapes if min(m, n) > method.rank]
        total += config.heads * sum(min(m, n) * (m + n) for m, n in switching) * compute_bytes(config)
        # pointer, slots and freezes of either side
        total += config.heads * len(switching) * 2 * (1 + 2 * method.rank) * 8
    return total


def _stored_bases(config: RunConfig, shapes: list[tuple[int, int]], counts: ParameterCounts) -> int:
    """Bytes of every frozen W; of LTE heads also what their merges need: each head's own W, or the shared one with the
    factors of the last merge, and the origin."""
    method = config.method
    if not method.facts.merges:
        return FP32 * counts.frozen
    total = FP32 * counts.frozen * method.facts.keeps_origins
    if not method.facts.shares_base:
        return total + FP32 * counts.frozen * (config.heads if method.facts.resetless else 1)
    total += config.heads * counts.adapters * compute_bytes(config) * method.facts.resetless
    return total + (sum(nf4_bytes(m, n) for m, n in shapes) if method.facts.quantised else FP32 * counts.frozen)


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a matrix in 4 bits: rows padded to blocks of 64, each with an fp32 scale."""
    return out_features * -(-in_features // 64) * (32 + FP32)


def _weights(config: RunConfig, vocab_size: int, tp: int, dp: int) -> list[Item]:
    counts, method, size = count_here(config, vocab_size, tp), config.method, compute_bytes(config)
    shapes = [p.shard(tp) for p in projections(config.model)]
    in_4_bits = config.model.num_layers * sum(nf4_bytes(m, n) for m, n in shapes)
    origins = shard_size(counts.frozen, dp) * method.facts.keeps_origins
    return [
        Item(f"trainable parameters, {config.train.precision}", counts.trainable * size, "always"),
        Item(f"frozen embedding, head and norms, {config.train.precision}", counts.frozen_dense * size, "always"),
        Item("frozen W, fp32", counts.frozen * FP32 * (not method.facts.quantised), "always"),
        Item("frozen W, 4 bit", in_4_bits * (method.facts.quantised), "always"),
        Item(
            "factors of the last merge",
            counts.adapters * compute_bytes(config) * (method.facts.resetless and method.facts.shares_base),
            "always",
        ),
        Item("origins of the LTE heads, in host memory", origins * FP32, "host"),
        *_compute_copies(config, tp, accumulation_steps(config, dp)),
    ]


def is_merged(config: RunConfig, projection: Projection, tp: int, micro_batches: int) -> bool:
    """Whether a layer computes with W + sBA on a rank's shard."""
    if config.method.facts.shares_base:
        return False
    tokens = config.train.micro_batch_size * config.train.seq_len
    form = Form(config.method.compute, config.method.merged_cache)
    return uses_merged(form, tokens, projection.shard(tp), micro_batches, trains=True)


def _compute_copies(config: RunConfig, tp: int, micro_batches: int) -> list[Item]:
    """W + sBA of merged layers, and W in bf16 for split ones (in fp32 they use W itself; from 4 bits it is formed again
    for backward): kept for backward.

    Checkpointing keeps one decoder layer's at a time, unless the cache lasts over the micro-batches.
    """
    if not config.method.facts.adapts:
        return []
    method, layers, size = config.method, config.model.num_layers, compute_bytes(config)
    at_once = 1 if config.train.activation_checkpointing else layers
    shapes = [(p.shard(tp), is_merged(config, p, tp, micro_batches)) for p in projections(config.model)]
    merged = [size * m * n for (m, n), is_merged in shapes if is_merged]
    casts = size != FP32 and not method.facts.quantised
    split = [size * m * n for (m, n), is_merged in shapes if not is_merged and casts]
    held = {
        "micro_batch": at_once * sum(merged),
        "accumulation": layers * sum(merged),
        "recompute": max(merged, default=0),
    }[method.merged_cache]
    until: Phase = "always" if method.merged_cache == "accumulation" else "backward"
    return [
        Item(f"W + sBA, {config.train.precision}", held, until),
        Item("W for the split form, bf16", at_once * sum(split), "backward"),
        Item("factors of the heads side by side", at_once * _stacked_factors(config, tp), "backward"),
    ]


def _stacked_factors(config: RunConfig, tp: int) -> int:
    """Bytes of a decoder layer's factors of several heads in one tensor each, with those of the last merge."""
    method = config.method
    if not method.facts.shares_base or (method.facts.heads_here == 1 and not method.facts.resetless):
        return 0
    times = method.facts.heads_here * (2 if method.facts.resetless else 1)
    shapes = [p.shard(tp) for p in projections(config.model)]
    return times * method.rank * sum(m + n for m, n in shapes) * compute_bytes(config)


def _bank(config: RunConfig, tp: int, dp: int) -> list[Item]:
    """C = min(out, in) candidates a side where that is more than the rank. The split factor's are [C, length / tp],
    the replicated factor's are spread by candidate over tp; `bank_spread dp` spreads both over dp too."""
    method = config.method
    if not method.facts.switches:
        return []
    spread = dp if method.switch.bank_spread == "dp" else 1
    values = 0
    for p in projections(config.model):
        candidates = min(p.out_features, p.in_features)
        if candidates > method.rank:
            split, replicated = (p.in_features, p.out_features) if p.row_parallel else (p.out_features, p.in_features)
            values += shard_size(candidates, spread) * shard_size(split, tp)
            values += shard_size(candidates, spread * tp) * replicated
    held = values * config.model.num_layers * compute_bytes(config)
    if method.switch.bank_device == "host":
        return [Item("candidate bank, in host memory", held, "host")]
    return [Item(f"candidate bank, {config.train.precision}", held, "always")]


def _lora_ga(config: RunConfig, vocab_size: int, tp: int) -> list[Item]:
    """In host memory: the sum of the gradients of all matrices before the first step, and A and B of the start."""
    method, counts = config.method, count_shard(config.model, config.method, vocab_size, tp)
    summed = method.init == "lora_ga" and method.ga.vectors == "gradient"
    return [
        Item("LoRA-GA's gradients before step 1, in host memory", counts.matrices * FP32 * summed, "host"),
        Item("LoRA-GA's A_0 and B_0, in host memory", counts.adapters * FP32 * method.facts.keeps_initial, "host"),
    ]


def step_counters(config: RunConfig) -> int:
    """Adam step counters without ZeRO: one a LoRA vector, one a dense tensor."""
    model = config.model
    tensors = 0 if config.freezes_dense else dense_tensors(model, vocab_size=1, tp=1).tensors
    per_projection = 2 * config.method.adapter_rank if config.method.facts.adapts else 1
    return config.method.facts.heads_here * (tensors + len(projections(model)) * model.num_layers * per_projection)


def _moments(config: RunConfig, counts: ParameterCounts) -> tuple[int, int]:
    """Elements of one Adam moment, and of GaLore's projectors: of a matrix (m, n) it keeps moments of max(m, n) x r
    and a projector of min(m, n) x r."""
    rank = config.method.facts.projected_rank
    if not rank:
        return counts.trainable, 0
    ranks, shapes = config.model.num_layers * rank, decoder_shapes(config.model)
    projected = ranks * sum(max(shape) for shape in shapes)
    return counts.trainable - counts.matrices + projected, ranks * sum(min(shape) for shape in shapes)


def _optimizer(config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero) -> list[Item]:
    counts = count_here(config, vocab_size, tp)
    count, (moments, projectors) = counts.trainable, _moments(config, counts)
    share = 1 if zero.stage == 0 else dp
    no_copy = zero.stage == 0 and config.train.precision == "fp32"
    return [
        Item("fp32 masters", 0 if no_copy else shard_size(count, share) * FP32, "always"),
        Item("Adam moments, fp32", 2 * shard_size(moments, share) * FP32, "always"),
        Item("GaLore projectors, fp32", projectors * FP32, "always"),
        Item("Adam step counters", shard_size(step_counters(config), share) * FP32, "always"),
    ]


def _gradients(config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero) -> list[Item]:
    """Gradients, the buckets they are reduced in, and their fp32 form for the optimizer's step."""
    counts = count_here(config, vocab_size, tp)
    count, size, precision = counts.trainable, compute_bytes(config), config.train.precision
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
    # the optimizer takes one group at a time: the decoder's matrices or adapters, then the dense tensors
    dense = 0 if counts.dense_frozen else counts.embedding + counts.head
    group = max(_first_group(config, counts, tp), dense)
    flat = shard_size(group, dp) * FP32
    return [
        Item(name, in_backward, "backward"),
        Item("buckets to reduce", zero.bucket * size, "backward"),
        Item(name, part, "step"),
        Item(in_step, flat, "step"),
    ]


def _first_group(config: RunConfig, counts: ParameterCounts, tp: int) -> int:
    """Elements of the decoder's matrices or adapters; of the larger of A and B where LoRA+ parts them."""
    if config.optim.lora_plus_ratio == 1:
        return counts.matrices if counts.full_rank else counts.adapters
    shapes = [p.shard(tp) for p in projections(config.model)]
    sides = (sum(sizes) for sizes in zip(*shapes, strict=True))
    return config.method.facts.heads_here * config.model.num_layers * config.method.adapter_rank * max(sides)


def layer_activation_bytes(config: RunConfig, tp: int, micro_batches: int = 1) -> int:
    """What autograd keeps of one decoder layer for the backward pass, a token."""
    model, size = config.model, compute_bytes(config)
    lowrank = 0
    if config.method.facts.adapts:
        split = [p for p in projections(model) if not is_merged(config, p, tp, micro_batches)]
        times = 2 if config.method.facts.shares_base and config.method.facts.resetless else 1
        lowrank = size * config.method.adapter_rank * times * len(split)
    return family_of(model).kept_bytes(model, tp, size, not config.freezes_dense) + lowrank


def _activations(config: RunConfig, vocab_size: int, tp: int, dp: int) -> list[Item]:
    """Estimates for one micro-batch. Of the logits, three fp32 tensors live at once as the backward pass begins: the
    log-probabilities and the gradient before and after them."""
    model, train, size = config.model, config.train, compute_bytes(config)
    tokens = train.micro_batch_size * train.seq_len
    logits = 3 * FP32 * tokens * shard_size(vocab_size, tp)
    layer = tokens * layer_activation_bytes(config, tp, accumulation_steps(config, dp))
    weighted = 0 if config.freezes_dense else size
    kept = tokens * ((FP32 + 2 * weighted) * model.hidden_size + FP32)  # the last norm and the head's input
    how = "with" if train.activation_checkpointing else "without"
    if train.activation_checkpointing:  # the layers' inputs, and one layer computed again once the logits are gone
        kept += tokens * model.num_layers * size * model.hidden_size + max(0, layer - logits)
    else:
        kept += model.num_layers * layer
    return [
        Item(f"activations {how} checkpointing (estimate)", kept, "backward"),
        Item("logits and their gradient, fp32 (estimate)", logits, "backward"),
    ]
