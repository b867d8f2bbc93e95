"""The candidate bank: vectors that wait to be switched in (SwitchLoRA, section 2.2).

One side of a layer has C = min(m, n) candidates, one row each: [C, in] for A, [C, out] for B. The live vectors are
among them. Live row i owns a slot, whose stored copy is stale while the row is live.

Under tensor parallelism the bank of a split factor is split like the factor, [C, local]. The bank of a replicated
factor is split by candidate over the ranks that would hold copies, [C / tp, length]. With spread "dp" candidates are
split over the data-parallel ranks as well.

The candidates of all layers with rows of one length, and with the same ranks that hold the others, are one tensor, a
`Slab`. So the rows of all layers are fetched and put back in one call per slab. Each owner writes its rows into a
buffer of zeros, and one all-reduce over bytes completes it, exactly for every dtype. The bank is no `nn.Parameter`:
DeepSpeed would broadcast rank 0's rows over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import Axis, Split
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.startup.device import is_gpu

Key = tuple[str, int]  # side and layer


@dataclass
class HeldRows:
    """This rank's candidates of one side of a layer: rows [held, local length].

    `split` describes which of the C candidates they are.
    """

    rows: Tensor
    split: Split
    group: Optional[str]
    """The mesh group of ranks that hold the other candidates."""

    @property
    def axis(self) -> Axis:
        """The axis over which the candidates are spread; of one rank if they are not."""
        return self.split.axis if self.split.axis.size > 1 else Axis()


@dataclass
class Slab:
    """Candidates of several sides of layers, one after the other: rows [held, local length].

    Their factors are in one run of the row numbers.
    """

    rows: Tensor
    axis: Axis
    run: int


@dataclass
class Located:
    """Candidates of a slab that are here: their row numbers, and their positions among those asked for.

    Both are numbers of arrays in the step's indices. No positions mean that all candidates asked for are here.
    """

    rows: int
    positions: Optional[int]


@dataclass
class Exchange:
    """Candidates [count, length] of one slab that a step takes, and those that return to it."""

    slab: Slab
    count: int
    taken: Located
    returned: Located


class Fetch:
    """Rows on their way; `result()` has those of each exchange, [count, local length] on the device."""

    def __init__(self, rows: list[Tensor], works: list[dist.Work]) -> None:
        self._rows, self._works = rows, works

    def result(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        self._works = []
        return self._rows


class CandidateBank:
    """Candidates of all switching layers; `location` is "device" or "host", `spread` is "tp" or "dp"."""

    def __init__(self, location: str, spread: str, mesh: Mesh) -> None:
        self.location, self.spread, self.mesh = location, spread, mesh
        self.held: dict[Key, HeldRows] = {}
        self.slabs: list[Slab] = []
        self.device = torch.device("cpu")

    @property
    def group(self) -> Optional[str]:
        """The mesh group of ranks that hold the same candidates; None with spread "dp", which holds none twice."""
        return "dp" if self.spread == "tp" else None

    def _sharing_group(self, factor_split: Optional[Split]) -> Optional[str]:
        """Return the mesh group over which the candidates of a factor are spread."""
        whole = factor_split is None  # replicated: every tensor-parallel rank would hold a copy
        if self.spread == "dp":
            return "head" if whole else "dp"
        return "tp" if whole else None

    def add(
        self, side: str, layer: int, vectors: Tensor, factor_split: Optional[Split], like: Optional[Tensor] = None
    ) -> None:
        """Store this rank's share of a layer's candidates [C, full length].

        It is at once on the device and in the precision of `like`, or with location "host" in that precision, so that
        the host never holds all candidates as they are drawn.
        """
        group = self._sharing_group(factor_split)
        split = Split(0, len(vectors), self.mesh.axis(group) if group else Axis())
        local = vectors if factor_split is None else factor_split.take(vectors)
        like = vectors if like is None else like
        device = vectors.device if self.location == "host" else like.device
        rows = split.take(local).to(device, like.dtype, copy=True, memory_format=torch.contiguous_format)
        self.held[side, layer] = HeldRows(rows, split, group)

    def place(self, dtype: torch.dtype, device: torch.device, order: Sequence[Sequence[Key]]) -> None:
        """Form the slabs in the factors' precision, at the bank's location; fetched rows go to `device`.

        `order` names the sides of layers in each run of the row numbers.
        """
        self.device, self.order = device, {key: number for number, key in enumerate(chain(*order))}
        members = [
            (run, list(same))
            for run, keys in enumerate(order)
            for _, same in groupby((self.held[key] for key in keys), key=lambda held: held.axis)
        ]
        self.slabs = [self._slab(run, same, dtype) for run, same in members]
        every = [held for _, same in members for held in same]
        self._slab_of = np.repeat(np.arange(len(members)), [len(same) for _, same in members])
        firsts = [np.cumsum([0, *(len(held.rows) for held in same[:-1])]) for _, same in members]
        self._first = np.concatenate(firsts)
        self._start = np.array([held.split.start for held in every])
        self._real = np.array([held.split.real for held in every])

    def _slab(self, run: int, members: list[HeldRows], dtype: torch.dtype) -> Slab:
        """Move the members' rows into one tensor, of which they become views."""
        on_host = self.location == "host" and self.device.type != "meta"
        counts = [len(held.rows) for held in members]
        rows = torch.empty(
            (sum(counts), members[0].rows.size(1)), dtype=dtype, device="cpu" if on_host else self.device,
            pin_memory=on_host and is_gpu(self.device),
        )  # fmt: skip
        for held, part in zip(members, rows.split(counts), strict=True):
            held.rows = part.copy_(held.rows)
        return Slab(rows, members[0].axis, run)

    def exchanges(self, keys: np.ndarray, new: np.ndarray, old: np.ndarray, indices: Indices) -> list[Exchange]:
        """Return what to fetch and put back where live rows take slots `new` and return to slots `old`.

        `keys` are places in `order`, sorted, one per row.
        """
        bounds = [*np.searchsorted(self._slab_of[keys], np.arange(len(self.slabs))).tolist(), len(keys)]
        return [
            Exchange(slab, end - begin, *(self._locate(keys[begin:end], s[begin:end], indices) for s in (new, old)))
            for slab, begin, end in zip(self.slabs, bounds, bounds[1:], strict=False)
            if begin < end
        ]

    def _locate(self, keys: np.ndarray, slots: np.ndarray, indices: Indices) -> Located:
        local = slots - self._start[keys]
        here = (local >= 0) & (local < self._real[keys])
        rows = self._first[keys] + local
        if here.all():
            return Located(indices.add(rows), None)
        return Located(indices.add(rows[here]), indices.add(np.flatnonzero(here)))

    def put_back(self, exchange: Exchange, old: Tensor, indices: Indices) -> None:
        """Store the vectors [count, local length] that stop being live in their own slots, where held."""
        rows, where = exchange.slab.rows, exchange.returned
        values = old if where.positions is None else old.index_select(0, indices[where.positions])
        rows.index_copy_(0, self._rows_of(where, rows, indices), values.to(rows.device))

    def fetch(self, exchanges: Sequence[Exchange], indices: Indices) -> Fetch:
        """Start fetching the rows of the new slots; call it after the last step's `put_back`.

        Collective: one all-reduce, for all layers together, per axis over which candidates are spread.
        """
        rows = [self._local_rows(exchange, indices) for exchange in exchanges]
        shared: dict[Axis, list[int]] = {}
        for number, exchange in enumerate(exchanges):
            if exchange.slab.axis.size > 1:
                shared.setdefault(exchange.slab.axis, []).append(number)
        return Fetch(rows, [self._complete(rows, numbers, axis) for axis, numbers in shared.items()])

    @staticmethod
    def _rows_of(where: Located, rows: Tensor, indices: Indices) -> Tensor:
        return indices[where.rows] if rows.device.type != "cpu" else indices.on_host(where.rows)

    def _local_rows(self, exchange: Exchange, indices: Indices) -> Tensor:
        """Return the rows of the new slots on the device, with zeros for those held elsewhere."""
        held, where = exchange.slab.rows, exchange.taken
        numbers = self._rows_of(where, held, indices)
        out = held.new_empty(len(numbers), held.size(1), pin_memory=True) if held.is_pinned() else None
        rows = torch.index_select(held, 0, numbers, out=out).to(self.device, non_blocking=True)
        if where.positions is None:
            return rows
        return rows.new_zeros(exchange.count, rows.size(1)).index_copy_(0, indices[where.positions], rows)

    def _complete(self, rows: list[Tensor], numbers: list[int], axis: Axis) -> dist.Work:
        """Start summing the ranks' bytes: every row is zero except on its owner.

        Replaces `rows` by views of the buffer.
        """
        flat = torch.cat([rows[number].reshape(-1) for number in numbers])
        pieces = flat.split([rows[number].numel() for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            rows[number] = piece.view(rows[number].shape)
        work = dist.all_reduce(flat.view(torch.uint8), group=axis.group, async_op=True)
        assert work is not None
        return work

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of all candidates held here, in a fixed order."""
        for (side, layer), held in sorted(self.held.items()):
            yield f"bank_{side}.{layer}", held.rows

    def num_bytes(self) -> int:
        """Return the bytes of the candidates on this rank."""
        return sum(held.rows.numel() * held.rows.element_size() for held in self.held.values())
