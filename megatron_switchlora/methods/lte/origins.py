"""Keep a layer's origin in host memory, and bring the origins of all layers to the device one ahead.

On a GPU the memory is pinned, and the next layer's rows are copied in a stream of their own while a layer is merged. So
a merge waits for its first layer alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Optional

import torch
from torch import Tensor

from megatron_switchlora.distributed.shard import Axis, Split
from megatron_switchlora.methods.base import host_copy
from megatron_switchlora.startup.device import is_gpu, pinned


class Origin:
    """A layer's matrix [out, in] in host memory, once per head: its data ranks hold different rows."""

    def __init__(self, matrix: Tensor, dp: Axis) -> None:
        self.split, self.device = Split(0, matrix.size(0), dp), matrix.device
        self.rows = pinned(host_copy(self.split.take(matrix)), self.device)

    def store(self, matrix: Tensor) -> None:
        self.rows.copy_(self.split.take(matrix))

    def subtract(self, product: Tensor) -> None:
        self.rows.sub_(self.split.take(product).to(self.rows.device))

    def plus(self, product: Tensor, rows: Optional[Tensor] = None) -> Tensor:
        """Return the sum of the matrix and a product, on the device; `rows` if they are there. Collective over dp."""
        rows = self.rows.to(self.device) if rows is None else rows
        return self.split.gather(rows + self.split.take(product))


def uploaded(origins: Iterable[Origin], device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of each origin on the device, where the next one's are on their way."""
    if not is_gpu(device):
        yield from (origin.rows for origin in origins)
        return
    stream = torch.Stream(device)
    coming: deque[tuple[Tensor, torch.Event]] = deque()
    for origin in origins:
        with stream:
            coming.append((origin.rows.to(device, non_blocking=True), stream.record_event()))
        if len(coming) > 1:
            yield arrived(*coming.popleft())
    while coming:
        yield arrived(*coming.popleft())


def arrived(rows: Tensor, event: torch.Event) -> Tensor:
    """Let the current stream wait for rows from another one; the host does not wait."""
    current = torch.accelerator.current_stream(rows.device)
    current.wait_event(event)
    rows.record_stream(current)
    return rows
