"""Record what this process hands to collectives, at the process group itself.

While installed, the recorder wraps the collective methods of torch's `ProcessGroup` class, which `torch.distributed`
and DeepSpeed both call. It counts operation, group, dtype and the bytes of this rank's input; nothing is computed from
sizes of the model.

The trainer names the current phase ("gradient" around the backward pass). The bytes that the dp group was handed in
that phase are a step's data-parallel gradient bytes. Calls on a group of one rank move nothing and are not counted.
Collectives issued from C++, as by torch's own DDP, would not be seen; DeepSpeed issues its own from Python. `watch`, if
set, is called with every tensor that is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist

# Position of this rank's input tensors among each method's arguments (self not counted).
INPUT_ARGUMENT = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "reduce": 0,
    "broadcast": 0,
    "allgather": 1,
    "_allgather_base": 1,
    "all_gather_single": 1,
    "all_gather_single_coalesced": 1,
    "allgather_coalesced": 1,
    "allgather_into_tensor_coalesced": 1,
    "reduce_scatter": 1,
    "_reduce_scatter_base": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_single_coalesced": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "alltoall": 1,
    "alltoall_base": 1,
    "all_to_all_single": 1,
    "gather": 1,
    "scatter": 1,
    "send": 0,
}


@dataclass(frozen=True)
class Record:
    """The key by which bytes and calls are counted."""

    phase: str
    group: str
    op: str
    dtype: str


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class CommRecorder:
    """Count `bytes[Record]` and `calls[Record]` since the last `clear`; a context manager."""

    def __init__(self) -> None:
        self.watch: Optional[Callable[[Record, torch.Tensor], None]] = None
        self.bytes: Counter[Record] = Counter()
        self.calls: Counter[Record] = Counter()
        self._phase = "other"
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> CommRecorder:
        for op in INPUT_ARGUMENT:
            if op in vars(dist.ProcessGroup):  # the raw attribute: the result of getattr would lose its binding
                self._originals[op] = vars(dist.ProcessGroup)[op]
                setattr(dist.ProcessGroup, op, self._wrapped(op, getattr(dist.ProcessGroup, op)))
        return self

    def __exit__(self, *exc: object) -> None:
        for op, original in self._originals.items():
            setattr(dist.ProcessGroup, op, original)
        self._originals.clear()

    def _wrapped(self, op: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                index = INPUT_ARGUMENT[op]
                given = args[index] if index < len(args) else list(kwargs.values())[index - len(args)]
                tensors = list(_tensors(given))
                for position, tensor in enumerate(tensors):
                    record = Record(self._phase, group.group_name, op, str(tensor.dtype).removeprefix("torch."))
                    self.bytes[record] += tensor.numel() * tensor.element_size()
                    self.calls[record] += position == 0
                    if self.watch is not None:
                        self.watch(record, tensor)
            return original(group, *args, **kwargs)

        return call

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of the collectives inside."""
        previous, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = previous

    def total(self, phase: Optional[str] = None, group: Optional[dist.ProcessGroup] = None) -> int:
        """Return the bytes of a phase on a group since the last `clear`."""
        return sum(
            count
            for record, count in self.bytes.items()
            if (phase is None or record.phase == phase) and (group is None or record.group == group.group_name)
        )

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()
