"""The mesh of ranks: axes lte x dp x tp, the last running fastest.

    rank = (lte_rank * dp + dp_rank) * tp + tp_rank

Each rank is in one process group per axis, and in three composite groups, whose ranks are counted in the axes' order:

    head   dp x tp   the ranks of one place on the lte axis
    data   lte x dp  the ranks with the same shard of the model, which read different samples
    world            all ranks

Data ranks may also be divided by host. Then `node` data ranks that follow one another are on one host:

    node    the data ranks of this rank's host
    across  the data ranks with the same place on their hosts

The groups are created here, in the same order on every rank, and passed on explicitly. Names with the same ranks share
a group. `Mesh` also implements
DeepSpeed's `mpu` protocol: ZeRO then partitions over one head's data-parallel ranks, and the gradient norm is summed
over tp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Optional

import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.distributed.alone import alone_group
from megatron_switchlora.distributed.shard import Axis

AXES = ("lte", "dp", "tp")
COMPOSITE_GROUPS = {"head": ("dp", "tp"), "data": ("lte", "dp"), "world": AXES}


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's coordinates, and its process groups by name."""

    sizes: dict[str, int]
    coords: dict[str, int]
    groups: dict[str, dist.ProcessGroup]
    node: int = 1
    """Data ranks of a host that follow one another, where they are divided by host."""

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
        """Return this rank's group along "lte", "dp", "tp", "node" or "across", or "head", "data" or "world"."""
        if name in ("node", "across"):
            across, place = divmod(self.rank("dp"), self.node)
            size, rank = (self.node, place) if name == "node" else (self.size("dp") // self.node, across)
            return Axis(size, rank, self.groups.get(name))
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


class GroupTable:
    """Process groups by the ranks that are in them, each created once."""

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def group(self, rows: list[list[int]]) -> dist.ProcessGroup:
        """Return this rank's group of those that divide the world. Collective over the world.

        A group of all ranks is torch's own, and one of a rank alone needs no communicator.
        """
        key = tuple(map(tuple, rows))
        if key not in self._made:
            self._made[key] = self._create(rows)
        return self._made[key]

    def _create(self, rows: list[list[int]]) -> dist.ProcessGroup:
        if len(rows[0]) == 1:
            return alone_group(self.timeout)
        if len(rows) == 1:
            return the_world()
        if splits():
            mine = dist.split_group(split_ranks=rows, timeout=self.timeout)
            assert mine is not None, "every rank is in a row"
            return mine
        groups = [dist.new_group(ranks, timeout=self.timeout) for ranks in rows]
        return next(group for group, ranks in zip(groups, rows, strict=True) if dist.get_rank() in ranks)


def the_world() -> dist.ProcessGroup:
    """Return torch's group of all ranks."""
    assert dist.group.WORLD is not None, "the world is not initialised"
    return dist.group.WORLD


def splits() -> bool:
    """Return whether one call can divide the world: NCCL does, where the device is known."""
    return dist.get_backend() == "nccl" and the_world().bound_device_id is not None


def ranks_of_host(dp: int, tp: int, gpus: int) -> int:
    """Return how many data ranks with one shard of the model are on a host with `gpus` ranks."""
    return math.gcd(dp, max(1, gpus // tp))


def divided_by_host(lines: Sequence[Sequence[int]], hosts: Sequence[str]) -> int:
    """Return how many neighbours in each line of ranks are on one host; `hosts` are all ranks'.

    Raises:
        UserError: they are not the same number everywhere.
    """
    counts = {len(list(same)) for line in lines for _, same in groupby(hosts[rank] for rank in line)}
    if len(counts) > 1:
        raise UserError(
            f"method.base_spread node needs equally many data-parallel ranks on each host, but there are "
            f"{' and '.join(map(str, sorted(counts)))}: start as many ranks on each host, or use dp."
        )
    return counts.pop()


def build_mesh(
    parallel: ParallelConfig, table: Optional[GroupTable] = None, hosts: Optional[Sequence[str]] = None
) -> Mesh:
    """Create the groups of every axis; the world must be initialised. Collective over the world.

    Meshes of one `table` share groups. With the `hosts` of all ranks, data ranks are also divided by host.

    Raises:
        UserError: the world's size does not fit the mesh, or hosts have different numbers of data ranks.
    """
    table = table or GroupTable(timedelta(seconds=parallel.timeout))
    sizes = mesh_sizes(parallel, dist.get_world_size())
    grid = torch.arange(dist.get_world_size()).reshape([sizes[axis] for axis in AXES])
    position = (grid == dist.get_rank()).nonzero()[0].tolist()
    members = {axis: grid.movedim(index, -1).reshape(-1, sizes[axis]) for index, axis in enumerate(AXES)}
    members["head"] = grid.reshape(sizes["lte"], -1)
    members["data"] = grid.reshape(-1, sizes["tp"]).t()
    members["world"] = grid.reshape(1, -1)
    node = 1 if hosts is None else divided_by_host(members["dp"].tolist(), hosts)
    if hosts is not None:
        members["node"] = members["dp"].reshape(-1, node)
        members["across"] = members["dp"].unflatten(1, (-1, node)).transpose(1, 2).flatten(0, 1)
    groups = {name: table.group(rows.tolist()) for name, rows in members.items()}
    return Mesh(sizes, dict(zip(AXES, position, strict=True)), groups, node)
