"""Name LTE heads in checkpoints and records: head_03, and head_03/NAME for a tensor of its own."""

from __future__ import annotations

import re
from typing import Optional

LABEL = r"head_\d+"
_OF_HEAD = re.compile(r"head_(\d+)/(.+)")


def head_label(number: int) -> str:
    """Return a head's name."""
    return f"head_{number:02d}"


def of_head(number: int, name: str) -> str:
    """Return the stored name of a head's own tensor."""
    return f"{head_label(number)}/{name}"


def split_head(stored: str) -> tuple[Optional[int], str]:
    """Return the head of a stored name, None for what all heads share, and the tensor's name in the model."""
    match = _OF_HEAD.fullmatch(stored)
    return (int(match[1]), match[2]) if match else (None, stored)
