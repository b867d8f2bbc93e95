"""The vectors of all adapters, numbered through: rows of one length are one matrix.

A method orders its factors by row length (`in_row_order`). So ZeRO's flat buffers hold all rows of one length as one
matrix, and so do its masters. A switch of all layers is then a few calls per length, whatever the number of layers.
`RowNumbers` gives every row a number in this order. `joined` returns tensors that follow one another in memory as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.shard import has_rows


def in_row_order(factors: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the factors by row length, those of a head and of a kind of shard together."""
    return sorted(factors, key=lambda p: (p.size(1), p.head, p.shard is not None))  # type: ignore[attr-defined]


def adjacent(tensors: Sequence[Tensor]) -> Optional[Tensor]:
    """Return the tensors, equal but for dimension 0, as one view if they follow one another in memory, else None."""
    first = tensors[0]
    storage, end = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.storage_offset() != end or tensor.untyped_storage()._cdata != storage:
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


@torch.no_grad()
def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors, equal but for dimension 0, as one; they become views of it unless they are already."""
    found = adjacent(tensors)
    if found is not None:
        return found
    first = tensors[0]
    whole = first.new_empty(sum(len(tensor) for tensor in tensors), *first.shape[1:])
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part.copy_(tensor.data)
    return whole


@dataclass
class Run:
    """Factors of one length and one group of the optimizer that follow one another: rows [first, first + count)."""

    first: int
    params: list[nn.Parameter] = field(default_factory=list)
    count: int = 0


class RowNumbers:
    """Numbers of the rows of the factors in the optimizer's groups, in their order; `start` is each factor's first."""

    def __init__(self, groups: Iterable[Iterable[nn.Parameter]]) -> None:
        self.start: dict[nn.Parameter, int] = {}
        self.runs: list[Run] = []
        self.count = 0
        for group in groups:
            previous: Optional[nn.Parameter] = None
            for param in filter(has_rows, group):
                if previous is None or previous.shape[1:] != param.shape[1:]:
                    self.runs.append(Run(self.count))
                self.start[param] = self.count
                self.runs[-1].params.append(param)
                self.runs[-1].count += len(param)
                self.count += len(param)
                previous = param

    def bounds(self, rows: np.ndarray) -> list[int]:
        """Return where each run begins in sorted row numbers, and their end."""
        return [*np.searchsorted(rows, [run.first for run in self.runs]).tolist(), len(rows)]
