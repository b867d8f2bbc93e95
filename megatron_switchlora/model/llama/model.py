"""LLaMA, with Hugging Face's module names verbatim.

RMSNorm, rotary embedding with rotated halves, grouped-query causal attention through PyTorch's SDPA,
SwiGLU. Linears are the parallel layers of `distributed/linear.py`; a method may replace those of the
decoder layers by low-rank ones (`decoder_linears` lists them). Shapes: B batch, S sequence,
D hidden, F feed-forward, V vocabulary, H heads, K key/value heads. Under tensor parallelism a rank
holds whole heads and a part of F and V; a block runs one all-reduce forward and one backward.
With `labels`, `forward` returns the mean cross entropy; without, the logits. `rope.py` has scaled
rotary embeddings. Not supported: biases, attention masks other than causal, caches for generation
(export to transformers).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    apply_together,
    enter_block,
)
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.model.elementwise import Elementwise
from megatron_switchlora.model.llama.rope import scaled_frequencies, scaled_tables
from megatron_switchlora.model.norm import RMSNorm
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.startup.device import is_gpu


def rotary_tables(seq_len: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [S, head_dim / 2], computed in fp32 (float64 for float64 activations) and cast."""
    dtype = at_least_fp32(like.dtype)
    exponents = torch.arange(0, head_dim, 2, device=like.device).to(dtype) / head_dim
    angles = torch.outer(torch.arange(seq_len, device=like.device).to(dtype), 1.0 / theta**exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class Attention(nn.Module):
    """Causal self-attention with K key/value heads for H query heads."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.head_dim, self.tp, self.elementwise = config.head_dim, tp, Elementwise()
        kv_size = config.kv_heads * config.head_dim
        self.q_proj = ColumnParallelLinear(config.hidden_size, config.hidden_size, tp)
        self.k_proj = ColumnParallelLinear(config.hidden_size, kv_size, tp)
        self.v_proj = ColumnParallelLinear(config.hidden_size, kv_size, tp)
        self.o_proj = RowParallelLinear(config.hidden_size, config.hidden_size, tp)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        x_BSD, (*entered, o_entered) = enter_block(x_BSD, (*projections, self.o_proj), self.tp)
        q, k, v = (
            y_BSF.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y_BSF in apply_together(projections, x_BSD, entered)
        )
        q, k = self.elementwise.rotary(q, *rotary), self.elementwise.rotary(k, *rotary)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2), *o_entered)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention [B, H, S, head_dim].

    In fp32 a GPU has no fused kernel for grouped heads and would form [B, H, S, S], so they are repeated there.
    """
    if is_gpu(q.device) and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) if x.size(1) < q.size(1) else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.tp, self.elementwise = tp, Elementwise()
        self.gate_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, tp, config.pad_multiple)
        self.up_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, tp, config.pad_multiple)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, tp, config.pad_multiple)

    def forward(self, x_BSD: Tensor) -> Tensor:
        wide = (self.gate_proj, self.up_proj)
        x_BSD, (*entered, down_entered) = enter_block(x_BSD, (*wide, self.down_proj), self.tp)
        gate_BSF, up_BSF = apply_together(wide, x_BSD, entered)
        return self.down_proj(self.elementwise.swiglu(gate_BSF, up_BSF), *down_entered)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.self_attn = Attention(config, tp)
        self.mlp = MLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        mixed_BSD = self.self_attn(self.input_layernorm(x_BSD), rotary)
        x_BSD, normal_BSD = self.post_attention_layernorm.add(x_BSD, mixed_BSD)
        return x_BSD + self.mlp(normal_BSD)


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the final norm: `model.*` in Hugging Face's names."""

    def __init__(self, config: ModelConfig, vocab_size: int, tp: Axis) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(vocab_size, config.hidden_size, tp, config.pad_multiple)
        self.layers = nn.ModuleList(DecoderLayer(config, tp) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @cached_property
    def scaled_rotary(self) -> tuple[Tensor, float]:
        """Return frequencies and attention factor, once they are needed: transformers is slow to import.

        They are no buffer, since a cast of the model to bf16 would round it.
        """
        return scaled_frequencies(self.config)

    def rotary(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [S, head_dim / 2] for these activations."""
        if self.config.rope_scaling is not None:
            return scaled_tables(x_BSD.size(1), *self.scaled_rotary, x_BSD)
        return rotary_tables(x_BSD.size(1), self.config.head_dim, self.config.rope_theta, x_BSD)

    def forward(self, tokens_BS: Tensor, run_layer: Callable[..., Tensor]) -> Tensor:
        x_BSD = self.embed_tokens(tokens_BS)
        rotary = self.rotary(x_BSD)
        for layer in self.layers:
            x_BSD = run_layer(layer, x_BSD, rotary)
        return self.norm(x_BSD)


class LlamaForCausalLM(LanguageModel):
    """The whole model, or this rank's part of it."""

    def __init__(self, config: ModelConfig, vocab_size: Optional[int] = None, tp: Optional[Axis] = None) -> None:
        super().__init__(config, vocab_size, tp)
        self.model = LlamaModel(config, self.vocab_size, self.tp)
        self.lm_head = ColumnParallelLinear(config.hidden_size, self.vocab_size, self.tp, config.pad_multiple)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        return self.model(tokens_BS, self.run_layer)
