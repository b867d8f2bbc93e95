"""Texts and outcomes of ranks, which are threads here, through one store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.distributed.consensus import PeerError, await_all, gather_texts, on_all_ranks, on_one_rank

WORLD = 3


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call a function of the rank on every rank, and return what it returned or raised."""
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist, "get_rank", lambda: here.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: WORLD)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    def run(act: Callable[[int], object]) -> list[Any]:
        def one(rank: int) -> object:
            here.rank = rank
            try:
                return act(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(one, range(WORLD)))

    return run


def test_texts_arrive_in_rank_order_call_after_call(on_ranks: Any) -> None:
    """Ranks are late in turn, texts grow, shrink and are empty."""

    def act(rank: int) -> list[list[str]]:
        wait = random.Random(rank)
        found = []
        for call in range(12):
            time.sleep(wait.choice([0, 0, 0.01]))
            found.append(gather_texts("é" * ((rank + call) % 4) * 100))
        return found

    wanted = [["é" * ((rank + call) % 4) * 100 for rank in range(WORLD)] for call in range(12)]
    assert on_ranks(act) == [wanted] * WORLD


def test_rank_0_leaves_last(on_ranks: Any) -> None:
    """It may keep the store: the others must have read by then."""
    left: list[int] = []

    def act(rank: int) -> None:
        await_all(lambda store: time.sleep(0.05 * rank) or left.append(rank))
        left.append(10 + rank)

    on_ranks(act)
    assert left.index(10) > max(left.index(rank) for rank in range(WORLD))


def test_an_error_on_one_rank_is_everyones(on_ranks: Any) -> None:
    def act(rank: int) -> str:
        if rank == 1:
            raise UserError("this file")
        return str(rank)

    assert on_ranks(lambda rank: on_one_rank(rank == 2, lambda: "chosen")) == ["chosen"] * WORLD
    assert on_ranks(lambda rank: on_all_ranks(lambda: act(0))) == ["0"] * WORLD
    assert [(type(e), str(e)) for e in on_ranks(lambda rank: on_all_ranks(lambda: act(rank)))] == [
        (UserError, "this file")
    ] * WORLD
    kinds = [type(error) for error in on_ranks(lambda rank: on_one_rank(rank == 1, lambda: str(1 // 0)))]
    assert kinds == [PeerError, ZeroDivisionError, PeerError]
