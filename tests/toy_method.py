"""A method in one file: LoRA whose B shrinks after every step. Shows what adding a method takes: this, loaded by the
run option `plugins`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
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
    """Shrinks each lora_B, in parameter and master."""

    def after_step(self, step: int) -> None:
        for linear in self.linears.values():
            linear.lora_B.data.mul_(1 - self.config.method.toy.shrink)
            self.optimizer.rows_rewritten(linear.lora_B)
        super().after_step(step)
