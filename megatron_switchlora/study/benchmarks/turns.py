"""Step several trainers in turn, with clocks around the parts of a step; medians of the ratios within a round.

Whatever else the machine does then falls on all of them, and little of it remains in a ratio.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_switchlora.config.run import RunConfig

PARTS = ("forward", "backward", "optimizer", "switch", "other")
Batches = list[Tensor]  # micro-batches, each [b, S + 1] tokens


def batches(config: RunConfig, rank: int = 0, samples: Optional[int] = None) -> Callable[[int], Batches]:
    """Return a function from a step's number to this data rank's micro-batches: by default the global batch."""
    count = config.train.global_batch_size if samples is None else samples

    def draw(number: int) -> Batches:
        generator = torch.Generator().manual_seed(number + 10**6 * rank)
        shape = (count, config.train.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size or 1, shape, generator=generator)
        return list(tokens.split(config.train.micro_batch_size))

    return draw


def wait_for(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of the current step by part; while `waits` is set, a GPU is idle at both ends of every part."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, False
        self.spent: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the body to a part; a profile sees a span of that name."""
        self._settle()
        began = time.perf_counter()
        with record_function(f"part: {name}"):
            yield
        self._settle()
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

    def around(self, target: Any, method: str, name: str) -> None:
        """Count what an object's method takes as a part."""
        function: Callable[..., Any] = getattr(target, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(target, method, call)

    def _settle(self) -> None:
        if self.waits:
            wait_for(self.device)


@dataclass
class Entry:
    """A trainer under measurement: `step(number, batches)` trains one step and returns its loss."""

    step: Callable[[int, Batches], float]
    clock: Clock
    facts: dict[str, Any]
    """What the result states of it."""
    sent: Callable[[], dict[str, int]] = dict
    """Bytes that this rank handed to collectives in the last step, by kind."""


@contextmanager
def collective_seconds() -> Iterator[list[float]]:
    """Collect the seconds for which this process waits in collectives that it issues from Python."""
    original, spent = dist.Work.wait, [0.0]

    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(work, *args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - began

    dist.Work.wait = wait  # type: ignore[assignment, method-assign]
    try:
        yield spent
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


@dataclass
class Times:
    """What was measured of an entry, which may be gone: seconds of each round, their parts, losses of all steps."""

    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads: what other processes take from this one does not count."""
    parts: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """Return the median share of a step in each part."""
        names = dict.fromkeys([*PARTS, *(name for each in self.parts for name in each)])
        return {name: round(median(each.get(name, 0.0) for each in self.parts), 4) for name in names}


@dataclass(frozen=True)
class Step:
    """What was measured of one step."""

    seconds: float
    cpu_seconds: float
    shares: dict[str, float]
    loss: float


def timed_step(entry: Entry, number: int, batches: Batches) -> Step:
    """Train one step, and measure it."""
    device = entry.clock.device
    wait_for(device)
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.barrier()
    entry.clock.spent = {}
    with collective_seconds() if several else nullcontext([0.0]) as waited:
        began, cpu_began = time.perf_counter(), time.process_time()
        loss = entry.step(number, batches)
        wait_for(device)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    shares = {name: value / seconds for name, value in entry.clock.spent.items()}
    shares["other"] = 1 - sum(shares.values())
    if several:
        shares["in collectives"] = waited[0] / seconds
    return Step(seconds, cpu_seconds, shares, loss)


def in_turn(
    entries: dict[str, Entry], rounds: int, batches: Callable[[int], Batches], report: Callable[[str], None]
) -> dict[str, Times]:
    """Return the times of every entry's steps; the first round warms up and is not timed. `report` gets each time.

    On a GPU the parts are measured in further rounds, since waiting for the device at every part lengthens a step.
    """
    times = {name: Times(entry.facts) for name, entry in entries.items()}
    on_gpu = any(entry.clock.device.type == "cuda" for entry in entries.values())
    for number in range(1 + rounds * (2 if on_gpu else 1)):
        for name, entry in entries.items():
            entry.clock.waits = number > rounds
            step = timed_step(entry, number, batches(number))
            report(f"round {number}: {name} {step.seconds:.3f} s, CPU time {step.cpu_seconds:.3f} s")
            times[name].losses.append(step.loss)
            times[name].sent = entry.sent()
            if 1 <= number <= rounds:
                times[name].seconds.append(step.seconds)
                times[name].cpu_seconds.append(step.cpu_seconds)
            if number > rounds or (number and not on_gpu):
                times[name].parts.append(step.shares)
    for measured in times.values():
        measured.losses = mean_over_ranks(measured.losses)
    return times


def mean_over_ranks(values: list[float]) -> list[float]:
    """Return the mean of every value: other libraries' losses are those of one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def ratio(seconds: list[float], base: list[float], digits: int = 4) -> float:
    """Return the median of the ratios within a round."""
    return round(median(a / b for a, b in zip(seconds, base, strict=True)), digits)


def free(device: torch.device) -> None:
    """Give back the memory of an entry that is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load() -> Optional[list[float]]:
    """Return the machine's load over 1, 5 and 15 minutes, where the system states it."""
    return [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None
