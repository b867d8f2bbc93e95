"""Apply the switches of all layers at once: fold the differences into W, so that the function does not change.

A's row i to slot j (B's switch mirrors it):

    W += s B[:, i] (A_old - A_new);  bank[slot of i] = A_old;  A[i] = A_new

The difference is formed from the rows as the forward pass uses them, the low-precision ones under bf16, and added to
the fp32 W. Rows of one length of all layers are one matrix, and W's of one shape are one stack. Per length there is one
gather and one scatter, and per shape one batched product, which adds A's and B's changes of each layer:

    W_l += s left_l^T right_l,  left [layers, width, out], right [layers, width, in]

A layer with fewer changes than `width` is padded with rows of zeros, which add exactly nothing. Where the rows of W are
spread over ranks, `left` has the columns of this rank's rows. All indices are made on the host a step ahead (`tables`).
Under tensor parallelism everything is local: the rows are this rank's shards. The caller handles the optimizer's state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_switchlora.lowrank.bank import CandidateBank, Exchange
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.rows import RowNumbers, joined
from megatron_switchlora.lowrank.schedule import OTHER, StepPlan

MOST_PRODUCTS = 4  # per shape; layers between two that change then take part, with zeros


@dataclass
class RunRows:
    """Rows of one length: `picked` are the switched ones, then their counterparts, sorted by number."""

    run: int
    picked: int
    switched: int
    counterparts: int


@dataclass
class Fold:
    """Changes of the layers of one shape; `left` and `right` choose rows of two runs, `width` for each layer."""

    layers: list[LowRankLinear]
    spans: list[tuple[int, int]]
    width: int
    left: tuple[int, int]
    right: tuple[int, int]


@dataclass
class StepTables:
    """What a step's switches need: the numbers of the rows that change, sorted, and index arrays for the device."""

    switched: np.ndarray
    counterparts: np.ndarray
    exchanges: list[Exchange] = field(default_factory=list)
    runs: list[RunRows] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)


def spans_of(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Return at most `most` ranges that cover all places with a count; the smallest gaps are closed."""
    places = np.flatnonzero(counts)
    gaps = np.diff(places)
    cuts = np.sort(np.argsort(-gaps, kind="stable")[: most - 1])
    cuts = cuts[gaps[cuts] > 1]
    begins, ends = places[[0, *(cuts + 1)]], places[[*cuts, -1]] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def inverse(order: np.ndarray) -> np.ndarray:
    """Return the place of each item in a permutation."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


@dataclass
class Stack:
    """Layers, by number, whose W's have one shape and are one tensor; `left` and `right` are the runs of B and A."""

    numbers: np.ndarray
    layers: list[LowRankLinear]
    left: int
    right: int

    def fold(self, place: np.ndarray, rows: dict[str, np.ndarray], zeros: np.ndarray, indices: Indices) -> Fold:
        """Return the fold of changes to the layers at `place` (sorted); `rows` are those of "left" and "right".

        Row `zeros[run]` of a run is zero. It fills up the layers with fewer changes.
        """
        count = np.bincount(place, minlength=len(self.layers))
        column = np.arange(len(place)) - (np.cumsum(count) - count)[place]
        spans, width, chosen = spans_of(count, MOST_PRODUCTS), int(count.max()), {}
        for side, run in (("left", self.left), ("right", self.right)):
            table = np.full((len(self.layers), width), zeros[run])
            table[place, column] = rows[side]
            chosen[side] = run, indices.add(np.concatenate([table[begin:end].ravel() for begin, end in spans]))
        return Fold(self.layers, spans, width, **chosen)


class LayerSwitcher:
    """Switch rows of `linears`, whose factors are numbered by `numbers`, against a bank that has been placed."""

    def __init__(self, linears: list[LowRankLinear], numbers: RowNumbers, bank: CandidateBank) -> None:
        self.bank, self.numbers = bank, numbers
        factors = {"A": [x.lora_A for x in linears], "B": [x.lora_B for x in linears]}
        self.first = {s: np.array([numbers.start[f] for f in fs], dtype=np.int64) for s, fs in factors.items()}
        begins = [run.first for run in numbers.runs]
        self.run_of = {s: np.searchsorted(begins, rows, side="right") - 1 for s, rows in self.first.items()}
        self.key = {s: np.array([bank.order[s, layer] for layer in range(len(linears))]) for s in factors}
        alike: dict[tuple, list[int]] = {}
        for layer, linear in enumerate(linears):
            runs = self.run_of["B"][layer], self.run_of["A"][layer]
            alike.setdefault((*runs, linear.scaling, *linear.shape), []).append(layer)
        self.stacks = [
            Stack(np.array(layers), [linears[layer] for layer in layers], int(left), int(right))
            for (left, right, *_), layers in alike.items()
        ]
        for stack in self.stacks:
            joined([linear.weight for linear in stack.layers])

    def numbers_of(self, chosen: dict[str, np.ndarray]) -> np.ndarray:
        """Return the sorted numbers of the rows that masks [layers, rank] per side choose."""
        mask = np.zeros(self.numbers.count, dtype=bool)
        for side, of_side in chosen.items():
            mask[self.first[side][:, None] + np.arange(of_side.shape[1])] = of_side
        return np.flatnonzero(mask)

    def tables(self, plan: StepPlan, indices: Indices) -> StepTables:
        """Return the tables of a step; their index arrays are added to `indices`."""
        nothing = np.zeros(0, dtype=np.int64)
        if not plan.switches:
            return StepTables(nothing, nothing)
        switches = plan.switches
        counts = [len(switch.positions) for switch in switches]
        positions = np.concatenate([switch.positions for switch in switches])
        layers = np.repeat([switch.layer for switch in switches], counts)
        of_A = np.repeat([switch.side == "A" for switch in switches], counts)

        def of(values: dict[str, np.ndarray], own: bool) -> np.ndarray:
            return np.where(of_A == own, values["A"][layers], values["B"][layers])

        rows, others = of(self.first, True) + positions, of(self.first, False) + positions
        order, other_order = np.argsort(rows), np.argsort(others)
        tables = StepTables(rows[order], others[other_order])
        new, old = (np.concatenate([getattr(s, f"{kind}_slots") for s in switches])[order] for kind in ("new", "old"))
        tables.exchanges = self.bank.exchanges(of(self.key, True)[order], new, old, indices)
        places = inverse(order), inverse(other_order)
        self._add_runs(tables, indices)
        self._add_folds(tables, indices, layers, of_A, *places)
        return tables

    def _add_runs(self, tables: StepTables, indices: Indices) -> None:
        ends, other_ends = self.numbers.bounds(tables.switched), self.numbers.bounds(tables.counterparts)
        for number, run in enumerate(self.numbers.runs):
            switched = tables.switched[ends[number] : ends[number + 1]]
            counterparts = tables.counterparts[other_ends[number] : other_ends[number + 1]]
            picked = indices.add(np.concatenate([switched, counterparts]) - run.first)
            tables.runs.append(RunRows(number, picked, len(switched), len(counterparts)))

    def _add_folds(
        self, tables: StepTables, indices: Indices, layers: np.ndarray, of_A: np.ndarray,
        places: np.ndarray, other_places: np.ndarray,
    ) -> None:  # fmt: skip
        """Add the folds; `places` are those of each change's rows among all switched and all counterparts."""
        sizes = np.array([[run.switched, run.counterparts] for run in tables.runs])
        begins = np.cumsum(sizes, axis=0) - sizes
        sides = {True: "A", False: "B"}
        own, other = np.empty_like(places), np.empty_like(places)  # in the rows of a run: switched, then counterparts
        for is_A, side in sides.items():
            chosen = of_A == is_A
            run, opposite = self.run_of[side][layers[chosen]], self.run_of[OTHER[side]][layers[chosen]]
            own[chosen] = places[chosen] - begins[run, 0]
            other[chosen] = sizes[opposite, 0] + other_places[chosen] - begins[opposite, 1]
        rows = {"left": np.where(of_A, other, own), "right": np.where(of_A, own, other)}
        count = np.bincount(layers, minlength=len(self.first["A"]))
        for stack in self.stacks:
            for single in (False, True):  # a product of one row rounds in another order than a padded one
                chosen = np.flatnonzero(np.isin(layers, stack.numbers) & ((count[layers] == 1) == single))
                chosen = chosen[np.argsort(layers[chosen], kind="stable")]  # within a layer the order of the plan
                if len(chosen):
                    place = np.searchsorted(stack.numbers, layers[chosen])
                    of_fold = {side: each[chosen] for side, each in rows.items()}
                    tables.folds.append(stack.fold(place, of_fold, sizes.sum(1), indices))

    @torch.no_grad()
    def apply(self, tables: StepTables, fetched: list[Tensor], indices: Indices) -> list[Tensor]:
        """Switch to the fetched rows in the factors, the bank and W; return the new rows of each run."""
        new: list[Tensor] = []
        changes: list[Tensor] = []
        for number, rows in enumerate(tables.runs):
            pairs = zip(tables.exchanges, fetched, strict=True)
            own = [(exchange, arrived) for exchange, arrived in pairs if exchange.slab.run == number]
            exchanges, arrived = [exchange for exchange, _ in own], [each for _, each in own]
            new.append(arrived[0] if len(own) == 1 else torch.cat(arrived) if own else torch.empty(0))
            changes.append(self._exchange(rows, exchanges, new[-1], indices))
        for fold in tables.folds:
            self._fold(fold, changes, indices)
        return new

    def _exchange(self, rows: RunRows, exchanges: list[Exchange], new: Tensor, indices: Indices) -> Tensor:
        """Exchange the switched rows of a run with the bank.

        Returns the differences old - new, the counterparts, and a row of zeros, in W's precision.
        """
        if not rows.switched + rows.counterparts:
            return torch.empty(0)
        matrix, picked = joined(self.numbers.runs[rows.run].params), indices[rows.picked]
        old = matrix.index_select(0, picked)
        changes = old.new_zeros(len(old) + 1, old.size(1), dtype=self.stacks[0].layers[0].weight.dtype)
        changes[:-1].copy_(old)
        if rows.switched:
            for exchange, part in zip(exchanges, old[: rows.switched].split([e.count for e in exchanges]), strict=True):
                self.bank.put_back(exchange, part, indices)
            matrix.index_copy_(0, picked[: rows.switched], new)
            changes[: rows.switched].sub_(new)
        return changes

    @staticmethod
    def _fold(fold: Fold, changes: list[Tensor], indices: Indices) -> None:
        """Add the changes of the layers of one shape to their W."""
        first = fold.layers[0]
        stack = joined([linear.weight for linear in fold.layers]).view(-1, *first.weight.shape)
        left, right = (
            changes[run].index_select(0, indices[chosen]).view(-1, fold.width, length)
            for (run, chosen), length in zip((fold.left, fold.right), first.shape, strict=True)
        )
        if first.owned is not None:
            left = replace(first.owned, dim=2).take(left)
        at = 0
        for begin, end in fold.spans:
            part = slice(at, at + end - begin)
            stack[begin:end].baddbmm_(left[part].transpose(1, 2), right[part], alpha=first.scaling)
            at = part.stop
