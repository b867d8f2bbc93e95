"""What the pretend GPU refuses, allows and counts, one expression at a time, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pretend.gpu import MixedDevices, PretendGpu, register


def act(payload: dict[str, Any]) -> dict[str, Any]:
    """Return, for each expression, "refused" or its counts."""
    register()
    with PretendGpu() as gpu:
        return {name: outcome(gpu, expression) for name, expression in expressions(gpu.device).items()}


def outcome(gpu: PretendGpu, expression: Callable[[], object]) -> Any:
    counts = gpu.fresh()
    try:
        expression()
    except MixedDevices:
        return "refused"
    return {kind: count for kind, count in counts.totals().items() if count}


def expressions(gpu: torch.device) -> dict[str, Callable[[], object]]:
    x, host, number = torch.ones(4, 3).to(gpu), torch.ones(4, 3), torch.tensor(2.0)
    rows, mask = torch.tensor([0, 2]), x > 0
    on_gpu = rows.to(gpu)
    pinned = torch.empty(4, 3, pin_memory=True)
    return {
        "sum with a matrix of the host": lambda: x + host,
        "product with a matrix of the host": lambda: x @ host.t(),
        "cat with a vector of the host": lambda: torch.cat([x[0], host[0]]),
        "cat with a number of the host": lambda: torch.stack([x.sum(), number]),
        "rows by the host's index_select": lambda: x.index_select(0, rows),
        "rows written by the host's index": lambda: x.index_copy_(0, rows, x[:2]),
        "the host's rows by an index of the GPU": lambda: host[on_gpu],
        "sum into a matrix of the host": lambda: host.add_(x),
        "where with a vector of the host": lambda: torch.where(mask, x, host),
        "times a number of the host": lambda: x * number,
        "rows by an index of the GPU": lambda: x[on_gpu],
        "rows by an index of the host": lambda: x[rows],
        "rows by a mask": lambda: x[mask],
        "view": lambda: x.t().view(3, 4)[0, 1:],
        "empty": lambda: torch.empty(3, device=gpu),
        "list": lambda: torch.tensor([1.0, 2.0], device=gpu),
        "item": lambda: x[0, 0].item(),
        "truth": lambda: bool(x[0, 0] > 0),
        "tolist": lambda: x.tolist(),
        "equal": lambda: torch.equal(x, x),
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(mask),
        "upload": lambda: host.to(gpu, non_blocking=True),
        "upload from pinned memory": lambda: pinned.to(gpu, non_blocking=True),
        "upload from a view of pinned memory": lambda: x[1:].copy_(pinned[1:], non_blocking=True),
        "blocking upload from pinned memory": lambda: pinned.to(gpu),
        "download": lambda: x.cpu(),
        "download that may run on": lambda: x.to("cpu", non_blocking=True),
        "download to pinned memory": lambda: pinned.copy_(x, non_blocking=True),
        "download to other memory": lambda: host.copy_(x, non_blocking=True),
        "on the host": lambda: host + host,
    }
