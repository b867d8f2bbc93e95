"""Agree on the outcome of work that one rank, or each rank, does alone.

An error that only one rank sees, as in a file that it alone reads, must end every rank, with one message. Outcomes
travel as JSON through the ranks' store, never as pickles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_switchlora.config.errors import UserError

T = TypeVar("T")


class PeerError(Exception):
    """Another rank has failed and reports why: end without a message and with a non-zero status."""


def gather_texts(text: str) -> list[str]:
    """Return every rank's text, in rank order, on every rank.

    Texts go through the ranks' store, so no GPU waits, and none is waited for. Collective over the world.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return [text]
    store = dist.distributed_c10d._get_default_store()
    # Two places in turn: a rank that writes to one has awaited all in the call before, so all have read it.
    place = f"gather_texts/{store.add(f'gather_texts/calls of {rank}', 1) % 2}"
    store.set(f"{place}/{rank}", f"{text}.")  # never empty
    everyone: list[bytes] = []
    await_all(lambda store: everyone.extend(store.multi_get([f"{place}/{number}" for number in range(world)])))
    return [each.decode()[:-1] for each in everyone]


def await_all(read: Callable[[dist.Store], None] | None = None) -> None:
    """Wait until every rank of the world has called this, however long that takes; then `read` from the store.

    A collective would not do: its time-out does not know that a rank still works. `startup/watch.py` reports a rank
    that stops meanwhile. Rank 0, with which the store may end, returns last. Collective.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    here = f"await_all/{store.add(f'await_all/calls of {rank}', 1)}"
    store.add(here, 1)
    _await_count(store, here, world)
    if read is not None:
        read(store)
    if rank > 0:
        store.add(f"{here}/left", 1)
    else:
        _await_count(store, f"{here}/left", world - 1)


def _await_count(store: dist.Store, key: str, count: int) -> None:
    pause = 0.001
    while store.add(key, 0) < count:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def on_one_rank(acts: bool, action: Callable[[], str]) -> str:
    """Run `action` on the ranks where `acts` is true; return the first such rank's result on every rank.

    The action may take as long as it needs. Collective over the world.

    Raises:
        UserError: on every rank, with the first message, if the action raised a `UserError` on a rank.
        PeerError: on the other ranks, if the action failed otherwise; that rank raises its own error.
    """
    outcome: dict[str, object] = {}
    failure: Exception | None = None
    if acts:
        try:
            outcome = {"result": action()}
        except Exception as error:  # reported to the others first
            failure = error
            outcome = {"error": str(error), "by_user": isinstance(error, UserError)}
    await_all()
    outcomes = [json.loads(text) for text in gather_texts(json.dumps(outcome))]
    mistakes = [entry["error"] for entry in outcomes if entry.get("by_user")]
    if mistakes:
        raise UserError(mistakes[0])
    if failure is not None:
        raise failure
    if any("error" in entry for entry in outcomes):
        raise PeerError("another rank failed")
    return next(entry["result"] for entry in outcomes if "result" in entry)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank of the world and return this rank's result; an error on one rank is everyone's.

    Collective.

    Raises:
        UserError, PeerError: as `on_one_rank`.
    """
    results: list[T] = []

    def act() -> str:
        results.append(action())
        return ""

    on_one_rank(True, act)
    return results[0]
