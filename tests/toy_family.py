"""A model family in one file: a decoder with learned positions that sees the past as its running mean. Shows what
adding a family takes: this, loaded by the run option `plugins`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.family import register_family
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.parallel import require_shard, shard_size
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    enter_block,
)
from megatron_switchlora.distributed.shard import Axis, declare
from megatron_switchlora.model.entries import read_flag, read_number, read_whole
from megatron_switchlora.model.heads import copies
from megatron_switchlora.model.norm import RMSNorm
from megatron_switchlora.model.protocol import Family, LanguageModel


class Positions(nn.Module):
    """A learned vector for each position: weight [length, hidden]."""

    def __init__(self, length: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = declare(nn.Parameter(torch.empty(length, hidden_size)), shard=None)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.weight[: x_BSD.size(1)]

    def for_heads(self, heads: int) -> HeadsPositions:
        return HeadsPositions(self, heads)


class HeadsPositions(nn.Module):
    """Positions of several LTE heads."""

    def __init__(self, base: Positions, heads: int) -> None:
        super().__init__()
        self.weight = copies(base.weight, heads)

    def forward(self, x_BSD: Tensor) -> Tensor:
        pairs = zip(x_BSD.chunk(len(self.weight)), self.weight, strict=True)
        return torch.cat([x + weight[: x.size(1)] for x, weight in pairs])


class Layer(nn.Module):
    """x + down(relu(up(mean of what the norm gives up to here)))."""

    def __init__(self, config: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.tp = tp
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.up = ColumnParallelLinear(config.hidden_size, config.intermediate_size, tp, config.pad_multiple)
        self.down = RowParallelLinear(config.intermediate_size, config.hidden_size, tp, config.pad_multiple)

    def forward(self, x_BSD: Tensor) -> Tensor:
        lengths = torch.arange(1, x_BSD.size(1) + 1, device=x_BSD.device).unsqueeze(-1)
        past_BSD, (up, down) = enter_block(self.norm(x_BSD).cumsum(1) / lengths, (self.up, self.down), self.tp)
        return x_BSD + self.down(F.relu(self.up(past_BSD, *up)), *down)


class ToyModel(LanguageModel):
    """The whole model, or this rank's part of it."""

    def __init__(self, config: ModelConfig, vocab_size: Optional[int], tp: Optional[Axis]) -> None:
        super().__init__(config, vocab_size, tp)
        self.embedding = VocabParallelEmbedding(self.vocab_size, config.hidden_size, self.tp, config.pad_multiple)
        self.positions = Positions(config.max_position_embeddings or 0, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, self.tp) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(config.hidden_size, self.vocab_size, self.tp, config.pad_multiple)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.positions(self.embedding(tokens_BS))
        for layer in self.layers:
            x_BSD = self.run_layer(layer, x_BSD)
        return self.norm(x_BSD)


@register_family
class Toy(Family):
    """What the package asks about it."""

    name = "toy"
    title = "toy"
    unread = frozenset({"num_heads", "num_kv_heads", "rope_theta", "rope_scaling"})
    sums_per_layer = 1
    model_types = ("toy",)

    def check(self, model: ModelConfig) -> None:
        require(model.max_position_embeddings is not None, "model.family toy needs model.max_position_embeddings.")

    def check_run(self, config: RunConfig) -> None:
        require_shard("model.intermediate_size", config.model.intermediate_size, config.parallel.tp)
        positions, length = config.model.max_position_embeddings or 0, config.train.seq_len
        require(
            length <= positions,
            f"train.seq_len {length} must not be longer than model.max_position_embeddings {positions}: change one.",
        )

    def build(self, config: ModelConfig, vocab_size: Optional[int], tp: Optional[Axis]) -> ToyModel:
        return ToyModel(config, vocab_size, tp)

    def kept_bytes(self, config: ModelConfig, tp: int, size: int, compiled: bool) -> int:
        """Count the norm's input and 1 / rms, the input of up, that of down."""
        h, f = config.hidden_size, shard_size(config.intermediate_size, tp, config.pad_multiple)
        return size * h + 4 + size * h + size * f

    def hf_config(
        self, config: ModelConfig, vocab_size: int, seq_len: int, marks: dict[str, Any], dtype: str
    ) -> dict[str, Any]:
        sizes = {"width": config.hidden_size, "inner": config.intermediate_size, "depth": config.num_layers}
        more = {"length": config.max_position_embeddings, "eps": config.rms_norm_eps, "tied": config.tie_embeddings}
        return {"model_type": "toy", "vocab_size": vocab_size, **sizes, **more, **marks, "dtype": dtype}

    def read_hf_config(self, path: Path, content: dict[str, Any]) -> ModelConfig:
        return ModelConfig(
            family="toy",
            vocab_size=read_whole(path, content, "vocab_size"),
            hidden_size=read_whole(path, content, "width"),
            intermediate_size=read_whole(path, content, "inner"),
            num_layers=read_whole(path, content, "depth"),
            max_position_embeddings=read_whole(path, content, "length"),
            rms_norm_eps=read_number(path, content, "eps", 1e-6),
            tie_embeddings=read_flag(path, content, "tied"),
        )

    def hf_name(self, name: str) -> str:
        return name.replace("layers.", "blocks.")
