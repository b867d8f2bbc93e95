"""How long a step takes on a machine that is not here: a model of its time, from the configuration alone.

    compute         FLOPs of the method / (peak x efficiency), and what passes through memory beside the products:
                    W read and W + sBA written as often as it is formed, the optimizer's state
    communication   each flow of `planning/traffic.py` as a ring over the ranks of its axis: within a node by the links
                    between its GPUs, else by what joins nodes, which all rings that leave a node share
Ranks lie lte x dp x tp, tp innermost, nodes one after the other. DeepSpeed's stages reduce after the backward pass
unless `overlap_comm` is set; then stage 1 hides as much as the last micro-batch's backward pass lasts, stage 2 as all
last. The bank's rows travel while the next step computes. Not modelled: latency, stragglers, what kernels lose at small
sizes, what goes to host memory and back (bank, LTE's origins), decompositions, quantising, data, evaluation. The
efficiency is an assumption; the MFU that a run reports shows what it is on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.run import RunConfig, accumulation_steps, compute_bytes
from megatron_switchlora.distributed.mesh import AXES, COMPOSITE_GROUPS, ranks_of_host
from megatron_switchlora.lowrank.merged import choose_form
from megatron_switchlora.lowrank.nf4 import Nf4Matrix
from megatron_switchlora.methods.base import Flow
from megatron_switchlora.model.protocol import Projection, family_of, logits_size, projections
from megatron_switchlora.planning.counts import rank_tensors
from megatron_switchlora.planning.memory import base_ranks, is_merged
from megatron_switchlora.planning.traffic import axis_size, flows, on_the_wire
from megatron_switchlora.startup.device import BF16_PEAK


@dataclass(frozen=True)
class Gpu:
    """A GPU's dense FLOPs per second in bf16 and fp32 (no TF32), memory and rates.

    `bandwidth` is that of its memory, `peers` that of its links to the GPUs of its node, one way, in bytes per second.
    """

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    peers: float

    def peak(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


# Vendors' data sheets: dense bf16 and fp32, memory, its bandwidth, NVLink (or PCIe) one way.
GPUS = {
    "a100-40gb": Gpu(BF16_PEAK["A100"], 19.5e12, 40e9, 1.555e12, 300e9),
    "a100": Gpu(BF16_PEAK["A100"], 19.5e12, 80e9, 2.039e12, 300e9),
    "l40s": Gpu(BF16_PEAK["L40S"], 91.6e12, 48e9, 0.864e12, 32e9),
    "h100": Gpu(BF16_PEAK["H100"], 67e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu(BF16_PEAK["H200"], 67e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu(2250e12, 80e12, 180e9, 7.7e12, 900e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9, 1.008e12, 32e9),
}


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    `link` is what a node sends to others per second, one way, over all its adapters. `efficiency` is the share of the
    peak that matrix products reach.
    """

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
    """Seconds of a step.

    `exposed` is what communication adds, by kind of traffic, and `hidden` what computation covers. `by_link` are the
    bytes per step on a GPU's links within the node, and of a node on what joins nodes.
    """

    compute: float
    exposed: dict[str, float]
    hidden: float
    by_link: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())


def flops_per_token(config: RunConfig, vocab_size: int, tp: int, micro_batches: int, ranks: int = 1) -> float:
    """Return the FLOPs of all ranks per token, forward and backward, as the method computes.

    A matrix [m, n] takes 6 m n in full-rank training; 4 m n + 4 r (m + n) and its share of forming W + sBA in the
    merged form; 4 m n + 6 r (m + n) in the split form (12 with the factors of the last merge). Attention and the output
    layer come on top, and with checkpointing another forward pass. `ranks` share the rows of W,
    and each forms its own.
    """
    model, train = config.model, config.train
    again = train.activation_checkpointing
    layer = projections(model)
    total = sum(
        tp * matrix_flops(config, p, tp, micro_batches, again, again and number == len(layer) - 1, ranks)
        for number, p in enumerate(layer)
    )
    attention = (4 if again else 3) * family_of(model).mixing_flops(model, train.seq_len)
    head = 4 if config.freezes_dense else 6
    return model.num_layers * (total + attention) + head * model.hidden_size * tp * logits_size(model, vocab_size, tp)


def matrix_flops(
    config: RunConfig, projection: Projection, tp: int, micro_batches: int, again: bool, last: bool, ranks: int = 1
) -> float:
    """Return those of one linear on a rank. A layer that is computed `again` stops before its last product.

    `ranks` share the rows of W.
    """
    method, tokens = config.method, config.train.micro_batch_size * config.train.seq_len
    m, n = projection.shard(tp)
    rank = method.adapter_rank
    if not method.facts.adapts:
        return (6 + 2 * again - 2 * last) * m * n
    if method.facts.shares_base:
        factors = 2 if method.facts.resetless else 1
        return (4 + 2 * again - 2 * last) * m * n + factors * (6 + 2 * again) * rank * (m + n)
    if is_merged(config, projection, tp, micro_batches):
        formed = _times_formed(config, micro_batches) / ranks
        return (4 + 2 * again) * m * n + 4 * rank * (m + n) + formed * 2 * m * n * rank / tokens
    return (4 + 2 * again) * m * n + (6 + 2 * again) * rank * (m + n) - 2 * last * rank * m


def _times_formed(config: RunConfig, micro_batches: int) -> float:
    """Return how often a micro-batch forms the W + sBA of a merged layer."""
    again = config.train.activation_checkpointing
    return {"accumulation": 1 / micro_batches, "recompute": 2 + again}.get(choose_form(config).cache, 1 + again)


def memory_traffic(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> float:
    """Return the bytes that pass through a rank's memory per step beside matrix products.

    They are the fp32 W read and W + sBA written per micro-batch, and the optimizer's state: gradient, master and two
    moments read, three of them written.
    """
    method = config.method
    share = 1 if zero.stage == 0 else mesh["dp"]
    state = 28 * rank_tensors(config, vocab_size, mesh["tp"], mesh["dp"]).trained.total() / share
    if not method.facts.adapts:
        return state
    micro_batches = accumulation_steps(config, mesh["dp"])
    again = config.train.activation_checkpointing
    total = 0.0
    for p in projections(config.model):
        m, n = p.shard(mesh["tp"])
        if is_merged(config, p, mesh["tp"], micro_batches):
            ranks = base_ranks(config, mesh["dp"], axis_size(mesh, "node"))
            total += _times_formed(config, micro_batches) * m * n * (4 / ranks + compute_bytes(config))
        elif method.facts.quantised:
            in_4_bits = Nf4Matrix(torch.empty(m, n, device="meta"), kernels=False).nbytes
            total += (2 + again) * (in_4_bits + m * n * compute_bytes(config))
        elif compute_bytes(config) != 4:  # W in bf16
            total += (1 + again) * m * n * (4 + compute_bytes(config))
    return state + micro_batches * config.model.num_layers * total


def step_time(
    config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero, machine: Machine, overlap: bool
) -> StepTime:
    """Return the time of a step on a machine whose ranks the mesh fills.

    With `overlap`, gradients are reduced during the backward pass.
    """
    train, mesh = config.train, {**mesh, "node": ranks_of_host(mesh["dp"], mesh["tp"], machine.gpus)}
    micro_batches, ranks = accumulation_steps(config, mesh["dp"]), base_ranks(config, mesh["dp"], mesh["node"])
    flops = flops_per_token(config, vocab_size, mesh["tp"], micro_batches, ranks)
    products = flops * train.global_batch_size * train.seq_len / machine.world
    compute = products / (machine.gpu.peak(train.precision) * machine.efficiency)
    backward = compute * (3 / 4 if train.activation_checkpointing else 2 / 3)
    if zero.stage < 2:  # only the last micro-batch's gradients are reduced while it is under way
        backward /= micro_batches
    compute += memory_traffic(config, vocab_size, mesh, zero) / machine.gpu.bandwidth
    exposed: dict[str, float] = {}
    by_link = {"within nodes": 0.0, "between nodes": 0.0}
    hidden = 0.0
    for flow in flows(config, vocab_size, mesh, zero):
        links, seconds = flow_time(flow, mesh, machine)
        for link, count in links.items():
            by_link[link] += count
        behind = {"bank": compute, "gradients": backward if overlap else 0.0}.get(flow.kind, 0.0)
        covered = min(seconds, max(0.0, behind - hidden))
        hidden += covered
        exposed[flow.kind] = exposed.get(flow.kind, 0.0) + seconds - covered
    return StepTime(compute, exposed, hidden, by_link)


def flow_time(flow: Flow, mesh: dict[str, int], machine: Machine) -> tuple[dict[str, float], float]:
    """Return the bytes by link and the seconds of one flow.

    The links are a GPU's in its node, and a node's to others. A ring over both is as fast as the slower one.
    """
    sent = on_the_wire(flow.op, flow.bytes, axis_size(mesh, flow.axis))
    stays, leaves = rings_of_a_node(flow.axis, mesh, machine.gpus)
    links = {"within nodes": sent if stays else 0.0, "between nodes": leaves * sent}
    return links, max(links["within nodes"] / machine.gpu.peers, links["between nodes"] / machine.link)


def rings_of_a_node(axis: str, mesh: dict[str, int], gpus: int) -> tuple[bool, int]:
    """Return whether any ring goes from GPU to GPU of a node, and how many leave the node that most leave.

    The rings run along an axis or composite group, each through its ranks in order.
    """
    if axis == "node":
        return axis_size(mesh, "node") > 1, 0
    grid = np.arange(mesh["lte"] * mesh["dp"] * mesh["tp"]).reshape([mesh[name] for name in AXES])
    along = [AXES.index(name) for name in COMPOSITE_GROUPS.get(axis, (axis,))]
    rings = np.moveaxis(grid, along, range(-len(along), 0)).reshape(-1, axis_size(mesh, axis))
    following = np.roll(rings, -1, axis=1)
    nodes, leaves = rings // gpus, rings // gpus != following // gpus
    return bool(np.any(~leaves & (rings != following))), int(np.bincount(nodes[leaves], minlength=1).max())
