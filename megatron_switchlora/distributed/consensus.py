"""Doing something on one rank and telling the others how it went.

An error that only one rank sees (a file it alone reads) must end every rank, with one message. The
outcome travels as JSON in a byte tensor: no pickle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError

T = TypeVar("T")


class PeerError(Exception):
    """Another rank failed and has said why: end quietly with a non-zero status."""


def gather_texts(text: str, device: torch.device, group: dist.ProcessGroup | None = None) -> list[str]:
    """Every rank's text, in rank order, on every rank; collective over the group (by default the world)."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([encoded.numel()], dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(s) for s in sizes)
    if not longest:
        return [""] * len(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: encoded.numel()] = encoded
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return [bytes(g[: int(s)].tolist()).decode() for g, s in zip(gathered, sizes, strict=True)]


def await_all() -> None:
    """Wait until every rank of the world has come here, however long it takes: not in a collective, whose time-out does
    not know that a rank still works. One that stops is found by the watch (watch.py). Collective."""
    world = dist.get_world_size()
    if world == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    call = store.add(f"await_all/calls of {dist.get_rank()}", 1)
    here = f"await_all/{call}"
    count, pause = store.add(here, 1), 0.001
    while count < world:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        count = store.add(here, 0)


def on_one_rank(acts: bool, action: Callable[[], str], device: torch.device) -> str:
    """Run `action` on the ranks where `acts`, for as long as it takes; the first such rank's result goes to everyone.
    Collective over the world.

    Raises:
        UserError: on every rank, if the action raised one somewhere (the first such rank's).
        PeerError: on the other ranks, if the action failed otherwise; that rank raises its own error.
    """
    outcome: dict[str, object] = {}
    failure: Exception | None = None
    if acts:
        try:
            outcome = {"result": action()}
        except Exception as error:  # told to the others first
            failure = error
            outcome = {"error": str(error), "by_user": isinstance(error, UserError)}
    await_all()
    outcomes = [json.loads(text) for text in gather_texts(json.dumps(outcome), device)]
    mistakes = [entry["error"] for entry in outcomes if entry.get("by_user")]
    if mistakes:
        raise UserError(mistakes[0])
    if failure is not None:
        raise failure
    if any("error" in entry for entry in outcomes):
        raise PeerError("another rank failed")
    return next(entry["result"] for entry in outcomes if "result" in entry)


def on_all_ranks(action: Callable[[], T], device: torch.device) -> T:
    """Run `action` on every rank of the world, for its result there: one rank's mistake is everyone's. Collective.

    Raises:
        UserError, PeerError: as `on_one_rank`.
    """
    results: list[T] = []

    def act() -> str:
        results.append(action())
        return ""

    on_one_rank(True, act, device)
    return results[0]
