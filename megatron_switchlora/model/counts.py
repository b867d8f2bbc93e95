"""Analytic counts of a configuration: parameters and FLOPs. Nothing here builds a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_switchlora.config import MethodConfig, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by group, unpadded."""

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
    def full_total(self) -> int:
        """Parameters of the model itself, which full-rank training trains and communicates."""
        return self.embedding + self.head + self.norms + self.matrices


def decoder_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(out, in) of the seven projections of one layer: q, k, v, o, gate, up, down."""
    h, f, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    return [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]


def count_parameters(config: ModelConfig, method: MethodConfig, vocab_size: int) -> ParameterCounts:
    """Counts of a model under a method."""
    shapes = decoder_shapes(config) * config.num_layers
    embedding = vocab_size * config.hidden_size
    return ParameterCounts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        norms=(2 * config.num_layers + 1) * config.hidden_size,
        matrices=sum(m * n for m, n in shapes),
        adapters=0 if method.name == "full" else sum(method.rank * (m + n) for m, n in shapes),
        full_rank=method.name == "full",
    )


def model_flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """FLOPs of full-rank training per token, forward and backward: 6 a matrix weight and causal attention.

    MFU is reported against this number for every method, so that runs of different methods compare.
    """
    weights = sum(m * n for m, n in decoder_shapes(config)) * config.num_layers + vocab_size * config.hidden_size
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * weights + attention
