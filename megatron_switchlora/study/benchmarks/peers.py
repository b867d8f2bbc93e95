"""Compare a training step of the package's methods with other libraries' on the same model, data and threads.

All entries step in turn on the same random tokens, in one process per rank. Each round's times are divided by those of
transformers' full-rank step in that round, or of PEFT's LoRA of that rank; medians are reported. The same is reported
of CPU time, from which other processes take nothing. A step's time is split into forward pass, backward pass,
optimizer, switching and the rest. All start from the same weights, so the losses of the first step must agree.
`own_entries.py` and `peer_entries.py` describe the entries.

    switchlora bench peers --threads 2 --out benchmarks/peers_cpu.json
    torchrun --nproc_per_node 2 --no-python switchlora bench peers --entries full "switchlora merged" transformers

Where a peer's package is missing (pip install 'megatron_switchlora[bench]'), the entry is left out, and a line
reports that. Other libraries have no tensor parallelism here: at --tp above 1 only the package's own methods step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Container, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.startup.door import Door, the_door
from megatron_switchlora.startup.environment import Ranks, end_rank
from megatron_switchlora.startup.launchers import is_first
from megatron_switchlora.study.benchmarks.entries import (
    build,
    entry_options,
    make_config,
    measured,
    wanted,
)
from megatron_switchlora.study.benchmarks.peer_entries import Missing
from megatron_switchlora.study.benchmarks.peers_table import tables
from megatron_switchlora.study.benchmarks.turns import Batches, Entry, Times, batches, free, in_turn, ratio

BASE, ADAPTED_BASE = "transformers", "peft lora"
AGREE = {"fp32": 1e-5, "bf16": 5e-3}  # relative difference of first losses at equal weights


def report(text: str) -> None:
    """Print a line of progress, on the first rank."""
    if is_first(os.environ):
        print(text, file=sys.stderr, flush=True)


def bases_of(title: str, measured: Container[str]) -> list[str]:
    """Return the titles of the entries with which one is compared: where transformers' is missing, with full-rank."""
    _, _, rank = title.partition(" r=")
    found = [BASE if BASE in measured else "full", *([f"{ADAPTED_BASE} r={rank}"] if rank else [])]
    return [base for base in found if base in measured]


def results(times: dict[str, Times], tokens: int, precision: str) -> dict[str, Any]:
    """Return what was measured of every entry."""
    first = next(iter(times.values())).losses[0]
    found: dict[str, Any] = {}
    for title, of_entry in times.items():
        seconds, loss = median(of_entry.seconds), of_entry.losses[0]
        bases = bases_of(title, times)
        found[title] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "cpu_seconds": median(of_entry.cpu_seconds),
            "over": {base: ratio(of_entry.seconds, times[base].seconds) for base in bases},
            "cpu_over": {base: ratio(of_entry.cpu_seconds, times[base].cpu_seconds) for base in bases},
            "share_of_step": of_entry.shares(),
            "sent_bytes": of_entry.sent,
            "first_loss": loss,
            "losses_agree": abs(loss - first) <= AGREE[precision] * abs(first),
            **of_entry.facts,
        }
        if not found[title]["losses_agree"]:
            report(f"{title} starts with the loss {loss}, not {first}: it is another function.")
    return found


def measure_case(
    options: argparse.Namespace, config: RunConfig, data: Callable[[int], Batches], device: torch.device
) -> tuple[dict[str, Times], dict[str, str]]:
    """Return the times of all entries, and why some are left out."""
    entries: dict[str, Entry] = {}
    times: dict[str, Times] = {}
    left_out: dict[str, str] = {}
    for title, name, rank in wanted(options, config.model.hidden_size):
        try:
            entries[title] = build(options, config, name, rank, device)
        except Missing as reason:
            left_out[title] = str(reason)
            report(f"{title} is left out: {reason}")
        if options.one_at_a_time:
            times |= in_turn(entries, options.rounds, data, report)
            entries.clear()
            free(device)
    return times | in_turn(entries, options.rounds, data, report), left_out


def measure(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> list[dict[str, Any]]:
    """Return the cases, by hidden size, sequence length and precision."""
    cases = []
    for hidden, seq_len, precision in product(options.hidden_sizes, options.seq_lens, options.precisions):
        config = make_config(options, hidden, seq_len, precision, ranks.world_size)
        data = batches(config, ranks.rank // options.tp, options.tokens // seq_len)
        times, left_out = measure_case(options, config, data, device)
        cases.append({
            "hidden_size": hidden, "intermediate_size": config.model.intermediate_size, "seq_len": seq_len,
            "precision": precision, "entries": results(times, options.tokens, precision), "left_out": left_out,
        })  # fmt: skip
        gc.collect()
    return cases


def run(options: argparse.Namespace, door: Door) -> None:
    """Measure on the launcher's ranks; rank 0 writes the result."""
    ranks, found = measured(options, door, lambda *args: {"cases": measure(*args)})
    found["setting"]["world"] = ranks.world_size
    if ranks.rank == 0:
        print(tables(found), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            options.out.with_suffix(".md").write_text(tables(found) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = entry_options(__doc__)
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="all steps of an entry before the next one's, not in turn"
    )
    options = parser.parse_args(argv)
    with the_door() as door:
        run(options, door)
        end_rank(0)
