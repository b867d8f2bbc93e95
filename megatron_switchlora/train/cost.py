"""How long a step takes on a machine that is not here: a model of its time, from the configuration alone.

    compute         FLOPs of the method / (peak x efficiency), and what passes through memory beside the products:
                    W read and W + sBA written for each micro-batch, the optimizer's state
    communication   each flow of `train/traffic.py` as a ring over the ranks of its axis: within a node by the links
                    between its GPUs, else by what joins nodes, which all rings that leave a node share
Ranks lie lte x dp x tp, tp innermost, nodes one after the other. DeepSpeed's stages reduce after the backward pass
unless `overlap_comm` is set; then as much of the gradients as backward lasts is hidden. The bank's rows travel while
the next step computes. Not modelled: latency, stragglers, what kernels lose at small sizes, data, evaluation. The
efficiency is an assumption; what a run reports as MFU says what it is on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_switchlora.config import RunConfig, accumulation_steps
from megatron_switchlora.lowrank.merged import uses_merged
from megatron_switchlora.model.counts import Projection, compute_bytes, count_here, count_shard, projections
from megatron_switchlora.train.ds_config import Zero
from megatron_switchlora.train.traffic import Flow, axis_size, flows, on_the_wire


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOPs a second, bytes of memory, its bytes a second, and those of its links to the GPUs of its node,
    one way."""

    flops: float
    memory: float
    bandwidth: float
    peers: float


# Vendors' data sheets: dense bf16, memory, its bandwidth, NVLink (or PCIe) one way.
GPUS = {
    "a100-40gb": Gpu(312e12, 40e9, 1.555e12, 300e9),
    "a100": Gpu(312e12, 80e9, 2.039e12, 300e9),
    "l40s": Gpu(362e12, 48e9, 0.864e12, 32e9),
    "h100": Gpu(989e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu(989e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu(2250e12, 180e9, 7.7e12, 900e9),
    "rtx4090": Gpu(165e12, 24e9, 1.008e12, 32e9),
}


@dataclass(frozen=True)
class Machine:
    """`link` is what a node sends to others a second, one way, over all its adapters; `efficiency` the share of the
    peak that matrix products reach."""

    gpu: Gpu
    nodes: int
    gpus: int
    link: float
    efficiency: float = 0.45

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. `exposed` by kind of traffic is what communication adds, `hidden` what goes on meanwhile;
    `by_link` are the bytes of a step on a GPU's links within the node, and of a node on what joins nodes."""

    compute: float
    exposed: dict[str, float]
    hidden: float
    by_link: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


def flops_per_token(config: RunConfig, vocab_size: int, tp: int, micro_batches: int) -> float:
    """FLOPs of all ranks for a token, forward and backward, as the method computes: of a matrix [m, n] 6 m n in
    full-rank training; 4 m n + 4 r (m + n) and its share of forming W + sBA, or 4 m n + 6 r (m + n) in the split form
    (12 with the factors of the last merge); attention and head; a forward pass more with checkpointing."""
    model, train = config.model, config.train
    again = train.activation_checkpointing
    total = sum(
        tp * _matrix_flops(config, p, tp, micro_batches, again, again and number == 6)
        for number, p in enumerate(projections(model))
    )
    attention = (8 if again else 6) * model.num_heads * model.head_dim * train.seq_len
    return model.num_layers * (total + attention) + 6 * model.hidden_size * vocab_size


def _matrix_flops(
    config: RunConfig, projection: Projection, tp: int, micro_batches: int, again: bool, last: bool
) -> float:
    """Of one of the seven, on a rank. A layer that is computed `again` stops before its last product."""
    method, tokens = config.method, config.train.micro_batch_size * config.train.seq_len
    m, n = projection.shard(tp)
    rank = method.adapter_rank
    if not method.adapts:
        return (6 + 2 * again - 2 * last) * m * n
    if method.shares_base:
        factors = 2 if method.resetless else 1
        return (4 + 2 * again - 2 * last) * m * n + factors * (6 + 2 * again) * rank * (m + n)
    if uses_merged(method, tokens, (m, n), micro_batches, trains=True):
        formed = {"accumulation": 1 / micro_batches, "recompute": 2 + again}.get(method.merged_cache, 1 + again)
        return (4 + 2 * again) * m * n + 4 * rank * (m + n) + formed * 2 * m * n * rank / tokens
    return (4 + 2 * again) * m * n + (6 + 2 * again) * rank * (m + n) - 2 * last * rank * m


def memory_traffic(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> float:
    """Bytes that pass through a rank's memory in a step beside matrix products: the fp32 W read and W + sBA written of
    each micro-batch, and the optimizer's state: gradient, master and two moments read, three of them written."""
    method, counts = config.method, count_shard(config.model, config.method, vocab_size, mesh["tp"])
    share = 1 if zero.stage == 0 else mesh["dp"]
    state = 28 * count_here(config, vocab_size, mesh["tp"]).trainable / share
    if not method.adapts:
        return state
    times = 1 if method.merged_cache == "accumulation" else accumulation_steps(config, mesh["dp"])
    return state + times * counts.matrices * (4 + compute_bytes(config))


def step_time(
    config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero, machine: Machine, overlap: bool
) -> StepTime:
    """The time of a step of this run on a machine whose ranks the mesh fills. `overlap`: gradients are reduced while
    the backward pass goes on."""
    train = config.train
    flops = flops_per_token(config, vocab_size, mesh["tp"], accumulation_steps(config, mesh["dp"]))
    products = flops * train.global_batch_size * train.seq_len / machine.world
    compute = products / (machine.gpu.flops * machine.efficiency)
    backward = compute * 2 / 3
    compute += memory_traffic(config, vocab_size, mesh, zero) / machine.gpu.bandwidth
    exposed: dict[str, float] = {}
    by_link = {"within nodes": 0.0, "between nodes": 0.0}
    hidden = 0.0
    for flow in flows(config, vocab_size, mesh, zero):
        link, count, seconds = flow_time(flow, mesh, machine)
        by_link[link] += count
        behind = {"bank": compute, "gradients": backward if overlap else 0.0}.get(flow.kind, 0.0)
        covered = min(seconds, max(0.0, behind - hidden))
        hidden += covered
        exposed[flow.kind] = exposed.get(flow.kind, 0.0) + seconds - covered
    return StepTime(compute, exposed, hidden, by_link)


def flow_time(flow: Flow, mesh: dict[str, int], machine: Machine) -> tuple[str, float, float]:
    """(link, bytes on it, seconds) of one flow: of a GPU's links in its node, or of a node's to others."""
    size = axis_size(mesh, flow.axis)
    sent = on_the_wire(flow.op, flow.bytes, size)
    stride = {"tp": 1, "dp": mesh["tp"], "head": 1, "lte": mesh["dp"] * mesh["tp"], "data": mesh["tp"]}[flow.axis]
    inside = max(1, min(size, machine.gpus // stride))  # of a ring's ranks, those on one node
    if inside == size:
        return "within nodes", sent, sent / machine.gpu.peers
    leaving = machine.gpus / inside * sent
    return "between nodes", leaving, leaving / machine.link
