"""The candidate bank: vectors that wait to be switched in (SwitchLoRA, section 2.2).

A layer's side has C = min(m, n) candidates, one row each, [C, in] for A and [C, out] for B. The live
vectors are members: live row i owns a slot whose stored copy is stale while it is live. A switch
writes the live vector back to its own slot and takes the vector of the new slot. The bank holds the
precision in which the forward uses the factors; it lives on the device or in (pinned) host memory.
It is no `nn.Parameter`: DeepSpeed would broadcast data-parallel rank 0's copy over it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class CandidateBank:
    """Candidates of all switching layers: `rows[side][layer]` is a [C, length] tensor."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.rows: dict[str, dict[int, Tensor]] = {"A": {}, "B": {}}

    def add(self, side: str, layer: int, vectors: Tensor) -> None:
        """Put a layer's candidates [C, length] into the bank."""
        self.rows[side][layer] = vectors

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        """Cast to the factors' precision and move to where the bank lives."""
        for side in self.rows.values():
            for layer, vectors in side.items():
                if self.location == "device":
                    side[layer] = vectors.to(device, dtype)
                else:
                    host = vectors.to("cpu", dtype)
                    side[layer] = host.pin_memory() if device.type == "cuda" else host

    def exchange(self, side: str, layer: int, old_slots: Tensor, old: Tensor, new_slots: Tensor) -> Tensor:
        """Write the live vectors `old` [c, length] to their own slots, return those of `new_slots` on old's device."""
        bank = self.rows[side][layer]
        bank.index_copy_(0, old_slots.to(bank.device), old.to(bank.device))
        return bank.index_select(0, new_slots.to(bank.device)).to(old.device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all candidates, in a fixed order."""
        for side, layers in self.rows.items():
            for layer, vectors in sorted(layers.items()):
                yield f"bank_{side}.{layer}", vectors

    def num_bytes(self) -> int:
        return sum(vectors.numel() * vectors.element_size() for _, vectors in self.tensors())
