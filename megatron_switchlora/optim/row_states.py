"""Rows of all adapters in the optimizer's tensors, changed at once by their numbers (`lowrank/rows.py`).

A `Segment` is rows with consecutive numbers that follow one another in the masters here. With masters of their own all
factors of a run are one segment: masters and state become views of one tensor. In ZeRO's flat partition a segment is a
block: the whole rows of a run that are here, or a part of a row that a boundary cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.rows import RowNumbers, Run, joined
from megatron_switchlora.optim.layout import Block, RowLayout

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Segment:
    """Rows [first, first + rows) of a run, columns from `column` on; tensors [rows, width], `steps` [rows].

    `master` is None where the parameters themselves are stepped.
    """

    run: int
    first: int
    rows: int
    column: int
    master: Optional[Tensor]
    moments: tuple[Tensor, Tensor]
    steps: Tensor


@dataclass
class Rewritten:
    """Rows of a segment to copy from the new rows [begin, end) of its run; `rows` is an array of indices."""

    segment: Segment
    begin: int
    end: int
    rows: int


@dataclass
class RowChanges:
    """What a step does to rows by number; the integers are arrays of the step's indices."""

    rewritten: list[Rewritten] = field(default_factory=list)
    reset: list[tuple[Segment, int]] = field(default_factory=list)
    frozen: list[tuple[Block, int]] = field(default_factory=list)


def ranges(rows: np.ndarray, firsts: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (place, begin, end) of each range [first, first + count) that holds some of the sorted rows."""
    starts = np.asarray(firsts, dtype=np.int64)
    begins, ends = np.searchsorted(rows, starts), np.searchsorted(rows, starts + np.asarray(counts, dtype=np.int64))
    return [(int(place), int(begins[place]), int(ends[place])) for place in np.flatnonzero(ends > begins)]


class RowStates:
    """The rows of `numbers` in the masters of a layout and in their state."""

    def __init__(self, numbers: RowNumbers, layout: RowLayout, state: Mapping[Any, dict[str, Tensor]]) -> None:
        self.numbers = numbers
        self.blocks = [
            (numbers.start[block.first.param] + block.first.first_row, block)
            for blocks in layout.blocks.values()
            for block in blocks
            if block.first.param in numbers.start
        ]
        self.segments = [
            segment for number, run in enumerate(numbers.runs) for segment in self._segments(number, run, layout, state)
        ]

    def _segments(
        self, number: int, run: Run, layout: RowLayout, state: Mapping[Any, dict[str, Tensor]]
    ) -> list[Segment]:
        pieces = [piece for param in run.params for piece in layout.by_param.get(param, [])]
        masters = [piece.master for piece in pieces]
        if [master.numel() for master in masters] == [param.numel() for param in run.params]:
            states = [state[master] for master in masters]
            parameters = masters[0] is run.params[0]
            average, square = (joined([each[key] for each in states]).view(run.count, -1) for key in MOMENTS)
            steps = joined([each["row_step"] for each in states])
            master = None if parameters else joined(masters).view(run.count, -1)
            return [Segment(number, run.first, run.count, 0, master, (average, square), steps)]
        segments = []
        for first, block in self.blocks:
            if run.first <= first < run.first + run.count:
                held = state[block.first.master]
                moments = (block.of(held["exp_avg"]), block.of(held["exp_avg_sq"]))
                steps, master = block.steps_of(held["row_step"]), block.of(block.first.master.data)
                segments.append(Segment(number, first, block.rows, block.first.column, master, moments, steps))
        return segments

    def plan(self, rewritten: np.ndarray, reset: np.ndarray, frozen: np.ndarray, indices: Indices) -> RowChanges:
        """Return what to do with rows by number, each array sorted; index arrays are added to `indices`."""
        firsts, counts = [each.first for each in self.segments], [each.rows for each in self.segments]
        offsets, changes = self.numbers.bounds(rewritten), RowChanges()
        for place, begin, end in ranges(rewritten, firsts, counts):
            segment = self.segments[place]
            if segment.master is not None:
                rows, at = indices.add(rewritten[begin:end] - segment.first), offsets[segment.run]
                changes.rewritten.append(Rewritten(segment, begin - at, end - at, rows))
        for place, begin, end in ranges(reset, firsts, counts):
            rows = indices.add(reset[begin:end] - firsts[place])
            changes.reset.append((self.segments[place], rows))
        starts, lengths = [first for first, _ in self.blocks], [block.rows for _, block in self.blocks]
        for place, begin, end in ranges(frozen, starts, lengths):
            changes.frozen.append((self.blocks[place][1], indices.add(frozen[begin:end] - starts[place])))
        return changes

    @staticmethod
    @torch.no_grad()
    def apply(changes: RowChanges, new: Sequence[Tensor], indices: Indices) -> None:
        """Copy the new rows of each run to the masters, then zero the state of the rows to reset."""
        for each in changes.rewritten:
            master = each.segment.master
            assert master is not None
            values = new[each.segment.run][each.begin : each.end]
            values = values.narrow(1, each.segment.column, master.size(1)).to(master.dtype)
            master.index_copy_(0, indices[each.rows], values)
        for segment, number in changes.reset:
            for tensor in (*segment.moments, segment.steps):
                tensor.index_fill_(0, indices[number], 0.0)
