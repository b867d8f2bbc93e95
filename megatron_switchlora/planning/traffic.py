"""What a rank hands to collectives in a step, by kind, from the configuration alone; and what of it a wire carries.

    gradients        of each group of parameters over dp, once per step (with ZeRO 2 once per micro-batch)
    parameters       ZeRO's all-gather of what the ranks have updated
    base             rows of W + sBA over the ranks that share W's rows, once per step
    bank             rows of the candidates on their way to the ranks that switch them in, on average over a run
    tensor parallel  activations and gradients of activations over tp, with those of the replicated factors
    merges           of LTE heads, on average per step: factors or products, and dense tensors
A `Flow` counts what a rank gives to its collectives, as `distributed/recorder.py` records it. A ring sends of an
all-reduce 2 (N - 1) / N of what a rank gave, of an all-gather N - 1 times: `on_the_wire`. Left out are scalars
(losses, norms, votes), ZeRO's padding to equal parts, and evaluations.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.run import RunConfig, accumulation_steps, compute_bytes
from megatron_switchlora.distributed.mesh import COMPOSITE_GROUPS, ranks_of_host
from megatron_switchlora.methods.base import Flow
from megatron_switchlora.model.protocol import family_of
from megatron_switchlora.planning.counts import FP32, HOST, PARTS, RankTensors, rank_tensors


def on_the_wire(op: str, given: float, ranks: int) -> float:
    """Return the bytes that a rank sends in a ring of this many ranks for `given` bytes."""
    return given * {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1}[op]


def flows(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """List what a rank of the mesh {"lte", "dp", "tp"} gives per step of this run.

    The mesh may also have "node", the data ranks of a host; by default those that fit on one of 8 ranks.
    """
    tensors = rank_tensors(config, vocab_size, mesh["tp"], mesh["dp"], axis_size(mesh, "node"))
    given = [
        *_gradients(config, tensors, mesh, zero),
        *_parameters(config, tensors, mesh, zero),
        *_by_method(tensors, mesh, zero),
        *_tensor_parallel(config, tensors, mesh),
    ]
    order = ("gradients", "parameters", "base", "bank", "tensor parallel")  # then what else a method gives
    given.sort(key=lambda flow: order.index(flow.kind) if flow.kind in order else len(order))
    return [flow for flow in given if flow.bytes]


def _gradients(config: RunConfig, tensors: RankTensors, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """List gradients: stage 2 reduces each micro-batch, others once per step; fp32 sums travel as bf16."""
    if mesh["dp"] == 1:
        return []
    each = compute_bytes(config) * (accumulation_steps(config, mesh["dp"]) if zero.stage == 2 else 1)
    parts = [part for part in PARTS if tensors.trained[part]]
    return [Flow("gradients", part, "dp", "all_reduce", each * tensors.trained[part]) for part in parts]


def _parameters(config: RunConfig, tensors: RankTensors, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    if zero.stage == 0 or mesh["dp"] == 1:
        return []
    here = tensors.trained.total() / mesh["dp"]
    return [Flow("parameters", "", "dp", "all_gather", here * compute_bytes(config))]


def _by_method(tensors: RankTensors, mesh: dict[str, int], zero: Zero) -> list[Flow]:
    """List what the method itself gives, on average per step."""
    partitioned = zero.stage > 0 or zero.fp32_accumulation
    return [
        replace(flow, bytes=count / every)
        for (of_partitioned, flow, every), count in tensors.flow_bytes.items()
        if of_partitioned == partitioned and axis_size(mesh, flow.axis) > 1
    ]


def axis_size(mesh: dict[str, int], axis: str) -> int:
    """Return the number of ranks of an axis of the mesh, of a composite group, or of the data ranks of a host."""
    if axis == "node" and axis not in mesh:
        return ranks_of_host(mesh["dp"], mesh["tp"], HOST)
    return math.prod(mesh[name] for name in COMPOSITE_GROUPS.get(axis, (axis,)))


def _tensor_parallel(config: RunConfig, tensors: RankTensors, mesh: dict[str, int]) -> list[Flow]:
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
    given = (vectors * tokens * config.model.hidden_size + tensors.totals["partial"]) * size + 3 * tokens * FP32
    return [Flow("tensor parallel", "", "tp", "all_reduce", accumulation_steps(config, mesh["dp"]) * given)]


def gradient_bytes(config: RunConfig, vocab_size: int, tp: int, dp: int, zero: Zero) -> tuple[int, int]:
    """Return the bytes of gradients that a rank gives per step: with this method, and with full-rank training."""
    mesh = {"lte": config.parallel.lte_heads, "dp": dp, "tp": tp}
    given = round(sum(flow.bytes for flow in _gradients(config, rank_tensors(config, vocab_size, tp), mesh, zero)))
    return given, round(full_rank_bytes(given, config, vocab_size, tp))


def merge_bytes(config: RunConfig, vocab_size: int, tp: int) -> int:
    """Return the bytes that a rank gives to collectives across LTE heads in one merge."""
    if config.parallel.lte_heads == 1:
        return 0
    counts = rank_tensors(config, vocab_size, tp).flow_bytes.items()
    return sum(count for (partitioned, flow, _), count in counts if flow.axis == "lte" and not partitioned)


def full_rank_bytes(given: float, config: RunConfig, vocab_size: int, tp: int) -> float:
    """Return the gradient bytes of full-rank training where this method's are `given`.

    It reduces the same way, over a rank's part of all parameters.
    """
    tensors = rank_tensors(config, vocab_size, tp)
    return given * tensors.totals["model"] / tensors.trained.total()


def describe_saving(given: float, full: float) -> str:
    """Describe how `given` compares with full-rank training's bytes."""
    return f"{1 - given / full:.1%} saved" if given <= full else f"{given / full - 1:.1%} more"
