"""Tables of `switchlora bench peers` and `bench profile`, from their files in benchmarks/."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_switchlora.study.benchmarks.peers_table import case_table
from megatron_switchlora.study.benchmarks.profile import KINDS
from megatron_switchlora.study.markdown import markdown


class Target(NamedTuple):
    """A ratio of two entries that development aims at."""

    entry: str
    base: str
    at_most: float


TARGETS = (
    Target("switchlora merged r=h/4", "transformers", 0.95),
    Target("switchlora merged r=h/8", "transformers", 0.84),
    Target("switchlora merged r=h/4", "peft lora r=h/4", 0.85),
    Target("switchlora merged r=h/8", "peft lora r=h/8", 0.83),
    Target("full", "transformers", 0.97),
)


def peers(found: dict[str, Any]) -> str:
    """Return a row for every entry of the first case."""
    return case_table(found["cases"][0])


def peer_targets(found: dict[str, Any]) -> str:
    """Return the ratios aimed at beside those measured, in CPU time and in time."""
    entries = found["cases"][0]["entries"]
    rows = []
    for target in TARGETS:
        cpu, wall = (entries[target.entry][measure][target.base] for measure in ("cpu_over", "over"))
        met = "yes" if cpu <= target.at_most else "no"
        rows.append([f"{target.entry} over {target.base}", f"{target.at_most:.2f}", f"{cpu:.2f}", f"{wall:.2f}", met])
    return markdown(["fp32", "target", "CPU time", "time", "CPU time at most the target"], rows)


def profile(found: dict[str, Any]) -> str:
    """Return the share of a step in each kind, a column for each entry."""
    entries = found["entries"]
    rows = [[kind, *(f"{each['kinds'][kind] / each['traced_seconds']:.1%}" for each in entries.values())]
            for kind in KINDS]  # fmt: skip
    return markdown(["share of a step", *entries], rows)


def moved(found: dict[str, Any]) -> str:
    """Return the bytes that elementwise kernels move, by operator or compiled function."""
    ways = {
        (method, how): each for method, by_way in found["bytes_per_micro_batch"].items() for how, each in by_way.items()
    }
    names = dict.fromkeys(["all", *(name for each in ways.values() for name in each["largest"])])
    rows = []
    for name in names:
        values = (each["all"] if name == "all" else each["largest"].get(name) for each in ways.values())
        rows.append([name, *("" if value is None else f"{value / 1e9:.1f}" for value in values)])
    return markdown(["GB", *(f"{method}, {how}" for method, how in ways)], rows)


def place(found: dict[str, Any]) -> str:
    """Return where and of what a file was measured."""
    machine = found["machine"]
    loads = " and ".join(f"{load[0]:.1f}" for load in found["load_before_and_after"])
    return (
        f"Measured on {machine['processor']} with {machine['threads']} threads, torch {machine['torch']}, commit "
        f"`{(machine['git_revision'] or 'unknown')[:7]}`, at a load of {loads} before and after."
    )
