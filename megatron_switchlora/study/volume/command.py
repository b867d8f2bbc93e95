"""Bytes that a step gives to collectives, by method and group of parameters: predicted, recorded, on the wire.

    switchlora volume --world 128 --config llama_1.3b --method methods/full --method methods/switchlora_r512
    torchrun ... --no-python switchlora volume --measure --interface eth0 --config ... --method ... --method ...

With --world it predicts, from configurations alone, for this number of ranks. With --measure every rank of a launcher
runs it: steps of the real engine on random tokens are recorded at the process groups, DeepSpeed's own communication log
and, with --interface, the bytes that rank 0's host sends are read beside them. One table has prediction and record.
--method is a YAML over --config, once per method, and may have options behind it in the same quotes, as "lte_r64.yaml
--parallel.lte_heads 16"; --ds_config may be repeated, --accumulation lists micro-batches per step. Other options are
those of switchlora pretrain, for all methods. Bytes are a rank's per step; of a tensor of which it holds a slice, those
of the slice. Gradients are what low-rank training saves. All else is listed beside them: ZeRO's all-gather of updated
parameters, the candidate bank, tensor parallelism, LTE's merges, scalars ("control").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.distributed.consensus import on_all_ranks
from megatron_switchlora.run.figures import decorating
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import end_rank
from megatron_switchlora.study.volume.cases import make_cases, predicted
from megatron_switchlora.study.volume.report import chart, table


def check(arguments: argparse.Namespace) -> None:
    """Check what needs no configuration.

    Raises:
        UserError: an option is wrong.
    """
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], help="YAML of a run; several, the last one wins")
    parser.add_argument("--method", action="append", help="YAML over it, one per method, with options; repeat it")
    parser.add_argument("--ds_config", action="append", help="DeepSpeed JSON, by default ZeRO stage 1; repeat it")
    parser.add_argument(
        "--accumulation", type=int, nargs="+", help="micro-batches per step, instead of the global batch"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--world", type=int, help="predict for this number of ranks")
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
    """Measure on every rank of the launcher; rank 0 writes the results so far after each case, and reports at the end.

    Raises:
        UserError: on every rank, what one of them may not do; before anything is measured, if it can be known then.
    """
    from megatron_switchlora.study.benchmarks.common import join_ranks
    from megatron_switchlora.study.volume.measure import check_steps, measure, sent

    ranks, device = join_ranks("auto", threads=1)
    world, steps = ranks.world_size, arguments.steps or 4
    cases = on_all_ranks(lambda: make_cases(arguments, options, world))
    sent(arguments.interface)
    for case in cases:
        check_steps(case, steps)
    results: list[dict[str, Any]] = []
    for case in cases:
        results.append(predicted(case, world) | measure(case, device, steps, arguments.interface))
        if ranks.rank == 0 and arguments.out is not None:
            replace_text(arguments.out, json.dumps(results, indent=1) + "\n")
    if ranks.rank == 0:
        report(results, arguments.out)


def main(argv: Sequence[str]) -> None:
    arguments, options = make_parser().parse_known_args(argv)
    with the_door():  # without its watch, whose words would be counted on the wire
        check(arguments)
        if not arguments.measure:
            cases = make_cases(arguments, options, arguments.world)
            report([predicted(case, arguments.world) for case in cases], arguments.out)
            return
        measure_cases(arguments, options)
        end_rank(0)
