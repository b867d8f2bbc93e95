"""Full-rank training: every weight is a parameter."""

from __future__ import annotations

from torch import nn

from megatron_switchlora.methods.base import Method
from megatron_switchlora.model.llama.model import decoder_linears


class Full(Method):
    """The baseline. The decoder's matrices train at `optim.lr`, everything else at `optim.dense_lr`."""

    def matrices(self) -> list[nn.Parameter]:
        return [linear.weight for _, _, _, linear in decoder_linears(self.model)]
