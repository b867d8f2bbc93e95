"""The tables of `switchlora bench peers`, in Markdown."""

from __future__ import annotations

from typing import Any

HEAD = ("entry", "s per step", "over transformers", "over PEFT LoRA", "forward", "backward", "optimizer", "switch",
        "other")  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Return a heading and a table for each case."""
    return "\n\n".join(f"{title(case)}\n\n{case_table(case)}" for case in found["cases"])


def title(case: dict[str, Any]) -> str:
    """Return the sizes of a case."""
    return f"Hidden size {case['hidden_size']}, sequence length {case['seq_len']}, {case['precision']}"


def case_table(case: dict[str, Any]) -> str:
    """Return a row for every entry."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name, entry in case["entries"].items():
        over = {base.partition(" r=")[0]: f"{value:.2f}" for base, value in entry["over"].items()}
        ratios = (over.get(base, "") for base in ("transformers", "peft lora"))
        shares = (f"{entry['share_of_step'][part]:.0%}" for part in HEAD[4:])
        lines.append((name, f"{entry['seconds']:.3f}", *ratios, *shares))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
