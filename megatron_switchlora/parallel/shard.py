"""What a parameter knows about itself: its shard dimension, its rows, its initial values.

`declare` puts the facts on the parameter, once; initialisation, gradient norm, optimizer layout and
export read them from there, never from its name.
    shard_dim   dimension split over tensor-parallel ranks, or None when replicated
    rows        True when dimension 0 counts LoRA vectors that have an Adam step counter each
Initial values are drawn for the full tensor from a generator seeded by (seed, name), so they depend
neither on the order of construction nor on the mesh.
"""

from __future__ import annotations

import hashlib
from typing import Optional

import torch
from torch import Tensor, nn


def declare(param: nn.Parameter, *, shard_dim: Optional[int], rows: bool = False) -> nn.Parameter:
    """Mark a parameter; returns it."""
    param.shard_dim = shard_dim  # type: ignore[attr-defined]
    param.rows = rows  # type: ignore[attr-defined]
    return param


def has_rows(param: Tensor) -> bool:
    """Whether dimension 0 counts LoRA vectors."""
    return getattr(param, "rows", False)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
