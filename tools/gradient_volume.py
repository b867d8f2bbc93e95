#!/usr/bin/env python3
"""Bytes that a step gives to collectives, by method and group of parameters: predicted, recorded, on the wire.

    python tools/gradient_volume.py --world 128 --config launch/configs/llama_1.3b.yaml \\
        --method launch/configs/methods/full.yaml --method launch/configs/methods/switchlora_r512.yaml
    torchrun ... tools/gradient_volume.py --measure --interface eth0 --config ... --method ... --method ...

With --world it predicts, from configurations alone, for so many ranks. With --measure every rank of a launcher runs it:
steps of the real engine on random tokens are recorded at the process groups, DeepSpeed's own communication log and,
with --interface, the bytes that rank 0's host sends are read beside them, and prediction and record stand in one table.
--method is a YAML over --config, once a method, and may have options behind it in the same quotes, as "lte_r64.yaml
--parallel.lte_heads 16"; --ds_config may be repeated, --accumulation lists micro-batches of a step. Other options are
those of launch/pretrain.py, for all methods. Bytes are a rank's in a step, of tensors of which it holds a part those
of its part; gradients are what low-rank training saves, all else is listed beside them: ZeRO's all-gather of updated
parameters, the candidate bank, tensor parallelism, LTE's merges, scalars ("control").
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

from volume_report import chart, table

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.distributed.consensus import on_all_ranks
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.planning.dry_run import planned_vocabulary
from megatron_switchlora.planning.traffic import axis_size, flows, on_the_wire
from megatron_switchlora.run.figures import decorating
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import end_rank


@dataclass(frozen=True)
class Case:
    """One method under one DeepSpeed JSON. `config`'s batch is what its micro-batches make."""

    name: str
    config: RunConfig
    ds_config: dict[str, Any]
    micro_batches: int


def make_cases(arguments: argparse.Namespace, options: list[str], world: int) -> list[Case]:
    """Raises: UserError, for what a run of one of them would refuse."""
    cases: list[Case] = []
    for method in arguments.method or [""]:
        path, *more = split_words(method)
        files = [*arguments.config, *([path] if path else [])]
        config = parse_arguments([*(f"--config={file}" for file in files), *options, *more]).config
        name = " ".join([Path(path).stem or config.method.name, *(word.split(".")[-1] for word in more)])
        if config.method.full_rank_steps:  # traffic of their own
            cases += sized_cases(arguments, f"{name}: the full-rank steps", full_rank_config(config), world)
        method = method_config(config)
        cases += sized_cases(arguments, name, replace(method, method=replace(method.method, full_rank_steps=0)), world)
    return cases


def sized_cases(arguments: argparse.Namespace, name: str, config: RunConfig, world: int) -> Iterator[Case]:
    """One configuration under every DeepSpeed JSON and accumulation."""
    dp = mesh_sizes(config.parallel, world)["dp"]
    per_pass = config.train.micro_batch_size * dp * config.parallel.lte_heads
    for given in arguments.ds_config or [None]:
        ds_config = read_ds_config(given)
        for count in arguments.accumulation or [None]:
            batch = config.train.global_batch_size if count is None else count * per_pass
            sized = replace(config, train=replace(config.train, global_batch_size=batch))
            resolve_ds_config(ds_config, sized, dp)
            yield Case(name, sized, ds_config, batch // per_pass)


def split_words(method: str) -> list[str]:
    """The file of a --method and the options behind it."""
    try:
        words = shlex.split(method) or [""]
    except ValueError as error:
        raise UserError(f"--method {method!r}: {error}.") from None
    require(not words[0].startswith("-"), f"--method {method!r}: a YAML must come first, options may follow it.")
    return words


def check(arguments: argparse.Namespace) -> None:
    """Raises: UserError, for what needs no configuration to be wrong."""
    require(arguments.steps is None or arguments.steps >= 1, f"--steps must be at least 1, not {arguments.steps}.")
    for count in arguments.accumulation or []:
        require(count >= 1, f"--accumulation must be at least 1, not {count}.")
    out = arguments.out
    require(
        out is None or (out.parent.is_dir() and out.suffix == ".json"),
        f"--out {out} must be a .json in a folder that is there.",
    )
    if not arguments.measure:
        require(arguments.world >= 1, f"--world must be at least 1, not {arguments.world}.")
        for name in ("steps", "interface"):
            require(getattr(arguments, name) is None, f"--{name} goes with --measure; --world only predicts.")


def predicted(case: Case, world: int) -> dict[str, Any]:
    """The prediction of one case, and the same of full-rank training on the same ranks."""
    mesh = mesh_sizes(case.config.parallel, world)
    zero = zero_settings(resolve_ds_config(case.ds_config, case.config, mesh["dp"]))
    vocab_size, _ = planned_vocabulary(case.config)
    found = flows(case.config, vocab_size, mesh, zero)
    full = full_rank_config(case.config)
    full_dp = mesh_sizes(full.parallel, world)["dp"]
    full_mesh = {"lte": 1, "dp": full_dp, "tp": mesh["tp"]}
    reference = flows(full, vocab_size, full_mesh, zero)
    return {
        "name": case.name,
        "zero": zero.stage,
        "micro_batches": case.micro_batches,
        "mesh": mesh,
        "predicted": [asdict(flow) for flow in found],
        "wire_predicted": sum(on_the_wire(f.op, f.bytes, axis_size(mesh, f.axis)) for f in found),
        "full_rank_gradients": sum(flow.bytes for flow in reference if flow.kind == "gradients"),
        "full_rank_wire": sum(on_the_wire(f.op, f.bytes, axis_size(full_mesh, f.axis)) for f in reference),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], help="YAML of a run; several, the last one wins")
    parser.add_argument("--method", action="append", help="YAML over it, one a method, with options; repeat it")
    parser.add_argument("--ds_config", action="append", help="DeepSpeed JSON, by default ZeRO stage 1; repeat it")
    parser.add_argument("--accumulation", type=int, nargs="+", help="micro-batches a step, instead of the global batch")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--world", type=int, help="predict for so many ranks")
    mode.add_argument("--measure", action="store_true", help="run steps on the ranks of the launcher and record them")
    parser.add_argument("--steps", type=int, help="steps to measure (default: 4), merges in them included")
    parser.add_argument("--interface", help="network interface whose sent bytes are read, as eth0")
    parser.add_argument(
        "--out", type=user_path, help="write the JSON here, beside it the table (.md) and the chart (.png)"
    )
    return parser


def report(results: list[dict[str, Any]], out: Optional[Path]) -> None:
    text = table(results)
    print(text)
    if out is not None:
        replace_text(out, json.dumps(results, indent=1) + "\n")
        replace_text(out.with_suffix(".md"), text + "\n")
        with decorating(f"drawing {out.with_suffix('.png')}"):
            chart(results, out.with_suffix(".png"))


def measure_cases(arguments: argparse.Namespace, options: list[str]) -> None:
    """On every rank of the launcher; rank 0 keeps what is measured so far after each case, and reports at the end.

    Raises:
        UserError: on every rank, what one of them may not do; before anything is measured, if it can be known then.
    """
    from volume_ranks import check_steps, measure, sent, start

    ranks, device = start(os.environ)
    world, steps = ranks.world_size, arguments.steps or 4
    cases = on_all_ranks(lambda: make_cases(arguments, options, world), device)
    sent(arguments.interface, device)
    for case in cases:
        check_steps(case, steps)
    results: list[dict[str, Any]] = []
    for case in cases:
        results.append(predicted(case, world) | measure(case, device, steps, arguments.interface))
        if ranks.rank == 0 and arguments.out is not None:
            replace_text(arguments.out, json.dumps(results, indent=1) + "\n")
    if ranks.rank == 0:
        report(results, arguments.out)


def main() -> None:
    arguments, options = make_parser().parse_known_args()
    with the_door():  # without its watch, whose words would be counted on the wire
        check(arguments)
        if not arguments.measure:
            cases = make_cases(arguments, options, arguments.world)
            report([predicted(case, arguments.world) for case in cases], arguments.out)
            return
        measure_cases(arguments, options)
        end_rank(0)


if __name__ == "__main__":
    main()
