"""Show progress bars where seconds pass: on rank 0's standard error, if that is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, Optional

from tqdm import tqdm

from megatron_switchlora.startup.launchers import is_first


def shows_progress() -> bool:
    """Return whether this process shows bars."""
    return is_first(os.environ) and sys.stderr is not None and sys.stderr.isatty()


def progress(
    items: Optional[Iterable[Any]], what: str, unit: str, total: Optional[int] = None, delay: float = 1.0
) -> Any:
    """Return the items under a bar, which appears after `delay` seconds; without items `update` moves it."""
    return tqdm(
        items, desc=what, unit=f" {unit}", total=total, disable=not shows_progress(), delay=delay, dynamic_ncols=True
    )
