"""The groups of a mesh: their ranks, how few are created, and the group of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.distributed import mesh
from megatron_switchlora.distributed.alone import alone_group
from megatron_switchlora.distributed.mesh import AXES, COMPOSITE_GROUPS, GroupTable, build_mesh, ranks_of_host
from megatron_switchlora.distributed.recorder import CommRecorder

SECOND = timedelta(seconds=1)


class World:
    """Stands in for `torch.distributed`: a group is the tuple of its ranks."""

    def __init__(self, size: int, rank: int, backend: str) -> None:
        self.size, self.rank, self.backend = size, rank, backend
        self.group = SimpleNamespace(WORLD=SimpleNamespace(bound_device_id="cuda:0", ranks=tuple(range(size))))
        self.splits, self.news = 0, 0

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.rank

    def get_backend(self) -> str:
        return self.backend

    def new_group(self, ranks: list[int], timeout: timedelta) -> Any:
        self.news += 1
        return SimpleNamespace(ranks=tuple(ranks))

    def split_group(self, split_ranks: list[list[int]], timeout: timedelta) -> Any:
        self.splits += 1
        (mine,) = (ranks for ranks in split_ranks if self.rank in ranks)
        return SimpleNamespace(ranks=tuple(mine))


def enter(monkeypatch: pytest.MonkeyPatch, size: int, rank: int, backend: str) -> World:
    world = World(size, rank, backend)
    monkeypatch.setattr(mesh, "dist", world)
    monkeypatch.setattr(mesh, "alone_group", lambda timeout: SimpleNamespace(ranks=(rank,)))
    return world


@pytest.mark.parametrize(
    ("size", "lte", "tp", "splits", "news"),
    [
        (1, 1, 1, 0, 0),
        (8, 1, 1, 0, 0),  # one group: dp, head, data and the world are the same ranks
        (8, 8, 1, 0, 0),
        (8, 1, 8, 0, 0),
        (8, 1, 2, 2, 2 + 4),
        (8, 2, 1, 2, 4 + 2),  # head is dp, data the world
        (8, 2, 2, 5, 4 + 4 + 4 + 2 + 2),
        (1024, 1, 8, 2, 8 + 128),
    ],
)
def test_few_groups_are_created(
    size: int, lte: int, tp: int, splits: int, news: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = ParallelConfig(lte_heads=lte, tp=tp)
    for backend, wanted in (("nccl", (splits, 0)), ("gloo", (0, news))):
        world, table = enter(monkeypatch, size, size - 1, backend), GroupTable(SECOND)
        build_mesh(parallel, table)
        assert (world.splits, world.news) == wanted
        build_mesh(parallel, table)  # of the second phase
        assert (world.splits, world.news) == wanted


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_every_rank_is_with_those_of_its_axis(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for lte, tp in ((1, 1), (2, 1), (1, 2), (2, 2), (2, 4), (8, 1)):
        grid = torch.arange(8).view(lte, -1, tp)
        for rank in range(8):
            enter(monkeypatch, 8, rank, backend)
            built = build_mesh(ParallelConfig(lte_heads=lte, tp=tp))
            place = dict(zip(AXES, (grid == rank).nonzero()[0].tolist(), strict=True))
            for name in (*AXES, *COMPOSITE_GROUPS):
                along = COMPOSITE_GROUPS.get(name, (name,))
                mine = grid[tuple(slice(None) if axis in along else place[axis] for axis in AXES)].flatten().tolist()
                group: Any = built.group(name)
                assert list(group.ranks) == mine, (lte, tp, rank, name)
                assert mine[built.axis(name).rank] == rank and built.axis(name).size == len(mine)


def test_data_ranks_are_divided_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts of four ranks at tp 2: neighbours on a host, and the same place on the other one."""
    for rank in range(8):
        enter(monkeypatch, 8, rank, "gloo")
        built = build_mesh(ParallelConfig(tp=2), hosts="aaaabbbb")
        node, across = rank // 4 * 4 + rank % 2, rank % 4
        wanted = {"node": [node, node + 2], "across": [across, across + 4]}
        for name, mine in wanted.items():
            group: Any = built.group(name)
            assert list(group.ranks) == mine and mine[built.axis(name).rank] == rank and built.axis(name).size == 2
    assert build_mesh(ParallelConfig(tp=8), hosts="aaaabbbb").axis("node").size == 1
    with pytest.raises(UserError, match=r"equally many data-parallel ranks on each host, but there are 2 and 3"):
        build_mesh(ParallelConfig(), hosts="aaabbbcc")
    assert [ranks_of_host(16, 1, 8), ranks_of_host(4, 2, 16), ranks_of_host(4, 16, 8)] == [8, 4, 1]


def test_nccl_without_a_known_device_creates_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    world = enter(monkeypatch, 4, 0, "nccl")
    world.group.WORLD.bound_device_id = None
    build_mesh(ParallelConfig(tp=2))
    assert (world.splits, world.news) == (0, 4)


@pytest.fixture
def lone_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_rank_alone_gets_back_what_it_gives(lone_world: None) -> None:
    group = alone_group(SECOND)
    assert dist.get_process_group_ranks(group) == [0] and dist.get_world_size(group) == 1 == alone_group(SECOND).size()
    given, recorder = torch.arange(4.0), CommRecorder()
    with recorder:
        for act in (dist.all_reduce, lambda x, **k: dist.broadcast(x, 0, **k), lambda x, **k: dist.reduce(x, 0, **k)):
            act(given, group=group)
            work = act(given, group=group, async_op=True)
            assert work is not None and work.wait() and torch.equal(given, torch.arange(4.0))
        for into in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor):
            whole = torch.zeros(4)
            into(whole, given, group=group)
            assert torch.equal(whole, given)
        parts = [torch.zeros(4)]
        dist.all_gather(parts, given, group=group)
        assert torch.equal(parts[0], given)
        whole = torch.zeros(4)
        dist.reduce_scatter(whole, [given], group=group)
        assert torch.equal(whole, given)
        dist.barrier(group=group)
    assert not recorder.bytes
