"""Entries of a config.json, each of its type."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.errors import require


def read_whole(path: Path, content: dict[str, Any], key: str, default: Optional[int] = None) -> int:
    value: Any = default if content.get(key) is None else content[key]
    require(
        isinstance(value, int) and not isinstance(value, bool),
        f"{path} must hold {key} as a whole number, not {value!r}: correct it.",
    )
    return value


def read_number(path: Path, content: dict[str, Any], key: str, default: float) -> float:
    value = default if content.get(key) is None else content[key]
    require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30,
        f"{path} must hold {key} as a finite number, not {value!r}: correct it.",
    )
    return float(value)


def read_flag(path: Path, content: dict[str, Any], key: str) -> bool:
    value = False if content.get(key) is None else content[key]
    require(isinstance(value, bool), f"{path} must hold {key} as true or false, not {value!r}: correct it.")
    return value
