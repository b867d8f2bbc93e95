"""A method in one file: LoRA whose B shrinks after every step. Shows what adding a method takes: this, loaded by the
run option `plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice, replica_group
from megatron_switchlora.methods.adapter_options import AdapterFacts
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.lora import Lora


@dataclass
class ToyOptions:
    """LoRA whose B shrinks, with method.name toy."""

    shrink: float = option(0.01, resume="ask")
    """Share of B that is taken away after every step."""


@register
class ToyFacts(AdapterFacts):
    """What the package asks about it."""

    name = "toy"
    about = "LoRA whose B shrinks after every step"
    sections = {"toy": ToyOptions}  # noqa: RUF012
    inits = frozenset({"switchlora", "classic"})

    @property
    def kind(self) -> type[Method]:
        return Toy

    def check(self, config: RunConfig) -> None:
        super().check(config)
        shrink = config.method.toy.shrink
        require(0 <= shrink < 1, f"method.toy.shrink must lie in [0, 1), it is {shrink}.")


class Toy(Lora):
    """Shrinks each lora_B, in parameter and master, and sums up what it takes away: `removed` [rank, out], fp32."""

    def allocate(self) -> None:
        super().allocate()
        factors = {name: linear.lora_B for name, linear in self.linears.items()}
        self.removed = {name: B.new_zeros(B.shape, dtype=torch.float32) for name, B in factors.items()}

    def slices(self) -> Iterator[TensorSlice]:
        yield from super().slices()
        for name, removed in self.removed.items():
            B = self.linears[name].lora_B
            yield parameter_slice(f"{name}.removed", B, replica_group(B), removed)

    def after_step(self, step: int) -> None:
        shrink = self.config.method.toy.shrink
        for name, linear in self.linears.items():
            self.removed[name].add_(linear.lora_B.data, alpha=shrink)
            linear.lora_B.data.mul_(1 - shrink)
            self.optimizer.rows_rewritten(linear.lora_B)
        super().after_step(step)
