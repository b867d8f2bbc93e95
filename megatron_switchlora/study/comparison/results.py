"""The results of a comparison: finished runs by key, chosen rates and step times, in one JSON file.

It is written by atomic renames after every run. What is read of it is checked, since people and older tools write such
files too. All that is in a file was computed on one device: the CPU, or one kind of GPU.
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
MAYBE_TEXT = (str, type(None))
OF_A_RUN: dict[str, Any] = {  # what the table and the plot read of a run
    "method": str, "lr": NUMBER, "dense_lr": MAYBE, "seed": int, "sweep": bool, "val_loss": MAYBE, "diverged": bool,
    "curve": list, "peak_memory_bytes": MAYBE, "dp_bytes": MAYBE, "device": MAYBE_TEXT, "trainable": MAYBE,
    "full_rank": MAYBE, "vocab_size": MAYBE, "revision": MAYBE_TEXT, "machine": dict,
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
                content = read_json(path)
            except (OSError, ValueError) as error:
                raise UserError(f"The results {path} cannot be read ({error}): move the file away.") from None
            require(
                are_results(content), f"{path} does not hold results of this tool: move it away, or give another --out."
            )
            self.content |= content
            require(
                len(self._devices()) <= 1,
                f"{path} holds results on {' and '.join(self._devices())}, but a table compares those of one device: "
                "move those of the other to a file of their own.",
            )

    def _devices(self) -> list[str]:
        """Return what the results were computed on; a step time without a device is an older one of a CPU."""
        runs, timing = self.content["runs"].values(), self.content["timing"].values()
        devices = {run["device"] for run in runs} | {entry.get("device", "cpu") for entry in timing}
        return sorted(devices - {None})

    @property
    def device(self) -> Optional[str]:
        """What all results were computed on; None where there are none."""
        return next(iter(self._devices()), None)

    def change(self, section: str, key: str, value: Any) -> None:
        """Set an entry and write the file."""
        with self._lock:
            self.content[section][key] = value
            self.write()
            self.report()

    def write(self) -> None:
        """Write the file, so that a kill leaves the old or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def choose(self, method: str, point: Optional[Point]) -> None:
        """Set the rates that a sweep has chosen; None while it is under way."""
        self.change("chosen", method, point and [point.lr, point.dense_lr])

    def chosen(self, method: str) -> Optional[Point]:
        """Return the rates that a finished sweep has chosen."""
        rates = self.content["chosen"].get(method)
        return rates and Point(*rates)

    def require_text(self, data: Optional[str], what: str) -> None:
        """Check that a text is that of the runs that are there.

        Raises:
            UserError: its tokens have another fingerprint.
        """
        before = self.content["data"]
        require(
            data is None or before in (None, data),
            f"{what} has tokens of fingerprint {data}, the runs in {self.path} read {before}: give the same --data, or "
            "another --out.",
        )

    def require_device(self, device: Optional[str], what: str) -> None:
        """Check that results on a device may join those that are there.

        Raises:
            UserError: those are of another device.
        """
        require(
            device is None or self.device in (None, device),
            f"{what} was computed on {device}, the results in {self.path} on {self.device}, and a table compares those "
            "of one device: give another --out.",
        )

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Add a run and write the file.

        Raises:
            UserError: it read other tokens than those before it, or ran on another device.
        """
        data = run.pop("data")
        self.require_text(data, key)
        self.require_device(run["device"], key)
        self.content["data"] = self.content["data"] or data
        self.change("runs", key, run)

    def add_timing(self, method: str, entry: dict[str, Any]) -> None:
        """Set the step times of a method and write the file.

        Raises:
            UserError: they are of another device than the results.
        """
        self.require_device(entry["device"], f"The step time of {method}")
        self.change("timing", method, entry)

    def merge(self, other: Results) -> int:
        """Add the runs of another file that are not in this one, and return their number.

        Of chosen rates, those that are here already stay.

        Raises:
            UserError: they read other tokens, or ran on another device.
        """
        new = {key: run for key, run in other.content["runs"].items() if key not in self.content["runs"]}
        self.require_text(other.content["data"], str(other.path))
        self.require_device(other.device, str(other.path))
        chosen = {
            method: rates
            for method, rates in other.content["chosen"].items()
            if rates is not None and self.content["chosen"].get(method) is None
        }
        if new or chosen:
            self.content["data"] = self.content["data"] or other.content["data"]
            self.content["runs"] |= new
            self.content["chosen"] |= chosen
            self.write()
        return len(new)


def are_results(content: Any) -> bool:
    """Return whether a JSON has the shape of `Results.content`."""
    if not isinstance(content, dict):
        return False
    sections = [content.get(name, {}) for name in ("chosen", "timing", "runs")]
    if not all(isinstance(section, dict) for section in sections):
        return False
    chosen, timing, runs = (list(section.values()) for section in sections)
    return (
        all(point is None or (isinstance(point, list) and len(point) == 2 and _are(MAYBE, point)) for point in chosen)
        and all(_has(OF_A_TIMING, entry) and isinstance(entry.get("device"), MAYBE_TEXT) for entry in timing)
        and all(_has(OF_A_RUN, run) and all(map(_is_point, run["curve"])) for run in runs)
    )


def _has(kinds: dict[str, Any], entry: Any) -> bool:
    """Return whether a JSON has these fields, and a machine its own."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key, ...), kind) for key, kind in kinds.items()):
        return False
    return {"cpus", "processor", "system"} <= set(entry["machine"])


def _are(kinds: Any, values: list[Any]) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _is_point(entry: Any) -> bool:
    """Return whether it is a step, tokens and a loss."""
    return isinstance(entry, list) and len(entry) == 3 and _are(NUMBER, entry)
