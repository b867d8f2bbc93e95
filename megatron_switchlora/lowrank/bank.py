"""The candidate bank: vectors that wait to be switched in (SwitchLoRA, section 2.2).

One side of a layer has C = min(m, n) candidates, one row each: [C, in] for A, [C, out] for B. The live vectors are
among them. Live row i owns a slot, whose stored copy is stale while the row is live.

Under tensor parallelism the bank of a split factor is split like the factor, [C, local]. The bank of a replicated
factor is split by candidate over the ranks that would hold copies, [C / tp, length]. With spread "dp" candidates are
split over the data-parallel ranks as well.

Rows that other ranks hold are fetched for all layers at once. Each owner writes its rows into a buffer of zeros, and
one all-reduce over bytes completes it, exactly for every dtype. The bank is no `nn.Parameter`: DeepSpeed would
broadcast rank 0's rows over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import Axis, Split
from megatron_switchlora.lowrank.schedule import LayerSwitch

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

    def locate(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions, among `slots`, of those held here, and their row numbers."""
        rows, here = self.split.locate(slots)
        positions = here.nonzero().squeeze(1)
        return positions, rows[positions]


class Fetch:
    """Rows on their way; `result()[side, layer]` is [count, local length] on the device."""

    def __init__(self, rows: dict[Key, Tensor], works: list[dist.Work]) -> None:
        self._rows, self._works = rows, works

    def result(self) -> dict[Key, Tensor]:
        for work in self._works:
            work.wait()
        self._works = []
        return self._rows


class CandidateBank:
    """Candidates of all switching layers; `location` is "device" or "host", `spread` is "tp" or "dp"."""

    def __init__(self, location: str, spread: str, mesh: Mesh) -> None:
        self.location, self.spread, self.mesh = location, spread, mesh
        self.held: dict[Key, HeldRows] = {}
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

    def add(self, side: str, layer: int, vectors: Tensor, factor_split: Optional[Split]) -> None:
        """Store this rank's share of a layer's candidates [C, full length]."""
        group = self._sharing_group(factor_split)
        split = Split(0, len(vectors), self.mesh.axis(group) if group else Axis())
        local = vectors if factor_split is None else factor_split.take(vectors)
        self.held[side, layer] = HeldRows(split.take(local).clone(memory_format=torch.contiguous_format), split, group)

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        """Cast to the factors' precision and move to the bank's location; fetched rows go to `device`."""
        self.device = device
        for held in self.held.values():
            if self.location == "device" or device.type == "meta":
                held.rows = held.rows.to(device, dtype)
            else:
                host = held.rows.to("cpu", dtype)
                held.rows = host.pin_memory() if device.type == "cuda" else host

    def put_back(self, switch: LayerSwitch, old: Tensor) -> None:
        """Store the vectors [count, local length] that stop being live in their own slots, where held."""
        held = self.held[switch.side, switch.layer]
        positions, rows = held.locate(torch.from_numpy(switch.old_slots))
        values = old if len(positions) == len(old) else old.index_select(0, positions.to(old.device))
        held.rows.index_copy_(0, rows.to(held.rows.device), values.to(held.rows.device))

    def fetch(self, switches: Iterable[LayerSwitch]) -> Fetch:
        """Start fetching the rows of `new_slots`; call it after the last step's `put_back`.

        Collective: one all-reduce, for all layers together, per axis over which candidates are spread.
        """
        rows: dict[Key, Tensor] = {}
        shared: dict[Axis, list[Key]] = {}
        for switch in switches:
            key = (switch.side, switch.layer)
            held = self.held[key]
            rows[key] = self._local_rows(held, torch.from_numpy(switch.new_slots))
            if held.split.axis.size > 1:
                shared.setdefault(held.split.axis, []).append(key)
        works = [self._complete(rows, keys, axis) for axis, keys in shared.items()]
        return Fetch(rows, works)

    def _local_rows(self, held: HeldRows, slots: Tensor) -> Tensor:
        """Return the rows of the slots on the device, with zeros for those held elsewhere."""
        positions, numbers = held.locate(slots)
        rows = held.rows.index_select(0, numbers.to(held.rows.device)).to(self.device, non_blocking=True)
        if len(positions) == len(slots):
            return rows
        return rows.new_zeros(len(slots), rows.size(1)).index_copy_(0, positions.to(self.device), rows)

    def _complete(self, rows: dict[Key, Tensor], keys: list[Key], axis: Axis) -> dist.Work:
        """Start summing the ranks' bytes: every row is zero except on its owner.

        Replaces `rows` by views of the buffer.
        """
        flat = torch.cat([rows[key].reshape(-1) for key in keys])
        pieces = flat.split([rows[key].numel() for key in keys])
        for key, piece in zip(keys, pieces, strict=True):
            rows[key] = piece.view(rows[key].shape)
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
