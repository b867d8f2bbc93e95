"""Read what a rank holds and gives off the modules: the model and its method, built on the meta device.

Layers are equal, so that models of one and two layers show what any number of them hold. A total counts every
parameter once and no padding. What one tensor-parallel rank holds is its shard of each split tensor, with the padding
of `model.pad_multiple`, and all of each replicated one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Optional

import torch
from torch import nn

from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import AXES, Mesh, ranks_of_host
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.base import Flow, Method
from megatron_switchlora.model.protocol import ByText, build_model, family_of, projections

FP32 = 4
HOST = 8  # ranks of a host, where a plan does not say
PARTS = ("adapters", "matrices", "embedding", "head", "norms")


class RankTensors(NamedTuple):
    """What a rank holds and gives, in elements where bytes are not named. All LTE heads of its process count."""

    trained: Counter[str]
    """Parameters that train, by part of the model."""
    of_one_head: Counter[str]
    """Those of them that belong to one head."""
    fixed: Counter[str]
    """Frozen parameters, and the matrices beside adapters."""
    groups: Counter[str]
    """Parameters by group of the optimizer."""
    state: Counter[tuple[str, str]]
    """The optimizer's state, by kind and name of its tensors."""
    kept_bytes: Counter[str]
    """What the method keeps beside parameters and optimizer state, by kind."""
    flow_bytes: Counter[tuple[bool, Flow, float]]
    """What the method itself gives to collectives; with and without partitioned masters, see `Method.flows`."""
    totals: Counter[str]
    """model: parameters of the model itself. partial: those of whose gradient each tensor-parallel rank computes a
    part. checkpoint: bytes of a checkpoint, all heads included, if this rank holds whole tensors without padding."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one LTE head, by part of the model."""

    trained: Counter[str]
    fixed: Counter[str]
    full_total: int
    """Parameters of the model itself, which full-rank training trains and communicates."""

    def __getitem__(self, part: str) -> int:
        return self.trained[part] + self.fixed[part]

    @property
    def trainable(self) -> int:
        return self.trained.total()


def count_run(config: RunConfig, vocab_size: int, tp: Optional[int] = None) -> ParameterCounts:
    """Return the parameters that a rank holds at this tp, padded; without it those of the whole model, unpadded."""
    tensors = whole_tensors(config, vocab_size) if tp is None else rank_tensors(config, vocab_size, tp)
    return ParameterCounts(tensors.of_one_head, tensors.fixed, tensors.totals["model"])


def whole_tensors(config: RunConfig, vocab_size: int) -> RankTensors:
    """Return what one rank alone would have without padding: the whole tensors, as checkpoints store them."""
    return rank_tensors(replace(config, model=replace(config.model, pad_multiple=1)), vocab_size)


def rank_tensors(
    config: RunConfig, vocab_size: int, tp: int = 1, dp: int = 1, node: Optional[int] = None
) -> RankTensors:
    """Return what the first rank of a mesh has; the others hold no more. `node` data ranks are on a host."""
    batch = config.parallel.lte_heads * dp  # of one micro-batch: no tensor depends on it
    train = replace(config.train, micro_batch_size=1, global_batch_size=batch, activation_checkpointing=False)
    plain = replace(config, train=train, parallel=replace(config.parallel, tp=tp))
    return _rank_tensors(ByText(plain), vocab_size, dp, ranks_of_host(dp, tp, HOST) if node is None else node)


@lru_cache(maxsize=256)
def _rank_tensors(run: ByText[RunConfig], vocab_size: int, dp: int, node: int) -> RankTensors:
    config, more = run.value, run.value.model.num_layers - 1
    one, two = (_read(replace(config, model=replace(config.model, num_layers=n)), vocab_size, dp, node) for n in (1, 2))
    counts: list[tuple[Counter, Counter]] = list(zip(one, two, strict=True))
    return RankTensors(*(Counter({key: a[key] + more * (b[key] - a[key]) for key in b}) for a, b in counts))


def _read(config: RunConfig, vocab_size: int, dp: int, node: int) -> RankTensors:
    mesh = Mesh({"lte": 1, "dp": dp, "tp": config.parallel.tp}, dict.fromkeys(AXES, 0), {}, node)
    tensors = RankTensors(*(Counter() for _ in RankTensors._fields))
    with torch.device("meta"):
        model = build_model(config.model, vocab_size, mesh.axis("tp"))
        tensors.totals["model"] = sum(param.numel() for param in model.parameters())
        matrices = [each.linear.weight for each in model.decoder_linears()]
        method = build_method(config, model, mesh)
        _read_parameters(tensors, method, matrices)
        if config.train.precision == "bf16":
            for param in model.parameters():
                param.data = param.data.bfloat16()
        method.allocate()
        _read_kept(tensors, method)
    return tensors


def _read_parameters(tensors: RankTensors, method: Method, matrices: list[nn.Parameter]) -> None:
    """Count parameters and optimizer state; parameters are fp32 yet, as masters are. `matrices` are the model's own."""
    kinds, model, totals = method.kinds, method.model, tensors.totals
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    for part, param in by_part(method, matrices):
        if id(param) not in trained:
            tensors.fixed[part] += param.numel()
            continue
        tensors.trained[part] += param.numel()
        tensors.of_one_head[part] += param.numel() * (param.head == 0)  # type: ignore[attr-defined]
        state = method.optimizer_state(param)
        for name, tensor in state.items():
            tensors.state[kinds.get(name, name), name] += tensor.numel()
        stored = FP32 * param.numel() + sum(tensor.nbytes for tensor in state.values())
        totals["checkpoint"] += method.config.parallel.lte_heads * stored
    for group in method.param_groups():
        tensors.groups[group["name"]] += sum(param.numel() for param in group["params"])
    for module in model.modules():
        if hasattr(module, "partial_parameters"):
            totals["partial"] += sum(param.numel() for param in module.partial_parameters())  # type: ignore[operator]


def by_part(method: Method, matrices: list[nn.Parameter]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter, and every matrix beside adapters, with the part of the model that it belongs to."""
    parts = {id(param): "adapters" for param in method.matrices()} | {id(param): "matrices" for param in matrices}
    if not method.model.tied_names():
        parts |= {id(param): "head" for param in method.model.lm_head.parameters()}
    for param in {id(param): param for param in (*matrices, *method.model.parameters())}.values():
        yield parts.get(id(param), "embedding" if param.dim() > 1 else "norms"), param


def _read_kept(tensors: RankTensors, method: Method) -> None:
    """Count what the method keeps and gives, and what a checkpoint stores of it and of frozen parameters."""
    kinds = method.kinds

    def store(size: int, group: str | None) -> None:
        once = group in ("lte", "data", "world")  # for all heads
        tensors.totals["checkpoint"] += size if once else size * method.config.parallel.lte_heads

    for param in method.model.parameters():
        if not param.requires_grad:
            store(param.nbytes, method.frozen_group(param))
    counted = set()
    for piece in method.slices():  # views without padding, of memory that includes it
        store(piece.tensor.nbytes, piece.group)
        name, memory = piece.name.rsplit(".", 1)[-1], piece.tensor.untyped_storage()
        if piece.tensor.is_meta and memory._cdata not in counted:  # else a few integers, which plans pass over
            counted.add(memory._cdata)
            tensors.kept_bytes[kinds.get(name, name)] += memory.nbytes()
    for partitioned in (False, True):
        for flow, every in method.flows(partitioned):
            tensors.flow_bytes[partitioned, replace(flow, bytes=0), every] += int(flow.bytes)


def model_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Return the FLOPs of full-rank training per token, forward and backward.

    They are 6 per matrix weight, and causal attention. MFU is reported against this number for every method, so that
    runs of different methods compare.
    """
    weights = sum(p.out_features * p.in_features for p in projections(config)) * config.num_layers
    attention = 3 * config.num_layers * family_of(config).mixing_flops(config, seq_len)
    return 6.0 * (weights + vocab_size * config.hidden_size) + attention
