"""Train multi-head LoRA, LTE's baseline: y = W x + (s/N) sum_n B_n A_n x (arXiv 2402.16828, section 3.1).

It equals LoRA with the vectors of N heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.lowrank.init import Side
from megatron_switchlora.methods.adapter_options import AdapterFacts
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.lora import Lora, draw_factor


@dataclass
class MhLoraOptions:
    """Multi-head LoRA, LTE's baseline (arXiv 2402.16828, section 3.1), with method.name mhlora."""

    heads: int = option(1)
    """LoRA heads whose sum is the adapter of one model."""


@register
class MhLoraFacts(AdapterFacts):
    """Facts of multi-head LoRA: heads side by side."""

    name = "mhlora"
    about = "the sum of several LoRA heads in one model"
    sections = {"mhlora": MhLoraOptions}  # noqa: RUF012
    inits = frozenset({"switchlora", "classic", "semi_orthogonal"})

    @property
    def kind(self) -> type[Method]:
        return MhLora

    @property
    def default_init(self) -> str:
        return "semi_orthogonal"

    @property
    def default_alpha(self) -> float:
        return 4096.0 if self.method.initial in ("semi_orthogonal", "classic") else 1.0

    @property
    def default_lr(self) -> float:
        """LTE's rate at LTE's large s; LoRA's rate where B is not zero and s = 1 / rank."""
        return 0.00005 if self.default_alpha > 1 else super().default_lr

    def default_dense_lr(self, lr: float) -> float:
        return 0.001

    @property
    def side_by_side(self) -> int:
        return self.method.mhlora.heads

    def check(self, config: RunConfig) -> None:
        heads = config.method.mhlora.heads
        require(heads >= 1, f"method.mhlora.heads must be at least 1, not {heads}.")
        super().check(config)


class MhLora(Lora):
    """Multi-head LoRA: `method.mhlora.heads` heads side by side in one adapter."""

    def _draw_vectors(self, side: Side, name: str, count: int) -> Tensor:
        linear = self.linears[name]
        shape = (linear.out_features, linear.in_features)
        heads = range(self.config.method.mhlora.heads)
        drawn = [draw_factor(self.config, side, name, shape, count, head) for head in heads]
        joined = drawn[0].new_empty(len(drawn), *drawn[0].shape)  # torch.cat is slow on the meta device
        for place, vectors in zip(joined, drawn, strict=True):
            place.copy_(vectors)
        return joined.flatten(0, 1)
