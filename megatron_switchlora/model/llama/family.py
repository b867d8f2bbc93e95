"""LLaMA as a family: what the package asks of it, answered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.family import register_family
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.parallel import shard_size
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.model.llama import conversion, rules
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import Family


@register_family
class Llama(Family):
    """LLaMA (arXiv 2302.13971), with grouped-query attention and scaled rotary embeddings."""

    name = "llama"
    title = "LLaMA"
    model_types = ("llama",)

    def check(self, model: ModelConfig) -> None:
        rules.check_shape(model)

    def check_run(self, config: RunConfig) -> None:
        rules.check_split(config.model, config.parallel.tp)

    def build(self, config: ModelConfig, vocab_size: Optional[int], tp: Optional[Axis]) -> LlamaForCausalLM:
        return LlamaForCausalLM(config, vocab_size, tp)

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> int:
        """Count causal attention: scores and sums of values, over half of the sequence on average."""
        return 2 * config.num_heads * config.head_dim * seq_len

    def kept_bytes(self, config: ModelConfig, tp: int, size: int, compiled: bool) -> int:
        hidden, kv, fp32 = config.hidden_size, config.kv_heads * config.head_dim, 4
        norms = 2 * (size * hidden + fp32)  # the input and 1 / rms
        inputs = 2 * size * hidden  # of q, k, v and of gate, up
        attention = size * (2 * hidden + 2 * kv) // tp + fp32 * config.num_heads // tp  # q, k, v, result, log-sums
        inner = shard_size(config.intermediate_size, tp, config.pad_multiple)
        mlp = (3 if compiled else 4) * size * inner  # gate, silu(gate), up, product
        return norms + inputs + attention + mlp

    def hf_config(
        self, config: ModelConfig, vocab_size: int, seq_len: int, marks: dict[str, Any], dtype: str
    ) -> dict[str, Any]:
        return conversion.hf_config(config, vocab_size, seq_len, marks, dtype)

    def read_hf_config(self, path: Path, content: dict[str, Any]) -> ModelConfig:
        return conversion.read_config(path, content)

    def read_names(self, stored: Iterable[str]) -> dict[str, str]:
        return conversion.read_names(stored)
