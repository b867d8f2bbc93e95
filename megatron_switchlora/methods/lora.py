"""LoRA: a fixed low-rank adapter on the seven projections of every layer; W stays frozen.

Initial values are SwitchLoRA's or PiSSA's (then W <- W0 - sBA, so that step 0 computes the dense
initialisation) or the classic ones (B = 0). Embedding, head and norms train dense. With LoRA+ B has a
learning rate of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config import RunConfig, accumulation_steps
from megatron_switchlora.lowrank.init import Side, draw_vectors, factor_std, principal_factors
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.methods.base import Method
from megatron_switchlora.model.llama import LlamaForCausalLM, decoder_linears
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.parallel.mesh import Mesh
from megatron_switchlora.parallel.shard import named_generator, shard_of


class Lora(Method):
    """`linears` are the adapted layers by Hugging Face name, in layer order."""

    def __init__(self, config: RunConfig, model: LlamaForCausalLM, mesh: Mesh) -> None:
        super().__init__(config, model, mesh)
        micro_batches = accumulation_steps(config.train, mesh.size("dp"))
        self.linears: dict[str, LowRankLinear] = {}
        for name, parent, attribute, base in list(decoder_linears(model)):
            linear = LowRankLinear(base, config.method, micro_batches)
            setattr(parent, attribute, linear)
            self.linears[name] = linear
        self._draw_factors()

    def _draw_vectors(self, side: Side, name: str, count: int) -> Tensor:
        """`count` vectors of the layer's side [count, length], drawn for the full tensor by name."""
        linear = self.linears[name]
        m, n = linear.out_features, linear.in_features
        std = factor_std(side, self.config.method.initial, m, n, linear.rank)
        generator = named_generator(self.config.train.seed, f"{name}.lora_{side}")
        return draw_vectors(count, n if side == "A" else m, std, generator)

    def _draw_factors(self) -> None:
        for name, linear in self.linears.items():
            self._fill_factor(linear.lora_A, self._draw_vectors("A", name, linear.rank))
            self._fill_factor(linear.lora_B, self._draw_vectors("B", name, linear.rank))

    @staticmethod
    def _fill_factor(factor: nn.Parameter, full: Tensor) -> None:
        factor.data.copy_(shard_of(factor, full))

    def matrices(self) -> list[nn.Parameter]:
        return [factor for linear in self.linears.values() for factor in (linear.lora_A, linear.lora_B)]

    def param_groups(self) -> list[dict[str, Any]]:
        """With a LoRA+ ratio the adapters are two groups: ZeRO cuts each group's flat buffer for itself, so that the
        layout of runs without one stays."""
        adapters, *others = super().param_groups()
        ratio = self.config.optim.lora_plus_ratio
        if ratio == 1:
            return [adapters, *others]
        A = [linear.lora_A for linear in self.linears.values()]
        B = [linear.lora_B for linear in self.linears.values()]
        faster = {**adapters, "name": "lora_B", "params": B, "base_lr": adapters["base_lr"] * ratio}
        return [{**adapters, "name": "lora_A", "params": A}, faster, *others]

    def start(self, optimizer: RowAdamW) -> None:
        super().start(optimizer)
        if self.config.method.initial == "pissa":
            self._take_principal_factors()
        for linear in self.linears.values():
            linear.add_product(-1.0)

    def _take_principal_factors(self) -> None:
        """PiSSA's factors. A data-parallel rank decomposes its share of the layers, each gathered over tp and alike on
        those ranks, and sends its factors to the others. Collective over the head."""
        dp = self.mesh.axis("dp")
        for number, linear in enumerate(self.linears.values()):
            if number % dp.size == dp.rank:
                whole = linear.split.gather(linear.weight)
                A, B = principal_factors(whole, linear.rank, linear.scaling)
                self._fill_factor(linear.lora_A, A)
                self._fill_factor(linear.lora_B, B)
        for number, linear in enumerate(self.linears.values()):
            for factor in (linear.lora_A, linear.lora_B):
                if dp.size > 1:
                    dist.broadcast(factor.data, group=dp.group, group_src=number % dp.size)
                self.optimizer.rows_rewritten(factor, torch.arange(linear.rank))

    def after_step(self, step: int) -> None:
        self._forget_merged()

    def loaded(self) -> None:
        self._forget_merged()

    def _forget_merged(self) -> None:
        for linear in self.linears.values():
            linear.forget_merged()
