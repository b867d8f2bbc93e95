"""Compare a training step of the package's methods with other libraries' on the same model, data and threads.

All entries step in turn on the same random tokens, in one process per rank. Each round's times are divided by those of
transformers' full-rank step in that round, or of PEFT's LoRA of that rank; medians are reported. A step's time is split
into forward pass, backward pass, optimizer, switching and the rest. All start from the same weights, so the losses of
the first step must agree. `own_entries.py` and `peer_entries.py` describe the entries.

    switchlora bench peers --threads 2 --out benchmarks/peers_cpu.json
    torchrun --nproc_per_node 2 --no-python switchlora bench peers --entries full "switchlora merged" transformers

Where a peer's package is missing (pip install 'megatron_switchlora[bench]'), the entry is left out with a line that
says so. Other libraries have no tensor parallelism here: at --tp above 1 only the package's own methods step.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any, Optional

import torch

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.startup.door import Door, the_door
from megatron_switchlora.startup.environment import Ranks, end_rank
from megatron_switchlora.study.benchmarks.common import describe_machine, join_ranks
from megatron_switchlora.study.benchmarks.own_entries import OWN, own_entry, own_method
from megatron_switchlora.study.benchmarks.peer_entries import PEERS, Missing, peer_entry
from megatron_switchlora.study.benchmarks.peers_table import markdown
from megatron_switchlora.study.benchmarks.turns import Batches, Entry, Times, in_turn, load, ratio

HEAD_DIM = 64
BASE, ADAPTED_BASE = "transformers", "peft lora"
AGREE = {"fp32": 1e-5, "bf16": 5e-3}  # relative difference of first losses at equal weights


def make_config(options: argparse.Namespace, hidden: int, seq_len: int, precision: str, world: int) -> RunConfig:
    """Return the run of an entry, without its method."""
    samples, dp = options.tokens // seq_len, world // options.tp
    return RunConfig(
        model=ModelConfig(
            vocab_size=options.vocab_size, hidden_size=hidden, num_layers=options.num_layers,
            intermediate_size=options.intermediate_size or -(-8 * hidden // 96) * 32,
            num_heads=max(1, hidden // HEAD_DIM), pad_multiple=options.pad_multiple,
        ),
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(
            steps=10**6, warmup_steps=0, seq_len=seq_len, micro_batch_size=samples // options.micro_batches,
            global_batch_size=samples * dp, precision=precision,  # type: ignore[arg-type]
        ),
        parallel=ParallelConfig(tp=options.tp),
    )  # fmt: skip


def batches(config: RunConfig, rank: int, samples: int) -> Callable[[int], Batches]:
    """Return a function from a step's number to this data rank's micro-batches."""

    def draw(number: int) -> Batches:
        generator = torch.Generator().manual_seed(number + 10**6 * rank)
        shape = (samples, config.train.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size or 1, shape, generator=generator)
        return list(tokens.split(config.train.micro_batch_size))

    return draw


def wanted(options: argparse.Namespace, hidden: int) -> Iterator[tuple[str, str, Optional[int]]]:
    """Yield (name in the result, entry, rank) of every entry to build."""
    for name in options.entries:
        if OWN.get(name) is None and not PEERS.get(name):
            yield name, name, None
        else:
            for divisor in options.divisors:
                yield f"{name} r=h/{divisor}", name, hidden // divisor


def build(
    options: argparse.Namespace, config: RunConfig, device: torch.device
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries, and why some are left out."""
    entries: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for title, name, rank in wanted(options, config.model.hidden_size):
        try:
            if name in OWN:
                entries[title] = own_entry(replace(config, method=own_method(name, rank or 0)), device)
            elif options.tp > 1:
                raise Missing("it has no tensor parallelism here")
            else:
                entries[title] = peer_entry(name, config, rank, device, options.compile_backend)
        except Missing as reason:
            left_out[title] = str(reason)
            print(f"{title} is left out: {reason}", flush=True)
    return entries, left_out


def base_of(title: str) -> list[str]:
    """Return the titles of the entries with which one is compared."""
    _, _, rank = title.partition(" r=")
    return [BASE, *([f"{ADAPTED_BASE} r={rank}"] if rank else [])]


def results(entries: dict[str, Entry], times: dict[str, Times], tokens: int, precision: str) -> dict[str, Any]:
    """Return what was measured of every entry."""
    first = next(iter(entries.values())).losses[0]
    found: dict[str, Any] = {}
    for title, entry in entries.items():
        seconds = median(times[title].seconds)
        found[title] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "over": {base: ratio(times[title], times[base]) for base in base_of(title) if base in times},
            "share_of_step": times[title].shares(),
            "sent_bytes": entry.sent(),
            "first_loss": entry.losses[0],
            "losses_agree": abs(entry.losses[0] - first) <= AGREE[precision] * abs(first),
            **entry.facts,
        }
        if not found[title]["losses_agree"]:
            print(f"{title} starts with the loss {entry.losses[0]}, not {first}: it is another function.", flush=True)
    return found


def measure(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return the cases, by hidden size, sequence length and precision."""
    cases = []
    for hidden, seq_len, precision in product(options.hidden_sizes, options.seq_lens, options.precisions):
        config = make_config(options, hidden, seq_len, precision, ranks.world_size)
        samples = options.tokens // seq_len
        data = batches(config, ranks.rank // options.tp, samples)
        entries, left_out = build(options, config, device)
        times = in_turn(entries, options.rounds, data, options.one_at_a_time)
        cases.append({
            "hidden_size": hidden, "intermediate_size": config.model.intermediate_size, "seq_len": seq_len,
            "precision": precision, "entries": results(entries, times, samples * seq_len, precision),
            "left_out": left_out,
        })  # fmt: skip
        del entries
        gc.collect()
    return {"cases": cases}


def check_options(options: argparse.Namespace, world: int) -> None:
    """Check sizes that must divide, and the names of entries.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    known = [*OWN, *PEERS]
    unknown = [name for name in options.entries if name not in known]
    require(not unknown, f"--entries has no {unknown}: give some of {', '.join(map(repr, known))}.")
    require(
        world % options.tp == 0,
        f"--tp {options.tp} must divide the {world} ranks: start a multiple of it with torchrun.",
    )
    for seq_len in options.seq_lens:
        unit = seq_len * options.micro_batches * (2 if "lte" in options.entries else 1)
        require(
            options.tokens % unit == 0,
            f"--tokens {options.tokens} must be a multiple of {unit}: whole samples of {seq_len} tokens for each of "
            f"{options.micro_batches} micro-batches, and for each of LTE's two heads.",
        )
    for hidden, divisor in product(options.hidden_sizes, options.divisors):
        require(hidden % divisor == 0, f"--hidden_sizes {hidden} must be a multiple of --divisors {divisor}.")


def run(options: argparse.Namespace, door: Door) -> None:
    """Measure on the launcher's ranks; rank 0 writes the result."""
    ranks, device = join_ranks(options.device, options.threads)
    check_options(options, ranks.world_size)
    door.watch_others(ranks, 300)
    before = load()
    found = {
        "setting": {key: value for key, value in vars(options).items() if key != "out"} | {"world": ranks.world_size},
        "machine": describe_machine() | {"device": describe_device(device)},
        **measure(options, ranks, device),
        "load_before_and_after": [before, load()],
    }
    if ranks.rank == 0:
        print(markdown(found), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            options.out.with_suffix(".md").write_text(markdown(found) + "\n", encoding="utf-8")


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = number_from(1)
    parser.add_argument("--out", type=user_path, default=None, help="write the JSON here, and the table beside it")
    parser.add_argument("--entries", nargs="+", default=[*OWN, *PEERS], help="which to measure (default: all)")
    parser.add_argument("--hidden_sizes", type=whole, nargs="+", default=[512])
    parser.add_argument("--divisors", type=whole, nargs="+", default=[4, 8], help="of the hidden size, giving ranks")
    parser.add_argument("--seq_lens", type=whole, nargs="+", default=[512])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--num_layers", type=whole, default=6)
    parser.add_argument("--intermediate_size", type=whole, default=None, help="default: 8/3 h, in multiples of 32")
    parser.add_argument("--vocab_size", type=whole, default=8192)
    parser.add_argument("--pad_multiple", type=whole, default=ModelConfig().pad_multiple, help="model.pad_multiple")
    parser.add_argument("--tokens", type=whole, default=4096, help="tokens per step and data-parallel rank")
    parser.add_argument("--micro_batches", type=whole, default=1, help="into which they are cut")
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--tp", type=whole, default=1)
    parser.add_argument("--threads", type=number_from(0), default=0, help="0: those of a rank alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile_backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="all steps of an entry before the next one's, not in turn"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    with the_door() as door:
        run(options, door)
        end_rank(0)
