"""What this rank holds of a tensor, in the coordinates of the whole.

A `TensorSlice` is a box of a full, unpadded tensor and the live memory that holds it here: `tensor` is a view of
it, shaped like the box. Checkpoints save slices and fill slices, whatever the mesh: a tensor-parallel shard
is one, and so is each of the at most three boxes that ZeRO's flat partition holds of a matrix. `group`
names the mesh group of ranks that hold the same slice ("tp", "dp", "head"; None: this rank alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

from torch import Tensor, nn

from megatron_switchlora.distributed.shard import Split, full_shape, is_split


@dataclass(frozen=True)
class TensorSlice:
    """`tensor` holds the box at `offset` of a tensor `name` of this full `shape`."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    group: Optional[str]


def _unpadded(block: Tensor, offset: list[int], split: Split) -> Tensor:
    """A block that lies at `offset` of this rank's shard without what of it is padding; `offset` becomes global."""
    dim = split.dim
    keep = max(0, min(offset[dim] + block.size(dim), split.real) - offset[dim])
    offset[dim] += split.start
    return block.narrow(dim, 0, keep)


def shard_slice(name: str, local: Tensor, splits: Iterable[Split], group: Optional[str]) -> TensorSlice:
    """The slice that this rank's whole block of a tensor is; `splits` say how its dimensions were cut."""
    shape, offset = list(local.shape), [0] * local.dim()
    for split in splits:
        local = _unpadded(local, offset, split)
        shape[split.dim] = split.size
    return TensorSlice(name, tuple(shape), tuple(offset), local, group)


def parameter_slice(
    name: str, param: nn.Parameter, group: Optional[str], value: Optional[Tensor] = None
) -> TensorSlice:
    """All that this rank holds of a parameter, or of another `value` shaped and split like it."""
    shard: Optional[Split] = param.shard  # type: ignore[attr-defined]
    return shard_slice(name, param.data if value is None else value, filter(None, [shard]), group)


def replica_group(param: nn.Parameter) -> str:
    """The mesh group of one head's ranks that hold the same of a parameter."""
    return "dp" if is_split(param) else "head"


def row_blocks(length: int, start: int, numel: int) -> Iterator[tuple[int, int, int, int]]:
    """The range [start, start + numel) of a flattened tensor with rows of this length, as blocks (row, column, rows,
    width): a part of a row, whole rows, a part of a row."""
    position, end = start, start + numel
    while position < end:
        row, column = divmod(position, length)
        whole = (end - position) // length if column == 0 else 0
        width = length if whole else min(length - column, end - position)
        rows = max(1, whole)
        yield row, column, rows, width
        position += rows * width


def flat_slices(
    name: str, param: nn.Parameter, start: int, flat: Tensor, group: Optional[str]
) -> Iterator[TensorSlice]:
    """The slices of a tensor shaped like `param`; `flat` holds the flattened local elements from `start` on."""
    shard: Optional[Split] = param.shard  # type: ignore[attr-defined]
    shape, done = tuple(full_shape(param)), 0
    for row, column, rows, width in row_blocks(param.size(-1), start, flat.numel()):
        block = flat[done : done + rows * width]
        done += rows * width
        block, offset = (block.view(rows, width), [row, column]) if param.dim() == 2 else (block, [column])
        if shard is not None:
            block = _unpadded(block, offset, shard)
        if block.numel():
            yield TensorSlice(name, shape, tuple(offset), block, group)
