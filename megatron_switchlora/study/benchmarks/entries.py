"""The entries of a comparison, and the options that choose them: which, and of which sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
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
from megatron_switchlora.startup.door import Door
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.study.benchmarks.common import describe_machine, join_ranks
from megatron_switchlora.study.benchmarks.own_entries import OWN, own_entry, own_method
from megatron_switchlora.study.benchmarks.peer_entries import PEERS, Missing, peer_entry
from megatron_switchlora.study.benchmarks.turns import Entry, load

HEAD_DIM = 64


def entry_options(description: Optional[str]) -> argparse.ArgumentParser:
    """Return a parser of the options that choose entries and sizes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser


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


def measured(
    options: argparse.Namespace, door: Door, measure: Callable[[argparse.Namespace, Ranks, torch.device], Any]
) -> tuple[Ranks, dict[str, Any]]:
    """Measure on the launcher's ranks; return them, and a result with the setting, the machine and its load."""
    ranks, device = join_ranks(options.device, options.threads)
    check_options(options, ranks.world_size)
    door.watch_others(ranks, 300)
    before = load()
    found = measure(options, ranks, device)
    return ranks, {
        "setting": {key: value for key, value in vars(options).items() if key != "out"},
        "machine": describe_place(device),
        **found,
        "load_before_and_after": [before, load()],
    }


def wanted(options: argparse.Namespace, hidden: int) -> Iterator[tuple[str, str, Optional[int]]]:
    """Yield (name in the result, entry, rank) of every entry to build."""
    for name in options.entries:
        if OWN.get(name) is None and not PEERS.get(name):
            yield name, name, None
        else:
            for divisor in options.divisors:
                yield f"{name} r=h/{divisor}", name, hidden // divisor


def build(
    options: argparse.Namespace, config: RunConfig, name: str, rank: Optional[int], device: torch.device
) -> Entry:
    """Return an entry by its name.

    Raises:
        Missing: it cannot run here.
    """
    if name in OWN:
        return own_entry(replace(config, method=own_method(name, rank or 0)), device)
    if options.tp > 1:
        raise Missing("it has no tensor parallelism here")
    return peer_entry(name, config, rank, device, options.compile_backend)


def describe_place(device: torch.device) -> dict[str, Any]:
    """Return the machine, the device, and the versions, those of the peers' packages too."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    for package in ("peft", "galore-torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return describe_machine() | found
