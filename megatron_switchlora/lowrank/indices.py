"""Send all indices that a step needs to the device at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_switchlora.startup.device import pinned


class Indices:
    """Index arrays, collected on the host and then sent in one copy; `add` returns an array's number."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._host: tuple[Tensor, ...] = ()
        self._device: tuple[Tensor, ...] = ()

    def add(self, array: np.ndarray) -> int:
        self._arrays.append(array)
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> None:
        """Copy all arrays to the device; from pinned memory where that makes the copy asynchronous."""
        lengths = [len(array) for array in self._arrays]
        if not sum(lengths):
            self._host = self._device = tuple(torch.empty(0, dtype=torch.int64) for _ in lengths)
            return
        host = pinned(torch.from_numpy(np.concatenate(self._arrays).astype(np.int64, copy=False)), device)
        self._host = host.split(lengths)
        self._device = host.to(device, non_blocking=True).split(lengths)

    def __getitem__(self, number: int) -> Tensor:
        """Return an array on the device."""
        return self._device[number]

    def on_host(self, number: int) -> Tensor:
        return self._host[number]
