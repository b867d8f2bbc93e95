#!/usr/bin/env python3
"""What a run needs on a cluster, before there is one: memory, traffic, step time, and the mesh to choose.

    python tools/plan.py --config launch/configs/llama_1.3b.yaml --nodes 16 --gpus 8 --gpu h100 --link 400Gb
    python tools/plan.py --config ... --config launch/configs/methods/full.yaml ... --brief

Tensor-parallel sizes 1, 2, 4, ... up to --max_tp, ZeRO stages 0 to 2, micro-batches that divide the batch, activation
checkpointing and the bank's spread are tried; the fastest that fits is shown in full, the next in a line each. The
formulas are those of --dry_run (`planning/memory.py`, `planning/traffic.py`) and `planning/step_time.py`, which says
what is left out; no GPU is needed. --link is one adapter's, of which a node has --adapters. --efficiency, the share of
the peak that products reach, is an assumption: take it from a run's MFU where you have one. Options of
launch/pretrain.py may follow; of those that are tried, parallel.tp and train.micro_batch_size stay as they are where
they are among these.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Optional

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import Zero, read_ds_config, resolve_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.planning.dry_run import memory_lines, planned_vocabulary
from megatron_switchlora.planning.memory import Item, checkpoint_bytes, memory_items, peak_bytes
from megatron_switchlora.planning.step_time import GPUS, Machine, StepTime, flops_per_token, step_time

WORKSPACE = 2.5e9  # CUDA's context, cuBLAS, NCCL's buffers and the allocator's gaps: assumed


@dataclass(frozen=True)
class Plan:
    """One way to run it; `before` are the full-rank steps that it may begin with, on the same ranks."""

    config: RunConfig
    mesh: dict[str, int]
    zero: Zero
    micro_batches: int
    items: list[Item]
    time: StepTime
    before: Optional[Plan] = None

    @property
    def peak(self) -> float:
        return max(peak_bytes(self.items) + WORKSPACE, self.before.peak if self.before else 0.0)

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.config.train.steps * self.time.seconds + (self.before.seconds if self.before else 0.0)

    def words(self) -> str:
        train, method, mesh = self.config.train, self.config.method, self.mesh
        heads = f"lte {mesh['lte']} x " if mesh["lte"] > 1 else ""
        again = ", activations computed again" if train.activation_checkpointing else ""
        again += ", bank spread over dp" if method.facts.switches and method.switch.bank_spread == "dp" else ""
        return (
            f"{heads}dp {mesh['dp']} x tp {mesh['tp']}, ZeRO {self.zero.stage}, {self.micro_batches} micro-batches of "
            f"{train.micro_batch_size}{again}"
        )


def make_plan(config: RunConfig, ds_config: dict[str, Any], machine: Machine, vocab_size: int) -> Plan:
    """Raises: UserError, for what the run would refuse."""
    validate(config)
    border = config.method.full_rank_steps
    found = _plan_phase(method_config(config), ds_config, machine, vocab_size)
    if not border:
        return found
    first = full_rank_config(config)
    first = replace(first, train=replace(first.train, steps=border))
    return replace(found, before=_plan_phase(first, ds_config, machine, vocab_size))


def _plan_phase(config: RunConfig, ds_config: dict[str, Any], machine: Machine, vocab_size: int) -> Plan:
    mesh = mesh_sizes(config.parallel, machine.world)
    resolved = resolve_ds_config(ds_config, config, mesh["dp"])
    zero = zero_settings(resolved)
    overlap = zero.stage > 0 and bool(resolved["zero_optimization"].get("overlap_comm"))
    return Plan(
        config, mesh, zero, resolved["gradient_accumulation_steps"],
        memory_items(config, vocab_size, mesh["tp"], mesh["dp"], zero),
        step_time(config, vocab_size, mesh, zero, machine, overlap),
    )  # fmt: skip


def variants(config: RunConfig, ds_config: dict[str, Any], max_tp: int, kept: Sequence[str]) -> Iterator[tuple]:
    """(configuration, DeepSpeed JSON) of everything that may be tried; options that are `kept` are not."""
    sizes = [2**power for power in range(20) if 2**power <= max_tp]
    if "parallel.tp" in kept:
        sizes = [config.parallel.tp]
    largest = config.train.global_batch_size // config.parallel.lte_heads
    batches = [size for size in range(1, min(largest, 256) + 1) if largest % size == 0]
    if "train.micro_batch_size" in kept:
        batches = [config.train.micro_batch_size]
    for tp in sizes:
        for micro in batches:
            for again, spread in product((False, True), ("tp", "dp") if config.method.facts.switches else ("tp",)):
                train = replace(config.train, micro_batch_size=micro, activation_checkpointing=again)
                method = copy.deepcopy(config.method)
                method.switch.bank_spread = spread
                tried = replace(config, method=method, train=train, parallel=replace(config.parallel, tp=tp))
                for stage in (0, 1, 2):
                    section = {**ds_config.get("zero_optimization", {}), "stage": stage}
                    yield tried, {**ds_config, "zero_optimization": section}


def search(
    config: RunConfig,
    ds_config: dict[str, Any],
    machine: Machine,
    max_tp: int,
    vocab_size: int,
    kept: Sequence[str],
) -> list[Plan]:
    """All that fit, in classes of a per cent of time, fastest first; within one by fewest micro-batches, whose larger
    products run best, then by memory.

    Raises:
        UserError: nothing runs on these ranks, or nothing fits, with what comes nearest.
    """
    plans, refusals = [], []
    for tried, json_ in variants(config, ds_config, max_tp, kept):
        try:
            plans.append(make_plan(tried, json_, machine, vocab_size))
        except UserError as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    fitting = [plan for plan in plans if plan.peak <= machine.gpu.memory]
    if not fitting:
        best = min(plans, key=lambda plan: plan.peak)
        raise UserError(
            f"Nothing fits {machine.gpu.memory / 1e9:.0f} GB: {best.words()} comes nearest and needs "
            f"{best.peak / 1e9:.1f} GB, most of it {max(best.items, key=lambda item: item.bytes).kind}. Give more GPUs "
            "a node with a larger --max_tp, or another GPU."
        )
    return sorted(fitting, key=lambda plan: (round(100 * math.log(plan.seconds)), plan.micro_batches, plan.peak))


def facts(plan: Plan, vocab_size: int, machine: Machine, disk: float) -> dict[str, Any]:
    """The numbers of a plan."""
    train, time = plan.config.train, plan.time
    tokens = train.global_batch_size * train.seq_len
    useful = model_flops_per_token(plan.config.model, vocab_size, train.seq_len) * tokens
    stored = checkpoint_bytes(plan.config, vocab_size)
    return {
        "plan": plan.words(),
        "memory": plan.peak,
        "seconds": time.seconds,
        "compute": time.compute,
        "exposed": time.exposed,
        "hidden": time.hidden,
        "by_link": time.by_link,
        "flops_per_token": flops_per_token(plan.config, vocab_size, plan.mesh["tp"], plan.micro_batches),
        "tokens_per_second": tokens / time.seconds,
        "mfu": useful / time.seconds / machine.world / machine.gpu.peak(train.precision),
        "days": plan.seconds / 86400,
        "checkpoint": stored,
        "checkpoint_seconds": stored / disk,
        "full_rank": facts(plan.before, vocab_size, machine, disk) if plan.before else None,
    }


def links(by_link: dict[str, float]) -> str:
    found = [f"{count / 1e6:,.1f} MB {'of a GPU' if link == 'within nodes' else 'of a node'} {link}"
             for link, count in by_link.items() if count]  # fmt: skip
    return ", ".join(found) or "nothing"


def show(plan: Plan, found: dict[str, Any]) -> str:
    exposed = ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in found["exposed"].items()) or "none"
    steps, first = plan.config.train.steps, []
    if plan.before:
        before, count = found["full_rank"], plan.before.config.train.steps
        first = [f"before it            {count:,} full-rank steps of {before['seconds']:.3f} s in "
                 f"{before['memory'] / 1e9:.1f} GB, sending {links(before['by_link'])}"]  # fmt: skip
        steps += count
    return "\n".join([
        f"{found['plan']}.", "",
        *memory_lines(plan.items),
        f"  {'workspace: CUDA, NCCL (assumed)':<50}{WORKSPACE / 1e9:>9.3f}", "",
        *first,
        f"FLOPs a token        {found['flops_per_token'] / 1e9:,.3f} G",
        f"sent a step          {links(found['by_link'])}",
        f"step                 {found['seconds']:.3f} s: compute {found['compute']:.3f} s; not hidden: {exposed}",
        f"throughput           {found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}; {steps:,} steps "
        f"take {found['days']:,.2f} days",
        f"checkpoint           {found['checkpoint'] / 1e9:,.2f} GB, written in {found['checkpoint_seconds']:,.1f} s",
    ])  # fmt: skip


def brief(name: str, found: dict[str, Any]) -> str:
    """A row of Markdown."""
    communication = sum(found["exposed"].values())
    cells = [name, found["plan"], f"{found['memory'] / 1e9:.1f} GB", f"{found['compute']:.3f} s",
             f"{communication:.3f} s", f"{found['seconds']:.3f} s", f"{found['tokens_per_second']:,.0f}",
             f"{found['by_link']['between nodes'] / 1e9:,.2f} GB", f"{found['checkpoint'] / 1e9:,.0f} GB"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def rate(text: str) -> float:
    """Bytes a second of a number with Gb, Mb, GB or MB."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([MG])(b|B)(?:/s|it/s|ps)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give for example 400Gb (bits) or 2GB (bytes) a second")
    return float(found[1]) * {"M": 1e6, "G": 1e9}[found[2]] / (8 if found[3] == "b" else 1)


def check(arguments: argparse.Namespace) -> None:
    """Raises: UserError, for numbers that make no plan."""
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
    parser.add_argument("--ds_config", help="DeepSpeed JSON; its stage is tried anew unless --as_configured")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="a node (default: 8)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
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
    found = facts(plans[0], vocab_size, machine, arguments.disk)
    label: str = arguments.name or config.method.name
    print(brief(label, found) if arguments.brief else show(plans[0], found))
    if not arguments.brief:
        for plan in plans[1:6]:
            print(f"next: {plan.time.seconds:.3f} s, {plan.peak / 1e9:.1f} GB: {plan.words()}")
    if arguments.out is not None:
        content = found | {"items": [asdict(item) for item in plans[0].items], "name": label}
        replace_text(arguments.out, json.dumps(content, indent=1) + "\n")
    needed, there = plans[0].peak / 1e9, machine.gpu.memory / 1e9
    require(
        needed <= there,
        f"This does not fit: a rank needs {needed:.1f} GB, and {arguments.gpu} has {there:.0f}. Leave out "
        "--as_configured to look for what fits.",
    )


def main() -> None:
    arguments, options = make_parser().parse_known_args()
    try:
        act(arguments, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
