"""A frozen W whose rows are spread over data-parallel ranks, and the whole W + s B A, gathered once per step.

Each rank owns a block of rows of W [out, in]. It folds changes into them and forms its rows of W_eff = W + s B A, all
from its columns of B and the whole A. One all-gather per matrix makes W_eff whole. Blocks begin at multiples of `TILE`,
so that the gathered blocks are the matrix, with all padding at its end. Products over such blocks gave the same bits as
over the whole matrix on the CPUs that were tried (fp32 and bf16, blocks of 2 rows and more; of 1 row they did not).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.shard import Axis, Split

TILE = 16


@dataclass(frozen=True)
class RowBlocks(Split):
    """A split whose cuts are multiples of `multiple`; the last ranks' blocks may be padding alone."""

    @property
    def share(self) -> int:
        return self.local


def spread_rows(rows: int, axis: Axis) -> RowBlocks:
    """Return how the rows of a rank's W are spread over an axis."""
    return RowBlocks(0, rows, axis, TILE)


class GatheredMatrix:
    """A matrix [out, in] that ranks form by rows: `own` are this rank's, `whole` is the matrix after `gather`.

    The memory is used again for each gather.
    """

    def __init__(self, rows: RowBlocks, columns: int, like: Tensor) -> None:
        self._group = rows.axis.group
        self.memory = like.new_zeros(rows.local * rows.axis.size, columns)
        self.own = self.memory.narrow(0, rows.start, rows.local)
        self.whole = self.memory.narrow(0, 0, rows.size)

    def gather(self) -> dist.Work:
        """Start to exchange the ranks' rows. Collective over the axis."""
        work = dist.all_gather_into_tensor(self.memory, self.own, group=self._group, async_op=True)
        assert work is not None
        return work


def wait_for(works: list[dist.Work]) -> None:
    """Wait until all exchanges are done; on a GPU its stream waits, not the host."""
    for work in works:
        work.wait()
