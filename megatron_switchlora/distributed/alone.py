"""The process group of one rank alone: its collectives return what they are given, and need no communicator.

DeepSpeed calls collectives on the groups of its `mpu` even where these have one rank, so an axis of size 1 needs a
group. torch's own would set up a NCCL communicator for each, and launch kernels that change nothing.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Optional

import torch.distributed as dist
from torch import Tensor

NAME = "alone"


class Done(dist.Work):
    """Work that is complete."""

    def wait(self, timeout: Optional[timedelta] = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class Alone(dist.ProcessGroup):
    """A group of one rank."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        assert (rank, size) == (0, 1)
        super().__init__(rank, size)  # type: ignore[call-arg]

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return NAME

    def getBackendName(self) -> str:
        return NAME

    def _unchanged(self, *_: Any, **__: Any) -> dist.Work:
        return Done()

    def _copied(self, output: Tensor, given: Tensor, *_: Any) -> dist.Work:
        output.copy_(given.view_as(output))
        return Done()

    def _gathered(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> dist.Work:
        for (output,), given in zip(outputs, inputs, strict=True):
            output.copy_(given)
        return Done()

    def _scattered(self, outputs: list[Tensor], inputs: list[list[Tensor]], *_: Any) -> dist.Work:
        return self._gathered([[output] for output in outputs], [given for (given,) in inputs])

    allreduce = allreduce_coalesced = reduce = broadcast = barrier = _unchanged
    allgather, reduce_scatter = _gathered, _scattered  # type: ignore[assignment]
    _allgather_base = _reduce_scatter_base = _copied  # type: ignore[assignment]
    all_gather_single = reduce_scatter_single = _copied  # type: ignore[assignment]  # their names from torch 2.13 on


def alone_group(timeout: timedelta) -> dist.ProcessGroup:
    """Return this process's group of itself. Not collective."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, Alone, devices=["cpu", "cuda"])
    return dist.new_group([dist.get_rank()], backend=NAME, timeout=timeout, use_local_synchronization=True)
