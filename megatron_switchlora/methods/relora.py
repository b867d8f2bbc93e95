"""Train ReLoRA (arXiv 2307.05695): fold the adapter into W and re-initialise it every K steps.

A restart follows the optimizer's step number K, 2K, ...:
    W <- W + s B A, from the factors as the forward pass uses them
    A <- new values with the classic initialisation;  B <- 0
The model's function stays the same, and the next cycle adds another r ranks.
    moments          zeroed, or pruned by magnitude
    step counters    restart at zero (those of the adapters)
    learning rates   climb from zero back to the cosine, the dense tensors' too (the jagged cosine)
New values are pure functions of (seed, layer, restart), so a checkpoint needs no state beyond LoRA's.

The published code differs twice. Its step counter keeps counting, so the first updates after a reset are three times
too large and only the warm-up limits them. It starts with A = B = 0, which trains nothing in the first cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import named_generator
from megatron_switchlora.lowrank.init import draw_vectors, factor_std
from megatron_switchlora.methods.adapter_options import AdapterFacts
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.lora import ALL_INITS, Lora
from megatron_switchlora.optim.pruning import prune_moments
from megatron_switchlora.optim.schedules import jagged_factor


@dataclass
class ReloraOptions:
    """Adapters that are folded into W and re-initialised (ReLoRA, arXiv 2307.05695), with method.name relora."""

    interval: int = option(5000)
    """Steps K between restarts, which fold sBA into W, re-initialise A and zero B."""
    warmup: int = option(100)
    """Steps in which the learning rates climb back to their schedule after a restart."""
    moments: Literal["zero", "prune"] = option("zero")
    """What a restart keeps of the adapters' Adam moments: nothing, or the entries of largest magnitude."""
    keep: float = option(0.001)
    """Share of a moment's entries that method.relora.moments prune keeps (the paper prunes 99.9 %)."""


@register
class ReloraFacts(AdapterFacts):
    """Facts of LoRA with restarts."""

    name = "relora"
    about = "an adapter that is folded into W and re-initialised every method.relora.interval steps"
    sections = {"relora": ReloraOptions}  # noqa: RUF012
    inits = ALL_INITS - {"lora_ga"}

    @property
    def kind(self) -> type[Method]:
        return Relora

    @property
    def default_init(self) -> str:
        return "classic"

    @property
    def default_lr(self) -> float:
        """ReLoRA's rate in SwitchLoRA's paper (arXiv 2406.06564)."""
        return 0.001

    def check(self, config: RunConfig) -> None:
        relora, warmup = config.method.relora, config.train.warmup_steps
        super().check(config)
        require(
            relora.interval >= max(1, warmup),
            f"method.relora.interval must be at least 1 and at least train.warmup_steps, or the first warm-up would "
            f"overlap a restart's; they are {relora.interval} and {warmup}: raise the interval or shorten the warm-up.",
        )
        require(
            0 <= relora.warmup <= relora.interval,
            f"method.relora.warmup must be between 0 and method.relora.interval {relora.interval}, but it is "
            f"{relora.warmup}: warm up for fewer steps.",
        )
        require(
            0 < relora.keep < 1,
            f"method.relora.keep is the share of a moment's entries that pruning keeps and must be between 0 and 1, "
            f"but it is {relora.keep}: to keep none, set method.relora.moments to zero.",
        )


class Relora(Lora):
    """LoRA that restarts after steps K, 2K, ..., where K is `method.relora.interval`."""

    def lr_factor(self, step: int) -> float:
        train, relora = self.config.train, self.config.method.relora
        return jagged_factor(step, train.warmup_steps, train.steps, relora.interval, relora.warmup)

    def after_step(self, step: int) -> None:
        number, rest = divmod(step + 1, self.config.method.relora.interval)
        if rest == 0:
            self._restart(number)
        super().after_step(step)

    def _restart(self, number: int) -> None:
        """Perform restart `number`, counted from 1. Collective over the head where moments are pruned."""
        for name, linear in self.linears.items():
            linear.add_product(1.0)
            std = factor_std("A", "classic", linear.out_features, linear.in_features, linear.rank)
            generator = named_generator(self.config.train.seed, f"{name}.lora_A, restart {number}")
            self._fill_factor(linear.lora_A, draw_vectors(linear.rank, linear.in_features, std, generator))
            linear.lora_B.data.zero_()
            self.optimizer.rows_rewritten(linear.lora_A)
            self.optimizer.rows_rewritten(linear.lora_B)
        if self.config.method.relora.moments == "prune":
            prune_moments(self.optimizer, self.matrices(), self.config.method.relora.keep, self.mesh)
            for factor in self.matrices():
                self.optimizer.reset_steps(factor)
        else:
            for factor in self.matrices():
                self.optimizer.reset_rows(factor)
