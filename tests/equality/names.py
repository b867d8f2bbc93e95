"""Option names of today and of earlier commits: one case is given to both in their own words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Name today: name before. A commit that does not know the first is given the second.
RENAMED: dict[str, str] = {
    "method.switch.interval0": "method.interval0",
    "method.switch.ratio": "method.switch_ratio",
    "method.switch.total_steps": "method.switch_total_steps",
    "method.switch.freeze_steps": "method.freeze_steps",
    "method.switch.selection": "method.selection",
    "method.switch.bank_device": "method.bank_device",
    "method.switch.bank_spread": "method.bank_spread",
    "method.lte.local_heads": "method.local_heads",
    "method.lte.merge_interval": "method.merge_interval",
    "method.lte.merge_form": "method.merge_form",
    "method.lte.merge_traffic": "method.merge_traffic",
    "method.lte.redraw_A": "method.redraw_A",
    "method.lte.inner": "method.inner",
    "method.lte.base": "method.base",
    "method.relora.interval": "method.restart_interval",
    "method.relora.warmup": "method.restart_warmup",
    "method.relora.moments": "method.restart_moments",
    "method.relora.keep": "method.restart_keep",
    "method.galore.update_gap": "method.galore_update_gap",
    "method.galore.scale": "method.galore_scale",
    "method.mhlora.heads": "method.local_heads",
}
NEWER = {"model.pad_multiple": 1}  # options whose value here is what commits did before they knew them


def words_for(options: dict[str, Any], known: Iterable[str]) -> list[str]:
    """Return the command line words of options (in today's names) for a commit that knows the options `known`."""
    names = set(known)
    options = {name: value for name, value in options.items() if name in names or NEWER.get(name) != value}
    translated = {name if name in names else RENAMED.get(name, name): value for name, value in options.items()}
    unknown = sorted(set(translated) - names)
    assert not unknown, f"the commit does not know {unknown}: complete RENAMED in tests/equality/names.py"
    return [f"--{name}={_word(value)}" for name, value in translated.items()]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
