"""Where row i of a parameter lives in the tensors that the optimizer steps.

DeepSpeed gives the client optimizer other tensors than the model's parameters:

    no wrapper (fp32, stage 0)   the parameters themselves
    FP16_UnfusedOptimizer        bf16 at stage 0: an fp32 copy of each parameter
    DeepSpeedZeroOptimizer       stages 1 and 2: one flat fp32 partition per group, this rank's share
    BF16_Optimizer               bf16 at stage 1 with fp32 accumulation: the same kind of partition

A `Piece` is some rows of one parameter inside one such tensor, or a part of one row where a partition boundary cuts it.
A dense parameter is a single row. A `Block` is pieces of equal rows that follow one another, and is stepped at once.
Everything here is local: no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.shard import has_rows
from megatron_switchlora.distributed.slices import row_blocks

# Elements that are stepped at once, which bounds temporary tensors: on the CPU so few that they stay in its cache.
PART, PART_ON_CPU = 1 << 26, 1 << 16


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + rows) of `param`, columns [column, column + width).

    The piece begins at element `offset` of the flattened `master`. The rows' step counters are elements [step_offset,
    step_offset + rows).
    """

    param: nn.Parameter
    master: Tensor
    offset: int
    first_row: int
    rows: int
    column: int
    width: int
    step_offset: int

    def block(self, tensor: Tensor) -> Tensor:
        """Return this piece's [rows, width] view of a tensor shaped like the master."""
        return tensor.view(-1)[self.offset : self.offset + self.rows * self.width].view(self.rows, self.width)

    def source(self, full: Tensor) -> Tensor:
        """Return this piece's [rows, width] view of a tensor shaped like the parameter."""
        by_row = full.reshape(self.row_count(), -1)
        return by_row[self.first_row : self.first_row + self.rows, self.column : self.column + self.width]

    @property
    def start(self) -> int:
        """First element of the piece in the flattened parameter."""
        return self.first_row * self.row_length + self.column

    @property
    def row_length(self) -> int:
        return self.param.numel() // self.row_count()

    def row_count(self) -> int:
        return self.param.size(0) if has_rows(self.param) else 1

    def local_rows(self, rows: Optional[Tensor]) -> Tensor:
        """Return which of the parameter's rows are in this piece, counted from its first.

        `rows` is a CPU tensor; None means all rows.
        """
        if rows is None:
            return torch.arange(self.rows)
        inside = (rows >= self.first_row) & (rows < self.first_row + self.rows)
        return rows[inside] - self.first_row


@dataclass
class Block:
    """Rows of one width that follow one another in a master, with their step counters; `first` is its first piece."""

    first: Piece
    rows: int

    @property
    def head(self) -> int:
        """Which of the LTE heads of this process the rows belong to."""
        return getattr(self.first.param, "head", 0)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the block's [rows, width] view of a tensor shaped like the master."""
        piece = self.first
        return tensor.view(-1)[piece.offset : piece.offset + self.rows * piece.width].view(self.rows, piece.width)

    def steps_of(self, steps: Tensor) -> Tensor:
        """Return the block's part [rows] of a tensor with an entry per step counter of the master."""
        return steps[self.first.step_offset : self.first.step_offset + self.rows]

    def split(self, most: int) -> Iterator[Block]:
        """Yield parts of at most `most` elements, if a row is not longer; a single row is cut."""
        first, rows = self.first, max(1, most // self.first.width)
        if self.rows == 1:
            for at in range(0, first.width, most):
                width = min(most, first.width - at)
                yield Block(replace(first, offset=first.offset + at, column=first.column + at, width=width), 1)
            return
        for at in range(0, self.rows, rows):
            offset, step_offset = first.offset + at * first.width, first.step_offset + at
            yield Block(replace(first, offset=offset, step_offset=step_offset), min(rows, self.rows - at))

    def continues_with(self, piece: Piece) -> bool:
        """Return whether a piece, the next of the master, is more whole rows of the same kind."""
        first = self.first
        ends = piece.offset == first.offset + self.rows * first.width
        alike = has_rows(first.param) == has_rows(piece.param) and self.head == getattr(piece.param, "head", 0)
        return ends and alike and first.width == first.row_length == piece.width == piece.row_length


class RowLayout:
    """The pieces of all parameters on this rank, by master tensor and by parameter, and each master's blocks.

    `partitioned` is true where data-parallel ranks hold different elements.
    """

    def __init__(self) -> None:
        self.by_master: dict[Tensor, list[Piece]] = {}
        self.by_param: dict[nn.Parameter, list[Piece]] = {}
        self.blocks: dict[Tensor, list[Block]] = {}
        self._split: dict[Tensor, list[Block]] = {}
        self.step_counts: dict[Tensor, int] = {}
        self.partitioned = False

    def add(self, param: nn.Parameter, master: Tensor, offset: int, start: int, numel: int) -> None:
        """Add elements [start, start + numel) of the flattened `param`, at `offset` of the flattened `master`."""
        total_rows = param.size(0) if has_rows(param) else 1
        length = param.numel() // total_rows
        for row, column, rows, width in row_blocks(length, start, numel):
            steps = self.step_counts.get(master, 0)
            piece = Piece(param, master, offset, row, rows, column, width, steps)
            self.by_master.setdefault(master, []).append(piece)
            self.by_param.setdefault(param, []).append(piece)
            blocks = self.blocks.setdefault(master, [])
            if blocks and blocks[-1].continues_with(piece):
                blocks[-1].rows += rows
            else:
                blocks.append(Block(piece, rows))
            self.step_counts[master] = steps + rows
            offset += rows * width

    def parts(self, masters: Iterable[Tensor]) -> Iterator[list[Block]]:
        """Yield lists of blocks that cover the masters, each small enough to be stepped at once."""
        part: list[Block] = []
        size = 0
        for master in masters:
            most = PART_ON_CPU if master.device.type == "cpu" else PART
            if master not in self._split:
                self._split[master] = [each for block in self.blocks[master] for each in block.split(most)]
            for block in self._split[master]:
                elements = block.rows * block.first.width
                if part and size + elements > most:
                    yield part
                    part, size = [], 0
                part.append(block)
                size += elements
        if part:
            yield part


def plain_layout(params: Iterable[nn.Parameter]) -> RowLayout:
    """Return a layout in which every parameter is its own master.

    That is PyTorch without DeepSpeed, and DeepSpeed's fp32 stage 0.
    """
    layout = RowLayout()
    for param in params:
        layout.add(param, param, 0, 0, param.numel())
    return layout


def deepspeed_layout(optimizer: object, params: list[nn.Parameter]) -> RowLayout:
    """Return the layout behind the optimizer that `deepspeed.initialize` returned.

    Reads internals of deepspeed 0.19.8.

    Raises:
        TypeError: the optimizer's class is not one of the four above.
    """
    kind = type(optimizer).__name__
    if kind == "FP16_UnfusedOptimizer":
        layout = RowLayout()
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):  # type: ignore[attr-defined]
            for param, master in zip(low, high, strict=True):
                layout.add(param, master, 0, 0, param.numel())
        return layout
    flats = {
        "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
        "BF16_Optimizer": "fp32_groups_flat_partition",
    }
    if kind in flats:
        return _zero_layout(getattr(optimizer, flats[kind]), params)
    if isinstance(optimizer, torch.optim.Optimizer):
        return plain_layout(params)
    raise TypeError(f"No row layout for DeepSpeed's {kind}: this code knows deepspeed 0.19.8's classes.")


def partition_gradients(optimizer: object) -> Optional[list[tuple[Tensor, Tensor]]]:
    """Return (parameter, gradient) of what this rank holds before the step of DeepSpeed's stages 1 and 2.

    Those give the client optimizer one group at a time. For optimizers that give all groups at once the result is None.
    Reads internals of deepspeed 0.19.8.
    """
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer":
        return None
    params, grads = optimizer.params_in_partition, optimizer.averaged_gradients  # type: ignore[attr-defined]
    pairs: list[tuple[Tensor, Tensor]] = []
    for number, group in enumerate(params):
        of_params = (grad for grad in grads[number] if not getattr(grad, "_zero_padding", False))
        pairs += zip(group, of_params, strict=False)
    return pairs


def _zero_layout(flats: list[Tensor], params: list[nn.Parameter]) -> RowLayout:
    layout = RowLayout()
    layout.partitioned = True
    for param in params:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # nothing of it in this rank's partition
            continue
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        layout.add(param, flats[mapping.param_group_index], there.start, here.start, here.numel)
    return layout
