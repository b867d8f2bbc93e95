"""Cases whose volume of collectives is predicted: methods under DeepSpeed JSONs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.planning.dry_run import planned_vocabulary
from megatron_switchlora.planning.traffic import axis_size, flows, on_the_wire


@dataclass(frozen=True)
class Case:
    """One method under one DeepSpeed JSON. `config`'s batch is what its micro-batches make."""

    name: str
    config: RunConfig
    ds_config: dict[str, Any]
    micro_batches: int


def make_cases(arguments: argparse.Namespace, options: list[str], world: int) -> list[Case]:
    """Return the cases that the command line gives.

    Raises:
        UserError: a run of one of them would refuse it.
    """
    cases: list[Case] = []
    for method in arguments.method or [""]:
        path, *more = split_options(method)
        files = [*arguments.config, *([path] if path else [])]
        config = parse_arguments([*(f"--config={file}" for file in files), *options, *more]).config
        name = " ".join([Path(path).stem or config.method.name, *(word.split(".")[-1] for word in more)])
        if config.method.full_rank_steps:  # traffic of their own
            cases += sized_cases(arguments, f"{name}: the full-rank steps", full_rank_config(config), world)
        method = method_config(config)
        cases += sized_cases(arguments, name, replace(method, method=replace(method.method, full_rank_steps=0)), world)
    return cases


def sized_cases(arguments: argparse.Namespace, name: str, config: RunConfig, world: int) -> Iterator[Case]:
    """Yield one configuration under every DeepSpeed JSON and accumulation."""
    dp = mesh_sizes(config.parallel, world)["dp"]
    per_pass = config.train.micro_batch_size * dp * config.parallel.lte_heads
    for given in arguments.ds_config or [None]:
        ds_config = read_ds_config(given)
        for count in arguments.accumulation or [None]:
            batch = config.train.global_batch_size if count is None else count * per_pass
            sized = replace(config, train=replace(config.train, global_batch_size=batch))
            resolve_ds_config(ds_config, sized, dp)
            yield Case(name, sized, ds_config, batch // per_pass)


def split_options(method: str) -> list[str]:
    """Split a --method into its file and the options behind it."""
    try:
        words = shlex.split(method) or [""]
    except ValueError as error:
        raise UserError(f"--method {method!r}: {error}.") from None
    require(not words[0].startswith("-"), f"--method {method!r}: a YAML must come first, options may follow it.")
    return words


def predicted(case: Case, world: int) -> dict[str, Any]:
    """Return the prediction of one case, and that of full-rank training on the same ranks."""
    mesh = mesh_sizes(case.config.parallel, world)
    zero = zero_settings(resolve_ds_config(case.ds_config, case.config, mesh["dp"]))
    vocab_size, _ = planned_vocabulary(case.config)
    case_flows = flows(case.config, vocab_size, mesh, zero)
    full = full_rank_config(case.config)
    full_dp = mesh_sizes(full.parallel, world)["dp"]
    full_mesh = {"lte": 1, "dp": full_dp, "tp": mesh["tp"]}
    reference = flows(full, vocab_size, full_mesh, zero)
    return {
        "name": case.name,
        "zero": zero.stage,
        "micro_batches": case.micro_batches,
        "mesh": mesh,
        "predicted": [asdict(flow) for flow in case_flows],
        "wire_predicted": sum(on_the_wire(f.op, f.bytes, axis_size(mesh, f.axis)) for f in case_flows),
        "full_rank_gradients": sum(flow.bytes for flow in reference if flow.kind == "gradients"),
        "full_rank_wire": sum(on_the_wire(f.op, f.bytes, axis_size(full_mesh, f.axis)) for f in reference),
    }
