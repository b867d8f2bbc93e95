"""The mesh of ranks: axes lte x dp x tp, the last running fastest.

    rank = (lte_rank * dp + dp_rank) * tp + tp_rank

Each rank is in one process group per axis, and in three composite groups, whose ranks are counted in the axes' order:

    head   dp x tp   the ranks of one place on the lte axis
    data   lte x dp  the ranks with the same shard of the model, which read different samples
    world            all ranks

The groups are created here, in the same order on every rank, and passed on explicitly. `Mesh` also implements
DeepSpeed's `mpu` protocol: ZeRO then partitions over one head's data-parallel ranks, and the gradient norm is summed
over tp.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.distributed.shard import Axis

AXES = ("lte", "dp", "tp")
COMPOSITE_GROUPS = {"head": ("dp", "tp"), "data": ("lte", "dp"), "world": AXES}


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's coordinates, and its process groups by name."""

    sizes: dict[str, int]
    coords: dict[str, int]
    groups: dict[str, dist.ProcessGroup]

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def rank(self, axis: str) -> int:
        return self.coords[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.groups[axis]

    def heads(self, local: int) -> range:
        """Return the numbers of this rank's LTE heads; each place on the lte axis has `local` of them."""
        return range(self.rank("lte") * local, (self.rank("lte") + 1) * local)

    def axis(self, name: str) -> Axis:
        """Return this rank's group along "lte", "dp" or "tp", or its composite group "head", "data" or "world"."""
        size, rank = 1, 0
        for axis in COMPOSITE_GROUPS.get(name, (name,)):
            size, rank = size * self.size(axis), rank * self.size(axis) + self.rank(axis)
        return Axis(size, rank, self.groups.get(name))

    # DeepSpeed's mpu protocol
    def get_data_parallel_rank(self) -> int:
        return self.rank("dp")

    def get_data_parallel_world_size(self) -> int:
        return self.size("dp")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group("dp")

    def get_model_parallel_rank(self) -> int:
        return self.rank("tp")

    def get_model_parallel_world_size(self) -> int:
        return self.size("tp")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group("tp")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def lone_mesh() -> Mesh:
    """Return the mesh of one process without process groups."""
    return Mesh(dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0), {})


def mesh_sizes(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Return the size of each axis for a world of this size.

    Raises:
        UserError: the world's size is no multiple of lte_heads x tp.
    """
    fixed = parallel.lte_heads * parallel.tp
    if world_size % fixed:
        raise UserError(
            f"The world of {world_size} ranks must be a multiple of parallel.lte_heads {parallel.lte_heads} x "
            f"parallel.tp {parallel.tp} = {fixed}: change the number of processes or the mesh."
        )
    return {"lte": parallel.lte_heads, "dp": world_size // fixed, "tp": parallel.tp}


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Create the groups of every axis; the world must be initialised. Collective over the world."""
    sizes = mesh_sizes(parallel, dist.get_world_size())
    grid = torch.arange(dist.get_world_size()).reshape([sizes[axis] for axis in AXES])
    position = (grid == dist.get_rank()).nonzero()[0].tolist()
    members = {axis: grid.movedim(index, -1).reshape(-1, sizes[axis]) for index, axis in enumerate(AXES)}
    members["head"] = grid.reshape(sizes["lte"], -1)
    groups, timeout = {}, timedelta(seconds=parallel.timeout)
    if sizes["lte"] > 1:
        members["data"] = grid.reshape(-1, sizes["tp"]).t()
        members["world"] = grid.reshape(1, -1)
    for axis, rows in members.items():
        for ranks in rows.tolist():
            group = dist.new_group(ranks, timeout=timeout)
            if dist.get_rank() in ranks:
                groups[axis] = group
    if sizes["lte"] == 1:
        groups |= {"data": groups["dp"], "world": groups["head"]}
    return Mesh(sizes, dict(zip(AXES, position, strict=True)), groups)
