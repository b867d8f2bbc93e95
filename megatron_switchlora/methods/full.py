"""Train at full rank: every weight is a parameter."""

from __future__ import annotations

from torch import nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.method import MethodFacts, register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods.base import Method


@register
class FullFacts(MethodFacts):
    """Facts of full-rank training, which has no adapters."""

    name = "full"
    about = "every weight"
    adapts = False

    @property
    def kind(self) -> type[Method]:
        return Full

    def check(self, config: RunConfig) -> None:
        steps = config.method.full_rank_steps
        require(
            not steps,
            f"method.full_rank_steps {steps} sets the full-rank steps before another method starts, but method.name "
            "full trains at full rank throughout: leave method.full_rank_steps out.",
        )


class Full(Method):
    """The full-rank baseline: matrices train at `optim.lr`, all else at `optim.dense_lr`."""

    def matrices(self) -> list[nn.Parameter]:
        return [linear.weight for _, _, _, linear in self.model.decoder_linears()]
