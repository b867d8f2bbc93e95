"""The results of a comparison: finished runs by key, chosen rates and step times, in one JSON file.

It is written by atomic renames after every run. What is read of it is checked, since people and older tools write such
files too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.disk import read_json, replace_text
from megatron_switchlora.study.comparison.settings import Point

NUMBER = (int, float)
MAYBE = (int, float, type(None))
OF_A_RUN: dict[str, Any] = {  # what the table and the plot read of a run
    "method": str, "lr": NUMBER, "dense_lr": MAYBE, "seed": int, "sweep": bool, "val_loss": MAYBE, "diverged": bool,
    "curve": list, "peak_memory_bytes": MAYBE, "dp_bytes": MAYBE, "device": (str, type(None)), "trainable": MAYBE,
    "full_rank": MAYBE, "vocab_size": MAYBE, "revision": (str, type(None)), "machine": dict,
}  # fmt: skip
OF_A_TIMING: dict[str, Any] = {"ratio": NUMBER, "lowest": NUMBER, "highest": NUMBER, "machine": dict}


class Results:
    """Finished runs by key, chosen rates and step times, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report: Callable[[], Any] = lambda: None  # called after every change, under the lock
        self._lock = threading.Lock()
        self.content: dict[str, Any] = {"data": None, "chosen": {}, "timing": {}, "runs": {}}
        if path.exists():
            try:
                found = read_json(path)
            except (OSError, ValueError) as error:
                raise UserError(f"The results {path} cannot be read ({error}): move the file away.") from None
            require(
                are_results(found), f"{path} does not hold results of this tool: move it away, or give another --out."
            )
            self.content |= found

    def change(self, section: str, key: str, value: Any) -> None:
        """Set an entry and write the file, so that a kill leaves the old or the new one."""
        with self._lock:
            self.content[section][key] = value
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(self.content, indent=1) + "\n")
            self.report()

    def choose(self, method: str, point: Optional[Point]) -> None:
        """The rates that a sweep has found; None while it is under way."""
        self.change("chosen", method, point and [point.lr, point.dense_lr])

    def chosen(self, method: str) -> Optional[Point]:
        """The rates that a finished sweep has found."""
        found = self.content["chosen"].get(method)
        return found and Point(*found)

    def require_text(self, data: Optional[str], what: str) -> None:
        """Raises: UserError, if tokens of this fingerprint are not those of the runs that are there."""
        before = self.content["data"]
        require(
            data is None or before in (None, data),
            f"{what} has tokens of fingerprint {data}, the runs in {self.path} read {before}: give the same --data, or "
            "another --out.",
        )

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Raises: UserError, if the run read other tokens than those before it."""
        data = run.pop("data")
        self.require_text(data, key)
        self.content["data"] = self.content["data"] or data
        self.change("runs", key, run)


def are_results(content: Any) -> bool:
    """Whether a JSON has the shape of `Results.content`."""
    if not isinstance(content, dict):
        return False
    sections = [content.get(name, {}) for name in ("chosen", "timing", "runs")]
    if not all(isinstance(section, dict) for section in sections):
        return False
    chosen, timing, runs = (list(section.values()) for section in sections)
    return (
        all(point is None or (isinstance(point, list) and len(point) == 2 and _are(MAYBE, point)) for point in chosen)
        and all(_has(OF_A_TIMING, entry) for entry in timing)
        and all(_has(OF_A_RUN, run) and all(map(_is_point, run["curve"])) for run in runs)
    )


def _has(kinds: dict[str, Any], entry: Any) -> bool:
    """Whether a JSON has these fields, and a machine its own."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key, ...), kind) for key, kind in kinds.items()):
        return False
    return {"cpus", "processor", "system"} <= set(entry["machine"])


def _are(kinds: Any, values: list[Any]) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _is_point(entry: Any) -> bool:
    """Whether it is a step, tokens and a loss."""
    return isinstance(entry, list) and len(entry) == 3 and _are(NUMBER, entry)
