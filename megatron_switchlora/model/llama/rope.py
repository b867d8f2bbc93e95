"""Scaled rotary embeddings: a LLaMA trained on short sequences reads longer ones.

A scaling replaces the frequencies theta^(-2i / head_dim) by others and multiplies cos and sin by an attention factor:
linear divides every frequency; llama3 (Llama 3.1) divides the low ones, and blends between two wavelengths; yarn (arXiv
2309.00071) also blends, and raises the attention factor. transformers' own functions compute both numbers, once per
model, on the CPU and in fp32, so that all ranks hold the same and the exported model has the same function; angles, cos
and sin are fp32 too, as in transformers, whatever the activations are. transformers is imported only when there is a
scaling. Not supported: scalings that change with the length of the sequence (dynamic, longrope).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_switchlora.config.model import ModelConfig


def rope_parameters(config: ModelConfig) -> dict:
    """Return transformers' `rope_parameters` of this configuration."""
    return {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}


def scaled_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return frequencies [head_dim / 2], fp32 on the CPU, and attention factor of a scaled configuration."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = config.rope_scaling
    assert scaling is not None
    original = scaling.get("original_max_position_embeddings", 1)
    hf_config = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        # changes no frequency, since rules demand what it would fill in; transformers warns where it does not fit them
        max_position_embeddings=config.max_position_embeddings or int(original * scaling["factor"]),
        rope_parameters=rope_parameters(config),
    )
    with torch.device("cpu"):  # also where the model itself is built on the meta device
        return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf_config)


def scaled_tables(seq_len: int, frequencies: Tensor, factor: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [S, head_dim / 2] times the attention factor, computed in fp32 and cast as `like`."""
    positions = torch.arange(seq_len, device=like.device).float()
    angles = torch.outer(positions, frequencies.to(like.device, non_blocking=True))
    return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)
