"""Agree on the outcome of work that one rank, or each rank, does alone.

An error that only one rank sees, as in a file that it alone reads, must end every rank, with one message. Outcomes
travel as JSON in byte tensors, never as pickles.
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
    """Another rank has failed and reports why: end without a message and with a non-zero status."""


def gather_texts(text: str, device: torch.device, group: dist.ProcessGroup | None = None) -> list[str]:
    """Return every rank's text, in rank order, on every rank.

    Collective over the group, by default the world.
    """
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
    """Wait until every rank of the world has called this, however long that takes.

    A collective would not do: its time-out does not know that a rank still works. `startup/watch.py` reports a rank
    that stops meanwhile. Collective.
    """
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
    """Run `action` on every rank of the world and return this rank's result; an error on one rank is everyone's.

    Collective.

    Raises:
        UserError, PeerError: as `on_one_rank`.
    """
    results: list[T] = []

    def act() -> str:
        results.append(action())
        return ""

    on_one_rank(True, act, device)
    return results[0]
