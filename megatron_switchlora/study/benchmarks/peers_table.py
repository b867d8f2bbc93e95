"""The tables of `switchlora bench peers`, in Markdown."""

from __future__ import annotations

from typing import Any

from megatron_switchlora.study.benchmarks.turns import PARTS
from megatron_switchlora.study.markdown import markdown

BASES = {"transformers": "transformers", "full": "full-rank", "peft lora": "PEFT LoRA"}


def tables(found: dict[str, Any]) -> str:
    """Return a heading and a table for each case."""
    return "\n\n".join(f"{title(case)}\n\n{case_table(case)}" for case in found["cases"])


def title(case: dict[str, Any]) -> str:
    """Return the sizes of a case."""
    return f"Hidden size {case['hidden_size']}, sequence length {case['seq_len']}, {case['precision']}"


def case_table(case: dict[str, Any]) -> str:
    """Return a row for every entry."""
    compared = {base.partition(" r=")[0] for entry in case["entries"].values() for base in entry["over"]}
    bases = [base for base in BASES if base in compared]
    ratios = [f"{measure} over {BASES[base]}" for measure in ("time", "CPU time") for base in bases]
    head = ["entry", "s per step", *ratios, *PARTS]
    rows = []
    for name, entry in case["entries"].items():
        cells = [cell for measure in ("over", "cpu_over") for cell in ratio_cells(entry[measure], bases)]
        shares = [f"{entry['share_of_step'][part]:.0%}" for part in PARTS]
        rows.append([name, f"{entry['seconds']:.3f}", *cells, *shares])
    return markdown(head, rows)


def ratio_cells(over: dict[str, float], bases: list[str]) -> list[str]:
    """Return the ratios to these entries, where there are any."""
    by_base = {base.partition(" r=")[0]: f"{value:.2f}" for base, value in over.items()}
    return [by_base.get(base, "") for base in bases]
