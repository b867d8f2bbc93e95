"""Pre-train a LLaMA. Start it with deepspeed, torchrun, mpirun, srun, or alone as one process:

deepspeed --num_gpus 2 launch/pretrain.py --config launch/configs/cpu_quickstart.yaml --ds_config ds_configs/zero1.json

Rank 0 reports a mistake in the input once, and every rank then exits with status 2. startup/door.py lists the other
exits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Optional

import torch

import megatron_switchlora.methods  # noqa: F401  # registers them
from megatron_switchlora.checkpoint.resume_rules import what_must_agree
from megatron_switchlora.config.command_line import Arguments, parse_arguments
from megatron_switchlora.config.data import unused_limits
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config
from megatron_switchlora.config.errors import require
from megatron_switchlora.config.rules import unused_options
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.consensus import on_one_rank
from megatron_switchlora.startup.device import allow_open_files, choose_device, precision_warning, set_determinism
from megatron_switchlora.startup.door import Door, the_door
from megatron_switchlora.startup.environment import Ranks, complete_environment, discover_ranks, end_rank
from megatron_switchlora.startup.launchers import is_first
from megatron_switchlora.startup.loggers import check_loggers
from megatron_switchlora.startup.preflight import meet
from megatron_switchlora.startup.signals import REQUEUE, StopRequest

if TYPE_CHECKING:
    from megatron_switchlora.data.packing import PreparedData


def check_early(arguments: Arguments, ranks: Ranks) -> None:
    """Check what can be checked before deepspeed is imported.

    Raises:
        UserError: an option breaks a rule.
    """
    from megatron_switchlora.distributed.mesh import mesh_sizes

    if arguments.evaluate_only:  # mesh and batch come from the run's own configuration
        require(
            arguments.config.output_dir is not None,
            "--evaluate_only evaluates the finished run in --output_dir: give its folder.",
        )
        return
    dp = mesh_sizes(arguments.config.parallel, ranks.world_size)["dp"]
    resolve_ds_config(read_ds_config(arguments.ds_config), arguments.config, dp)


def show_plan(arguments: Arguments, first: bool) -> None:
    """Print the plan of the run on rank 0; raise on every rank the errors that the run would raise."""
    from megatron_switchlora.planning.dry_run import plan

    world_size = arguments.dry_run_world or discover_ranks(os.environ).world_size
    given = read_ds_config(arguments.ds_config)
    text = plan(arguments.config, given, world_size)
    check_loggers(arguments.config.log, given)
    if first:
        warn(*unused_warnings(arguments.config))
        print(text)


def unused_warnings(config: RunConfig) -> list[str]:
    """Return a warning for each kind of option that changes nothing."""
    method, data = unused_options(config.method), unused_limits(config.data)
    warnings = [f"{', '.join(method)}: without effect in method.name {config.method.facts.title}."] if method else []
    return warnings + ([f"{', '.join(data)}: without effect in data.source {config.data.source}."] if data else [])


def warn(*texts: Optional[str]) -> None:
    """Print the warnings that are not empty."""
    for text in texts:
        if text:
            print(f"warning: {text}", flush=True)


def prepare_only(arguments: Arguments, first: bool) -> None:
    """Prepare the token cache on rank 0 alone."""
    from megatron_switchlora.data.packing import prepare

    if first:
        data = prepare(arguments.config.data, progress=True)
        warn(*data.notes)
        print(
            f"{data.folder}: {data.train.num_tokens:,} tokens to train on, {data.val.num_tokens:,} to validate, a "
            f"vocabulary of {data.vocab_size:,}. Runs with the same data options open it."
        )


def meet_others(arguments: Arguments, ranks: Ranks, device: torch.device) -> torch.distributed.Store:
    """Check that all ranks have the same options and versions; return the store through which they have met."""
    same = what_must_agree(arguments.config, read_ds_config(arguments.ds_config), device)
    same["--evaluate_only"] = arguments.evaluate_only
    return meet(os.environ, ranks, same, arguments.config.parallel.start_timeout)


def run(arguments: Arguments, ranks: Ranks, stop: StopRequest, door: Door, data: Optional[PreparedData] = None) -> int:
    """Train, on the given data instead of the configured, or evaluate, and return the exit status."""
    allow_open_files()
    timeout = arguments.config.parallel.timeout
    set_determinism(arguments.config.train.deterministic)
    device = choose_device(arguments.config.train.device, ranks, arguments.config.train.threads)
    store = meet_others(arguments, ranks, device) if ranks.world_size > 1 else None
    door.watch_others(ranks, timeout, store)
    from megatron_switchlora.train.engine import start_distributed

    start_distributed(device, timeout, store)
    status = 0
    if arguments.evaluate_only:
        from megatron_switchlora.train.evaluate import evaluate_run

        evaluate_run(arguments.config, ranks, device)
    else:
        status = train(arguments, ranks, device, stop, data)
    door.close()
    return status


def train(
    arguments: Arguments, ranks: Ranks, device: torch.device, stop: StopRequest, data: Optional[PreparedData] = None
) -> int:
    """Train the run, or its remaining steps, and return the exit status."""
    from megatron_switchlora.checkpoint.resume import find_resume_point
    from megatron_switchlora.run.figures import decorating, outlive_terminal
    from megatron_switchlora.train.summary import describe_end
    from megatron_switchlora.train.trainer import Trainer

    started_at = time.perf_counter()
    outlive_terminal()
    given = read_ds_config(arguments.ds_config)
    on_one_rank(ranks.rank == 0, partial(check_loggers, arguments.config.log, given))
    resume_point = find_resume_point(arguments.config)
    if resume_point.finished:
        if ranks.rank == 0:
            print(f"The run in {arguments.config.output_dir} is finished: give another --output_dir for a new one.")
        return 0
    if ranks.rank == 0:
        warn(*unused_warnings(arguments.config), precision_warning(device, arguments.config.train.precision))
    trainer = Trainer(arguments.config, given, ranks, device, resume_point, stop, data)
    val_loss = trainer.fit()
    if val_loss is not None:
        with decorating("the summary"):
            seconds = time.perf_counter() - started_at
            trainer.print_line("\n" + describe_end(trainer.context, trainer.mesh, trainer.run, val_loss, seconds))
    return REQUEUE if val_loss is None else 0


def main(argv: Sequence[str]) -> None:
    quiet = {"--print_config", "--help", "-h"}
    first = is_first(os.environ)
    if not first and any(arg.split("=")[0] in quiet for arg in argv):
        return  # only rank 0 prints
    with the_door() as door:
        stop = StopRequest()
        stop.install()
        arguments = parse_arguments(argv)  # --help works wherever it is typed
        if arguments.dry_run:
            show_plan(arguments, first)
            end_rank(0)
        if arguments.prepare_only:
            prepare_only(arguments, first)
            end_rank(0)
        ranks = discover_ranks(os.environ)
        complete_environment(os.environ)
        check_early(arguments, ranks)
        end_rank(run(arguments, ranks, stop, door))
