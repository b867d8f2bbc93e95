"""What a run needs on a cluster, before there is one: memory, traffic, step time, and the mesh to choose.

    switchlora plan --config llama_1.3b --nodes 16 --gpus 8 --gpu h100 --link 400Gb
    switchlora plan --config ... --config methods/full ... --brief

Tensor-parallel sizes 1, 2, 4, ... up to --max_tp, ZeRO stages 0 to 2, micro-batches that divide the batch, activation
checkpointing and the bank's spread are tried; the fastest that fits is shown in full, the next in a line each. The
formulas are those of --dry_run (`planning/memory.py`, `planning/traffic.py`) and `planning/step_time.py`, which lists
what is left out; no GPU is needed. --link is one adapter's, of which a node has --adapters. --efficiency, the share of
the peak that products reach, is an assumption: take it from a run's MFU where you have one. Options of
`switchlora pretrain` may follow; of those that are tried, parallel.tp and train.micro_batch_size stay as they are where
they are among these.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config
from megatron_switchlora.config.errors import ends_on_mistake, require
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.planning.dry_run import planned_vocabulary
from megatron_switchlora.planning.report import brief, facts, show
from megatron_switchlora.planning.search import make_plan, search
from megatron_switchlora.planning.step_time import GPUS, Machine


def rate(text: str) -> float:
    """Return the bytes per second that a number with Gb, Mb, GB or MB means."""
    match = re.fullmatch(r"(\d+\.?\d*)\s*([MG])(b|B)(?:/s|it/s|ps)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give for example 400Gb (bits) or 2GB (bytes) a second")
    return float(match[1]) * {"M": 1e6, "G": 1e9}[match[2]] / (8 if match[3] == "b" else 1)


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments.

    Raises:
        UserError: numbers that make no plan.
    """
    for name in ("nodes", "gpus", "adapters", "max_tp"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name} must be at least 1, not {value}.")
    for name in ("link", "disk"):
        require(0 < getattr(arguments, name) < float("inf"), f"--{name} must be above 0, and finite.")
    require(0 < arguments.efficiency <= 1, f"--efficiency must be above 0 and at most 1, not {arguments.efficiency}.")
    out = arguments.out
    require(out is None or out.parent.is_dir(), f"--out {out}: there is no folder {out and out.parent}: make it first.")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], help="YAML of a run; several, the last one wins")
    parser.add_argument("--ds_config", help="DeepSpeed JSON; other stages are tried too unless --as_configured")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="a node (default: 8)")
    parser.add_argument("--gpu", type=str.lower, choices=sorted(GPUS), default="h100")
    parser.add_argument("--link", type=rate, default="400Gb", help="one network adapter, as 400Gb (default)")
    parser.add_argument("--adapters", type=int, default=1, help="network adapters of a node (default: 1)")
    parser.add_argument("--disk", type=rate, default="2GB", help="storage, all ranks together, as 2GB (default)")
    parser.add_argument("--efficiency", type=float, default=0.45, help="of the peak, in products (default: 0.45)")
    parser.add_argument("--max_tp", type=int, help="largest tensor-parallel size tried (default: --gpus)")
    parser.add_argument("--as_configured", action="store_true", help="plan the configuration itself, try nothing else")
    parser.add_argument("--brief", action="store_true", help="only a row of a Markdown table")
    parser.add_argument("--name", help="of that row (default: the method's name)")
    parser.add_argument("--out", type=user_path, help="write the best plan's numbers here, as JSON")
    return parser


def act(arguments: argparse.Namespace, options: list[str]) -> None:
    check(arguments)
    config = parse_arguments([*(f"--config={file}" for file in arguments.config), *options]).config
    ds_config = read_ds_config(arguments.ds_config)
    link = arguments.link * arguments.adapters
    machine = Machine(GPUS[arguments.gpu], arguments.nodes, arguments.gpus, link, arguments.efficiency)
    vocab_size, _ = planned_vocabulary(config)
    if arguments.as_configured:
        plans = [make_plan(config, ds_config, machine, vocab_size)]
    else:
        kept = [option.split("=")[0].removeprefix("--") for option in options if option.startswith("--")]
        plans = search(config, ds_config, machine, arguments.max_tp or arguments.gpus, vocab_size, kept)
    numbers = facts(plans[0], vocab_size, machine, arguments.disk)
    label: str = arguments.name or config.method.name
    print(brief(label, numbers) if arguments.brief else show(plans[0], numbers))
    if not arguments.brief:
        for plan in plans[1:6]:
            print(f"next: {plan.time.seconds:.3f} s, {plan.peak / 1e9:.1f} GB: {plan.describe()}")
    if arguments.out is not None:
        content = numbers | {"items": [asdict(item) for item in plans[0].items], "name": label}
        replace_text(arguments.out, json.dumps(content, indent=1) + "\n")
    needed, there = plans[0].peak / 1e9, machine.gpu.memory / 1e9
    require(
        needed <= there,
        f"This does not fit: a rank needs {needed:.1f} GB, and {arguments.gpu} has {there:.0f}. Leave out "
        "--as_configured to look for what fits.",
    )


def main(argv: Sequence[str]) -> None:
    arguments, options = make_parser().parse_known_args(argv)
    with ends_on_mistake():
        act(arguments, options)
