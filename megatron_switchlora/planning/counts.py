"""Counts of a configuration: parameters and FLOPs.

A total counts every parameter once and no padding (`count_parameters`). What one tensor-parallel rank
holds is its shard of each split tensor, padded to ceil(size / tp), and all of each replicated one
(`count_shard`). Split are: q, k, v, gate, up on the output, o and down on the input, embedding and head
on the vocabulary; of an adapter the factor on the split side; norms and the other factor are replicated.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache

from megatron_switchlora.config.method import MethodConfig
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.model.protocol import Projection, build_on_meta, family_of


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by group: of the model, unpadded, or those that a rank holds."""

    embedding: int
    head: int
    norms: int
    matrices: int
    adapters: int
    full_rank: bool
    dense_frozen: bool = False

    @property
    def dense(self) -> int:
        """Embedding, head and norms."""
        return self.embedding + self.head + self.norms

    @property
    def trainable(self) -> int:
        return self.dense * (not self.dense_frozen) + (self.matrices if self.full_rank else self.adapters)

    @property
    def frozen(self) -> int:
        """Matrices beside adapters."""
        return 0 if self.full_rank else self.matrices

    @property
    def frozen_dense(self) -> int:
        return self.dense if self.dense_frozen else 0

    @property
    def full_total(self) -> int:
        """Parameters of the model itself, which full-rank training trains and communicates."""
        return self.dense + self.matrices


def projections(config: ModelConfig) -> list[Projection]:
    """Return the linears of one decoder layer, in the model's order."""
    return family_of(config).projections(config)


def decoder_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven projections of one layer: q, k, v, o, gate, up, down."""
    return [(p.out_features, p.in_features) for p in projections(config)]


@dataclass(frozen=True)
class DenseTensors:
    """Elements of the dense tensors by group, and how many tensors they are."""

    embedding: int
    head: int
    norms: int
    tensors: int


def dense_tensors(config: ModelConfig, vocab_size: int, tp: int) -> DenseTensors:
    """Count what a rank holds beside the decoder's linears."""
    return _dense_tensors(json.dumps(asdict(config), sort_keys=True), vocab_size, tp)


@cache
def _dense_tensors(model: str, vocab_size: int, tp: int) -> DenseTensors:
    """Count in models of one and two layers, built on meta: every further layer adds as much."""
    config = ModelConfig(**json.loads(model))
    one, two = (_dense_of(replace(config, num_layers=layers), vocab_size, tp) for layers in (1, 2))
    return DenseTensors(*(a + (config.num_layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def _dense_of(config: ModelConfig, vocab_size: int, tp: int) -> tuple[int, int, int, int]:
    model = build_on_meta(config, vocab_size, Axis(tp))
    linears = {id(each.linear.weight) for each in model.decoder_linears()}
    dense = [param for param in model.parameters() if id(param) not in linears]
    head = 0 if model.tied_names() else model.lm_head.weight.numel()
    matrices, vectors = (sum(p.numel() for p in dense if (p.dim() > 1) == wanted) for wanted in (True, False))
    return matrices - head, head, vectors, len(dense)


def count_shard(config: ModelConfig, method: MethodConfig, vocab_size: int, tp: int) -> ParameterCounts:
    """Elements that one of `tp` tensor-parallel ranks holds, padding included."""
    shapes, layers = [p.shard(tp) for p in projections(config)], config.num_layers
    dense = dense_tensors(config, vocab_size, tp)
    return ParameterCounts(
        embedding=dense.embedding,
        head=dense.head,
        norms=dense.norms,
        matrices=layers * sum(m * n for m, n in shapes),
        adapters=layers * method.adapter_rank * sum(m + n for m, n in shapes) if method.facts.adapts else 0,
        full_rank=not method.facts.adapts,
    )


def count_parameters(config: ModelConfig, method: MethodConfig, vocab_size: int) -> ParameterCounts:
    """Counts of a model under a method, unpadded, whatever the mesh."""
    return count_shard(config, method, vocab_size, tp=1)


def count_run(config: RunConfig, vocab_size: int, tp: int = 1) -> ParameterCounts:
    """Return the counts of a run's model: of one head, what a rank holds at this tp; in all, unpadded, without."""
    counts = count_shard(config.model, config.method, vocab_size, tp)
    return replace(counts, dense_frozen=config.freezes_dense)


def count_here(config: RunConfig, vocab_size: int, tp: int) -> ParameterCounts:
    """What a rank holds; what trains as often as it has LTE heads."""
    counts, heads = count_run(config, vocab_size, tp), config.method.facts.heads_here
    names = ("adapters",) if counts.dense_frozen else ("embedding", "head", "norms", "adapters")
    return replace(counts, **{name: heads * getattr(counts, name) for name in names})


def model_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of full-rank training per token, forward and backward: 6 a matrix weight and causal attention.

    MFU is reported against this number for every method, so that runs of different methods compare.
    """
    weights = sum(m * n for m, n in decoder_shapes(config)) * config.num_layers + vocab_size * config.hidden_size
    attention = 3 * config.num_layers * family_of(config).mixing_flops(config, seq_len)
    return 6.0 * weights + attention
