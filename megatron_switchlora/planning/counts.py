"""Analytic counts of a configuration: parameters and FLOPs. Nothing here builds a model.

A total counts every parameter once and no padding (`count_parameters`). What one tensor-parallel rank
holds is its shard of each split tensor, padded to ceil(size / tp), and all of each replicated one
(`count_shard`). Split are: q, k, v, gate, up on the output, o and down on the input, embedding and head
on the vocabulary; of an adapter the factor on the split side; norms and the other factor are replicated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_switchlora.config.method import MethodConfig
from megatron_switchlora.config.run import ModelConfig, RunConfig, shard_size


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by group: of the model, unpadded, or those that a rank holds."""

    embedding: int
    head: int
    norms: int
    matrices: int
    adapters: int
    full_rank: bool

    @property
    def trainable(self) -> int:
        return self.embedding + self.head + self.norms + (self.matrices if self.full_rank else self.adapters)

    @property
    def frozen(self) -> int:
        return 0 if self.full_rank else self.matrices

    @property
    def full_total(self) -> int:
        """Parameters of the model itself, which full-rank training trains and communicates."""
        return self.embedding + self.head + self.norms + self.matrices


class Projection(NamedTuple):
    """A linear layer of the decoder: full sizes, and which of them tensor parallelism splits."""

    out_features: int
    in_features: int
    row_parallel: bool

    def shard(self, tp: int) -> tuple[int, int]:
        """(out, in) of a rank's part of W."""
        if self.row_parallel:
            return self.out_features, shard_size(self.in_features, tp)
        return shard_size(self.out_features, tp), self.in_features


def projections(config: ModelConfig) -> list[Projection]:
    """The seven of one decoder layer: q, k, v, o, gate, up, down."""
    h, f, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    return [
        Projection(h, h, False),
        Projection(kv, h, False),
        Projection(kv, h, False),
        Projection(h, h, True),
        Projection(f, h, False),
        Projection(f, h, False),
        Projection(h, f, True),
    ]


def decoder_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven projections of one layer: q, k, v, o, gate, up, down."""
    return [(p.out_features, p.in_features) for p in projections(config)]


def count_shard(config: ModelConfig, method: MethodConfig, vocab_size: int, tp: int) -> ParameterCounts:
    """Elements that one of `tp` tensor-parallel ranks holds, padding included."""
    shapes, layers = [p.shard(tp) for p in projections(config)], config.num_layers
    embedding = shard_size(vocab_size, tp) * config.hidden_size
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        norms=(2 * layers + 1) * config.hidden_size,
        matrices=layers * sum(m * n for m, n in shapes),
        adapters=layers * method.adapter_rank * sum(m + n for m, n in shapes) if method.facts.adapts else 0,
        full_rank=not method.facts.adapts,
    )


def count_parameters(config: ModelConfig, method: MethodConfig, vocab_size: int) -> ParameterCounts:
    """Counts of a model under a method, unpadded, whatever the mesh."""
    return count_shard(config, method, vocab_size, tp=1)


def count_here(config: RunConfig, vocab_size: int, tp: int) -> ParameterCounts:
    """What a rank holds; what trains as often as it has LTE heads."""
    counts, heads = count_shard(config.model, config.method, vocab_size, tp), config.method.facts.heads_here
    each = {name: heads * getattr(counts, name) for name in ("embedding", "head", "norms", "adapters")}
    return replace(counts, **each)


def model_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of full-rank training per token, forward and backward: 6 a matrix weight and causal attention.

    MFU is reported against this number for every method, so that runs of different methods compare.
    """
    weights = sum(m * n for m, n in decoder_shapes(config)) * config.num_layers + vocab_size * config.hidden_size
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * weights + attention
