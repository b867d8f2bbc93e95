"""How a tensor is split over ranks, and what a parameter states about itself.

An `Axis` is this process's group of ranks along one mesh axis. A `Split` cuts one dimension of a tensor into equal
contiguous blocks along an axis. Each block is padded with zeros at its end, where the size does not divide or its
blocks must have a multiple of some length.

`declare` states these facts on the parameter, once. Initialisation, gradient norm, optimizer layout, export and checks
read them there, never from its name:

    shard   how the parameter is cut over tensor-parallel ranks, or None when every rank holds all of it
    rows    True when dimension 0 counts LoRA vectors that have an Adam step counter each
    head    which of the LTE heads of this process it belongs to

Initial values are drawn for the full tensor from a generator seeded by (seed, name), then cut. So they depend neither
on the order of construction nor on the mesh.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config.parallel import shard_size


@dataclass(frozen=True)
class Axis:
    """Size of a mesh axis, this rank's position on it, and its process group (None: one rank alone)."""

    size: int = 1
    rank: int = 0
    group: Optional[dist.ProcessGroup] = None


@dataclass(frozen=True)
class Split:
    """Dimension `dim` of a tensor, `size` long without padding, cut over `axis` in blocks of a multiple of `multiple`.

    Where the cuts are does not depend on `multiple`.
    """

    dim: int
    size: int
    axis: Axis
    multiple: int = 1

    @property
    def share(self) -> int:
        """Entries of the first rank's block that are not padding; later ranks may have fewer."""
        return shard_size(self.size, self.axis.size)

    @property
    def local(self) -> int:
        """Length of every rank's block, padding included."""
        return shard_size(self.size, self.axis.size, self.multiple)

    @property
    def start(self) -> int:
        """Index at which this rank's block begins."""
        return self.axis.rank * self.share

    @property
    def real(self) -> int:
        """Entries of this rank's block that are not padding."""
        return max(0, min(self.share, self.size - self.start))

    def unpadded(self, block: Tensor) -> Tensor:
        """Return a view of this rank's block without its padding."""
        return block.narrow(self.dim, 0, self.real)

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices into the full dimension as indices into this rank's block, and a mask of those that are here.

        Indices that other ranks hold become 0.
        """
        local = indices - self.start
        here = (local >= 0) & (local < self.real)
        return local.masked_fill(~here, 0), here

    def take(self, full: Tensor) -> Tensor:
        """Return this rank's block of a full tensor, padded with zeros; without padding it is a view."""
        block = full.narrow(self.dim, min(self.start, self.size), self.real)
        if self.real == self.local:
            return block
        shape = list(full.shape)
        shape[self.dim] = self.local
        padded = full.new_zeros(shape)  # torch.cat is slow on the meta device
        self.unpadded(padded).copy_(block)
        return padded

    def gather(self, block: Tensor) -> Tensor:
        """Return the full tensor without padding, from every rank's block. Collective over the axis."""
        if self.axis.size == 1:
            return self.unpadded(block)
        block = block.narrow(self.dim, 0, self.share).contiguous()
        blocks = [torch.empty_like(block) for _ in range(self.axis.size)]
        dist.all_gather(blocks, block, group=self.axis.group)
        return torch.cat(blocks, self.dim).narrow(self.dim, 0, self.size)


def declare(param: nn.Parameter, *, shard: Optional[Split], rows: bool = False, head: int = 0) -> nn.Parameter:
    """State a parameter's facts on it, and return it."""
    param.shard = shard  # type: ignore[attr-defined]
    param.rows = rows  # type: ignore[attr-defined]
    param.head = head  # type: ignore[attr-defined]
    # DeepSpeed's word for "not a replica": its gradient norm counts other parameters on tensor-parallel rank 0 only
    param.tensor_model_parallel = is_split(param)  # type: ignore[attr-defined]
    return param


def is_split(param: Tensor) -> bool:
    """Return whether other tensor-parallel ranks hold other shards of the parameter."""
    shard: Optional[Split] = getattr(param, "shard", None)
    return shard is not None and shard.axis.size > 1


def has_rows(param: Tensor) -> bool:
    """Return whether dimension 0 counts LoRA vectors."""
    return getattr(param, "rows", False)


def full_shape(param: nn.Parameter) -> list[int]:
    """Return the shape of the whole, unpadded tensor."""
    shape, shard = list(param.shape), param.shard  # type: ignore[attr-defined]
    if shard is not None:
        shape[shard.dim] = shard.size
    return shape


def without_padding(param: Tensor, value: Tensor) -> Tensor:
    """Return a view of what is real of this rank's shard of a parameter; `value` is shaped like the shard."""
    shard: Optional[Split] = getattr(param, "shard", None)
    return value if shard is None else shard.unpadded(value)


def shard_of(param: nn.Parameter, full: Tensor) -> Tensor:
    """Return what this rank holds of the parameter's full value."""
    shard: Optional[Split] = param.shard  # type: ignore[attr-defined]
    return full if shard is None else shard.take(full)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
