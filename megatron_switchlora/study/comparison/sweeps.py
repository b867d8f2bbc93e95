"""The course of a comparison: every method's sweep, then its seeds, then more seeds of the best methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from statistics import mean
from typing import Any, Optional, TypeVar

from megatron_switchlora.study.comparison.runner import Runner, Unfinished
from megatron_switchlora.study.comparison.settings import Point, Setting

Value = TypeVar("Value")


def sweep(setting: Setting, method: str, runner: Runner) -> Point:
    """Return the best rates of a method at seed 0.

    Of a coordinate sweep this is the point whose neighbours are all no better.
    """
    starts = setting.methods[method].starts()
    if setting.sweep == "none":
        return starts[0]
    if setting.sweep == "grid":
        return min(zip(starts, runner.losses(method, starts), strict=True), key=lambda pair: pair[1])[0]
    best = starts[0]
    while True:
        points = [best, *best.neighbours()]
        losses = runner.losses(method, points)
        winner = points[losses.index(min(losses))]  # the first of equals: where all diverge the search ends
        if winner == best:
            return best
        best = winner


def compare(setting: Setting, runner: Runner) -> bool:
    """Advance all methods side by side, as far as the runner's jobs allow; return whether all runs have results.

    The best methods are known, and get more seeds, only when every method has its own.
    """

    def settle(method: str) -> tuple[Point, float]:
        runner.results.choose(method, None)
        point = sweep(setting, method, runner)
        runner.results.choose(method, point)
        return point, mean(runner.seeds(method, point, range(setting.seeds)))

    with ThreadPoolExecutor(len(setting.selected)) as pool:
        futures = {method: pool.submit(attempt, partial(settle, method)) for method in setting.selected}
        settled = {method: outcome for method, outcome in finish(runner, futures).items() if outcome is not None}
        if len(settled) < len(setting.selected):
            return False
        best = sorted(settled, key=lambda method: settled[method][1])[: setting.best.methods]
        more = {
            method: pool.submit(
                attempt, partial(runner.seeds, method, settled[method][0], range(setting.best.seeds))
            )
            for method in best if math.isfinite(settled[method][1])
        }  # fmt: skip
        return None not in finish(runner, more).values()


def attempt(act: Callable[[], Value]) -> Optional[Value]:
    """Return what a function returns, or None where a run of it has no result in this call."""
    try:
        return act()
    except Unfinished as reason:
        print(reason, flush=True)
        return None


def finish(runner: Runner, futures: dict[str, Future[Any]]) -> dict[str, Any]:
    """Return all results; when one fails, or a signal asks to stop, the runs under way are stopped first."""
    try:
        waiting = set(futures.values())
        while waiting:  # in short spells: of two signals at once the second can leave an endless one asleep
            done, waiting = wait(futures.values(), timeout=0.5, return_when="FIRST_EXCEPTION")
            for future in done:
                future.result()  # raises what a method's thread has raised
        return {name: future.result() for name, future in futures.items()}
    except BaseException:
        runner.stop()
        raise
