"""Somebody's model as a method sees it: linears that it may replace, and parameters.

A copy of a target's weight becomes W in fp32 (or float64), whatever the precision of the model. Its bias stays the
parameter that it was. The replaced module is kept without its weight, to be put back by `restore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_switchlora.distributed.linear import ColumnParallelLinear
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import Axis, declare
from megatron_switchlora.library.targets import Target
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.model.protocol import DecoderLinear


class Host:
    """A model and the linears in it that get adapters; everything else is asked of the model."""

    def __init__(self, model: nn.Module, targets: list[Target]) -> None:
        self.module, self.targets = model, targets
        self.dtypes = {target.name: target.weight.dtype for target in targets}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def decoder_linears(self) -> Iterator[DecoderLinear]:
        """Yield the targets as parallel linears on one rank; each is replaced before the next is made."""
        for target in self.targets:
            parent, attribute = target.places[0]
            weight, bias = target.weight, target.module.bias
            with torch.device("meta"):
                linear = ColumnParallelLinear(weight.size(1), weight.size(0), Axis())
            high = weight.to(at_least_fp32(weight.dtype), copy=True, memory_format=torch.contiguous_format)
            linear.weight = declare(nn.Parameter(high, requires_grad=False), shard=linear.split)
            linear.bias = bias  # type: ignore[assignment]
            target.module.weight = None  # type: ignore[assignment]
            yield DecoderLinear(target.name, parent, attribute, linear)
            for other, name in target.places[1:]:
                setattr(other, name, getattr(parent, attribute))

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield nothing: the model's own state holds its buffers, and so no method need keep them."""
        yield from ()

    def cast(self, linears: dict[str, LowRankLinear]) -> None:
        """Cast factors to the precision that their layer had."""
        for name, linear in linears.items():
            for factor in (linear.lora_A, linear.lora_B):
                factor.data = factor.data.to(self.dtypes[name])

    @torch.no_grad()
    def restore(self, linears: dict[str, LowRankLinear]) -> None:
        """Put the replaced modules back, with W + s B A for weights."""
        for target in self.targets:
            weight = linears[target.name].effective_weight().to(self.dtypes[target.name])
            target.module.weight = nn.Parameter(weight.t().contiguous() if target.transposed else weight)
            for parent, attribute in target.places:
                setattr(parent, attribute, target.module)
