"""The model section of the run configuration, and its rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option

LARGEST_SIZE = 2**24  # of a model's dimension: the elements of a matrix can still be counted
LARGEST_MULTIPLE = 1024


@dataclass
class ModelConfig:
    """Family and shape of the model."""

    family: str = option("llama")
    """The model family; plugins may add some."""
    vocab_size: Optional[int] = option(None, resume="free")
    """Vocabulary size; by default the tokenizer's."""
    hidden_size: int = option(144)
    """Width of the residual stream."""
    intermediate_size: int = option(384)
    """Width of the SwiGLU feed-forward."""
    num_layers: int = option(4)
    """Number of decoder layers."""
    num_heads: int = option(4)
    """Number of attention heads; hidden_size must be a multiple of it."""
    num_kv_heads: Optional[int] = option(None)
    """Key/value heads of grouped-query attention; by default num_heads."""
    rope_theta: float = option(10000.0)
    """Base of the rotary position embedding."""
    rope_scaling: Optional[dict[str, Any]] = option(None)
    """Scaling of the rotary embedding, in the form of transformers' rope_parameters without rope_theta: rope_type
    linear, llama3 or yarn, and its numbers, as in {"rope_type": "linear", "factor": 4.0}; by default none."""
    max_position_embeddings: Optional[int] = option(None, resume="free")
    """Context length that the exported model states, unless train.seq_len is longer; by default train.seq_len."""
    rms_norm_eps: float = option(1e-6)
    """Epsilon of RMSNorm."""
    initializer_range: float = option(0.02)
    """Standard deviation of the normal initial values of all matrices."""
    tie_embeddings: bool = option(False)
    """Use the input embedding as lm_head."""
    pad_multiple: int = option(64, resume="free", results=False)
    """Each rank pads its part of intermediate_size and of the vocabulary with zeros to a multiple of this, since a GPU
    multiplies matrices of such sizes fastest; 1 pads nothing. Checkpoints and exports hold no padding."""

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def check_shape(m: ModelConfig) -> None:
    """Check the rules that hold for every family; `config.family.check_model` adds those of its own.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
        value = getattr(m, name)
        require(1 <= value <= LARGEST_SIZE, f"model.{name} must be at least 1 and at most 2^24, not {value}.")
    for name in ("initializer_range", "rope_theta", "rms_norm_eps"):
        number = getattr(m, name)
        require(math.isfinite(number) and number > 0, f"model.{name} must be positive, not {number}.")
    length = m.max_position_embeddings
    require(length is None or length >= 1, f"model.max_position_embeddings must be at least 1, not {length}.")
    require(
        1 <= m.pad_multiple <= LARGEST_MULTIPLE,
        f"model.pad_multiple must be at least 1 and at most {LARGEST_MULTIPLE}, not {m.pad_multiple}: 64 suits GPUs.",
    )
    vocabulary = m.vocab_size
    require(
        vocabulary is None or 1 <= vocabulary <= LARGEST_SIZE,
        f"model.vocab_size must be positive and at most 2^24, not {vocabulary}.",
    )
