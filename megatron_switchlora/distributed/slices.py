"""What this rank holds of a tensor, in the coordinates of the whole tensor.

A `TensorSlice` is a box of a full, unpadded tensor, and a view of the live memory that holds it here. Checkpoints save
and fill slices, whatever the mesh. A tensor-parallel shard is one slice. ZeRO's flat partition holds at most three
boxes of a matrix, and each of them is one.

`group` names the mesh group of ranks that hold the same slice ("tp", "dp", "head"; None: this rank alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

from torch import Tensor, nn

from megatron_switchlora.distributed.shard import Split, full_shape, is_split


@dataclass(frozen=True)
class TensorSlice:
    """The box at `offset` of a tensor `name` whose full shape is `shape`; `tensor` holds it."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    group: Optional[str]


def _unpadded(block: Tensor, offset: list[int], split: Split) -> Tensor:
    """Return a block that lies at `offset` of this rank's shard without its padding; make `offset` global."""
    dim = split.dim
    keep = max(0, min(offset[dim] + block.size(dim), split.real) - offset[dim])
    offset[dim] += split.start
    return block.narrow(dim, 0, keep)


def shard_slice(name: str, local: Tensor, splits: Iterable[Split], group: Optional[str]) -> TensorSlice:
    """Return the slice that this rank's whole shard is; `splits` describe how the dimensions were cut."""
    shape, offset = list(local.shape), [0] * local.dim()
    for split in splits:
        local = _unpadded(local, offset, split)
        shape[split.dim] = split.size
    return TensorSlice(name, tuple(shape), tuple(offset), local, group)


def parameter_slice(
    name: str, param: nn.Parameter, group: Optional[str], value: Optional[Tensor] = None
) -> TensorSlice:
    """Return all that this rank holds of a parameter, or of another `value` shaped and split like it."""
    shard: Optional[Split] = param.shard  # type: ignore[attr-defined]
    return shard_slice(name, param.data if value is None else value, filter(None, [shard]), group)


def replica_group(param: nn.Parameter) -> str:
    """Return the mesh group of one head's ranks that hold the same shard of a parameter."""
    return "dp" if is_split(param) else "head"


def row_blocks(length: int, start: int, numel: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the range [start, start + numel) of a flattened tensor with rows of this length, as blocks.

    A block is (row, column, rows, width): a part of a row, whole rows, or a part of a row.
    """
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
    """Yield the slices of a tensor shaped like `param`; `flat` holds its flattened local elements from `start` on."""
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
